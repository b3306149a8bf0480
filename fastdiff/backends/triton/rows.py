# SPDX-License-Identifier: Apache-2.0
"""What the rows of a table read and need; those that would leave the registers are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...plans import AT_E, CLIP, EVALUATE, THRESHOLD, WRITES_E, WRITES_X, Layout
from ...plans.layout import ALL_FLAGS, INTO, OF, REDUCTIONS
from ..base import Registers
from .launches import Needs

Bools = NDArray[np.bool_]
Column = NDArray[np.float64]

_CODE = {name: code for code, name in enumerate(OF)}
_SCALED = ("scalar_b", "scalar_g", "scalar_c", "scalar_ce")
# What a product may multiply, and what a reduction may read.
_FACTORS = tuple(OF.index(of) for of in ("x", "e", "h", "xi", "slot", "bank", "new", "point"))
_OPERANDS = tuple(OF.index(of) for of in ("x", "e", "out", "y", "xi", "slot", "bank"))


@dataclass(frozen=True)
class Reading:
    """One thing that rows may read besides weighing it: the operand of a product or a measure.

    Attributes:
        used: Which rows do.
        of, at: Names of the columns that hold its code, and its slot, entry or branch.
        measured: Whether it is a measure's.
    """

    used: Bools
    of: str
    at: str
    measured: bool


class Rows:
    """The columns of a table by name, and what its rows read. Their flags have been checked."""

    def __init__(self, table: Column, layout: Layout) -> None:
        self.table, self.layout = table, layout
        self.flags = self["flags"].astype(int)
        self.evaluates, self.at_e = self.has(EVALUATE), self.has(AT_E)
        self.writes_x, self.writes_e = self.has(WRITES_X), self.has(WRITES_E)

    def __getitem__(self, name: str) -> Column:
        return self.table[:, self.layout.column(name)]

    def has(self, flag: int) -> Bools:
        return (self.flags & flag) != 0

    def weigh(self, in_x: str, in_e: str) -> Bools:
        """Which rows weigh something in a sum that they form, by the columns of its weights."""
        return self.writes_x & (self[in_x] != 0) | self.writes_e & (self[in_e] != 0)

    def products(self) -> Iterator[tuple[int, Bools]]:
        """The place of each product, and which rows form it."""
        for j in range(self.layout.products):
            into = self[f"into_{j}"]
            formed = self.evaluates & (into == INTO.index("y"))
            formed |= self.writes_x & (into == INTO.index("x"))
            formed |= self.writes_e & (into == INTO.index("e"))
            yield j, formed & (j < self["n_products"]) & (self[f"weight_{j}"] != 0)

    def readings(self) -> Iterator[Reading]:
        """The operands of products and of measures."""
        for j, formed in self.products():
            yield Reading(formed, f"of_{j}", f"at_{j}", False)
        for j in range(self.layout.measures):
            made = j < self["n_measures"]
            for part in ("num", "den"):
                there = made & (self[f"{part}_kind_{j}"] >= 0)
                yield Reading(there, f"{part}_a_{j}", f"{part}_a_at_{j}", True)
                second = there & (self[f"{part}_b_{j}"] != -1)
                yield Reading(second, f"{part}_b_{j}", f"{part}_b_at_{j}", True)

    def read(self, of: str) -> Bools:
        """Which rows read an operand in a product or a measure."""
        found = np.zeros(len(self.table), dtype=bool)
        for reading in self.readings():
            found |= reading.used & (self[reading.of] == _CODE[of])
        return found

    def blends(self) -> Bools:
        return (self["u"] != 0) | (self["v"] != 1)

    def thresholds(self) -> Bools:
        return self.evaluates & self.has(THRESHOLD)

    def reads_noise(self) -> Bools:
        return self.weigh("c", "c_e") | self.read("xi")

    def scalars(self) -> list[str]:
        """Names of the columns that name a column of S."""
        return [*_SCALED, *(f"scalar_k_{g}" for g in range(self.layout.branches))]

    def needs(self) -> Needs:
        return Needs(
            draws=int(self["draws"].max(initial=0)),
            clips=bool(self.has(CLIP).any()),
            thresholds=bool(self.thresholds().any()),
            pushes_x=bool((self["push_x"] >= 0).any()),
            raw=bool(
                (self.blends() | self.weigh("b_raw", "g_raw")).any()
                or (self.writes_e & (self["d_new"] != 0)).any()
            ),
            products=bool((self["n_products"] > 0).any()),
            scalars=any(bool((self[name] >= 0).any()) for name in self.scalars()),
            measures=bool((self["n_measures"] > 0).any()),
        )


def check_rows(table: Column, layout: Layout, registers: Registers) -> Rows:
    """The rows, none of which would read or write what does not exist.

    Raises:
        ValueError: A row would; the first is named.
    """
    check = _Check(table, layout, registers)
    check.head()
    check.threshold()
    check.groups()
    check.sums()
    check.products()
    check.measures()
    return check.rows


class _Check:
    """Refuses the first row that breaks a rule."""

    def __init__(self, table: Column, layout: Layout, registers: Registers) -> None:
        self.registers, self.layout = registers, layout
        history, bank, scalars = registers.history, registers.bank, registers.scalars
        self.slots = 0 if history is None else history.shape[0]
        self.entries = 0 if bank is None else bank.shape[0]
        self.columns = 0 if scalars is None else scalars.shape[1]
        flags = table[:, layout.column("flags")]
        bad = ~((flags >= 0) & (flags <= ALL_FLAGS) & (flags == np.floor(flags)))
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(
                "triton backend: flags are a combination of the known bits; "
                f"row {row} has flags = {flags[row]:g}."
            )
        self.rows = Rows(table, layout)

    def refuse(self, bad: Bools, rule: str, *columns: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            got = ", ".join(f"{name} = {self.rows[name][row]:g}" for name in columns)
            raise ValueError(f"triton backend: {rule}; row {row} has {got}.")

    def outside(self, name: str, low: float, high: float) -> Bools:
        value = self.rows[name]
        return ~((value >= low) & (value <= high) & (value == np.floor(value)))

    def slot(self, name: str, used: Bools) -> None:
        rule = f"history has {self.slots} slots"
        self.refuse(used & self.outside(name, 0, self.slots - 1), rule, name)

    def entry(self, name: str, used: Bools) -> None:
        rule = f"the bank has {self.entries} entries"
        self.refuse(used & self.outside(name, 0, self.entries - 1), rule, name)

    def head(self) -> None:
        rows = self.rows
        for name in ("push", "push_x"):
            rule = f"history has {self.slots} slots"
            self.refuse(self.outside(name, -1, self.slots - 1), rule, name)
        both = (rows["push"] >= 0) & (rows["push"] == rows["push_x"])
        self.refuse(both, "each push has a slot of its own", "push", "push_x")
        self.refuse(self.outside("draws", 0, 2), "draws fit the layout, 0 to 2", "draws")
        for group in ("terms", "extras", "products", "measures"):
            most, name = getattr(self.layout, group), f"n_{group}"
            self.refuse(self.outside(name, 0, most), f"{name} fit the layout's {most}", name)
        for k in (1, 2):
            # 2^24: streams survive a table in float32
            bad = self.outside(f"stream_{k}", 0, 2**24) & (rows["draws"] >= k)
            self.refuse(bad, f"streams are integers in [0, {2**24}]", f"stream_{k}")
        for name in rows.scalars():
            rule = f"S has {self.columns} columns"
            self.refuse(self.outside(name, -1, self.columns - 1), rule, name)

    def threshold(self) -> None:
        rows = self.rows
        quantile, floor = rows["quantile"], rows["floor"]
        with np.errstate(over="ignore"):  # a floor is positive and finite in the arithmetic type
            double = self.registers.x.dtype == torch.float64
            rounded = floor if double else floor.astype(np.float32)
        legal = (quantile > 0) & (quantile <= 1) & (rounded > 0) & (rounded < np.inf)
        legal &= ~rows.has(CLIP)
        self.refuse(
            rows.thresholds() & ~legal,
            "a threshold is a quantile in (0, 1] and a positive floor, without a clip",
            *("flags", "quantile", "floor"),
        )
        self.refuse(
            rows.thresholds() & ~(rows["ceiling"] >= floor),
            "a threshold's ceiling is not below its floor",
            *("floor", "ceiling"),
        )

    def groups(self) -> None:
        rows = self.rows
        for k in range(self.layout.terms):
            read = rows.weigh(f"past_b_{k}", f"past_g_{k}") & (k < rows["n_terms"])
            self.slot(f"slot_{k}", read)
        for i in range(self.layout.extras):
            read = rows.weigh(f"r_{i}", f"s_{i}") & (i < rows["n_extras"])
            self.entry(f"entry_{i}", read)

    def sums(self) -> None:
        rows = self.rows
        into_y = np.zeros_like(rows.evaluates)
        for j, formed in rows.products():
            into_y |= formed & (rows[f"into_{j}"] == INTO.index("y"))
        reads_e = rows.weigh("a_e", "d_e") | rows.read("e")
        point = (rows["p"] != 0) | (rows["u"] != 0) | into_y
        reads_e |= rows.evaluates & rows.at_e & point
        reads_e |= rows.at_e & rows.read("point")
        if self.registers.e is None:
            self.refuse(
                reads_e | rows.writes_e,
                "a row that reads or writes e needs Registers.e",
                *("flags", "a_e", "d_e"),
            )
        weighs_h = rows.weigh("b_0", "g_0") | (rows["push"] >= 0)
        self.refuse(
            ~rows.evaluates & weighs_h,
            "without an evaluation there is no h to weigh or push",
            *("flags", "b_0", "g_0", "push"),
        )
        self.refuse(
            ~rows.evaluates & (rows.blends() | rows.weigh("b_raw", "g_raw")),
            "without an evaluation there is no y to weigh",
            *("flags", "u", "v", "b_raw", "g_raw"),
        )

    def products(self) -> None:
        rows = self.rows
        for j in range(self.layout.products):
            there = j < rows["n_products"]
            rule = f"a product goes into y, x or e (0 to {len(INTO) - 1})"
            self.refuse(there & self.outside(f"into_{j}", 0, len(INTO) - 1), rule, f"into_{j}")
            legal = np.isin(rows[f"of_{j}"], _FACTORS)
            into_y = rows[f"into_{j}"] == INTO.index("y")
            legal &= ~into_y | (rows[f"of_{j}"] == _CODE["point"])
            rule = "a product is of x, e, h, xi, slot, bank, new or point; into y, of point"
            self.refuse(there & ~legal, rule, f"into_{j}", f"of_{j}")
            self.refuse(
                there & ~rows.evaluates & (into_y | (rows[f"of_{j}"] == _CODE["h"])),
                "without an evaluation a product has no y and no h",
                *("flags", f"into_{j}", f"of_{j}"),
            )
        for j, formed in rows.products():
            self.entry(f"bank_{j}", formed)
        self.places(measured=False)

    def places(self, measured: bool) -> None:
        for reading in self.rows.readings():
            if reading.measured == measured:
                of = self.rows[reading.of]
                self.slot(reading.at, reading.used & (of == _CODE["slot"]))
                self.entry(reading.at, reading.used & (of == _CODE["bank"]))

    def measures(self) -> None:
        rows, branches = self.rows, self.layout.branches
        for j in range(self.layout.measures):
            made, name = j < rows["n_measures"], f"measure_into_{j}"
            rule = f"S has {self.columns} columns"
            self.refuse(made & self.outside(name, 0, self.columns - 1), rule, name)
            for part, least in (("num", 0), ("den", -1)):
                name, rank = f"{part}_kind_{j}", rows[f"{part}_rank_{j}"]
                bad = made & self.outside(name, least, len(REDUCTIONS) - 1)
                self.refuse(bad, f"a reduction is one of {', '.join(REDUCTIONS)}", name)
                of_rank = made & (rows[name] == REDUCTIONS.index("quantile"))
                bad = of_rank & ~((rank >= 0) & (rank <= 1))
                self.refuse(bad, "a rank lies in [0, 1]", f"{part}_rank_{j}")
                of_two = made & (rows[f"{part}_b_{j}"] != -1) & (rows[name] >= 0)
                bad = of_two & (rows[name] != REDUCTIONS.index("dot"))
                self.refuse(bad, "only a dot product has a second operand", name, f"{part}_b_{j}")
        for reading in rows.readings():
            if reading.measured:
                of, used = rows[reading.of], reading.used
                rule = "a measure is of x, e, out, y, xi, slot or bank"
                self.refuse(used & ~np.isin(of, _OPERANDS), rule, reading.of)
                outputs = used & (of == _CODE["out"])
                rule = f"the network has {branches} outputs"
                self.refuse(outputs & self.outside(reading.at, 0, branches - 1), rule, reading.at)
                bad = (outputs | used & (of == _CODE["y"])) & ~rows.evaluates
                self.refuse(bad, "without an evaluation there is no output", "flags", reading.of)
        self.places(measured=True)
