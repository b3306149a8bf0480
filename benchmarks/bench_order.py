# SPDX-License-Identifier: Apache-2.0
"""Error against network evaluations: every solver, beside diffusers' of the same name.

The error is the root mean square distance, over all elements of all samples, to the exact flow at
t_min = 1e-3, which is a fourth-order Runge-Kutta of 2000 steps in float64. The benchmark is
deterministic: its numbers do not depend on the machine.

    python benchmarks/run.py order --out benchmarks/results/order.jsonl
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import click
import torch
from command import option, whole_numbers
from problems.flows import TITLES, untrained
from reports import order as report
from rivals import diffusers

import fastdiff as fd
from fastdiff.bench.flows import VP
from fastdiff.bench.gate import agree
from fastdiff.bench.machine import installed
from fastdiff.bench.records import Record, record
from fastdiff.bench.runs import Bench, Gate, Job, Setting

PROBLEMS = ("mixture", "empirical", "digits")
GRIDS = ("logsnr", "uniform")
SOLVERS = tuple(name for name in fd.solvers.names() if not fd.solvers.info(name).stochastic)


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


def plan_of(name: str, budget: int, grid: str, prediction: str) -> fd.Plan | None:
    """The plan that spends the budget exactly, or None where there is none."""
    steps, rest = divmod(budget, fd.solvers.info(name).nfe_per_step)
    if rest or steps < fd.solvers.info(name).least_steps:
        return None
    plan = fd.plan(VP, name, steps, grid=grid, prediction=prediction)
    assert plan.nfe == budget
    return plan


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
    exact = flow.run(fd.plan(VP, "deis-rk4", reference, grid="logsnr", prediction=flow.prediction))

    def error(got: torch.Tensor) -> float:
        return float(f"{float((got.double() - exact).square().mean().sqrt()):.6g}")

    found = []
    for grid in grids:
        for solver in solvers:
            made = ((n, plan_of(solver, n, grid, flow.prediction)) for n in nfe)
            plans = {str(n): plan for n, plan in made if plan is not None}
            errors = {"fastdiff": {n: error(flow.run(plan)) for n, plan in plans.items()}}
            if theirs and solver in diffusers.SOLVERS:
                errors["diffusers"] = {
                    n: error(diffusers.final_state(solver, plan, flow)) for n, plan in plans.items()
                }
            shape = list(flow.start.shape)
            common = {"problem": problem, "shape": shape, "dtype": "float64"}
            common |= {"reference": reference, "grid": grid, "solver": solver}
            common |= setting.commit
            found += [
                record("order", rival, {"error": by_nfe}, **common)
                for rival, by_nfe in errors.items()
                if by_nfe
            ]
    return found


def jobs(setting: Setting, *, problems: Sequence[str], theirs: bool, **options: Any) -> list[Job]:
    """A job for every problem."""
    theirs = theirs and installed("diffusers")
    checked = Gate("diffusers' solvers", gate) if theirs else None
    measured = functools.partial(measure, setting=setting, theirs=theirs, **options)
    return [Job(TITLES[name], functools.partial(measured, name), checked) for name in problems]


def names(allowed: Sequence[str]) -> Any:
    """A callback: names separated by commas, all of which are allowed; nothing means all."""

    def convert(context: Any, parameter: Any, value: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in value.split(",")) if value else tuple(allowed)
        for name in chosen:
            if name not in allowed:
                raise click.BadParameter(f"one or more of {', '.join(allowed)}; got {name!r}.")
        return chosen

    return convert


BENCH = Bench(
    "order",
    "Error of every solver against network evaluations, beside diffusers' of the same name.",
    jobs,
    report.page,
    options=(
        option("--problems", default="", callback=names(PROBLEMS), help="Without it: all."),
        option("--solvers", default="", callback=names(SOLVERS), help="Without it: all."),
        option("--grids", default=",".join(GRIDS), callback=names(fd.grids.names())),
        option("--nfe", default="5,6,8,10,15,20", callback=whole_numbers),
        option(
            "--reference",
            default=2000,
            type=click.IntRange(min=1),
            help="Steps of the exact flow.",
        ),
        option("--diffusers/--no-diffusers", "theirs", default=True),
    ),
    threads=None,
)
