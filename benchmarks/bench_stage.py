# SPDX-License-Identifier: Apache-2.0
"""One stage on every backend: its share of the copy bandwidth and the host's time per launch.

A cell is a kind of row (M outputs combined, G guidance branches, the network's dtype, noise or
not, forward or of the transposed plan that a backward pass runs) at a size. Its rivals take turns
on the same registers, of which there are as many sets as it takes to pass the last cache (32 at
most). On CUDA a turn is a queue of launches behind a short wait: events see the device's time alone
and the host's clock the time to enqueue alone; elsewhere a launch is a call, and both are one. A
row is timed only after the backends have agreed on it, to the bit where that is promised.

    python benchmarks/run.py stage --short --out benchmarks/results/stage.jsonl
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
import torch
from command import option
from reports import stage as report
from reports.stage import EAGER, INDUCTOR, LAUNCHER, THEIRS
from rivals import diffusers
from rivals.eager import compiled_update, eager_of

from fastdiff import backends
from fastdiff.bench import stages
from fastdiff.bench.machine import MIB, installed
from fastdiff.bench.records import Record
from fastdiff.bench.rows import CHOSEN, UNCACHED, Case, Shape, cells, register_text
from fastdiff.bench.runs import Bench, Gate, Job, Setting
from fastdiff.bench.stages import Bandwidth, Cell, Makers, available, copy_bandwidth, gate
from fastdiff.bench.timing import Calls


def empty_kernel(device: torch.device) -> Calls:
    """A Triton kernel that does nothing, called as users call one: it times the launcher."""
    import triton

    @triton.jit
    def nothing(a, b, c, d, e, f, g, h, i, j):
        return

    x = torch.zeros(4, device=device)
    return [lambda: nothing[(1,)](x, x, x, x, x, x, 16, 16, 16, 16, num_warps=4)]


# -- a cell ----------------------------------------------------------------------------------------


def eager(cell: Cell) -> list[Any]:
    """The update in eager torch, on every set."""
    return [eager_of(cell.case)(cell.case, *each) for each in cell.sets]


def inductor(cell: Cell) -> Calls:
    case, update = cell.case, compiled_update(cell.case)
    loops = [eager_of(case)(case, *each, compiled=update) for each in cell.sets]
    return [loop.run_compiled for loop in loops]


def makers(cell: Cell, compiled: bool) -> Makers:
    """Functions that make the launches of each rival, one for every set."""
    case, on_cuda = cell.case, cell.device.type == "cuda"
    names = available(cell.device)
    # `torch` is the reference: it is for checks, and its noise is made of many kernels
    timed = [n for n in names if n != "torch" or (cell.small and not (on_cuda and case.noise))]
    found = cell.makers(timed)
    found[EAGER] = lambda: eager(cell)
    if compiled:
        found[INDUCTOR] = lambda: inductor(cell)
    if cell.small and case == Case() and installed("diffusers"):
        found[THEIRS] = lambda: [diffusers.one_step(cell.sets[0][0].x)]
    if cell.small and on_cuda and "triton" in names:
        found[LAUNCHER] = lambda: empty_kernel(cell.device)
    return found


def measure(
    case: Case,
    shape: Shape,
    setting: Setting,
    compiled: bool,
    copied: Callable[[], Bandwidth],
    lost: list[str],
) -> list[Record]:
    """All rivals of one cell; `copied` gives the bandwidth that small cells are held against."""
    cell = Cell(case, shape, setting.device)
    return stages.measure(cell, makers(cell, compiled), setting, copied, lost, idle=(LAUNCHER,))


# -- the bench -------------------------------------------------------------------------------------


def jobs(setting: Setting, *, largest: float | None, compiled: bool) -> list[Job]:
    """A job for every cell; those of one row share a gate.

    The compiler takes seconds a cell, so the cells that it takes part in come again at the end.
    """
    device = setting.device
    most = int((largest or (1024 if device.type == "cuda" else 64)) * MIB)
    copied = functools.cache(functools.partial(copy_bandwidth, setting, min(most, UNCACHED)))
    todo = [(case, shape, False) for case, shape in cells(setting.short, most)]
    if compiled:
        again = [cell for cell in cells(True, most) if cell[0] in CHOSEN]
        todo += [(case, shape, True) for case, shape in again]
    found = []
    for case, shape, again in todo:
        run = functools.partial(measure, case, shape, setting, again, copied)
        gated = Gate(str(case), functools.partial(gate, case, device))
        name = f"{case}, {register_text(shape)}{', compiled' * again}"
        found.append(Job(name, run, gated))
    if not found:
        raise click.ClickException("--largest: registers are 4 KiB and up (0.00390625 MiB).")
    return found


def notes(setting: Setting) -> list[str]:
    """What does not run here."""
    names = ("cuda", "triton", "cpu") if setting.device.type == "cuda" else ("cpu",)
    missing = {name: backends.get(name).missing() for name in names}
    found = [f"`{name}` does not run here: {why}." for name, why in missing.items() if why]
    if not installed("diffusers"):
        found.append("diffusers is not installed: its step is left out.")
    return found


BENCH = Bench(
    "stage",
    "One stage on every backend: share of the copy bandwidth, and host time per launch.",
    jobs,
    report.page,
    options=(
        option(
            "--largest",
            type=float,
            help="MiB a register, at most. [default: 1024 on CUDA, 64 elsewhere]",
        ),
        option("--compile", "compiled", is_flag=True, help="Time torch.compile too."),
    ),
    notes=notes,
    rounds=7,
    seconds=0.1,
)
