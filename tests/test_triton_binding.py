# SPDX-License-Identifier: Apache-2.0
"""A bound Triton stage: its table, its launches, and what it refuses."""

import dataclasses
import importlib
import itertools

import numpy as np
import pytest
import torch
from support.core import needs_core as CORE
from support.interpreted import FUSES, HERE, INTERPRETED, after, as_table, moved, same, thresholds
from support.rows import DTYPES, random_output, random_registers, random_row

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.backends import triton as backend_module
from fastdiff.backends.triton import launches
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
from fastdiff.plans import layout as L

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
stage_module = pytest.importorskip("fastdiff.kernels.stage")
threshold_module = pytest.importorskip("fastdiff.kernels.threshold")
reduce_module = pytest.importorskip("fastdiff.kernels.reduce")
F32, F64, BF16, F16 = DTYPES

# -- columns ---------------------------------------------------------------------------------------


def test_columns_and_codes_are_those_of_plans():
    """Each constant has the name of its column, in capitals."""
    constants = vars(importlib.import_module("fastdiff.kernels.columns"))
    found = {name: v.value for name, v in constants.items() if isinstance(v, tl.constexpr)}
    groups = {"TERM": L.TERM, "BRANCH": L.BRANCH, "EXTRA": L.EXTRA, "PRODUCT": L.PRODUCT}
    groups |= {"MEASURE": L.MEASURE, "HEAD": L.HEAD}
    wanted = {name.upper(): i for group in groups.values() for i, name in enumerate(group)}
    wanted |= {f"{name}_WIDTH": len(group) for name, group in groups.items()}
    wanted |= {f"INTO_{name.upper()}": i for i, name in enumerate(L.INTO)}
    wanted |= {f"OF_{name.upper()}": i for i, name in enumerate(L.OF)}
    wanted |= {name.upper(): i for i, name in enumerate(L.REDUCTIONS) if name != "quantile"}
    wanted |= {"ORDER": L.REDUCTIONS.index("quantile"), "TERM_AT": Layout(terms=3).term_offset}
    wanted |= {name: v for name, v in vars(L).items() if isinstance(v, int)}  # flags
    wanted |= {"NUM": L.MEASURE.index("num_kind"), "DEN": L.MEASURE.index("den_kind")}
    for name, column in (
        *(("KIND", "kind"), ("FIRST", "a"), ("FIRST_AT", "a_at"), ("SECOND", "b")),
        *(("SECOND_AT", "b_at"), ("RANK", "rank")),
    ):
        places = [L.MEASURE.index(f"{part}_{column}") for part in ("num", "den")]
        wanted[name] = places[0] - wanted["NUM"] == places[1] - wanted["DEN"] and (
            places[0] - wanted["NUM"]
        )
    assert len(found) > 80
    assert found == {name: wanted[name] for name in found}


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", HERE)
def test_the_table_is_read_at_every_call(device):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
    b_0 = plan.layout.column("b_0")
    table = as_table(plan)
    x = torch.ones(1, 8, device=device)
    ones, nans = torch.ones(1, 8, device=device), torch.full((1, 8), torch.nan, device=device)
    run = backends.get("triton").bind(Registers(x=x), table, plan.layout)
    run(0, ones, None)
    assert x.tolist() == [[2.5] * 8]
    table[0, b_0] = 0.0  # seen by version
    run(0, nans, None)
    assert x.tolist() == [[1.25] * 8]
    run.table[0, b_0] = 1.0  # in place on the device
    run(0, ones, None)
    assert x.tolist() == [[1.625] * 8]
    table.numpy()[0, b_0] = 3.0  # not seen by PyTorch
    run.refresh(table)
    run(0, ones, None)
    assert x.tolist() == [[3.8125] * 8]


