# SPDX-License-Identifier: Apache-2.0
"""Rows as a warp resolves them: the same row, or the same refusal, as `resolve` in csrc/row.h.

The module that runs the CUDA part on the host (tests/cuda_on_host.cpp) resolves each row both ways
and raises RuntimeError where they differ. Here it is given rows that are wild.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from support.plans import random_plan
from support.rows import neutral, table_of

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.plans import CLIP, EVALUATE, THRESHOLD, WRITES_E, WRITES_X, Layout
from fastdiff.plans.layout import INTO, OF, REDUCTIONS, PackedRow, encode

pytestmark = pytest.mark.parametrize("device", ["host"], indirect=True)

SLOTS, ENTRIES, SCALARS, BATCH, SIZE = 5, 4, 3, 2, 6
NASTY = [np.nan, np.inf, -np.inf, -2.0, -1.0, -0.0, 0.5, 1e300, 1e-300, 2.0**31, 2.0**32, 4.0**31]
LAYOUTS = [
    Layout(),
    Layout(terms=3, branches=2, extras=1),
    Layout(terms=32, branches=16, extras=16),
    Layout(terms=45, branches=3, extras=2),
    Layout(terms=2, branches=2, extras=2, products=8, measures=3),
    Layout(terms=64, branches=16, extras=16, products=8, measures=16),
]


def wild(rng: random.Random, layout: Layout, grown: bool, breaks: int) -> np.ndarray:
    """A row with every kind of number in its columns, `breaks` of them very likely illegal."""

    def weight() -> float:
        return rng.choice([0.0, 0.0, 1.0, -0.25, 1e-300, -0.0, rng.gauss(0, 1)])

    row = neutral(layout)
    for name in row:
        stem = name.rstrip("0123456789").rstrip("_")
        if stem in ("past_b", "past_g", "k", "r", "s", "xi", "measure_weight") or name in (
            *("p", "a_x", "a_e", "b_0", "c", "d_x", "d_e", "g_0", "c_e", "lo", "hi", "c_in_next"),
        ):
            row[name] = weight()
        elif stem in ("slot", "entry", "bank"):
            row[name] = rng.randrange(SLOTS if stem == "slot" else ENTRIES)
        elif stem == "stream":
            row[name] = rng.choice([0, 7, 2**31, 2**32 - 1])
        elif grown and (stem == "scalar_k" or name.startswith("scalar_")):
            row[name] = rng.choice([-1, -1, 0, SCALARS - 1])
        elif grown and name in ("u", "v", "b_raw", "g_raw", "d_new"):
            row[name] = rng.choice([weight(), 0.0 if name != "v" else 1.0])
        elif grown and stem == "weight":
            row[name] = weight()
    row["flags"] = rng.choice([rng.randrange(128), EVALUATE + WRITES_X, EVALUATE + 15])
    if row["flags"] & THRESHOLD and rng.random() < 0.8:
        row["flags"] = row["flags"] & ~CLIP
    row.update(quantile=rng.choice([0.5, 1.0]), floor=rng.choice([0.5, 1.0]))
    row["ceiling"] = rng.choice([1.0, np.inf])
    row["push"], row["push_x"] = rng.choice([(-1, -1), (0, 1), (-1, SLOTS - 1), (2, -1), (2, 2)])
    row["draws"] = rng.randrange(3)
    for group in ("terms", "extras", "products", "measures"):
        most = getattr(layout, group)
        if group != "products" or grown:
            row[f"n_{group}"] = rng.choice([most, rng.randint(0, most)])
    for i in range(layout.products if grown else 0):
        into = rng.randrange(len(INTO))
        of = "point" if INTO[into] == "y" else rng.choice(OF[:8])
        row.update({f"into_{i}": into, f"of_{i}": OF.index(of), f"at_{i}": rng.randrange(ENTRIES)})
    for i, part in itertools.product(range(layout.measures), ("num", "den")):
        row[f"measure_into_{i}"] = rng.randrange(SCALARS)
        kinds = range(len(REDUCTIONS)) if part == "num" else range(-1, len(REDUCTIONS))
        kind = rng.choice(kinds)
        row.update({f"{part}_kind_{i}": kind, f"{part}_rank_{i}": 0.5, f"{part}_b_{i}": -1})
        row[f"{part}_a_{i}"] = rng.choice([0, 1, 3, 4, 5, 8, 9])
        row[f"{part}_a_at_{i}"] = rng.randrange(2)
    for _ in range(breaks):
        row[rng.choice(list(row))] = rng.choice([*NASTY, 6, 127, 200])
    return np.array([row[name] for name in layout.columns])


def bound_to(rng: random.Random, layout: Layout, grown: bool, state: torch.dtype, index: bool):
    """A stage whose table may be overwritten with anything, with some registers left out."""

    def some(*shape: int, dtype: torch.dtype = state) -> torch.Tensor | None:
        return torch.zeros(shape, dtype=dtype) if rng.random() < 0.8 else None

    registers = Registers(
        x=torch.zeros(BATCH, SIZE, dtype=state),
        e=some(BATCH, SIZE),
        history=some(SLOTS, BATCH, SIZE),
        m=some(layout.branches * BATCH, SIZE),
        bank=some(ENTRIES, BATCH, SIZE),
        scalars=some(BATCH, SCALARS),
        seeds=some(BATCH, dtype=torch.int64),
    )
    first = PackedRow(flags=EVALUATE, b_raw=0.0)
    if rng.random() < 0.7:
        first = PackedRow(flags=EVALUATE + THRESHOLD, quantile=0.5, floor=1.0, ceiling=1.0)
    if grown:
        first = PackedRow(**{**vars(first), "u": 0.5})
    table = torch.from_numpy(encode([first], layout))
    at = torch.zeros(BATCH, dtype=torch.int64) if index else None
    bound = backends.get("cuda").bind(registers, table, layout, at)
    out = torch.zeros(layout.branches * BATCH, SIZE) if rng.random() < 0.8 else None
    xi = torch.zeros(BATCH, SIZE, dtype=state) if rng.random() < 0.3 else None
    return bound, registers, out, xi


def said(bound) -> str:
    """What a launch has refused, "" where it ran."""
    try:
        bound.check()
    except (ValueError, IndexError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda s: f"{s.terms}-{s.branches}-{s.products}")
def test_a_warp_resolves_and_refuses_wild_rows_as_the_host_does(device, layout, grown, many):
    rng = random.Random(100 * LAYOUTS.index(layout) + grown)
    ran, refused = 0, set()
    for case in range(150 * many):
        state = (torch.float32, torch.float64)[case % 2]
        bound, registers, out, xi = bound_to(rng, layout, grown, state, case % 3 == 0)
        for breaks in (0, 0, 1, 2):
            bound.table.copy_(table_of(wild(rng, layout, grown or case % 5 == 0, breaks)))
            registers.x.fill_(3.0)
            for call in (bound.run, bound.measure):
                try:
                    call(0, out, xi)
                except ValueError:  # "Give out", by the host; what differs is a RuntimeError
                    continue
                sentence = said(bound)
                refused.add(sentence.partition(";")[0])
                ran += not sentence
    assert ran > 25
    assert len(refused) > 8, refused


def test_every_row_of_random_plans_resolves_as_on_the_host(device, many):
    """The comparison inside the module, on rows as plans pack them."""
    for seed in range(60 * many):
        plan = random_plan(seed)
        bank = torch.zeros(max(plan.extras, 1), 1, 8)
        registers = Registers(
            x=torch.zeros(1, 8),
            e=torch.zeros(1, 8),
            history=torch.zeros(max(plan.slots, 1), 1, 8),
            m=torch.zeros(plan.layout.branches, 8),
            bank=bank,
            seeds=torch.zeros(1, dtype=torch.int64),
        )
        bound = backends.get("cuda").bind(registers, torch.tensor(plan.table), plan.layout)
        out = torch.zeros(plan.layout.branches, 8)
        for row in range(len(plan.stages)):
            bound.run(row, out, None)
            bound.check()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("flags", 0, 127), ("push", -1, SLOTS - 1), ("draws", 0, 2), ("stream_1", 0, 2**32 - 1)],
)
def test_integers_are_told_from_other_numbers_at_their_bounds(device, name, least, most):
    layout = Layout()
    row = PackedRow(flags=EVALUATE + WRITES_X, c=1.0, draws=((3, 1.0), (4, 1.0)))
    good = torch.from_numpy(encode([row], layout))
    registers = Registers(
        x=torch.zeros(1, 4),
        e=torch.zeros(1, 4),
        history=torch.zeros(SLOTS, 1, 4),
        seeds=torch.zeros(1, dtype=torch.int64),
    )
    bound = backends.get("cuda").bind(registers, good, layout)
    column = layout.columns.index(name)
    near = [
        np.nextafter(most, np.inf),
        np.nextafter(least, -np.inf),
        least - 1,
        most + 1,
        -(2.0**31),
    ]
    for value in (least, most, most - 1, -0.0, 0.5, 2.0**52, 2.0**53, 1e19, *near, *NASTY):
        bound.table.copy_(good)
        bound.table[0, column] = value
        bound.run(0, torch.zeros(1, 4), None)
        whole = value == np.floor(value) and least <= value <= most
        if name == "draws" and value == 0:
            assert "draws it or is given it" in said(bound)
        elif (
            name == "flags" and int(value if whole else 0) & (THRESHOLD | CLIP) == THRESHOLD | CLIP
        ):
            assert "threshold" in said(bound)
        else:
            assert (said(bound) == "") == whole, value


def test_a_refused_row_writes_nothing(device):
    layout = Layout(terms=1)
    row = PackedRow(flags=EVALUATE + WRITES_X + WRITES_E, b_0=1.0, k=(1.0,), d_x=1.0)
    table = torch.from_numpy(encode([PackedRow(flags=EVALUATE), row], layout))
    registers = Registers(x=torch.ones(1, 4), e=torch.ones(1, 4), history=torch.ones(2, 1, 4))
    bound = backends.get("cuda").bind(registers, table, layout)
    bound.table[1, layout.columns.index("n_terms")] = 2
    bound.run(1, torch.zeros(1, 4), None)
    assert "fit the layout" in said(bound)
    for register in (registers.x, registers.e, registers.history):
        assert bool((register == 1.0).all())
