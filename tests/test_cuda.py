# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on a host in a GPU's place, and on GPUs: the bits of cpu, promises, mistakes."""

import dataclasses
import itertools
import sys

import numpy as np
import pytest
import torch
from support.gpu import (
    CORE,
    CUDA,
    NOISY,
    ONE_STAGE,
    assert_same,
    fields,
    moved,
    needs_cpu,
    needs_module,
    on,
)
from support.rows import (
    DTYPES,
    neutral,
    random_output,
    random_registers,
    random_row,
    raw,
    shifted,
    table_of,
    written,
)

from fastdiff import _core, backends, noise
from fastdiff.backends import Registers
from fastdiff.plans import EVALUATE, WRITES_X, Layout, Plan, Stage
from fastdiff.plans.layout import PackedRow, encode

SIZES = [0, 1, 3, 4, 16, 63, 65, 1023, 1024, 1025, 5000]

CPU = torch.device("cpu")


# -- the same bits as cpu --------------------------------------------------------------------------

COMBINATIONS = list(itertools.product((torch.float32, torch.float64), DTYPES, (None, *DTYPES)))


@needs_cpu
@pytest.mark.parametrize(
    ("state", "out_dtype", "m_dtype"), COMBINATIONS, ids=lambda d: str(d).removeprefix("torch.")
)
def test_a_stage_gives_the_bits_of_the_cpu_backend(device, usable, state, out_dtype, m_dtype):
    rng = np.random.default_rng(COMBINATIONS.index((state, out_dtype, m_dtype)))
    for case in range(44):
        size, batch, offset = SIZES[case % len(SIZES)], case % 3 + 1, case % 4 // 3
        layout = Layout(terms=case % 6, branches=case % 2 + 1, extras=case % 4 // 2 * 2)
        with_e, draws = case % 5 < 2, case % 7 % 3
        row = random_row(rng, layout, with_e, draws)
        shape = (batch, size)
        registers = random_registers(rng, shape, state, layout, with_e, m_dtype)
        out = random_output(rng, shape, layout, out_dtype)
        xi = registers.x.new_tensor(rng.normal(size=shape)) if case % 4 == 2 else None
        there = on(device, registers, offset)
        bound = backends.get("cuda").bind(there, table_of(row), layout)
        bound.run(0, moved(out, device, offset), moved(xi, device, offset))
        backends.get("cpu").bind(registers, table_of(row), layout).run(0, out, xi)
        bound.check()
        assert_same(there, registers, (case, dict(zip(layout.columns, row, strict=True))))


@needs_cpu
@pytest.mark.parametrize("size", [1, 6, 16, 300, 1028, 2050])
def test_each_sample_may_stand_at_its_own_row(device, size):
    rng = np.random.default_rng(6)
    layout = Layout(terms=3, branches=2, extras=1)
    rows = [random_row(rng, layout, with_e=True, draws=k % 3) for k in range(6)]
    for row in rows:
        row[0] = int(row[0]) | EVALUATE
    shape = (9, size)
    registers = random_registers(rng, shape, torch.float32, layout, True, torch.bfloat16)
    out = random_output(rng, shape, layout, torch.bfloat16)
    index = torch.tensor([2, 0, 0, 4, 1, 1, 1, 3, 0])
    there = on(device, registers)
    bound = backends.get("cuda").bind(there, table_of(*rows), layout, index.to(device))
    bound.run(1, out.to(device), None)
    backends.get("cpu").bind(registers, table_of(*rows), layout, index).run(1, out, None)
    bound.check()
    assert_same(there, registers)


@needs_cpu
@pytest.mark.parametrize("view", ["batch stride", "odd stride", "transposed", "expanded"])
@pytest.mark.parametrize("drawing", [False, True])
def test_strides_of_the_output_do_not_matter(device, view, drawing):
    rng = np.random.default_rng(7)
    layout = Layout(terms=1, branches=2)
    row = random_row(rng, layout, with_e=False, draws=int(drawing))
    row[0] = int(row[0]) | EVALUATE | WRITES_X
    registers = random_registers(rng, (3, 4, 5, 6), torch.float32, layout)
    base = torch.from_numpy(rng.normal(size=(6, 8, 5, 6))).float()
    odd = torch.from_numpy(rng.normal(size=(6, 121))).float()
    out = {
        "batch stride": base[:, :4],
        "odd stride": odd[:, 1:].view(6, 4, 5, 6),
        "transposed": base[:, :4].transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": base[:1, :4].expand(6, 4, 5, 6),
    }[view]
    there = on(device, registers)
    store = base if view in ("batch stride", "expanded") else odd
    strided = (
        out.to(device)
        if view == "transposed"
        else store.to(device).as_strided(out.shape, out.stride(), out.storage_offset())
    )
    assert torch.equal(strided.cpu(), out)
    if view == "transposed":
        assert not strided.is_contiguous()
    wanted = row.copy()
    bound = backends.get("cuda").bind(there, table_of(row.reshape(-1)), layout)
    bound.run(0, strided, None)
    backends.get("cpu").bind(registers, table_of(wanted), layout).run(0, out, None)
    assert_same(there, registers)


@needs_cpu
@pytest.mark.parametrize("shape", [(65536, 16), (3, 70_001), (1, 1 << 18)])
@pytest.mark.parametrize("draws", [0, 2])
def test_many_small_and_few_large_samples(device, shape, draws):
    rng = np.random.default_rng(4)
    layout = Layout(terms=1)
    row = random_row(rng, layout, with_e=False, draws=draws)
    row[0] = int(row[0]) | EVALUATE | WRITES_X
    registers = random_registers(rng, shape, torch.float32, layout, False, torch.bfloat16)
    out = random_output(rng, shape, layout, torch.bfloat16)
    there = on(device, registers)
    backends.get("cuda").bind(there, table_of(row), layout).run(0, out.to(device), None)
    backends.get("cpu").bind(registers, table_of(row), layout).run(0, out, None)
    assert_same(there, registers)


@needs_cpu
def test_every_sixteen_bit_output_widens_and_every_next_input_rounds_as_on_cpu(device):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    rng = np.random.default_rng(3)
    ties = [patterns.view(d).float() for d in DTYPES[2:]]
    ties = [(a[:-1] + a[1:]) / 2 for a in ties]
    values = torch.from_numpy(rng.integers(-(2**31), 2**31, 40_003).astype(np.int32))
    values = torch.cat([values.view(torch.float32), *ties, torch.tensor([65519.0, 65520.0])])
    plan = Plan(stages=(Stage(t=1.0, a_x=0.0, b=(1.0,)), Stage(t=0.5)), times=(1.0, 0.0))
    for dtype, state in itertools.product(DTYPES, DTYPES[:2]):
        given = patterns.view(dtype) if dtype.itemsize == 2 else values.to(dtype)
        for out in (given[None], values.to(state)[None]):
            m = torch.zeros(2, out.shape[1], dtype=dtype)
            registers = Registers(x=torch.full(out.shape, torch.nan, dtype=state), m=m)
            there = on(device, registers)
            table = torch.tensor(plan.table)
            backends.get("cuda").bind(there, table, plan.layout).run(0, out.to(device), None)
            backends.get("cpu").bind(registers, table, plan.layout).run(0, out, None)
            for a, b in zip(written(there), written(registers), strict=True):
                a, nan = a.cpu(), b.isnan()  # which bits a NaN has is not promised
                assert torch.equal(a.isnan(), nan)
                assert raw(a[~nan]) == raw(b[~nan])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (3, 1), (2, 7), (5, 64), (2, 4099), (1000, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_normals_are_those_of_every_backend(device, host_core, shape, dtype):
    seeds = noise.seeds_tensor(torch.arange(-2, shape[0] - 2), shape[0])
    wanted = noise.normal(shape, seeds, 7, dtype=dtype)
    if device.type == "cuda":
        for given in (seeds, seeds.to(device)):
            assert raw(noise.normal(shape, given, 7, dtype=dtype, device=device)) == raw(wanted)
        return
    for offset in (0, 1):
        z = shifted(torch.full(shape, torch.nan, dtype=dtype), offset)
        code = int(dtype == torch.float64)
        host_core.normal(z.data_ptr(), code, seeds.data_ptr(), *shape, 7, 0, 0, 0)
        assert raw(z) == raw(wanted)


# -- promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
def test_a_coefficient_of_zero_never_reads_its_register(device, indexed):
    layout = Layout(terms=2, branches=2, extras=1)
    row = neutral(layout)
    row.update(flags=EVALUATE | WRITES_X, push=1, b_0=1.0, k_1=2.0, n_terms=2, slot_0=0, slot_1=1)
    row = np.array([row[name] for name in layout.columns])
    poison = torch.full((2, 9), torch.nan, device=device)
    registers = Registers(
        x=poison.clone(),
        e=poison.clone(),
        history=torch.stack([poison] * 2),
        bank=poison[None].clone(),
    )
    out = torch.cat([poison, torch.ones(2, 9, device=device)])
    index = torch.zeros(2, dtype=torch.int64, device=device) if indexed else None
    backends.get("cuda").bind(registers, table_of(row), layout, index).run(0, out, None)
    assert torch.equal(registers.x.cpu(), torch.full((2, 9), 2.0))
    assert torch.equal(registers.history[1].cpu(), torch.full((2, 9), 2.0))
    assert bool(registers.history[0].isnan().all())


def test_rows_are_read_from_the_table_on_the_device(device):
    table = torch.tensor(ONE_STAGE.table)
    registers = Registers(x=torch.ones(1, 8, device=device))
    bound = backends.get("cuda").bind(registers, table, ONE_STAGE.layout)
    ones = torch.ones(1, 8, device=device)
    bound.run(0, ones, None)
    assert torch.equal(registers.x.cpu(), torch.full((1, 8), 2.5))
    b_0 = ONE_STAGE.layout.columns.index("b_0")
    bound.table[0, b_0] = 0.0
    bound.run(0, ones * torch.nan, None)
    assert torch.equal(registers.x.cpu(), torch.full((1, 8), 1.25))
    table[0, b_0] = 1.0  # the host's, changed through PyTorch
    bound.run(0, ones, None)
    assert torch.equal(registers.x.cpu(), torch.full((1, 8), 1.625))
    other = torch.tensor(ONE_STAGE.table)
    bound.refresh(other)
    bound.run(0, ones, None)
    assert torch.equal(registers.x.cpu(), torch.full((1, 8), 2.8125))


def test_a_table_on_the_device_is_used_where_it_lies(device):
    table = torch.tensor(ONE_STAGE.table, device=device)
    if device.type == "cpu":
        pytest.skip("the host's own table is copied")
    bound = backends.get("cuda").bind(Registers(x=torch.ones(1, 8, device=device)), table,
                                    ONE_STAGE.layout)  # fmt: skip
    assert bound.table.data_ptr() == table.data_ptr()


@needs_cpu
def test_the_row_may_be_told_on_the_device(device):
    rng = np.random.default_rng(11)
    registers = random_registers(rng, (2, 40), torch.float32, NOISY.layout)
    out = random_output(rng, (2, 40), NOISY.layout, torch.float32)
    there, table = on(device, registers), torch.tensor(NOISY.table)
    at = torch.zeros(1, dtype=torch.int64, device=device)
    bound = backends.get("cuda").bind(there, table, NOISY.layout, None, at)
    reference = backends.get("cpu").bind(registers, table, NOISY.layout)
    for row in (0, 1):
        at.fill_(row)
        bound.run(0, out.to(device), None)
        reference.run(row, out, None)
        assert_same(there, registers)


@pytest.mark.parametrize("bad", [2, -1, 2**62])
def test_a_row_that_only_the_device_knows_is_refused_there(device, usable, bad):
    registers = Registers(
        x=torch.ones(3, 8, device=device),
        history=torch.ones(NOISY.slots, 3, 8, device=device),
        seeds=torch.arange(3, device=device),
    )
    index = torch.tensor([0, bad, 1], device=device)
    bound = backends.get("cuda").bind(registers, torch.tensor(NOISY.table), NOISY.layout, index)
    bound.run(0, torch.ones(3, 8, device=device), None)
    assert torch.equal(registers.x[1].cpu(), torch.ones(8))
    assert not torch.equal(registers.x[0].cpu(), torch.ones(8))
    with pytest.raises(IndexError, match=rf"\[0, 2\); got row {bad}"):
        bound.check()
    bound.check()


@pytest.mark.parametrize(("name", "value"), [("push", 9.0), ("flags", 128.0), ("stream_1", np.nan)])
def test_a_row_made_illegal_on_the_device_writes_nothing(device, usable, name, value):
    registers = Registers(
        x=torch.ones(3, 8, device=device),
        history=torch.ones(NOISY.slots, 3, 8, device=device),
        seeds=torch.arange(3, device=device),
    )
    bound = backends.get("cuda").bind(registers, torch.tensor(NOISY.table), NOISY.layout)
    bound.table[0, NOISY.layout.columns.index(name)] = value
    bound.run(0, torch.ones(3, 8, device=device), None)
    assert all(bool((t == 1.0).all()) for t in written(registers))
    with pytest.raises(ValueError, match="got row 0"):
        bound.check()


def test_an_output_may_be_the_input_itself(device):
    registers = Registers(x=torch.arange(12.0, device=device).view(3, 4))
    bound = backends.get("cuda").bind(registers, torch.tensor(ONE_STAGE.table), ONE_STAGE.layout)
    bound.run(0, registers.x, None)
    assert torch.equal(registers.x.cpu(), 2.5 * torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("indexed", [False, True])
def test_rows_grow_where_one_did_when_the_table_was_checked(device, usable, indexed):
    plain = PackedRow(flags=EVALUATE | WRITES_X, b_0=1.0, k=(1.0,))
    grown = dataclasses.replace(plain, u=0.5)
    tables = [torch.from_numpy(encode([row], Layout())) for row in (plain, grown)]
    registers = Registers(x=torch.ones(2, 9, device=device))
    index = torch.zeros(2, dtype=torch.int64, device=device) if indexed else None
    bound = backends.get("cuda").bind(registers, tables[0], Layout(), index)
    twos = torch.full((2, 9), 2.0, device=device)
    bound.table.copy_(tables[1])  # the launched kernel leaves out what this row asks for
    bound.run(0, twos, None)
    with pytest.raises(ValueError, match=r"blend, multiply .* bound or refreshed; got row 0\."):
        bound.check()
    assert torch.equal(registers.x.cpu(), torch.ones(2, 9))
    bound.refresh(tables[1])
    bound.run(0, twos, None)
    bound.check()
    assert torch.equal(registers.x.cpu(), torch.full((2, 9), 2.5))


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 2).t()}, ValueError, "x is contiguous"),
        ({"x": torch.ones(2, 4, dtype=torch.bfloat16)}, ValueError, 'backend="triton"'),
        ({"e": torch.ones(2, 5)}, ValueError, r"e is \[2, 4\]; got \[2, 5\]"),
        ({"e": torch.ones(2, 4, device="meta")}, ValueError, "e lies on .*; got meta"),
        ({"history": torch.ones(1, 2, 4).double()}, TypeError, "history is torch.float32"),
        ({"m": torch.ones(3, 4)}, ValueError, r"m is \[2, 4\]"),
        ({"m": torch.ones(2, 4, dtype=torch.int8)}, TypeError, "m is in"),
        ({"seeds": torch.ones(3, dtype=torch.int64)}, ValueError, r"seeds is \[2\]"),
        ({"bank": torch.ones(1, 2, 5)}, ValueError, r"bank is \[1, 2, 4\]"),
    ],
)
def test_wrong_registers_are_refused_when_bound(device, usable, change, error, message):
    change = {
        k: v if isinstance(v, tuple) or v.is_meta else v.to(device) for k, v in change.items()
    }
    registers = dataclasses.replace(Registers(x=torch.ones(2, 4, device=device)), **change)
    with pytest.raises(error, match=message):
        backends.get("cuda").bind(registers, torch.tensor(ONE_STAGE.table), ONE_STAGE.layout)


