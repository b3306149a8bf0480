# SPDX-License-Identifier: Apache-2.0
"""Whole sampling loops, on a network that costs nothing and on real ones with random weights.

A cell is a network and a shape. Its rivals run the same DPM-Solver++(2M) over the same times: our
loop, eager and captured, and diffusers' `scheduler.step` around the same network, eager, captured
and compiled. The same number of calls of the network alone takes turns with them: what a rival
takes beyond it is the sampler's. Execution is timed, not enqueueing, in two ways on CUDA: waiting
after every loop, as one who needs the sample does, and after a queue of loops. A cell is timed only
after its rivals have ended in the same place as the reference.

    python benchmarks/run.py loop --short --out benchmarks/results/loop.jsonl
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from command import names, option
from problems.loops import BORROWED, TITLES, Case, parts_of
from reports import loop as report
from reports.loop import (
    CAPTURED,
    COMPILED,
    EAGER,
    GRAPHED,
    LOOP,
    NETWORK,
    OURS_COMPILED,
    QUEUED,
    REPLAY,
    STAGE,
    THEIRS,
    THEIRS_COMPILED,
    WAITED,
)
from rivals import diffusers
from rivals.captured import Graphed
from rivals.compiled import compiled_loops, compiled_network, drop

import fastdiff as fd
from fastdiff import backends
from fastdiff.bench.captured import capture, replay_alone
from fastdiff.bench.gate import agree
from fastdiff.bench.machine import installed
from fastdiff.bench.problems import Loop, Parts
from fastdiff.bench.records import Record, record
from fastdiff.bench.runs import Bench, Job, Setting
from fastdiff.bench.text import reason
from fastdiff.bench.timing import Rival, Timing, executed, race, wait

# Guesses of the seconds that a cell takes on an H200, and of what the compiler adds.
SECONDS = {"null": 5, "mlp": 6, "conv": 8, "dit": 15, "unet": 40}
COMPILER_SECONDS = {"null": 0, "mlp": 25, "conv": 45, "dit": 45, "unet": 150}


@dataclass(frozen=True)
class Cell:
    """A case and a group of its rivals: those that compile, or those that do not."""

    case: Case
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.case}{', compiled' * self.compiled}"

    @property
    def seconds(self) -> float:
        """About how long it takes, to keep to a budget."""
        kind = self.case.kind
        whole = SECONDS[kind] + self.compiled * COMPILER_SECONDS[kind]
        return whole / 2 if self.case.small else whole


def cells(place: str, short: bool, compiled: bool, kinds: Sequence[str] = ()) -> list[Cell]:
    """The cells to measure, the most important first.

    Args:
        place: "cpu" or "cuda".
        short: Fewer shapes, and small networks; on the CPU they are small always.
        compiled: The compiled rivals as well.
        kinds: Keys of `TITLES`; none: all.
    """
    small = short or place == "cpu"
    dtype = torch.float16 if place == "cuda" else torch.float32
    latent = (1, 4, 32, 32) if small else (1, 4, 64, 64)
    first, *more = (Case("mlp", (batch, 16), 10) for batch in (1, 256, 16))
    conv = Case("conv", (1, 16, 14), 10, small=small)
    cases = [
        *(Case("null", (1, 4, 64, 64), 20), first, conv),
        *(Case("dit", (1, 4, 32, 32), 20, dtype), Case("unet", latent, 20, dtype, small)),
    ]
    compiles = [first]
    if not short:
        cases += [*more, replace(conv, shape=(1, 16, 2))]
        compiles = [c for c in cases if c.kind != "null" and (place == "cuda" or c.kind == "mlp")]
    found = [Cell(case) for case in cases]
    found += [Cell(case, True) for case in compiles if compiled]
    return [cell for cell in found if not kinds or cell.case.kind in kinds]


# -- the rivals ------------------------------------------------------------------------------------


def ours(parts: Parts, graph: str | None, network: Any = None) -> Loop:
    called = parts.network if network is None else network
    sampler = fd.Sampler(called, parts.plan, graph=graph)
    out = torch.empty_like(parts.start)
    return functools.partial(sampler, parts.start, parts.cond or None, out=out)


def alone(parts: Parts, network: Any = None) -> Loop:
    """A loop of as many calls of the network, and nothing else."""
    called, cond = parts.network if network is None else network, parts.cond
    x, t = parts.start, parts.time()
    steps = range(parts.case.steps)

    def loop() -> None:
        for _ in steps:
            called(x, t, **cond)

    return loop


def makers(cell: Cell, parts: Parts, with_diffusers: bool) -> dict[str, Callable[[], Loop]]:
    """Functions that make the rivals of a cell, by name; they compile and capture where needed."""
    case, cuda = cell.case, parts.start.device.type == "cuda"
    found: dict[str, Callable[[], Loop]] = {}
    if cell.compiled:
        torch._dynamo.reset()
        network = compiled_network(parts)
        found[COMPILED] = lambda: alone(parts, network)
        if with_diffusers:
            found[THEIRS_COMPILED] = lambda: diffusers.loop_around(parts, network)
        found[OURS_COMPILED] = lambda: ours(parts, None, network)
        if not cuda and case.kind == "mlp":
            found |= compiled_loops(parts)
        return found
    if case.kind != "null":
        found[NETWORK] = lambda: alone(parts)
        if cuda:
            run = alone(parts)
            found[CAPTURED] = lambda: functools.partial(drop, capture(run)[0], run)
    found[EAGER] = lambda: ours(parts, None)
    if cuda:
        found[STAGE] = lambda: ours(parts, "stage")
        found[LOOP] = lambda: ours(parts, "loop")
        found[REPLAY] = lambda: replay_alone(parts)
    if with_diffusers:
        found[THEIRS] = lambda: diffusers.loop_around(parts)
        if cuda and case.kind != "null":
            found[GRAPHED] = lambda: diffusers.loop_around(parts, Graphed(parts))
    return found


# -- the gate --------------------------------------------------------------------------------------


def tolerance(case: Case, device: torch.device) -> float:
    """How far rivals may end from the reference.

    diffusers takes its coefficients from alphas in float32: 1e-5 over 20 steps, with a factor of
    10. Each step rounds the state, or the network's input, to the network's dtype, and cuDNN rounds
    what it convolves in float32 to TF32 (11 bits): errors that add as squares.
    """
    eps = torch.finfo(case.dtype).eps
    if device.type == "cuda" and case.kind == "conv":
        eps = 2.0**-10
    return max(1e-4, math.sqrt(case.steps) * eps)


def reference(parts: Parts) -> torch.Tensor:
    """The state in which a loop on the `torch` backend ends."""
    given = (parts.network, parts.start, parts.plan)
    return fd.sample(*given, cond=parts.cond or None, backend="torch", graph=None)


def gate(parts: Parts, loops: Mapping[str, Loop], wanted: torch.Tensor) -> None:
    """Checks that every rival that samples ends where it should.

    Raises:
        GateError: One does not.
    """
    for name, loop in loops.items():
        for _ in range(2):  # a replay starts where the last one ended: it must not matter
            got = loop()
        if got is not None:
            who = f"{name}, {parts.case}"
            agree(who, got, wanted, tolerance(parts.case, wanted.device))


# -- a cell ----------------------------------------------------------------------------------------


@torch.no_grad()
def measure(cell: Cell, setting: Setting, lost: list[str]) -> list[Record]:
    """All rivals of one cell; one that raises is left out, and why is added to `lost`.

    Raises:
        GateError: Rivals end in different places.
    """
    case, device = cell.case, setting.device
    parts = parts_of(case, device)
    wanted = reference(parts)
    loops: dict[str, Loop] = {}
    for name, make in makers(cell, parts, installed("diffusers")).items():
        try:
            loop = make()
            loop()  # compiles, and captures
            wait(device)
            loops[name] = loop
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, {case}: {reason(error)}")
    gate(parts, loops, wanted)
    return [
        record(
            *("loop", name, timing),
            network=case.kind,
            small=case.small,
            parameters=parts.parameters,
            shape=list(case.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            steps=case.steps,
            compiled=cell.compiled,
            timing=kind,
            backend=backends.choose(None, torch.float32, case.dtype, device).name,
            **dict(setting.about),
        )
        for kind, found in timed(loops, case.steps, setting).items()
        for name, timing in found.items()
    ]


def timed(loops: Mapping[str, Loop], steps: int, setting: Setting) -> dict[str, dict[str, Timing]]:
    """The times of a step: waiting after every loop, and on CUDA after a queue of loops too."""
    device = setting.device
    options: dict[str, Any] = {"seconds": setting.seconds, "rounds": setting.rounds}
    options |= {"warmup": 1, "turn": 5e-3}
    rivals = [Rival(name, executed(run, 1, device), steps) for name, run in loops.items()]
    found = {WAITED: race(rivals, **options)}
    if device.type != "cuda":
        return found
    rivals = []
    for name, run in loops.items():
        count = min(64, math.ceil(1e-2 / (found[WAITED][name].median * steps)))
        if count > 1:  # one loop in a queue is one that was waited for
            rivals.append(Rival(name, executed(run, count, device), steps * count))
    found[QUEUED] = race(rivals, **options) if rivals else {}
    return found


# -- the bench -------------------------------------------------------------------------------------


def jobs(setting: Setting, *, kinds: Sequence[str], compiled: bool) -> list[Job]:
    """A job for every cell."""
    todo = cells(setting.device.type, setting.short, compiled, kinds)
    if not installed("diffusers"):
        todo = [cell for cell in todo if cell.case.kind not in BORROWED]
    return [
        Job(str(cell), functools.partial(measure, cell, setting), seconds=cell.seconds)
        for cell in todo
    ]


def notes(setting: Setting) -> list[str]:
    """What does not run here."""
    if installed("diffusers"):
        return []
    borrowed = ", ".join(TITLES[kind] for kind in BORROWED)
    return [f"diffusers is not installed: its loops and its networks ({borrowed}) are left out."]


BENCH = Bench(
    "loop",
    "Whole sampling loops beside diffusers', and beside the network alone.",
    jobs,
    report.page,
    options=(
        option(
            *("--case", "kinds"),
            multiple=True,
            type=names(TITLES),
            help="One kind of network; it may be repeated. Without it: all.",
        ),
        option("--compile/--no-compile", "compiled", default=True, help="Time torch.compile too."),
    ),
    notes=notes,
    rounds=5,
    seconds=0.5,
)
