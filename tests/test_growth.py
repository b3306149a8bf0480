# SPDX-License-Identifier: Apache-2.0
"""What a row may do besides combining: blend, weigh y, multiply by the bank, scale by S, measure.

Every field on every backend against the formula in float64 NumPy, which also notes what it reads:
all else is poisoned with NaN. `cpu` and `cuda` agree to the bit.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from support.core import INSTRUCTION_SETS, native, needs_core
from support.rows import SLOTS, copied, raw, written

from fastdiff import backends, noise
from fastdiff.backends import Registers
from fastdiff.plans import (
    AT_E,
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    layout,
)
from fastdiff.plans.layout import (
    PackedMeasure,
    PackedProduct,
    PackedReduction,
    PackedRow,
    encode,
    layout_of,
)

NAMES = [pytest.param(name, marks=needs_core if name == "cpu" else ()) for name in ("torch", "cpu")]
STATES = [torch.float32, torch.float64]
SIZES = [0, 1, 5, 64, 1023, 1025, 2600]
ENTRIES, COLUMNS = 20, 6  # of the bank, more than a row adds; of S


# -- the formula -----------------------------------------------------------------------------------


class Formula:
    """One row on one sample in float64; `sizes` makes every number its magnitude.

    Attributes:
        read: What the row reads: ("x", 0), ("bank", k), ("slot", j), ("out", g), ("scalar", c), ...
    """

    def __init__(self, row: PackedRow, sample: dict, sizes: bool = False) -> None:
        self.row, self.sample, self.sizes, self.read = row, sample, sizes, set()

    def get(self, kind: str, at: int = 0) -> np.ndarray:
        if kind == "point":
            kind = "e" if self.row.flags & AT_E else "x"
        self.read.add((kind, at))
        value = self.sample[kind]
        value = value if kind in ("x", "e", "xi") else value[at]
        return np.abs(value) if self.sizes else value

    def times(self, weight: float, kind: str, at: int = 0, column: int = -1) -> np.ndarray | float:
        if weight == 0.0:
            return 0.0
        if column >= 0:
            weight = weight * self.get("scalar", column)
        return (abs(weight) if self.sizes else weight) * self.get(kind, at)

    def y(self, scaled: bool = True) -> np.ndarray:
        row = self.row
        columns = row.scalar_k if scaled and row.scalar_k else (-1,) * len(row.k)
        y = np.zeros(self.sample["n"])
        for g, (k, column) in enumerate(zip(row.k, columns, strict=True)):
            y = y + self.times(k, "out", g, column)
        y = y + self.times(row.p, "point")
        return self.products("y", y, {})

    def products(self, into: str, total: np.ndarray, made: dict) -> np.ndarray:
        for p in self.row.products:
            if p.into != into or p.weight == 0.0:
                continue
            factor = self.times(p.weight, "bank", p.entry)
            if p.of == "new":
                operand = made.get("new", total)
            else:
                operand = made["h"] if p.of == "h" else self.get(p.of, p.at)
            total = total + factor * operand
        return total

    def limit(self, y: np.ndarray, plain: np.ndarray) -> np.ndarray:
        row, h = self.row, y
        if row.flags & CLIP and not self.sizes:
            h = np.clip(h, row.lo, row.hi)
        if row.flags & THRESHOLD and plain.size:
            s = min(max(np.quantile(np.abs(plain), row.quantile), row.floor), row.ceiling)
            h = h / s if self.sizes else np.clip(h, -s, s) / s
        if (row.u, row.v) != (0.0, 1.0):
            u, v = (abs(row.u), abs(row.v)) if self.sizes else (row.u, row.v)
            h = (v * h if v else 0.0) + (u * self.get("point") if u else 0.0)
        return h

    def update(self, plain: "Formula | None" = None) -> dict[str, np.ndarray]:
        """h, x', e' and m', those that there are."""
        row, made = self.row, {}
        y = None
        if row.flags & EVALUATE:
            y = self.y()
            made["h"] = self.limit(y, y if plain is None else plain.y())

        def total(sums: tuple, past: list, c: tuple, extras: list) -> np.ndarray:
            a_x, a_e, b, raw_weight = sums
            value = np.zeros(self.sample["n"]) + self.times(a_x, "x") + self.times(a_e, "e")
            for weight, column, operand in ((*b, made.get("h")), (raw_weight, -1, y)):
                if weight == 0.0:
                    continue
                scale = self.get("scalar", column) if column >= 0 else 1.0
                value = value + (abs(weight) if self.sizes else weight) * scale * operand
            for weight, slot in past:
                value = value + self.times(weight, "slot", slot)
            value = value + self.times(c[0], "xi", 0, c[1])
            for weight, entry in extras:
                value = value + self.times(weight, "bank", entry)
            return value

        new = self.get("x") if self._reads_kept_x() else self.sample["x"]
        if row.flags & WRITES_X:
            sums = (row.a_x, row.a_e, (row.b_0, row.scalar_b), row.b_raw)
            past, extras = [(b, s) for s, b, _ in row.terms], [(r, k) for k, r, _ in row.extras]
            new = total(sums, past, (row.c, row.scalar_c), extras)
            made["x"] = new = self.products("x", new, made)
        if row.flags & WRITES_E:
            sums = (row.d_x, row.d_e, (row.g_0, row.scalar_g), row.g_raw)
            past, extras = [(g, s) for s, _, g in row.terms], [(s, k) for k, _, s in row.extras]
            moved = total(sums, past, (row.c_e, row.scalar_ce), extras)
            if row.d_new:
                moved = moved + (abs(row.d_new) if self.sizes else row.d_new) * new
            made["e"] = self.products("e", moved, {**made, "new": new})
        if row.flags & WRITES_M:
            point = made.get("e", made.get("x"))
            if row.c_in_next and point is None:
                point = self.get("x")
            c_in = abs(row.c_in_next) if self.sizes else row.c_in_next
            made["m"] = c_in * point if c_in else np.zeros(self.sample["n"])
        if row.push_x >= 0:
            self.get("x")
        return made

    def _reads_kept_x(self) -> bool:
        """Whether e' reads the x' of a row that leaves x as it is."""
        row = self.row
        if row.flags & WRITES_X or not row.flags & WRITES_E:
            return self.sizes
        products = [p for p in row.products if (p.into, p.of) == ("e", "new") and p.weight]
        return self.sizes or row.d_new != 0.0 or bool(products)

    def measures(self) -> dict[int, float]:
        return {m.into: self.measured(m) for m in self.row.measures}

    def measured(self, m: PackedMeasure) -> float:
        ratio = self.reduced(m.num)
        if m.den is not None:
            below = self.reduced(m.den)
            ratio = ratio / below if below else 0.0
        return m.offset + m.weight * ratio**m.power

    def reduced(self, r: PackedReduction) -> float:
        a = self.operand(r.a)
        match r.kind:
            case "sum":
                return float(a.sum())
            case "dot":
                return float((a * (a if r.b is None else self.operand(r.b))).sum())
            case "norm":
                return math.sqrt((a * a).sum())
            case "std":
                return float(a.std(ddof=1))
            case _:
                return float(np.quantile(np.abs(a), r.rank))

    def operand(self, operand: tuple[str, int]) -> np.ndarray:
        return self.y(scaled=False) if operand[0] == "y" else self.get(*operand)


