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
from ..plans import Plan, Stage
from .machine import GIB, KIB, MIB
from .traffic import Backward, stage_bytes

SIZES = tuple(k * KIB for k in (4, 64)) + tuple(k * MIB for k in (1, 16, 64, 256, 1024))
TINY = ((65536, 16), (4096, 64))
P, A_X, C = -0.25, 0.5, 0.1
B_J = (0.3, -0.2, 0.1, -0.05)  # of h and of earlier outputs: sums under 1, so that x stays bounded
GUIDANCE = ((1.0,), (3.0, -2.0))
Shape = tuple[int, ...]


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
    """

    outputs: int = 2
    branches: int = 1
    network: torch.dtype = torch.float32
    noise: bool = False
    backward: bool = False

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,) * self.branches if self.backward else GUIDANCE[self.branches - 1]

    @property
    def copies(self) -> int:
        """How often the network's next input is written: never where the network is given x."""
        own = self.branches > 1 or self.network != torch.float32 or self.backward
        return self.branches if own else 0

    @property
    def row(self) -> int:
        """The first row of full order, which pushes as well if M > 1 (backward: M > 2)."""
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
        return dict(zip(replace(rows.layout, branches=self.branches).columns, row, strict=True))

    @functools.cached_property
    def plan(self) -> Plan:
        """A plan whose rows rise in order, and then have full order to the end."""
        stages = []
        for k in range(2 * self.outputs):
            stage = Stage(t=1.0 - k / 16, p=P, a_x=A_X, b=B_J[: min(k + 1, self.outputs)])
            if self.noise:
                stage = replace(stage, c=C, noise=((k + 1, 1.0),))
            stages.append(stage)
        return Plan(stages=tuple(stages), times=(1.0, 0.0))

    def bytes(self, numel: int) -> int:
        """The bytes that the row moves, counted from its flags."""
        return stage_bytes(
            *(self.rows, self.row, numel, torch.float32, self.network),
            weights=self.weights,
            copies=self.copies,
        )

    def __str__(self) -> str:
        dtype = str(self.network).removeprefix("torch.")
        text = f"M={self.outputs} G={self.branches} {dtype}" + ", noise" * self.noise
        return text + ", backward" * self.backward


CHOSEN = (
    Case(),
    Case(noise=True),
    Case(backward=True),
    Case(network=torch.bfloat16),
    Case(3, 2, torch.bfloat16, True),
    Case(3, 2, backward=True),
)
SHOWN = CHOSEN[:3]  # on the page at every size


def all_cases() -> tuple[Case, ...]:
    """The chosen cases, then the rest of the product; backward rows stand in float32 alone."""
    dtypes = (torch.float32, torch.bfloat16)
    product = itertools.product(range(1, 5), (1, 2), dtypes, (False, True))
    found = [*CHOSEN, *itertools.starmap(Case, product)]
    found += [Case(m, g, backward=True) for m, g in itertools.product(range(1, 5), (1, 2))]
    return tuple(dict.fromkeys(found))


def cells(short: bool, largest: int) -> list[tuple[Case, Shape]]:
    """The cases and shapes to measure, the most important first.

    Args:
        short: The chosen cases at 4 KiB, 1 MiB and 64 MiB alone.
        largest: Bytes of a register, at most.
    """
    sizes = [s for s in SIZES if s <= largest]
    shapes: list[Shape] = [(1, s // 4) for s in sizes]
    first: list[Shape] = [(1, s // 4) for s in (4 * KIB, 64 * MIB, MIB) if s <= largest]
    found = list(itertools.product(CHOSEN, first))
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
        return torch.randn((*leading, *shape), generator=generator, device=device)

    out = normals(case.branches).to(case.network).flatten(0, 1)
    m = torch.zeros_like(out) if case.copies else None
    slots = case.rows.slots if case.backward else case.outputs - 1
    history = normals(slots) if slots else None
    seeds = torch.arange(shape[0], device=device) if case.noise else None
    x = normals(1)[0]
    e = normals(1)[0] if case.backward else None
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


def register_text(shape: Sequence[int]) -> str:
    bytes_ = 4 * math.prod(shape)
    if tuple(shape) in TINY:
        return "[" + ",".join(map(str, shape)) + "]"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if bytes_ >= unit:
            return f"{bytes_ / unit:g} {name}"
    return f"{bytes_} B"
