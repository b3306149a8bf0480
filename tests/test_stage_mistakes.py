# SPDX-License-Identifier: Apache-2.0
"""Mistakes around a stage that are refused by name, and which backend serves."""

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.core import needs_core
from support.rows import (
    SLOTS,
    copied,
    random_registers,
    same,
    written,
)

from fastdiff import _core, backends
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
from fastdiff.plans.layout import (
    PackedMeasure,
    PackedProduct,
    PackedReduction,
    PackedRow,
    encode,
    layout_of,
)

BACKENDS = [
    pytest.param(name, marks=needs_core if name == "cpu" else ()) for name in ("torch", "cpu")
]
SIZES = [0, 1, 3, 15, 16, 63, 65, 1023, 1024, 1025, 5000]


# -- mistakes ----------------------------------------------------------------------------------


def edited(**columns: float) -> Callable[[Layout, np.ndarray], None]:
    def edit(layout: Layout, row: np.ndarray) -> None:
        for name, value in columns.items():
            row[layout.columns.index(name)] = value

    return edit


@needs_core
@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (edited(flags=128), ValueError, "flags"),
        (edited(flags=np.nan), ValueError, "flags"),
        (edited(flags=EVALUATE + THRESHOLD, floor=1.0), ValueError, "a quantile in"),
        (edited(flags=EVALUATE + THRESHOLD, quantile=1.1, floor=1.0), ValueError, "a quantile in"),
        (edited(flags=EVALUATE + THRESHOLD, quantile=np.nan, floor=1), ValueError, "a quantile"),
        (edited(flags=EVALUATE + THRESHOLD, quantile=0.5), ValueError, "positive floor"),
        (edited(flags=EVALUATE + THRESHOLD, quantile=0.5, floor=1e99), ValueError, "floor"),
        (edited(flags=EVALUATE + CLIP + THRESHOLD, quantile=0.5, floor=1), ValueError, "clip"),
        (edited(push=SLOTS), ValueError, "slots"),
        (edited(push=0.5), ValueError, "slots"),
        (edited(slot_0=-1), ValueError, "slots"),
        (edited(slot_0=1e300), ValueError, "slots"),
        (edited(n_terms=2), ValueError, "fit the layout"),
        (edited(draws=3), ValueError, "fit the layout"),
        (edited(stream_1=-1), ValueError, "streams"),
        (edited(stream_1=2.0**32), ValueError, "streams"),
        (edited(draws=0), ValueError, "draws it or is given it"),
        (edited(a_e=1.0), ValueError, r"Registers\.e"),
        (edited(flags=WRITES_E), ValueError, r"Registers\.e"),
        (edited(flags=WRITES_X), ValueError, "without an evaluation"),
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_table_that_would_corrupt_memory_is_refused(edit, error, message, indexed):
    stage = Stage(t=0.5, a_x=0.5, b=(1.0, 1.0), c=1.0, noise=((1, 1.0),))
    plan = Plan(stages=(Stage(t=1.0, b=(1.0,)), stage), times=(1.0, 0.0))
    rng = np.random.default_rng(9)
    table = torch.tensor(plan.table)
    edit(plan.layout, table.numpy()[1])
    registers = random_registers(rng, (2, 50), torch.float32, plan.layout)
    before = copied(registers)
    index = torch.tensor([0, 1]) if indexed else None
    bound = backends.get("cpu").bind(registers, table, plan.layout, index)
    with pytest.raises(error, match=message):
        bound.run(0 if indexed else 1, torch.ones(2, 50), None)
    assert all(same(a, b) for a, b in zip(written(before), written(registers), strict=True))


@needs_core
@pytest.mark.parametrize(("row", "index"), [(2, None), (-1, None), (1, [0, 1]), (0, [0, -1])])
def test_a_row_outside_the_table_is_refused(row, index):
    plan = Plan(stages=(Stage(t=1.0), Stage(t=0.5)), times=(1.0, 0.0))
    registers = Registers(x=torch.ones(2, 4))
    index = None if index is None else torch.tensor(index)
    bound = backends.get("cpu").bind(registers, torch.tensor(plan.table), plan.layout, index)
    with pytest.raises(IndexError, match=r"\[0, 2\)"):
        bound.run(row, torch.ones(2, 4), None)


