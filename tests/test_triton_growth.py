# SPDX-License-Identifier: Apache-2.0
"""What a Triton stage may hold beside weights, against `support.emulation` to the bit."""

import dataclasses

import numpy as np
import pytest
import torch
from support.emulation import Sample
from support.interpreted import FUSES, HERE, moved
from support.rows import DTYPES, SLOTS, random_output, random_registers, raw

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.plans import (
    AT_E,
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    PackedRow,
    encode,
)
from fastdiff.plans.layout import PackedMeasure, PackedProduct, PackedReduction, layout_of

pytest.importorskip("triton")

F32, F64, BF16, F16 = DTYPES[0], DTYPES[1], DTYPES[2], DTYPES[3]
ENTRIES, COLUMNS = 20, 3  # of the bank: more than a kernel's arguments could name; of S


def bound(registers, rows, index=None, offset=0, layout=None):
    layout = layout or layout_of(rows)
    table = torch.from_numpy(encode(rows, layout))
    return backends.get("triton").bind(registers, table, layout, index, None, offset)


def grown_row(rng, with_e: bool, evaluates: bool = True, products: int = 4) -> PackedRow:
    """A row that may read anything, each coefficient 0 one time in four."""

    def c() -> float:
        return 0.0 if rng.random() < 0.25 else float(rng.normal())

    def column() -> int:
        return int(rng.integers(-1, COLUMNS))

    row = PackedRow(flags=WRITES_X * (rng.random() < 0.8) + WRITES_M * (rng.random() < 0.8))
    row.draws = tuple((int(rng.integers(1, 9)), c()) for _ in range(rng.integers(1, 3)))
    row.a_x, row.c, row.scalar_c = c(), c(), column()
    row.c_in_next = float(rng.choice([0.0, 0.7]))
    into, of = ["x"], ["x", "xi", "bank", "slot"]
    if with_e:
        row.flags += AT_E * (rng.random() < 0.5) + WRITES_E * (rng.random() < 0.8)
        row.a_e, row.d_x, row.d_e, row.d_new, row.c_e = c(), c(), c(), c(), c()
        row.scalar_ce = column()
        into, of = ["x", "e"], [*of, "e"]
    row.k = (0.0, 0.0)
    if evaluates:
        limit = int(rng.integers(3))
        row.flags += EVALUATE + CLIP * (limit == 1) + THRESHOLD * (limit == 2)
        row.lo, row.hi = -0.5, 0.8
        row.quantile, row.floor = float(rng.choice([0.3, 0.9])), 0.2
        row.ceiling = float(rng.choice([0.4, np.inf]))
        row.p, row.k, row.scalar_k = c(), (c(), c()), (column(), column())
        row.u, row.v = [(0.0, 1.0), (c(), c()), (0.4, -1.3)][int(rng.integers(3))]
        row.b_0, row.b_raw, row.scalar_b = c(), c(), column()
        if with_e:
            row.g_0, row.g_raw, row.scalar_g = c(), c(), column()
        row.push = int(rng.integers(-1, 2))
        into, of = ["y", *into], ["h", *of]
    row.terms = ((2, c(), c() * with_e), (3, c(), c() * with_e))[: rng.integers(3)]
    row.extras = ((17, c(), c() * with_e),)[: rng.integers(2)]

    def product(into: str, of: str) -> PackedProduct:
        at = int(rng.integers(ENTRIES)) if of == "bank" else int(rng.integers(4, SLOTS))
        entry = int(rng.integers(ENTRIES))
        return PackedProduct(into, c(), entry, of, at if of in ("bank", "slot") else 0)

    chosen = [str(rng.choice(into)) for _ in range(rng.integers(products + 1))]
    row.products = tuple(product(i, "point" if i == "y" else str(rng.choice(of))) for i in chosen)
    row.products += (product("x", "new"), product("x", "bank"))
    if with_e:
        row.products += (product("e", "new"),)
    return row


