# SPDX-License-Identifier: Apache-2.0
"""Error against network evaluations: every solver, beside diffusers, k-diffusion and torchdiffeq.

The error is the root mean square distance, over all elements of all samples, to the exact flow,
which is a fourth-order Runge-Kutta of 2000 steps in float64: at t = 1e-3 of the variance preserving
schedule, and at t = 0 of a flow. The benchmark is deterministic: its numbers do not depend on the
machine.

    python benchmarks/run.py order --out benchmarks/results/order.jsonl
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
import torch
from command import option, whole_numbers
from problems.flows import TITLES, untrained
from reports import order as report
from rivals import diffusers, k_diffusion, schedulers, torchdiffeq
from rivals.fields import Field

import fastdiff as fd
from fastdiff.bench.flows import VP, Flow
from fastdiff.bench.gate import agree
from fastdiff.bench.machine import installed
from fastdiff.bench.records import Record, record
from fastdiff.bench.runs import Bench, Gate, Job, Setting
from fastdiff.cli.shared import one_thread

PROBLEMS = ("mixture", "empirical", "digits", "flow")
# the same for ours and theirs; a flow starts at alpha = 0, which grids in lambda do not reach
_ON_VP, _ON_FLOWS = ("logsnr", "uniform", "karras", "quadratic"), ("uniform", "quadratic")
_ON_FLOWS += ("shift(3)", "shift(0.5)")
GRIDS = {name: _ON_FLOWS if name == "flow" else _ON_VP for name in PROBLEMS}
ALL_GRIDS = tuple(dict.fromkeys(_ON_VP + _ON_FLOWS))
# what follows the flow; of those with the same samples, one
FOLLOW = tuple(
    name
    for name in fd.solvers.names()
    if not fd.solvers.info(name).stochastic and fd.solvers.info(name).measured_order is not None
)
SOLVERS = tuple(name for name in FOLLOW if not fd.solvers.info(name).same)
RIVALS = {"diffusers": schedulers, "k-diffusion": k_diffusion, "torchdiffeq": torchdiffeq}


def gate() -> None:
    """Checks that diffusers ends where ours ends, wherever it can run the same table.

    Raises:
        GateError: It does not.
    """
    flow = untrained("mixture")
    names = diffusers.SOLVERS
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in (*diffusers.MULTISTEP, *diffusers.LOGRHO):
        if fd.solvers.info(name).least_steps > 1:  # a first-order method has no order to lower
            options[name] = {"lower_order_final": True}
    for name in ("dpm-3m", "dpmpp-3m"):
        options[name]["published"] = True
    theirs: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in ("dpm-3", "dpmpp-3s"):  # by default its inner steps follow another rule
        options[name], theirs[name] = {"solver_type": "taylor"}, {"solver_type": "heun"}
    for name in names:
        plan = fd.plan(VP, name, 6, grid="logsnr", **options[name])
        # diffusers' state is float32, and so are its differences of exponentials
        agree(name, diffusers.final_state(name, plan, flow, **theirs[name]), flow.run(plan), 1e-5)


# k-diffusion's samplers of which ours have the same table, with the options that make it so
_RESTATED: dict[str, tuple[str, dict[str, Any]]] = {
    "sample_euler": ("euler", {}),
    "sample_heun": ("heun", {}),
    "sample_dpm_2": ("dpm-2", {}),
    "sample_lms": ("deis-rhoab-4", {}),
    "sample_dpm_fast": ("dpm-3", {"published": True}),
    "sample_dpmpp_2s_ancestral, eta=0": ("dpmpp-2s", {}),
    "sample_dpmpp_2m": ("dpmpp-2m", {"lower_order_final": False}),
    "sample_dpmpp_2m_sde, eta=0": (
        "dpmpp-2m",
        {"lower_order_final": False, "solver_type": "taylor"},
    ),
    "sample_dpmpp_3m_sde, eta=0": (
        "dpmpp-3m",
        {"lower_order_final": False, "published": True, "solver_type": "taylor"},
    ),
}


def restated() -> None:
    """Checks that the restated lines of k-diffusion end where the same tables end.

    Raises:
        GateError: They do not.
    """
    flow = untrained("mixture")
    for name, (ours, options) in _RESTATED.items():
        plan = flow.plan(ours, 7, grid="logsnr", **options)
        times = np.linspace(*VP.lambda_t(np.array([VP.t_max, VP.t_min])), 8)
        end = k_diffusion.final_state(name, Field(flow), VP.t_of_lambda(times))
        agree(name, end, flow.run(plan), 1e-9)


def steps_of(budget: int, each: int, extra: int) -> list[int]:
    """Steps that may spend the budget, the last of which may cost one evaluation instead."""
    spent = budget - extra
    return [n for n in dict.fromkeys((spent // each, -(-spent // each))) if n > 0]


def plan_of(flow: Flow, name: str, budget: int, grid: str) -> fd.Plan | None:
    """The plan that spends the budget exactly, or None where there is none."""
    info, schedule = fd.solvers.info(name), flow.schedule
    start = np.array([schedule.t_max, schedule.t_floor])
    in_epsilon = fd.solvers.get(name).variable(schedule, start) == "epsilon"
    if in_epsilon and float(schedule.alpha(schedule.t_max)) == 0.0:
        return None  # it has no first step
    for steps in steps_of(budget, info.nfe_per_step, info.nfe_extra):
        if steps >= info.least_steps:
            plan = flow.plan(name, steps, grid=grid)
            if plan.nfe == budget:
                return plan
    return None


def reference_of(flow: Flow, steps: int) -> torch.Tensor:
    """The end of the flow by the classical Runge-Kutta method, in rho or in t."""
    if flow.schedule.straight == "epsilon":
        return flow.run(flow.plan("deis-rk4", steps, grid="logsnr"))
    field, x = Field(flow), flow.start
    times = np.linspace(flow.schedule.t_max, flow.schedule.t_min, steps + 1).tolist()
    for s, t in itertools.pairwise(times):
        h, middle = t - s, 0.5 * (s + t)
        k_1 = field("velocity", x, s)
        k_2 = field("velocity", x + 0.5 * h * k_1, middle)
        k_3 = field("velocity", x + 0.5 * h * k_2, middle)
        k_4 = field("velocity", x + h * k_3, t)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x


def their_ends(
    rival: Any, name: str, cost: tuple[int, int], flow: Flow, grid: str, nfe: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Where a rival's sampler ends, by its evaluations, on the times that ours are given."""
    found = {}
    for budget in nfe:
        for steps in steps_of(budget, *cost):
            field = Field(flow)
            end = rival.final_state(name, field, fd.grids.build(flow.schedule, steps, grid))
            if field.calls == budget and bool(end.isfinite().all()):
                found[str(budget)] = end
    return found


