# SPDX-License-Identifier: Apache-2.0
"""Schedules as data: what is written, what comes back, what is refused."""

import json

import numpy as np
import pytest

import fastdiff as fd
from fastdiff.schedules import (
    EDM,
    Custom,
    FlowMatching,
    VPCosine,
    VPDiscrete,
    VPLinear,
    from_dict,
)

BETAS = np.linspace(1e-4, 0.03, 37)
SCHEDULES = [
    VPLinear(0.1 + 1e-15, 19.999999999999996, 1000.0),
    VPCosine(1 / 3, 7.0),
    VPDiscrete.linear(),
    VPDiscrete.scaled_linear(0.001, 0.013, 250),
    VPDiscrete(betas=BETAS),
    VPDiscrete(alphas_cumprod=np.cumprod(1 - BETAS)),
    EDM(0.1 / 3, 77.7, 0.7, True),
    FlowMatching(1e-300),
]
TIMES = np.linspace(0.0, 1.0, 333)


def sine(**options):
    return Custom(
        lambda t: np.cos(0.5 * np.pi * t), lambda t: np.sin(0.5 * np.pi * t), name="sine", **options
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_survives_json_bit_for_bit(schedule):
    back = from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False)))
    assert back == schedule
    assert hash(back) == hash(schedule)
    assert str(back) == str(schedule)
    assert back.to_dict() == schedule.to_dict()
    for method in ("alpha", "sigma", "lambda_t", "model_time"):
        np.testing.assert_array_equal(
            getattr(back, method)(TIMES), getattr(schedule, method)(TIMES)
        )


def test_a_named_recipe_is_a_hundred_bytes():
    assert len(json.dumps(VPDiscrete.scaled_linear().to_dict())) < 120


def test_schedules_compare_by_value():
    assert VPDiscrete.linear() == VPDiscrete(betas=np.linspace(1e-4, 0.02, 1000))
    assert VPDiscrete.linear() != VPDiscrete.scaled_linear()
    assert VPLinear(1, 20) == VPLinear(1.0, np.float64(20.0))
    assert len({*SCHEDULES, *[from_dict(s.to_dict()) for s in SCHEDULES]}) == len(SCHEDULES)


def test_different_schedules_print_differently():
    nearly = BETAS.copy()
    nearly[18] *= 1 + 1e-12
    made = [*SCHEDULES, VPDiscrete(betas=nearly), VPLinear(0.1, 20.0), VPLinear(0.1, 20.0 + 1e-12)]
    assert len({str(s) for s in made}) == len(made)


def test_a_custom_schedule_is_kept_by_name_and_refuses_what_needs_its_functions():
    schedule = sine(grid_range=(0.02, 0.98))
    back = from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert back == schedule
    assert hash(back) == hash(schedule)
    assert str(back) == str(schedule)
    assert (back.name, back.t_range, back.grid_range) == ("sine", (0.0, 1.0), (0.02, 0.98))
    assert back.model_time(0.5) == 0.5
    for use in (
        lambda: back.alpha(0.5),
        lambda: back.conversion("v", "x0", 0.5),
        lambda: back.t_of_lambda(0.0),
        lambda: fd.plan(back, "ddim", 4, prediction="x0"),
    ):
        with pytest.raises(ValueError, match=r"'sine' was loaded by its name alone.*give the"):
            use()
    assert back != sine()
    assert schedule != sine(grid_range=(0.02, 0.98))  # other functions
    assert schedule != Custom.by_name("cosine", grid_range=(0.02, 0.98))


