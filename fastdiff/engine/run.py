# SPDX-License-Identifier: Apache-2.0
"""A run: the registers, table, times, bound stage and clock for one shape.

Whatever executes rows drives a `Run`: the eager loop, captured loops and stages, both directions of
a gradient, and batches whose samples stand at different stages. A run belongs to one caller at a
time: `Leases` lends it, and two calls at once, or one inside another, never share one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .. import backends
from ..guidance import Guidance, guided_rows
from ..plans import AT_E, CLIP, THRESHOLD, WRITES_M, Layout, PackedRow, Plan, encode
from .call import Call, check_given, check_xi, seeds_on
from .recordings import check_coefficients, check_placed
from .streams import Use


@dataclass(frozen=True)
class Spec:
    """What a run's memory and kernels are made for. Runs of equal specs serve each other's rows.

    Attributes:
        shape: Shape of the state, [B, ...].
        device: Where the registers lie.
        state, network: Dtypes of the state and of the network's input.
        backend: Name of the backend that serves.
        layout: Columns of the table; `layout.branches` is the number of branches G.
        rows: Rows that the table has room for.
        slots: History registers.
        has_e, has_m: Whether there is an evaluation point beside x, and an input beside both.
        stages: Stages whose times can be held.
        entries, bank_batch: Entries of the bank, each for `bank_batch` samples (1 or B).
        scalars: Columns of S.
        features: What kernels are specialised for besides the layout.
        stride: Rows that a stage takes: B where each sample has weights of its own.
        index: "none"; "sample" (sample b runs the row b after a stage's first); or "place"
            (sample b runs the row that its owner writes into `Run.index`).
        clocked: Whether the row is a number on the device, advanced by each stage.
        offset: Place of the first element within the sample that this is a part of.
    """

    shape: torch.Size
    device: torch.device
    state: torch.dtype
    network: torch.dtype
    backend: str
    layout: Layout
    rows: int
    slots: int
    has_e: bool
    has_m: bool
    stages: int = 0
    entries: int = 0
    bank_batch: int = 0
    scalars: int = 0
    features: tuple[Any, ...] = ()
    stride: int = 1
    index: str = "none"
    clocked: bool = False
    offset: int = 0

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @property
    def batch(self) -> int:
        """Samples B."""
        return self.shape[0]

    @property
    def branches(self) -> int:
        """Branches G of the network."""
        return self.layout.branches


def _has_scalars(row: PackedRow) -> bool:
    own = (row.scalar_b, row.scalar_g, row.scalar_c, row.scalar_ce, *row.scalar_k)
    return any(column >= 0 for column in own)


Kind = tuple[torch.dtype, torch.dtype, torch.device, str]


def features_of(rows: Sequence[PackedRow]) -> tuple[Any, ...]:
    """What kernels may be specialised for: the most draws, and what any row does."""
    return (
        max((len(row.draws) for row in rows), default=0),
        any(row.flags & CLIP for row in rows),
        any(row.flags & THRESHOLD for row in rows),
        any(row.push_x >= 0 for row in rows),
        any((row.u, row.v, row.b_raw, row.g_raw, row.d_new) != (0, 1, 0, 0, 0) for row in rows),
        any(_has_scalars(row) for row in rows),
    )


def _unbound(row: int, out: Any, xi: Any) -> None:
    raise RuntimeError("Run: rows are written before one is run; got a run without any.")


class Run:
    """Registers, table, times, bound stage and clock.

    Attributes:
        spec: What the run is made for.
        registers: See `fastdiff.backends.Registers`.
        table: The rows, on the CPU.
        times: The network's t at each stage, [stages, G * B].
        index: int64 [B] on the device; see `Spec.index`.
        clock: int64 (stage, row) on the device, where the spec says so.
        beside: Other tensors that the run's launches read, made where it was made: they live as
            long as it does.
        inputs, model_times: The network's x and t at each stage of the loaded plan.
        measures: Whether each stage of the loaded plan has measures.
        stage: `stage(row, out, xi)` runs a row; see `fastdiff.backends.BoundStage`.
        recording: Gives the `Recording` that the run belongs to; None: it serves any call.
        use: The streams that the memory is used on; whoever borrows it follows the one before.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.recording: Any = None
        self.use = Use(spec.device)
        like = functools.partial(torch.empty, dtype=spec.state, device=spec.device)
        shape, batch, branches = spec.shape, spec.batch, spec.branches
        with torch.inference_mode(False):  # buffers outlive the caller's mode
            m = None
            if spec.has_m:
                m = like((branches * batch, *shape[1:]), dtype=spec.network)
            self.registers = backends.Registers(
                x=like(shape),
                e=like(shape) if spec.has_e else None,
                history=like((spec.slots, *shape)),
                m=m,
                bank=like((spec.entries, spec.bank_batch, *shape[1:])) if spec.entries else None,
                scalars=like((batch, spec.scalars)).zero_() if spec.scalars else None,
                seeds=torch.zeros(batch, dtype=torch.int64, device=spec.device),
            )
            kind = torch.float64 if spec.network == torch.float64 else torch.float32
            self.times = torch.zeros(
                (spec.stages, branches * batch), dtype=kind, device=spec.device
            )
            self.time = torch.zeros((1, branches * batch), dtype=kind, device=spec.device)
            self.table = torch.from_numpy(encode([PackedRow()], spec.layout)).repeat(spec.rows, 1)
            self.index = None
            if spec.index != "none":
                first = torch.arange(batch, device=spec.device)
                self.index = first if spec.index == "sample" else torch.zeros_like(first)
            self.clock: torch.Tensor | None = None
            if spec.clocked:
                self.clock = torch.zeros(2, dtype=torch.int64, device=spec.device)
                self._forward = torch.tensor([1, spec.stride], device=spec.device)
        self.model_times = list(self.times)
        self.inputs: list[torch.Tensor] = []
        self.measures: list[bool] = []
        self.beside: list[torch.Tensor] = []
        self._bound: Any = None  # to the first rows, for which kernels are specialised
        self.stage: Callable[..., None] = _unbound
        self._first_row = 0
        self._points: list[bool] = []
        self._holds: tuple[Any, ...] = (None, None)  # plan and guidance whose numbers stand here
        self._written = self.times._version  # by this run itself
        handed = (self.registers.x, self.registers.e, m)
        self._handed = [tensor for tensor in handed if tensor is not None]
        self._places = [tensor.data_ptr() for tensor in self._handed]

    # -- the table -------------------------------------------------------------------------------

    def write(self, rows: Sequence[PackedRow], at: int = 0) -> None:
        """Writes rows into the table, from row `at` on.

        Raises:
            RuntimeError: Somebody records the current stream: his graph would hold the copy from
                the host, and repeat it at each replay out of memory that is used otherwise then.
        """
        check_coefficients(self.spec.device)
        self._holds = (None, None)
        packed = torch.from_numpy(encode(rows, self.spec.layout))
        self.table[at : at + len(rows)] = packed
        if self._bound is None:
            self._bind()
            return
        self._bound.refresh(self.table)

    def _bind(self) -> None:
        spec, row_index = self.spec, None if self.clock is None else self.clock[1:]
        with torch.inference_mode(False):
            self._bound = backends.get(spec.backend).bind(
                *(self.registers, self.table, spec.layout, self.index, row_index, spec.offset)
            )
        self.stage = self._bound.run

    def write_times(self, model_times: Sequence[float], at: int = 0) -> None:
        """Writes the network's times, from stage `at` on."""
        # the CPU, whatever the default device
        values = torch.tensor(list(model_times), dtype=self.times.dtype, device="cpu")
        if self.times.is_cuda:
            values = values.pin_memory()
        values = values.to(self.times.device, non_blocking=True)
        self.times[at : at + len(values)] = values[:, None]
        self._written = self.times._version

    def load(self, plan: Plan, guidance: Guidance) -> None:
        """Makes this a run of a plan, which fits the spec.

        The rows of the plan stand first. A row that writes the first input and nothing else stands
        after them. The rows after that one do nothing.
        """
        same = self._holds[0] is plan and self._holds[1] is guidance
        untouched = self.times._version == self._written
        if same and untouched:
            return
        if not untouched:  # a network wrote to its times, or moved them
            self.model_times = list(self.times)
        rows = guided_rows(guidance, plan, self.spec.batch)
        first = PackedRow(flags=WRITES_M, c_in_next=plan.stages[0].c_in)
        idle = self.spec.rows - len(rows) - self.spec.stride
        self.write([*rows, *[first] * self.spec.stride, *[PackedRow()] * idle])
        self.write_times([stage.model_time for stage in plan.stages])
        self._first_row = len(rows)
        self._points = [bool(row.flags & AT_E) for row in rows[:: self.spec.stride]]
        self.measures = [bool(stage.measures) for stage in plan.stages]
        m = self.registers.m
        self.inputs = [self.point(i) if m is None else m for i in range(len(plan.stages))]
        self._holds = (plan, guidance)

    # -- the verbs of a loop ---------------------------------------------------------------------

    def point(self, i: int) -> torch.Tensor:
        """Where stage i of the loaded plan evaluates: e or x."""
        e = self.registers.e
        return e if self._points[i] and e is not None else self.registers.x

    def fill(self, call: Call, plan: Plan) -> None:
        """Copies what a call brings into the buffers; samples past the call's are zeroed."""
        registers, batch = self.registers, call.batch
        check_given(call, plan)
        if call.xi is not None:
            check_xi(call.xi, len(plan.stages), registers.x)
        elif plan.stochastic and registers.seeds is not None:
            check_placed(self.spec.device, "seed", call.seed)
            seeds = seeds_on(self.spec.device, call.seed, batch)
            registers.seeds[:batch].copy_(seeds, non_blocking=True)
        for i, given in enumerate(call.extras):
            self._fill_entry(i, given, call.x)
        if batch < registers.x.shape[0]:
            registers.x[batch:].zero_()
        registers.x[:batch].copy_(call.x)

    def _fill_entry(self, i: int, given: Any, x: torch.Tensor) -> None:
        assert self.registers.bank is not None
        entry = self.registers.bank[i]
        batch = min(x.shape[0], entry.shape[0])
        check_placed(self.spec.device, f"extras[{i}]", given)
        try:
            given = (
                given if isinstance(given, torch.Tensor) else torch.as_tensor(given, device="cpu")
            )
            entry[:batch].copy_(given.expand(batch, *x.shape[1:]))
        except (RuntimeError, TypeError):
            got = tuple(given.shape) if isinstance(given, torch.Tensor) else given
            raise ValueError(
                f"sample: extra registers are broadcastable to x, {tuple(x.shape)}; got "
                f"extras[{i}] = {got}."
            ) from None

    def begin(self) -> None:
        """Sets the clock back and writes the input of the first stage."""
        if self.clock is not None:
            self.clock.zero_()
        if self.registers.m is not None:
            self.row(self._first_row, None)

    def advance(self, i: int, out: torch.Tensor | None, xi: torch.Tensor | None = None) -> None:
        """Runs stage i of the loaded plan, its measures first."""
        if self.measures[i]:
            self._bound.measure(i * self.spec.stride, out, xi)
        self.stage(i * self.spec.stride, out, xi)

    def row(self, row: int, out: torch.Tensor | None, measured: bool = False) -> None:
        """Runs one row of the table, after its measures where it may have some."""
        if measured:
            self._bound.measure(row, out, None)
        self.stage(row, out, None)

    def now(self) -> torch.Tensor:
        """The time at the clock's stage, [G * B], in memory of its own."""
        assert self.clock is not None
        torch.index_select(self.times, 0, self.clock[:1], out=self.time)
        return self.time[0]

    def tick(self, out: torch.Tensor | None) -> None:
        """Runs the clock's stage, with measures where any stage has some, and advances it."""
        assert self.clock is not None
        if any(self.measures):
            self._bound.measure(0, out, None)
        self.stage(0, out, None)
        self.clock.add_(self._forward)

    # -- its state -------------------------------------------------------------------------------

    @property
    def counts_writes(self) -> bool:
        """Whether PyTorch's version counters see what a stage writes."""
        return backends.get(self.spec.backend).counts_writes

    def versions(self) -> tuple[int, ...]:
        """The version counters of what a network is handed; its writes in place raise them."""
        r = self.registers
        held = (r.x, r.e, r.m, self.times)
        return tuple(tensor._version for tensor in held if tensor is not None)

    def in_place(self) -> bool:
        """Whether the registers that a network is handed still lie where they lay."""
        return list(map(torch.Tensor.data_ptr, self._handed)) == self._places

    def live(self) -> list[torch.Tensor]:
        """What a stage hands on to the next: x, e, the history, and numbers of each sample."""
        r = self.registers
        held = (r.x, r.e, r.history, r.scalars)
        return [tensor for tensor in held if tensor is not None]

    def restore(self, values: Sequence[torch.Tensor], i: int, plan: Plan) -> None:
        """Puts the registers back to what they were before stage i of the loaded plan.

        Args:
            values: Copies of `live()`.
            i: The stage.
            plan: The loaded plan.
        """
        for register, value in zip(self.live(), values, strict=True):
            register.copy_(value)
        stage, m, point = plan.stages[i], self.registers.m, self.point(i)
        if m is not None and stage.evaluate:
            m.reshape(self.spec.branches, *point.shape).copy_(point * stage.c_in)

    def tensors(self) -> list[torch.Tensor]:
        """Everything that stands on this run's memory."""
        held = (*vars(self.registers).values(), self.times, self.time, self.index, self.clock)
        return [tensor for tensor in (*held, self.table) if isinstance(tensor, torch.Tensor)]

    def follow(self) -> None:
        """Makes the current stream wait for the run before on this memory."""
        self.use.follow()

    def __del__(self) -> None:
        if "use" in vars(self):
            self.use.end(dict(vars(self)))


def spec_of(
    plan: Plan,
    guidance: Guidance,
    shape: torch.Size,
    kind: Kind,
) -> Spec:
    """The spec of a run of one plan.

    Args:
        plan: The plan.
        guidance: Says the branches, and whether each sample has weights of its own.
        shape: [B, ...].
        kind: Dtypes of the state and the network's input, the device, and the backend's name.
    """
    state, network, device, backend = kind
    scaled = any(stage.c_in != 1.0 for stage in plan.stages)
    stride = shape[0] if guidance.per_sample else 1
    return Spec(
        shape=shape,
        device=device,
        state=state,
        network=network,
        backend=backend,
        layout=replace(plan.layout, branches=guidance.branches),
        rows=(len(plan.stages) + 1) * stride,
        slots=plan.slots,
        has_e=plan.uses_e,
        has_m=scaled or network != state or guidance.branches > 1,
        stages=len(plan.stages),
        entries=plan.extras,
        bank_batch=shape[0],
        scalars=plan.scalars,
        features=features_of(plan.rows()),
        stride=stride,
        index="sample" if guidance.per_sample else "none",
    )