@needs_core
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
def test_a_wrong_output_is_named(out, xi, error, message):
    plan = Plan(stages=(Stage(t=1.0, b=(1.0,)),), times=(1.0, 0.0))
    registers = Registers(x=torch.ones(2, 4))
    bound = backends.get("cpu").bind(registers, torch.tensor(plan.table), plan.layout)
    with pytest.raises(error, match=message):
        bound.run(0, out, xi)
    assert torch.equal(registers.x, torch.ones(2, 4))


@needs_core
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 2).t()}, ValueError, "x is contiguous"),
        ({"x": torch.ones(2, 4, dtype=torch.bfloat16)}, ValueError, 'backend="torch"'),
        ({"e": torch.ones(2, 5)}, ValueError, r"e is \[2, 4\]; got \[2, 5\]"),
        ({"history": torch.ones(1, 2, 4).double()}, TypeError, "history is torch.float32"),
        ({"m": torch.ones(3, 4)}, ValueError, r"m is \[2, 4\]"),
        ({"m": torch.ones(2, 4, dtype=torch.int8)}, TypeError, "m is in"),
        ({"seeds": torch.ones(3, dtype=torch.int64)}, ValueError, r"seeds is \[2\]"),
        ({"bank": torch.ones(1, 2, 5)}, ValueError, r"bank is \[1, 2, 4\]"),
    ],
)
def test_wrong_registers_are_refused_when_bound(change, error, message):
    plan = Plan(stages=(Stage(t=1.0, b=(1.0,)),), times=(1.0, 0.0))
    registers = dataclasses.replace(Registers(x=torch.ones(2, 4)), **change)
    with pytest.raises(error, match=message):
        backends.get("cpu").bind(registers, torch.tensor(plan.table), plan.layout)


@needs_core
def test_a_layout_beyond_the_core_names_the_backend_that_serves_it():
    layout = Layout(terms=65)
    table = torch.zeros(1, layout.width, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match='backend="torch"'):
        backends.get("cpu").bind(Registers(x=torch.ones(2, 4)), table, layout)


# -- choosing ----------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_status_names_every_backend():
    assert set(backends.status()) == set(backends.names())
    assert backends.status()["torch"] == "available"


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        backends.get("torhc")


@needs_core
@pytest.mark.parametrize(
    ("state", "network", "device", "name"),
    [
        (torch.float32, torch.float16, CPU, "cpu"),
        (torch.float64, torch.float64, CPU, "cpu"),
        (torch.bfloat16, torch.bfloat16, CPU, "torch"),
    ],
)
def test_the_fastest_backend_that_can_serve_is_chosen(state, network, device, name):
    assert backends.choose(None, state, network, device).name == name


@needs_core
def test_a_named_backend_that_cannot_serve_names_those_that_can():
    with pytest.raises(NotImplementedError, match=r"got torch.bfloat16. Use one of: torch"):
        backends.choose("cpu", torch.bfloat16, torch.bfloat16, CPU)


def test_without_the_core_torch_serves_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_core, "native", None)
    monkeypatch.setattr(_core, "missing", "the compiled core cannot be imported (absent)")
    monkeypatch.setattr(backends, "_warned", False)
    assert "pip install -e ." in backends.status()["cpu"]
    with pytest.warns(RuntimeWarning, match="pip install -e"):
        assert backends.choose(None, torch.float32, torch.float32, CPU).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, torch.float32, torch.float32, CPU).name == "torch"
        assert backends.choose("torch", torch.float32, torch.float32, CPU).name == "torch"
    with pytest.raises(RuntimeError, match="pip install -e"):
        backends.choose("cpu", torch.float32, torch.float32, CPU)
    with pytest.raises(RuntimeError, match="pip install -e"):
        backends.get("cpu").bind(
            Registers(x=torch.ones(1, 1)), torch.zeros(1, Layout().width), Layout()
        )


