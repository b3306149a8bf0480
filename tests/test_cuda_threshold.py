# SPDX-License-Identifier: Apache-2.0
"""Thresholds of the CUDA backend, on a host in a GPU's place and on GPUs."""

import itertools

import numpy as np
import pytest
import torch
from support.gpu import ONE_STAGE, assert_same, fields, moved, needs_cpu, on
from support.rows import (
    DTYPES,
    random_output,
    random_registers,
    random_row,
    raw,
    table_of,
)

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.plans import CLIP, EVALUATE, THRESHOLD, WRITES_X, Layout, Plan, Stage

SIZES = [0, 1, 3, 4, 16, 63, 65, 1023, 1024, 1025, 5000]

CPU = torch.device("cpu")


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
    plan = thresholds(0.9, 1.0)
    table = torch.tensor(plan.table)
    table[:, plan.layout.column("floor")] = 1e99
    for state in DTYPES[:2]:
        registers = Registers(x=torch.ones(2, 8, dtype=state, device=device))
        if state == torch.float64:
            backends.get("cuda").bind(registers, table, plan.layout)
            continue
        with pytest.raises(ValueError, match="positive floor"):
            backends.get("cuda").bind(registers, table, plan.layout)


def test_samples_too_large_to_count_are_refused(host_core):
    plan = thresholds(0.9, 1.0)
    table, none = torch.tensor(plan.table), torch.tensor(ONE_STAGE.table)

    def stage(size: int) -> object:
        return host_core.Stage(fields(x=1 << 40, batch=1, size=size))

    stage((1 << 32) - 1).check_table(table.data_ptr())
    stage(1 << 32).check_table(none.data_ptr())
    with pytest.raises(NotImplementedError, match=r"2\^32 elements; got 4294967296\."):
        stage(1 << 32).check_table(table.data_ptr())