def test_registers_that_overlap_are_refused(device, usable):
    store = torch.ones(20, device=device)
    x = store[:8].view(2, 4)
    for other in ({"e": store[4:12].view(2, 4)}, {"m": x}, {"history": store[7:15].view(1, 2, 4)}):
        registers = dataclasses.replace(Registers(x=x), **other)
        with pytest.raises(ValueError, match=f"got x and {next(iter(other))}. Clone"):
            backends.get("cuda").bind(registers, torch.tensor(ONE_STAGE.table), ONE_STAGE.layout)


@pytest.mark.parametrize("view", ["shifted", "expanded", "narrower"])
def test_an_output_across_the_registers_is_refused(device, usable, view):
    store = torch.ones(20, device=device)
    registers = Registers(x=store[:8].view(2, 4))
    out = {
        "shifted": store[1:9].view(2, 4),
        "expanded": store[:4].expand(2, 4),
        "narrower": store[:4].view(torch.bfloat16).view(2, 4),
    }[view]
    bound = backends.get("cuda").bind(registers, torch.tensor(ONE_STAGE.table), ONE_STAGE.layout)
    with pytest.raises(ValueError, match=r"overlap with x. Clone it"):
        bound.run(0, out, None)
    assert torch.equal(registers.x.cpu(), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("out", "xi", "error", "message"),
    [
        (None, None, ValueError, "Give out"),
        (torch.ones(2, 5), None, ValueError, r"\[2, 4\].*got \[2, 5\]"),
        (torch.ones(4, 4), None, ValueError, r"got \[4, 4\]"),
        (torch.ones(2, 4, dtype=torch.int32), None, TypeError, "got torch.int32"),
        (torch.ones(2, 4, device="meta"), None, ValueError, "got meta"),
        (torch.ones(2, 4), torch.ones(2, 3), ValueError, r"xi is \[2, 4\]; got \[2, 3\]"),
        (torch.ones(2, 4), torch.ones(2, 4).double(), TypeError, "xi is torch.float32"),
    ],
)
def test_a_wrong_output_is_named(device, usable, out, xi, error, message):
    registers = Registers(x=torch.ones(2, 4, device=device))
    bound = backends.get("cuda").bind(registers, torch.tensor(ONE_STAGE.table), ONE_STAGE.layout)
    out = out if out is None or out.is_meta else out.to(device)
    with pytest.raises(error, match=message):
        bound.run(0, out, xi if xi is None else xi.to(device))
    assert torch.equal(registers.x.cpu(), torch.ones(2, 4))


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_outside_the_table_is_refused(device, usable, row):
    plan = Plan(stages=(Stage(t=1.0), Stage(t=0.5)), times=(1.0, 0.0))
    registers = Registers(x=torch.ones(2, 4, device=device))
    bound = backends.get("cuda").bind(registers, torch.tensor(plan.table), plan.layout)
    with pytest.raises(IndexError, match=r"\[0, 2\)"):
        bound.run(row, torch.ones(2, 4, device=device), None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flags", 128.0, "flags"),
        ("push", 9.0, "slots"),
        ("slot_0", 1e300, "slots"),
        ("n_terms", 2.0, "fit the layout"),
        ("a_e", 1.0, "reads or writes e"),
    ],
)
def test_a_table_that_would_corrupt_memory_is_refused(device, usable, name, value, message):
    registers = Registers(
        x=torch.ones(2, 8, device=device), history=torch.ones(NOISY.slots, 2, 8, device=device)
    )
    good, bad = torch.tensor(NOISY.table), torch.tensor(NOISY.table)
    bad[1, NOISY.layout.columns.index(name)] = value
    with pytest.raises(ValueError, match=rf"{message}.*; got row 1"):
        backends.get("cuda").bind(registers, bad, NOISY.layout)
    bound = backends.get("cuda").bind(registers, good, NOISY.layout)
    with pytest.raises(ValueError, match=message):
        bound.refresh(bad)
    assert torch.equal(bound.table.cpu(), good)


