# SPDX-License-Identifier: Apache-2.0
"""The cotangents of a plan's registers as sums, before any of them is given a register.

See `fastdiff.plans.transposed` for the formulas.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from .layout import PackedProduct
from .stage import Stage, evaluated_at_e
from .terms import Product

# What a backward run keeps: ("x", s) is the cotangent of x' that stage s finds, ("v", s) is v_s.
Atom = tuple[str, int]
# Weights of atoms; with an entry of the bank, of their product with that entry.
Sum = dict[tuple[Atom, int | None], float]


class Owed(NamedTuple):
    """weight * atom * factor, a part of the cotangent of an entry of the bank."""

    entry: int
    weight: float
    atom: Atom
    factor: tuple[str, int] | None


def add(total: Sum, terms: Sum, weight: float) -> None:
    """total += weight * terms."""
    if weight != 0.0:
        for key, value in terms.items():
            total[key] = total.get(key, 0.0) + weight * value


def check_terms(stages: Sequence[Stage], solver: str) -> None:
    """Raises where a scalar's rule depends on the state, or scales what a cotangent passes."""
    constant: dict[int, bool] = {}
    for i, stage in enumerate(stages):
        for measure in stage.measures:
            constant[measure.into] = all(o[0] in ("xi", "bank") for o in measure.operands)
        for name, column in stage.scalars:
            if name in ("c", "c_e") and constant.get(column, False):
                continue  # it scales a noise, by a number that no cotangent reaches
            raise NotImplementedError(
                f"transpose: a coefficient that is scaled by measures of the state has no gradient "
                f"through their rule; stage {i} of {solver} scales {name} by column {column} of S. "
                'Use gradient="backprop", or a plan without scalars.'
            )


