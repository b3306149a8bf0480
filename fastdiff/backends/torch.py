# SPDX-License-Identifier: Apache-2.0
"""The reference: one stage in plain PyTorch, at any floating dtype, on any device.

Terms are added in table order, as the compiled backends do; each product and sum rounds on its
own here, where they fuse them, so results agree to rounding and not to the bit.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..plans import AT_E, CLIP, EVALUATE, THRESHOLD, WRITES_E, WRITES_M, WRITES_X, Layout
from ..plans.layout import PackedMeasure, PackedProduct, PackedReduction, PackedRow, decode
from .base import Registers
from .sums import Weight, combine, lane_sum, quantile_of


class TorchBackend:
    name = "torch"
    capturable = False  # its table and indices are read on the host
    counts_writes = True

    def missing(self) -> str | None:
        return None

    def supports(
        self,
        state: torch.dtype,
        network: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
    ) -> str | None:
        return None

    def bind(
        self,
        registers: Registers,
        table: Tensor,
        layout: Layout,
        stage_index: Tensor | None = None,
        row_index: Tensor | None = None,
        offset: int = 0,
    ) -> TorchStage:
        offset = noise.checked_offset("torch backend", offset)
        return TorchStage(registers, table, layout, (stage_index, row_index), offset)


class TorchStage:
    """A `BoundStage` in PyTorch."""

    capturable = False

    def __init__(
        self,
        registers: Registers,
        table: Tensor,
        layout: Layout,
        indices: tuple[Tensor | None, Tensor | None],
        offset: int,
    ) -> None:
        self.table = table
        self._registers, self._layout, self._offset = registers, layout, offset
        self._stage_index, self._row_index = indices

    def run(self, row: int, out: Tensor | None, xi: Tensor | None) -> None:
        for place in self._places(row, out, xi):
            place.update()

    def measure(self, row: int, out: Tensor | None, xi: Tensor | None) -> None:
        for place in self._places(row, out, xi):
            place.measure()

    def refresh(self, table: Tensor) -> None:
        if table is not self.table:
            self.table.copy_(table)

    def check(self) -> None:
        """Nothing is refused late."""

    def _places(self, row: int, out: Tensor | None, xi: Tensor | None) -> list[_Place]:
        """The samples that share a row, each with it."""
        x, branches = self._registers.x, self._layout.branches
        wanted = torch.Size((branches * x.shape[0], *x.shape[1:]))
        if out is not None:
            legal = out.shape == wanted and out.dtype.is_floating_point
            if not legal or out.device != x.device:
                raise ValueError(
                    f"torch backend: the network output is floating, {tuple(wanted)} on "
                    f"{x.device}; got {out.dtype}, {tuple(out.shape)} on {out.device}."
                )
            out = out.reshape(branches, *x.shape)
        if self._row_index is not None:
            row += int(self._row_index)
        rows = [(row, slice(None))]
        if self._stage_index is not None:
            places = enumerate(self._stage_index.tolist())
            rows = [(row + own, slice(b, b + 1)) for b, own in places]
        # all rows are read before anything is written
        return [
            _Place(self._registers, self._row(own), samples, out, xi, self._offset)
            for own, samples in rows
        ]

    def _row(self, row: int) -> PackedRow:
        return _decoded(self.table[row].numpy().tobytes(), self._layout)


@functools.lru_cache(maxsize=1024)
def _decoded(packed: bytes, layout: Layout) -> PackedRow:
    return decode(np.frombuffer(packed)[None], layout)[0]


def threshold(h: Tensor, quantile: float, floor: float, ceiling: float = math.inf) -> Tensor:
    """Dynamic thresholding of x0 predictions: h clipped to [-s, s] and divided by s, per sample.

        s = min(max(quantile of the sample's |h|, floor), ceiling)

    Where the quantile is NaN, s is the floor; a NaN in h stays.

    Args:
        h: [B, ...], floating. Without elements it is returned as it is.
        quantile, floor, ceiling: As in `fastdiff.Stage`.
    """
    if h.numel() == 0:
        return h
    s = quantile_of(h, quantile)
    s = torch.where(s > floor, s, floor).clamp(max=ceiling)
    s = s.to(h.dtype).reshape(-1, *[1] * (h.ndim - 1))
    return h.clamp(-s, s) / s


class _Place:
    """Some samples, and the row that they run; the formulas are those of `fastdiff.plans`."""

    def __init__(
        self,
        registers: Registers,
        row: PackedRow,
        samples: slice,
        out: Tensor | None,
        xi: Tensor | None,
        offset: int,
    ) -> None:
        self.registers, self.row, self.samples, self.offset = registers, row, samples, offset
        self.x = registers.x[samples]
        self.e = registers.e[samples] if registers.e is not None else self.x
        self.point = self.e if row.flags & AT_E else self.x
        self.out = None if out is None else out[:, samples]
        self.given = None if xi is None else xi[samples]

    # -- operands ----------------------------------------------------------------------------------

    def slot(self, number: int) -> Tensor:
        history = self.registers.history
        if history is None:
            raise TypeError("torch backend: this row needs Registers.history; got None.")
        return history[number][self.samples]

    def entry(self, number: int) -> Tensor:
        bank = self.registers.bank
        if bank is None:
            raise TypeError("torch backend: this row needs Registers.bank; got None.")
        return bank[number] if bank.shape[1] == 1 else bank[number][self.samples]

    def output(self, branch: int) -> Tensor:
        if self.out is None:
            raise TypeError("torch backend: this row needs the network's output; got None.")
        return self.out[branch].to(self.x.dtype)

    @functools.cached_property
    def xi(self) -> Tensor:
        """The noise, given or drawn."""
        if self.given is not None:
            return self.given
        seeds, row = self.registers.seeds, self.row
        if seeds is None or not row.draws:
            raise TypeError(
                "torch backend: this row needs noise, drawn from Registers.seeds or given; got "
                "neither."
            )
        own = seeds[self.samples]

        def draw(stream: int) -> Tensor:
            x = self.x
            return noise.normal(
                x.shape, own, stream, dtype=x.dtype, device=x.device, offset=self.offset
            )

        return combine(self.x, [(weight, draw(stream)) for stream, weight in row.draws])

    def scaled(self, weight: float, column: int) -> Weight:
        """A coefficient times the column of S that scales it."""
        if column < 0 or weight == 0.0:
            return weight
        scalars = self.registers.scalars
        if scalars is None:
            raise TypeError("torch backend: this row needs Registers.scalars; got None.")
        own = weight * scalars[self.samples, column]
        return own.to(self.x.dtype).reshape(-1, *[1] * (self.x.ndim - 1))

    def y(self, scaled: bool) -> Tensor:
        """h before its limit; without the scalars where `scaled` is False."""
        row = self.row
        columns = row.scalar_k or (-1,) * len(row.k)
        weights = [
            (self.scaled(k, column if scaled else -1), g)
            for g, (k, column) in enumerate(zip(row.k, columns, strict=True))
            if k != 0.0
        ]
        y = combine(self.x, [(weight, self.output(g)) for weight, g in weights])
        y = y + row.p * self.point if row.p != 0.0 else y
        for product in row.products:
            if product.into == "y" and product.weight != 0.0:
                y = y + (product.weight * self.entry(product.entry)) * self.point
        return y

    # -- the update --------------------------------------------------------------------------------

    def limited(self, y: Tensor) -> Tensor:
        row, h = self.row, y
        if row.flags & CLIP:
            h = h.clamp(row.lo, row.hi)
        if row.flags & THRESHOLD:
            h = threshold(h, row.quantile, row.floor, row.ceiling)
        if (row.u, row.v) != (0.0, 1.0):
            h = combine(self.x, [(row.v, h), (row.u, self.point)])
        return h

    def multiplied(self, into: str, total: Tensor, h: Tensor, fresh: Tensor | None) -> Tensor:
        """A sum with its products added; `fresh` is the new x where that is finished."""
        for product in self.row.products:
            if product.into == into and product.weight != 0.0:
                factor = product.weight * self.entry(product.entry)
                total = total + factor * self._operand(product, total, h, fresh)
        return total

    def _operand(
        self, product: PackedProduct, total: Tensor, h: Tensor, fresh: Tensor | None
    ) -> Tensor:
        if product.of == "new":
            return total if fresh is None else fresh
        return h if product.of == "h" else self._stored(product.of, product.at)

    def _stored(self, of: str, at: int) -> Tensor:
        """What is there before the update."""
        if of == "slot":
            return self.slot(at)
        if of == "bank":
            return self.entry(at)
        if of == "xi":
            return self.xi
        return {"x": self.x, "e": self.e, "point": self.point}[of]

    def update(self) -> None:
        row, registers = self.row, self.registers
        flags = row.flags
        h = y = self.x  # where they do not exist their weights are 0
        if flags & EVALUATE:
            y = self.y(scaled=True)
            h = self.limited(y)
        elif self._weighs_h():
            raise ValueError(
                "torch backend: a row without an evaluation neither weighs nor pushes h; got one "
                "that does."
            )
        if flags & WRITES_E and registers.e is None:
            raise TypeError("torch backend: a row that writes e needs Registers.e; got None.")
        x_next, e_next = self.x, self.e
        if flags & WRITES_X:
            head = (row.a_x, row.a_e, self.scaled(row.b_0, row.scalar_b), row.b_raw)
            past = [(b, slot) for slot, b, _ in row.terms]
            extras = [(r, entry) for entry, r, _ in row.extras]
            x_next = self._sum(head, (h, y), past, (row.c, row.scalar_c), extras)
            x_next = self.multiplied("x", x_next, h, None)
        if flags & WRITES_E:
            head = (row.d_x, row.d_e, self.scaled(row.g_0, row.scalar_g), row.g_raw)
            past = [(g, slot) for slot, _, g in row.terms]
            extras = [(s, entry) for entry, _, s in row.extras]
            e_next = self._sum(head, (h, y), past, (row.c_e, row.scalar_ce), extras)
            e_next = e_next + row.d_new * x_next if row.d_new != 0.0 else e_next
            e_next = self.multiplied("e", e_next, h, x_next)
        if row.push >= 0:
            self.slot(row.push).copy_(h)
        if row.push_x >= 0:
            self.slot(row.push_x).copy_(self.x)
        if flags & WRITES_E:
            self.e.copy_(e_next)
        if flags & WRITES_X:
            self.x.copy_(x_next)
        if registers.m is not None and flags & WRITES_M:
            m = torch.zeros_like(self.x)
            if row.c_in_next != 0.0:
                m = row.c_in_next * (self.e if flags & WRITES_E else self.x)
            whole = registers.x
            copies = registers.m.shape[0] // max(whole.shape[0], 1)
            registers.m.reshape(copies, *whole.shape)[:, self.samples] = m.to(registers.m.dtype)

    def _weighs_h(self) -> bool:
        row = self.row
        in_x = bool(row.flags & WRITES_X) and (row.b_0, row.b_raw) != (0.0, 0.0)
        in_e = bool(row.flags & WRITES_E) and (row.g_0, row.g_raw) != (0.0, 0.0)
        return in_x or in_e or row.push >= 0

    def _sum(
        self,
        head: tuple[float, float, Weight, float],
        of_y: tuple[Tensor, Tensor],
        past: list[tuple[float, int]],
        noise_weight: tuple[float, int],
        extras: list[tuple[float, int]],
    ) -> Tensor:
        """x' or e' before its products."""
        terms: list[tuple[Weight, Tensor]] = list(zip(head, (self.x, self.e, *of_y), strict=True))
        terms += [(weight, self.slot(slot)) for weight, slot in past if weight != 0.0]
        if noise_weight[0] != 0.0:
            terms.append((self.scaled(*noise_weight), self.xi))
        terms += [(weight, self.entry(entry)) for weight, entry in extras if weight != 0.0]
        return combine(self.x, terms)

    # -- measures ----------------------------------------------------------------------------------

    def measure(self) -> None:
        scalars = self.registers.scalars
        if self.row.measures and scalars is None:
            raise TypeError("torch backend: measures need Registers.scalars; got None.")
        if self.x.numel() == 0:
            return
        for measure in self.row.measures:
            assert scalars is not None
            scalars[self.samples, measure.into] = self._measured(measure).to(scalars.dtype)

    def _measured(self, measure: PackedMeasure) -> Tensor:
        ratio = self._reduced(measure.num)
        if measure.den is not None:
            below = self._reduced(measure.den)
            ratio = torch.where(below == 0.0, 0.0, ratio / below)
        return measure.offset + measure.weight * ratio**measure.power

    def _reduced(self, reduction: PackedReduction) -> Tensor:
        a = self._measurable(*reduction.a)
        if reduction.kind == "quantile":
            return quantile_of(a, reduction.rank)
        a = a.double().reshape(len(a), -1)
        if reduction.kind == "sum":
            return lane_sum(a)
        if reduction.kind == "std":
            n = a.shape[1]
            deviation = a - (lane_sum(a) / n)[:, None]
            return (lane_sum(deviation * deviation) / (n - 1)).sqrt()
        b = a
        if reduction.kind == "dot" and reduction.b is not None:
            b = self._measurable(*reduction.b).double().reshape(len(a), -1)
        total = lane_sum(a * b)
        return total.sqrt() if reduction.kind == "norm" else total

    def _measurable(self, of: str, at: int) -> Tensor:
        if of == "out":
            found = self.output(at)
        else:
            found = self.y(scaled=False) if of == "y" else self._stored(of, at)
        return found.expand_as(self.x)
