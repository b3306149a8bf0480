# SPDX-License-Identifier: Apache-2.0
"""Rows of a stage to measure, and registers for them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .. import backends
from ..backends import BoundStage, Registers
from ..plans import Layout, Plan, Stage
from .machine import GIB, KIB, MIB
from .traffic import Backward, stage_bytes

SIZES = tuple(k * KIB for k in (4, 64)) + tuple(k * MIB for k in (1, 16, 64, 256, 1024))
TINY = ((65536, 16), (4096, 64))
P, A_X, C = -0.25, 0.5, 0.1
MOST_OUTPUTS = 100  # the weights of more fall out of float32, and what has none is not read
Shape = tuple[int, ...]
PARALLEL = 64 * MIB  # on the CPU, registers from here on are held to a copy of their own size
UNCACHED = 256 * MIB  # on CUDA; below, a copy may find half of its bytes in the cache


def weights_of(outputs: int) -> tuple[float, ...]:
    """Of h and of earlier outputs: their sum is under 1, so that x stays bounded."""
    halved = (0.05 * (-1) ** (j + 1) / 2 ** (j - 3) for j in range(4, outputs))
    return (*(0.3, -0.2, 0.1, -0.05)[:outputs], *halved)


def guidance_of(branches: int) -> tuple[float, ...]:
    """Weights of guidance branches, whose sum is 1."""
    return (1.0,) if branches == 1 else (3.0, *(-2.0 / (branches - 1),) * (branches - 1))


def large_from(place: str) -> int:
    """Bytes from which on a register's share is of a copy of the same size, on "cpu" or "cuda"."""
    return UNCACHED if place == "cuda" else PARALLEL


@dataclass(frozen=True)
class Case:
    """A kind of row.

    Attributes:
        outputs: M, the network outputs combined, the present one included.
        branches: G.
        network: Dtype of the network's outputs and of its next input.
        noise: Whether the row draws.
        backward: Whether it is of the transposed plan: x, e and the outputs are cotangents, and the
            input that it writes is the next product's.
        state: Dtype of the registers.
        given: A plan whose heaviest row is taken. `outputs` and `noise` then say what it has.
    """

    outputs: int = 2
    branches: int = 1
    network: torch.dtype = torch.float32
    noise: bool = False
    backward: bool = False
    state: torch.dtype = torch.float32
    given: Plan | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,) * self.branches if self.backward else guidance_of(self.branches)

    @property
    def copies(self) -> int:
        """How often the network's next input is written: never where the network is given x."""
        own = self.branches > 1 or self.network != self.state or self.backward
        if self.given is not None:
            own = own or any(stage.c_in != 1.0 for stage in self.given.stages)
        return self.branches if own else 0

    @property
    def row(self) -> int:
        """The first row of full order, which pushes as well if M > 1 (backward: M > 2)."""
        if self.given is not None:
            rows = range(len(self.given.stages))
            return max(rows, key=lambda row: self._bytes(row, 1))
        return self.outputs if self.backward else self.outputs - 1

    @property
    def rows(self) -> Plan | Backward:
        """The plan, or the transposed plan, that is bound."""
        return Backward(self.plan.transpose()) if self.backward else self.plan

    @property
    def values(self) -> dict[str, float]:
        """The numbers of the measured row, by column."""
        rows = self.rows
        row = rows.pack(self.weights)[self.row].tolist()
        return dict(zip(self.layout.columns, row, strict=True))

    @property
    def layout(self) -> Layout:
        """The columns of the table that is bound."""
        return replace(self.rows.layout, branches=self.branches)

    @functools.cached_property
    def plan(self) -> Plan:
        """A plan whose rows rise in order, and then have full order to the end."""
        return self.given or plan_of(self.outputs, self.noise, 2 * self.outputs)

    def bytes(self, numel: int) -> int:
        """The bytes that the row moves, counted from its flags."""
        return self._bytes(self.row, numel)

    def _bytes(self, row: int, numel: int) -> int:
        weights, copies = self.weights, self.copies
        return stage_bytes(
            self.rows, row, numel, self.state, self.network, weights=weights, copies=copies
        )

    def register_bytes(self, shape: Shape) -> int:
        """The bytes of one register."""
        return self.state.itemsize * math.prod(shape)

    @property
    def dtypes(self) -> str:
        """The network's dtype, after the state's where that is not float32."""
        state, network = (str(d).removeprefix("torch.") for d in (self.state, self.network))
        return network if state in ("float32", network) else f"{state}/{network}"

    def __str__(self) -> str:
        text = f"M={self.outputs} G={self.branches} {self.dtypes}" + ", noise" * self.noise
        text += f", {self.given.solver or 'a plan'}" if self.given is not None else ""
        return text + ", backward" * self.backward


def plan_of(outputs: int, noise: bool, steps: int) -> Plan:
    """A plan of that many steps, whose rows rise to M outputs and stay there."""
    stages, b = [], weights_of(outputs)
    for k in range(steps):
        stage = Stage(t=1.0 - k / steps, p=P, a_x=A_X, b=b[: min(k + 1, outputs)])
        if noise:
            stage = replace(stage, c=C, noise=((k + 1, 1.0),))
        stages.append(stage)
    return Plan(stages=tuple(stages), times=(1.0, 0.0))


