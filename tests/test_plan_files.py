# SPDX-License-Identifier: Apache-2.0
"""Plan files: what is saved comes back, and nothing else is taken for a plan."""

import dataclasses
import json
import math
import os
import re
import stat
import time

import numpy as np
import pytest

import fastdiff as fd
from fastdiff.plans import Measure, Plan, Product, Reduction, Stage

VP = fd.schedules.VPLinear()
ALL = [fd.plan(VP, name, 6, prediction="v") for name in fd.solvers.names()]
ALL.append(fd.plan(VP, "dpmpp-3m", 6, warmup="runge-kutta", clip=1.0))
ALL.append(fd.plan(VP, "dpmpp-2s", 4, threshold=0.995))
ALL.append(fd.plan(fd.schedules.EDM(), "heun", 5, prediction="edm"))


class Steering(fd.schedules.VPLinear):
    """Its description would move a terminal's cursor."""

    def describe(self):
        return "\x1b[2J"


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


def test_a_loaded_plan_has_its_schedule():
    for schedule in (VP, fd.schedules.VPDiscrete.scaled_linear(), fd.schedules.FlowMatching()):
        plan = fd.plan(schedule, "ddim", 3, prediction="v")
        loaded = Plan.from_json(plan.to_json())
        assert loaded.schedule == schedule
        assert str(loaded) == str(plan)
        assert str(schedule) in str(plan)
    custom = fd.schedules.Custom(lambda t: 1.0 - t, lambda t: t, name="line")
    loaded = Plan.from_json(fd.plan(custom, "ddim", 3, prediction="v").to_json())
    assert loaded.schedule == custom
    with pytest.raises(ValueError, match="line"):
        loaded.schedule.alpha(0.5)
    assert two().schedule is None
    assert Plan.from_json(two().to_json()) == two()
    with pytest.raises(TypeError, match="schedule is a fastdiff"):
        dataclasses.replace(two(), schedule="VPLinear()")


