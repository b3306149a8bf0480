# SPDX-License-Identifier: Apache-2.0
"""Products with a bank of tensors, and measures of samples: what a stage holds beside weights.

The bank R is what a call gives as `extras`: tensors that can be broadcast to x. S holds C numbers
of each sample in the arithmetic type. Measures write its columns, and a stage's `scalars` read
them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from .checks import LARGEST_INDEX, finite, index, shown
from .layout import INTO, REDUCTIONS

Operand = tuple[str] | tuple[str, int]

MOST_SCALARS = 4096  # columns of S: it is allocated for every sample
MOST_BRANCHES = 1000  # of a guidance: a row has columns for each

# What a product may multiply, by the sum that it is added to.
FACTORS = {
    "y": ("point",),
    "x": ("x", "e", "h", "xi", "history", "bank", "new"),
    "e": ("x", "e", "h", "xi", "history", "bank", "new"),
}
# What a reduction may read; those that have an index.
INDEXED = ("out", "history", "bank")
OPERANDS = ("x", "e", "out", "y", "xi", "history", "bank")


@dataclass(frozen=True)
class Product:
    """weight * R[entry] * operand, element by element, added to one of a stage's sums.

    The weight is rounded to the arithmetic type and multiplied with R[entry] first; the result
    times the operand is added by one fused multiply-add.

    Args:
        into: The sum: "y", "x" (for x') or "e" (for e').
        weight: A number; a product of weight 0 is left out.
        entry: Index into the bank R.
        of: The operand. Into "y": "point", the point of the evaluation. Into "x" and "e": "x", "e",
            "h", "xi", "history", "bank" and "new". "new" into "e" is the finished x'; into "x" it
            is the sum so far, may stand once in a stage, and only products of "xi" and "bank" may
            follow it into "x".
        at: For "history", how many evaluations before the h was made, at least 1; for "bank", the
            entry; for other operands 0.

    Raises:
        ValueError: An operand does not exist for this sum, or a number is out of range.
        TypeError: A field has the wrong kind.
    """

    into: str
    weight: float
    entry: int
    of: str
    at: int = 0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        if self.into not in INTO:
            raise ValueError(
                f"Product: into is one of {', '.join(map(repr, INTO))}; got {shown(self.into)}."
            )
        allowed = FACTORS[self.into]
        if self.of not in allowed:
            raise ValueError(
                f"Product: a product into {self.into!r} is of {', '.join(map(repr, allowed))}; got "
                f"of = {shown(self.of)}."
            )
        put("weight", finite("Product", "weight", self.weight))
        put("entry", index("Product", "entry", self.entry))
        if self.of in ("history", "bank"):
            put("at", index("Product", "at", self.at, least=int(self.of == "history")))
        elif index("Product", "at", self.at) != 0:
            raise ValueError(
                f"Product: at belongs to products of 'history' and 'bank'; got at = {self.at} of "
                f"{self.of!r}. Leave it out."
            )


@dataclass(frozen=True)
class Reduction:
    """A number of each sample, over all its elements, in float64 and in a fixed order.

    Args:
        kind: "sum" of a; "dot" of a and b, or of a with itself; "norm", the root of the sum of
            squares of a; "std", unbiased, of a; "quantile" of abs(a) at `rank`.
        a, b: Operands: ("x",), ("e",), ("out", g) for the output of branch g, ("y",) for y before
            the limit and without the stage's scalars, ("xi",), ("history", j), ("bank", k). Only
            a "dot" has a b.
        rank: Rank of a "quantile", 0 < rank <= 1, interpolated linearly at position rank (n - 1).

    Raises:
        ValueError: The kind or an operand does not exist, or a number is out of range.
        TypeError: A field has the wrong kind.
    """

    kind: str
    a: Operand
    b: Operand | None = None
    rank: float = 0.5

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        if self.kind not in REDUCTIONS:
            raise ValueError(
                f"Reduction: kind is one of {', '.join(map(repr, REDUCTIONS))}; got "
                f"{shown(self.kind)}."
            )
        put("a", _operand("a", self.a))
        if self.b is not None:
            if self.kind != "dot":
                raise ValueError(
                    f"Reduction: only a dot product has a second operand; got b = {shown(self.b)} "
                    f"of kind {self.kind!r}. Leave it out."
                )
            put("b", _operand("b", self.b))
        put("rank", finite("Reduction", "rank", self.rank))
        if not 0.0 < self.rank <= 1.0:
            raise ValueError(f"Reduction: rank is in 0 < rank <= 1; got {self.rank}.")

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands that there are."""
        return (self.a,) if self.b is None else (self.a, self.b)


def _operand(name: str, given: Any) -> Operand:
    """An operand as a tuple of a name and, where it has one, an index."""
    rule = "operands are " + ", ".join(
        f"({kind!r}, index)" if kind in INDEXED else f"({kind!r},)" for kind in OPERANDS
    )
    if not isinstance(given, list | tuple) or not 1 <= len(given) <= 2:
        raise TypeError(f"Reduction: {rule}; got {name} = {shown(given)}.")
    kind = given[0]
    if not isinstance(kind, str) or kind not in OPERANDS or (kind in INDEXED) != (len(given) == 2):
        raise ValueError(f"Reduction: {rule}; got {name} = {shown(given)}.")
    if len(given) == 1:
        return (kind,)
    most = MOST_BRANCHES - 1 if kind == "out" else LARGEST_INDEX - 1
    return kind, index("Reduction", f"{name}[1]", given[1], int(kind == "history"), most)


@dataclass(frozen=True)
class Measure:
    """S[:, into] = offset + weight * (num / den) ** power, made before the stage's update.

    The ratio is num alone without a den, and 0 where den is 0. All is float64, rounded once.

    Args:
        into: Column of S.
        num, den: Reductions; den may be left out.
        power, weight, offset: Finite numbers. A negative ratio under a power that is no integer
            gives NaN.

    Raises:
        ValueError: A number is out of range.
        TypeError: A field has the wrong kind.
    """

    into: int
    num: Reduction
    den: Reduction | None = None
    power: float = 1.0
    weight: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("into", index("Measure", "into", self.into, most=MOST_SCALARS - 1))
        for name in ("num", "den"):
            value = getattr(self, name)
            if not isinstance(value, Reduction) and not (name == "den" and value is None):
                raise TypeError(f"Measure: {name} is a Reduction; got {shown(value)}.")
        for name in ("power", "weight", "offset"):
            put(name, finite("Measure", name, getattr(self, name)))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands of both reductions."""
        return self.num.operands + (() if self.den is None else self.den.operands)