@pytest.mark.parametrize("device", HERE)
def test_a_table_that_needs_another_kernel_is_refused(device):
    stage = Stage(t=1.0, a_x=0.5, c=1.0, b=(1.0,), noise=((1, 1.0),))
    plan = Plan(stages=(stage,), times=(1.0, 0.0), variable="x0")
    x, seeds = torch.ones(1, 8, device=device), torch.ones(1, dtype=torch.int64, device=device)
    run = backends.get("triton").bind(Registers(x=x, seeds=seeds), as_table(plan), plan.layout)
    for change in (
        {"noise": ((1, 1.0), (2, 1.0))},
        {"clip": (-1.0, 1.0)},
        {"threshold": (0.9, 1.0)},
    ):
        other = dataclasses.replace(plan, stages=(dataclasses.replace(stage, **change),))
        with pytest.raises(ValueError, match="Bind it anew"):
            run.refresh(as_table(other))
    with pytest.raises(ValueError, match=r"float64 \[1, 38\] on the CPU; got .*\[2, 38\]"):
        run.refresh(torch.zeros(2, 38, dtype=F64))


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("own", [False, True])
@CORE
@FUSES
def test_the_row_may_stand_on_the_device(device, own):
    rng = np.random.default_rng(12)
    layout = Layout(terms=2, branches=1)
    rows = [random_row(rng, layout, True, 1, False) for _ in range(4)]
    registers = random_registers(rng, (3, 70), F32, layout, True, F16)
    out = random_output(rng, (3, 70), layout, F16)
    index = torch.tensor([0, 1, 0]) if own else None
    start, there = torch.tensor([0], device=device), moved(registers, device)
    bind = backends.get("triton").bind
    indexed = index.to(device) if own else None
    run = bind(there, torch.from_numpy(np.stack(rows)), layout, indexed, start)
    for i in (1, 2):
        start.fill_(i)
        registers = after("cpu", registers, rows, layout, out, None, index, i)
        run(0, out.to(device), None)
        assert same(moved(there, "cpu"), registers)
    start.fill_(4)
    run(0, out.to(device), None)
    assert same(moved(there, "cpu"), registers)


