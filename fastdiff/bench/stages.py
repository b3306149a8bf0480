# SPDX-License-Identifier: Apache-2.0
"""One stage on every backend: what is bound, how it is checked, and how it is timed.

A cell is a kind of row at a size. Its rivals take turns on the same registers, of which there are
as many sets as it takes to pass the last cache (32 at most). On CUDA a turn is a queue of launches
behind a short wait: events see the device's time alone and the host's clock the time to enqueue
alone; elsewhere a launch is a call, and both are one. A row is timed only after the backends have
agreed on it, to the bit where that is promised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import backends
from ..backends import BoundStage
from .captured import capture
from .gate import GateError, agree
from .machine import GIB, MIB, cache_bytes, free_bytes
from .records import Record, record
from .rows import Case, Shape, bind, large_from, moved_to, register_text, registers_of
from .runs import Setting
from .text import reason
from .timing import Calls, take_turns

COPY, GRAPHED = "copy_", "{}, in a graph"
CAPTURED = 32  # launches that a graph of small stages holds
# What the reference may be off by: a few roundings of its dtype.
ROUNDING = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
Makers = dict[str, Callable[[], Calls]]
Bandwidth = tuple[float, float]  # bytes a second: of the best turn, and of the median


def available(device: torch.device) -> list[str]:
    """The backends that run on the device, without Triton's interpreter."""
    found = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}[device.type]
    return [name for name in found if backends.get(name).missing() is None]


def serves(name: str, case: Case, device: torch.device) -> bool:
    """Whether a backend runs the rows of a case."""
    backend, layout = backends.get(name), case.layout
    return backend.supports(case.state, case.network, device, layout) is None


# -- the gate --------------------------------------------------------------------------------------


@torch.no_grad()
def gate(
    case: Case,
    device: torch.device,
    shape: Shape = (3, 1040),
    names: Sequence[str] | None = None,
) -> None:
    """Checks that every backend walks all rows of a case to the same registers.

    The compiled core on the CPU is the one to agree with; where it does not serve the dtypes, the
    `torch` backend is.

    Args:
        case: The rows.
        device: Where the backends run.
        shape: Of the registers.
        names: The backends. None: all that are available there.

    Raises:
        GateError: A compiled backend differs by a bit, or torch by more than its rounding.
    """
    cpu = torch.device("cpu")
    own = available(device) if names is None else names
    found = [n for n in ("cpu", *own) if backends.get(n).missing() is None]
    found = [n for n in found if serves(n, case, cpu if n == "cpu" else device)]
    found += ["torch"] * ("cpu" not in found)
    made, output = registers_of(case, shape, cpu)
    wanted: torch.Tensor | None = None
    for name in sorted(dict.fromkeys(found), key=lambda n: (n != "cpu", n != "torch")):
        place = cpu if name == "cpu" else device
        registers = moved_to(made, place)
        bound, out = bind(name, case, registers), output.to(place)
        for row, stage in enumerate(case.rows.stages):
            bound.run(row, out if stage.evaluate else None, None)
        bound.check()
        ends = [registers.x, *(() if registers.e is None else (registers.e,))]
        ends += [] if registers.history is None else list(registers.history)
        ends += [] if registers.m is None else list(registers.m.view(-1, *shape))
        got = torch.stack([end.to(case.state).cpu() for end in ends])
        if wanted is None:
            wanted, first = got, name
        elif "torch" in (name, first):  # with m, up to a step of the network's dtype
            narrow = case.network if case.copies else case.state
            tolerance = max(ROUNDING[case.state], ROUNDING[narrow])
            agree(f"{name}, {case}", got, wanted, tolerance)
        elif not torch.equal(got, wanted):
            raise GateError(
                f"{name}, {case}: compiled backends agree to the bit; got "
                f"{int((got != wanted).sum())} of {got.numel()} elements that differ from "
                f"{first}'s. Nothing was timed."
            )


# -- a cell ----------------------------------------------------------------------------------------