def room(rng, shape, state, with_e, shared, m=None) -> Registers:
    layout = Layout(branches=2, extras=ENTRIES)
    registers = random_registers(rng, shape, state, layout, with_e, m)
    number = F64 if state == F64 else F32
    scalars = torch.from_numpy(rng.normal(size=(shape[0], COLUMNS))).to(number)
    bank = registers.bank[:, :1].contiguous() if shared else registers.bank
    return dataclasses.replace(registers, scalars=scalars, bank=bank)


def poison(registers: Registers, out, samples: list[Sample]) -> None:
    """NaN in whatever no sample has read."""
    read = [(s.b, *what) for s in samples for what in s.read]
    for s in samples:
        for name, tensors in (
            *(("x", [registers.x]), ("e", [] if registers.e is None else [registers.e])),
            *(("slot", registers.history), ("out", [] if out is None else out)),
        ):
            for i, tensor in enumerate(tensors):
                if (s.b, name, i) not in read:
                    tensor[s.b] = torch.nan
    for entry in range(registers.bank.shape[0]):
        if not any(name == "bank" and i == entry for _, name, i in read):
            registers.bank[entry] = torch.nan


def expect(registers: Registers, samples: list[Sample]) -> Registers:
    """The registers after the samples' rows; they are not changed where no row writes."""
    after = moved(registers, "cpu")
    for s in samples:
        for name, values in s.update().items():
            tensor = torch.from_numpy(np.asarray(values, s.dtype)).reshape(registers.x.shape[1:])
            if name == "m":
                copies = after.m.reshape(-1, *registers.x.shape)
                copies[:, s.b] = tensor.to(after.m.dtype)
            elif isinstance(name, tuple):
                after.history[name[1], s.b] = tensor.to(after.history.dtype)
            else:
                getattr(after, name)[s.b] = tensor.to(registers.x.dtype)
    return after


def assert_same(got: Registers, wanted: Registers, case) -> None:
    for name in ("x", "e", "history", "m", "scalars"):
        a, b = getattr(got, name), getattr(wanted, name)
        if a is not None:
            assert raw(a) == raw(b), (case, name)


# -- the update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64], ids=["float32", "float64"])
@FUSES
def test_a_row_that_holds_everything_gives_the_bits_of_its_formula(device, state):
    rng = np.random.default_rng(41)
    for case in range(12 if state == F32 else 4):
        # one row, or one for each sample: those of the short ones share a program
        shape, own = [((2, 37), False), ((5, 3), True), ((2, 1), False), ((3, 17), True)][case % 4]
        with_e, shared, given = case % 3 > 0, case % 2 == 1, case % 5 == 4
        offset = 8 * (case % 3 == 2)
        rows = [grown_row(rng, with_e, evaluates=k < 3) for k in range(4)]
        m = [None, BF16, state, F16][case % 4]
        registers = room(rng, shape, state, with_e, shared, m)
        index = torch.from_numpy(rng.permuted(np.arange(shape[0]) % 4)) if own else None
        start = 0 if own else case % 4
        layout = dataclasses.replace(layout_of(rows), branches=2)
        out = random_output(rng, shape, layout, DTYPES[case % 4]).reshape(2, *shape)
        xi = torch.from_numpy(rng.normal(size=shape)).to(state) if given else None
        samples = [
            Sample(registers, b, rows[start + (int(index[b]) if own else 0)], out, xi, offset)
            for b in range(shape[0])
        ]
        for s in samples:
            s.update()
        poison(registers, out, samples)
        wanted = expect(registers, samples)
        there = moved(registers, device)
        stage = bound(there, rows, index if index is None else index.to(device), offset, layout)
        stage.run(start, out.flatten(0, 1).to(device), None if xi is None else xi.to(device))
        assert_same(moved(there, "cpu"), wanted, case)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("at_e", [0, AT_E], ids=["at x", "at e"])