def changed(**changes):
    data = json.loads(two().to_json())
    data.update(changes)
    return json.dumps({k: v for k, v in data.items() if v != "left out"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (two().to_json()[:200], "truncated"),
        ("", "truncated"),
        ("[1, 2]", "not a plan"),
        ('{"hello": 1}', "not a plan"),
        (changed(version=99), "newer fastdiff"),
        (changed(version="1"), "positive integer"),
        (changed(version=1), "version 1, and this fastdiff reads version 2. Make the plan again"),
        (changed(schedule="VPLinear"), "schedule is an object or null; got 'VPLinear'"),
        (changed(schedule={"kind": "VPLiner"}), "schedule: .*'VPLinear'"),
        (changed(colour="red"), "unknown field 'colour'"),
        (changed(times="left out"), "'times' is missing"),
        (changed(stages=[{"t": 1.0, "q_x": 1.0}]), "stage 0 has the unknown field 'q_x'"),
        (changed(stages=[{"a_x": 1.0}]), "stage 0 has no t"),
        (changed(stages=[{"t": 1.0, "a_x": "x"}]), "stage 0: .*a_x is a float"),
        (changed(stages=3), "list of objects"),
        (changed(times=[0.1, 1.0, 0.5]), "strictly decrease"),
        (changed(solver=3), "solver is a string"),
        (changed(prediction="banana"), "unknown name 'banana'"),
        (changed(variable="eps_ilon"), "'epsilon'"),
        (changed(prior_scale=True), "prior_scale is positive"),
        ('{"format": "fastdiff-plan", "format": "fastdiff-plan"}', "stands twice"),
        (changed(stages=[{"t": 10**400}]), "stage 0"),
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


def test_negative_zeros_and_nans_come_back_as_they_were_packed():
    plan = two(a_e=-0.0, b=(0.5, -0.0), p=-0.0, x0_p=-math.nan)
    loaded = Plan.from_json(plan.to_json())
    assert loaded == plan
    assert loaded.table.tobytes() == plan.table.tobytes()


def test_products_measures_and_scalars_come_back():
    norm = Measure(3, Reduction("quantile", ("out", 1), rank=0.25), power=0.5, offset=1.0)
    dot = Measure(0, Reduction("dot", ("x",), ("bank", 2)), Reduction("std", ("history", 1)))
    first = Stage(t=1.0, b=(0.5,), products=(Product("x", 0.5, 1, "bank", 2),))
    second = Stage(t=0.5, b=(0.5,), measures=(norm, dot), scalars={"w_0": 3, "b_0": 0})
    plan = Plan((first, second), (1.0, 0.0))
    assert Plan.from_json(plan.to_json()) == plan


def with_stage(**changes):
    return changed(stages=[{"t": 1.0, **changes}, {"t": 0.5}])


def told(text):
    """The error of a text."""
    with pytest.raises(ValueError, match=r"Plan\.load: text: ") as error:
        Plan.from_json(text)
    return str(error.value)


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (with_stage(a_x=10**400), "stage 0: Stage: every coefficient is finite; got a_x = inf"),
        (with_stage(t=12345).replace("12345", "7" * 5000), "got t = inf"),
        (with_stage(b=[0.0, 10**400]), r"stage 0: .*got b\[1\] = inf"),
        (with_stage(noise=[[10**400, 1.0]]), "stage 0: Stage: noise streams are integers"),
        (with_stage(noise=[[1, 10**400]]), "stage 0: Stage: noise weights are finite; got inf"),
        (with_stage(noise=[[math.nan, 1]]), "stage 0: Stage: noise streams are integers"),
        (with_stage(noise=5), "stage 0: Stage: noise is a sequence"),
        (with_stage(x0_p=math.inf), "got x0_p = inf"),
        (with_stage(clip=[-1, 10**400]), "stage 0: Stage: clip is"),
        (with_stage(products=5), "stage 0: Stage: products are fastdiff.Product"),
        (with_stage(products=[5]), "stage 0, entry 0 of products, is an object; got 5"),
        (with_stage(products=[{"into": "x"}]), "stage 0, entry 0 of products, has no weight"),
        (
            with_stage(products=[{"into": "x", "weight": 10**400, "entry": 0, "of": "x"}]),
            "stage 0, entry 0 of products,: Product: .*got weight = inf",
        ),
        (with_stage(measures=[{"into": 0}]), "entry 0 of measures, has no num"),
        (with_stage(measures=[{"into": 0, "num": 3}]), "Measure: num is a Reduction; got 3"),
        (
            with_stage(measures=[{"into": 0, "num": {"kind": "sum", "a": ["z"]}}]),
            "entry 0 of measures,, num,: Reduction: operands are",
        ),
        (with_stage(scalars={"c": 10**400}), "the scalar of 'c' is an integer from 0"),
        (with_stage(scalars=5), "stage 0: Stage: scalars is a mapping"),
        (changed(times=[1.0, 10**400]), r"got times\[0\] = 1.0, times\[1\] = inf"),
        (changed(times=5), "times is a sequence of floats; got 5"),
        (changed(prior_scale=10**400), "prior_scale is positive and finite; got inf"),
        (changed(version=10**400), "version is a positive integer; got inf"),
        (changed(version=2**190), "newer fastdiff"),
        (changed(schedule={"kind": "VPLinear", "beta_min": HUGE}), "schedule: "),
        (changed(solver="a\x1b[2Jb"), r"solver is printable text, .*got 'a\\x1b\[2Jb'"),
        (changed(solver="\ud800"), r"solver is printable text, .*got '\\ud800'"),
        (changed(solver="two\nlines"), "solver is printable text"),
        ("\ufeff" + two().to_json(), "begins with a byte-order mark"),
    ],
)
def test_the_field_that_is_wrong_is_named(text, says):
    message = told(text)
    assert len(message) <= 300
    assert re.search(says, message), message


LONG = "k" * 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        changed(**{LONG: 1}),
        changed(solver=LONG),
        changed(prediction=LONG),
        changed(schedule={"kind": LONG}),
        changed(schedule={"kind": "VPLinear", LONG: 1}),
        changed(schedule=LONG),
        changed(version=LONG),
        changed(times=[LONG] * 3),
        changed(times=[[[[[[LONG]]]]]]),
        with_stage(**{LONG: 1}),
        with_stage(a_x=LONG),
        with_stage(a_x=[1] * 100_000),
        with_stage(b=[LONG]),
        with_stage(b={LONG: 1}),
        with_stage(noise=[[1, LONG]]),
        with_stage(noise=[LONG]),
        with_stage(clip=LONG),
        with_stage(threshold=[0.5] * 100_000),
        with_stage(evaluate=LONG),
        with_stage(scalars={LONG: 1}),
        with_stage(products=[{LONG: 1}]),
        with_stage(products=[{"into": LONG, "weight": 1, "entry": 0, "of": "x"}]),
        with_stage(measures=[{"into": 0, "num": {"kind": LONG, "a": ["x"]}}]),
        with_stage(measures=[{"into": 0, "num": {"kind": "sum", "a": [LONG]}}]),
        f'{{"{LONG}": 1, "{LONG}": 2}}',
        LONG,
        "[" * 900 + "]" * 900,
        with_stage(b=json.loads("[" * 500 + "]" * 500)),
    ],
)
def test_messages_are_short_whatever_a_file_holds(text):
    message = told(text)
    assert len(message) <= 300
    assert message.isprintable()


