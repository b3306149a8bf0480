# SPDX-License-Identifier: Apache-2.0
"""Plans: validation, the packed table, and files."""

import dataclasses
import gc
import json
import math
import pickle

import numpy as np
import pytest

import fastdiff as fd
from fastdiff.plans import (
    AT_E,
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Plan,
    Stage,
)

VP = fd.schedules.VPLinear()
ALL = [
    fd.plan(VP, name, 6, prediction="v")
    for name in fd.solvers.names()
]  # fmt: skip
ALL.append(fd.plan(VP, "dpmpp-3m", 6, warmup="runge-kutta", clip=1.0))
ALL.append(fd.plan(VP, "dpmpp-2s", 4, threshold=0.995))
ALL.append(fd.plan(fd.schedules.EDM(), "heun", 5, prediction="edm"))


def two(**first):
    """A plan of two stages whose first row is changed."""
    rows = [Stage(t=1.0, a_x=0.5, b=(0.5,)), Stage(t=0.5, a_x=0.5, b=(0.5,))]
    rows[0] = dataclasses.replace(rows[0], **first)
    return Plan(stages=tuple(rows), times=(1.0, 0.5, 0.1))


def test_two_schedules_make_two_plans():
    linear, other = (
        fd.plan(schedule, "ddim", 3, grid=(0.9, 0.6, 0.3, 0.1))
        for schedule in (VP, fd.schedules.Custom(VP.alpha, VP.sigma, name="the same numbers"))
    )
    assert dataclasses.replace(other, schedule=VP, stages=linear.stages) == linear
    assert linear != dataclasses.replace(linear, schedule=other.schedule)