# -- random rows -----------------------------------------------------------------------------------


def random_grown_row(rng: np.random.Generator, branches: int = 2) -> PackedRow:
    """A row with every field, each weight 0 one time in four."""

    def weight() -> float:
        return 0.0 if rng.random() < 0.25 else float(rng.normal())

    def some(count: int) -> int:
        return int(rng.integers(0, count))

    row = PackedRow(flags=EVALUATE * (rng.random() < 0.9))
    evaluates = bool(row.flags)
    row.flags += sum(f * (rng.random() < 0.8) for f in (WRITES_X, WRITES_E, WRITES_M))
    row.flags += AT_E * (rng.random() < 0.5)
    row.a_x, row.a_e, row.d_x, row.d_e, row.d_new = (weight() for _ in range(5))
    row.c, row.c_e, row.c_in_next = weight(), weight(), weight()
    row.draws = tuple((some(90) + 1, weight() or 1.0) for _ in range(some(2) + 1))
    columns = [some(COLUMNS + 1) - 1 for _ in range(4)]
    row.scalar_b, row.scalar_g, row.scalar_c, row.scalar_ce = columns
    row.push_x = some(SLOTS + 1) - 1
    row.k, row.scalar_k = (0.0,) * branches, (-1,) * branches
    kinds = ["x", "e", "xi", "slot", "bank", "new", "point"]
    if evaluates:
        kinds.append("h")
        row.push = next(s for s in rng.permutation(range(-1, SLOTS)) if s != row.push_x or s < 0)
        row.push = int(row.push)
        row.p, row.b_0, row.g_0, row.b_raw, row.g_raw = (weight() for _ in range(5))
        row.k = tuple(weight() for _ in range(branches))
        row.scalar_k = tuple(some(COLUMNS + 1) - 1 for _ in range(branches))
        if rng.random() < 0.7:
            row.u, row.v = weight(), weight()
        if rng.random() < 0.6:
            row.flags += CLIP if rng.random() < 0.4 else THRESHOLD
            row.lo, row.hi, row.quantile = -0.5, 0.8, float(rng.choice([0.3, 0.9, 1.0]))
            row.floor, row.ceiling = 0.5, float(rng.choice([0.5, 0.7, math.inf]))
    if row.push >= 0 and row.push == row.push_x:
        row.push_x = -1
    row.terms = tuple((some(SLOTS), weight(), weight()) for _ in range(some(4)))
    row.extras = tuple((some(ENTRIES), weight(), weight()) for _ in range(some(4)))
    for _ in range(some(layout.MAX_PRODUCTS + 1)):
        into = str(rng.choice(["y", "x", "e"] if evaluates else ["x", "e"]))
        of = "point" if into == "y" else str(rng.choice(kinds))
        at = some(SLOTS) if of == "slot" else some(ENTRIES) if of == "bank" else 0
        row.products += (PackedProduct(into, weight(), some(ENTRIES), of, at),)
    return row


