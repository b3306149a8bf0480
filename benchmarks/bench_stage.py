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
import math
from collections.abc import Callable

import click
import torch
from command import option
from reports import stage as report
from reports.stage import COPY, EAGER, INDUCTOR, LARGE, LAUNCHER, THEIRS
from rivals import diffusers
from rivals.eager import compiled_update, eager_of

from fastdiff import backends
from fastdiff.backends import BoundStage
from fastdiff.bench.gate import GateError, agree
from fastdiff.bench.machine import GIB, MIB, cache_bytes, free_bytes, installed
from fastdiff.bench.records import Record, record
from fastdiff.bench.rows import (
    Case,
    Shape,
    bind,
    cells,
    moved_to,
    register_text,
    registers_of,
)
from fastdiff.bench.runs import Bench, Gate, Job, Setting
from fastdiff.bench.text import reason
from fastdiff.bench.timing import Calls, take_turns


def available(device: torch.device) -> list[str]:
    """The backends that run on the device, without Triton's interpreter."""
    found = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}[device.type]
    return [name for name in found if backends.get(name).missing() is None]


def empty_kernel(device: torch.device) -> Calls:
    """A Triton kernel that does nothing, called as users call one: it times the launcher."""
    import triton

    @triton.jit
    def nothing(a, b, c, d, e, f, g, h, i, j):
        return

    x = torch.zeros(4, device=device)
    return [lambda: nothing[(1,)](x, x, x, x, x, x, 16, 16, 16, 16, num_warps=4)]


# -- the gate --------------------------------------------------------------------------------------


@torch.no_grad()
def gate(case: Case, device: torch.device, shape: Shape = (3, 1040)) -> None:
    """Checks that every backend walks all rows of a case to the compiled core's registers.

    Raises:
        GateError: A compiled backend differs by a bit, or torch by more than its rounding.
    """
    names = [n for n in ("cpu", *available(device)) if backends.get(n).missing() is None]
    made, output = registers_of(case, shape, torch.device("cpu"))
    wanted: torch.Tensor | None = None
    for name in dict.fromkeys(names):
        place = torch.device("cpu") if name == "cpu" else device
        registers = moved_to(made, place)
        bound, out = bind(name, case, registers), output.to(place)
        for row, stage in enumerate(case.rows.stages):
            bound.run(row, out if stage.evaluate else None, None)
        bound.check()
        ends = [registers.x, *(() if registers.e is None else (registers.e,))]
        ends += [] if registers.history is None else list(registers.history)
        ends += [] if registers.m is None else list(registers.m.view(-1, *shape))
        got = torch.stack([end.float().cpu() for end in ends])
        if wanted is None:
            wanted = got
        elif name == "torch":  # with m, up to a step of bfloat16
            narrow = case.network == torch.bfloat16
            agree(f"{name}, {case}", got, wanted, 4e-3 if narrow else 2e-6)
        elif not torch.equal(got, wanted):
            raise GateError(
                f"{name}, {case}: compiled backends agree to the bit; got "
                f"{int((got != wanted).sum())} of {got.numel()} elements that differ from "
                f"{names[0]}'s. Nothing was timed."
            )


# -- a cell ----------------------------------------------------------------------------------------


Bandwidth = tuple[float, float]  # bytes a second: of the best turn, and of the median