@pytest.mark.parametrize("device", HERE)
def test_a_sample_whose_row_is_outside_the_table_is_left_alone(device):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
    for size in (8, 1500):
        x = torch.ones(3, size, device=device)
        index = torch.tensor([0, 1, -1], device=device)
        run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout, index)
        run(0, torch.ones(3, size, device=device), None)
        assert x[:, 0].tolist() == [2.5, 1.0, 1.0]


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draws", "own"), [(0, False), (1, False), (0, True)])
@pytest.mark.parametrize("batch", [1, 3, 64, 500])
@pytest.mark.parametrize("size", [1, 3, 16, 64, 1000, 1023, 1025, 2**20, 2**31 + 3])
def test_tiles_cover_every_element_once(batch, size, draws, own):
    (programs, _, _), (b, units, _), constants = launches.launch_shape(
        batch, size, size, draws, own, 1024
    )
    rows, cols = constants["SAMPLES"], constants["COLS"]
    n = units * constants["UNIT"]
    assert b * n == batch * size
    assert rows * cols <= 1024
    assert cols >= n or rows == 1
    assert programs == -(-b // rows) * -(-n // cols)
    if batch * size >= 2**15 and size >= 16:
        assert programs * 1024 < 2.1 * batch * size  # small samples fill their tiles


def test_a_launch_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(ValueError, match="Split the batch"):
        launches.launch_shape(2**20, 2**22, 2**22, 1, False, 1024)
    with pytest.raises(ValueError, match="Split the batch"):
        launches.sample_shape(2**31, 1, 4)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize("of", ["stage", "scale", "measure"])
def test_later_launches_pass_what_the_first_passed(monkeypatch, of):
    # a compiled kernel is called with all arguments in order, past the look-up of the first launch
    class Kernel:
        def __init__(self, kernel):
            self.names = self.arg_names = kernel.arg_names
            self.launches = []

        def __getitem__(self, grid):
            def first(*args, num_warps, enable_fp_fusion, maxnreg=None, **constants):
                self.launches.append((grid, dict(zip(self.names, args, strict=False)) | constants))
                assert not enable_fp_fusion
                return Binary(self)

            return first

    class Binary:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names, launches = self.kernel.names, self.kernel.launches
            return lambda *args: launches.append((grid, dict(zip(names, args, strict=True))))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    layout = Layout(terms=2, branches=2, extras=1, measures=1)
    registers = random_registers(np.random.default_rng(0), (3, 20), F32, layout, True, BF16)
    registers = dataclasses.replace(registers, scalars=torch.zeros(3, 1))
    row = L.PackedRow()
    if of == "scale":
        row = L.PackedRow(flags=EVALUATE + THRESHOLD, quantile=1.0, floor=1.0)
    if of == "measure":
        row.measures = (L.PackedMeasure(0, L.PackedReduction("sum", ("x", 0))),)
    table = torch.from_numpy(L.encode([row] * 2, layout))
    stage = backends.get("triton").bind(registers, table, layout)
    kernels = {}
    modules = {"stage": stage_module, "scale": threshold_module, "measure": reduce_module}
    for name, module in modules.items():
        kernels[name] = Kernel(getattr(module, f"{name}_kernel"))
        monkeypatch.setattr(module, f"{name}_kernel", kernels[name])
    monkeypatch.setattr(launches, "interpreting", lambda: False)
    seen, names = kernels[of].launches, kernels[of].names
    outputs = [torch.zeros(6, 20), torch.zeros(6, 20), torch.zeros(6, 40)[:, :20]]
    for i, out in enumerate((outputs[0], outputs[1], outputs[2], outputs[2])):
        stage.measure(i % 2, out, None)
        stage.run(i % 2, out, None)
        grid, arguments = seen[-1]
        assert len(grid) == 3
        assert arguments["p_out"] is out
        assert arguments["row"] == i % 2
    assert len(seen) == 4
    assert len(kernels["stage"].launches) == 4
    assert len(kernels["scale"].launches) == 4 * (of == "scale")
    assert len(kernels["measure"].launches) == 4 * (of == "measure")
    for first, later in (seen[:2], seen[2:]):
        assert first[0] == later[0]
        assert list(first[1]) == list(later[1]) == names
        assert all(
            later[1][name] is first[1][name]
            for name in names
            if name
            not in ("p_out", "row", "rows", "batch", "size_units", "out_units", "first_quad")
        )
    assert seen[0][1]["OUT_UNIT"] == 0
    assert seen[2][1]["OUT_UNIT"] == 4


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    size = 2**31 + 40
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(1.0,)),), times=(1.0, 0.0))
    x = torch.ones(1, size, dtype=BF16, device="cuda")
    out = torch.ones(1, size, dtype=BF16, device="cuda")
    backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)(0, out, None)
    assert bool((x == 1.5).all())
    plan = thresholds(1 - 2**-27, 0.5)
    out[:, -9:] = 8.0  # the highest nine lie past the position
    out[:, 2**20 : 2**20 + 9] = -4.0
    backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)(0, out, None)
    assert x[:, -10:].tolist() == [[0.25] + [1.0] * 9]
    assert bool((x[:, 2**20 : 2**20 + 9] == -1.0).all())


@pytest.mark.gpu
def test_a_captured_stage_reads_the_table_at_replay():
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(1.0,)),), times=(1.0, 0.0))
    x, out = torch.ones(4, 300, device="cuda"), torch.ones(4, 300, device="cuda")
    run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0, out, None)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0, out, None)
    for coefficient in (1.0, 3.0):
        x.fill_(2.0)
        run.table[0, plan.layout.column("b_0")] = coefficient
        graph.replay()
        assert bool((x == 1.0 + coefficient).all())


# -- mistakes --------------------------------------------------------------------------------------

