# SPDX-License-Identifier: Apache-2.0
"""Flows in velocity: error against network evaluations, beside torchdiffeq's fixed-step methods.

Flows run from t = 1 to t = 0 of FlowMatching. The error is the root mean square distance, over all
elements of all samples, to the exact flow, which is `dopri5` with 2000 steps in float64. Both sides
take equal steps and spend the same evaluations. Of torchdiffeq's Adams methods the best of their
orders and iterations counts. The numbers do not depend on the machine.

    python benchmarks/run.py flow --out benchmarks/results/flow.jsonl
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch
from command import option, whole_numbers
from problems.flows import FLOWS, TITLES
from reports import flow as report
from rivals import torchdiffeq

import fastdiff as fd
from fastdiff.bench.flows import Flow
from fastdiff.bench.gate import agree
from fastdiff.bench.machine import installed
from fastdiff.bench.records import Record, record
from fastdiff.bench.runs import Bench, Gate, Job, Setting

GRID = "uniform"
SAME = {  # our names of torchdiffeq's tables
    "euler": "euler",
    "midpoint": "midpoint",
    "heun2": "heun",
    "heun3": "heun3",
    "rk4": "rk4-38",
}
Errors = dict[int, float]


def gate() -> None:
    """Checks that torchdiffeq ends where ours ends, wherever both have the same table.

    Raises:
        GateError: It does not.
    """
    flow = FLOWS["flow"]()
    for theirs, ours in SAME.items():
        state, calls = torchdiffeq.velocity_state(flow, theirs, 6)
        plan = flow.plan(ours, 6, grid=GRID)
        assert calls == plan.nfe
        agree(f"torchdiffeq {theirs}", state, flow.run(plan), 1e-12)


def starts(flow: Flow, solver: str) -> bool:
    """Whether a solver is deterministic, made for such networks, and starts at t = 1."""
    info = fd.solvers.info(solver)
    if info.stochastic or info.measured_order is None:
        return False
    try:
        flow.plan(solver, 6, grid=GRID)
    except ValueError:  # it divides by alpha
        return False
    return True


def ours(flow: Flow, nfe: Sequence[int], distance: Callable[..., float]) -> dict[str, Errors]:
    """Our errors by solver: each that starts at t = 1, with its defaults, within its budget."""
    found: dict[str, Errors] = {}
    for name in filter(functools.partial(starts, flow), fd.solvers.names()):
        info = fd.solvers.info(name)
        for budget in nfe:
            steps, rest = divmod(budget - info.nfe_extra, info.nfe_per_step)
            if rest or steps < info.least_steps:
                continue
            plan = flow.plan(name, steps, grid=GRID)
            if plan.nfe == budget:
                found.setdefault(name, {})[budget] = distance(flow.run(plan))
    return found


def theirs(flow: Flow, nfe: Sequence[int], distance: Callable[..., float]) -> dict[str, Errors]:
    """torchdiffeq's errors by method, of its Adams methods the least over their options."""
    found: dict[str, Errors] = {}

    def keep(method: str, steps: int, **options: Any) -> None:
        state, calls = torchdiffeq.velocity_state(flow, method, steps, **options)
        if calls in nfe:
            errors = found.setdefault(method, {})
            errors[calls] = min(distance(state), errors.get(calls, float("inf")))

    for method, stages in torchdiffeq.STAGES.items():
        for budget in nfe:
            if budget % stages == 0:
                keep(method, budget // stages)
    for method, choices in torchdiffeq.ADAMS.items():
        for options in choices:
            for steps in range(3, max(nfe) - 5):  # two steps of four calls come first
                keep(method, steps, **options)
    return {method: dict(sorted(errors.items())) for method, errors in found.items()}


def measure(
    problem: str,
    lost: list[str],
    *,
    setting: Setting,
    nfe: Sequence[int],
    reference: int,
    rival: bool,
) -> list[Record]:
    """The errors of both sides at every number of evaluations."""
    flow = FLOWS[problem]()
    exact = flow.run(flow.plan("dopri5", reference, grid=GRID))

    def distance(state: torch.Tensor) -> float:
        return float(f"{float((state - exact).square().mean().sqrt()):.6g}")

    sides = {"fastdiff": ours(flow, nfe, distance)}
    if rival:
        sides["torchdiffeq"] = theirs(flow, nfe, distance)
    common = {"problem": problem, "shape": list(flow.start.shape), "dtype": "float64"}
    common |= {"reference": reference, "grid": GRID, "torchdiffeq": torchdiffeq.version()}
    common |= setting.commit
    return [
        record(
            "flow", side, {"error": {str(n): e for n, e in errors.items()}}, solver=name, **common
        )
        for side, found in sides.items()
        for name, errors in found.items()
    ]


def jobs(setting: Setting, *, problems: Sequence[str], **options: Any) -> list[Job]:
    """A job for every problem."""
    rival = installed("torchdiffeq")
    checked = Gate("torchdiffeq's tables", gate) if rival else None
    measured = functools.partial(measure, setting=setting, rival=rival, **options)
    return [Job(TITLES[name], functools.partial(measured, name), checked) for name in problems]


BENCH = Bench(
    "flow",
    "Error of every solver that starts at t = 1 of a flow, beside torchdiffeq's fixed steps.",
    jobs,
    report.page,
    options=(
        option(
            "--problem",
            "problems",
            multiple=True,
            default=tuple(FLOWS),
            type=click.Choice(tuple(FLOWS)),
            help="May be given several times.",
        ),
        option("--nfe", default=",".join(map(str, range(5, 41))), callback=whole_numbers),
        option(
            "--reference",
            default=2000,
            type=click.IntRange(min=1),
            help="Steps of the exact flow.",
        ),
    ),
    threads=None,
)