@FUSES
def test_what_nothing_else_reads_is_read(device, at_e):
    rng = np.random.default_rng(17)
    writes = EVALUATE + at_e
    rows = [PackedRow(flags=writes, k=(0.0, 0.0), u=0.5, v=0.0, push=0)]
    rows.append(PackedRow(flags=writes, k=(0.0, 0.0), push=1))
    rows[1].products = (PackedProduct("y", 2.0, 3, "point"),)
    rows.append(PackedRow(flags=writes + WRITES_E, k=(0.0, 0.0), d_new=-1.5))
    for into, flag in (("x", WRITES_X), ("e", WRITES_E)):
        for of in ("x", "e", "xi", "point", "slot", "bank", *(["new"] if into == "e" else [])):
            row = PackedRow(flags=writes + flag, k=(0.0, 0.0), draws=((1, 1.0),))
            row.products = (PackedProduct(into, 0.7, 2, of, 4 if of in ("slot", "bank") else 0),)
            rows.append(row)
    layout = dataclasses.replace(layout_of(rows), branches=2)
    for i, row in enumerate(rows):
        registers = room(rng, (1, 6), F32, with_e=True, shared=True)
        out = random_output(rng, (1, 6), layout, F32).reshape(2, 1, 6)
        sample = Sample(registers, 0, row, out)
        sample.update()
        poison(registers, out, [sample])
        wanted = expect(registers, [sample])
        there = moved(registers, device)
        bound(there, rows, layout=layout).run(i, out.flatten(0, 1).to(device), None)
        assert_same(moved(there, "cpu"), wanted, row)


@pytest.mark.parametrize("device", HERE)
def test_rows_are_scaled_by_the_table_and_read_by_it(device):
    # a coefficient of 0 reads neither its register nor its column of S; a column of 0 reads both
    scalars = torch.tensor([[0.0, torch.nan]], device=device)
    row = PackedRow(flags=EVALUATE + WRITES_X, k=(0.0, 1.0), scalar_k=(1, 0), b_0=1.0)
    x = torch.ones(1, 5, device=device)
    out = torch.tensor([[torch.nan], [2.0]], device=device).expand(2, 5).contiguous()
    bound(Registers(x=x, scalars=scalars), [row]).run(0, out, None)
    assert x.tolist() == [[0.0] * 5]
    out[1] = torch.nan
    bound(Registers(x=x, scalars=scalars), [row]).run(0, out, None)
    assert bool(x.isnan().all())


@pytest.mark.parametrize("device", HERE)
def test_a_bank_may_be_one_for_all_samples(device):
    rng = np.random.default_rng(5)
    whole = random_registers(rng, (3, 50), F32, Layout(extras=40))
    one = whole.bank[:, :1].contiguous()
    row = PackedRow(flags=WRITES_X, a_x=0.5, extras=((39, 1.5, 0.0), (2, -1.0, 0.0)))
    row.products = (PackedProduct("x", 2.0, 20, "x"), PackedProduct("x", 3.0, 1, "bank", 30))
    results = []
    for bank in (one, one.expand(-1, 3, -1).contiguous()):
        registers = moved(dataclasses.replace(whole, bank=bank), device)
        bound(registers, [row]).run(0, None, None)
        results.append(raw(registers.x))
    assert results[0] == results[1] != raw(whole.x)


@pytest.mark.parametrize("device", HERE)
def test_a_threshold_has_a_ceiling_and_a_blend(device):
    out = torch.tensor([[1.0, -2.0, 3.0, -8.0]], device=device)
    row = PackedRow(flags=EVALUATE + WRITES_X + THRESHOLD, b_0=1.0, k=(1.0,))
    row.quantile, row.floor, row.u, row.v = 1.0, 1.0, 2.0, 10.0
    for ceiling, limited in ((np.inf, out / 8), (2.0, out.clamp(-2.0, 2.0) / 2)):
        x = torch.ones(1, 4, device=device)
        row.ceiling = ceiling
        bound(Registers(x=x), [row]).run(0, out, None)
        assert torch.equal(x, 2.0 + 10.0 * limited)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_the_new_input_is_zero_where_it_weighs_nothing(device, given):
    x, m = torch.full((1, 6), torch.inf, device=device), torch.full((1, 6), 7.0, device=device)
    row = PackedRow(flags=WRITES_M, c_in_next=0.0)
    if given:  # x is read, and is not finite
        row = dataclasses.replace(row, flags=WRITES_M + WRITES_X, a_x=2.0)
    bound(Registers(x=x, m=m), [row]).run(0, None, None)
    assert m.tolist() == [[0.0] * 6]
    row = dataclasses.replace(row, flags=row.flags - WRITES_M, c_in_next=1.0)
    bound(Registers(x=x, m=m), [row]).run(0, None, None)
    assert m.tolist() == [[0.0] * 6]


