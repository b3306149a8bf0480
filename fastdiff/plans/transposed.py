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

What else a stage may hold goes into those sums:

- Where x' is read by the same stage (d_new, products of "new"), x_bar_{s+1} above is the cotangent
  of the sum before those readers: the row before adds d_new e_bar_{s+1}, and then w R x_bar by a
  product of "new" of its own.
- The network's cotangent is that of y, y_bar_s = limit'(v h_bar_s) + b_raw x_bar_{s+1}
  + g_raw e_bar_{s+1}, where limit' is the transposed derivative of the limit. The e of the backward
  run is y_bar, and u h_bar_s is added to v_s as the sum that it is. Where the stage limits y, the
  row leaves v h_bar in e, and `Transposed.raw` says what is added after limit'.
- A product with an entry of the bank is the product of the same entry with a cotangent. A sum that
  would multiply two entries is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cotangents import Atom, Cotangents, Owed, Sum, add, check_terms
from .layout import (
    AT_E,
    EVALUATE,
    MAX_PRODUCTS,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    PackedProduct,
    PackedRow,
    encode,
    layout_of,
)
from .pack import at
from .stage import Stage, evaluated_at_e

_MOST_TERMS = 64  # of a table row, csrc/stage.h

# A register at the time of a stage's VJP: a slot of the history, or None for x.
Slot = int | None


@dataclass(frozen=True)
class Transposed:
    """The backward table of a plan; see the module.

    Attributes:
        stages: The stages of the plan.
        solver: The plan's name for people.
        rows: S + 1 rows. Row 0 makes h_bar of the last stage from the cotangent of the result; row
            i belongs to stage S - i and is run after that stage's VJP.
        layout: The columns of their table for one branch; `pack` makes tables for more.
        slots: History registers that the table needs.
        extras: For every stage, what it owes to entries of the bank: (i, weight, slot, factor) adds
            weight times slot (None stands for x) times factor to the cotangent of entry i. The
            factor is None, ("bank", k) for another entry or ("xi", 0) for the stage's noise. The
            registers are those that the row of the stage finds.
        raw: For every stage that limits y, what is added to the cotangent of y after the limit:
            (weight, slot, entry) adds weight times slot, and times that entry of the bank unless
            it is None. Other stages have nothing here: their rows add it.
        unowed: Entries of the bank whose cotangent is not in the table: they multiply x, e, h or an
            earlier output, and their cotangent is that product with the states of the run.
    """

    stages: tuple[Stage, ...]
    solver: str
    rows: tuple[PackedRow, ...]
    layout: Layout
    slots: int
    extras: tuple[tuple[tuple[int, float, Slot, tuple[str, int] | None], ...], ...]
    raw: tuple[tuple[tuple[float, Slot, int | None], ...], ...]
    unowed: frozenset[int]

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
        plain = plain and not (stage.products or stage.scalars or stage.d_new)
        plain = plain and (stage.u, stage.v, stage.b_raw, stage.g_raw) == (0.0, 1.0, 0.0, 0.0)
        if not (plain and undone and (moves_x if at_e else moves_e)):
            return False
    return any(stage.writes_e for stage in stages)