def reductions(rng: np.random.Generator, evaluates: bool) -> list[PackedReduction]:
    operands = [("x", 0), ("e", 0), ("xi", 0), ("slot", 3), ("bank", 15)]
    operands += [("out", 1), ("y", 0)] if evaluates else []

    def one() -> tuple[str, int]:
        return operands[rng.integers(len(operands))]

    made = [PackedReduction(kind, one()) for kind in ("sum", "norm", "dot")]
    made += [PackedReduction("dot", one(), one()), PackedReduction("quantile", one(), rank=0.35)]
    return [*made, PackedReduction("std", one()), PackedReduction("quantile", one(), rank=1.0)]


def made_registers(
    rng: np.random.Generator,
    shape: tuple[int, int],
    state: torch.dtype,
    shared_bank: bool,
) -> Registers:
    def values(*sizes: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=sizes)).to(state)

    return Registers(
        x=values(*shape),
        e=values(*shape),
        history=values(SLOTS, *shape),
        m=torch.full((2 * shape[0], shape[1]), torch.nan, dtype=state),
        bank=values(ENTRIES, 1 if shared_bank else shape[0], shape[1]),
        scalars=values(shape[0], COLUMNS).abs() + 0.5,
        seeds=torch.from_numpy(rng.integers(-(2**62), 2**62, shape[0])),
    )


def sample_of(
    registers: Registers, row: PackedRow, out: torch.Tensor, xi: torch.Tensor | None, b: int
) -> dict:
    """What the formula reads of one sample, float64."""
    size = registers.x.shape[1]
    if xi is None:
        given = np.zeros(size)
        for stream, weight in row.draws:
            own = noise.normal((1, size), registers.seeds[b : b + 1], stream)
            given = given + weight * own[0].double().numpy()
    else:
        given = xi[b].double().numpy()
    bank = registers.bank.expand(-1, len(registers.x), -1)
    return {
        "n": size,
        "x": registers.x[b].double().numpy(),
        "e": registers.e[b].double().numpy(),
        "xi": given,
        "slot": registers.history[:, b].double().numpy(),
        "bank": bank[:, b].double().numpy(),
        "out": out.reshape(2, len(registers.x), size)[:, b].double().numpy(),
        "scalar": registers.scalars[b].double().numpy(),
    }


def poisoned(
    registers: Registers, out: torch.Tensor, reads: list[set], shared_bank: bool
) -> tuple[Registers, torch.Tensor]:
    """NaN in all that no sample (of a shared bank) or this sample does not read."""
    registers, out = copied(registers), out.clone()
    bank, scalars = registers.bank.clone(), registers.scalars.clone()
    for b, read in enumerate(reads):
        for kind, tensor in (("x", registers.x), ("e", registers.e)):
            if (kind, 0) not in read:
                tensor[b] = torch.nan
        for slot in range(SLOTS):
            if ("slot", slot) not in read:
                registers.history[slot, b] = torch.nan
        for g in range(2):
            if ("out", g) not in read:
                out.view(2, *registers.x.shape)[g, b] = torch.nan
        for c in range(COLUMNS):
            if ("scalar", c) not in read:
                scalars[b, c] = torch.nan
    for k in range(ENTRIES):
        for b in range(bank.shape[1]):
            used = set().union(*reads) if shared_bank else reads[b]
            if ("bank", k) not in used:
                bank[k, b] = torch.nan
    return dataclasses.replace(registers, bank=bank, scalars=scalars), out


