# SPDX-License-Identifier: Apache-2.0
"""Plans: validation, the packed table, and files."""

import dataclasses
import json
import math

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


@pytest.mark.parametrize("plan", ALL, ids=lambda p: p.solver)
def test_saved_plan_loads_bit_for_bit(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert loaded.table.tobytes() == plan.table.tobytes()
    assert loaded.to_json() == plan.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


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
        ((0.1, 0.5, 1.0), "strictly decrease"),
        ((1.0, math.nan, 0.1), "strictly decrease"),
        ((1.0,), "at least two times"),
    ],
)
def test_times_that_do_not_decrease_are_refused(times, says):
    with pytest.raises(ValueError, match=says):
        Plan(stages=(Stage(t=1.0),), times=times)


def test_a_plan_ends_in_x():
    with pytest.raises(ValueError, match="leave the result in x"):
        Plan(stages=(Stage(t=1.0, d_x=1.0),), times=(1.0, 0.0))
    with pytest.raises(ValueError, match="at least one stage"):
        Plan(stages=(), times=(1.0, 0.0))


def _json(**changes):
    data = json.loads(two().to_json())
    data.update(changes)
    return json.dumps({k: v for k, v in data.items() if v is not None})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (two().to_json()[:200], "truncated"),
        ("", "truncated"),
        ("[1, 2]", "not a plan"),
        ('{"hello": 1}', "not a plan"),
        (_json(version=99), "newer fastdiff"),
        (_json(version="1"), "positive integer"),
        (_json(colour="red"), "unknown field 'colour'"),
        (_json(times=None), "'times' is missing"),
        (_json(stages=[{"t": 1.0, "q_x": 1.0}]), "stage 0 has the unknown field 'q_x'"),
        (_json(stages=[{"a_x": 1.0}]), "stage 0 has no t"),
        (_json(stages=[{"t": 1.0, "a_x": "x"}]), "stage 0: .*a_x is a float"),
        (_json(stages=3), "list of objects"),
        (_json(times=[0.1, 0.5, 1.0]), "strictly decrease"),
        (_json(solver=3), "solver is a string"),
        (_json(prediction="banana"), "unknown name 'banana'"),
        (_json(variable="eps_ilon"), "'epsilon'"),
        (_json(prior_scale=True), "prior_scale is positive"),
        ('{"format": "fastdiff-plan", "format": "fastdiff-plan"}', "stands twice"),
        (_json(stages=[{"t": 10**400}]), "stage 0"),
        ("[" * 100_000, "not a plan|truncated"),
    ],
)
def test_files_that_are_no_plan_are_refused(text, says, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        Plan.load(path)
    assert "bad.json" in str(error.value)


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a plan"):
        Plan.load(path)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    ALL[0].save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ALL[1].save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("path", ["missing/plan.json", "."])
def test_a_path_that_cannot_be_written_is_named(path, tmp_path):
    target = tmp_path / path
    with pytest.raises(OSError, match=str(target)):
        ALL[0].save(target)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_branches_are_folded_into_the_table():
    plan = fd.plan(VP, "ddim", 2)
    packed = plan.pack((-1.0, 2.0))
    np.testing.assert_array_equal(packed[:, -4::2], [[-1.0, 2.0]] * 2)
