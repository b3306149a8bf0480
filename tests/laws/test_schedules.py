# SPDX-License-Identifier: Apache-2.0
"""Laws of every schedule."""

import math

import numpy as np
import pytest
import torch
from support.solvers import redefined

from fastdiff import grids, schedules
from fastdiff.schedules import (
    EDM,
    PREDICTIONS,
    VE,
    Custom,
    FlowMatching,
    VPCosine,
    VPDiscrete,
    VPLinear,
)

SCHEDULES = {
    "vp-linear": VPLinear(0.1, 20.0),
    "vp-constant": VPLinear(2.0, 2.0),
    "vp-cosine": VPCosine(0.008),
    "vp-cosine-0": VPCosine(0.0),
    "sd": VPDiscrete.scaled_linear(),
    "ddpm": VPDiscrete.linear(),
    "edm": EDM(0.002, 80.0, 0.5),
    "flow": FlowMatching(),
    "custom": Custom(lambda t: np.cos(0.5 * np.pi * t), lambda t: np.sin(0.5 * np.pi * t)),
    "custom-ve": Custom(alpha=lambda t: 1.0, sigma=lambda t: t, t_range=(0.01, 50.0)),
}
ALL = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def interior(schedule, count=9):
    lo, hi = schedule.domain
    hi = min(hi, 80.0)
    # away from the knots of discrete schedules, where one-sided derivatives differ
    return lo + (hi - lo) * (np.arange(1, count + 1) + 0.0123) / (count + 2)


@ALL
def test_time_survives_the_round_trip_through_lambda(schedule):
    lo, hi = schedule.domain
    hi = min(hi, 80.0)
    near = np.logspace(-14, -1, 200) * (hi - lo)
    t = np.concatenate([np.linspace(lo, hi, 2001), lo + near, hi - near])
    back = schedule.t_of_lambda(schedule.lambda_t(t))
    np.testing.assert_allclose(back, t, rtol=0, atol=1e-10)