def case_of_plan(plan: Plan, branches: int, network: torch.dtype, state: torch.dtype) -> Case:
    """The heaviest row of a plan.

    Raises:
        ValueError: The plan has rows that need more than x, e, the history and noise.
    """
    layout = plan.layout
    if layout.extras or layout.products or layout.measures or plan.scalars:
        raise ValueError(
            "bench stage: a plan reads x, e, earlier outputs and noise; got one that reads a bank "
            "or measures its samples. Take another plan."
        )
    terms = max(len(stage.b) for stage in plan.stages)
    return Case(terms, branches, network, plan.stochastic, state=state, given=plan)


CHOSEN = (
    Case(),
    Case(noise=True),
    Case(backward=True),
    Case(network=torch.bfloat16),
    Case(3, 2, torch.bfloat16, True),
    Case(3, 2, backward=True),
)
SHOWN = CHOSEN[:3]  # on the page at every size
# The rows that are held to a share of a copy on a GPU.
BOUND = tuple(
    Case(m, g, noise=noise) for m, g, noise in itertools.product(range(1, 5), (1, 2), (False, True))
)


def all_cases() -> tuple[Case, ...]:
    """The chosen cases, then the rest of the product; backward rows stand in float32 alone."""
    dtypes = (torch.float32, torch.bfloat16)
    product = itertools.product(range(1, 5), (1, 2), dtypes, (False, True))
    found = [*CHOSEN, *itertools.starmap(Case, product)]
    found += [Case(m, g, backward=True) for m, g in itertools.product(range(1, 5), (1, 2))]
    return tuple(dict.fromkeys(found))


def cells(short: bool, largest: int) -> list[tuple[Case, Shape]]:
    """The cases and shapes to measure, the most important first.

    Those that the targets bind come first, at 256 MiB, where no cache flatters anyone.

    Args:
        short: Beside those the chosen cases at 4 KiB, 1 MiB and 64 MiB alone.
        largest: Bytes of a register, at most.
    """
    sizes = [s for s in SIZES if s <= largest]
    shapes: list[Shape] = [(1, s // 4) for s in sizes]
    first: list[Shape] = [(1, s // 4) for s in (4 * KIB, 64 * MIB, MIB) if s <= largest]
    held: list[Shape] = [(1, s // 4) for s in (UNCACHED,) if s <= largest]
    found = list(itertools.product(BOUND, held))
    if not short:  # the largest of all before the small ones
        found += itertools.product(
            CHOSEN[:2], [(1, s // 4) for s in SIZES if UNCACHED < s <= largest]
        )
    found += itertools.product(CHOSEN, first)
    if not short:
        tiny: list[Shape] = [s for s in TINY if 4 * math.prod(s) <= largest]
        found += itertools.product(CHOSEN, [*shapes[::-1], *tiny])
        found += itertools.product(all_cases(), [s for s in first if s != (1, KIB)])
        found += itertools.product(all_cases(), tiny)
    return list(dict.fromkeys(found))


def registers_of(case: Case, shape: Shape, device: torch.device) -> tuple[Registers, torch.Tensor]:
    """Filled registers for a case, and an output of its network."""
    generator = torch.Generator(device).manual_seed(0)

    def normals(*leading: int) -> torch.Tensor:
        made = torch.randn((*leading, *shape), generator=generator, device=device)
        return made.to(case.state)

    out = normals(case.branches).flatten(0, 1).to(case.network)
    m = torch.zeros_like(out) if case.copies else None
    slots = case.rows.slots
    history = normals(slots) if slots else None
    seeds = torch.arange(shape[0], device=device) if case.noise else None
    x = normals(1)[0]
    reads_e = case.backward or (case.given is not None and case.given.uses_e)
    e = normals(1)[0] if reads_e else None
    return Registers(x=x, e=e, history=history, m=m, seeds=seeds), out


def bind(name: str, case: Case, registers: Registers) -> BoundStage:
    """A backend bound to the rows of a case and to these registers."""
    rows = case.rows
    table = torch.from_numpy(rows.pack(case.weights))
    layout = replace(rows.layout, branches=case.branches)
    return backends.get(name).bind(registers, table, layout)


def moved_to(registers: Registers, device: torch.device) -> Registers:
    tensors = {
        name: value.to(device, copy=True)
        for name in ("x", "e", "history", "m", "seeds")
        if (value := getattr(registers, name)) is not None
    }
    return Registers(**tensors)


def register_text(shape: Sequence[int], itemsize: int = 4) -> str:
    bytes_ = itemsize * math.prod(shape)
    if len(shape) > 2 or shape[0] > 1:
        return "[" + ",".join(map(str, shape)) + "]"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if bytes_ >= unit:
            return f"{bytes_ / unit:g} {name}"
    return f"{bytes_} B"
