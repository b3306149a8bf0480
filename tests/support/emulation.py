# SPDX-License-Identifier: Apache-2.0
"""A stage in NumPy, bit for bit: the order of arithmetic as the documentation states it.

Every product-sum is one fused multiply-add of the C library, in the arithmetic type. The samples
are run one by one; what a row reads is recorded, so that a test can poison the rest.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass, field

import numpy as np
import torch

from fastdiff import noise
from fastdiff.backends import Registers
from fastdiff.plans import AT_E, CLIP, EVALUATE, THRESHOLD, WRITES_E, WRITES_M, WRITES_X
from fastdiff.plans.layout import PackedMeasure, PackedReduction, PackedRow

_LIBRARY = ctypes.CDLL(ctypes.util.find_library("m"))
_FMA = {}
for _name, _kind, _dtype in (
    ("fmaf", ctypes.c_float, np.float32),
    ("fma", ctypes.c_double, np.float64),
):
    _function = getattr(_LIBRARY, _name)
    _function.restype, _function.argtypes = _kind, [_kind] * 3
    _FMA[np.dtype(_dtype)] = np.vectorize(_function, otypes=[_dtype])

LANES = 1024


def fma(a, b, c, dtype):
    """a b + c, rounded once to the dtype."""
    if np.size(c) == 0:
        return np.asarray(c)
    return _FMA[np.dtype(dtype)](a, b, c)


def lane_sum(values: np.ndarray, times: np.ndarray) -> float:
    """sum values * times in float64: 1024 lanes in order, then halved pairwise."""
    lanes = np.zeros(LANES)
    for start in range(0, len(values), LANES):
        part = slice(start, start + LANES)
        count = len(values[part])
        lanes[:count] = fma(values[part], times[part], lanes[:count], np.float64)
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def quantile(values: np.ndarray, rank: float) -> float:
    """The quantile of the magnitudes, interpolated in float64; NaN stands last."""
    ordered = np.sort(np.abs(values))
    position = rank * (len(ordered) - 1)
    low = int(position)
    weight = position - low
    if weight == 0:
        return float(ordered[low])
    first, second = float(ordered[low]), float(ordered[low + 1])
    return first + weight * (second - first)


@dataclass
class Sample:
    """One sample while a row runs on it.

    Attributes:
        registers: Of the whole batch, read only.
        b: The sample.
        row: The row it runs.
        out: The network's outputs, [branches, B, n], or None.
        xi: Noise given, [B, n], or None.
        offset: The sample's first element takes the noise of this one.
        read: (register, index) of all that has been read.
    """

    registers: Registers
    b: int
    row: PackedRow
    out: torch.Tensor | None = None
    xi: torch.Tensor | None = None
    offset: int = 0
    read: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        double = self.registers.x.dtype == torch.float64
        self.dtype = np.dtype(np.float64 if double else np.float32)

    def number(self, value: float):
        return self.dtype.type(value)

    def _values(self, tensor: torch.Tensor) -> np.ndarray:
        wide = tensor.double() if self.dtype == np.float64 else tensor.float()
        return wide.reshape(-1).numpy().copy()

    def get(self, name: str, index: int = 0) -> np.ndarray:
        """A register of the sample in the arithmetic type."""
        self.read.add((name, index))
        r, b = self.registers, self.b
        if name == "bank":
            return self._values(r.bank[index, b if r.bank.shape[1] > 1 else 0])
        if name == "slot":
            return self._values(r.history[index, b])
        if name == "out":
            return self._values(self.out[index, b])
        return self._values(getattr(r, name)[b])

    def noise(self) -> np.ndarray:
        if self.xi is not None:
            return self._values(self.xi[self.b])
        seed = self.registers.seeds[self.b : self.b + 1].numpy()
        count = self.registers.x[0].numel() + self.offset
        total = np.zeros(count - self.offset, self.dtype)
        for stream, weight in self.row.draws:
            z = noise.reference(seed, count, stream)[0, self.offset :].astype(self.dtype)
            total = fma(self.number(weight), z, total, self.dtype)
        return total

    def point(self) -> np.ndarray:
        return self.get("e" if self.row.flags & AT_E else "x")

    def add(self, coefficient, value, total, column: int = -1):
        """fma(coefficient S, value, total), or the total where the coefficient is 0.

        Args:
            value: A function, called where the coefficient is not 0.
        """
        c = self.number(coefficient)
        if c == 0:
            return total
        if column >= 0:
            c = c * self.number(self.registers.scalars[self.b, column].item())
        return fma(c, value(), total, self.dtype)

    def products(self, into: str, total, operands):
        """The products into a sum; `operands` has functions by name, "new" of the sum so far."""
        for product in self.row.products:
            weight = self.number(product.weight)
            if product.into != into or weight == 0:
                continue
            factor = weight * self.get("bank", product.entry)
            if product.of in ("slot", "bank"):
                operand = self.get(product.of, product.at)
            elif product.of == "new":
                operand = operands["new"](total)
            else:
                operand = operands[product.of]()
            total = fma(factor, operand, total, self.dtype)
        return total

    def y(self, scaled: bool = True) -> np.ndarray:
        row = self.row
        total = np.zeros(self.registers.x[0].numel(), self.dtype)
        columns = row.scalar_k if scaled and row.scalar_k else (-1,) * len(row.k)
        for g, (k, column) in enumerate(zip(row.k, columns, strict=True)):
            total = self.add(k, lambda g=g: self.get("out", g), total, column)
        total = self.add(row.p, self.point, total)
        return self.products("y", total, {"point": self.point})

    def h(self, y: np.ndarray) -> np.ndarray:
        row, h = self.row, y
        if row.flags & THRESHOLD:
            s = quantile(y, row.quantile)
            s = s if s > row.floor else row.floor
            s = self.number(min(s, row.ceiling))
            h = np.where(h < -s, -s, np.where(h > s, s, h)) / s
        if row.flags & CLIP:
            lo, hi = self.number(row.lo), self.number(row.hi)
            h = np.where(h < lo, lo, np.where(h > hi, hi, h))
        if (row.u, row.v) != (0.0, 1.0):
            h = self.number(row.v) * h if row.v else np.zeros_like(h)
            h = self.add(row.u, self.point, h)
        return h.astype(self.dtype)

    def update(self) -> dict[str, np.ndarray]:
        """What the row writes, by register: "x", "e", ("slot", i) and "m"."""
        row, written = self.row, {}
        y = self.y() if row.flags & EVALUATE else None
        h = self.h(y) if y is not None else None
        sources = {"x": lambda: self.get("x"), "e": lambda: self.get("e"), "h": lambda: h}
        sources |= {"xi": self.noise, "point": self.point, "new": lambda total: total}
        x_new = None
        for into, names, c, of_term, of_extra in (
            ("x", ("a_x", "a_e", "b_0", "b_raw"), ("c", "scalar_c"), 1, 1),
            ("e", ("d_x", "d_e", "g_0", "g_raw"), ("c_e", "scalar_ce"), 2, 2),
        ):
            if not row.flags & {"x": WRITES_X, "e": WRITES_E}[into]:
                continue
            total = np.zeros(self.registers.x[0].numel(), self.dtype)
            scalar_h = {"b_0": row.scalar_b, "g_0": row.scalar_g}
            values = (sources["x"], sources["e"], sources["h"], lambda: y)
            for name, value in zip(names, values, strict=True):
                total = self.add(getattr(row, name), value, total, scalar_h.get(name, -1))
            for term in row.terms:
                total = self.add(term[of_term], lambda t=term: self.get("slot", t[0]), total)
            total = self.add(getattr(row, c[0]), self.noise, total, getattr(row, c[1]))
            for extra in row.extras:
                total = self.add(extra[of_extra], lambda t=extra: self.get("bank", t[0]), total)
            if into == "e":
                finished = sources["x"] if x_new is None else (lambda x_new=x_new: x_new)
                total = self.add(row.d_new, finished, total)
                sources["new"] = lambda _, finished=finished: finished()
            total = self.products(into, total, sources)
            if into == "x":
                x_new = total
            written[into] = total
        if row.push >= 0:
            written[("slot", row.push)] = h
        if row.push_x >= 0:
            written[("slot", row.push_x)] = self.get("x")
        if self.registers.m is not None and row.flags & WRITES_M:
            c_in = self.number(row.c_in_next)
            newest = written.get("e", written.get("x"))
            if c_in == 0:
                newest = np.zeros(self.registers.x[0].numel(), self.dtype)
            written["m"] = c_in * (self.get("x") if newest is None else newest)
        return written

    def operand(self, operand: tuple[str, int]) -> np.ndarray:
        of, at = operand
        if of == "y":
            return self.y(scaled=False)
        return self.noise() if of == "xi" else self.get(of, at)

    def reduced(self, reduction: PackedReduction) -> float:
        a = self.operand(reduction.a)
        if reduction.kind == "quantile":
            return quantile(a, reduction.rank)
        a = a.astype(np.float64)
        if reduction.kind == "sum":
            return lane_sum(a, np.ones_like(a))
        if reduction.kind == "std":
            a = a - lane_sum(a, np.ones_like(a)) / len(a)
            return float(np.sqrt(np.float64(lane_sum(a, a)) / (len(a) - 1)))
        b = a if reduction.b is None else self.operand(reduction.b).astype(np.float64)
        total = lane_sum(a, b)
        return float(np.sqrt(total)) if reduction.kind == "norm" else total

    def measured(self, measure: PackedMeasure) -> float:
        """What goes into S, float64."""
        ratio = np.float64(self.reduced(measure.num))
        if measure.den is not None:
            below = self.reduced(measure.den)
            ratio = np.float64(0.0 if below == 0 else ratio / below)
        power = {
            1.0: lambda: ratio,
            2.0: lambda: ratio * ratio,
            0.5: lambda: np.sqrt(ratio),
            -0.5: lambda: 1 / np.sqrt(ratio),
        }.get(measure.power, lambda: ratio**measure.power)()
        return float(fma(measure.weight, power, measure.offset, np.float64))
