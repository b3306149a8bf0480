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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click
import torch
from command import names, option, whole_numbers
from gradient_gate import gate
from problems.networks import Dit
from reports import gradients as report
from reports.gradients import (
    ADJOINT,
    ADJOINT_CAPTURED,
    BACKPROP,
    BARE,
    CAPTURED,
    CHECKPOINTED,
    DISCRETE,
    DOPRI,
    MIDPOINT,
    RESOLVED,
    SEGMENTS,
    Case,
)
from rivals import torchdiffeq
from rivals.autograd import Run, bare, recomputed

import fastdiff as fd
from fastdiff.bench.flows import Flow, vp_plan
from fastdiff.bench.gate import GateError, agree
from fastdiff.bench.machine import installed
from fastdiff.bench.memory import peak_bytes
from fastdiff.bench.networks import Mlp
from fastdiff.bench.records import Record, record
from fastdiff.bench.runs import Bench, Gate, Job, Setting
from fastdiff.bench.text import reason
from fastdiff.bench.timing import Rival, executed, race, wait

PARTS = ("time", "memory")
MEMORY_STEPS = (10, 50, 100)
EXACT = (DISCRETE, SEGMENTS, CAPTURED, CHECKPOINTED)  # they differentiate what backprop does
# Guesses of the seconds that timing a case takes on an H200. Its memory takes half as much again.
SECONDS = {"mlp": 4, "dit": 10, "digits": 8}

# -- the gate --------------------------------------------------------------------------------------


def is_exact(name: str) -> bool:
    return any(name.startswith(exact.partition("{")[0]) for exact in EXACT)


def gate_case(flow: Flow, runs: Mapping[str, Run]) -> None:
    """Checks that exact gradients are backpropagation's, in float32, and all others finite.

    Raises:
        GateError: One is not.
    """
    if BACKPROP not in runs:
        raise GateError(f"{flow.title}: {BACKPROP} did not run: there is nothing to agree.")
    wanted = flow.named(runs[BACKPROP]())
    for name, run in runs.items():
        for leaf, got in flow.named(run()).items():
            if is_exact(name):
                agree(f"{name}, of {leaf}, {flow.title}", got, wanted[leaf], 2e-3)
            elif not bool(got.isfinite().all()):
                raise GateError(f"{name}, of {leaf}, {flow.title}: got values not finite.")


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


def flow_of(case: Case, device: torch.device) -> Flow:
    """The flow of a case, in float32."""
    torch.manual_seed(0)
    network: Any
    cond, prediction, shape = {}, "epsilon", (1, 8, 8)
    if case.kind == "digits":
        network, prediction = fd.models.digits(), "v"
        cond = {"y": torch.arange(case.batch, device=device) % 10}
    elif case.kind == "mlp":
        network, shape = Mlp(16, 32), (16,)
        cond = {"obs": torch.randn(case.batch, 32).to(device)}
    else:
        network, shape = Dit(), (4, 32, 32)
    network = network.to(device).eval().requires_grad_(case.theta)
    start = fd.noise.normal((case.batch, *shape), 0).to(device)
    return Flow(str(case), network, prediction, start, cond, case.theta)


# -- the rivals ------------------------------------------------------------------------------------


def by_library(
    flow: Flow, plan: fd.Plan, gradient: Any, network: Any = None, graph: str | None = None
) -> Run:
    """The gradients of the leaves by a sampler, which calls `network` where one is given."""
    options: dict[str, Any] = {"gradient": gradient, "graph": graph}
    if network is not None:
        options |= {"dtype": flow.start.dtype, "params": flow.parameters}
    sampler = fd.Sampler(network or flow.network, plan, **options)
    x, cond, wanted = flow.leaves()
    cotangent = flow.cotangent

    def run() -> Sequence[torch.Tensor | None]:
        return torch.autograd.grad(sampler(x, cond or None), wanted, cotangent, allow_unused=True)

    return run


def makers(case: Case, flow: Flow, with_theirs: bool) -> dict[str, Callable[[], Run]]:
    """Functions that make the rivals of a case, by name."""
    plan = vp_plan(flow, "dpmpp-2m", case.steps)
    segment = max(1, round(math.sqrt(case.steps)))
    ours = functools.partial(by_library, flow, plan)
    found: dict[str, Callable[[], Run]] = {
        DISCRETE: lambda: ours("discrete"),
        SEGMENTS.format(segment): lambda: ours(fd.Discrete(checkpoint=segment)),
        ADJOINT: lambda: ours(fd.AdjointDEIS(2)),
        RESOLVED: lambda: ours(fd.AdjointDEIS(2, states="resolve")),
        BACKPROP: lambda: ours("backprop"),
        CHECKPOINTED: lambda: ours("backprop", recomputed(flow.network)),
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


def running(case: Case, flow: Flow, with_theirs: bool, lost: list[str]) -> dict[str, Run]:
    """The rivals that run here, each run once; why the others do not is added to `lost`."""
    runs = {}
    for name, make in makers(case, flow, with_theirs).items():
        try:
            run = make()
            run()
            wait(flow.start.device)
            runs[name] = run
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, {case}: {reason(error)}")
    return runs


# -- measuring -------------------------------------------------------------------------------------


def record_of(part: str, rival: str, measured: Any, setting: Setting, **where: Any) -> Record:
    where |= {"part": part, "torchdiffeq": torchdiffeq.version(), **dict(setting.about)}
    return record("gradients", rival, measured, **where)


def measure_time(case: Case, setting: Setting, lost: list[str]) -> list[Record]:
    """Microseconds a stage of every rival of a case.

    Raises:
        GateError: Their gradients differ.
    """
    flow, device = flow_of(case, setting.device), setting.device
    runs = running(case, flow, installed("torchdiffeq"), lost)
    gate_case(flow, runs)
    runs = {BARE: bare(flow, case.steps), **runs}
    rivals = [Rival(name, executed(run, 1, device), case.steps) for name, run in runs.items()]
    timings = race(rivals, seconds=setting.seconds, warmup=1, rounds=setting.rounds)
    return [
        record_of("time", name, timing, setting, **_where(case, flow))
        for name, timing in timings.items()
    ]


def _where(case: Case, flow: Flow) -> dict[str, Any]:
    shape, dtype = list(flow.start.shape), str(flow.start.dtype).removeprefix("torch.")
    what = {"network": case.kind, "theta": case.theta, "steps": case.steps}
    return {**what, "shape": shape, "dtype": dtype}


def measure_memory(
    case: Case, setting: Setting, lost: list[str], *, counts: Sequence[int]
) -> list[Record]:
    """Peak bytes of every rival of a case, by steps. On CUDA they include the capture."""
    flow, records = flow_of(case, setting.device), []
    if setting.device.type == "cuda":  # libraries allocate at first calls
        running(replace(case, steps=min(counts)), flow, installed("torchdiffeq"), lost=[])
    for steps in counts:
        here = replace(case, steps=steps)
        chosen = {BARE: functools.partial(bare, flow, steps)}
        chosen |= makers(here, flow, installed("torchdiffeq"))
        chosen.pop(DOPRI, None)  # its steps are its own
        for name, make in chosen.items():
            try:
                peak = peak_bytes(make, setting.device)
            except Exception as error:  # as above
                lost.append(f"memory of {name}, {here}: {reason(error)}")
                continue
            where = {**_where(here, flow), "unit": "bytes"}
            records.append(record_of("memory", name, {"best": peak}, setting, **where))
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
