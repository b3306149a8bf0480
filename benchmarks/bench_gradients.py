# SPDX-License-Identifier: Apache-2.0
"""Gradients through samplers: time and peak memory, beside backpropagation and torchdiffeq.

`time` is forward and gradient over what the bare network takes for as many stages (a forward
without grad, a forward with grad, a vector-Jacobian product). `memory` is the peak of the same at
10, 50 and 100 steps. Nothing is measured before the rivals agree where they must. How near the
gradients are to those of the exact flow is measured by bench_adjoint.py, into the same file.

    python benchmarks/run.py gradients --out benchmarks/results/gradients.jsonl
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import click
from command import names, option, whole_numbers
from gradient_gate import gate
from problems.networks import Dit
from reports import gradients as report
from reports.gradients import (
    ADJOINT,
    ADJOINT_CAPTURED,
    CHECKPOINTED,
    DOPRI,
    MIDPOINT,
    RESOLVED,
    SEGMENTS,
    Case,
)
from rivals import torchdiffeq
from rivals.autograd import recomputed

import fastdiff as fd
from fastdiff.bench import gradients as library
from fastdiff.bench.flows import Flow
from fastdiff.bench.gradients import (
    BACKPROP,
    BARE,
    CAPTURED,
    DISCRETE,
    Made,
    Run,
    bare,
    by_library,
    flow_of,
    memory_records,
    running,
    time_records,
)
from fastdiff.bench.machine import installed
from fastdiff.bench.records import Record
from fastdiff.bench.runs import Bench, Gate, Job, Setting

PARTS = ("time", "memory")
MEMORY_STEPS = (10, 50, 100)
EXACT = (DISCRETE, SEGMENTS, CAPTURED, CHECKPOINTED)  # they differentiate what backprop does
# Guesses of the seconds that timing a case takes on an H200. Its memory takes half as much again.
SECONDS = {"mlp": 4, "dit": 10, "digits": 8}

# -- the gate --------------------------------------------------------------------------------------


def is_exact(name: str) -> bool:
    return any(name.startswith(exact.partition("{")[0]) for exact in EXACT)


# -- cases -----------------------------------------------------------------------------------------


def cases(place: str, short: bool) -> list[Case]:
    """The cases that are timed, the most important first."""
    if place == "cuda":
        found = [Case("mlp", 1), Case("dit", 4, theta=True)]
        return found if short else [*found, Case("dit", 4), Case("mlp", 256), Case("digits", 16)]
    found = [Case("digits", 16), Case("digits", 16, theta=True), Case("digits", 1), Case("mlp", 1)]
    return found if short else [*found, Case("digits", 64)]


def memory_cases(place: str) -> list[Case]:
    """The cases whose memory is measured: small batches, for the figure is a growth in states."""
    if place == "cuda":
        return [Case("mlp", 256), Case("dit", 4, theta=True)]
    return [Case("digits", 4), Case("digits", 4, theta=True)]


def network_of(case: Case) -> Made:
    """The network of a case, what it returns, the shape of a sample, and its condition."""
    if case.kind == "dit":
        return Dit(), "epsilon", (4, 32, 32), {}
    return library.network_of(case)


# -- the rivals ------------------------------------------------------------------------------------


def makers(case: Case, flow: Flow, with_theirs: bool) -> dict[str, Callable[[], Run]]:
    """Functions that make the rivals of a case, by name."""
    plan = library.plan_of(case, flow)
    segment = max(1, round(math.sqrt(case.steps)))

    def ours(gradient: Any, **options: Any) -> Run:
        return by_library(flow, plan, gradient, **options)

    found: dict[str, Callable[[], Run]] = {
        DISCRETE: lambda: ours("discrete"),
        SEGMENTS.format(segment): lambda: ours(fd.Discrete(checkpoint=segment)),
        ADJOINT: lambda: ours(fd.AdjointDEIS(2)),
        RESOLVED: lambda: ours(fd.AdjointDEIS(2, states="resolve")),
        BACKPROP: lambda: ours("backprop"),
        CHECKPOINTED: lambda: ours("backprop", network=recomputed(flow.network)),
    }
    if flow.start.device.type == "cuda":
        found[CAPTURED] = lambda: ours("discrete", graph="loop")
        found[ADJOINT_CAPTURED] = lambda: ours(fd.AdjointDEIS(2), graph="loop")
    if with_theirs:
        half = torchdiffeq.stepped(flow, "midpoint", max(1, case.steps // 2))
        loose = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}
        found[MIDPOINT] = lambda: lambda: torchdiffeq.gradients(flow, **half)[0]
        if not case.theta:  # parameters enter its error norm, which takes ten times the calls
            found[DOPRI] = lambda: lambda: torchdiffeq.gradients(flow, **loose)[0]
    return found


# -- measuring -------------------------------------------------------------------------------------


def measure_time(case: Case, setting: Setting, lost: list[str]) -> list[Record]:
    """Microseconds a stage of every rival of a case.

    Raises:
        GateError: Their gradients differ.
    """
    flow = flow_of(case, setting.device, network_of)
    found = makers(case, flow, installed("torchdiffeq"))
    runs = running(found, str(case), setting.device, lost)
    library.gate(flow, runs, is_exact)
    runs = {BARE: bare(flow, case.steps), **runs}
    return time_records(case, flow, runs, setting, torchdiffeq=torchdiffeq.version())


def measure_memory(
    case: Case, setting: Setting, lost: list[str], *, counts: Sequence[int]
) -> list[Record]:
    """Peak bytes of every rival of a case, by steps. On CUDA they include the capture."""
    device, theirs = setting.device, installed("torchdiffeq")
    flow, records = flow_of(case, device, network_of), []
    if device.type == "cuda":  # libraries allocate at first calls
        running(makers(replace(case, steps=min(counts)), flow, theirs), str(case), device, [])
    for steps in counts:
        here = replace(case, steps=steps)
        chosen = {BARE: functools.partial(bare, flow, steps), **makers(here, flow, theirs)}
        chosen.pop(DOPRI, None)  # its steps are its own
        version = torchdiffeq.version()
        records += memory_records(here, flow, chosen, setting, lost, torchdiffeq=version)
    return records


# -- the bench -------------------------------------------------------------------------------------


def jobs(
    setting: Setting, *, parts: Sequence[str], steps: int, memory_steps: Sequence[int]
) -> list[Job]:
    """A job for every case of each part."""
    place, checked = setting.device.type, Gate("gradients", gate)
    found = []
    for case in (replace(case, steps=steps) for case in cases(place, setting.short)):
        measure = functools.partial(measure_time, case, setting)
        found.append(("time", Job(f"time, {case}", measure, checked, SECONDS[case.kind])))
    for case in memory_cases(place):
        measure = functools.partial(measure_memory, case, setting, counts=memory_steps)
        job = Job(f"memory, {case}", measure, checked, 1.5 * SECONDS[case.kind])
        found.append(("memory", job))
    return [job for part, job in found if not parts or part in parts]


def notes(setting: Setting) -> list[str]:
    """What does not run here."""
    if installed("torchdiffeq"):
        return []
    return ["torchdiffeq is not installed: its rows are left out."]


BENCH = Bench(
    "gradients",
    "Time and memory of gradients through samplers, beside backpropagation and torchdiffeq.",
    jobs,
    report.page,
    options=(
        option(
            *("--part", "parts"),
            multiple=True,
            type=names(PARTS),
            help="One part; it may be repeated. Without it: all.",
        ),
        option("--steps", default=20, type=click.IntRange(min=2), help="Steps of the timed runs."),
        option(
            "--memory-steps",
            default=",".join(map(str, MEMORY_STEPS)),
            callback=whole_numbers,
            help="Steps of the runs whose memory is measured.",
        ),
    ),
    notes=notes,
)
