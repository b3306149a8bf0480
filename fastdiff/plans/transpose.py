# SPDX-License-Identifier: Apache-2.0
"""A plan transposed: the table of the backward pass, run by the same stages in reverse.

For cotangents x_bar', e_bar' of what a stage leaves, its h owes to later stages

    h_bar_s = sum_{u >= s} (b_{u,u-s} x_bar_{u+1} + g_{u,u-s} e_bar_{u+1})

(u - s counts evaluations), and through the network, point and update

    v_s     = p h_bar_s + c_in sum_g m_bar_g          m_bar_g: VJP with the cotangent q w_g h_bar_s
    x_bar_s = a_x x_bar_{s+1} + d_x e_bar_{s+1} + (v_s if the evaluation is at x)
    e_bar_s = a_e x_bar_{s+1} + d_e e_bar_{s+1} + (v_s if the evaluation is at e)

That is a stage again: its x is x_bar, its e is h_bar, its h is v, the network's output is m_bar,
and the input it makes for the next call is the cotangent q h_bar. The ring holds what later rows
still read: the x that came in (column push_x) and v (column push). e_bar is no register: it is the
sum of a few of those, worked out here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .layout import (
    AT_E,
    EVALUATE,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    PackedRow,
    encode,
    layout_of,
)
from .stage import Stage, evaluated_at_e

# What a sum may hold besides registers: ("x", s) is x_bar_{s+1}, ("v", s) is v_s.
Atom = tuple[str, int]
Sum = dict[Atom, float]

_MOST_TERMS = 64  # of a table row, csrc/stage.h


@dataclass(frozen=True)
class Transposed:
    """The backward table of a plan; see the module.

    Attributes:
        stages: Of the plan.
        solver: The plan's name for people.
        rows: S + 1 rows. Row 0 makes h_bar of the last stage from the cotangent of the result; row
            i belongs to stage S - i and is run after that stage's VJP.
        layout: Of their table, for one branch; `pack` makes more.
        slots: History registers that it needs.
        extras: For every stage the weights by which read-only registers are owed: (i, weight, slot)
            adds weight times slot (None: the x_bar that comes in) to the cotangent of register i.
    """

    stages: tuple[Stage, ...]
    solver: str
    rows: tuple[PackedRow, ...]
    layout: Layout
    slots: int
    extras: tuple[tuple[tuple[int, float, int | None], ...], ...]

    def pack(self, branches: int) -> NDArray[np.float64]:
        """The table for G branches, whose m_bar are added: [S + 1, Layout(terms, G).width]."""
        rows = [dataclasses.replace(row, k=row.k * branches) for row in self.rows]
        return encode(rows, dataclasses.replace(self.layout, branches=branches))

    def __str__(self) -> str:
        names = self.layout.columns
        lines = [f"{self.solver} transposed  {len(self.rows)} rows  {self.slots} slots"]
        for i, row in enumerate(self.pack(1)):
            shown = (
                f"{n}={v:.6g}" for n, v in zip(names, row, strict=True) if v not in (0.0, -1.0)
            )
            lines.append(f"{i:>3}  " + "  ".join(shown))
        return "\n".join(lines)


def _add(total: Sum, terms: Sum, weight: float) -> None:
    if weight != 0.0:
        for atom, value in terms.items():
            total[atom] = total.get(atom, 0.0) + weight * value


class _Sums:
    """The cotangents of a plan as sums of atoms."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        at_e = evaluated_at_e(stages)
        count = len(stages)
        self.x: list[Sum] = [{} for _ in stages]  # x_bar_s, over atoms of stages s and later
        self.h: dict[int, Sum] = {}  # h_bar_s of evaluating stages, over atoms of later ones
        self.e_next: list[Sum] = [{} for _ in stages]  # e_bar_{s+1}
        evaluations = [s for s, stage in enumerate(stages) if stage.evaluate]
        owed: dict[int, Sum] = {s: {} for s in evaluations}
        e_bar: Sum = {}
        for s in reversed(range(count)):
            stage = stages[s]
            x_next: Sum = {("x", s): 1.0}
            self.e_next[s] = e_bar
            place = sum(i <= s for i in evaluations) - 1  # of the last evaluation up to s
            for weights, terms in ((stage.b, x_next), (stage.g, e_bar)):
                for j, weight in enumerate(weights):
                    back = j if stage.evaluate else j - 1
                    if weight != 0.0:
                        _add(owed[evaluations[place - back]], terms, weight)
            if stage.evaluate:
                self.h[s] = owed[s]
            v: Sum = {("v", s): 1.0} if stage.evaluate else {}
            x_bar: Sum = {}
            _add(x_bar, x_next, stage.a_x)
            _add(x_bar, e_bar, stage.d_x)
            if not at_e[s]:
                _add(x_bar, v, 1.0)
            before: Sum = {}
            _add(before, x_next, stage.a_e)
            _add(before, e_bar, stage.d_e if stage.writes_e else 1.0)  # e keeps what it holds
            if at_e[s]:
                _add(before, v, 1.0)
            self.x[s], e_bar = x_bar, before


