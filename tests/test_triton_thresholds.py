# SPDX-License-Identifier: Apache-2.0
"""Thresholds in Triton: each sample's scale, and rows that use one."""

import numpy as np
import pytest
import torch
from support.core import needs_core as CORE
from support.interpreted import (
    FUSES,
    HERE,
    after,
    as_table,
    moved,
    poison_unread,
    same,
    takes_few,
    thresholds,
)
from support.rows import DTYPES, random_output, random_registers, random_row, raw

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.plans import (
    EVALUATE,
    THRESHOLD,
    WRITES_X,
    Layout,
    Plan,
    Stage,
)

triton = pytest.importorskip("triton")
F32, F64, BF16, F16 = DTYPES


# -- thresholds ------------------------------------------------------------------------------------


def thresholded(name, out, quantile, floor, device="cpu", state=None) -> torch.Tensor:
    plan = thresholds(quantile, floor)
    x = torch.full(out.shape, torch.nan, dtype=state or out.dtype, device=device)
    stage = backends.get(name).bind(Registers(x=x), as_table(plan), plan.layout)
    stage.run(0, out.to(device), None)
    return x.cpu()


def magnitudes_of_all_kinds(rng, n: int, state) -> torch.Tensor:
    """Samples [8, n] whose order is easy, tied, degenerate; the last three with NaN and inf."""
    odd = rng.normal(size=(3, n))
    odd[0, rng.integers(n)] = np.nan
    odd[1, rng.random(n) < 0.6] = -np.inf
    odd[2] = np.where(rng.random(n) < 0.5, np.inf, -np.nan)
    values = [
        rng.normal(size=n),
        rng.integers(-3, 4, n),
        rng.choice([0.0, -0.0], n),
        rng.normal(size=n) * 10.0 ** rng.integers(-30, 30, n),
        # neighbours that differ in every bit, the greater once
        1.0 - (np.arange(n) > 0) * torch.finfo(state).eps / 2,
        *odd,
    ]
    return torch.from_numpy(np.stack(values)).to(state)


# floors above and below; the sizes end in, at and past a tile of the scales
LEVELS = [(1e-7, 1e-3), (0.5, 2.0), (0.9, 1e-3), (0.995, 1.0), (1.0, 1e-3)]


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(
    ("state", "size"),
    [*((F32, n) for n in (1, 2, 31, 1025, 4096, 5000)), *((F64, n) for n in (31, 2049))],
    ids=lambda v: str(v).removeprefix("torch."),
)
@CORE
@FUSES
def test_a_threshold_gives_the_bits_of_the_compiled_core(device, state, size):
    out = magnitudes_of_all_kinds(np.random.default_rng(size), size, state)
    # the interpreter takes a second for each
    for level in LEVELS if device == "cuda" else LEVELS[size % 3 :: 3 if state == F32 else 5]:
        wanted, got = thresholded("cpu", out, *level), thresholded("triton", out, *level, device)
        number = ~wanted.isnan()
        assert raw(got[number]) == raw(wanted[number]), level
        assert bool(got[~number].isnan().all()), level


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64], ids=["float32", "float64"])
def test_a_threshold_is_the_quantile_of_each_sample(device, state):
    for size, (quantile, floor) in ((2, LEVELS[1]), (2, LEVELS[2]), (1500, LEVELS[3])):
        out = magnitudes_of_all_kinds(np.random.default_rng(size), size, state)[:5]
        s = torch.quantile(out.double().abs(), quantile, dim=1).clamp(min=floor).to(state)[:, None]
        wanted = out.clamp(-s, s) / s
        got = thresholded("triton", out, quantile, floor, device)
        # s may fall on the other side of a rounding, then the quotient too
        bound = 2 * torch.finfo(state).eps * (1 + wanted.abs())
        assert bool(((got - wanted).abs() <= bound).all()), (size, quantile, floor)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [BF16, F16], ids=["bfloat16", "float16"])
@CORE
def test_a_sixteen_bit_state_is_thresholded_in_float32(device, state):
    out = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1025))).to(state)
    wanted = thresholded("cpu", out.float(), 0.9, 0.5).to(state)
    assert raw(thresholded("triton", out, 0.9, 0.5, device)) == raw(wanted)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64], ids=["float32", "float64"])