def test_plan_and_its_table_are_immutable():
    plan = ALL[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.solver = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.stages[0].a_x = 0.0
    with pytest.raises(ValueError, match="read-only"):
        plan.table[0, 0] = 1.0


def test_table_holds_what_the_rows_say():
    plan = fd.plan(VP, "dpmpp-3m", 5, clip=(-2.0, 1.0))
    columns = {name: i for i, name in enumerate(plan.layout.columns)}
    assert len(columns) == plan.layout.width == plan.table.shape[1]
    for i, stage in enumerate(plan.stages):
        row = plan.table[i]
        flags = int(row[columns["flags"]])
        assert flags == EVALUATE + WRITES_X + CLIP + WRITES_M * (i < len(plan.stages) - 1)
        for name in ("p", "a_x", "c", "d_x"):
            assert row[columns[name]] == getattr(stage, name)
        assert row[columns["b_0"]] == stage.b[0]
        assert (row[columns["lo"]], row[columns["hi"]]) == (-2.0, 1.0)
        assert row[columns["k_0"]] == stage.q
        assert int(row[columns["n_terms"]]) == len(stage.b) - 1
    assert plan.pack((0.25, 0.75)).shape[1] == plan.layout.width + 2


def test_a_threshold_stands_in_columns_of_its_own():
    plan = fd.plan(VP, "dpmpp-2m", 3, threshold=(0.9, 1.5))
    columns = plan.layout.columns
    for stage, row in zip(plan.stages, plan.table, strict=True):
        assert stage.threshold == (0.9, 1.5)
        assert int(row[0]) & ~WRITES_M == EVALUATE + WRITES_X + THRESHOLD
        assert (row[columns.index("quantile")], row[columns.index("floor")]) == (0.9, 1.5)
    assert json.loads(plan.to_json())["stages"][0]["threshold"] == [0.9, 1.5]
    assert "threshold" not in fd.plan(VP, "dpmpp-2m", 3).to_json()
    assert str(plan).count("threshold(") == 3
    assert "threshold(out, 0.9, 1.5)" in str(
        fd.plan(VP, "ddim", 2, threshold=(0.9, 1.5), prediction="x0")
    )


def test_flags_follow_from_the_coefficients():
    plan = fd.plan(VP, "deis-heun", 2)
    flags = plan.table[:, 0].astype(int).tolist()
    first, second = EVALUATE + WRITES_E + WRITES_M, EVALUATE + AT_E + WRITES_X
    assert flags == [first, second + WRITES_M, first, second]


@pytest.mark.parametrize("plan", ALL, ids=lambda p: p.solver)
def test_slots_hold_the_outputs_the_rows_weigh(plan):
    # run the slots symbolically: each must hold the evaluation that the row means
    columns = {name: i for i, name in enumerate(plan.layout.columns)}
    slots, evaluations = [None] * plan.slots, 0
    for stage, row in zip(plan.stages, plan.table, strict=True):
        meant = {
            evaluations - j: (stage.b[j] if j < len(stage.b) else 0.0)
            for j in range(1, max(len(stage.b), len(stage.g)))
            if (j < len(stage.b) and stage.b[j]) or (j < len(stage.g) and stage.g[j])
        }
        read = {}
        for k in range(int(row[columns["n_terms"]])):
            slot = int(row[columns[f"slot_{k}"]])
            read[slots[slot]] = row[columns[f"past_b_{k}"]]
        assert read == meant
        if row[columns["push"]] >= 0:
            slots[int(row[columns["push"]])] = evaluations
        evaluations += stage.evaluate
    assert plan.slots <= 6


def test_nothing_is_stored_that_no_row_reads():
    plan = fd.plan(VP, "ddim", 10)
    assert plan.slots == 0
    assert set(plan.table[:, 1]) == {-1.0}
    multistep = fd.plan(VP, "deis-3", 10)
    assert multistep.slots == 2
    assert multistep.table[-1, 1] == -1.0


def test_costs_are_counted():
    assert [fd.plan(VP, name, 6).nfe for name in ("deis-3", "deis-heun", "dpm-3")] == [6, 12, 18]
    plan = fd.plan(VP, "dpm-3", 6, published=True)
    assert (plan.nfe, len(plan.stages)) == (6, 6)
    assert plan.times[0] == 1.0
    assert plan.times[-1] == 1e-3
    assert plan.steps == len(plan.times) - 1


def test_print_shows_the_table():
    text = str(fd.plan(VP, "dpm-2", 2, prediction="v"))
    assert "2 steps  4 NFE" in text
    assert "e' = " in text
    assert "x' = " in text
    noisy = str(fd.plan(VP, "ddpm", 2))
    assert " xi" in noisy
    for line in text.splitlines()[2:]:
        assert "out" in line


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"a_x": math.nan}, "a_x = nan"),
        ({"b": (math.inf,)}, "finite"),
        ({"b": (0.5, 0.1)}, "reads one from 1 evaluations before, and 0 came"),
        ({"a_e": 1.0}, "reads e"),
        ({"c": 1.0}, "not drawn"),
        ({"c": 1.0, "noise": ((0, 1.0),)}, "stream 0 is the starting noise"),
        ({"c": 1.0, "noise": ((1, 1.0), (2, 1.0), (3, 1.0))}, "at most two draws"),
        ({"clip": (1.0, -1.0)}, "lo < hi"),
        ({"clip": (-math.inf, 1.0)}, "finite, with lo < hi"),
        ({"clip": (-1.0, 1.0)}, "clipping applies to x0"),
        ({"threshold": (0.9, 1.0)}, "thresholds apply to x0.*thresholds 'epsilon'"),
        ({"threshold": (0.9, 1.0), "clip": (-1.0, 1.0)}, "not both"),
        ({"threshold": (0.0, 1.0)}, "0 < quantile <= 1"),
        ({"threshold": (1.01, 1.0)}, "0 < quantile <= 1"),
        ({"threshold": (math.nan, 1.0)}, "0 < quantile <= 1"),
        ({"threshold": (0.9, 0.0)}, "a finite floor of at least 1.18e-38"),
        ({"threshold": (0.9, math.inf)}, "a finite floor"),
        ({"threshold": (0.9,)}, r"threshold is \(quantile, floor\)"),
        ({"evaluate": False}, "without an evaluation"),
        ({"t": 2.0}, "within the grid"),
    ],
)
def test_rows_that_cannot_run_are_refused(row, says):
    with pytest.raises(ValueError, match=says):
        two(**row)