# -- the element offset ----------------------------------------------------------------------------


@pytest.mark.parametrize("device", HERE)
def test_parts_of_a_state_draw_the_noise_of_the_whole(device):
    row = PackedRow(flags=WRITES_X, a_x=1.0, c=1.0, draws=((3, 1.0), (2, 0.5)))
    seeds = torch.tensor([5, -7], device=device)
    whole = torch.zeros(2, 1240, device=device)
    bound(Registers(x=whole, seeds=seeds), [row]).run(0, None, None)
    for start, end in ((0, 1200), (1200, 1240)):
        part = torch.zeros(2, end - start, device=device)
        bound(Registers(x=part, seeds=seeds), [row], offset=start).run(0, None, None)
        assert torch.equal(part, whole[:, start:end])


# -- measures --------------------------------------------------------------------------------------


def measures_of(rng, of: list[tuple[str, int]]) -> tuple[PackedMeasure, ...]:
    """One of each kind, over operands in turn."""
    a = [of[int(i)] for i in rng.permutation(len(of))[:5]] + of
    dot = PackedReduction("dot", a[0], a[1])
    std, norm = PackedReduction("std", a[2]), PackedReduction("norm", a[3])
    order = PackedReduction("quantile", a[4], rank=0.7)
    return (
        PackedMeasure(0, dot, norm, power=2.0, weight=-0.3, offset=1.5),
        PackedMeasure(1, std, order, power=-1.0),
        PackedMeasure(2, PackedReduction("sum", a[1]), PackedReduction("dot", a[2]), weight=3.0),
    )


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64, BF16], ids=["float32", "float64", "bfloat16"])
@FUSES
def test_measures_have_one_order_and_one_rounding(device, state):
    rng = np.random.default_rng(3)
    for case in range(3):
        shape = [(2, 2051), (3, 6), (2, 1024)][case]
        with_e = case > 0
        rows = [grown_row(rng, with_e) for _ in range(2)]
        operands = [("x", 0), ("out", 1), ("y", 0), ("xi", 0), ("slot", 4), ("bank", 19)]
        for row in rows:
            row.measures = measures_of(rng, [*operands, *([("e", 0)] if with_e else [])])
        registers = room(rng, shape, state, with_e, shared=case == 1)
        out = random_output(rng, shape, Layout(branches=2), DTYPES[case]).reshape(2, *shape)
        xi = torch.from_numpy(rng.normal(size=shape)).to(state) if case == 2 else None
        index = torch.tensor([1, 0, 2][: shape[0]])
        samples = [Sample(registers, b, rows[i], out, xi) for b, i in enumerate(index) if i < 2]
        wanted = registers.scalars.clone()
        for s in samples:
            for measure in s.row.measures:
                wanted[s.b, measure.into] = s.measured(measure)
        poison(registers, out, samples)
        there = moved(registers, device)
        layout = dataclasses.replace(layout_of(rows), branches=2)
        stage = bound(there, rows, index.to(device), 0, layout)
        stage.measure(0, out.flatten(0, 1).to(device), None if xi is None else xi.to(device))
        assert raw(there.scalars) == raw(wanted), case
        assert raw(there.x) == raw(registers.x)


