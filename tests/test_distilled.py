# SPDX-License-Identifier: Apache-2.0
"""Samplers of distilled networks: the papers' loops, their limits and times, what is refused."""

import math

import numpy as np
import pytest
import torch
from oracles import distilled as oracles
from support.problems import two_blobs
from support.solvers import follow

import fastdiff as fd

VP, SD = fd.schedules.VPLinear(), fd.schedules.VPDiscrete.scaled_linear()
EDM, FLOW = fd.schedules.EDM(), fd.schedules.FlowMatching()
F64 = torch.float64


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# -- the papers' loops -----------------------------------------------------------------------------


def data_prediction(schedule):
    out = two_blobs(schedule, "x0")
    return lambda x, t: out(x, torch.full((len(x),), float(schedule.model_time(t)), dtype=F64))


def scales(schedule):
    return (lambda t: float(schedule.alpha(t))), (lambda t: float(schedule.sigma(t)))


def own_run(schedule, x, xi, *args, **options):
    plan = fd.plan(schedule, *args, prediction="x0", **options)
    return fd.sample(two_blobs(schedule, "x0"), x, plan, xi=xi)


@pytest.mark.parametrize("schedule", [VP, SD, FLOW, fd.schedules.VPCosine()], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samplers_are_their_papers_loops(schedule, steps):
    f, (alpha, sigma) = data_prediction(schedule), scales(schedule)
    x, z = values(6, 2), values(steps, 6, 2, seed=1)
    close = {"rtol": 1e-9, "atol": 1e-9}

    def scalings(t):
        if schedule is not SD:
            return 0.0, 1.0
        s = 10.0 * (1000.0 * t - 1.0)
        return 0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)

    def times(name):
        return fd.plan(schedule, name, steps, prediction="x0").times

    wanted = oracles.lcm(f, x, times("lcm"), alpha, sigma, scalings, z)
    torch.testing.assert_close(own_run(schedule, x, z, "lcm", steps), wanted, **close)
    wanted = oracles.nstep_stochastic(f, x, times("nstep-stochastic"), alpha, sigma, z)
    torch.testing.assert_close(own_run(schedule, x, z, "nstep-stochastic", steps), wanted, **close)
    wanted = oracles.progressive(f, x, times("progressive"), alpha, sigma)
    torch.testing.assert_close(own_run(schedule, x, None, "progressive", steps), wanted, **close)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_tcd_is_its_papers_loop(gamma):
    x, z = values(6, 2), values(5, 6, 2, seed=1)
    times = np.linspace(1.0, 0.0, 6)
    wanted = oracles.tcd(data_prediction(VP), x, times, *scales(VP), gamma, z)
    got = own_run(VP, x, z, "tcd", 5, gamma=gamma)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_is_its_papers_loop(steps):
    x, z = 80.0 * values(6, 2), values(steps, 6, 2, seed=1)
    times = fd.plan(EDM, "consistency", steps, prediction="x0").times
    wanted = oracles.consistency(data_prediction(EDM), x, times[:-1], 0.002, z)
    got = own_run(EDM, x, z, "consistency", steps)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VP, SD, EDM, FLOW], ids=str)
def test_tcd_goes_from_ddim_to_consistency_sampling(schedule):
    x, z = values(6, 2) * schedule.prior_scale(schedule.t_max), values(4, 6, 2, seed=1)
    grid = fd.plan(schedule, "lcm", 4, prediction="v").times
    close = {"rtol": 1e-9, "atol": 1e-9}
    flow = own_run(schedule, x, z, "tcd", 4, grid=grid, gamma=0.0)
    torch.testing.assert_close(flow, own_run(schedule, x, None, "ddim", 4, grid=grid), **close)
    if schedule is not SD:  # there index 0 stands for the data
        noisy = own_run(schedule, x, z, "tcd", 4, grid=grid, gamma=1.0)
        torch.testing.assert_close(noisy, own_run(schedule, x, z, "lcm", 4, grid=grid), **close)


@pytest.mark.parametrize("schedule", [VP, SD, FLOW], ids=str)
def test_a_consistency_model_of_the_data_is_an_lcm(schedule):
    x, z = values(6, 2), values(4, 6, 2, seed=1)
    got = own_run(schedule, x, z, "consistency", 4)
    lcm = own_run(schedule, x, z, "lcm", 4, timestep_scaling=math.inf)
    torch.testing.assert_close(got, lcm, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=str)
