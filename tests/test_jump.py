# SPDX-License-Identifier: Apache-2.0
"""jump=True: the last interval of any run is one evaluation, whose x0 is the result."""

import numpy as np
import pytest
import torch
from support.problems import two_blobs
from support.solvers import CASES, SCHEDULES, VP, follow, is_straight, perfect, with_x0

import fastdiff as fd

EDM, FLOW = fd.schedules.EDM(), fd.schedules.FlowMatching()
F64 = torch.float64


def start_of(plan):
    return fd.noise.prior(plan, (4, 2), seeds=0, dtype=F64)


def run(plan, **options):
    return fd.sample(
        two_blobs(plan.schedule, plan.prediction), start_of(plan), plan, seed=3, **options
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["vp-linear", "sd", "edm", "flow"])
def test_the_result_is_the_x0_where_the_last_interval_starts(case, name):
    schedule, prediction = SCHEDULES[name]
    case = with_x0(case)
    plan = case.inside(schedule, prediction=prediction, jump=True)
    seen = []
    got = run(plan, callback=lambda i, t, x, x0: seen.append((t, x0.clone())))
    t, x0 = seen[-1]
    assert t == plan.times[-2]
    torch.testing.assert_close(got, x0, rtol=1e-12, atol=1e-12)
    assert (plan.times[-1], plan.nfe) == (0.0, len(seen))
    plain = case.inside(schedule, prediction=prediction)
    assert plan.times[:-1] == plain.times[:-1]
    assert plan.nfe <= plain.nfe
    if case.info.nfe_per_step == 1:
        assert plan.nfe == plain.nfe


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_perfect_prediction_ends_at_the_data(case):
    plan = with_x0(case).plan(VP, 6, prediction="v", jump=True)
    if not is_straight(plan):
        pytest.skip("the velocity changes along the flow of a perfect prediction")
    start = np.array([VP.alpha(plan.times[0]), VP.sigma(plan.times[0])])
    end = follow(plan, start, perfect(VP, "v"))[-1]
    np.testing.assert_allclose(end, np.eye(len(end))[0], atol=1e-10)


@pytest.mark.parametrize("name", fd.solvers.names())
def test_one_step_is_the_networks_x0(name):
    for schedule in (VP, EDM, FLOW):
        plan = fd.plan(schedule, name, 1, prediction="velocity", jump=True, t_max=0.9)
        out = two_blobs(schedule, "x0")(start_of(plan), torch.full((4,), 0.9, dtype=F64))
        torch.testing.assert_close(run(plan), out, rtol=1e-9, atol=1e-9)
        assert (plan.nfe, plan.times) == (1, (0.9, 0.0))


def test_what_is_limited_is_limited_in_the_jump():
    for steps in (1, 3):
        plan = fd.plan(VP, "dpmpp-1", steps, clip=0.05, jump=True)
        assert float(run(plan).abs().max()) == pytest.approx(0.05)
        inner = fd.solvers.get("dpmpp-1", clip=0.05)
        around = fd.plan(VP, "recurrence", steps, inner=inner, jump=True)
        assert float(run(around).abs().max()) == pytest.approx(0.05)


def test_the_last_time_of_the_grid_is_not_read():
    ends = [fd.plan(VP, "deis-2", 4, grid=[1, 0.7, 0.4, 0.2, e], jump=True) for e in (0.1, 1e-3)]
    assert ends[0] == ends[1]
    assert ends[0] != fd.plan(VP, "deis-2", 4, grid=[1, 0.7, 0.4, 0.2, 0.1])
    inside = fd.schedules.Custom(
        lambda t: np.exp(-3 * t), lambda t: np.sqrt(-np.expm1(-6 * t)), t_range=(0.01, 1.0)
    )
    assert fd.plan(inside, "dpmpp-2m", 4, prediction="v", jump=True).times[-1] == 0.01


@pytest.mark.parametrize("grid", ["logsnr", "quadratic"])
def test_a_published_budget_is_spent_with_the_jump(grid):
    for steps in (2, 3, 6, 7):
        options = {"published": True, "grid": grid, "jump": True}
        plan = fd.plan(VP, "dpm-3", steps, **options)
        assert plan.nfe == steps
        without = fd.plan(VP, "dpm-3", steps - 1, published=True, grid=grid)
        assert len(plan.times) == len(without.times) + 1


def test_a_jump_of_a_solver_object_is_that_of_its_name():
    assert fd.plan(VP, fd.solvers.DDIM(eta=0.3), 4, jump=True) == fd.plan(
        VP, "ddim", 4, eta=0.3, jump=True
    )


def test_a_jump_has_its_gradient():
    plan = fd.plan(VP, "dpmpp-2m", 4, prediction="v", jump=True)
    network, grads = two_blobs(VP, "v"), []
    for gradient in ("backprop", "discrete"):
        x = start_of(plan).requires_grad_()
        out = fd.sample(network, x, plan, gradient=gradient)
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_an_adjoint_of_a_jump_that_is_no_state_of_the_flow_is_refused():
    inside = fd.schedules.Custom(
        lambda t: np.exp(-3 * t), lambda t: np.sqrt(-np.expm1(-6 * t)), t_range=(0.01, 1.0)
    )
    for solver in ("dpmpp-2m", "deis-2"):
        plan = fd.plan(inside, solver, 4, prediction="v", jump=True)
        x = start_of(plan).requires_grad_()
        with pytest.raises(NotImplementedError, match=r"jumps to x0, which is no state.*discrete"):
            fd.sample(two_blobs(inside, "v"), x, plan, gradient=fd.AdjointDEIS())


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.plan(VP, "ddim", 4, jump="yes"), ValueError, "jump is one of False, True"),
        (lambda: fd.plan(VP, "deis-4", 4, jump=True), ValueError,
         "got steps = 3.*one of the steps is the jump"),
        (lambda: fd.plan(FLOW, "ddim", 1, jump=True), ValueError, "x0 does not follow from eps"),
        (lambda: fd.plan(VP, "ddim", 0, jump=True), ValueError, "steps is at least 1"),
        (lambda: fd.plan(VP, "ddim", 2.5, jump=True), TypeError, "steps is an integer"),
        (lambda: fd.plan(VP, "ddim", 4, grid=[1, 0.5, 0.7, 0.2, 0], jump=True), ValueError,
         "strictly decrease"),
    ],
)  # fmt: skip
def test_jumps_that_make_no_sense_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