def test_rows_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="a_x is a float"):
        two(a_x="1")
    for bad in (3.0, ["1"], (True,)):
        with pytest.raises(TypeError, match="sequence of floats"):
            two(b=bad)
    with pytest.raises(TypeError, match="threshold is a sequence of floats"):
        two(threshold=0.9)
    with pytest.raises(TypeError, match=r"a draw is \(stream, weight\)"):
        two(c=1.0, noise=((1,),))
    with pytest.raises(TypeError, match=r"fastdiff\.Stage rows"):
        Plan(stages=({"t": 1.0},), times=(1.0, 0.0))


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ((1.0, 1.0, 0.1), "strictly decrease"),
        ((0.1, 1.0, 0.5), "strictly decrease"),
        ((1.0, 0.5, 1.0), r"draws noise; got times\[1\] = 0.5, times\[2\] = 1.0"),
        ((0.1, 1.0, 1.0), "times are finite and strictly"),
        ((math.inf, 1.0), "times are finite"),
        ((1.0, math.nan, 0.1), "strictly decrease"),
        ((1.0,), "at least two times"),
    ],
)
def test_times_that_do_not_decrease_are_refused(times, says):
    with pytest.raises(ValueError, match=says):
        Plan(stages=(Stage(t=1.0),), times=times)


def test_a_plan_that_encodes_rises_throughout():
    plan = Plan((Stage(t=0.1, b=(1.0,)), Stage(t=0.5, b=(1.0,))), (0.1, 0.5, 1.0))
    assert (plan.ascends, plan.descends) == (True, False)
    assert Plan.from_json(plan.to_json()) == plan
    assert (two().ascends, two().descends) == (False, True)


def test_times_rise_where_a_stage_between_them_draws_noise():
    down, renoise = Stage(t=1.0, b=(1.0,)), {"evaluate": False, "c": 1.0, "noise": ((1, 1.0),)}
    up, last = Stage(t=0.2, **renoise), Stage(t=0.6, b=(1.0,))
    plan = Plan((down, up, last), (1.0, 0.2, 0.6, 0.0))
    assert (plan.ascends, plan.descends) == (False, False)
    with pytest.raises(ValueError, match="rise where a stage between"):
        Plan((down, last), (1.0, 0.2, 0.6, 0.0))
    with pytest.raises(ValueError, match=r"got times\[3\] = 0.2"):  # one draw, two rises
        Plan((down, up, last), (1.0, 0.2, 0.6, 0.2, 0.6, 0.0))
    with pytest.raises(ValueError, match="got times"):  # drawn elsewhere
        Plan((Stage(t=0.9, **renoise), down, last), (1.0, 0.2, 0.6, 0.0))


def test_a_plan_ends_in_x():
    with pytest.raises(ValueError, match="leave the result in x"):
        Plan(stages=(Stage(t=1.0, d_x=1.0),), times=(1.0, 0.0))
    with pytest.raises(ValueError, match="at least one stage"):
        Plan(stages=(), times=(1.0, 0.0))


def test_weights_of_branches_are_folded_into_the_table():
    plan = fd.plan(VP, "ddim", 2)
    packed = plan.pack((-1.0, 2.0))
    np.testing.assert_array_equal(packed[:, -4::2], [[-1.0, 2.0]] * 2)


GROWN = (
    Stage(
        t=1.0,
        d_x=1.0,
        g=(0.5,),
        d_new=0.3,
        noise=((1, 1.0),),
        products=(
            fd.plans.Product("y", 0.5, 0, "point"),
            fd.plans.Product("x", 0.2, 1, "bank", 3),
            fd.plans.Product("e", 1.0, 0, "new"),
        ),
        scalars={"w_1": 1, "g_0": 1},
        measures=(
            fd.plans.Measure(
                1,
                fd.plans.Reduction("dot", ("out", 1), ("xi",)),
                fd.plans.Reduction("norm", ("y",)),
                2.0,
            ),
        ),
    ),
    Stage(
        t=0.5,
        b=(0.5, 0.1),
        u=0.2,
        v=0.3,
        b_raw=0.1,
        clip=(-1.0, 1.0),
        noise=((2, 1.0),),
        products=(
            fd.plans.Product("x", 1.0, 2, "new"),
            fd.plans.Product("x", 1.0, 2, "xi"),
            fd.plans.Product("e", 0.0, 2, "h"),
        ),
    ),
    Stage(t=0.25, b=(0.5,), products=(fd.plans.Product("x", 1.0, 2, "history", 2),)),
)