def _alternating(stages: tuple[Stage, ...], solver: str) -> Transposed:
    """The backward table of a plan that alternates: both cotangents are registers.

    h_bar is b_0 x_bar or g_0 e_bar, so that no register holds it. A factor of e_bar alone waits
    for the next row that writes e.
    """
    count, at_e = len(stages), evaluated_at_e(stages)
    end = stages[-1].q * at(stages[-1].b, 0)
    rows = [PackedRow(flags=WRITES_M, c_in_next=end)]
    factor = 0.0  # what the e register is to be multiplied with: nothing is owed to e at the end
    for i in reversed(range(count)):
        stage, before = stages[i], stages[i - 1] if i > 0 else None
        row = PackedRow(k=(stage.c_in,))
        if at_e[i]:  # it moved x
            row.flags = EVALUATE + WRITES_X + WRITES_E
            row.p, row.a_x = stage.p * at(stage.b, 0), stage.a_x
            row.d_x, row.d_e, row.g_0 = stage.a_e, factor, 1.0
            factor = 1.0
            row.c_in_next = before.q * at(before.g, 0) if before is not None else 0.0
        else:  # it moved e
            row.flags = EVALUATE + AT_E + WRITES_X
            row.p, row.a_x, row.b_0 = factor * stage.p * at(stage.g, 0), 1.0, 1.0
            row.a_e = factor * stage.d_x
            factor *= stage.d_e
            row.c_in_next = before.q * at(before.b, 0) if before is not None else 0.0
        row.flags += WRITES_M * (before is not None)
        rows.append(row)
    none: tuple[tuple[()], ...] = ((),) * count
    return Transposed(stages, solver, tuple(rows), layout_of(rows), 0, none, none, frozenset())


def transpose(stages: Sequence[Stage], solver: str = "custom") -> Transposed:
    """The backward table of a plan's stages; `solver` names them in errors.

    Raises:
        NotImplementedError: A row would read more than 64 earlier cotangents: e is carried on
            through too many stages (d_e != 0) without being made anew from x. Or a row would
            multiply two entries of the bank, or more than eight; or a scalar depends on the state.
    """
    stages = tuple(stages)
    check_terms(stages, solver)
    if alternates(stages):
        return _alternating(stages, solver)
    sums = Cotangents(stages, solver)
    order = list(reversed(range(len(stages))))
    needs = {s: _Reads(sums, s) for s in order}
    last: dict[Atom, int] = {}
    for s in order:
        last.update({atom: s for atom in needs[s].atoms if atom[1] > s})
    free: list[int] = []
    slots = 0
    slot_of: dict[Atom, int] = {}
    rows = [_row_of_result(sums)]
    extras, raw = [], []
    for s in order:
        past = [a for a in needs[s].row if a[1] > s]
        if len(past) > _MOST_TERMS:
            raise NotImplementedError(
                f"transpose: a backward row reads at most {_MOST_TERMS} earlier cotangents; stage "
                f"{s} of {solver} would read {len(past)}. Make e anew from x (d_e = 0) now "
                'and then, or use gradient="backprop".'
            )
        read = {atom: slot_of[atom] for atom in past}
        extras.append(
            tuple((o.entry, o.weight, slot_of.get(o.atom), o.factor) for o in needs[s].owed)
        )
        raw.append(
            tuple((w, slot_of.get(atom), entry) for (atom, entry), w in needs[s].raw.items())
        )
        free += [slot_of[a] for a in reversed(list(slot_of)) if last[a] == s]
        pushed: dict[str, int] = {}
        for kind in ("x", "v"):
            if (kind, s) in last:
                if not free:
                    free.append(slots)
                    slots += 1
                pushed[kind] = slot_of[kind, s] = free.pop()
        slot_of = {a: slot for a, slot in slot_of.items() if last[a] != s}
        rows.append(_row(sums, s, needs[s], read, pushed, solver))
    return Transposed(
        stages,
        solver,
        tuple(rows),
        layout_of(rows),
        slots,
        tuple(reversed(extras)),
        tuple(reversed(raw)),
        sums.unowed,
    )