@pytest.mark.parametrize("device", HERE)
def test_a_stage_uses_what_it_has_just_measured(device):
    # x' = x / norm(x) by way of S: a row measures, then scales its noise
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0]], device=device)
    row = PackedRow(flags=WRITES_X, c=1.0, scalar_c=0)
    row.measures = (PackedMeasure(0, PackedReduction("norm", ("x", 0)), power=-1.0),)
    registers = Registers(x=x, scalars=torch.full((2, 1), torch.nan, device=device))
    stage = bound(registers, [row])
    stage.measure(0, None, x)
    stage.run(0, None, x.clone())
    assert torch.allclose(x, torch.tensor([[0.6, 0.8]], device=device).expand(2, 2))
    assert torch.allclose(registers.scalars.flatten().cpu(), torch.tensor([0.2, 0.1]))


@pytest.mark.parametrize("device", HERE)
def test_powers_and_a_denominator_of_nothing(device):
    ones, nothing, minus = (
        PackedReduction("sum", of) for of in (("x", 0), ("bank", 0), ("bank", 1))
    )
    cases = [
        *((ones, None, 3.0, 64.0), (ones, nothing, 0.0, 1.0), (ones, nothing, 1.0, 0.0)),
        *((ones, None, -0.5, 0.5), (ones, None, 0.25, 4**0.25), (nothing, None, -1.0, np.inf)),
        *((minus, None, 3.0, -64.0), (minus, None, 4.0, 256.0), (minus, None, 0.3, np.nan)),
    ]
    x = torch.ones(1, 4, dtype=F64, device=device)
    bank = torch.stack([torch.zeros_like(x), -torch.ones_like(x)])
    row = PackedRow(measures=tuple(PackedMeasure(i, *c[:3]) for i, c in enumerate(cases)))
    scalars = torch.zeros(1, len(cases), dtype=F64, device=device)
    bound(Registers(x=x, bank=bank, scalars=scalars), [row]).measure(0, None, None)
    wanted = torch.tensor([[c[3] for c in cases]], dtype=F64)
    assert torch.allclose(scalars.cpu(), wanted, rtol=4e-15, atol=0.0, equal_nan=True)


# -- mistakes --------------------------------------------------------------------------------------

SUM, TWO = PackedReduction("sum", ("x", 0)), PackedReduction("norm", ("x", 0), ("x", 0))


def measuring(num: PackedReduction, into: int = 0, **fields) -> PackedRow:
    return PackedRow(measures=(PackedMeasure(into, num),), **fields)


def multiplying(*product, **fields) -> PackedRow:
    return PackedRow(flags=WRITES_X, products=(PackedProduct(*product),), **fields)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (multiplying("x", 1.0, 20, "x"), "the bank has 20 entries; row 0 has bank_0 = 20"),
        (multiplying("x", 1.0, 0, "bank", 20), "the bank has 20 entries; row 0 has at_0 = 20"),
        (multiplying("x", 1.0, 0, "slot", 6), "history has 6 slots; row 0 has at_0 = 6"),
        (multiplying("x", 1.0, 0, "out"), "a product is of x, e, h"),
        (multiplying("y", 1.0, 0, "x"), "into y, of point"),
        (multiplying("y", 1.0, 0, "point"), "no y and no h"),
        (multiplying("x", 1.0, 0, "h"), "no y and no h"),
        (multiplying("x", 1.0, 0, "e"), r"needs Registers\.e"),
        (PackedRow(u=0.5), "no y to weigh"),
        (PackedRow(flags=WRITES_X, b_raw=0.5), "no y to weigh"),
        (PackedRow(scalar_c=3), "S has 3 columns; row 0 has scalar_c = 3"),
        (PackedRow(k=(1.0, 1.0), scalar_k=(-1, 3)), "row 0 has scalar_k_1 = 3"),
        (measuring(SUM, into=3), "S has 3 columns; row 0 has measure_into_0 = 3"),
        (measuring(TWO), "only a dot product has a second operand"),
        (measuring(PackedReduction("quantile", ("x", 0), rank=1.5)), r"a rank lies in \[0, 1\]"),
        (measuring(PackedReduction("sum", ("h", 0))), "a measure is of x, e, out"),
        (measuring(PackedReduction("sum", ("y", 0))), "there is no output"),
        (measuring(PackedReduction("dot", ("x", 0), ("bank", 20))), "has num_b_at_0 = 20"),
        (measuring(PackedReduction("sum", ("slot", -1))), "history has 6 slots"),
        (measuring(PackedReduction("sum", ("e", 0))), r"needs Registers\.e"),
        (
            measuring(PackedReduction("sum", ("out", 2)), flags=EVALUATE),
            "the network has 2 outputs; row 0 has num_a_at_0 = 2",
        ),
        (
            PackedRow(flags=EVALUATE + THRESHOLD, quantile=0.5, floor=2.0, ceiling=1.0),
            "ceiling is not below its floor; row 0 has floor = 2, ceiling = 1",
        ),
    ],
)
@pytest.mark.parametrize("device", HERE)
def test_a_row_that_would_leave_the_registers_is_refused(device, row, message):
    registers = moved(room(np.random.default_rng(2), (2, 6), F32, False, True), device)
    layout = dataclasses.replace(layout_of([row]), branches=2)
    with pytest.raises(ValueError, match=message):
        bound(registers, [row], layout=layout)


