# SPDX-License-Identifier: Apache-2.0
"""Thresholds on torch and cpu: the quantile of each sample, and what it depends on."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from support.core import INSTRUCTION_SETS, native, needs_core
from support.rows import (
    DTYPES,
    copied,
    random_registers,
    random_row,
    same,
    table_of,
    written,
)

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.plans import (
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_X,
    Layout,
    Plan,
    Stage,
)

BACKENDS = [
    pytest.param(name, marks=needs_core if name == "cpu" else ()) for name in ("torch", "cpu")
]
SIZES = [0, 1, 3, 15, 16, 63, 65, 1023, 1024, 1025, 5000]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- thresholds --------------------------------------------------------------------------------


def thresholds(quantile: float, floor: float, **fields) -> Plan:
    """A plan of one stage, x' = threshold(out) unless `fields` say otherwise."""
    stage = Stage(t=1.0, **{"a_x": 0.0, "b": (1.0,), **fields}, threshold=(quantile, floor))
    return Plan(stages=(stage,), times=(1.0, 0.0), variable="x0")


def thresholded(name: str, out: torch.Tensor, quantile: float, floor: float) -> torch.Tensor:
    plan = thresholds(quantile, floor)
    registers = Registers(x=torch.full_like(out, torch.nan))
    backends.get(name).bind(registers, torch.tensor(plan.table), plan.layout).run(0, out, None)
    return registers.x


VALUES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "ties": lambda rng, shape: rng.integers(-3, 4, shape).astype(float),
    "zeros": lambda rng, shape: np.zeros(shape),
    "scales": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, shape),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("state", DTYPES[:2])
def test_a_threshold_is_the_quantile_of_each_sample(name, values, state):
    rng = np.random.default_rng(20)
    for n, q, floor in itertools.product(
        (1, 2, 3, 1000, 1024, 1025, 4097), (0.01, 0.5, 0.9, 0.995, 1.0), (1e-3, 1.0)
    ):
        out = torch.from_numpy(VALUES[values](rng, (3, n))).to(state)
        magnitudes = out.double().abs()
        s = torch.quantile(magnitudes, q, dim=1).clamp(min=floor).to(state)[:, None]
        wanted = out.clamp(-s, s) / s
        got = thresholded(name, out, q, floor)
        # s may fall on the other side of a rounding, then the quotient too
        bound = 2 * torch.finfo(state).eps * (1 + wanted.abs())
        assert bool(((got - wanted).abs() <= bound).all()), (n, q, floor)
        assert same(got, thresholded("torch", out, q, floor)), (n, q, floor)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_threshold_is_dpm_solvers(name):
    def dynamic_thresholding_fn(x0, ratio, max_val):
        s = np.quantile(np.abs(x0).reshape(len(x0), -1), ratio, axis=1)
        s = np.maximum(s, max_val * np.ones_like(s))
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return np.clip(x0, -s, s) / s

    x0 = np.random.default_rng(21).normal(size=(4, 3, 16, 17)) * [
        [[[0.2]]],
        [[[1]]],
        [[[3]]],
        [[[9]]],
    ]
    got = thresholded(name, torch.from_numpy(x0), 0.995, 1.0)
    np.testing.assert_allclose(got, dynamic_thresholding_fn(x0, 0.995, 1.0), rtol=1e-14)
    assert bool((got[0] == torch.from_numpy(x0[0])).all())  # below the floor of 1 nothing changes


