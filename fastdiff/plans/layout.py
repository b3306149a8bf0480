# SPDX-License-Identifier: Apache-2.0
"""Packed rows: the one place that knows the columns of a table.

A table is float64 [rows, layout.width]. Its rows are written from `PackedRow`s by `encode` and read
back by `decode`; everything else, kernels included, names columns by `Layout.column` or by the
groups below. Integers (slots, streams, flags, codes) stand in a table as exact floats; -1 says that
there is none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

# Bits of the `flags` column.
EVALUATE = 1  # the network is called, h exists
AT_E = 2  # the evaluation point is e, not x
WRITES_E = 4
WRITES_X = 8
CLIP = 16  # by lo, hi
THRESHOLD = 32  # by quantile, floor, ceiling
WRITES_M = 64  # the network's next input is written, as zeros where c_in_next is 0
ALL_FLAGS = 127

# What a product is added to.
INTO = ("y", "x", "e")
# What a product multiplies, or a reduction reads. "slot" stands for a history slot, "bank" for an
# entry of the bank, "new" for the x' of the same row, "out" for the output of one branch.
OF = ("x", "e", "h", "xi", "slot", "bank", "new", "point", "out", "y")
REDUCTIONS = ("sum", "dot", "norm", "std", "quantile")


@dataclass(frozen=True)
class PackedProduct:
    """weight * R[entry] * operand, added to one of the row's sums."""

    into: str
    weight: float
    entry: int
    of: str
    at: int = 0  # slot, or entry of the bank


@dataclass(frozen=True)
class PackedReduction:
    """A number of each sample; see `fastdiff.Reduction`. Operands are (kind, index) pairs."""

    kind: str
    a: tuple[str, int]
    b: tuple[str, int] | None = None
    rank: float = 0.5


@dataclass(frozen=True)
class PackedMeasure:
    """S[:, into] = offset + weight * (num / den) ** power."""

    into: int
    num: PackedReduction
    den: PackedReduction | None = None
    power: float = 1.0
    weight: float = 1.0
    offset: float = 0.0


@dataclass
class PackedRow:
    """One row with its columns by name, slots allotted and weights folded.

    Attributes:
        flags: Sum of the bits above.
        push, push_x: Slots that take h and the x that comes in; -1: none.
        draws: (stream, weight) of each draw, two at most.
        p, u, v: h = u * point + v * limit(p * point + sum_g k_g out_g).
        lo, hi: Bounds of a clip.
        quantile, floor, ceiling: Numbers of a threshold.
        a_x .. c_e: Weights of x' and e'; see `fastdiff.plans.stage`.
        c_in_next: The network is given c_in_next times the next point.
        scalar_b, scalar_g, scalar_c, scalar_ce: Columns of S that multiply b_0, g_0, c and c_e; -1:
            none.
        k: Weights q w_g of the branches.
        scalar_k: Columns of S that multiply them; empty: none.
        terms: (slot, b, g) of each history term.
        extras: (entry, r, s) of each entry of the bank that is added.
        products, measures: See the classes.
    """

    flags: int = 0
    push: int = -1
    push_x: int = -1
    draws: tuple[tuple[int, float], ...] = ()
    p: float = 0.0
    u: float = 0.0
    v: float = 1.0
    lo: float = 0.0
    hi: float = 0.0
    quantile: float = 0.0
    floor: float = 0.0
    ceiling: float = math.inf
    a_x: float = 0.0
    a_e: float = 0.0
    b_0: float = 0.0
    b_raw: float = 0.0
    c: float = 0.0
    d_x: float = 0.0
    d_e: float = 0.0
    d_new: float = 0.0
    g_0: float = 0.0
    g_raw: float = 0.0
    c_e: float = 0.0
    c_in_next: float = 0.0
    scalar_b: int = -1
    scalar_g: int = -1
    scalar_c: int = -1
    scalar_ce: int = -1
    k: tuple[float, ...] = (0.0,)
    scalar_k: tuple[int, ...] = ()
    terms: tuple[tuple[int, float, float], ...] = ()
    extras: tuple[tuple[int, float, float], ...] = ()
    products: tuple[PackedProduct, ...] = ()
    measures: tuple[PackedMeasure, ...] = ()