def test_products_scalars_and_measures_are_counted_packed_and_saved():
    plan = Plan(GROWN, (1.0, 0.5, 0.25, 0.0))
    assert (plan.extras, plan.scalars, plan.branches, plan.slots) == (4, 2, 2, 1)
    assert plan.stochastic
    assert (plan.layout.products, plan.layout.measures) == (3, 1)
    rows = plan.rows((1.0, 2.0))
    assert fd.plans.decode(plan.pack((1.0, 2.0)), plan.layout) == rows
    assert (rows[0].scalar_k, rows[0].scalar_g, rows[0].scalar_b) == ((-1, 1), 1, -1)
    assert (rows[1].u, rows[1].v, rows[1].b_raw) == (0.2, 0.3, 0.1)
    assert [p.of for p in rows[1].products] == ["new", "xi"]  # a weight of 0 is left out
    assert [(p.of, p.at) for p in rows[2].products] == [("slot", rows[0].push)]
    assert rows[0].push >= 0
    assert rows[0].draws == ((1, 1.0),)  # drawn, though c and c_e are 0
    loaded = Plan.from_json(plan.to_json())
    assert loaded == plan
    assert loaded.table.tobytes() == plan.table.tobytes()
    with pytest.raises(ValueError, match="name 2 guidance branches; got weights of 1"):
        plan.pack((1.0,))


def test_what_reads_the_new_x_reads_x_where_x_stays():
    products = (fd.plans.Product("e", 2.0, 0, "new"),)
    stays = Stage(t=1.0, d_x=1.0, d_new=0.5, products=products)
    moves = dataclasses.replace(stays, b=(1.0,))
    end = Stage(t=0.5)
    row = Plan((stays, end), (1.0, 0.0)).rows()[0]
    assert (row.d_x, row.d_new, row.products[0].of) == (1.5, 0.0, "x")
    row = Plan((moves, end), (1.0, 0.0)).rows()[0]
    assert (row.d_x, row.d_new, row.products[0].of) == (1.0, 0.5, "new")


