# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: on a host in a GPU's place, in its machine code, and on GPUs."""

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cuda import CORE, CUDA, WHY_NOT, gpu, needs_module
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
from fastdiff.plans import CLIP, EVALUATE, THRESHOLD, WRITES_X, Layout, Plan, Stage

SIZES = [0, 1, 3, 4, 16, 63, 65, 1023, 1024, 1025, 5000]


# -- rows and registers ----------------------------------------------------------------------------


def fields(**changes: int) -> dict[str, int]:
    """What the core is told of a bound stage with one row of no groups."""
    names = "state network e history slots m copies bank entries scalars scalar_columns seeds terms"
    names += " extras products measures stage_index offset row_index device"
    own = dict.fromkeys(names.split(), 0)
    own |= {"batch": 2, "size": 4, "x": 1 << 20, "bank_batch": 1, "table": 4096, "rows": 1}
    own |= {"branches": 1, "width": Layout().width, "fault": 8192, "scale": 16384}
    return own | changes


def moved(tensor: torch.Tensor | None, device: torch.device, offset: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    store = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    return store[offset:].view(tensor.shape).copy_(tensor)


def on(device: torch.device, registers: Registers, offset: int = 0) -> Registers:
    """A copy there, `offset` elements off alignment."""
    return Registers(
        x=moved(registers.x, device, offset),
        e=moved(registers.e, device, offset),
        history=moved(registers.history, device, offset),
        m=moved(registers.m, device, offset),
        bank=moved(registers.bank, device, offset),
        seeds=moved(registers.seeds, device, 0),
    )


def assert_same(got: Registers, wanted: Registers, context: object = None) -> None:
    """Equal to the bit, NaN included."""
    for a, b in zip(written(got), written(wanted), strict=True):
        assert raw(a) == raw(b), context


CPU = torch.device("cpu")
ONE_STAGE = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
NOISY = Plan(
    stages=(
        Stage(t=1.0, a_x=0.9, b=(0.3,), c=0.5, noise=((3, 1.0),)),
        Stage(t=0.5, a_x=0.8, b=(0.2, 0.1), c=0.4, noise=((4, 0.6), (5, 0.8))),
    ),
    times=(1.0, 0.0),
)

needs_cpu = pytest.mark.skipif(_core.native is None, reason="the CPU core is not built")


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


# -- thresholds ------------------------------------------------------------------------------------


def thresholds(quantile: float, floor: float) -> Plan:
    """A plan of one stage, x' = threshold(out)."""
    stage = Stage(t=1.0, a_x=0.0, b=(1.0,), threshold=(quantile, floor))
    return Plan(stages=(stage,), times=(1.0, 0.0), variable="x0")


def thresholded(
    name: str, out: torch.Tensor, state: torch.dtype, quantile: float, floor: float
) -> torch.Tensor:
    plan = thresholds(quantile, floor)
    registers = Registers(x=torch.full_like(out, torch.nan, dtype=state))
    backends.get(name).bind(registers, torch.tensor(plan.table), plan.layout).run(0, out, None)
    return registers.x.cpu()


def assert_same_numbers(got: torch.Tensor, wanted: torch.Tensor, context: object = None) -> None:
    """Equal to the bit but for NaN, whose bits are not promised."""
    nan = wanted.isnan()
    assert torch.equal(got.isnan(), nan), context
    assert raw(got[~nan]) == raw(wanted[~nan]), context


def magnitudes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Samples [6, n] of all kinds: normal, with ties, of zeros, wide, close, of equal values."""
    return np.stack(
        [
            rng.normal(size=n),
            rng.integers(-3, 4, n),
            rng.choice([0.0, -0.0], n),
            rng.normal(size=n) * 10.0 ** rng.integers(-4, 4, n),
            rng.choice([-1.0, 1.0], n) * (1 + rng.integers(0, 300, n) * 2.0**-23),
            np.full(n, -2.5),
        ]
    )


@needs_cpu
@pytest.mark.parametrize(
    ("state", "out_dtype"), list(itertools.product(DTYPES[:2], DTYPES)), ids=lambda d: str(d)[6:]
)
def test_a_threshold_is_the_quantile_of_each_sample(device, state, out_dtype):
    rng = np.random.default_rng(20)
    for n in (1, 2, 3, 5, 31, 255, 1024, 1025, 5000, 9000):
        out = torch.from_numpy(magnitudes(rng, n)).to(out_dtype)
        h = out.to(state)
        for q, floor in itertools.product((1e-9, 0.5, 0.9, 0.995, 1.0), (1e-3, 1.0, 1e3)):
            got = thresholded("cuda", out.to(device), state, q, floor)
            assert raw(got) == raw(thresholded("cpu", out, state, q, floor)), (n, q, floor)
            s = torch.quantile(h.double().abs(), q, dim=1).clamp(min=floor).to(state)[:, None]
            wanted = h.clamp(-s, s) / s
            # s may fall on the other side of a rounding, then the quotient too
            bound = 2 * torch.finfo(state).eps * (1 + wanted.abs())
            assert bool(((got - wanted).abs() <= bound).all()), (n, q, floor)


@needs_cpu
@pytest.mark.parametrize("state", DTYPES[:2])
def test_thresholds_of_samples_that_are_not_finite_are_those_of_cpu(device, state):
    rng = np.random.default_rng(21)
    for n, q in itertools.product((1, 2, 5, 1025, 5000), (0.3, 0.9, 1.0)):
        out = torch.from_numpy(rng.normal(size=(7, n))).float()
        out[1, 0] = torch.nan
        out[2, -1] = -torch.inf
        out[3, n // 2 :] = -torch.nan
        out[4, : n // 2 + 1] = torch.inf
        out[5], out[6] = torch.nan, -torch.inf
        got = thresholded("cuda", out.to(device), state, q, 0.5)
        assert_same_numbers(got, thresholded("cpu", out, state, q, 0.5), (n, q))


@needs_cpu
@pytest.mark.parametrize(
    ("state", "out_dtype"), list(itertools.product(DTYPES[:2], DTYPES)), ids=lambda d: str(d)[6:]
)
def test_rows_that_threshold_clip_or_do_neither_give_the_bits_of_cpu(
    device, usable, state, out_dtype
):
    rng = np.random.default_rng(22)
    for case in range(48):
        size = [1, 3, 16, 200, 1028, 3001, 8200][case % 7]
        batch, offset, strided = case % 4 + 1, case % 3 // 2, case % 5 < 2
        layout = Layout(terms=case % 4, branches=case % 2 + 1, extras=case % 3 // 2)
        rows = [random_row(rng, layout, True, draws=k % 3) for k in range(5)]
        for row in rows[case % 2 :: 2]:
            row[0] = (int(row[0]) & ~CLIP) | EVALUATE | WRITES_X | THRESHOLD
            limits = layout.column("quantile")
            row[limits : limits + 2] = (
                rng.choice([0.3, 0.9, 0.995, 1.0]),
                rng.choice([0.01, 0.5, 2.0]),
            )
        for row in rows:
            row[0] = int(row[0]) | EVALUATE
        registers = random_registers(rng, (batch, size), state, layout, True, torch.bfloat16)
        wide = random_output(rng, (batch, size + 4 * strided + offset), layout, out_dtype)
        index = torch.from_numpy(rng.permutation(5)[:batch]) if case % 3 else None
        there = on(device, registers, offset)
        given = wide.to(device)[:, offset : offset + size]
        at = int(index is None) * (case % 5)
        bound = backends.get("cuda").bind(
            there, table_of(*rows), layout, None if index is None else index.to(device)
        )
        bound.run(at, given if strided else moved(given, device, offset), None)
        backends.get("cpu").bind(registers, table_of(*rows), layout, index).run(
            at, wide[:, offset : offset + size], None
        )
        bound.check()
        assert_same(there, registers, case)


@needs_cpu
@pytest.mark.parametrize("shape", [(700, 5), (2, 70_001), (1, 1 << 17)])
def test_thresholds_of_many_small_and_few_large_samples(device, shape):
    out = torch.from_numpy(np.random.default_rng(23).normal(size=shape)).to(torch.bfloat16)
    got = thresholded("cuda", out.to(device), torch.float32, 0.995, 0.5)
    assert raw(got) == raw(thresholded("cpu", out, torch.float32, 0.995, 0.5))


@pytest.mark.parametrize("indexed", [False, True])
def test_rows_threshold_where_one_did_when_the_table_was_checked(device, usable, indexed):
    plan = thresholds(1.0, 1.0)
    table = torch.tensor(plan.table)
    none = table.clone()
    none[0, 0] = EVALUATE + WRITES_X
    registers = Registers(x=torch.ones(2, 8, device=device))
    index = torch.zeros(2, dtype=torch.int64, device=device) if indexed else None
    bound = backends.get("cuda").bind(registers, none, plan.layout, index)
    twos = torch.full((2, 8), 2.0, device=device)
    bound.run(0, twos, None)
    bound.check()
    assert torch.equal(registers.x.cpu(), torch.full((2, 8), 2.0))
    bound.table.copy_(table)  # nothing is launched that would find the scales
    bound.run(0, twos + 1, None)
    assert torch.equal(registers.x.cpu(), torch.full((2, 8), 2.0))
    with pytest.raises(
        ValueError, match=r"when it was bound or refreshed; got row 0\. Call run\.re"
    ):
        bound.check()
    bound.refresh(table)
    bound.run(0, twos, None)
    assert torch.equal(registers.x.cpu(), torch.ones(2, 8))
    bound.table[0, plan.layout.columns.index("floor")] = 4.0  # the floor
    bound.run(0, twos, None)
    assert torch.equal(registers.x.cpu(), torch.full((2, 8), 0.5))
    bound.table.copy_(none)
    bound.run(0, twos, None)
    assert torch.equal(registers.x.cpu(), torch.full((2, 8), 2.0))
    bound.refresh(none)
    bound.run(0, twos + 1, None)
    assert torch.equal(registers.x.cpu(), torch.full((2, 8), 3.0))
    bound.check()


def test_a_stage_without_elements_or_evaluation_thresholds_nothing(device):
    assert thresholded("cuda", torch.ones(3, 0, device=device), torch.float32, 0.9, 0.5).shape == (
        3,
        0,
    )
    plan = thresholds(0.5, 0.1)
    table = torch.tensor(plan.table)
    table[0, 0] = WRITES_X + THRESHOLD
    table[0, [plan.layout.columns.index(name) for name in ("a_x", "b_0", "k_0")]] = torch.tensor(
        [0.5, 0.0, 0.0], dtype=torch.float64
    )
    registers = Registers(x=torch.full((2, 8), 4.0, device=device))
    bound = backends.get("cuda").bind(registers, table, plan.layout)
    bound.run(0, None, None)
    bound.check()
    assert torch.equal(registers.x.cpu(), torch.full((2, 8), 2.0))


def test_a_floor_that_the_state_cannot_hold_is_refused_when_bound(device):
    plan = thresholds(0.9, 1e99)
    for state in DTYPES[:2]:
        registers = Registers(x=torch.ones(2, 8, dtype=state, device=device))
        if state == torch.float64:
            backends.get("cuda").bind(registers, torch.tensor(plan.table), plan.layout)
            continue
        with pytest.raises(ValueError, match="positive floor"):
            backends.get("cuda").bind(registers, torch.tensor(plan.table), plan.layout)


def test_samples_too_large_to_count_are_refused(host_core):
    plan = thresholds(0.9, 1.0)
    table, none = torch.tensor(plan.table), torch.tensor(ONE_STAGE.table)

    def stage(size: int) -> object:
        return host_core.Stage(fields(x=1 << 40, batch=1, size=size))

    stage((1 << 32) - 1).check_table(table.data_ptr())
    stage(1 << 32).check_table(none.data_ptr())
    with pytest.raises(NotImplementedError, match=r"2\^32 elements; got 4294967296\."):
        stage(1 << 32).check_table(table.data_ptr())


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
            CORE.normal(z.data_ptr(), 0, seeds.data_ptr(), 2, 8, 1, 0, 0)
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


# -- machine code ----------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton ships some."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.exists() else None
    return found


# The most registers of a thread, in the architectures built by default: 65,536 a processor, 256
# threads a block, so four blocks run at once in float32 and two in float64. The blocks that find
# scales have 1,024 and 512 threads, and one of them fits.
REGISTERS = {"float": 64, "double": 128, "normals": 40}


@pytest.fixture(scope="module")
def cuobjdump() -> Callable[..., str]:
    program = tool("cuobjdump")
    if CORE is None or program is None:
        pytest.skip(str(WHY_NOT) if CORE is None else "needs cuobjdump")

    def dump(*options: str) -> str:
        done = subprocess.run([program, *options, CORE.__file__], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return dump


def functions(text: str, start: str) -> dict[str, str]:
    """The parts of a dump by kernel."""
    parts = re.split(rf"^\s*{start}\s*:?\s*(\S+?):?\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_kernels_spill_nothing_and_leave_room_for_the_blocks_planned(cuobjdump, record_property):
    archs = set(re.findall(r"sm_\d+", cuobjdump("--list-elf")))
    if not archs:
        pytest.skip("the module holds PTX alone")
    for arch in archs:
        usages = cuobjdump("--dump-resource-usage", "--gpu-architecture", arch)
        kernels = functions(usages, "Function")
        assert len({name for name in kernels if "stage" in name}) == 16
        assert len({name for name in kernels if "thresholds" in name}) == 8
        for name, usage in kernels.items():
            used = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", usage)}
            kind = "normals" if "normals" in name else "float" if "If" in name else "double"
            record_property(f"{arch} {name}", used["REG"])
            assert used["REG"] <= REGISTERS[kind], (arch, name, used)
            assert used["STACK"] == 0, (arch, name, used)
            assert used["LOCAL"] == 0, (arch, name, used)


def test_registers_move_in_accesses_of_sixteen_bytes_and_none_is_in_local_memory(cuobjdump):
    available = set(re.findall(r"sm_\d+", cuobjdump("--list-elf")))
    if not available:
        pytest.skip("the module holds PTX alone")
    arch = "sm_90" if "sm_90" in available else max(available)
    code = functions(cuobjdump("--dump-sass", "--gpu-architecture", arch), "Function")
    stages = {name: text for name, text in code.items() if "stage" in name}
    assert len(stages) == 16
    for name, text in stages.items():
        assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", text), name
        assert re.search(r"\bSTG\.E(\.\w+)*\.128\b", text), name
    scales = {name: text for name, text in code.items() if "thresholds" in name}
    assert len(scales) == 8
    for name, text in scales.items():
        assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", text), name
        assert re.search(r"\bATOMS\.POPC\.INC\b", text), name  # counts, in shared memory
        assert not re.search(r"\b(ATOM|ATOMG|RED)\.", text), name
    for name, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), name
        assert not re.search(r"\bLD\.E\b|\bST\.E\b", text), name  # address spaces are known


# -- on GPUs alone ---------------------------------------------------------------------------------


@gpu
@needs_module
@needs_cpu
def test_stages_run_on_the_current_stream():
    rng = np.random.default_rng(12)
    registers = random_registers(rng, (4, 1 << 16), torch.float32, NOISY.layout)
    out = random_output(rng, (4, 1 << 16), NOISY.layout, torch.float32)
    table, given = torch.tensor(NOISY.table), out.to(CUDA)
    streams = [torch.cuda.Stream(CUDA) for _ in range(2)]
    results = []
    for stream in streams:
        there = on(CUDA, registers)
        bound = backends.get("cuda").bind(there, table, NOISY.layout)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what escapes the stream runs before this is over
            late = given * 1.0
            for row in (0, 1):
                bound.run(row, late, None)
        results.append(there)
    torch.cuda.synchronize()
    reference = backends.get("cpu").bind(registers, table, NOISY.layout)
    for row in (0, 1):
        reference.run(row, out, None)
    for there in results:
        assert_same(there, registers)


@gpu
@needs_module
@needs_cpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_registers_on_another_device_than_the_current_one():
    rng = np.random.default_rng(13)
    other = torch.device("cuda", 1)
    registers = random_registers(rng, (2, 999), torch.float32, NOISY.layout)
    out, table = (
        random_output(rng, (2, 999), NOISY.layout, torch.float32),
        torch.tensor(NOISY.table),
    )
    there = on(other, registers)
    with torch.cuda.device(0):
        backends.get("cuda").bind(there, table, NOISY.layout).run(0, out.to(other), None)
        assert torch.cuda.current_device() == 0
    backends.get("cpu").bind(registers, table, NOISY.layout).run(0, out, None)
    assert_same(there, registers)
    with pytest.raises(ValueError, match="lies on cuda:1"):
        backends.get("cuda").bind(there, table, NOISY.layout).run(0, out.to(CUDA), None)


@gpu
@needs_module
@needs_cpu
@pytest.mark.parametrize("indexed", [False, True])
def test_replay_reads_the_new_table(indexed):
    rng = np.random.default_rng(14)
    registers = random_registers(rng, (3, 50), torch.float32, NOISY.layout, m=torch.bfloat16)
    out, table = random_output(rng, (3, 50), NOISY.layout, torch.float32), torch.tensor(NOISY.table)
    index = torch.tensor([1, 0, 1]) if indexed else None
    there, given = on(CUDA, registers), out.to(CUDA)
    at = torch.zeros(1, dtype=torch.int64, device=CUDA)
    bound = backends.get("cuda").bind(
        there, table, NOISY.layout, index.to(CUDA) if indexed else None, at
    )
    start = on(CUDA, registers)
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream(CUDA))
    with torch.cuda.stream(side):
        bound.run(0, given, None)
    torch.cuda.current_stream(CUDA).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.run(0, given, None)
    for change in range(3):
        table[:, NOISY.layout.columns.index("b_0")] = 0.1 * change
        bound.table.copy_(table)
        row = 0 if indexed else change % 2
        at.fill_(row)
        for a, b in zip(written(there), written(start), strict=True):
            a.copy_(b)
        expected = on(CPU, start)
        expected.seeds.copy_(registers.seeds)
        backends.get("cpu").bind(expected, table, NOISY.layout, index).run(row, out, None)
        graph.replay()
        assert_same(there, expected)
        for a in written(there):
            a.fill_(torch.nan)


@gpu
@needs_module
@needs_cpu
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("state", DTYPES[:2])
def test_a_replay_thresholds_by_the_new_table(state, indexed):
    rng = np.random.default_rng(24)
    layout = Layout(terms=1, branches=2)
    rows = [random_row(rng, layout, with_e=False, draws=k) for k in range(2)]
    for row in rows:
        row[0] = (int(row[0]) & ~CLIP) | EVALUATE | WRITES_X | THRESHOLD
    registers = random_registers(rng, (3, 20_003), state, layout, m=torch.bfloat16)
    outs = [random_output(rng, (3, 20_003), layout, torch.float16) for _ in range(3)]
    index = torch.tensor([1, 0, 1]) if indexed else None
    at = torch.zeros(1, dtype=torch.int64, device=CUDA)
    there, start, given = on(CUDA, registers), on(CUDA, registers), outs[0].to(CUDA)
    table = table_of(*rows)
    table[:, 6:8] = torch.tensor([0.9, 0.5])
    bound = backends.get("cuda").bind(
        there, table, layout, None if index is None else index.to(CUDA), at
    )
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream(CUDA))
    with torch.cuda.stream(side):
        bound.run(0, given, None)
    torch.cuda.current_stream(CUDA).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.run(0, given, None)
    for change, pair in enumerate([(0.3, 0.01), (0.995, 0.5), (1.0, 2.0)]):
        table[:, 6:8] = torch.tensor(pair)
        table[1, 0] = EVALUATE + WRITES_X + (THRESHOLD if change else 0)
        bound.table.copy_(table)
        given.copy_(outs[change])
        row = 0 if indexed else change % 2
        at.fill_(row)
        for a, b in zip(written(there), written(start), strict=True):
            a.copy_(b)
        expected = on(CPU, start)
        backends.get("cpu").bind(expected, table, layout, index).run(row, outs[change], None)
        graph.replay()
        bound.check()
        assert_same(there, expected, change)
        for a in written(there):
            a.fill_(torch.nan)


@gpu
@needs_module
def test_a_table_changed_during_a_capture_is_refused():
    table = torch.tensor(ONE_STAGE.table)
    registers = Registers(x=torch.ones(1, 8, device=CUDA))
    bound = backends.get("cuda").bind(registers, table, ONE_STAGE.layout)
    out = torch.ones(1, 8, device=CUDA)
    table.mul_(1.0)
    with (
        pytest.raises(RuntimeError, match="before a capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        bound.run(0, out, None)
    bound.run(0, out, None)
    torch.cuda.synchronize()


@gpu
@needs_module
@pytest.mark.slow
def test_more_elements_than_a_32_bit_index_counts():
    size = (1 << 31) + 5
    if torch.cuda.mem_get_info(CUDA)[0] < 3 * 2 * size + 4 * size:
        pytest.skip("needs about 20 GiB of device memory")
    x = torch.ones(1, size, device=CUDA)
    out = torch.ones(1, size, dtype=torch.bfloat16, device=CUDA)
    out[0, -3:] = 3.0
    bound = backends.get("cuda").bind(
        Registers(x=x), torch.tensor(ONE_STAGE.table), ONE_STAGE.layout
    )
    bound.run(0, out, None)
    bound.check()
    assert bool((x[0, :-3] == 2.5).all())
    assert x[0, -3:].tolist() == [6.5, 6.5, 6.5]