class Cotangents:
    """The cotangents of a plan as sums of atoms.

    Attributes:
        stages: The stages of the plan.
        x: For every stage, what its row makes for the stage before: the cotangent of that stage's
            x', without the product in `new`.
        y: For every stage that evaluates, what its row finds in e.
        raw: For every stage that limits y, what is added to the cotangent of y after the limit.
        new: For stages that multiply their own x', the product that is added to its cotangent last.
        unowed: Entries of the bank whose cotangent is no sum of atoms times constants.
    """

    def __init__(self, stages: tuple[Stage, ...], solver: str) -> None:
        self.stages, self._solver = stages, solver
        self.x: list[Sum] = [{} for _ in stages]
        self.y: dict[int, Sum] = {}
        self.raw: dict[int, Sum] = {}
        self.new = {
            s: PackedProduct("x", p.weight, p.entry, "new")
            for s, stage in enumerate(stages)
            for p in stage.products
            if (p.into, p.of) == ("x", "new")
        }
        self._e_next: list[Sum] = [{} for _ in stages]  # of e', for every stage
        at_e = evaluated_at_e(stages)
        evaluations = [s for s, stage in enumerate(stages) if stage.evaluate]
        h: dict[int, Sum] = {s: {} for s in evaluations}  # what is owed to each h
        e_bar: Sum = {}
        for s in reversed(range(len(stages))):
            stage = stages[s]
            self._e_next[s] = e_bar
            into = {"x": self._of_x(s), "e": e_bar}
            self._add_owed(s, stage, into, h, evaluations)
            point: Sum = {}
            if stage.evaluate:
                self._evaluated(s, stage, into, h[s])
                add(point, {(("v", s), None): 1.0}, 1.0)
                add(point, h[s], stage.u)
            x_bar: Sum = {}
            add(x_bar, into["x"], stage.a_x)
            add(x_bar, e_bar, stage.d_x)
            before: Sum = {}
            add(before, into["x"], stage.a_e)
            add(before, e_bar, stage.d_e if stage.writes_e else 1.0)  # e keeps what it holds
            for p in stage.products:
                if p.of in ("x", "e"):
                    add(x_bar if p.of == "x" else before, self._times(into[p.into], p, s), 1.0)
            add(before if at_e[s] else x_bar, point, 1.0)
            if s > 0:  # what the stage before reads of its own x'
                add(x_bar, before, stages[s - 1].d_new)
                for p in stages[s - 1].products:
                    if (p.into, p.of) == ("e", "new"):
                        add(x_bar, self._times(before, p, s - 1), 1.0)
            self.x[s], e_bar = x_bar, before
        unowed = {entry for s in range(len(stages)) for entry in self._unowed(s)}
        if any(stage.scalars for stage in stages):
            measured = [o for stage in stages for m in stage.measures for o in m.operands]
            unowed |= {o[1] for o in measured if len(o) == 2 and o[0] == "bank"}
        self.unowed = frozenset(unowed)

    @staticmethod
    def _of_x(s: int) -> Sum:
        return {(("x", s), None): 1.0}

    def _add_owed(
        self,
        s: int,
        stage: Stage,
        into: dict[str, Sum],
        h: dict[int, Sum],
        evaluations: Sequence[int],
    ) -> None:
        """Adds what the stage owes to its own h and to earlier ones."""
        done = bisect.bisect_left(evaluations, s)

        def owed(j: int) -> Sum:
            return h[s] if j == 0 else h[evaluations[done - j]]

        for name, weights in (("x", stage.b), ("e", stage.g)):
            for j, weight in enumerate(weights):
                if weight != 0.0:
                    add(owed(j), into[name], weight)
        for p in stage.products:
            if p.of in ("h", "history"):
                add(owed(p.at), self._times(into[p.into], p, s), 1.0)

    def _evaluated(self, s: int, stage: Stage, into: dict[str, Sum], h: Sum) -> None:
        """Notes the cotangent of y, or its parts before and after the limit."""
        y: Sum = {}
        add(y, h, stage.v)
        raw: Sum = {}
        add(raw, into["x"], stage.b_raw)
        add(raw, into["e"], stage.g_raw)
        if stage.limited:
            self.raw[s] = raw
        else:
            add(y, raw, 1.0)
        self.y[s] = y

    def _times(self, terms: Sum, product: Product, s: int) -> Sum:
        """A sum multiplied by an entry of the bank.

        Raises:
            NotImplementedError: The sum has products already.
        """
        if any(entry is not None for _, entry in terms):
            raise NotImplementedError(
                "transpose: a backward row multiplies a cotangent with one entry of the bank; the "
                f"product of {product.of!r} into {product.into!r} of stage {s} of {self._solver} "
                "would multiply an e that is carried on with two. Make e anew without products, or "
                'use gradient="backprop".'
            )
        return {
            (atom, product.entry): product.weight * weight for (atom, _), weight in terms.items()
        }

    def owed(self, s: int) -> list[Owed]:
        """What stage s owes to entries of the bank."""
        stage = self.stages[s]
        found: list[Owed] = []
        into = {"x": self._of_x(s), "e": self._e_next[s]}
        for i in range(max(len(stage.r), len(stage.s))):
            terms: Sum = {}
            add(terms, into["x"], stage.r[i] if i < len(stage.r) else 0.0)
            add(terms, into["e"], stage.s[i] if i < len(stage.s) else 0.0)
            found += [
                Owed(i, weight, atom, None if entry is None else ("bank", entry))
                for (atom, entry), weight in terms.items()
            ]
        for p, terms in self._constant(s):
            for (atom, _), weight in terms.items():
                factor = ("xi", 0) if p.of == "xi" else ("bank", p.at)
                found.append(Owed(p.entry, p.weight * weight, atom, factor))
                if p.of == "bank":
                    found.append(Owed(p.at, p.weight * weight, atom, ("bank", p.entry)))
        return [each for each in found if each.weight != 0.0]

    def _constant(self, s: int) -> list[tuple[Product, Sum]]:
        """Products of entries with noise or entries, with the cotangent that reaches them."""
        found = []
        into, new = {"x": self._of_x(s), "e": self._e_next[s]}, False
        for p in self.stages[s].products:
            new = new or (p.into, p.of) == ("x", "new")
            reached = not (p.into == "x" and new)  # the cotangent past "new" is not kept
            plain = all(entry is None for _, entry in into.get(p.into, {}))
            if p.of in ("xi", "bank") and reached and plain:
                found.append((p, into[p.into]))
        return found

    def _unowed(self, s: int) -> set[int]:
        """Entries of a stage whose cotangent is not a sum of atoms times constants."""
        constant = [p for p, _ in self._constant(s)]
        left = [p for p in self.stages[s].products if not any(p is q for q in constant)]
        return {p.entry for p in left} | {p.at for p in left if p.of == "bank"}