@pytest.mark.parametrize(
    ("record", "error", "says"),
    [
        (None, TypeError, "a dictionary .* got NoneType"),
        ({1: 2}, TypeError, "a dictionary"),
        ({}, ValueError, "kind: unknown kind of schedule None"),
        ({"kind": "VPLinea"}, ValueError, "'VPLinear'"),
        ({"kind": ["VPLinear"]}, ValueError, "unknown kind"),
        ({"kind": "__import__"}, ValueError, "unknown kind"),
        ({"kind": "Schedule"}, ValueError, "unknown kind"),
        ({"kind": "FlowMatching"}, ValueError, "got none for time_scale"),
        ({"kind": "FlowMatching", "time_scale": 1.0, "shift": 3.0}, ValueError, "field 'shift'"),
        ({"kind": "FlowMatching", "time_scale": "1"}, TypeError, "time_scale is a number"),
        ({"kind": "FlowMatching", "time_scale": True}, TypeError, "time_scale is a number"),
        ({"kind": "FlowMatching", "time_scale": float("nan")}, ValueError, "is positive"),
        ({"kind": "FlowMatching", "time_scale": 10**400}, ValueError, "time_scale .* 400 digits"),
        ({"kind": "VPCosine", "s": 10**5000, "time_scale": 1.0}, ValueError, "s is .* 5000 digits"),
        ({"kind": "EDM", "sigma_min": 1, "sigma_max": 2, "sigma_data": 1, "scale_input": 1},
         TypeError, "scale_input is True, False or None"),
        ({"kind": "VPDiscrete"}, ValueError, "got none for recipe"),
        ({"kind": "VPDiscrete", "log_alpha": [-0.1, -0.1]}, ValueError, "strictly decreases"),
        ({"kind": "VPDiscrete", "log_alpha": [0.0, -0.1]}, ValueError, "from below 0"),
        ({"kind": "VPDiscrete", "log_alpha": [-0.1, float("-inf")]}, ValueError, "is finite"),
        ({"kind": "VPDiscrete", "log_alpha": []}, ValueError, "values none"),
        ({"kind": "VPDiscrete", "log_alpha": ["a"]}, TypeError, "sequence of numbers"),
        ({"kind": "VPDiscrete", "log_alpha": [-(10**400)]}, TypeError, "float64 can hold"),
        ({"kind": "VPDiscrete", "log_alpha": [[-0.1], [-0.2, 3]]}, TypeError, "log_alpha"),
        ({"kind": "VPDiscrete", "recipe": "of_log_alpha", "beta_start": 0.1, "beta_end": 0.2,
          "num_steps": 3}, ValueError, "unknown recipe"),
        ({"kind": "VPDiscrete", "recipe": "linear", "beta_start": 0.1, "beta_end": 0.2,
          "num_steps": 10**12}, ValueError, "num_steps lies between 1 and 1000000"),
        ({"kind": "VPDiscrete", "recipe": "linear", "beta_start": 0.1, "beta_end": 0.2,
          "num_steps": 3.0}, TypeError, "num_steps is an integer"),
        ({"kind": "Custom", "name": "", "t_range": [0, 1], "grid_range": None, "time_scale": 1.0},
         TypeError, "name is a string"),
        ({"kind": "Custom", "name": "a", "t_range": [0, 1, 2], "grid_range": None,
          "time_scale": 1.0}, TypeError, "t_range is a pair"),
        ({"kind": "Custom", "name": "a", "t_range": [0, 1], "grid_range": [0, "1"],
          "time_scale": 1.0}, TypeError, "grid_range is a number"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_with_the_reason(record, error, says):
    with pytest.raises(error, match=says):
        from_dict(record)


def test_the_network_is_told_no_time_before_its_first_training_step():
    schedule = VPDiscrete.linear(num_steps=100)
    np.testing.assert_array_equal(schedule.model_time([0.0, 0.003, 0.01]), [0.0, 0.0, 0.0])
    assert schedule.model_time(0.015) == pytest.approx(0.5)
    told = np.linspace(0.0, 99.0, 1234)
    np.testing.assert_allclose(schedule.model_time(schedule.time_of_model(told)), told, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: VPDiscrete(betas=[10**400]), TypeError, "betas is a sequence of numbers"),
        (lambda: VPDiscrete(betas="abc"), TypeError, "betas is a sequence of numbers"),
        (lambda: VPDiscrete(betas=[0.1, 1e-300]), ValueError, "float64 cannot tell them apart"),
        (lambda: VPDiscrete.linear(num_steps=99999999999), ValueError, "num_steps lies between"),
        (lambda: VPLinear(0.1, 10**400), ValueError, "beta_max is a number that float64 can hold"),
        (lambda: VPLinear(0.1, 1j), TypeError, "beta_max is a number"),
        (lambda: sine(t_range=(0, 10**400)), ValueError, "t_range is a number that float64"),
        (lambda: sine(t_range=3.0), TypeError, "t_range is a pair"),
        (lambda: Custom(np.cos, np.sin, name=3), TypeError, "name is a string"),
    ],
)
def test_numbers_that_no_schedule_can_have_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