def test_a_threshold_may_have_a_ceiling():
    plan = fd.plan(VP, "dpmpp-2m", 3, threshold=(0.9, 1.5))
    stages = [dataclasses.replace(s, threshold=(0.9, 1.5, 2.0)) for s in plan.stages]
    assert {row.ceiling for row in dataclasses.replace(plan, stages=stages).rows()} == {2.0}
    assert {row.ceiling for row in plan.rows()} == {math.inf}
    assert Stage(t=1.0, threshold=(0.9, 1.5, math.inf)).threshold == (0.9, 1.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda P, M, R: P("z", 1.0, 0, "x"), "into is one of"),
        (lambda P, M, R: P("y", 1.0, 0, "x"), "a product into 'y' is of 'point'"),
        (lambda P, M, R: P("x", 1.0, 0, "point"), "a product into 'x' is of"),
        (lambda P, M, R: P("x", math.nan, 0, "x"), "weight = nan"),
        (lambda P, M, R: P("x", 1.0, -1, "x"), "entry is an integer from 0"),
        (lambda P, M, R: P("x", 1.0, 0, "history"), "at is an integer from 1"),
        (lambda P, M, R: P("x", 1.0, 0, "x", 1), "at belongs to products of"),
        (lambda P, M, R: R("mean", ("x",)), "kind is one of"),
        (lambda P, M, R: R("sum", ("h",)), "operands are"),
        (lambda P, M, R: R("sum", ("out",)), "operands are"),
        (lambda P, M, R: R("sum", ("x", 0)), "operands are"),
        (lambda P, M, R: R("norm", ("x",), ("e",)), "only a dot product"),
        (lambda P, M, R: R("quantile", ("x",), rank=0.0), "0 < rank <= 1"),
        (lambda P, M, R: M(-1, R("sum", ("x",))), "into is an integer from 0"),
        (lambda P, M, R: M(0, R("sum", ("x",)), power=math.inf), "power = inf"),
        (lambda P, M, R: two(products=[P("x", 1.0, 0, "x")] * 9), "at most 8 products"),
        (
            lambda P, M, R: two(products=[P("x", 1.0, 0, "new"), P("x", 1.0, 0, "x")]),
            "after the product of 'new'",
        ),
        (
            lambda P, M, R: two(products=[P("x", 1.0, 0, "new"), P("x", 1.0, 0, "new")]),
            "after the product of 'new'",
        ),
        (lambda P, M, R: two(products=[P("x", 1.0, 0, "xi")]), "a product reads a noise that"),
        (lambda P, M, R: two(products=[P("x", 1.0, 0, "e")]), "reads e .by a product"),
        (
            lambda P, M, R: two(products=[P("x", 1.0, 0, "history", 1)]),
            "reads one from 1 evaluations before",
        ),
        (
            lambda P, M, R: two(b=(), evaluate=False, products=[P("x", 1.0, 0, "h")]),
            "there is no output; got a product of 'h'",
        ),
        (lambda P, M, R: two(b=(), evaluate=False, b_raw=1.0), "no h; got b_raw"),
        (lambda P, M, R: two(b=(), evaluate=False, u=1.0), "no h; got u or v"),
        (
            lambda P, M, R: two(b=(), evaluate=False, measures=[M(0, R("sum", ("y",)))]),
            "a measure of 'y'",
        ),
        (lambda P, M, R: two(measures=[M(0, R("sum", ("e",)))]), "reads e .by a measure"),
        (lambda P, M, R: two(measures=[M(0, R("sum", ("xi",)))]), "a measure reads a noise"),
        (lambda P, M, R: two(scalars={"b_0": 0}), "only columns of S that a measure wrote"),
        (lambda P, M, R: two(scalars={"a_x": 0}), "a scalar multiplies"),
        (lambda P, M, R: two(scalars={"w_1000": 0}), "a scalar multiplies"),
        (lambda P, M, R: two(scalars={"w_01": 0}), "a scalar multiplies"),
        (lambda P, M, R: R("sum", ("out", 1000)), "is an integer from 0 to 999"),
        (lambda P, M, R: two(scalars=(("c", 0), ("c", 1))), "got two of 'c'"),
        (lambda P, M, R: two(threshold=(0.9, 1.5, 1.0)), "floor <= ceiling"),
        (lambda P, M, R: two(threshold=(0.9, 1e300)), "at most 3.4e.38"),
    ],
)
def test_growths_that_cannot_run_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make(fd.plans.Product, fd.plans.Measure, fd.plans.Reduction)


def test_a_stage_without_an_evaluation_reads_only_outputs_that_exist():
    rest = {"evaluate": False, "b": (0.0, 0.5)}
    plan = Plan((Stage(t=1.0), Stage(t=0.5, **rest)), (1.0, 0.0))
    assert plan.slots == 1
    with pytest.raises(ValueError, match="reads one from 2 evaluations before, and 1 came"):
        Plan((Stage(t=1.0), Stage(t=0.5, evaluate=False, b=(0.0, 0.0, 1.0))), (1.0, 0.0))


def test_print_shows_products_measures_and_what_the_limit_leaves():
    lines = str(Plan(GROWN, (1.0, 0.5, 0.25, 0.0))).splitlines()
    shown = [line.split(maxsplit=2)[-1] for line in lines[2:]]
    assert "out[w_1 S1] + 0.5 R0 x" in shown[0]
    assert shown[0].endswith("S1 = (dot(out_1, xi) / norm(y))^2")
    assert lines[3].strip() == "x' = x + 0.2 R1 R3"
    assert lines[4].strip() == "e' = x + 0.5 S1 h + 0.3 x' + R0 x'"
    assert "0.2 e + 0.3 clip(out, -1, 1)" in shown[3]
    assert shown[3].endswith("x' = x + 0.5 h + 0.1 H1 + 0.1 y + R2 (all before) + R2 xi")
    assert lines[6].strip() == "y = out"
    assert shown[5].endswith("x' = x + 0.5 h + R2 H2")


def test_a_handle_names_one_plan_as_long_as_it_lives():
    plan, equal = two(), two()
    assert plan == equal
    assert plan.handle != equal.handle
    assert fd.plans.living(plan.handle) is plan
    copied = pickle.loads(pickle.dumps(plan))
    assert copied == plan
    assert fd.plans.living(copied.handle) is copied
    handle = equal.handle
    del equal
    gc.collect()
    with pytest.raises(KeyError):
        fd.plans.living(handle)
