# SPDX-License-Identifier: Apache-2.0
"""The conditioning of two branches in one call: what is joined, shared, and refused."""

import dataclasses
import math
from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.conditioning import PerStage
from fastdiff.guidance.joining import joined

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Held:
    value: Any


Y = torch.tensor([5, 6])
SHARED, OTHER = torch.randn(7), torch.randn(7)
STAGED = PerStage(torch.arange(8.0).reshape(4, 2))


def join(cond, uncond, batch=2):
    return joined((uncond, cond), batch)


# -- what is joined --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uncond", "wanted"),
    [
        (9, [9, 9, 5, 6]),
        (9.0, [9, 9, 5, 6]),
        (torch.tensor(9), [9, 9, 5, 6]),
        (torch.tensor([9]), [9, 9, 5, 6]),
        (torch.tensor([8, 9]), [8, 9, 5, 6]),
        (torch.tensor([8, 9], dtype=torch.uint8), [8, 9, 5, 6]),
        (Y, [5, 6, 5, 6]),
    ],
)
def test_a_branch_may_give_samples_one_sample_or_a_number(uncond, wanted):
    assert join({"y": Y}, {"y": uncond})["y"].tolist() == wanted
    assert join(Y, uncond).tolist() == wanted
    assert join({"a": {"b": Y}}, {"a": {"b": uncond}})["a"]["b"].tolist() == wanted


def test_one_sample_is_joined_as_any_other_number_of_them():
    y, z = torch.tensor([[1.0, 2.0]]), [SHARED]
    made = join({"y": y, "z": z}, {"y": 0.5}, batch=1)
    assert made["y"].tolist() == [[0.5, 0.5], [1.0, 2.0]]
    assert made["z"] is z


def test_more_than_two_branches_are_joined_in_their_order():
    conds = ({"y": 1}, {"y": torch.tensor([2, 3])}, {"y": Y, "z": "a"})
    assert joined(conds, 2)["y"].tolist() == [1, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("uncond", [{}, {"z": {}}, {"y": 0}, UserDict(y=0)])
def test_keys_that_a_branch_lacks_are_shared(uncond):
    made = join({"y": Y, "z": {"w": Y}}, uncond)
    assert made["z"]["w"].tolist() == [5, 6, 5, 6]


@pytest.mark.parametrize(
    "uncond", [0.0, torch.zeros(1), torch.zeros(2), PerStage(torch.zeros(4, 2))]
)
def test_values_of_stages_are_joined_stage_by_stage(uncond):
    made = join({"y": STAGED}, {"y": uncond})["y"]
    assert isinstance(made, PerStage)
    assert torch.equal(made.values, torch.cat([torch.zeros(4, 2), STAGED.values], 1))


@pytest.mark.parametrize("value", [{}, [], (), UserDict(), None, "a", 3, [1, "b"], Held("a")])
def test_constants_and_empty_containers_are_shared_and_may_be_named(value):
    assert join({"y": Y, "z": value}, {"y": 0})["z"] is value
    assert join({"y": Y, "z": value}, {"y": 0, "z": value})["z"] is value


# -- what is handed whole --------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [lambda v: [v], lambda v: (1, v), lambda v: Pair(v, 1), Held])
def test_a_tensor_inside_a_list_is_handed_whole(hold):
    value = hold(SHARED)
    assert join({"y": Y, "z": value}, {"y": 0})["z"] is value
    assert join({"y": Y, "z": value}, {"y": 0, "z": hold(SHARED)})["z"] is value
    with pytest.raises(TypeError, match="only tensors reached through dicts can differ"):
        join({"y": Y, "z": value}, {"y": 0, "z": hold(OTHER)})


@pytest.mark.parametrize("looks", [torch.zeros(2), torch.zeros(2, 3), STAGED])
@pytest.mark.parametrize("hold", [lambda v: [v], lambda v: Pair(v, 1), Held])
def test_what_looks_like_one_entry_a_sample_is_shared_by_name_alone(hold, looks):
    with pytest.raises(ValueError, match=r"looks like one entry a sample \(2\)"):
        join({"y": Y, "z": hold(looks)}, {"y": 0})
    value = hold(looks)
    assert join({"y": Y, "z": value}, {"y": 0, "z": hold(looks)})["z"] is value


def test_one_sample_looks_like_itself():
    with pytest.raises(ValueError, match=r"one entry a sample \(1\)"):
        join({"y": Y[:1], "z": [torch.zeros(1, 3)]}, {"y": 0}, batch=1)
    with pytest.raises(ValueError, match=r"one entry a sample \(1\)"):
        join({"y": Y[:1], "z": [PerStage(torch.zeros(4, 1, 3))]}, {"y": 0}, batch=1)


# -- structures that differ ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cond", "uncond", "error", "says"),
    [
        ({"y": Y}, {"z": 0}, ValueError, r"cond has no 'z' \(it has 'y'\)"),
        ({"a": {"y": Y}}, {"a": {"z": 0}}, ValueError, r"cond\['a'\] has no 'z'"),
        ({"a": {}}, {"a": {"z": 0}}, ValueError, "it has nothing"),
        ({"a": {"y": Y}}, {"a": 0}, TypeError, r"cond\['a'\] is a dict and uncond has int"),
        ({"a": Y}, {"a": {"y": 0}}, TypeError, r"cond\['a'\] is Tensor"),
        ({"a": [SHARED]}, {"a": 0}, TypeError, r"cond\['a'\]\[0\] is Tensor"),
        ({"a": [SHARED, OTHER]}, {"a": [SHARED]}, TypeError, r"cond\['a'\]\[1\] is Tensor"),
        ({"a": (1, 2)}, {"a": (1,)}, TypeError, r"cond\['a'\]\[1\] is int"),
        ({"a": [1, 2]}, {"a": []}, TypeError, r"cond\['a'\]\[0\] is int"),
        ({"a": []}, {"a": [1]}, TypeError, r"cond\['a'\] is list"),
        ({"a": [SHARED]}, {"a": [SHARED, OTHER]}, TypeError, r"cond\['a'\] has nothing at 1"),
        ({"a": Held(1)}, {"a": Pair(1, 2)}, TypeError, r"cond\['a'\] has nothing at 0"),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1}, 2]}, TypeError, r"cond\['a'\] has nothing at 1"),
        ({"y": STAGED}, {"y": PerStage(torch.zeros(3, 2))}, ValueError, "4 stages .*got 3"),
        ({"y": Y}, {"y": STAGED}, TypeError, "a tensor or a number; got PerStage"),
        ({"y": Y}, {"y": True}, TypeError, "a tensor or a number; got bool"),
        ({"y": Y}, {"y": None}, TypeError, "a tensor or a number; got NoneType"),
        ({"y": Y}, {"y": torch.zeros(3, dtype=torch.int64)}, ValueError, r"uncond has \(3,\)"),
        ({"y": Y, "z": [STAGED]}, {"z": [PerStage(STAGED.values)]}, TypeError, "can differ"),
    ],
)  # fmt: skip
def test_structures_that_differ_are_refused_by_the_place(cond, uncond, error, says):
    with pytest.raises(error, match=says):
        join(cond, uncond)