@pytest.mark.parametrize("name", ["lcm", "consistency", "nstep-stochastic", "progressive"])
def test_an_exactly_distilled_network_samples_the_data(schedule, name):
    # Gaussian data of deviation 0.3: the flow scales x by the ratio of the deviations
    plan = fd.plan(schedule, name, 5, prediction="x0")
    ends = {stage.t: plan.times[min(i + 2, 5)] for i, stage in enumerate(plan.stages)}
    if name == "progressive":
        ends = dict(zip(plan.times[:-1], plan.times[1:], strict=True))

    def deviation(t):
        return math.hypot(0.3 * float(schedule.alpha(t)), float(schedule.sigma(t)))

    def network(stage, point):
        t, at = stage.t, (lambda f, t: float(f(t)))
        if name in ("lcm", "consistency"):  # the end of the path
            return deviation(plan.times[-1]) / deviation(t) * point
        ratio = at(schedule.sigma, ends[t]) / at(schedule.sigma, t)  # what ddim's step needs
        gain = at(schedule.alpha, ends[t]) - ratio * at(schedule.alpha, t)
        return (deviation(ends[t]) / deviation(t) - ratio) / gain * point

    states = follow(plan, np.array([deviation(plan.times[0])]), network)
    for x, t in zip(states, plan.times[1:], strict=True):
        assert float(np.linalg.norm(x)) == pytest.approx(deviation(t), rel=1e-10)


def test_the_boundary_condition_makes_the_network_the_identity_at_eps():
    plan = fd.plan(EDM, "consistency", 2, grid=[1.0, 0.002, 0.001], prediction="edm")
    assert (plan.stages[1].p, plan.stages[1].q, plan.stages[1].c) == (1.0, 0.0, 0.0)
    other = fd.plan(EDM, "consistency", 2, grid=[1.0, 0.4, 0.1], prediction="x0", eps=0.1)
    assert other.stages[0].c == pytest.approx(math.sqrt(0.4**2 - 0.1**2))
    assert other.stages[1].c == 0.0


def test_times_of_a_distillation_are_its_own():
    for name in ("lcm", "nstep-stochastic", "progressive", "consistency", "tcd"):
        np.testing.assert_allclose(
            fd.plan(FLOW, name, 4, prediction="v").times, (1, 0.75, 0.5, 0.25, 0)
        )
        given = fd.plan(VP, name, 4, grid="logsnr").times
        assert given == fd.plan(VP, "ddim", 4, grid="logsnr").times
    assert fd.plan(SD, "tcd", 4).times == (1.0, 0.76, 0.5, 0.26, 0.001)
    assert fd.plan(SD, "lcm", 4).times == (1.0, 0.76, 0.5, 0.26, 0.0)
    few = fd.schedules.VPDiscrete.linear(num_steps=8)
    assert fd.plan(few, "lcm", 2).times == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.plan(SD, "tcd", 4, gamma=1.5), ValueError, r"tcd: gamma lies in \[0, 1\]"),
        (lambda: fd.plan(SD, "tcd", 4, gamma="a"), TypeError, "gamma is a number"),
        (lambda: fd.plan(SD, "lcm", 4, timestep_scaling=0), ValueError, "scaling is positive"),
        (lambda: fd.plan(SD, "lcm", 4, sigma_data=math.inf), ValueError, "sigma_data is positive"),
        (lambda: fd.plan(SD, "lcm", 51), ValueError,
         r"lcm's original lies between steps = 51 .* got 50\. Take fewer steps"),
        (lambda: fd.plan(SD, "lcm", 4, grid="lcm(4.5)"), ValueError, "whole; got 4.5"),
        (lambda: fd.plan(VP, "lcm", 4, grid="lcm"), ValueError, "needs a VPDiscrete"),
        (lambda: fd.plan(EDM, "consistency", 41, prediction="x0"), ValueError, "levels lies"),
        (lambda: fd.plan(EDM, "consistency", 2, eps=-1.0), ValueError, "eps is a time"),
        (lambda: fd.plan(EDM, "consistency", 2, eps=90.0), ValueError, "above eps = 90"),
        (lambda: fd.plan(SD, "lcm", 4, clip=1.0, threshold=0.9), ValueError, "not both"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_the_reason(make, error, says):
    with pytest.raises(error, match=says):
        make()
