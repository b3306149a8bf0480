# SPDX-License-Identifier: Apache-2.0
"""Plan files that were mutated: each is refused with a sentence, or is a plan in every respect.

`--many N` tries N times as many, and other ones in every run.
"""

import dataclasses
import json
import math

import pytest
import torch
from support import plans

import fastdiff as fd

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

REFUSALS = (ValueError, TypeError, OSError)
# A plan that loads may still be one that no backend or no tensor of this size can run.
UNRUNNABLE = (ValueError, TypeError, NotImplementedError)
SOLVERS = ("ddim", "deis-3", "dpmpp-2s", "ddpm", "heun")
NUMBERS = st.one_of(
    st.integers(-(10**400), 10**400),
    st.integers(-3, 70),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, 2.0**-126, 2**24, 2**63]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
SCALARS = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=8),
    st.sampled_from(["x0", "epsilon", "fastdiff-plan", "\ud800", "\x1b[2J", "\0"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [f.name for f in dataclasses.fields(fd.Stage)]
    + ["stages", "times", "solver", "prediction", "variable", "schedule", "prior_scale", "format"]
    + ["version", "unheard"]
)


@st.composite
def originals(draw):
    """The text of a valid plan, from a solver or from random rows."""
    if draw(st.booleans()):
        schedule, solver = fd.schedules.VPLinear(), draw(st.sampled_from(SOLVERS))
        return fd.plan(schedule, solver, 4, prediction="v", t_max=0.9).to_json()
    return draw(plans.strategy()).to_json()


def places(node, path=()):
    """Every path into a JSON value."""
    yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))


@st.composite
def edited(draw):
    """A plan's JSON with one to three places replaced, removed, doubled or added."""
    data = json.loads(draw(originals()))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data))))
        node = data
        for key in path[:-1]:
            node = node[key]
        how = draw(st.sampled_from(["replace", "remove", "double", "add"]))
        if not path:
            data = draw(VALUES) if how == "replace" and draw(st.booleans()) else data
        elif how == "remove":
            del node[path[-1]]
        elif how == "double" and isinstance(node, list):
            node.insert(path[-1], node[path[-1]])
        elif how == "add" and isinstance(node[path[-1]], dict):
            node[path[-1]][draw(NAMES)] = draw(VALUES)
        else:
            number = isinstance(node[path[-1]], int | float) and draw(st.booleans())
            node[path[-1]] = draw(NUMBERS if number else VALUES)
        if not isinstance(data, dict | list):
            break
    return json.dumps(data)  # with NaN and Infinity, which JSON has not


@st.composite
def damaged(draw):
    """A plan's bytes with some cut out, overwritten or put in."""
    raw = bytearray(draw(originals()).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        more = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b"[", b"{", b'"', b"-", b"e9"]))
        )
        raw[at : at + draw(st.integers(0, 5))] = more
    return bytes(raw)


@pytest.fixture(scope="module")
def settings(request):
    many = request.config.getoption("--many")

    def of(examples):
        return hypothesis.settings(
            max_examples=examples * many,
            deadline=None,
            database=None,
            derandomize=many == 1,
            suppress_health_check=list(hypothesis.HealthCheck),
        )

    return of


def network(x, t):
    return 0.5 * x.clamp(-1, 1)


def runs_or_is_refused(plan):
    """One run of two samples; what it gives may be any number."""
    if len(plan.stages) > 40 or plan.extras > 40:
        return
    x = torch.ones(2, 3)
    try:
        out = fd.sample(network, x, plan, seed=[1, 2], extras=[x] * plan.extras)
    except UNRUNNABLE:
        return
    assert out.shape == x.shape


def loaded(load):
    """The plan; None where it is refused, in a sentence of bounded length."""
    message = ""
    try:
        return load()
    except REFUSALS as error:
        message = str(error)
    assert 0 < len(message) < 2000
    return None


def is_whole(plan, path):
    """What every plan can do: be printed, compared, saved and loaded as its equal, and be run."""
    assert "\x1b" not in str(plan)
    str(plan).encode()
    assert repr(plan)
    assert plan.nfe <= len(plan.stages)
    text = plan.to_json()
    again = fd.Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    plan.save(path)
    assert fd.Plan.load(path) == plan
    runs_or_is_refused(plan)


def test_an_edited_plan_is_refused_or_whole(tmp_path, settings):
    @settings(400)
    @hypothesis.given(edited())
    def check(text):
        plan = loaded(lambda: fd.Plan.from_json(text))
        if plan is not None:
            is_whole(plan, tmp_path / "plan.json")

    check()


def test_a_damaged_file_is_refused_or_whole(tmp_path, settings):
    file = tmp_path / "damaged.json"

    @settings(400)
    @hypothesis.given(damaged())
    def check(raw):
        file.write_bytes(raw)
        plan = loaded(lambda: fd.Plan.load(file))
        if plan is not None:
            is_whole(plan, tmp_path / "plan.json")

    check()


def test_any_bytes_at_all_are_refused(tmp_path, settings):
    file = tmp_path / "bytes.json"

    @settings(200)
    @hypothesis.given(st.binary(max_size=200))
    def check(raw):
        file.write_bytes(raw)
        with pytest.raises(REFUSALS):
            fd.Plan.load(file)

    check()


def test_random_plans_are_whole(tmp_path, settings):
    @settings(100)
    @hypothesis.given(plans.strategy())
    def check(plan):
        is_whole(plan, tmp_path / "plan.json")

    check()