# The fixed head of a row. The columns named like a field of PackedRow hold that field.
HEAD = (
    *("flags", "push", "push_x", "draws", "stream_1", "stream_2", "n_terms", "n_extras"),
    *("n_products", "n_measures"),
    *("p", "u", "v", "lo", "hi", "quantile", "floor", "ceiling"),
    *("a_x", "a_e", "b_0", "b_raw", "c"),
    *("d_x", "d_e", "d_new", "g_0", "g_raw", "c_e"),
    *("xi_1", "xi_2", "c_in_next"),
    *("scalar_b", "scalar_g", "scalar_c", "scalar_ce"),
)
_COPIED = tuple(name for name in HEAD if name in {f.name for f in dataclasses.fields(PackedRow)})
_COPIED = tuple(name for name in _COPIED if name != "draws")
_INTEGERS = ("flags", "push", "push_x", "scalar_b", "scalar_g", "scalar_c", "scalar_ce")

# The columns of one entry of each group that follows the head, in the order of the groups.
TERM = ("slot", "past_b", "past_g")
BRANCH = ("k", "scalar_k")
EXTRA = ("entry", "r", "s")
PRODUCT = ("into", "of", "at", "bank", "weight")
_REDUCED = ("kind", "a", "a_at", "b", "b_at", "rank")
MEASURE = (
    *("measure_into", "power", "measure_weight", "offset"),
    *(f"num_{name}" for name in _REDUCED),
    *(f"den_{name}" for name in _REDUCED),
)
MAX_PRODUCTS = 8  # of a row