# -- rows that grow --------------------------------------------------------------------------------

NORM = PackedReduction("norm", ("x", 0))
GROWN = {"flags": EVALUATE | WRITES_X, "k": (1.0,), "b_0": 1.0}


@needs_core
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**GROWN, "extras": ((2, 1.0, 0.0),)}, "entries of the bound bank"),
        ({**GROWN, "products": (PackedProduct("x", 1.0, 2, "x"),)}, "entries of the bound bank"),
        ({**GROWN, "products": (PackedProduct("x", 1.0, 0, "bank", 2),)}, "of the bound bank"),
        ({**GROWN, "products": (PackedProduct("x", 1.0, 0, "slot", 0),)}, "slots"),
        ({**GROWN, "products": (PackedProduct("x", 1.0, 0, "out"),)}, "products are of the kinds"),
        ({**GROWN, "products": (PackedProduct("y", 1.0, 0, "x"),)}, "those into y of the point"),
        ({**GROWN, "products": (PackedProduct("x", 1.0, 0, "e"),)}, r"Registers\.e"),
        ({**GROWN, "products": (PackedProduct("x", 1.0, 0, "xi"),)}, "draws it or is given it"),
        ({**GROWN, "scalar_b": 3}, "columns of the bound scalars"),
        ({**GROWN, "scalar_k": (3,)}, "columns of the bound scalars"),
        ({"flags": WRITES_X, "b_raw": 1.0}, "without an evaluation"),
        (
            {"flags": WRITES_X, "products": (PackedProduct("x", 1.0, 0, "h"),)},
            "without an evaluation",
        ),
        ({"measures": (PackedMeasure(3, NORM),)}, "columns of the bound scalars"),
        (
            {"measures": (PackedMeasure(0, PackedReduction("sum", ("h", 0))),)},
            "measures are of the kinds",
        ),
        (
            {"measures": (PackedMeasure(0, NORM, PackedReduction("sum", ("slot", 0))),)},
            "slots of the bound history",
        ),
        ({"measures": (PackedMeasure(0, PackedReduction("std", ("y", 0))),)}, "an evaluation"),
        ({"measures": (PackedMeasure(0, PackedReduction("std", ("e", 0))),)}, r"Registers\.e"),
        (
            {
                **GROWN,
                "flags": EVALUATE | WRITES_X | THRESHOLD,
                "quantile": 0.9,
                "floor": 2.0,
                "ceiling": 1.0,
            },
            "no ceiling below it",
        ),
    ],
)
def test_a_grown_row_that_would_leave_its_registers_is_refused(fields, message):
    row = PackedRow(**fields)
    columns = layout_of([row])
    registers = Registers(x=torch.ones(2, 9), bank=torch.ones(2, 1, 9), scalars=torch.ones(2, 3))
    bound = backends.get("cpu").bind(registers, torch.from_numpy(encode([row], columns)), columns)
    call = bound.measure if row.measures else bound.run
    with pytest.raises(ValueError, match=message):
        call(0, torch.ones(2, 9), None)
    assert torch.equal(registers.x, torch.ones(2, 9))
    assert torch.equal(registers.scalars, torch.ones(2, 3))


@needs_core
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": torch.ones(2, 3, 9)}, r"bank is \[2, 2, 9\]"),
        ({"scalars": torch.ones(2, 3).double()}, "scalars is torch.float32"),
        ({"scalars": torch.ones(3, 3)}, r"scalars is \[2, 3\]"),
    ],
)
def test_a_wrong_bank_and_wrong_scalars_are_refused_when_bound(change, message):
    registers = dataclasses.replace(Registers(x=torch.ones(2, 9)), **change)
    table = torch.from_numpy(encode([PackedRow()], Layout()))
    with pytest.raises((TypeError, ValueError), match=message):
        backends.get("cpu").bind(registers, table, Layout())