@pytest.mark.parametrize("device", HERE)
def test_noise_that_only_a_product_or_a_measure_reads_is_asked_for(device):
    registers = moved(room(np.random.default_rng(2), (2, 6), F32, False, True), device)
    for row in (
        multiplying("x", 1.0, 0, "xi"),
        measuring(PackedReduction("dot", ("x", 0), ("xi", 0))),
    ):
        with pytest.raises(ValueError, match="row 0 draws none"):
            bound(registers, [row]).run(0, None, None)
        row.draws = ((1, 1.0),)
        with pytest.raises(ValueError, match=r"Bind Registers\.seeds, or give xi"):
            bound(dataclasses.replace(registers, seeds=None), [row]).run(0, None, None)
        bound(registers, [row]).run(0, None, None)


@pytest.mark.parametrize("device", HERE)
def test_registers_and_offsets_that_cannot_be_right_are_refused(device):
    registers = moved(room(np.random.default_rng(2), (2, 6), F32, False, True), device)
    for change, error, message in (
        ({"scalars": registers.scalars.double()}, TypeError, "scalars is torch.float32; got"),
        ({"scalars": registers.scalars[:1]}, ValueError, r"scalars is \[2, 3\]; got \[1, 3\]"),
        ({"scalars": registers.x[:, :2]}, ValueError, "scalars is contiguous"),
        ({"scalars": registers.x}, ValueError, "x and scalars overlap"),
        ({"bank": registers.bank[:, :, :5].contiguous()}, ValueError, r"bank is \[20, 1, 6\]; got"),
        ({"bank": registers.x[None]}, ValueError, "x and bank overlap"),
    ):
        with pytest.raises(error, match=message):
            bound(dataclasses.replace(registers, **change), [PackedRow()])
    for offset in (-4, 2):
        with pytest.raises(ValueError, match=f"offset is a multiple of 4 .*; got {offset}"):
            bound(registers, [PackedRow()], offset=offset)


@pytest.mark.parametrize("device", HERE)
def test_a_table_that_grows_is_bound_anew(device):
    registers = moved(room(np.random.default_rng(2), (2, 6), F32, True, True), device)
    layout = Layout(branches=2, products=1, measures=1)
    stage = bound(registers, [PackedRow()], layout=layout)
    for row, word in (
        (multiplying("x", 1.0, 0, "x"), "multiply by the bank"),
        (PackedRow(flags=WRITES_E, d_new=1.0), "weigh y, the point or their own x'"),
        (PackedRow(scalar_c=0), "read scalars"),
        (measuring(SUM), "measure"),
    ):
        with pytest.raises(ValueError, match=f"also {word}. Bind it anew"):
            stage.refresh(torch.from_numpy(encode([row], layout)))