def close(got: torch.Tensor, wanted: np.ndarray, size: np.ndarray | float) -> bool:
    """Within a hundred roundings of the sum's magnitude: some thirty terms of up to three factors,
    their weights rounded too."""
    bound = 100 * torch.finfo(got.dtype).eps / 2 * size
    return bool(np.all(np.abs(got.double().numpy() - wanted) <= bound))


# -- against the formula ---------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_with_every_field_is_its_formula(name, state, indexed):
    rng = np.random.default_rng(31)
    for case in range(60):
        batch, size, shared_bank = case % 3 + 1, SIZES[case % len(SIZES)], case % 4 == 1
        rows = [random_grown_row(rng) for _ in range(batch)]
        registers = made_registers(rng, (batch, size), state, shared_bank)
        out = torch.from_numpy(rng.normal(size=(2 * batch, size))).to(state)
        xi = torch.from_numpy(rng.normal(size=(batch, size))).to(state) if case % 5 == 4 else None
        index = torch.from_numpy(rng.permutation(batch)) if indexed else None
        own = [rows[int(index[b])] if indexed else rows[0] for b in range(batch)]
        samples = [sample_of(registers, row, out, xi, b) for b, row in enumerate(own)]
        formulas = [Formula(row, sample) for row, sample in zip(own, samples, strict=True)]
        wanted = [formula.update() for formula in formulas]
        sizes = [
            Formula(row, sample, sizes=True).update(Formula(row, sample))
            for row, sample in zip(own, samples, strict=True)
        ]
        before, out = poisoned(registers, out, [f.read for f in formulas], shared_bank)
        after = copied(before)
        columns = layout_of(rows)
        bound = backends.get(name).bind(
            after, torch.from_numpy(encode(rows, columns)), columns, index
        )
        bound.run(0, out, xi)
        for b, row in enumerate(own):
            context = (case, b, row)
            for kind, then, now in (
                ("x", before.x[b], after.x[b]),
                ("e", before.e[b], after.e[b]),
                ("m", before.m[b], after.m[b]),
                ("m", before.m[batch + b], after.m[batch + b]),
            ):
                if kind in wanted[b]:
                    assert close(now, wanted[b][kind], sizes[b][kind]), (kind, context)
                else:
                    assert raw(now) == raw(then), (kind, context)
            for slot in range(SLOTS):
                if slot == row.push:
                    assert close(after.history[slot, b], wanted[b]["h"], sizes[b]["h"]), context
                elif slot == row.push_x:
                    assert raw(after.history[slot, b]) == raw(before.x[b]), context
                else:
                    assert raw(after.history[slot, b]) == raw(before.history[slot, b]), context


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", NAMES)
def test_measures_are_their_formula(name, state, indexed):
    rng = np.random.default_rng(32)
    powers = [1.0, 0.5, -1.0, 2.0, -0.5, 0.7]
    for case, size in enumerate([s for s in SIZES if s > 1] * 3):
        batch, shared_bank = case % 3 + 1, case % 4 == 1
        rows = [random_grown_row(rng) for _ in range(batch)]
        for row in rows:
            found = reductions(rng, bool(row.flags & EVALUATE))
            positive = [r for r in found if r.kind in ("norm", "std", "quantile")]
            for into in range(COLUMNS - 1):
                num = positive[rng.integers(len(positive))] if into < 4 else found[into - 4]
                den = positive[rng.integers(len(positive))] if into % 2 else None
                power = powers[into] if into < 4 else 1.0
                weights = float(rng.normal()), float(rng.normal())
                row.measures += (PackedMeasure(into, num, den, power, *weights),)
        registers = made_registers(rng, (batch, size), state, shared_bank)
        out = torch.from_numpy(rng.normal(size=(2 * batch, size))).to(state)
        xi = torch.from_numpy(rng.normal(size=(batch, size))).to(state) if case % 5 == 4 else None
        index = torch.from_numpy(rng.permutation(batch)) if indexed else None
        own = [rows[int(index[b])] if indexed else rows[0] for b in range(batch)]
        formulas = [
            Formula(row, sample_of(registers, row, out, xi, b)) for b, row in enumerate(own)
        ]
        wanted = [formula.measures() for formula in formulas]
        before, out = poisoned(registers, out, [f.read for f in formulas], shared_bank)
        scalars = before.scalars.clone()
        columns = layout_of(rows)
        bound = backends.get(name).bind(
            before, torch.from_numpy(encode(rows, columns)), columns, index
        )
        bound.measure(0, out, xi)
        for b, (row, values) in enumerate(zip(own, wanted, strict=True)):
            for m in row.measures:
                # y and the noise round like the state, and so does S; sums of a few thousand
                # numbers around 1 cancel to something far smaller than sqrt(n)
                scale = abs(m.offset) + abs(m.weight) * (abs(values[m.into] - m.offset) + size)
                error = abs(float(before.scalars[b, m.into]) - values[m.into])
                assert error <= 50 * torch.finfo(state).eps * scale, (case, b, m)
            assert raw(before.scalars[b, COLUMNS - 1 :]) == raw(scalars[b, COLUMNS - 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_a_ratio_with_nothing_below_is_0(name):
    ratio = PackedMeasure(0, PackedReduction("norm", ("x", 0)), PackedReduction("sum", ("e", 0)))
    row = PackedRow(measures=(dataclasses.replace(ratio, weight=2.0, offset=3.0),))
    registers = Registers(
        x=torch.ones(2, 9), e=torch.zeros(2, 9), scalars=torch.full((2, 1), torch.nan)
    )
    columns = layout_of([row])
    backends.get(name).bind(registers, torch.from_numpy(encode([row], columns)), columns).measure(
        0, None, None
    )
    assert registers.scalars.tolist() == [[3.0], [3.0]]


# -- bits ------------------------------------------------------------------------------------------


def run_both(name: str, registers: Registers, rows: list, out, xi, index) -> list[torch.Tensor]:
    """What stands in all registers after a row's measures and its update."""
    after = copied(registers)
    after = dataclasses.replace(after, scalars=registers.scalars.clone())
    columns = layout_of(rows)
    bound = backends.get(name).bind(after, torch.from_numpy(encode(rows, columns)), columns, index)
    bound.measure(0, out, xi)
    bound.run(0, out, xi)
    bound.check()
    return [*written(after), after.scalars]


def cases(seed: int, state: torch.dtype, sizes: list[int], count: int):
    """Registers, rows, an output, noise and indices of many kinds."""
    rng = np.random.default_rng(seed)
    for case in range(count):
        batch, size = case % 3 + 1, sizes[case % len(sizes)]
        rows = [random_grown_row(rng) for _ in range(batch)]
        for row in rows:
            for into, r in enumerate(reductions(rng, bool(row.flags & EVALUATE))[:COLUMNS]):
                row.measures += (PackedMeasure(into, r, None, 1.0, 0.01, 0.7),)
        registers = made_registers(rng, (batch, size), state, case % 4 == 1)
        kind = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[case % 4]
        out = torch.from_numpy(rng.normal(size=(2 * batch, size + 2))).to(kind)
        out = out[:, 1:-1] if case % 3 else out[:, 1:-1].contiguous()
        xi = torch.from_numpy(rng.normal(size=(batch, size))).to(state) if case % 5 == 4 else None
        yield registers, rows, out, xi, torch.arange(batch) if case % 2 else None


@needs_core
@pytest.mark.parametrize("state", STATES)
def test_cuda_gives_the_bits_of_cpu(device, usable, state):
    if device.type == "cuda":
        pytest.skip("tensors of the host")
    for number, case in enumerate(cases(33, state, [1, 4, 7, 256, 1023, 1028, 5000], 28)):
        got, wanted = run_both("cuda", *case), run_both("cpu", *case)
        for a, b in zip(got, wanted, strict=True):
            assert raw(a) == raw(b), (number, case[1])


@needs_core
@pytest.mark.parametrize("state", STATES)
def test_instruction_sets_and_threads_give_the_same_bits(state):
    before = native.instruction_set(), torch.get_num_threads()
    try:
        for number, case in enumerate(cases(34, state, [65, 1025, 33_000], 6)):
            results = []
            for name, threads in itertools.product(INSTRUCTION_SETS, (1, 2, 3)):
                native.use_instruction_set(name)
                torch.set_num_threads(threads)
                results.append([raw(tensor) for tensor in run_both("cpu", *case)])
            assert all(result == results[0] for result in results), number
    finally:
        native.use_instruction_set(before[0])
        torch.set_num_threads(before[1])