@dataclass(frozen=True)
class Layout:
    """How many entries of each group a row of a table has room for.

    Attributes:
        terms: History terms.
        branches: Network outputs G that h combines.
        extras: Entries of the bank that a row adds.
        products: Products with entries of the bank.
        measures: Measures that a row makes before it updates.
    """

    terms: int = 0
    branches: int = 1
    extras: int = 0
    products: int = 0
    measures: int = 0

    @property
    def term_offset(self) -> int:
        return len(HEAD)

    @property
    def branch_offset(self) -> int:
        return self.term_offset + len(TERM) * self.terms

    @property
    def extra_offset(self) -> int:
        return self.branch_offset + len(BRANCH) * self.branches

    @property
    def product_offset(self) -> int:
        return self.extra_offset + len(EXTRA) * self.extras

    @property
    def measure_offset(self) -> int:
        return self.product_offset + len(PRODUCT) * self.products

    @property
    def width(self) -> int:
        return self.measure_offset + len(MEASURE) * self.measures

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns in order; those of a group end in the number of the entry."""
        groups = (
            *((TERM, self.terms), (BRANCH, self.branches), (EXTRA, self.extras)),
            *((PRODUCT, self.products), (MEASURE, self.measures)),
        )
        own = [f"{name}_{i}" for names, count in groups for i in range(count) for name in names]
        return (*HEAD, *own)

    def column(self, name: str) -> int:
        """The place of a column."""
        return _places(self)[name]

    def holds(self, other: Layout) -> bool:
        """Whether rows of another layout fit into rows of this one."""
        return all(
            getattr(self, f.name) >= getattr(other, f.name) for f in dataclasses.fields(Layout)
        )

    def joined(self, other: Layout) -> Layout:
        """The least layout that holds rows of this one and of another."""
        names = [f.name for f in dataclasses.fields(Layout)]
        return Layout(*(max(getattr(self, name), getattr(other, name)) for name in names))


@functools.lru_cache(maxsize=256)
def _places(layout: Layout) -> dict[str, int]:
    return {name: i for i, name in enumerate(layout.columns)}


def layout_of(rows: Iterable[PackedRow]) -> Layout:
    """The least layout that holds these rows."""
    rows = list(rows)

    def most(name: str) -> int:
        return max((len(getattr(row, name)) for row in rows), default=0)

    return Layout(
        most("terms"), max(most("k"), 1), most("extras"), most("products"), most("measures")
    )


def encode(rows: Sequence[PackedRow], layout: Layout) -> Table:
    """The rows packed, float64 [len(rows), layout.width].

    Raises:
        ValueError: A row has more entries of a group than the layout has room for.
    """
    table = np.zeros((len(rows), layout.width))
    for packed, row in zip(table, rows, strict=True):
        _encode(packed, row, layout)
    return table


def _encode(packed: Table, row: PackedRow, layout: Layout) -> None:
    counts = {
        "terms": len(row.terms),
        "branches": len(row.k),
        "extras": len(row.extras),
        "products": len(row.products),
        "measures": len(row.measures),
    }
    for group, count in counts.items():
        if count > getattr(layout, group):
            raise ValueError(
                f"encode: a row has at most the layout's {getattr(layout, group)} {group}; got "
                f"{count}."
            )
    for name in _COPIED:
        packed[_PLACE[name]] = getattr(row, name)
    packed[_PLACE["draws"]] = len(row.draws)
    for d, (stream, weight) in enumerate(row.draws, start=1):
        packed[_PLACE[f"stream_{d}"]] = stream
        packed[_PLACE[f"xi_{d}"]] = weight
    for group in ("terms", "extras", "products", "measures"):
        packed[_PLACE[f"n_{group}"]] = counts[group]
    terms = packed[layout.term_offset : layout.branch_offset].reshape(-1, len(TERM))
    terms[:, 0] = -1
    branches = packed[layout.branch_offset : layout.extra_offset].reshape(-1, len(BRANCH))
    branches[:, 1] = -1
    extras = packed[layout.extra_offset : layout.product_offset].reshape(-1, len(EXTRA))
    products = packed[layout.product_offset : layout.measure_offset].reshape(-1, len(PRODUCT))
    measures = packed[layout.measure_offset :].reshape(-1, len(MEASURE))
    for place, term in zip(terms, row.terms, strict=False):
        place[:] = term
    scalars = row.scalar_k or (-1,) * len(row.k)
    for place, branch in zip(branches, zip(row.k, scalars, strict=True), strict=False):
        place[:] = branch
    for place, extra in zip(extras, row.extras, strict=False):
        place[:] = extra
    for place, p in zip(products, row.products, strict=False):
        place[:] = INTO.index(p.into), OF.index(p.of), p.at, p.entry, p.weight
    for place, m in zip(measures, row.measures, strict=False):
        place[:] = (m.into, m.power, m.weight, m.offset, *_reduced(m.num), *_reduced(m.den))


_PLACE = {name: i for i, name in enumerate(HEAD)}


def _reduced(reduction: PackedReduction | None) -> tuple[float, ...]:
    if reduction is None:
        return (-1.0, -1.0, 0.0, -1.0, 0.0, 0.0)
    a, b = reduction.a, reduction.b
    second = (-1.0, 0.0) if b is None else (float(OF.index(b[0])), float(b[1]))
    kind = float(REDUCTIONS.index(reduction.kind))
    return (kind, float(OF.index(a[0])), float(a[1]), *second, reduction.rank)


def decode(table: Table, layout: Layout) -> list[PackedRow]:
    """The rows that `encode` wrote."""
    return [_decode(row, layout) for row in np.asarray(table, dtype=np.float64)]


def _decode(packed: Table, layout: Layout) -> PackedRow:
    row = PackedRow(**{name: float(packed[_PLACE[name]]) for name in _COPIED})  # type: ignore[arg-type]
    for name in _INTEGERS:
        setattr(row, name, int(packed[_PLACE[name]]))
    counts = {
        name: int(packed[_PLACE[f"n_{name}"]])
        for name in ("terms", "extras", "products", "measures")
    }
    row.draws = tuple(
        (int(packed[_PLACE[f"stream_{d}"]]), float(packed[_PLACE[f"xi_{d}"]]))
        for d in range(1, int(packed[_PLACE["draws"]]) + 1)
    )
    terms = packed[layout.term_offset : layout.branch_offset].reshape(-1, len(TERM))
    branches = packed[layout.branch_offset : layout.extra_offset].reshape(-1, len(BRANCH))
    extras = packed[layout.extra_offset : layout.product_offset].reshape(-1, len(EXTRA))
    products = packed[layout.product_offset : layout.measure_offset].reshape(-1, len(PRODUCT))
    measures = packed[layout.measure_offset :].reshape(-1, len(MEASURE))
    row.terms = tuple((int(t[0]), float(t[1]), float(t[2])) for t in terms[: counts["terms"]])
    row.k = tuple(float(b[0]) for b in branches)
    row.scalar_k = tuple(int(b[1]) for b in branches)
    row.extras = tuple((int(e[0]), float(e[1]), float(e[2])) for e in extras[: counts["extras"]])
    row.products = tuple(
        PackedProduct(INTO[int(p[0])], float(p[4]), int(p[3]), OF[int(p[1])], int(p[2]))
        for p in products[: counts["products"]]
    )
    row.measures = tuple(_measure(m) for m in measures[: counts["measures"]])
    return row


def _measure(packed: Table) -> PackedMeasure:
    num = _reduction(packed[4:10])
    assert num is not None
    into, power, weight, offset = packed[:4]
    return PackedMeasure(
        int(into), num, _reduction(packed[10:16]), float(power), float(weight), float(offset)
    )


def _reduction(packed: Table) -> PackedReduction | None:
    if packed[0] < 0:
        return None
    b = None if packed[3] < 0 else (OF[int(packed[3])], int(packed[4]))
    a = (OF[int(packed[1])], int(packed[2]))
    return PackedReduction(REDUCTIONS[int(packed[0])], a, b, float(packed[5]))
