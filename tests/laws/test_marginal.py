# SPDX-License-Identifier: Apache-2.0
"""The marginal law: where the network is right, every state is alpha x0 + sigma noise."""

import numpy as np
import pytest
from support.solvers import CASES, SCHEDULES, STOCHASTIC, VP, follow, is_straight, perfect, with_x0

import fastdiff as fd


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_perfect_prediction_stays_on_the_marginal(case, name):
    schedule, prediction = SCHEDULES[name]
    plan = with_x0(case).inside(schedule, prediction=prediction)
    if not is_straight(plan):
        pytest.skip("the velocity changes along the flow of a perfect prediction")
    start = np.array([schedule.alpha(plan.times[0]), schedule.sigma(plan.times[0])])
    states = follow(plan, start, perfect(schedule, prediction))
    # the last stage of a predictor-corrector corrects a state and goes on from it in one update
    assert plan.steps - len(states) in (0, 1)
    times = [*plan.times[1 : len(states)], plan.times[-1]]
    # rounding is relative to the state the run began with
    tolerance = 1e-12 * (1 + np.abs(start).sum())
    for x, t in zip(states, times, strict=True):
        assert x[0] == pytest.approx(float(schedule.alpha(t)), abs=tolerance)
        assert np.linalg.norm(x[1:]) == pytest.approx(float(schedule.sigma(t)), abs=tolerance)
        if not plan.stochastic:
            assert x[1] == pytest.approx(float(schedule.sigma(t)), abs=tolerance)


@pytest.mark.parametrize("case", STOCHASTIC, ids=str)
def test_every_stage_draws_from_its_own_stream(case):
    draws = [stream for stage in case.plan(VP, 6).stages for stream, _ in stage.noise]
    assert draws == [*range(1, len(draws) + 1)]
    assert draws


@pytest.mark.parametrize("case", STOCHASTIC, ids=str)
def test_no_noise_is_added_by_a_step_to_the_data(case):
    plan = case.plan(fd.schedules.VPDiscrete.linear(), 5, grid="trailing")
    assert plan.stages[-1].c == 0.0
    # before the last step, or before the one that is made again
    assert max(stage.c for stage in plan.stages[-3:-1]) > 0.0


def test_upper_variance_adds_no_noise_in_a_step_to_the_data():
    schedule = fd.schedules.VPDiscrete.linear()
    plan = fd.plan(schedule, "ddpm", 5, grid="trailing", variance="fixed_large")
    assert plan.stages[-1].c == 0.0
    assert plan.stages[-2].c > 0.0


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("form", ["epsilon", "x0"])
def test_ddim_draws_the_noise_of_its_paper(eta, form):
    plan = fd.plan(VP, fd.solvers.DDIM(eta=eta, form=form), 6, prediction=form)
    for stage, s, t in zip(plan.stages, plan.times[:-1], plan.times[1:], strict=True):
        u, w = (1.0, 0.0) if form == "x0" else (0.0, 1.0)
        of_x0 = stage.a_x * VP.alpha(s) + stage.b[0] * u
        of_eps = stage.a_x * VP.sigma(s) + stage.b[0] * w
        assert of_x0 == pytest.approx(float(VP.alpha(t)), abs=1e-12)
        assert np.hypot(of_eps, stage.c) == pytest.approx(float(VP.sigma(t)), abs=1e-12)
        beta = 1 - (VP.alpha(s) / VP.alpha(t)) ** 2
        expected = eta * np.sqrt(beta) * VP.sigma(t) / VP.sigma(s)  # the paper's eq. 16
        assert stage.c == pytest.approx(float(expected), rel=1e-9)