def alternates(stages: Sequence[Stage]) -> bool:
    """Whether every stage evaluates at one of x and e and updates the other from both and its h.

    Such a stage can be undone: what it evaluated at is still there, and its h with it.
    """
    for i, (stage, at_e) in enumerate(zip(stages, evaluated_at_e(stages), strict=True)):
        moves_x = stage.writes_x and not stage.writes_e and len(stage.b) <= 1
        moves_e = stage.writes_e and not stage.writes_x and len(stage.g) <= 1
        undone = stage.a_x != 0.0 if at_e else stage.d_e != 0.0 or i == 0
        plain = stage.evaluate and stage.clip is None and stage.threshold is None
        plain = plain and not (stage.c or stage.c_e or stage.r or stage.s)
        if not (plain and undone and (moves_x if at_e else moves_e)):
            return False
    return any(stage.writes_e for stage in stages)


def _alternating(stages: tuple[Stage, ...], solver: str) -> Transposed:
    """The backward table of a plan that alternates: both cotangents are registers.

    h_bar is b_0 x_bar or g_0 e_bar, so that no register holds it. A factor of e_bar alone waits
    for the next row that writes e.
    """
    count, at_e = len(stages), evaluated_at_e(stages)
    end = stages[-1].q * _first(stages[-1].b)
    rows = [PackedRow(flags=WRITES_M, c_in_next=end)]
    factor = 0.0  # what the e register is to be multiplied with: nothing is owed to e at the end
    for i in reversed(range(count)):
        stage, before = stages[i], stages[i - 1] if i > 0 else None
        row = PackedRow(k=(stage.c_in,))
        if at_e[i]:  # it moved x
            row.flags = EVALUATE + WRITES_X + WRITES_E
            row.p, row.a_x = stage.p * _first(stage.b), stage.a_x
            row.d_x, row.d_e, row.g_0 = stage.a_e, factor, 1.0
            factor = 1.0
            row.c_in_next = before.q * _first(before.g) if before is not None else 0.0
        else:  # it moved e
            row.flags = EVALUATE + AT_E + WRITES_X
            row.p, row.a_x, row.b_0 = factor * stage.p * _first(stage.g), 1.0, 1.0
            row.a_e = factor * stage.d_x
            factor *= stage.d_e
            row.c_in_next = before.q * _first(before.b) if before is not None else 0.0
        row.flags += WRITES_M * (before is not None)
        rows.append(row)
    return Transposed(stages, solver, tuple(rows), layout_of(rows), 0, ((),) * count)


def _first(weights: tuple[float, ...]) -> float:
    return weights[0] if weights else 0.0