@pytest.mark.parametrize(
    ("value", "other"),
    [("a", "b"), (1, 2), (1, 1.0), (1, True), (None, 1), ((1, 2), (1, 3)), (0.5, float("nan"))],
)
def test_constants_that_differ_are_refused(value, other):
    with pytest.raises(TypeError, match="only tensors can differ"):
        join({"y": Y, "z": value}, {"y": 0, "z": other})


# -- numbers that the conditioning's dtype does not hold -------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.uint8, -1),
        (torch.uint8, 256),
        (torch.int8, 300),
        (torch.int64, 0.5),
        (torch.int64, 10**400),
        (torch.int32, float("inf")),
        (torch.bool, 2),
        (torch.float16, 1e6),
        (torch.float32, 10**400),
        (torch.uint8, torch.tensor([-1])),
        (torch.int8, torch.tensor([300])),
        (torch.int32, torch.tensor([2**40])),
        (torch.int8, torch.tensor([200], dtype=torch.uint8)),
        (torch.int64, torch.tensor([0.5])),
        (torch.bool, torch.tensor([2])),
        (torch.float32, torch.tensor([1j])),
    ],
)
def test_a_value_that_the_dtype_does_not_hold_is_refused(dtype, value):
    with pytest.raises(ValueError, match=r"CFG: .*cond\['y'\].*uncond"):
        join({"y": torch.ones(2, dtype=dtype)}, {"y": value})


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.uint8, 255),
        (torch.int8, -128),
        (torch.bool, 1),
        (torch.float32, -math.inf),
        (torch.float16, 65504),
        (torch.int64, torch.tensor([7], dtype=torch.uint8)),
        (torch.float32, torch.tensor([0.5], dtype=torch.float64)),
        (torch.float32, torch.tensor([3])),
    ],
)
def test_a_value_that_the_dtype_holds_is_joined(dtype, value):
    made = join({"y": torch.ones(2, dtype=dtype)}, {"y": value})["y"]
    assert made.dtype == dtype
    assert made[:2].tolist() == [float(value)] * 2


# -- scales ----------------------------------------------------------------------------------------


def test_a_scale_is_the_guidances_own():
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    guidance = fd.CFG(scale, uncond={"y": 0})
    scale[0] = 9.0
    assert guidance.scale.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("scale", [np.ones((2, 2)), ["a"], [None], [[1.0]]])
def test_a_scale_a_stage_is_a_sequence_of_numbers(scale):
    with pytest.raises(TypeError, match="CFG: a scale a stage is a sequence of numbers"):
        fd.CFG(scale)
