# SPDX-License-Identifier: Apache-2.0
"""Packed rows interpreted in NumPy, one sample at a time.

What no row wrote holds NaN, so that reading it shows. Values may be complex: a clip is decided by
real parts, and a complex step through a row gives its exact derivative.
"""

import dataclasses

import numpy as np

from fastdiff.plans import AT_E, CLIP, EVALUATE, WRITES_E, WRITES_M, WRITES_X


@dataclasses.dataclass
class Registers:
    x: np.ndarray
    slots: np.ndarray
    bank: np.ndarray
    e: np.ndarray
    m: np.ndarray

    @classmethod
    def holding(cls, x, slots, bank):
        """Registers that nothing wrote hold NaN."""
        empty = np.full((slots + 2, *x.shape), np.nan, dtype=x.dtype)
        return cls(x.copy(), empty[2:], bank, empty[0], empty[1].copy())


def total(terms, like):
    """The sum of the terms whose weight is not 0; the others are not read."""
    out = np.zeros(like.shape)
    for weight, read in terms:
        if weight != 0.0:
            out = out + weight * read()
    return out


def run_row(row, registers, outs, xi):
    r = registers
    point = r.e if row.flags & AT_E else r.x
    now = {"x": lambda: r.x, "e": lambda: r.e, "point": lambda: point, "xi": lambda: xi}

    def product(p):
        if p.of == "slot":
            return r.slots[p.at]
        return r.bank[p.at] if p.of == "bank" else now[p.of]()

    def products(into):
        return [
            (p.weight, lambda p=p: r.bank[p.entry] * product(p))
            for p in row.products
            if p.into == into and p.of != "new"
        ]

    if row.flags & EVALUATE:
        y = total(
            [
                (row.p, lambda: point),
                *((k, lambda g=g: outs[g]) for g, k in enumerate(row.k)),
                *products("y"),
            ],
            r.x,
        )
        limited = np.where(inside(row, y), y, np.clip(y.real, row.lo, row.hi))
        h = limited if row.flags & CLIP else y
        if (row.u, row.v) != (0.0, 1.0):
            h = row.u * point + row.v * h
        now |= {"h": lambda: h, "y": lambda: y}
    else:
        assert row.b_0 == row.g_0 == row.b_raw == row.g_raw == 0.0
        now |= {"h": None, "y": None}
    x_new, e_new = r.x, r.e
    if row.flags & WRITES_X:
        x_new = total(
            [(row.a_x, now["x"]), (row.a_e, now["e"]), (row.b_0, now["h"]), (row.b_raw, now["y"])]
            + [(b, lambda slot=slot: r.slots[slot]) for slot, b, _ in row.terms]
            + [(row.c, now["xi"]), *((w, lambda i=i: r.bank[i]) for i, w, _ in row.extras)],
            r.x,
        )
        past = False
        for p in (p for p in row.products if p.into == "x"):
            assert not past or p.of in ("xi", "bank")
            past = past or p.of == "new"
            x_new = x_new + p.weight * r.bank[p.entry] * (x_new if p.of == "new" else product(p))
    if row.flags & WRITES_E:
        e_new = total(
            [(row.d_x, now["x"]), (row.d_e, now["e"]), (row.g_0, now["h"]), (row.g_raw, now["y"])]
            + [(g, lambda slot=slot: r.slots[slot]) for slot, _, g in row.terms]
            + [(row.c_e, now["xi"]), *((w, lambda i=i: r.bank[i]) for i, _, w in row.extras)]
            + [(row.d_new, lambda: x_new), *products("e")],
            r.x,
        )
        for p in row.products:
            if (p.into, p.of) == ("e", "new"):
                e_new = e_new + p.weight * r.bank[p.entry] * x_new
    x_in = r.x
    r.x, r.e = x_new, e_new
    if row.push >= 0:
        r.slots[row.push] = now["h"]()
    if row.push_x >= 0:
        r.slots[row.push_x] = x_in
    if row.flags & WRITES_M:
        nothing = row.c_in_next == 0.0
        r.m = (
            np.zeros(x_new.shape)
            if nothing
            else row.c_in_next * (e_new if row.flags & WRITES_E else x_new)
        )
    return now["y"]() if row.flags & EVALUATE else None


def inside(row, y):
    return (
        (row.lo < y.real) & (y.real < row.hi) if row.flags & CLIP else np.ones(y.shape, dtype=bool)
    )
