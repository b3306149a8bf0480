# SPDX-License-Identifier: Apache-2.0
"""Rows: a solver can write everything that a stage holds, with evaluations named by number."""

import math

import pytest

import fastdiff as fd
from fastdiff.solvers import Row, Rows

VP = fd.schedules.VPLinear()


@pytest.fixture
def rows():
    return Rows(VP, "v", "x0")


def test_a_row_reaches_every_weight_of_a_stage(rows):
    rows.add(0.9, e=Row(x=0.5, outputs={0: 0.25}))
    one, two = rows.draw(), rows.draw()
    rows.add(
        0.8,
        x=Row(x=2.0, e=3.0, outputs={1: 4.0, 0: 5.0}, noise=6.0, extras={1: 7.0}),
        e=Row(x=8.0, e=9.0, outputs={0: 10.0}, noise=11.0, extras={0: 12.0}),
        draws={two: 0.6, one: 0.8},
    )
    stage = rows.stages[1]
    assert (stage.a_x, stage.a_e, stage.b, stage.c, stage.r) == (
        2.0,
        3.0,
        (4.0, 5.0),
        6.0,
        (0.0, 7.0),
    )
    assert (stage.d_x, stage.d_e, stage.g, stage.c_e, stage.s) == (
        8.0,
        9.0,
        (0.0, 10.0),
        11.0,
        (12.0,),
    )
    assert stage.noise == ((2, 0.6), (1, 0.8))


def test_what_follows_from_the_schedule_is_filled_in(rows):
    rows.add(0.9)
    (stage,) = rows.stages
    assert (stage.t, stage.model_time, stage.c_in) == (0.9, 0.9, 1.0)
    assert (stage.p, stage.q) == (stage.x0_p, stage.x0_q) == VP.conversion("v", "x0", 0.9)
    assert not stage.writes_x
    assert not stage.writes_e


def test_a_stage_without_an_evaluation_counts_back_from_the_last_one(rows):
    assert rows.add(0.9, x=Row(x=0.5, outputs={0: 0.5})) == 0
    assert rows.add(0.8, x=Row(x=0.0, outputs={0: 0.7}, noise=0.1), evaluate=False) == 1
    assert rows.add(0.8, x=Row(x=0.0, outputs={1: 1.0, 0: 0.5})) == 1
    between, last = rows.stages[1:]
    assert not between.evaluate
    assert between.b == (0.0, 0.7)
    assert math.isnan(between.x0_p)
    assert last.b == (1.0, 0.5)
    plan = fd.Plan(tuple(rows.stages), (0.9, 0.8, 0.1), prediction="v", variable="x0")
    assert plan.nfe == 2


def test_noise_is_drawn_once_and_only_where_it_is_weighed(rows):
    for noise in (0.0, 0.3, 0.0, 0.4):
        rows.add(0.9, x=Row(noise=noise))
    rows.add(0.8, e=Row(noise=0.5))
    assert [s.noise for s in rows.stages] == [(), ((1, 1.0),), (), ((2, 1.0),), ((3, 1.0),)]


def test_other_fields_of_a_stage_are_passed_on(rows):
    rows.add(0.9, clip=(-1.0, 1.0), model_time=3.0)
    assert (rows.stages[0].clip, rows.stages[0].model_time) == ((-1.0, 1.0), 3.0)
    with pytest.raises(TypeError, match="no_such_field"):
        rows.add(0.9, no_such_field=1.0)


@pytest.mark.parametrize("outputs", [{2: 1.0}, {-1: 1.0}])
def test_an_output_that_does_not_exist_is_refused(rows, outputs):
    rows.add(0.9)
    with pytest.raises(ValueError, match=r"evaluations 0 to 1, which are made; got"):
        rows.add(0.8, x=Row(outputs=outputs))


def test_without_an_evaluation_there_is_no_output_of_its_own(rows):
    rows.add(0.9)
    with pytest.raises(ValueError, match="evaluations 0 to 0, which are made; got 1"):
        rows.add(0.8, x=Row(outputs={1: 1.0}), evaluate=False)
    with pytest.raises(ValueError, match="extras are counted from 0"):
        rows.add(0.8, x=Row(extras={-1: 1.0}))


def test_a_solver_of_ones_own_needs_a_name_a_variable_and_rows():
    with pytest.raises(TypeError, match=r"abstract methods? .*name.*variable.*write"):
        fd.solvers.Solver()