def test_noise_without_seeds_is_refused_before_the_launch(device, usable):
    registers = Registers(
        x=torch.ones(2, 8, device=device), history=torch.ones(NOISY.slots, 2, 8, device=device)
    )
    ones = torch.ones(2, 8, device=device)
    for index in (None, torch.zeros(2, dtype=torch.int64, device=device)):
        bound = backends.get("cuda").bind(registers, torch.tensor(NOISY.table), NOISY.layout, index)
        with pytest.raises(ValueError, match=r"Registers\.seeds or give xi"):
            bound.run(0, ones, None)
        bound.run(0, ones, ones.clone())


def test_sizes_that_overflow_are_refused(host_core):
    with pytest.raises(ValueError, match=r"2\^63 bytes"):
        host_core.Stage(fields(batch=1 << 40, size=1 << 40))
    with pytest.raises(ValueError, match="multiple of its element's size"):
        host_core.Stage(fields(x=(1 << 20) + 2))
    with pytest.raises(TypeError, match="none for seeds"):
        host_core.Stage({name: v for name, v in fields().items() if name != "seeds"})
    with pytest.raises(TypeError, match="got 1 others"):
        host_core.Stage(fields(unheard=0))


# -- where there is no device ----------------------------------------------------------------------


@needs_module
def test_cpu_registers_are_refused_by_name():
    with pytest.raises(ValueError, match=r'x on cpu. Move them, or use backend="cpu"'):
        backends.get("cuda").bind(
            Registers(x=torch.ones(2, 4)), torch.tensor(ONE_STAGE.table), ONE_STAGE.layout
        )


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is here")
def test_without_a_driver_the_module_imports_and_a_launch_says_what_is_missing():
    assert CORE.problem() is not None
    seeds = torch.arange(2)
    z = torch.full((2, 8), 3.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"needs NVIDIA's driver.*got: .*CUDA.*backend="):
            CORE.normal(z.data_ptr(), 0, seeds.data_ptr(), 2, 8, 1, 0, 0, 0)
    assert torch.equal(z, torch.full((2, 8), 3.0))
    assert "CUDA" in backends.status()["cuda"]
    with pytest.raises(RuntimeError, match="does not run here"):
        backends.choose("cuda", torch.float32, torch.float32, CUDA)


def test_without_the_module_status_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdiff._cuda", None)
    _core.cuda_core.cache_clear()
    try:
        assert "FASTDIFF_CUDA=1 pip install" in backends.status()["cuda"]
        with pytest.raises(RuntimeError, match="FASTDIFF_CUDA=1 pip install"):
            backends.get("cuda").bind(
                Registers(x=torch.ones(1, 1)), torch.zeros(1, Layout().width), Layout()
            )
    finally:
        monkeypatch.undo()
        _core.cuda_core.cache_clear()