@ALL
def test_lambda_is_log_alpha_over_sigma(schedule):
    t = interior(schedule)
    expected = np.log(schedule.alpha(t) / schedule.sigma(t))
    np.testing.assert_allclose(schedule.lambda_t(t), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(schedule.rho(t), schedule.sigma(t) / schedule.alpha(t), rtol=1e-12)


@ALL
def test_drift_and_diffusion_are_the_derivatives(schedule):
    t = interior(schedule)
    eps = 1e-6 * t
    d_log_alpha = np.log(schedule.alpha(t + eps) / schedule.alpha(t - eps)) / (2 * eps)
    d_lambda = (schedule.lambda_t(t + eps) - schedule.lambda_t(t - eps)) / (2 * eps)
    np.testing.assert_allclose(schedule.f(t), d_log_alpha, rtol=1e-5, atol=1e-7)
    g2 = -2 * schedule.sigma(t) ** 2 * d_lambda
    np.testing.assert_allclose(schedule.g2(t), g2, rtol=1e-5)


@ALL
def test_model_time_is_invertible(schedule):
    t = interior(schedule)
    for prediction in PREDICTIONS:
        told = schedule.model_time(t, prediction)
        np.testing.assert_allclose(schedule.time_of_model(told, prediction), t, rtol=1e-12)


@ALL
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_every_prediction_follows_from_every_other(schedule, source, target):
    if "edm" in (source, target) and source != target and not isinstance(schedule, EDM):
        with pytest.raises(ValueError, match="belongs to the EDM schedule"):
            schedule.conversion(source, target, float(interior(schedule)[0]))
        return
    x0, eps = 0.7, -1.3
    if "edm" in (source, target) and not isinstance(schedule, EDM):
        return  # edm from edm: nothing to convert
    for t in interior(schedule):
        value = {name: _value(schedule, name, t, x0, eps) for name in (source, target)}
        x = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
        p, q = schedule.conversion(source, target, t)
        scale = abs(p * x) + abs(q * value[source])
        assert p * x + q * value[source] == pytest.approx(value[target], abs=1e-12 * (1 + scale))


def _value(schedule, name, t, x0, eps):
    """What a perfect network of this prediction returns, from its definition."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    x = alpha * x0 + sigma * eps
    if name == "edm":
        s, d = sigma / alpha, schedule.sigma_data
        c_skip, c_out = d * d / (s * s + d * d), s * d / np.hypot(s, d)
        return (x0 - c_skip * x / alpha) / c_out
    return {
        "epsilon": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "velocity": float(schedule.f(t)) * x + float(schedule.g2(t)) / (2 * sigma) * eps,
        "score": -eps / sigma,
    }[name]


def test_vp_preserves_variance_and_is_accurate_near_the_data():
    schedule = VPLinear()
    t = np.array([1e-12, 1e-8, 1e-3, 0.5, 1.0])
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-14)
    # sigma² = beta_min t + O(t²): forming 1 - alpha² would lose every digit at t = 1e-12
    assert schedule.sigma(1e-12) == pytest.approx(np.sqrt(0.1e-12), rel=1e-9)


def test_discrete_schedule_meets_its_training_steps():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    product = np.cumprod(1 - betas)
    schedule = VPDiscrete(betas=betas)
    t = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(schedule.alpha(t) ** 2, product, rtol=1e-12)
    np.testing.assert_array_equal(schedule.model_time(t), np.arange(1000))
    assert schedule == VPDiscrete(alphas_cumprod=product) or np.allclose(
        schedule.alphas_cumprod, VPDiscrete(alphas_cumprod=product).alphas_cumprod, rtol=1e-12
    )
    assert (schedule.alpha(0.0), schedule.sigma(0.0)) == (1.0, 0.0)


def test_edm_preconditioning_belongs_to_its_own_prediction():
    schedule = EDM(sigma_data=0.5)
    assert schedule.c_in(2.0, "edm") == pytest.approx(1 / np.sqrt(4.25))
    assert schedule.c_in(2.0, "epsilon") == 1.0
    assert schedule.model_time(2.0, "edm") == pytest.approx(np.log(2.0) / 4)
    assert schedule.model_time(2.0, "x0") == 2.0
    scaled = EDM(sigma_data=1.0, scale_input=True)
    assert scaled.c_in(2.0, "epsilon") == pytest.approx(1 / np.sqrt(5.0))
    assert VE is EDM


def test_prior_scale_is_that_of_unit_data():
    assert VPLinear().prior_scale(1.0) == pytest.approx(1.0)
    assert EDM().prior_scale(80.0) == 80.0
    assert FlowMatching().prior_scale(1.0) == 1.0


def test_aliases_of_diffusers_are_accepted():
    assert schedules.prediction_name("v_prediction") == "v"
    assert schedules.prediction_name("flow_prediction") == "velocity"
    assert schedules.prediction_name("sample") == "x0"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VPLinear(beta_min=-1.0), "beta_min is positive"),
        (lambda: VPLinear(beta_min=3.0, beta_max=1.0), "at least beta_min"),
        (lambda: VPCosine(s=-0.1), "s is at least 0"),
        (lambda: VPDiscrete(), "exactly one"),
        (lambda: VPDiscrete(betas=[0.1, 1.5]), r"in \(0, 1\)"),
        (lambda: VPDiscrete(alphas_cumprod=[0.5, 0.9]), "strictly decreases"),
        (lambda: VPDiscrete(alphas_cumprod=[0.5, 0.0]), "strictly decreases"),
        (lambda: EDM(sigma_min=1.0, sigma_max=0.5), "above sigma_min"),
        (lambda: Custom(np.cos, np.sin, grid_range=(0.5, 5.0)), "within t_range"),
        (lambda: FlowMatching(time_scale=0.0), "time_scale"),
        (lambda: Custom(np.sin, np.cos), "strictly decreases"),
        (lambda: Custom(np.cos, np.sin, t_range=(1.0, 0.0)), "lo < hi"),
        (lambda: schedules.prediction_name("epsilom"), "'epsilon'"),
        (lambda: FlowMatching().conversion("epsilon", "x0", 1.0), "does not follow"),
    ],
)
def test_bad_schedules_are_refused_with_the_reason(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPLinear("a"),
        lambda: VPLinear(0.1, "a"),
        lambda: EDM(0.1, "a"),
        lambda: EDM(scale_input="yes"),
        lambda: VPCosine(None),
        lambda: schedules.FlowMatching(time_scale=True),
    ],
)
def test_parameters_of_the_wrong_kind_are_refused(make):
    with pytest.raises(TypeError, match="; got"):
        make()


def test_a_discrete_schedule_takes_a_tensor():
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).requires_grad_()
    schedule = VPDiscrete(alphas_cumprod=product)
    np.testing.assert_allclose(schedule.alphas_cumprod, product.detach().numpy(), rtol=1e-12)


def test_custom_schedules_take_functions_of_arrays():
    with pytest.raises(TypeError, match=r"np\.cos, not math\.cos"):
        Custom(math.cos, math.sin)


@ALL
def test_what_a_class_defines_is_not_defined_again_below_it(schedule):
    assert redefined(type(schedule)) == set()


def test_the_check_finds_what_is_defined_again():
    class Other(VPLinear):
        __module__ = "fastdiff.other"

        def alpha(self, t):
            return t

    assert redefined(Other) == {"alpha"}


@pytest.mark.parametrize("grid", ["auto", "logsnr", "karras"])
def test_a_scale_that_rounding_leaves_is_zero_at_the_end_of_a_grid(grid):
    schedule = SCHEDULES["custom"]
    assert 0.0 < float(schedule.alpha(1.0)) < 1e-16
    times = grids.build(schedule, 5, grid)
    assert times[0] == 0.999
    assert np.diff(times).max() < -1e-4  # none of the steps is spent on rounding


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_length_of_a_short_step_is_as_accurate_as_that_of_a_long_one(name):
    schedule = SCHEDULES[name]
    t_max, t_min = schedule.t_max, schedule.t_floor
    t_max -= 0.01 * t_max * np.isinf(schedule.lambda_t(t_max))
    ends = np.geomspace(t_max, t_min, 9)
    for s in ends[:-1]:
        long = float(schedule.h(s, t_min))
        np.testing.assert_allclose(long, schedule.lambda_t(t_min) - schedule.lambda_t(s), rtol=1e-9)
        if isinstance(schedule, Custom):  # its callables are all there is
            continue
        for share in (1e-2, 1e-5, 1e-9, 1e-12):
            t = s - share * s
            # a step is twice as long as its halves where lambda is a line, to first order in share
            mid = s - 0.5 * (s - t)
            halves = float(schedule.h(s, mid)) + float(schedule.h(mid, t))
            assert float(schedule.h(s, t)) == pytest.approx(halves, rel=1e-11)
