# SPDX-License-Identifier: Apache-2.0
"""Stages as packed rows: flags, slots and guidance weights settled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .allocate import Allocation
from .layout import (
    AT_E,
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    PackedMeasure,
    PackedProduct,
    PackedReduction,
    PackedRow,
)
from .stage import Stage, evaluated_at_e
from .terms import Measure, Operand, Product, Reduction


def pack(stages: Sequence[Stage], slots: Allocation, weights: Sequence[float]) -> list[PackedRow]:
    """The stages as packed rows, with the output of branch g weighed by `weights[g]`."""
    rows = []
    for i, (stage, at_e) in enumerate(zip(stages, evaluated_at_e(stages), strict=True)):
        later = stages[i + 1] if i + 1 < len(stages) else None
        row = _row(stage, slots.reads[i], weights)
        row.flags = (
            EVALUATE * stage.evaluate
            + AT_E * at_e
            + WRITES_E * stage.writes_e
            + WRITES_X * stage.writes_x
            + CLIP * (stage.clip is not None)
            + THRESHOLD * (stage.threshold is not None)
        )
        row.push = slots.pushes[i]
        if later is not None and later.evaluate:
            row.flags += WRITES_M
            row.c_in_next = later.c_in
        rows.append(row)
    return rows


def _row(stage: Stage, slots: Mapping[int, int], weights: Sequence[float]) -> PackedRow:
    """A stage's columns, without those that its neighbours settle; `slots` says where H_j is."""
    scalars = dict(stage.scalars)

    def scalar(name: str, coefficient: float) -> int:
        return scalars.get(name, -1) if coefficient else -1

    b_0, g_0 = at(stage.b, 0), at(stage.g, 0)
    k = tuple(stage.q * w for w in weights)
    row = PackedRow(
        draws=stage.noise if stage.reads_noise else (),
        p=stage.p,
        u=stage.u,
        v=stage.v,
        a_x=stage.a_x,
        a_e=stage.a_e,
        b_0=b_0,
        b_raw=stage.b_raw,
        c=stage.c,
        d_x=stage.d_x if stage.writes_x else stage.d_x + stage.d_new,
        d_e=stage.d_e,
        d_new=stage.d_new if stage.writes_x else 0.0,
        g_0=g_0,
        g_raw=stage.g_raw,
        c_e=stage.c_e,
        scalar_b=scalar("b_0", b_0),
        scalar_g=scalar("g_0", g_0),
        scalar_c=scalar("c", stage.c),
        scalar_ce=scalar("c_e", stage.c_e),
        k=k,
        scalar_k=tuple(scalar(f"w_{g}", stage.q) for g in range(len(k))),
        terms=tuple(
            (slot, at(stage.b, j), at(stage.g, j))
            for j, slot in slots.items()
            if at(stage.b, j) or at(stage.g, j)
        ),
        extras=tuple(
            (i, at(stage.r, i), at(stage.s, i))
            for i in range(max(len(stage.r), len(stage.s)))
            if at(stage.r, i) or at(stage.s, i)
        ),
        products=tuple(_product(product, stage, slots) for product in stage.products),
        measures=tuple(_measure(measure, slots) for measure in stage.measures),
    )
    if stage.clip is not None:
        row.lo, row.hi = stage.clip
    if stage.threshold is not None:
        row.quantile, row.floor, *ceiling = stage.threshold
        row.ceiling = ceiling[0] if ceiling else math.inf
    return row


def at(values: tuple[float, ...], j: int) -> float:
    """values[j], and 0 beyond their end."""
    return values[j] if j < len(values) else 0.0


def _product(product: Product, stage: Stage, slots: Mapping[int, int]) -> PackedProduct:
    of, place = product.of, product.at
    if of == "history":
        of, place = "slot", slots[place]
    if (of, product.into) == ("new", "e") and not stage.writes_x:
        of = "x"  # x' is x
    return PackedProduct(product.into, product.weight, product.entry, of, place)


def _measure(measure: Measure, slots: Mapping[int, int]) -> PackedMeasure:
    return PackedMeasure(
        measure.into,
        _reduction(measure.num, slots),
        None if measure.den is None else _reduction(measure.den, slots),
        measure.power,
        measure.weight,
        measure.offset,
    )


def _reduction(reduction: Reduction, slots: Mapping[int, int]) -> PackedReduction:
    a, *b = (_operand(operand, slots) for operand in reduction.operands)
    return PackedReduction(reduction.kind, a, b[0] if b else None, reduction.rank)


def _operand(operand: Operand, slots: Mapping[int, int]) -> tuple[str, int]:
    if len(operand) == 1:
        return operand[0], 0
    kind, place = operand
    return ("slot", slots[place]) if kind == "history" else (kind, place)