@one_thread()
def measure(
    problem: str,
    lost: list[str],
    *,
    setting: Setting,
    solvers: Sequence[str],
    grids: Sequence[str],
    nfe: Sequence[int],
    reference: int,
    theirs: bool,
) -> list[Record]:
    """The error of every solver on every grid at every budget of evaluations it can spend."""
    flow = untrained(problem)
    exact = reference_of(flow, reference)
    with_diffusers = theirs and installed("diffusers")

    def error(got: torch.Tensor) -> float:
        return float(f"{float((got.double() - exact).square().mean().sqrt()):.6g}")

    found = []

    def add(rival: str, solver: str, grid: str, errors: dict[str, float]) -> None:
        common = {"problem": problem, "shape": list(flow.start.shape), "dtype": "float64"}
        common |= {"reference": reference, "grid": grid, "solver": solver}
        if errors:
            found.append(record("order", rival, {"error": errors}, **common, **setting.commit))

    for grid in [g for g in grids if g in GRIDS[problem]]:
        for solver in solvers:
            made = ((n, plan_of(flow, solver, n, grid)) for n in nfe)
            plans = {str(n): plan for n, plan in made if plan is not None}
            add("fastdiff", solver, grid, {n: error(flow.run(p)) for n, p in plans.items()})
            if with_diffusers and flow.schedule == VP and solver in diffusers.SOLVERS:
                ends = {n: diffusers.final_state(solver, p, flow) for n, p in plans.items()}
                add("diffusers", solver, grid, {n: error(x) for n, x in ends.items()})
        for rival, module in RIVALS.items() if theirs else ():
            if rival != "k-diffusion" and not installed(rival):
                continue
            for name, cost in module.offered(flow.schedule).items():
                ends = their_ends(module, name, cost, flow, grid, nfe)
                add(rival, name, grid, {n: error(x) for n, x in ends.items()})
    return found


def gates(theirs: bool) -> None:
    """Checks the rivals that are measured."""
    if theirs:
        restated()
    if theirs and installed("diffusers"):
        gate()


def jobs(setting: Setting, *, problems: Sequence[str], theirs: bool, **options: Any) -> list[Job]:
    """A job for every problem."""
    checked = Gate("the rivals' solvers", functools.partial(gates, theirs))
    measured = functools.partial(measure, setting=setting, theirs=theirs, **options)
    return [Job(TITLES[name], functools.partial(measured, name), checked) for name in problems]


def names(allowed: Sequence[str], default: Sequence[str] = ()) -> Any:
    """A callback: names separated by commas, all of which are allowed; nothing: the default."""

    def convert(context: Any, parameter: Any, value: str) -> tuple[str, ...]:
        chosen = (
            tuple(name.strip() for name in value.split(",")) if value else tuple(default or allowed)
        )
        for name in chosen:
            if name not in allowed:
                raise click.BadParameter(f"one or more of {', '.join(allowed)}; got {name!r}.")
        return chosen

    return convert


BENCH = Bench(
    "order",
    "Error of every solver against network evaluations, beside three other libraries.",
    jobs,
    report.page,
    options=(
        option("--problems", default="", callback=names(PROBLEMS), help="Without it: all."),
        option(
            "--solvers",
            default="",
            callback=names(FOLLOW, SOLVERS),
            help="Without it: all, one of those with the same samples.",
        ),
        option("--grids", default="", callback=names(ALL_GRIDS), help="Without it: all."),
        option("--nfe", default="5,6,8,10,20", callback=whole_numbers),
        option(
            "--reference",
            default=2000,
            type=click.IntRange(min=1),
            help="Steps of the exact flow.",
        ),
        option("--rivals/--no-rivals", "theirs", default=True),
    ),
    threads=None,
)