PLAN = Plan(stages=(Stage(t=1.0, b=(1.0,)),), times=(1.0, 0.0))
ROOM = torch.ones(3, 4)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x is \[B, \.\.\.\]"),
        ({"x": torch.ones(4, 2).t()}, ValueError, r"Pass x\.contiguous\(\)"),
        ({"x": torch.ones(2, 4, dtype=torch.int32)}, NotImplementedError, "got torch.int32"),
        ({"x": torch.ones(2, 4, device="meta")}, NotImplementedError, 'got meta. Use backend="t'),
        ({"m": torch.ones(2, 4, dtype=torch.int8)}, NotImplementedError, "networks in float32, "),
        ({"m": torch.ones(3, 4)}, ValueError, r"m is \[2, 4\]; got \[3, 4\]"),
        ({"e": torch.ones(2, 4).double()}, TypeError, "e is torch.float32; got torch.float64"),
        ({"e": torch.ones(2, 4, device="meta")}, ValueError, r"Move e: e\.to\('cpu'\)"),
        ({"history": torch.ones(1, 2, 5)}, ValueError, r"history is \[1, 2, 4\]"),
        ({"seeds": torch.ones(3, dtype=torch.int64)}, ValueError, r"seeds is \[2\]"),
        ({"bank": torch.ones(1, 2, 5)}, ValueError, r"bank is \[1, 2, 4\]; got \[1, 2, 5\]"),
        ({"x": ROOM[:2], "e": ROOM[1:]}, ValueError, r"x and e overlap. Pass e\.clone\(\)"),
        ({"x": ROOM[:2], "m": ROOM[:2]}, ValueError, "x and m overlap"),
        (
            {"x": torch.frombuffer(bytearray(36), dtype=F32, offset=1, count=8).view(2, 4)},
            *(ValueError, "aligned to its 4-byte elements"),
        ),
    ],
)
def test_wrong_registers_are_refused_when_bound(change, error, message):
    registers = dataclasses.replace(Registers(x=torch.ones(2, 4)), **change)
    with pytest.raises(error, match=message):
        backends.get("triton").bind(registers, as_table(PLAN), PLAN.layout)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (torch.ones(1, 38), TypeError, "table is torch.float64; got torch.float32"),
        (torch.ones(1, 20, dtype=F64), ValueError, r"table is \[rows, 38\]; got \[1, 20\]"),
        (torch.ones(1, 38, dtype=F64, device="meta"), ValueError, r"Pass table\.cpu\(\)"),
    ],
)
def test_a_wrong_table_is_refused_when_bound(table, error, message):
    with pytest.raises(error, match=message):
        backends.get("triton").bind(Registers(x=torch.ones(2, 4)), table, PLAN.layout)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"flags": 128}, "known bits; row 1 has flags = 128"),
        ({"flags": np.nan}, "flags"),
        ({"push": 6}, "history has 6 slots; row 1 has push = 6"),
        ({"slot_0": -1}, "history has 6 slots; row 1 has slot_0 = -1"),
        ({"slot_0": 0.5}, "slots"),
        ({"n_terms": 2}, "fit the layout"),
        ({"draws": 3}, "fit the layout"),
        ({"stream_1": -1}, "streams"),
        ({"stream_1": 2**24 + 1}, "streams"),
        ({"a_e": 1.0}, r"Registers\.e"),
        ({"flags": WRITES_E}, r"Registers\.e"),
        ({"flags": WRITES_X}, "without an evaluation"),
        ({"flags": EVALUATE + THRESHOLD, "floor": 1.0}, r"a quantile in \(0, 1\].*row 1"),
        ({"flags": EVALUATE + THRESHOLD, "quantile": 1.1, "floor": 1.0}, "a quantile"),
        ({"flags": EVALUATE + THRESHOLD, "quantile": np.nan, "floor": 1.0}, "a quantile"),
        ({"flags": EVALUATE + THRESHOLD, "quantile": 0.5}, "positive floor"),
        ({"flags": EVALUATE + THRESHOLD, "quantile": 0.5, "floor": 1e99}, "floor"),
        ({"flags": EVALUATE + THRESHOLD, "quantile": 0.5, "floor": 1e-99}, "floor"),
        ({"flags": EVALUATE + CLIP + THRESHOLD, "quantile": 0.5, "floor": 1.0}, "without a clip"),
    ],
)
def test_a_table_that_would_corrupt_memory_is_refused_when_bound(edit, message):
    stage = Stage(t=0.5, a_x=0.5, b=(1.0, 1.0), c=1.0, noise=((1, 1.0),))
    plan = Plan(stages=(Stage(t=1.0, b=(1.0,)), stage), times=(1.0, 0.0))
    table = as_table(plan)
    for name, value in edit.items():
        table[1, plan.layout.column(name)] = value
    registers = random_registers(np.random.default_rng(9), (2, 50), F32, plan.layout)
    with pytest.raises(ValueError, match=message):
        backends.get("triton").bind(registers, table, plan.layout)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("row", "out", "xi", "error", "message"),
    [
        (0, None, None, ValueError, "Give out"),
        (0, torch.ones(2, 5), None, ValueError, r"\[2, 4\].*got \[2, 5\]"),
        (0, torch.ones(2, 4, dtype=torch.int32), None, TypeError, "got torch.int32"),
        (0, torch.ones(2, 4, device="meta"), None, ValueError, "lies on cpu.*got meta"),
        (0, torch.ones(2, 4), torch.ones(2, 3), ValueError, r"xi is \[2, 4\]; got \[2, 3\]"),
        (0, torch.ones(2, 4), torch.ones(2, 4).double(), TypeError, "xi is torch.float32"),
        (0, torch.ones(2, 4), torch.ones(2, 4, device="meta"), ValueError, "xi lies on cpu"),
        (2, torch.ones(2, 4), None, IndexError, r"\[0, 2\).*got 2"),
        (-1, torch.ones(2, 4), None, IndexError, "got -1"),
        (1, torch.ones(2, 4), None, ValueError, r"Bind Registers\.seeds, or give xi"),
    ],
)
def test_a_wrong_call_is_named_and_writes_nothing(row, out, xi, error, message):
    noisy = Stage(t=0.5, b=(1.0,), c=1.0, noise=((1, 1.0),))
    plan = Plan(stages=(*PLAN.stages, noisy), times=(1.0, 0.0))
    x = torch.ones(2, 4)
    run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)
    with pytest.raises(error, match=message):
        run(row, out, xi)
    assert torch.equal(x, torch.ones(2, 4))