def test_loading_takes_time_in_proportion():
    keys = json.dumps({f"key {i}": i for i in range(100_000)})
    zeros = with_stage(b=[0] * 400_000)
    twice = keys[:-1] + ', "key 7": 1}'
    start = time.perf_counter()
    assert "not a plan" in told(keys)
    assert "'key 7' stands twice" in told(twice)
    assert Plan.from_json(zeros).stages[0].b == ()
    assert time.perf_counter() - start < 10.0  # a quadratic scan takes minutes


def test_a_file_larger_than_the_limit_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    two().save(path)
    size = path.stat().st_size
    assert Plan.load(path, max_bytes=size) == two()
    with pytest.raises(ValueError, match=f"at most {size - 1} bytes is read.*max_bytes="):
        Plan.load(path, max_bytes=size - 1)
    with pytest.raises(TypeError, match="max_bytes is an integer"):
        Plan.load(path, max_bytes="1")
    large = tmp_path / "large.json"
    with open(large, "wb") as file:
        file.truncate((64 << 20) + 1)  # no block of it is stored
    with pytest.raises(ValueError, match="at most 67108864 bytes"):
        Plan.load(large)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=f"{path}: not a plan: a plan is a regular file"):
            Plan.load(path)
    with pytest.raises(OSError, match=str(tmp_path)):
        Plan.load(tmp_path)
    link = tmp_path / "link"
    two().save(tmp_path / "plan.json")
    link.symlink_to("plan.json")
    assert Plan.load(link) == two()


def test_byte_order_marks_are_named(tmp_path):
    path = tmp_path / "plan.json"
    for encoding, says in (("utf-8-sig", "byte-order mark. Save"), ("utf-16", "UTF-16 by its")):
        path.write_text(two().to_json(), encoding=encoding)
        with pytest.raises(ValueError, match=says):
            Plan.load(path)


def test_saving_keeps_links_permissions_and_the_umask(tmp_path):
    path, link = tmp_path / "plan.json", tmp_path / "link.json"
    two().save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    ALL[0].save(link)
    assert link.is_symlink()
    assert Plan.load(path) == ALL[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OSError, match="device /dev/null"):
        two().save("/dev/null")


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Plan(stages=5, times=(1.0, 0.0)), TypeError, "stages is a sequence .*; got 5"),
        (lambda: Plan(stages="rows", times=(1.0, 0.0)), TypeError, "Stage rows; got str"),
        (lambda: Plan(two().stages, 5), TypeError, "times is a sequence of floats; got 5"),
        (lambda: two(noise=((math.nan, 1),)), ValueError, "noise streams .*; got nan"),
        (lambda: two(noise=(("1", 1),)), TypeError, "a draw is"),
        (lambda: two(x0_p=math.inf), ValueError, "x0_p = inf"),
        (lambda: two(a_x=10**400), ValueError, "a_x = an integer of 1329 bits"),
        (lambda: two(a_x=10**5000), ValueError, "a_x = an integer of 16610 bits"),
        (lambda: two(a_x=np.complex64(1)), TypeError, "a_x is a float"),
        (lambda: dataclasses.replace(two(), solver="\x9b2J"), ValueError, "printable"),
        (
            lambda: dataclasses.replace(two(), schedule=Steering()),
            ValueError,
            "schedule is printable text",
        ),
        (lambda: dataclasses.replace(two(), prediction=3), TypeError, "prediction is a string"),
    ],
)
def test_what_cannot_be_saved_is_not_built(make, error, says):
    with pytest.raises(error, match=says):
        make()
