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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from command import names, option
from problems.loops import BORROWED, TITLES, Case, parts_of
from reports import loop as report
from reports.loop import (
    COMPILED,
    GRAPHED,
    OURS_COMPILED,
    THEIRS,
    THEIRS_COMPILED,
)
from rivals import diffusers
from rivals.captured import Graphed
from rivals.compiled import compiled_loops, compiled_network

from fastdiff import backends
from fastdiff.bench import loops
from fastdiff.bench.loops import alone, gate, ours, records_of, reference, running, timed
from fastdiff.bench.machine import installed
from fastdiff.bench.problems import Loop, Parts
from fastdiff.bench.records import Record
from fastdiff.bench.runs import Bench, Job, Setting

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
    if place == "cuda":
        # whether a kernel of the whole loop is worth its while
        cases.insert(2, Case("mlp", (64, 16), 10))
    if not short:
        cases += [*more, replace(conv, shape=(1, 16, 2))]
        compiles = [c for c in cases if c.kind != "null" and (place == "cuda" or c.kind == "mlp")]
    found = [Cell(case) for case in cases]
    found += [Cell(case, True) for case in compiles if compiled]
    return [cell for cell in found if not kinds or cell.case.kind in kinds]


# -- the rivals ------------------------------------------------------------------------------------


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
    found |= loops.makers(parts)
    if with_diffusers:
        found[THEIRS] = lambda: diffusers.loop_around(parts)
        if cuda and case.kind != "null":
            found[GRAPHED] = lambda: diffusers.loop_around(parts, Graphed(parts))
    return found


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
    found = running(parts, makers(cell, parts, installed("diffusers")), lost)
    gate(parts, found, wanted)
    chosen = backends.choose(
        None, torch.float32, case.dtype, device, elements=parts.start.numel()
    ).name
    times = timed(found, case.steps, setting)
    return records_of(parts, times, setting, compiled=cell.compiled, backend=chosen)


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
