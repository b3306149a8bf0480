# SPDX-License-Identifier: Apache-2.0
"""The continuous adjoint: of the order that it claims, on the flow that the plan was made for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.gradients import (
    ENDS,
    F64,
    VP,
    Mixture,
    apart,
    fine_plan,
    flow_gradients,
    orders,
    plan_of,
)
from torch import nn

import fastdiff as fd
from fastdiff.gradients.flow import schedule_of
from fastdiff.gradients.keeping import States


@pytest.fixture(scope="module")
def fine():
    """The exact flow: a plan fine enough to be one, and its gradients."""
    plan = fine_plan()
    return plan, flow_gradients(plan, fd.Discrete(checkpoint=25))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["epsilon", "x0"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_adjoint_is_of_its_order_in_x_conditioning_and_parameters(fine, order, form):
    plan, exact = fine
    found = [
        flow_gradients(plan, fd.AdjointDEIS(order, form, steps=m, grid="logsnr"))
        for m in (40, 80, 160)
    ]
    for k in range(3):  # a_x, a_z, a_theta
        errors = [float((g[k] - exact[k]).norm() / exact[k].norm()) for g in found]
        # the warm-up's step is of lower order, and its share not gone here
        assert orders(errors)[-1] > order - 0.45, (k, errors)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "form"), [(1, "epsilon"), (2, "epsilon"), (2, "x0")])
def test_the_published_forms_are_of_their_order(fine, order, form):
    plan, exact = fine
    found = [
        flow_gradients(plan, fd.AdjointDEIS(order, form, steps=m, grid="logsnr", published=True))
        for m in (60, 120, 240)
    ]
    for k in range(3):
        errors = [float((g[k] - exact[k]).norm() / exact[k].norm()) for g in found]
        assert orders(errors)[-1] > order - 0.25, (k, errors)


def test_ours_is_far_closer_than_the_published_at_few_steps(fine):
    plan, exact = fine

    def error(**options):
        (a_x, _, _) = flow_gradients(plan, fd.AdjointDEIS(steps=20, grid="logsnr", **options))
        return float(((a_x - exact[0]).norm(dim=1) / exact[0].norm(dim=1)).median())

    assert error(order=1, form="epsilon") < 0.5 * error(order=1, form="epsilon", published=True)
    for form in ("epsilon", "x0"):
        assert error(order=2, form=form) < 0.2 * error(order=2, form=form, published=True)


@pytest.mark.slow
def test_coarse_states_bound_the_order(fine):
    _, exact = fine
    errors = []
    for steps in (20, 40, 80):
        plan = fd.plan(VP, "ddim", steps, grid="logsnr", **ENDS)
        (a_x, _, _) = flow_gradients(plan, fd.AdjointDEIS(3))
        errors.append(float((a_x - exact[0]).norm() / exact[0].norm()))
    assert abs(orders(errors)[-1] - 1.0) < 0.25


@pytest.mark.parametrize("states", ["recorded", "resolve"])
def test_states_recorded_or_resolved_serve_a_grid_of_the_adjoints_own(fine, states):
    _, exact = fine
    plan = fd.plan(VP, "dpmpp-3m", 40, grid="uniform", **ENDS)
    for options in ({}, {"steps": 60}, {"steps": 50, "grid": "karras"}):
        (a_x, _, _) = flow_gradients(plan, fd.AdjointDEIS(3, states=states, **options))
        error = (a_x - exact[0]).norm(dim=1) / exact[0].norm(dim=1)
        assert float(error.median()) < 0.02, options


@pytest.mark.parametrize("states", ["recorded", "resolve"])
def test_states_begin_at_the_sample_where_a_plan_has_inner_points(fine, states):
    _, exact = fine
    plan = fd.plan(VP, "dpmpp-3m", 40, grid="logsnr", warmup="runge-kutta", **ENDS)
    (a_x, _, _) = flow_gradients(plan, fd.AdjointDEIS(3, states=states))
    error = (a_x - exact[0]).norm(dim=1) / exact[0].norm(dim=1)
    assert float(error.median()) < 0.02


def test_on_its_own_rows_the_adjoint_is_the_discrete_gradient():
    for order, form, name in ((3, "epsilon", "deis-logrho-3"), (2, "epsilon", "deis-logrho-2")):
        plan = fd.plan(VP, name, 12, grid="logsnr", **ENDS)
        expected = flow_gradients(plan, "discrete")
        assert apart(flow_gradients(plan, fd.AdjointDEIS(order, form)), expected) < 1e-12


def test_a_changing_conditioning_sums_to_a_constant_ones_gradient(fine):
    plan, _ = fine
    coarse = fd.plan(VP, "dpmpp-3m", 40, grid="logsnr", **ENDS)
    network = Mixture()
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    psi = torch.linspace(0.5, 1.5, 41, dtype=F64)[:-1, None]  # of time, smooth
    z = torch.zeros(40, 16, dtype=F64, requires_grad=True)
    out = fd.sample(
        *(network, x, coarse), cond={"z": fd.PerStage(z)}, gradient=fd.AdjointDEIS(2)
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.sum(), z)
    constant = torch.zeros(16, dtype=F64, requires_grad=True)
    out = fd.sample(network, x, plan, cond={"z": constant}, gradient="discrete")
    (expected,) = torch.autograd.grad(out.sum(), constant)
    assert apart([got.sum(0)], [expected]) < 0.03
    # against a function of time: the gradient along z(t) = r psi(t)
    stages = len(plan.stages)
    wide = torch.linspace(0.5, 1.5, stages + 1, dtype=F64)[:-1, None]
    r = torch.zeros(16, dtype=F64, requires_grad=True)
    cond = {"z": fd.PerStage(wide * r)}
    (expected,) = torch.autograd.grad(
        fd.sample(network, x, plan, cond=cond, gradient="discrete").sum(), r
    )
    assert apart([(psi * got).sum(0)], [expected]) < 0.03
    with pytest.raises(NotImplementedError, match="the plan's own times"):
        fd.sample(
            *(network, x, coarse), cond={"z": fd.PerStage(z)}, gradient=fd.AdjointDEIS(2, steps=20)
        )  # fmt: skip


def test_along_drawn_noise_the_network_counts_twice():
    plan = fd.plan(VP, "ddim", 12, eta=1.0, grid="logsnr", **ENDS)
    expected = flow_gradients(plan, "discrete")
    assert apart(flow_gradients(plan, fd.AdjointDEIS(1)), expected) < 1e-12
    fine = fd.plan(VP, "ddim", 480, eta=1.0, grid="logsnr", **ENDS)
    discrete = flow_gradients(fine, "discrete")
    second = flow_gradients(fine, fd.AdjointDEIS(2))
    published = flow_gradients(fine, fd.AdjointDEIS(1, published=True))
    assert 1e-6 < apart(second, discrete) < 0.1
    assert 1e-6 < apart(published, discrete) < 0.2


def test_ends_without_a_finite_lambda_have_a_gradient():
    flow = fd.schedules.FlowMatching()

    class Velocity(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, x, t, z):
            return x - torch.tanh(x + self.mu) * (1 + z[:, None])

    plan = fd.plan(flow, "euler", 12, prediction="velocity", t_max=1.0, t_min=0.0)
    network = Velocity()
    discrete = flow_gradients(plan, "discrete", network)
    adjoint = flow_gradients(plan, fd.AdjointDEIS(2), network)
    assert apart(adjoint, discrete) < 0.3
    for options in ({"published": True}, {"states": "resolve"}):
        with pytest.raises(ValueError, match="needs alpha > 0 at the start"):
            flow_gradients(plan, fd.AdjointDEIS(2, **options), network)


@pytest.mark.parametrize(
    ("plan", "gradient", "error", "says"),
    [
        (plan_of(clip=1.0), fd.AdjointDEIS(), ValueError, "no clip and no threshold"),
        (plan_of(threshold=0.9), fd.AdjointDEIS(), ValueError, "no clip and no threshold"),
        (
            replace(plan_of(), schedule=None),
            fd.AdjointDEIS(),
            ValueError,
            r"AdjointDEIS\(schedule=",
        ),
        (plan_of("ddpm"), fd.AdjointDEIS(states="resolve"), NotImplementedError, "recorded states"),
        (plan_of("ddpm"), fd.AdjointDEIS(form="epsilon"), NotImplementedError, "x0 form"),
        (plan_of("ddpm"), fd.AdjointDEIS(steps=20), NotImplementedError, "cannot be interpolated"),
        (plan_of("ddim", eta=0.5), fd.AdjointDEIS(), NotImplementedError, "tau = 1"),
        (plan_of(), fd.AdjointDEIS(grid="karas"), ValueError, "karras"),
    ],
)
def test_flows_without_such_an_adjoint_are_refused_before_they_run(plan, gradient, error, says):
    calls = []
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(error, match=says):
        fd.sample(lambda x, t: calls.append(1) or x, x, plan, gradient=gradient, seed=0)
    assert calls == []


def test_a_loaded_plan_has_its_flow_and_one_made_by_hand_is_given_it():
    plan = fd.plan(VP, "dpmpp-2m", 10, **ENDS)
    loaded = fd.Plan.from_json(plan.to_json())
    expected = flow_gradients(plan, fd.AdjointDEIS(2))
    assert apart(flow_gradients(loaded, fd.AdjointDEIS(2)), expected) == 0.0
    loaded = replace(loaded, schedule=None)
    assert apart(flow_gradients(loaded, fd.AdjointDEIS(2, schedule=VP)), expected) == 0.0


# -- the schedule and the times --------------------------------------------------------------------


def betas(end=0.02):
    return np.linspace(1e-4, end, 100)


# Name: schedule, prediction, and another one that is easily taken for it.
SCHEDULES = {
    "vp-linear": (VP, "v", fd.schedules.VPLinear(beta_max=19.0)),
    "vp-cosine": (fd.schedules.VPCosine(), "epsilon", VP),
    "vp-discrete": (
        fd.schedules.VPDiscrete(betas=betas()),
        "epsilon",
        fd.schedules.VPDiscrete(betas=betas(0.021)),
    ),
    "edm": (fd.schedules.EDM(), "edm", fd.schedules.EDM(sigma_data=0.6)),
    "flow": (fd.schedules.FlowMatching(), "velocity", VP),
    "x0": (VP, "x0", fd.schedules.VPCosine()),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_made_for_a_schedule_do_not_contradict_it(name):
    schedule, prediction, other = SCHEDULES[name]
    made = 0
    for solver in fd.solvers.names():
        if fd.solvers.info(solver).measured_order is None:
            continue  # a distilled network's conversion need not be the schedule's
        try:
            plan = fd.plan(schedule, solver, 5, prediction=prediction)
        except ValueError:  # the solver does not take it
            continue
        made += 1
        by_hand = replace(plan, schedule=None)
        assert schedule_of(fd.AdjointDEIS(schedule=schedule), by_hand) is schedule, solver
        if (prediction, plan.variable) == ("x0", "x0"):
            continue  # rows that combine what the network returns tell nothing of alpha and sigma
        with pytest.raises(ValueError, match="schedule is the one that the plan was made for; got"):
            schedule_of(fd.AdjointDEIS(schedule=other), by_hand)
    assert made > 5


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_schedule_than_the_plans_is_refused(name):
    schedule, prediction, other = SCHEDULES[name]
    plan, calls = fd.plan(schedule, "dpmpp-2m", 5, prediction=prediction), []
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"schedule is the plan's own, .* differs from it"):
        fd.sample(
            *(lambda x, t: calls.append(1) or x, x, plan), gradient=fd.AdjointDEIS(schedule=other)
        )  # fmt: skip
    assert calls == []
    assert schedule_of(fd.AdjointDEIS(schedule=schedule), plan) == schedule


def test_functions_of_the_same_numbers_are_the_same_schedule():
    def custom(name="mine"):
        return fd.schedules.Custom(
            lambda t: np.cos(np.pi / 2 * t),
            lambda t: np.sin(np.pi / 2 * t),
            (0.01, 0.99),
            name=name,
        )

    first, second = custom(), custom("another")
    plan = fd.plan(first, "dpmpp-2m", 5)
    assert schedule_of(fd.AdjointDEIS(schedule=second), plan) is first
    loaded = fd.Plan.from_json(plan.to_json())  # it has the name alone
    with pytest.raises(ValueError, match=r"without its functions.*AdjointDEIS\(schedule="):
        schedule_of(fd.AdjointDEIS(), loaded)
    assert schedule_of(fd.AdjointDEIS(schedule=second), loaded) is second
    with pytest.raises(ValueError, match="the plan was made for; got"):
        schedule_of(fd.AdjointDEIS(schedule=VP), loaded)


def test_a_schedule_is_one_of_the_librarys():
    with pytest.raises(TypeError, match=r"one of fastdiff\.schedules"):
        fd.AdjointDEIS(schedule="vp")


def test_times_that_rise_are_refused():
    """States are found by their time: a plan that goes back up has several at one time."""

    def stage(t, **fields):
        return fd.Stage(t=t, model_time=t, b=(-0.1,), **fields)

    restart = fd.Plan(
        (stage(0.9), stage(0.5, c=0.3, noise=((1, 1.0),)), stage(0.7), stage(0.3)),
        (0.9, 0.5, 0.7, 0.3, 0.05),
    )
    encode = fd.Plan((stage(0.1), stage(0.5)), (0.1, 0.5, 0.9))
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    for plan, says in ((restart, r"times\[1\] = 0.5, times\[2\] = 0.7"), (encode, r"times\[0\]")):
        gradient = fd.AdjointDEIS(1, schedule=VP)
        with pytest.raises(NotImplementedError, match=f"decrease throughout; got {says}.*discrete"):
            fd.sample(lambda x, t: x, x, plan, gradient=gradient, seed=0)
        results = []
        for gradient in ("backprop", "discrete"):  # which serve them
            out = fd.sample(lambda x, t: torch.tanh(x), x, plan, gradient=gradient, seed=0)
            results.append(torch.autograd.grad(out.sum(), x))
        assert apart(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("solver", ["heun", "deis-rk4", "rex-1"])
def test_states_are_those_that_the_run_went_on_from(fine, solver):
    """A method that evaluates twice at one time predicts a state before it accepts one."""
    _, exact = fine
    plan = fd.plan(VP, solver, 16, grid="logsnr", **ENDS)
    assert len({stage.t for stage in plan.stages}) < len(plan.stages)
    for options in ({}, {"steps": 32}, {"steps": 24, "grid": "karras"}):
        found = flow_gradients(plan, fd.AdjointDEIS(2, **options))
        assert apart(found, exact) < 0.08, options
    recorded = States(plan)
    assert recorded.times == sorted(set(recorded.times), reverse=True)
    assert set(recorded.times) == set(plan.times)


def test_guidance_that_changes_along_the_run_has_no_flow():
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)

    def network(x, t, y):
        return torch.tanh(x) * y[:, None]

    plan, y = plan_of(), torch.ones(3, dtype=F64)
    options = {"cond": {"y": y}, "gradient": fd.AdjointDEIS(2)}
    changing = fd.CFG([1.0, 2.0, 3.0, 3.0, 2.0, 1.0], {"y": 0.0})
    with pytest.raises(NotImplementedError, match="one scale a stage has no value between stages"):
        fd.sample(network, x, plan, guidance=changing, **options)
    results = []
    for scale in (2.0, [2.0] * 6, torch.full((3,), 2.0)):
        out = fd.sample(network, x, plan, guidance=fd.CFG(scale, {"y": 0.0}), **options)
        results.append(torch.autograd.grad(out.sum(), x))
    assert apart(results[1], results[0]) < 1e-12
    assert apart(results[2], results[0]) < 1e-12