def copy_bandwidth(setting: Setting, numel: int) -> Bandwidth:
    """Bytes a second of `copy_` between tensors of `numel` float32, in rotation."""
    device = setting.device
    count = max(2, min(32, math.ceil(3 * cache_bytes(device) / (4 * numel))))
    tensors = [torch.randn(numel, device=device) for _ in range(count)]
    calls = [
        functools.partial(tensors[k].copy_, tensors[(k + count // 2) % count]) for k in range(count)
    ]
    timing, _ = take_turns({COPY: calls}, device, setting.rounds, setting.seconds)[COPY]
    return 8 * numel / timing.best, 8 * numel / timing.median


class Cell:
    """A case at a shape, with as many sets of registers as pass the last cache, 32 at most.

    Raises:
        MemoryError: They would not fit in half of the memory that is free.
    """

    def __init__(self, case: Case, shape: Shape, device: torch.device) -> None:
        self.case, self.shape, self.device = case, shape, device
        self.numel = numel = math.prod(shape)
        self.small = 4 * numel <= MIB
        self.moved, cache = case.bytes(numel), cache_bytes(device)
        registers = case.outputs + 3 + case.noise + case.backward + 2 * case.branches
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what other cells have left, which the driver counts as taken
        if 8 * numel * registers > free_bytes(device):
            raise MemoryError(f"needs {8 * numel * registers / GIB:.1f} GiB of free memory")
        sets = max(1, min(32, math.ceil(3 * cache / self.moved)))
        self.in_cache = sets * self.moved < 2 * cache
        self.sets = [registers_of(case, shape, device) for _ in range(sets)]
        self.eager = [eager_of(case)(case, *each) for each in self.sets]
        self.bound: list[BoundStage] = []

    def ours(self, name: str) -> Calls:
        """A backend's stage on every set."""
        bound = [bind(name, self.case, registers) for registers, _ in self.sets]
        self.bound += bound
        pairs = zip(bound, self.sets, strict=True)
        return [functools.partial(b.run, self.case.row, out, None) for b, (_, out) in pairs]

    def inductor(self) -> Calls:
        update, case = compiled_update(self.case), self.case
        loops = [eager_of(case)(case, *each, compiled=update) for each in self.sets]
        return [loop.run_compiled for loop in loops]

    def makers(self, compiled: bool) -> dict[str, Callable[[], Calls]]:
        """Functions that make the launches of each rival, one for every set."""
        case, on_cuda = self.case, self.device.type == "cuda"
        found: dict[str, Callable[[], Calls]] = {
            COPY: lambda: [functools.partial(e.h.copy_, e.x) for e in self.eager],
            EAGER: lambda: self.eager,
        }
        for name in available(self.device):
            if name == "torch" and (not self.small or (on_cuda and case.noise)):
                continue  # the reference: it is for checks, and its noise is made of many kernels
            found[f"fastdiff {name}"] = functools.partial(self.ours, name)
        if compiled:
            found[INDUCTOR] = self.inductor
        if self.small and case == Case() and installed("diffusers"):
            found[THEIRS] = lambda: [diffusers.one_step(self.sets[0][0].x)]
        if self.small and on_cuda and "triton" in available(self.device):
            found[LAUNCHER] = lambda: empty_kernel(self.device)
        return found

    def rivals(self, compiled: bool, lost: list[str]) -> dict[str, Calls]:
        """Rivals that run; why the others do not is added to `lost`."""
        found: dict[str, Calls] = {}
        for name, make in self.makers(compiled).items():
            try:
                calls = make()
                for call in calls:
                    call()  # compiles, and touches every set
                found[name] = calls
            except Exception as error:  # one that cannot run must not take the others along
                what = f"{name}, {self.case}, {register_text(self.shape)}"
                lost.append(f"{what}: {reason(error)}")
        if COPY not in found:
            raise RuntimeError(lost.pop())
        return found


@torch.no_grad()
def measure(
    case: Case,
    shape: Shape,
    setting: Setting,
    compiled: bool,
    copied: Callable[[], Bandwidth],
    lost: list[str],
) -> list[Record]:
    """All rivals of one cell; `copied` gives the bandwidth that small cells are held against."""
    device, cell = setting.device, Cell(case, shape, setting.device)
    rivals = cell.rivals(compiled, lost)
    timings = take_turns(rivals, device, setting.rounds, setting.seconds)
    for bound in cell.bound:
        bound.check()
    copy = timings[COPY][0]
    large = 4 * cell.numel >= LARGE
    own = (8 * cell.numel / copy.best, 8 * cell.numel / copy.median)
    full = dict(zip(("best", "median"), own if large else copied(), strict=True))
    records = []
    for name, (timing, host) in timings.items():
        moved = {COPY: 8 * cell.numel, LAUNCHER: 0}.get(name, cell.moved)
        line = record(
            *("stage", name, timing),
            shape=list(shape),
            dtype="float32",
            network=str(case.network).removeprefix("torch."),
            outputs=case.outputs,
            branches=case.branches,
            noise=case.noise,
            backward=case.backward,
            moved=moved,
            in_cache=cell.in_cache,
            **dict(setting.about),
        )
        for key, suffix in (("best", ""), ("median", "_median")):
            bandwidth = moved / getattr(timing, key)
            line["bandwidth" + suffix] = round(bandwidth / 1e9, 3)
            line["share" + suffix] = round(bandwidth / full[key], 4)
        if device.type == "cuda":
            times = {"host": host.median, "host_p20": host.p20, "host_p80": host.p80}
            line.update({k: round(v * 1e6, 4) for k, v in times.items()})
        records.append(line)
    return records


# -- the bench -------------------------------------------------------------------------------------


def jobs(setting: Setting, *, largest: float | None, compiled: bool) -> list[Job]:
    """A job for every cell; those of one row share a gate.

    The compiler takes seconds a cell, so the cells that it takes part in come again at the end.
    """
    device = setting.device
    most = int((largest or (1024 if device.type == "cuda" else 64)) * MIB)
    numel = min(most, 256 * MIB) // 4
    copied = functools.cache(functools.partial(copy_bandwidth, setting, numel))
    todo = [(case, shape, False) for case, shape in cells(setting.short, most)]
    if compiled:
        todo += [(case, shape, True) for case, shape in cells(True, most)]
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