def transpose(stages: Sequence[Stage], solver: str = "custom") -> Transposed:
    """The backward table of a plan's stages; `solver` names them in errors.

    Raises:
        NotImplementedError: A row would read more than 64 earlier cotangents: e is carried on
            through too many stages (d_e != 0) without being made anew from x.
    """
    stages, count = tuple(stages), len(stages)
    _check(stages, solver)
    if alternates(stages):
        return _alternating(stages, solver)
    sums = _Sums(stages)

    def known_at(s: int, terms: Sum) -> Sum:
        """A sum over atoms that exist at launch s: x_bar_s itself is not one yet."""
        total: Sum = {}
        for atom, weight in terms.items():
            _add(total, sums.x[s] if atom == ("x", s - 1) else {atom: 1.0}, weight)
        return total

    # what each launch reads: of stage s, in the order of execution
    x_rows: dict[int, Sum] = {s: sums.x[s] for s in range(count)}
    h_rows: dict[int, Sum] = {
        s: known_at(s, sums.h[s - 1]) for s in range(1, count) if s - 1 in sums.h
    }
    owed = {s: _owed_to_extras(stages[s], sums, s) for s in range(count)}
    order = list(reversed(range(count)))
    last: dict[Atom, int] = {}
    for s in order:
        # a row drops terms that cancelled
        x_rows[s] = {a: w for a, w in x_rows[s].items() if w != 0.0}
        if s in h_rows:
            h_rows[s] = {a: w for a, w in h_rows[s].items() if w != 0.0}
        used = [*x_rows[s], *h_rows.get(s, {}), *(atom for _, atom, _ in owed[s])]
        for atom in used:
            if atom[1] != s:  # of an earlier launch, that is a later stage
                last[atom] = s
    free: list[int] = []
    slots = 0
    slot_of: dict[Atom, int] = {}
    reads, pushes, extras = [], [], []
    for s in order:
        past = [a for a in dict.fromkeys((*x_rows[s], *h_rows.get(s, {}))) if a[1] != s]
        if len(past) > _MOST_TERMS:
            raise NotImplementedError(
                f"transpose: a backward row reads at most {_MOST_TERMS} earlier cotangents; stage "
                f"{s} of {solver} would read {len(past)}. Make e anew from x (d_e = 0) now "
                'and then, or use gradient="backprop".'
            )
        reads.append([(atom, slot_of[atom]) for atom in past])
        extras.append(tuple((i, weight, slot_of.get(atom)) for i, atom, weight in owed[s]))
        free += [slot_of[a] for a in reversed(list(slot_of)) if last[a] == s]
        pushed: dict[str, int] = {}
        for kind in ("x", "v"):
            if (kind, s) in last:
                if not free:
                    free.append(slots)
                    slots += 1
                pushed[kind] = slot_of[kind, s] = free.pop()
        slot_of = {a: slot for a, slot in slot_of.items() if last[a] != s}
        pushes.append(pushed)
    end = count - 1
    first = sums.h.get(end)
    rows = [PackedRow()]
    if first is not None:
        rows[0].flags, rows[0].d_x = WRITES_E + WRITES_M, first.get(("x", end), 0.0)
        rows[0].c_in_next = stages[end].q
    for s, read, pushed in zip(order, reads, pushes, strict=True):
        stage, x_row, h_row = stages[s], x_rows[s], h_rows.get(s)
        row = PackedRow(
            flags=WRITES_X + (EVALUATE + AT_E) * stage.evaluate,
            push=pushed.get("v", -1),
            push_x=pushed.get("x", -1),
            a_x=x_row.get(("x", s), 0.0),
            b_0=x_row.get(("v", s), 0.0),
        )
        if stage.evaluate:
            row.p, row.k = stage.p, (stage.c_in,)
        if h_row is not None:
            row.flags += WRITES_E + WRITES_M
            row.d_x, row.g_0 = h_row.get(("x", s), 0.0), h_row.get(("v", s), 0.0)
            row.c_in_next = stages[s - 1].q
        row.terms = tuple(
            (slot, x_row.get(atom, 0.0), (h_row or {}).get(atom, 0.0)) for atom, slot in read
        )
        rows.append(row)
    return Transposed(stages, solver, tuple(rows), layout_of(rows), slots, tuple(reversed(extras)))


def _check(stages: Sequence[Stage], solver: str) -> None:
    """Raises where a row has terms that have no transpose here."""
    for i, s in enumerate(stages):
        terms = (s.u, s.v, s.b_raw, s.g_raw, s.d_new) != (0.0, 1.0, 0.0, 0.0, 0.0)
        if terms or s.products or s.scalars:
            raise NotImplementedError(
                f"transpose: stage {i} of {solver} has u, v, b_raw, g_raw, d_new, products or "
                'scalars, which have no transposed row. Use gradient="backprop".'
            )


def _owed_to_extras(stage: Stage, sums: _Sums, s: int) -> list[tuple[int, Atom, float]]:
    """What stage s owes to the read-only registers: (register, atom, weight)."""
    owed = []
    for i in range(stage.entries):
        terms: Sum = {}
        _add(terms, {("x", s): 1.0}, stage.r[i] if i < len(stage.r) else 0.0)
        _add(terms, sums.e_next[s], stage.s[i] if i < len(stage.s) else 0.0)
        owed += [(i, atom, weight) for atom, weight in terms.items()]
    return owed
