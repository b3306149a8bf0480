# SPDX-License-Identifier: Apache-2.0
"""Grids: what each is uniform in, where it ends, what is refused."""

import numpy as np
import pytest
import torch

from fastdiff import grids
from fastdiff.schedules import EDM, FlowMatching, VPCosine, VPDiscrete, VPLinear

VP = VPLinear()
PLAIN = [
    "uniform",
    "quadratic",
    "power(3)",
    "logsnr",
    "karras",
    "karras(5)",
    "exponential",
    "shift(3)",
]


@pytest.mark.parametrize("schedule", [VP, VPCosine(), VPDiscrete.linear(), EDM()], ids=str)
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_grids_strictly_decrease_between_their_ends(schedule, name, steps):
    if name.startswith("shift") and isinstance(schedule, EDM):
        with pytest.raises(ValueError, match="maps times in"):
            grids.build(schedule, steps, name)
        return
    times = grids.build(schedule, steps, name)
    assert times.dtype == np.float64
    assert times.shape == (steps + 1,)
    assert np.all(np.diff(times) < 0)
    assert (times[0], times[-1]) == (schedule.t_max, schedule.t_min)


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("uniform", lambda t: t),
        ("quadratic", np.sqrt),
        ("power(3)", lambda t: t ** (1 / 3)),
        ("logsnr", VP.lambda_t),
        ("exponential", lambda t: np.log(VP.rho(t))),
        ("karras", lambda t: VP.rho(t) ** (1 / 7)),
        ("karras(rho=3)", lambda t: VP.rho(t) ** (1 / 3)),
        ("shift(3)", lambda t: t / (3 - 2 * t)),
    ],
)
def test_grid_is_uniform_in_its_variable(name, variable):
    spacing = np.diff(variable(grids.build(VP, 9, name)))
    np.testing.assert_allclose(spacing, spacing[0], rtol=1e-9)


def test_ends_are_overridable():
    times = grids.build(VP, 5, "logsnr", t_max=0.8, t_min=0.05)
    assert (times[0], times[-1]) == (0.8, 0.05)


def test_edm_grid_steps_from_sigma_min_to_zero():
    edm = EDM(sigma_min=0.002, sigma_max=80.0)
    times = grids.build(edm, 18)
    i = np.arange(18)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(times, [*karras, 0.0], rtol=1e-12)


def test_resolution_shift_is_applied_once():
    s = np.linspace(1, 0, 5)
    expected = 3 * s / (1 + 2 * s)
    np.testing.assert_allclose(grids.build(FlowMatching(), 4, "shift(3)"), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("linspace", [999, 799, 599, 400, 200, 0]),
        ("leading", [830, 664, 498, 332, 166, 0]),
        ("leading(1)", [831, 665, 499, 333, 167, 1]),
        ("trailing", [999, 832, 666, 499, 332, 166]),
    ],
)
def test_training_step_spacings_are_those_of_diffusers(name, indices):
    schedule = VPDiscrete.scaled_linear()
    times = grids.build(schedule, 6, name)
    told = schedule.model_time(times)
    np.testing.assert_array_equal(told, [*indices, 0])  # at sigma = 0 no network is called
    assert times[-1] == 0.0


def test_explicit_times_of_any_kind_are_taken():
    for times in ([1.0, 0.5, 0.1], np.array([1.0, 0.5, 0.1]), torch.tensor([1.0, 0.5, 0.1])):
        np.testing.assert_allclose(grids.build(VP, 2, times), [1.0, 0.5, 0.1], rtol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((VP, 5, "karas"), {}, ValueError, "'karras'"),
        ((VP, 5, "karras(x)"), {}, ValueError, "is a number"),
        ((VP, 5, "karras(-1)"), {}, ValueError, r"lies in \[0.01, 1000\]"),
        ((VP, 5, "karras(0.001)"), {}, ValueError, r"lies in \[0.01, 1000\]"),
        ((VP, 5, "shift(1e30)"), {}, ValueError, r"lies in \[0.01, 1000\]"),
        ((VP, 5, None), {}, TypeError, "a sequence of times"),
        ((VP, 5, 3.0), {}, TypeError, "a sequence of times"),
        ((VP, 5, "uniform(2)"), {}, ValueError, "takes no parameter"),
        ((VP, 0), {}, ValueError, "at least 1"),
        ((VP, 2.0), {}, TypeError, "integer"),
        ((VP, True), {}, TypeError, "integer"),
        ((VP, 99999999999), {}, ValueError, "at most 1000000; got 99999999999"),
        ((VP, 10**5000), {}, ValueError, "got an integer of about 5000 digits"),
        ((VP, 2, 10**400), {}, ValueError, "an integer that float64 cannot hold"),
        ((VP, 2, [1.0, 0.5, 10**400]), {}, ValueError, "an integer that float64 cannot hold"),
        ((VP, 2, "uniform"), {"t_max": 10**400}, ValueError, "t_max .* integer of about 400"),
        ((VP, 2, "uniform"), {"t_min": 1j}, TypeError, "t_min is a number"),
        ((VP, 2, [0.1, 0.5, 1.0]), {}, ValueError, "grows.*reversed"),
        ((VP, 2, [1.0, 0.5, 0.5]), {}, ValueError, "repeats"),
        ((VP, 2, [1.0, float("nan"), 0.1]), {}, ValueError, "finite"),
        ((VP, 2, [1.5, 0.5, 0.1]), {}, ValueError, r"lie in \[0, 1\]"),
        ((VP, 2, [1.0, 0.5, -0.1]), {}, ValueError, r"lie in \[0, 1\]"),
        ((VP, 2, [1.0, 0.5]), {}, ValueError, r"length steps \+ 1 = 3"),
        ((VP, 2, [1.0, 0.5, 0.1]), {"t_min": 0.1}, ValueError, "its own ends"),
        ((VP, 2, "uniform"), {"t_max": 2.0}, ValueError, "t_max lies in"),
        ((VP, 2, "uniform"), {"t_max": "1"}, TypeError, "t_max is a number"),
        ((VP, 2, "uniform"), {"t_max": 0.1, "t_min": 0.5}, ValueError, "t_min < t_max"),
        ((VP, 2, "trailing"), {}, ValueError, "VPDiscrete"),
        ((VPDiscrete.linear(), 2, "trailing"), {"t_max": 0.5}, ValueError, "t_max"),
        ((VPDiscrete.linear(), 1001, "trailing"), {}, ValueError, "at most"),
        ((FlowMatching(), 5, "logsnr"), {}, ValueError, "Take grid='uniform' or 'quadratic'"),
    ],
)
def test_bad_grids_are_refused_with_the_reason(arguments, options, error, says):
    with pytest.raises(error, match=says):
        grids.build(*arguments, **options)