@needs_core
@pytest.mark.parametrize(
    ("state", "out_dtype"), list(itertools.product(DTYPES[:2], DTYPES)), ids=lambda d: str(d)[6:]
)
def test_rows_with_a_threshold_run_alike_on_cpu_and_torch(instruction_set, state, out_dtype):
    rng = np.random.default_rng(22)
    for case in range(24):
        size, batch = [1, 17, 200, 1100, 3000][case % 5], case % 3 + 1
        layout = Layout(terms=case % 4, branches=case % 2 + 1, extras=case % 3 // 2)
        rows = [random_row(rng, layout, True, draws=k % 3) for k in range(batch + 1)]
        for row in rows[case % 2 :]:  # in every other case a row among them thresholds nothing
            row[0] = (int(row[0]) & ~CLIP) | EVALUATE | WRITES_X | WRITES_E | THRESHOLD
            limits = layout.column("quantile")
            row[limits : limits + 2] = rng.choice([0.3, 0.9, 0.995, 1.0]), rng.choice([0.5, 1.0])
            row[1], row[layout.columns.index("push_x")] = 5, 4
        registers = random_registers(rng, (batch, size), state, layout, True, torch.float32)
        registers.m.zero_()
        wide = torch.from_numpy(rng.normal(size=(layout.branches * batch, size + 3))).to(out_dtype)
        out = wide[:, 1:-2] if case % 4 < 2 else wide[:, 1:-2].contiguous()
        index = torch.from_numpy(rng.permutation(batch + 1)[:batch]) if case % 3 else None
        results = []
        for name in ("cpu", "torch"):
            after = copied(registers)
            backends.get(name).bind(after, table_of(*rows), layout, index).run(
                int(index is None), out, None
            )
            results.append(written(after))
        for a, b in zip(*results, strict=True):
            # some thirty roundings of sums of a dozen terms, divided by s >= 1/2
            bound = 60 * torch.finfo(state).eps * (1 + b.double().abs().max())
            bound = bound + torch.finfo(torch.float32).eps * b.abs() * (a.dtype != state)
            assert bool(((a.double() - b.double()).abs() <= bound).all()), case


@needs_core
@pytest.mark.parametrize("state", DTYPES[:2])
def test_a_thresholded_sample_depends_on_nothing_but_itself(instruction_set, threads, state):
    rng = np.random.default_rng(23)
    for size in (1, 70, 3000, 90_001):
        plan = thresholds(0.9, 0.5, p=0.3, a_x=0.7, b=(0.4,), c=0.2, noise=((3, 1.0),))
        layout = dataclasses.replace(plan.layout, branches=2)
        table = torch.from_numpy(plan.pack((-1.0, 2.0)))
        registers = random_registers(rng, (5, size), state, layout, m=torch.bfloat16)
        wide = torch.from_numpy(rng.normal(size=(10, size + 1))).to(torch.bfloat16)
        results = []
        for count, out in itertools.product((1, 2, 5), (wide[:, 1:], wide[:, 1:].contiguous())):
            threads(count)
            after = copied(registers)
            backends.get("cpu").bind(after, table, layout).run(0, out, None)
            results.append(written(after))
        for result in results[1:]:
            assert all(same(a, b) for a, b in zip(results[0], result, strict=True))
        for b in range(5):
            alone = Registers(
                x=registers.x[b : b + 1].clone(),
                m=torch.full((2, size), torch.nan, dtype=torch.bfloat16),
                seeds=registers.seeds[b : b + 1],
            )
            out = wide[b::5, 1:].contiguous()
            backends.get("cpu").bind(alone, table, layout).run(0, out, None)
            assert same(alone.x[0], results[0][0][b])
            assert same(alone.m, results[0][2][b::5])


@needs_core
def test_all_instruction_sets_threshold_to_the_same_bits():
    rng, before, results = np.random.default_rng(24), native.instruction_set(), []
    out = torch.from_numpy(rng.normal(size=(2, 5001))).float()
    for name in INSTRUCTION_SETS:
        native.use_instruction_set(name)
        results.append(thresholded("cpu", out, 0.97, 0.1))
    native.use_instruction_set(before)
    assert all(same(results[0], result) for result in results)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_history_keeps_the_thresholded_output(name):
    stages = (
        Stage(t=1.0, a_x=0.0, b=(1.0,), threshold=(0.5, 0.1)),
        Stage(t=0.5, a_x=0.0, b=(0.0, 1.0)),
    )
    plan = Plan(stages=stages, times=(1.0, 0.0), variable="x0")
    registers = Registers(x=torch.zeros(2, 50), history=torch.full((plan.slots, 2, 50), torch.nan))
    bound = backends.get(name).bind(registers, torch.tensor(plan.table), plan.layout)
    out = torch.randn(2, 50)
    bound.run(0, out, None)
    first = registers.x.clone()
    assert float(first.abs().max()) == 1.0
    bound.run(1, out, None)
    assert same(registers.x, first)


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_in_one_sample_stays_there(name):
    for size in (1, 3, 5000):
        out = torch.randn(3, size)
        wanted = thresholded(name, out, 0.9, 0.5)
        out[1, 0] = torch.nan
        got = thresholded(name, out, 0.9, 0.5)
        assert bool(got[1, 0].isnan())
        assert same(got[::2], wanted[::2])
        for bad in (torch.nan, torch.inf):
            assert thresholded(name, torch.full((2, size), bad), 0.9, 0.5).shape == (2, size)
    assert thresholded(name, torch.ones(3, 0), 0.9, 0.5).shape == (3, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_stage_without_evaluation_thresholds_nothing(name):
    plan = thresholds(0.5, 0.1, evaluate=False, a_x=0.5, b=())
    registers = Registers(x=torch.full((2, 8), 4.0))
    backends.get(name).bind(registers, torch.tensor(plan.table), plan.layout).run(0, None, None)
    assert bool((registers.x == 2.0).all())