def copy_bandwidth(setting: Setting, nbytes: int) -> Bandwidth:
    """Bytes a second of `copy_` between tensors of so many bytes, in rotation."""
    device, numel = setting.device, max(1, nbytes // 4)
    count = max(2, min(32, math.ceil(3 * cache_bytes(device) / (4 * numel))))
    tensors = [torch.randn(numel, device=device) for _ in range(count)]
    calls = [
        functools.partial(tensors[k].copy_, tensors[(k + count // 2) % count]) for k in range(count)
    ]
    timing, _ = take_turns({COPY: calls}, device, setting.rounds, setting.seconds)[COPY]
    return 8 * numel / timing.best, 8 * numel / timing.median


def needed_bytes(case: Case, shape: Shape) -> int:
    """About what a cell needs at least, with as much again for what its rivals keep."""
    registers = case.outputs + 3 + case.noise + case.backward + 2 * case.branches
    return 2 * case.register_bytes(shape) * registers


class Cell:
    """A case at a shape, with as many sets of registers as pass the last cache, 32 at most.

    Raises:
        MemoryError: They would not fit in half of the memory that is free.
    """

    def __init__(self, case: Case, shape: Shape, device: torch.device) -> None:
        self.case, self.shape, self.device = case, shape, device
        self.numel, self.size = math.prod(shape), case.register_bytes(shape)
        self.small = self.size <= MIB
        self.moved, cache = case.bytes(self.numel), cache_bytes(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what other cells have left, which the driver counts as taken
        needed = needed_bytes(case, shape)
        if needed > free_bytes(device):
            raise MemoryError(f"needs {needed / GIB:.1f} GiB of free memory")
        sets = max(1, min(32, math.ceil(3 * cache / self.moved)))
        self.in_cache = sets * self.moved < 2 * cache
        self.sets = [registers_of(case, shape, device) for _ in range(sets)]
        self.bound: list[BoundStage] = []

    def __str__(self) -> str:
        return f"{self.case}, {register_text(self.shape, self.case.state.itemsize)}"

    def ours(self, name: str) -> Calls:
        """A backend's stage on every set."""
        bound = [bind(name, self.case, registers) for registers, _ in self.sets]
        self.bound += bound
        pairs = zip(bound, self.sets, strict=True)
        return [functools.partial(b.run, self.case.row, out, None) for b, (_, out) in pairs]

    def in_a_graph(self, name: str) -> Calls:
        """One graph of `CAPTURED` launches of a backend's stage, over the sets in turn."""
        calls = self.ours(name)

        def body() -> None:
            for k in range(CAPTURED):
                calls[k % len(calls)]()

        launch, _ = capture(body)
        return [functools.partial(_call, launch, calls)]

    def copies(self) -> Calls:
        """`copy_` out of x, for every set."""
        return [functools.partial(torch.empty_like(r.x).copy_, r.x) for r, _ in self.sets]

    def makers(self, names: Sequence[str]) -> Makers:
        """Functions that make the launches of `copy_` and of each backend, one for every set."""
        found: Makers = {COPY: self.copies}
        for name in names:
            found[rival_name(name)] = functools.partial(self.ours, name)
            if self.small and self.device.type == "cuda" and name != "torch":
                graphed = GRAPHED.format(rival_name(name))
                found[graphed] = functools.partial(self.in_a_graph, name)
        return found

    def rivals(
        self, makers: Mapping[str, Callable[[], Calls]], lost: list[str]
    ) -> dict[str, Calls]:
        """Rivals that run; why the others do not is added to `lost`."""
        found: dict[str, Calls] = {}
        for name, make in makers.items():
            try:
                calls = make()
                for call in calls:
                    call()  # compiles, and touches every set
                found[name] = calls
            except Exception as error:  # one that cannot run must not take the others along
                lost.append(f"{name}, {self}: {reason(error)}")
        if COPY not in found:
            raise RuntimeError(lost.pop())
        return found


def rival_name(backend: str) -> str:
    return f"fastdiff {backend}"


def _call(launch: Callable[[], None], keep: Any) -> None:
    launch()


@torch.no_grad()
def measure(
    cell: Cell,
    makers: Mapping[str, Callable[[], Calls]],
    setting: Setting,
    copied: Callable[[], Bandwidth],
    lost: list[str],
    idle: Sequence[str] = (),
) -> list[Record]:
    """All rivals of one cell.

    Args:
        cell: The rows and their registers.
        makers: What makes the rivals' launches, `COPY` among them.
        setting: How they are timed.
        copied: Gives the bandwidth that small cells are held against.
        lost: Why a rival is lost is added to it.
        idle: Rivals that move nothing.
    """
    case, device = cell.case, setting.device
    rivals = cell.rivals(makers, lost)
    units = {name: CAPTURED for name in rivals if name.endswith(GRAPHED.format(""))}
    timings = take_turns(rivals, device, setting.rounds, setting.seconds, units)
    for bound in cell.bound:
        bound.check()
    copy = timings[COPY][0]
    own = (2 * cell.size / copy.best, 2 * cell.size / copy.median)
    large = cell.size >= large_from(device.type)
    full = dict(zip(("best", "median"), own if large else copied(), strict=True))
    where: dict[str, Any] = dict(setting.about)
    if case.given is not None:
        where["plan"] = case.given.solver or "a plan"
    records = []
    for name, (timing, host) in timings.items():
        moved = 2 * cell.size if name == COPY else 0 if name in idle else cell.moved
        line = record(
            "stage",
            name,
            timing,
            shape=list(cell.shape),
            dtype=str(case.state).removeprefix("torch."),
            network=str(case.network).removeprefix("torch."),
            outputs=case.outputs,
            branches=case.branches,
            noise=case.noise,
            backward=case.backward,
            moved=moved,
            in_cache=cell.in_cache,
            **where,
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