# -- choosing --------------------------------------------------------------------------------------


def test_the_interpreter_is_never_chosen_unasked():
    for state, network_dtype in itertools.product(DTYPES, DTYPES):
        chosen = backends.choose(None, state, network_dtype, torch.device("cpu"))
        assert chosen.name in ("cpu", "torch")


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_the_interpreter_serves_cpu_tensors_when_asked():
    assert backends.status()["triton"] == "available"
    assert backends.choose("triton", F32, BF16, torch.device("cpu")).name == "triton"
    with pytest.raises(NotImplementedError, match=r"runs cpu tensors \(TRITON_INTERPRET=1"):
        backends.choose("triton", F32, BF16, torch.device("cuda"))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(backend_module, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA GPU with its driver" in backends.status()["triton"]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backends.get("triton").bind(Registers(x=torch.ones(2, 4)), as_table(PLAN), PLAN.layout)
    with pytest.raises(RuntimeError, match="does not run here; it needs an NVIDIA GPU"):
        backends.choose("triton", F32, F32, torch.device("cuda"))
    monkeypatch.setattr(backend_module.importlib.metadata, "version", lambda _: "2.1.0")
    assert backends.status()["triton"] == "triton 2.1.0 is too old; pip install --upgrade triton"
    monkeypatch.setattr(backend_module.importlib.util, "find_spec", lambda _: None)
    assert backends.status()["triton"] == "triton is not installed; pip install triton"