class _Reads:
    """The cotangents that the row of stage s reads, and those that are read before it runs.

    Attributes:
        x: Sum for x', the cotangent that the stage before finds.
        e: Sum for e', the cotangent of the y before; None where there is none.
        raw, owed: Parts of `Transposed` that are read before the row runs.
    """

    def __init__(self, sums: Cotangents, s: int) -> None:
        self.x = {key: w for key, w in sums.x[s].items() if w != 0.0}
        self.e: Sum | None = None
        if s > 0 and s - 1 in sums.y:
            self.e = {key: w for key, w in self._known(sums, s).items() if w != 0.0}
        self.raw = {key: w for key, w in sums.raw.get(s, {}).items() if w != 0.0}
        self.owed: list[Owed] = sums.owed(s)

    def _known(self, sums: Cotangents, s: int) -> Sum:
        """The cotangent of the y before; a plain sum for x' is written out in it."""
        inside = s - 1 not in sums.new and all(entry is None for _, entry in self.x)
        total: Sum = {}
        for (atom, entry), weight in sums.y[s - 1].items():
            plain = atom == ("x", s - 1) and entry is None and inside
            add(total, sums.x[s] if plain else {(atom, entry): 1.0}, weight)
        return total

    @property
    def row(self) -> dict[Atom, None]:
        """Atoms that the row reads, in order, without the x' that it makes."""
        return dict.fromkeys(atom for atom, _ in (*self.x, *(self.e or {})))

    @property
    def atoms(self) -> dict[Atom, None]:
        """All atoms that are read until the row has run."""
        found = [*self.row, *(atom for atom, _ in self.raw), *(owed.atom for owed in self.owed)]
        return dict.fromkeys(found)


def _row_of_result(sums: Cotangents) -> PackedRow:
    """The row that makes the first cotangents out of that of the result."""
    end = len(sums.stages) - 1
    row = PackedRow()
    if end in sums.new:
        row.flags, row.a_x, row.products = WRITES_X, 1.0, (sums.new[end],)
    y = sums.y.get(end)
    if y is None:
        return row
    row.flags += WRITES_E + WRITES_M
    row.c_in_next = sums.stages[end].q
    weight = y.get((("x", end), None), 0.0)
    if end in sums.new:
        row.d_new = weight
    else:
        row.d_x = weight
    row.products += tuple(
        PackedProduct("e", w, entry, "new" if end in sums.new else "x")
        for (_, entry), w in y.items()
        if entry is not None
    )
    return row


def _row(
    sums: Cotangents,
    s: int,
    needs: _Reads,
    read: Mapping[Atom, int],
    pushed: Mapping[str, int],
    solver: str,
) -> PackedRow:
    """The row that is run after the VJP of stage s."""
    stage, x, e = sums.stages[s], needs.x, needs.e or {}
    row = PackedRow(
        flags=WRITES_X + (EVALUATE + AT_E) * stage.evaluate,
        push=pushed.get("v", -1),
        push_x=pushed.get("x", -1),
        a_x=x.get((("x", s), None), 0.0),
        b_0=x.get((("v", s), None), 0.0),
    )
    products = []
    if stage.evaluate:
        row.p, row.k = stage.p, (stage.c_in,)
        products += [
            PackedProduct("y", p.weight, p.entry, "point") for p in stage.products if p.into == "y"
        ]
    if needs.e is not None:
        row.flags += WRITES_E + WRITES_M
        row.d_x, row.g_0 = e.get((("x", s), None), 0.0), e.get((("v", s), None), 0.0)
        row.d_new = e.get((("x", s - 1), None), 0.0)
        row.c_in_next = sums.stages[s - 1].q
    row.terms = tuple(
        (slot, x.get((atom, None), 0.0), e.get((atom, None), 0.0))
        for atom, slot in read.items()
        if (atom, None) in x or (atom, None) in e
    )
    places = {("x", s): ("x", 0), ("v", s): ("h", 0), ("x", s - 1): ("new", 0)}
    for into, terms in (("x", x), ("e", e)):
        for (atom, entry), weight in terms.items():
            if entry is not None:
                of, slot = places[atom] if atom in places else ("slot", read[atom])
                products.append(PackedProduct(into, weight, entry, of, slot))
        if into == "x" and s - 1 in sums.new:
            products.append(sums.new[s - 1])
    if len(products) > MAX_PRODUCTS:
        raise NotImplementedError(
            f"transpose: a row has at most {MAX_PRODUCTS} products; the backward row of stage {s} "
            f'of {solver} would have {len(products)}. Use gradient="backprop".'
        )
    row.products = tuple(products)
    return row
