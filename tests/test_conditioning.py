# SPDX-License-Identifier: Apache-2.0
"""Conditioning nested as one likes: what each leaf means to a run, a capture and a gradient."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from support.captures import network, plan_of
from support.core import needs_core

import fastdiff as fd
from fastdiff.conditioning import (
    PerStage,
    at_stage,
    flatten,
    leaves_of,
    rebuild,
    requiring_grad,
    tensors_in,
    where_of,
)

F64 = torch.float64
Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass(frozen=True)
class Held:
    """A dataclass that cannot be written to."""

    name: str
    value: Any


@dataclasses.dataclass
class Doubled:
    """A dataclass with an attribute that is no field."""

    value: Any

    def __post_init__(self):
        self.twice = self.value * 2


class Plain:
    """An object of which the library knows nothing."""

    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


# How a value is put into a container, and taken out of what the network is given.
HOLDS = {
    "alone": (lambda v: v, lambda c: c),
    "list": (lambda v: [1, v], lambda c: c[1]),
    "tuple": (lambda v: (v, "a"), lambda c: c[0]),
    "namedtuple": (lambda v: Pair(None, v), lambda c: c.second),
    "dataclass": (lambda v: Held("a", v), lambda c: c.value),
    "dict": (lambda v: {"a": v, "b": 2}, lambda c: c["a"]),
    "nested": (lambda v: {"a": [Pair(Held("b", 1), {"c": v})]}, lambda c: c["a"][0][1]["c"]),
}
EACH = pytest.mark.parametrize("hold", HOLDS)


def takes(hold):
    """A network that reads its conditioning out of a container."""
    return lambda x, t, c: network(x, t, HOLDS[hold][1](c))


# -- a value a stage -------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])
def test_each_stage_gets_its_own_value_wherever_it_stands(hold, solver):
    put, take = HOLDS[hold]
    plan, seen = plan_of(solver, 4), []
    values = torch.randn(len(plan.stages), 3)

    def net(x, t, c):
        seen.append(take(c).clone())
        return network(x, t, take(c))

    x = torch.randn(3, 5)
    got = fd.sample(net, x, plan, cond={"c": put(PerStage(values))})
    assert torch.equal(torch.stack(seen), values)
    assert torch.equal(got, fd.sample(network, x, plan, cond={"y": PerStage(values)}))


@needs_core
@EACH
def test_a_capture_reads_each_stages_value_wherever_it_stands(hold, recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(takes(hold), plan, graph="loop")
    for _ in range(3):
        values = PerStage(torch.randn(len(plan.stages), 3))
        wanted = fd.sample(network, x, plan, cond={"y": values}, graph=None)
        assert torch.equal(sampler(x, {"c": HOLDS[hold][0](values)}), wanted)
    assert sampler.stats().captures == 1


@EACH
@pytest.mark.parametrize("gradient", ["discrete", fd.Discrete(checkpoint=2), "backprop"])
def test_values_of_stages_have_their_gradients_wherever_they_stand(hold, gradient):
    plan, x = plan_of("dpmpp-2m", 4), torch.randn(3, 5, dtype=F64)
    values = torch.randn(4, 3, dtype=F64, requires_grad=True)

    def slope(net, cond, gradient):
        out = fd.sample(net, x, plan, cond=cond, gradient=gradient)
        return torch.autograd.grad(out.square().sum(), values)[0]

    wanted = slope(network, {"y": PerStage(values)}, "backprop")
    assert bool((wanted.abs().sum(1) > 0).all())
    got = slope(takes(hold), {"c": HOLDS[hold][0](PerStage(values))}, gradient)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_the_same_value_a_stage_in_two_places_is_one():
    plan, x, seen = plan_of("ddim", 3), torch.randn(2, 5), []
    staged = PerStage(torch.randn(3, 2))

    def net(x, t, a, b):
        seen.append((a, b[0]))
        return x

    fd.sample(net, x, plan, cond={"a": staged, "b": [staged]})
    assert all(torch.equal(a, b) for a, b in seen)


@pytest.mark.parametrize("kind", [Plain, Slots])
def test_a_value_a_stage_inside_another_object_is_refused(kind):
    staged = PerStage(torch.zeros(6, 3))
    with pytest.raises(TypeError, match=rf"PerStage .*cond\['c'\]\[0\], a {kind.__name__}"):
        fd.sample(network, torch.randn(3, 5), plan_of(), cond={"c": [kind(staged)]})


@pytest.mark.parametrize(
    ("cond", "says"),
    [
        ({"a": [PerStage(torch.zeros(5, 3))]}, r"one entry a stage .*6 here; got cond\['a'\]\[0\]"),
        ({"a": Held("b", PerStage(torch.zeros(5, 3)))}, r"got cond\['a'\]\.value of shape"),
        ({"a": {"b": PerStage(torch.zeros(6, 2))}}, r"one stage of cond\['a'\]\['b'\]"),
        (UserDict(a=torch.zeros(2)), r"3 here; got cond\['a'\] of shape"),
        (torch.zeros(4), r"got cond of shape \(4,\)"),
        ({"a": torch.tensor(1.0)}, r"got cond\['a'\] of shape \(\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(cond, says):
    with pytest.raises(ValueError, match=says):
        fd.sample(network, torch.randn(3, 5), plan_of(), cond=cond)


@pytest.mark.parametrize("staged", [False, True])
def test_a_tensor_without_values_is_refused(staged):
    """An embedding on the CPU makes numbers of nothing of an index on the meta device."""
    y = torch.zeros(6, 3, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match=r"got cond\['y'\] on meta and x on cpu"):
        fd.sample(
            network, torch.randn(3, 5), plan_of(), cond={"y": PerStage(y) if staged else y[0]}
        )


# -- what a network is given -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *({}, [], (), UserDict(), None, "a", 1.5, torch.Size([2])),
        *([torch.zeros(7)], Pair(1, torch.zeros(7)), Held("a", torch.zeros(7)), Plain(1)),
        *(UserDict(a=torch.zeros(3)), OrderedDict(a=torch.zeros(3)), {"a": {"b": []}}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_holds_nothing_to_replace_is_passed_itself(value):
    seen = []

    def net(x, t, c):
        seen.append(c)
        return x

    fd.sample(net, torch.randn(3, 5), plan_of("ddim", 2), cond={"c": value})
    assert all(each is value for each in seen)
    assert at_stage(value, 1) is value


def test_what_stands_beside_a_replaced_value_is_passed_itself():
    beside, staged = [torch.zeros(2)], PerStage(torch.randn(4, 3))
    cond = {"a": beside, "b": Held("b", staged), "c": (staged, beside)}
    made = at_stage(cond, 2)
    assert made["a"] is beside
    assert made["c"][1] is beside
    assert made["b"].name == "b"
    assert torch.equal(made["b"].value, staged.values[2])
    assert cond["b"].value is staged


def test_a_mapping_is_keywords_of_any_type():
    x, plan, y = torch.randn(3, 5), plan_of(), torch.randn(3)
    wanted = fd.sample(network, x, plan, cond={"y": y})
    assert torch.equal(fd.sample(network, x, plan, cond=UserDict(y=y)), wanted)
    guidance = fd.CFG(2.0, uncond=UserDict(y=0.0))
    guided = fd.sample(network, x, plan, cond={"y": y}, guidance=fd.CFG(2.0, uncond={"y": 0.0}))
    got = fd.sample(network, x, plan, cond=UserDict(y=y), guidance=guidance)
    assert torch.equal(got, guided)


# -- flat and back ---------------------------------------------------------------------------------

NESTED = {
    "a": torch.arange(3.0),
    "b": [torch.zeros(2), {"c": (torch.ones(1), None)}, "text"],
    "d": Held("e", PerStage(torch.zeros(4, 3))),
    "f": {},
    "g": (),
    "h": Pair(1.5, torch.ones(3, 2)),
}


def test_what_is_flattened_is_rebuilt():
    described, tensors = flatten(NESTED)
    assert [rows for _, rows in tensors] == [True, False, False, False, False]
    assert all(a is b for (a, _), b in zip(tensors, tensors_in(NESTED), strict=True))
    others = [torch.full_like(tensor, 7.0) for tensor, _ in tensors]
    made = rebuild(NESTED, iter(others))
    assert flatten(made)[0] == described
    assert all(a is b for a, b in zip(tensors_in(made), others, strict=True))
    assert type(made["h"]) is Pair
    assert made["d"].name == "e"
    assert made["b"][2] == "text"
    assert rebuild({"a": 1}, iter(())) == {"a": 1}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": torch.zeros(3)}, {"a": torch.ones(5)}, True),  # another batch
        ({"a": [torch.zeros(3)]}, {"a": [torch.zeros(5)]}, False),  # handed whole
        ({"a": torch.zeros(3)}, {"a": torch.zeros(3, dtype=F64)}, False),
        ({"a": torch.zeros(3)}, {"b": torch.zeros(3)}, False),
        ({"a": (1,)}, {"a": [1]}, False),
        ({"a": 1}, {"a": 1.0}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": 0.0}, {"a": -0.0}, False),
        ({"a": float("nan")}, {"a": float("nan")}, True),
        ({"a": {}}, {"a": ()}, False),
        ({"a": {}}, {"a": None}, False),
        ({"a": {"b": 1}}, {"a": OrderedDict(b=1)}, False),
        ({"a": Held("b", 1)}, {"a": Held("c", 1)}, False),
        ({"a": Held("b", 1)}, {"a": Pair("b", 1)}, False),
        ({"a": PerStage(torch.zeros(4, 3))}, {"a": torch.zeros(4, 3)}, False),
    ],
)
def test_a_description_is_equal_where_a_capture_may_be_shared(one, other, same):
    assert (flatten(one)[0] == flatten(other)[0]) == same
    if same:
        assert hash(flatten(one)[0]) == hash(flatten(other)[0])


@needs_core
def test_a_capture_reads_attributes_that_are_no_fields(recorder):
    def net(x, t, c):
        return network(x, t, c.twice)

    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(net, plan, graph="loop")
    for _ in range(3):
        cond = {"c": Doubled(torch.randn(3))}
        assert torch.equal(sampler(x, cond), fd.sample(net, x, plan, cond=cond, graph=None))
    assert sampler.stats().captures == 1


def test_places_are_told_as_they_were_written():
    told = [where_of(path) for _, path, _ in leaves_of(NESTED)]
    assert "cond['b'][1]['c'][0]" in told
    assert "cond['d'].value" in told
    assert "cond['h'][1]" in told


# -- tensors that require grad ---------------------------------------------------------------------

TRACKED = torch.zeros(3, requires_grad=True)


@pytest.mark.parametrize(
    ("cond", "where"),
    [
        (TRACKED, "cond"),
        ({"a": [TRACKED]}, r"cond\['a'\]\[0\]"),
        ({"a": Held("b", TRACKED)}, r"cond\['a'\]\.value"),
        ({"a": Doubled(TRACKED).twice}, r"cond\['a'\]"),
        ({"a": Pair(1, {"b": TRACKED})}, r"cond\['a'\]\[1\]\['b'\]"),
        ({"a": Plain(TRACKED)}, r"cond\['a'\]"),
        ({"a": [Slots(TRACKED)]}, r"cond\['a'\]\[0\]"),
        ({"a": [PerStage(TRACKED.expand(6, 3))]}, r"cond\['a'\]\[0\]"),
    ],
)
def test_a_tensor_that_requires_grad_is_found_wherever_it_stands(cond, where):
    with pytest.raises(ValueError, match=rf"{where} requires grad"):
        fd.sample(lambda x, t, *c, **k: x, torch.randn(3, 5), plan_of(), cond=cond)
    with torch.no_grad():
        fd.sample(lambda x, t, *c, **k: x, torch.randn(3, 5), plan_of(), cond=cond)


def test_an_attribute_that_is_no_field_is_looked_at():
    held = Held("a", 1)
    object.__setattr__(held, "hidden", TRACKED)
    assert requiring_grad({"a": held}) == ["cond['a'].hidden"]
    assert requiring_grad({"a": torch.nn.Linear(2, 2), "b": torch.zeros(1), "c": str}) == []
