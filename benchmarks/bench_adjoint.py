# SPDX-License-Identifier: Apache-2.0
"""How near gradients are to those of the exact flow, for as many network evaluations.

`error` is the distance against network evaluations, those of the backward pass included, beside
torchdiffeq. `table` is the adjoint's own error, at the states of a fine run, beside that of the
sampler's own gradient. All is float64 and the same on every machine.

    python benchmarks/run.py adjoint --out benchmarks/results/gradients.jsonl
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np
import torch
from command import names, option, whole_numbers
from gradient_gate import gate
from problems.flows import (
    PROBLEMS,
    TITLES,
    Mixture,
    apart,
    fine_plan,
    gradients,
    mixture,
    truth,
)
from reports import adjoint as report
from reports.adjoint import LEAVES, Points, Table
from rivals import torchdiffeq
from torch import nn

import fastdiff as fd
from fastdiff.bench.flows import VP, Flow, vp_plan
from fastdiff.bench.machine import installed
from fastdiff.bench.records import Record, record
from fastdiff.bench.runs import Bench, Gate, Job, Setting

BUDGETS = (10, 16, 20, 30, 40, 60, 80, 100, 200)  # evaluations; the target ends at 100
TABLE_STEPS = (5, 10, 20, 50)
# Steps of the fine run, whose states and gradient are exact to all digits shown.
FINE = 600

OURS: dict[str, tuple[str, Any]] = {
    "discrete, ddim": ("ddim", "discrete"),
    "discrete, dpmpp-2m": ("dpmpp-2m", "discrete"),
    "discrete, dpmpp-3m": ("dpmpp-3m", "discrete"),
    "discrete, deis-logrho-3": ("deis-logrho-3", "discrete"),
    "AdjointDEIS(1), dpmpp-3m": ("dpmpp-3m", fd.AdjointDEIS(1)),
    "AdjointDEIS(2), dpmpp-3m": ("dpmpp-3m", fd.AdjointDEIS(2)),
    "AdjointDEIS(3), dpmpp-3m": ("dpmpp-3m", fd.AdjointDEIS(3)),
}

# -- error against evaluations ---------------------------------------------------------------------


class Counted:
    """A network that counts its calls."""

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        self.network, self.calls = network, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.calls += 1
        return self.network(*arguments, **keywords)


def measure_error(flow: Flow, fine: int, budgets: Sequence[int], with_theirs: bool) -> Points:
    """The error of a_x by evaluations, forward and backward together, as counted."""
    if isinstance(flow.network, nn.Module):
        flow.network.requires_grad_(False)
    exact = truth(flow, fine)
    found: Points = {}

    def note(rival: str, calls: int, gradient: torch.Tensor) -> None:
        error = apart({"x": gradient}, {"x": exact["x"]})["x"]
        if math.isfinite(error):
            found.setdefault(rival, {})[calls] = float(f"{error:.4g}")

    cond = {k: v for k, v in flow.cond.items() if not v.is_floating_point()}
    network = flow.network
    if isinstance(network, Mixture):
        network = functools.partial(network, z=flow.cond["z"])
    for name, (solver, gradient) in OURS.items():
        for budget in budgets:
            counted = Counted(network)
            ours = replace(flow, network=counted, cond=cond)
            got = gradients(ours, vp_plan(flow, solver, budget // 2), gradient)
            note(name, counted.calls, got["x"])
    if not with_theirs:
        return found
    theirs = replace(flow, network=network, cond=cond)
    for method, settings in torchdiffeq.settings(flow).items():
        for options in settings:
            # AssertionError: its step underflows, or the state is not finite
            with contextlib.suppress(torchdiffeq.Exhausted, AssertionError):
                got, calls = torchdiffeq.gradients(theirs, max(budgets), **options)
                note(f"torchdiffeq {method}", calls, got[0])
    return found


# -- the adjoint's own error -----------------------------------------------------------------------


def _adjoint(order: int, form: str, published: bool = False) -> Callable[[int, str], Any]:
    def gradient(steps: int, grid: str) -> fd.AdjointDEIS:
        return fd.AdjointDEIS(order, form, steps=steps, grid=grid, published=published)

    return gradient


# Lambda is finite at both ends here, so every form has its limit.
AT_EXACT_STATES: dict[str, Callable[[int, str], Any]] = {
    "AdjointDEIS-1 of the paper, epsilon": _adjoint(1, "epsilon", True),
    "AdjointDEIS-2M of the paper, epsilon": _adjoint(2, "epsilon", True),
    "AdjointDEIS-1 of the paper, x0": _adjoint(1, "x0", True),
    "AdjointDEIS-2M of the paper, x0": _adjoint(2, "x0", True),
    "order 1 (far end)": _adjoint(1, "epsilon"),
    "order 2, epsilon": _adjoint(2, "epsilon"),
    "order 2, x0": _adjoint(2, "x0"),
    "order 3, epsilon": _adjoint(3, "epsilon"),
    "order 3, x0": _adjoint(3, "x0"),
}
SAMPLERS = ("ddim", "dpmpp-2m", "dpmpp-3m", "deis-logrho-3")
ALONG_NOISE: dict[str, Any] = {
    "discrete (ddim, eta = 1)": "discrete",
    "AdjointDEIS-1 of the paper": fd.AdjointDEIS(1, published=True),
    "AdjointDEIS-2M of the paper": fd.AdjointDEIS(2, published=True),
    "order 1 (far end)": fd.AdjointDEIS(1),
    "order 2": fd.AdjointDEIS(2),
    "order 3": fd.AdjointDEIS(3),
}


def measure_table(
    name: str, flow: Flow, fine: int, counts: Sequence[int], grids: Sequence[str]
) -> Table:
    """Relative errors of every leaf, by method and steps. The adjoint stands at exact states."""
    exact, plan = truth(flow, fine), fine_plan(flow, fine)
    table: Table = {}

    def note(grid: str, rival: str, steps: int, found: Mapping[str, torch.Tensor]) -> None:
        for leaf, error in apart(found, exact).items():
            by = table.setdefault((name, grid, leaf), {}).setdefault(rival, {})
            by[steps] = float(f"{error:.4g}")

    for grid in grids:
        for solver in SAMPLERS:
            for steps in counts:
                own = vp_plan(flow, solver, steps, grid)
                note(grid, f"discrete, {solver}", steps, gradients(flow, own, "discrete"))
        for rival, make in AT_EXACT_STATES.items():
            for steps in counts:
                note(grid, rival, steps, gradients(flow, plan, make(steps, grid)))
    return table


def path_of(
    flow: Flow, plan: fd.Plan, substeps: int, seed: int
) -> tuple[fd.Plan, list[torch.Tensor]]:
    """A finer plan of the reverse SDE, and noise for it that adds up to what a coarse one draws.

    Each of the coarse plan's steps is divided into `substeps` equal ones in lambda. Their noises
    are drawn given their sum: with w_i the weight of the i-th in the plan's c xi,

        z_i = u_i - w_i (sum_j w_j u_j - c xi) / sum_j w_j^2,      u_i standard normal
    """
    times = np.array(plan.times)
    lam = VP.lambda_t(times)
    points = [np.linspace(a, b, substeps, endpoint=False) for a, b in itertools.pairwise(lam)]
    inner = VP.t_of_lambda(np.concatenate([*points, lam[-1:]]))
    inner[::substeps] = times
    fine = vp_plan(flow, "ddim", len(inner) - 1, inner, eta=1.0)
    scale = VP.sigma(inner) ** 2 / VP.alpha(inner)  # by which the reverse SDE carries noise on
    generator, shape = torch.Generator().manual_seed(1), flow.start.shape
    xi: list[torch.Tensor] = []
    for n, stage in enumerate(plan.stages):
        span = range(n * substeps, (n + 1) * substeps)
        weights = [scale[span.stop] / scale[i + 1] * fine.stages[i].c for i in span]
        free = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in span]
        ((stream, weight),) = stage.noise
        wanted = stage.c * weight * fd.noise.normal(shape, seed, stream, dtype=torch.float64)
        excess = sum(w * u for w, u in zip(weights, free, strict=True)) - wanted
        share = excess / sum(w * w for w in weights)
        xi += [u - w * share for w, u in zip(weights, free, strict=True)]
    return fine, xi


def measure_noise(flow: Flow, counts: Sequence[int], stages: int) -> Table:
    """Relative errors along drawn noise, on the plan's own times and at its own states."""
    table: Table = {}
    for steps in counts:
        plan = vp_plan(flow, "ddim", steps, eta=1.0)
        fine, xi = path_of(flow, plan, max(2, stages // steps), seed=0)
        exact = gradients(flow, fine, "backprop", xi=xi)
        for rival, gradient in ALONG_NOISE.items():
            found = gradients(flow, plan, gradient, seed=0)
            for leaf, error in apart(found, exact).items():
                by = table.setdefault(("sde", "logsnr", leaf), {}).setdefault(rival, {})
                by[steps] = float(f"{error:.4g}")
    return table


# -- the bench -------------------------------------------------------------------------------------


def lines(part: str, errors: Table, setting: Setting) -> list[Record]:
    """A record for each problem and rival, with its errors by evaluations or by steps."""
    about = {"part": part, "torchdiffeq": torchdiffeq.version(), "dtype": "float64"}
    about |= dict(setting.about)
    return [
        record(
            *("gradients", rival, {"error": {str(k): by[k] for k in sorted(by)}}),
            problem=problem,
            grid=grid,
            of=LEAVES[leaf],
            **about,
        )
        for (problem, grid, leaf), points in errors.items()
        for rival, by in points.items()
    ]


def jobs(
    setting: Setting,
    *,
    parts: Sequence[str],
    problems: Sequence[str],
    fine: int | None,
    evaluations: Sequence[int],
    table_steps: Sequence[int],
    theirs: bool,
) -> list[Job]:
    """A job for every problem and part, and one along drawn noise."""
    theirs = theirs and installed("torchdiffeq")
    problems = problems or tuple(PROBLEMS)

    def error(name: str, lost: list[str]) -> list[Record]:
        points = measure_error(PROBLEMS[name](), fine or FINE, evaluations, theirs)
        return lines("error", {(name, "logsnr", "x"): points}, setting)

    def table(name: str, lost: list[str]) -> list[Record]:
        grids = ("logsnr", "uniform") if name == "mixture" else ("logsnr",)
        made = measure_table(name, PROBLEMS[name](), fine or FINE, table_steps, grids)
        return lines("table", made, setting)

    def noise(name: str, lost: list[str]) -> list[Record]:
        return lines("table", measure_noise(mixture(), table_steps, fine or 1000), setting)

    todo: list[tuple[str, str, Any]] = [("error", name, error) for name in problems]
    todo += [("table", name, table) for name in problems]
    todo += [("table", "sde", noise)] * ("mixture" in problems)
    checked = Gate("gradients", gate)
    return [
        Job(f"{part}, {TITLES[name]}", functools.partial(measure, name), checked)
        for part, name, measure in todo
        if not parts or part in parts
    ]


BENCH = Bench(
    "adjoint",
    "Error of gradients against network evaluations, beside torchdiffeq; the adjoint's own error.",
    jobs,
    report.page,
    options=(
        option("--part", "parts", multiple=True, type=names(("error", "table"))),
        option("--problem", "problems", multiple=True, type=names(PROBLEMS)),
        option("--fine", type=click.IntRange(min=10), help="Steps of the exact flow."),
        option(
            "--evaluations",
            default=",".join(map(str, BUDGETS)),
            callback=whole_numbers,
            help="Numbers of evaluations, forward and backward, of the part error.",
        ),
        option(
            "--table-steps",
            default=",".join(map(str, TABLE_STEPS)),
            callback=whole_numbers,
            help="Numbers of steps of the part table.",
        ),
        option("--torchdiffeq/--no-torchdiffeq", "theirs", default=True),
    ),
)