@CORE
@FUSES
def test_rows_with_a_threshold_give_the_bits_of_the_compiled_core(device, state):
    rng = np.random.default_rng(31)
    for case in range(15 if state == F32 and not takes_few(device) else 5):
        # 17 samples share a program of the stage where they are short
        batch, size = [(1, 1100), (3, 200), (17, 6), (2, 48), (3, 1)][case % 5]
        layout = Layout(terms=case % 4, branches=case % 2 + 1, extras=case % 3 // 2)
        with_e, draws = case % 4 > 0, case // 2 % 3
        rows = [random_row(rng, layout, with_e, draws, clip=k == 1) for k in range(4)]
        for row in rows[2:]:
            row[0] = int(row[0]) | EVALUATE | WRITES_X | THRESHOLD
            row[layout.column("quantile")] = rng.choice([0.3, 0.9, 0.995, 1.0])
            row[layout.column("floor")] = rng.choice([0.1, 0.5, 1.0])
            row[layout.column("ceiling")] = np.inf
            row[[layout.column(name) for name in ("push", "push_x", "k_0")]] = 4, 3, 1.5
        m = [None, *DTYPES][case % 5]
        registers = random_registers(rng, (batch, size), state, layout, with_e, m)
        room = random_output(rng, (batch, size + 16), layout, DTYPES[-case % 4])
        # contiguous, and strided at addresses that are multiples of 16 bytes and that are not
        out = [room[:, :size].contiguous(), room[:, :size], room[:, 3 : size + 3]][case % 3]
        index = torch.from_numpy(rng.permuted(np.arange(batch) % 4)) if case % 5 else None
        used = rows[3:] if index is None else [rows[i] for i in sorted(set(index.tolist()))]
        poison_unread(registers, used, layout, out)
        row = 3 if index is None else 0
        wanted = after("cpu", registers, rows, layout, out.contiguous(), None, index, row)
        copies = moved(registers, device)
        there = room.to(device).as_strided(out.shape, out.stride(), out.storage_offset())
        if case % 3 == 0:
            there = out.to(device)
        run = backends.get("triton").bind(
            *(copies, torch.from_numpy(np.stack(rows)), layout),
            None if index is None else index.to(device),
        )
        run(row, there, None)
        assert same(moved(copies, "cpu"), wanted), case


@pytest.mark.parametrize("device", HERE)
def test_the_quantile_is_a_float64_number(device):
    # at 0.9 the position is 900 exactly; 0.9 in float32 falls short of it
    out = torch.zeros(1, 1001, device=device)
    out[:, :101] = 4.0
    plan, x = thresholds(0.9, 1.0), torch.full_like(out, torch.nan)
    table = as_table(plan)
    run = backends.get("triton").bind(Registers(x=x), table, plan.layout)
    run(0, out, None)
    assert torch.equal(x, out / 4)
    quantile = plan.layout.column("quantile")
    assert run.exact[0, quantile].item() == 0.9
    run.exact[0, quantile] = 0.5  # in place on the device
    run(0, out, None)
    assert torch.equal(x, out.clamp(max=1.0))
    run.table[0, plan.layout.column("floor")] = 2.0
    run(0, out, None)
    assert torch.equal(x, out.clamp(max=2.0) / 2)
    table[0, quantile] = 1.0
    run(0, out, None)
    assert torch.equal(x, out / 4)


@pytest.mark.parametrize("device", HERE)
def test_only_rows_that_evaluate_and_threshold_are_given_a_scale(device):
    stages = (
        Stage(t=1.0, a_x=0.0, b=(1.0,), threshold=(0.5, 1.0)),
        Stage(t=0.7, a_x=0.0, b=(1.0,)),
        Stage(t=0.5, a_x=0.5, evaluate=False, threshold=(0.5, 1.0)),
    )
    plan = Plan(stages=stages, times=(1.0, 0.7, 0.5, 0.0), variable="x0")
    for size in (5, 1500):
        x, out = torch.ones(5, size, device=device), torch.full((5, size), 8.0, device=device)
        index = torch.tensor([0, 1, 2, 3, -1], device=device)
        run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout, index)
        run._scale.fill_(torch.nan)
        run(0, out, None)
        assert x.unique(dim=1).tolist() == [[1.0], [8.0], [0.5], [1.0], [1.0]]
        assert run._scale.isnan().tolist() == [False, True, True, True, True]
        run(0, None, None)  # none of those that run evaluates
        assert x.unique(dim=1).tolist() == [[1.0], [8.0], [0.25], [1.0], [1.0]]


@pytest.mark.gpu
def test_a_captured_threshold_reads_its_levels_at_replay():
    plan = thresholds(0.5, 1.0)
    out = torch.randn(4, 3001, device="cuda")
    x = torch.full_like(out, torch.nan)
    row = torch.zeros(1, dtype=torch.int64, device="cuda")
    run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout, None, row)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0, out, None)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0, out, None)
    for quantile, floor in ((0.5, 0.1), (0.9, 0.1), (0.9, 5.0), (1.0, 5.0)):
        x.fill_(torch.nan)
        run._scale.fill_(torch.nan)
        out.normal_(std=3.0)
        run.exact[:, plan.layout.column("quantile")] = quantile
        run.table[0, plan.layout.column("floor")] = floor
        graph.replay()
        assert raw(x.cpu()) == raw(thresholded("torch", out.cpu(), quantile, floor))
    row.fill_(1)
    x.fill_(2.0)
    graph.replay()
    assert bool((x == 2.0).all())
