# SPDX-License-Identifier: Apache-2.0
"""Laws every solver obeys, on every schedule, grid and prediction it serves."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.solvers.exponential import adams, lagrange, moments, phi, rho_quadrature

VP = fd.schedules.VPLinear()
SCHEDULES = {
    "vp-linear": (VP, "epsilon"),
    "vp-cosine": (fd.schedules.VPCosine(), "v"),
    "sd": (fd.schedules.VPDiscrete.scaled_linear(), "epsilon"),
    "edm": (fd.schedules.EDM(), "edm"),
    "ve": (fd.schedules.EDM(sigma_min=0.01, sigma_max=50.0), "score"),
    "flow": (fd.schedules.FlowMatching(), "velocity"),
    "custom": (
        fd.schedules.Custom(
            alpha=lambda t: np.cos(0.5 * np.pi * t),
            sigma=lambda t: np.sin(0.5 * np.pi * t),
            grid_range=(0.02, 0.98),
        ),
        "x0",
    ),
}
SOLVERS = fd.solvers.names()
DETERMINISTIC = [name for name in SOLVERS if not fd.solvers.info(name).stochastic]


def follow(plan, schedule, x0, eps):
    """The plan's own arithmetic on a network that is always right: one (x0, eps) throughout."""
    x, e, history, at_e = (
        schedule.alpha(plan.times[0]) * x0 + schedule.sigma(plan.times[0]) * eps,
        0.0,
        [],
        False,
    )
    states = []
    for stage in plan.stages:
        point = e if at_e else x
        u, w = schedule.components(plan.prediction, stage.t)
        out = u * x0 + w * eps
        h = stage.p * point + stage.q * out
        outputs = [h, *history]
        x_next = stage.a_x * x + stage.a_e * (e if stage.a_e else 0.0)
        x_next += sum(b * o for b, o in zip(stage.b, outputs, strict=False))
        e_next = stage.d_x * x + stage.d_e * e
        e_next += sum(g * o for g, o in zip(stage.g, outputs, strict=False))
        e_next = e_next if stage.writes_e else e
        at_e, moved = stage.writes_e, stage.writes_x
        x, e, history = x_next, e_next, outputs
        if moved:
            states.append(x)
    return states


def usable(solver, schedule, **options):
    """The plan of a solver on a schedule, started inside it where the solver must."""
    start = {}
    if isinstance(schedule, fd.schedules.FlowMatching):
        start = {"t_max": 0.99}
    return fd.plan(schedule, solver, 6, **start, **options)


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("name", SCHEDULES)
def test_perfect_prediction_stays_on_the_marginal(solver, name):
    schedule, prediction = SCHEDULES[name]
    plan = usable(solver, schedule, prediction=prediction)
    for x0, eps in ((1.0, 0.0), (0.0, 1.0), (0.7, -1.3)):
        states = follow(plan, schedule, x0, eps)
        assert len(states) == plan.steps
        for x, t in zip(states, plan.times[1:], strict=True):
            exact = float(schedule.alpha(t) * x0 + schedule.sigma(t) * eps)
            # rounding is relative to the state the run began with
            scale = abs(schedule.alpha(plan.times[0]) * x0) + abs(
                schedule.sigma(plan.times[0]) * eps
            )
            assert x == pytest.approx(exact, abs=1e-12 * (1 + scale))


@pytest.mark.parametrize(
    "grid", ["uniform", "quadratic", "power(3)", "logsnr", "karras", "exponential"]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_compiles_on_every_grid(solver, grid):
    for name in ("vp-linear", "sd", "edm"):
        schedule, prediction = SCHEDULES[name]
        plan = fd.plan(schedule, solver, 7, grid=grid, prediction=prediction)
        assert plan.steps == 7


@pytest.mark.parametrize(
    "solver", [s for s in DETERMINISTIC if fd.solvers.info(s).nfe_per_step == 1]
)
def test_first_step_of_a_multistep_solver_is_ddim(solver):
    first = fd.plan(VP, solver, 6, prediction="v").stages[0]
    ddim = fd.plan(VP, fd.solvers.DDIM(form="epsilon"), 6, prediction="v").stages[0]
    x0 = fd.plan(VP, fd.solvers.DDIM(form="x0"), 6, prediction="v").stages[0]
    same = x0 if solver.startswith("dpmpp") else ddim
    for name in ("a_x", "b", "p", "q"):
        np.testing.assert_allclose(getattr(first, name), getattr(same, name), rtol=1e-12)


@pytest.mark.parametrize(
    "other", ["deis-1", "deis-rhoab-1", "deis-logrho-1", "ipndm-1", "dpm-1", "dpmpp-1", "euler"]
)
@pytest.mark.parametrize("name", ["vp-linear", "edm", "sd", "flow"])
def test_first_order_members_are_all_ddim(other, name):
    schedule, _ = SCHEDULES[name]
    model = fd.models.GaussianMixture([0.4, 0.6], [[1.0, -1.0], [0.5, 2.0]], [[0.1] * 2, [0.3] * 2])
    network = model.network(schedule, "v")
    plans = [usable(s, schedule, prediction="v") for s in ("ddim", other)]
    x = fd.noise.prior(plans[0], (5, 2), seeds=0, dtype=torch.float64)
    results = [fd.sample(network, x, plan) for plan in plans]
    # epsilon and x0 forms differ by rounding, which alpha = 0.0066 at t = 1 enlarges
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["ddim", "deis-3", "dpm-3", "dpmpp-2m", "dpmpp-3s", "heun"])
def test_predictions_give_one_trajectory(solver):
    model = fd.models.GaussianMixture([0.4, 0.6], [[1.0, -1.0], [0.5, 2.0]], [[0.1] * 2, [0.3] * 2])
    for name in ("vp-linear", "edm", "sd"):
        schedule, _ = SCHEDULES[name]
        results = []
        for prediction in fd.schedules.PREDICTIONS:
            if prediction == "edm" and name != "edm":
                continue
            plan = fd.plan(schedule, solver, 6, prediction=prediction)
            x = fd.noise.prior(plan, (5, 2), seeds=0, dtype=torch.float64)
            results.append(fd.sample(model.network(schedule, prediction), x, plan))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("form", ["epsilon", "x0"])
def test_noise_keeps_the_marginal_variance(eta, form):
    plan = fd.plan(VP, fd.solvers.DDIM(eta=eta, form=form), 6, prediction=form)
    for stage, s, t in zip(plan.stages, plan.times[:-1], plan.times[1:], strict=True):
        u, w = (1.0, 0.0) if form == "x0" else (0.0, 1.0)
        of_x0 = stage.a_x * VP.alpha(s) + stage.b[0] * u
        of_eps = stage.a_x * VP.sigma(s) + stage.b[0] * w
        assert of_x0 == pytest.approx(float(VP.alpha(t)), abs=1e-12)
        assert math.hypot(of_eps, stage.c) == pytest.approx(float(VP.sigma(t)), abs=1e-12)
        beta = 1 - (VP.alpha(s) / VP.alpha(t)) ** 2
        expected = eta * np.sqrt(beta) * VP.sigma(t) / VP.sigma(s)  # the paper's eq. 16
        assert stage.c == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("rate", [0.7, 1.3, 2.2, 3.0, 4.1, 5.5])
def test_every_solver_compiles_on_custom_schedules(rate):
    schedule = fd.schedules.Custom(
        lambda t: np.exp(-rate * t**2),
        lambda t: np.sqrt(-np.expm1(-2 * rate * t**2)),
        t_range=(1e-3, 1.0),
    )
    for solver in SOLVERS:
        for grid in ("uniform", "logsnr", "karras"):
            assert fd.plan(schedule, solver, 5, grid=grid, prediction="v").steps == 5


def test_a_plan_says_how_strong_its_starting_noise_is():
    assert fd.plan(fd.schedules.EDM(), "heun", 5).prior_scale == 80.0
    assert fd.plan(VP, "ddim", 5).prior_scale == pytest.approx(1.0)
    flow = fd.plan(fd.schedules.FlowMatching(), "ddim", 5, prediction="v", t_max=0.9)
    assert flow.prior_scale == 0.9


@pytest.mark.parametrize("solver", ["deis-3", "deis-rhoab-3", "ipndm-3"])
def test_epsilon_multistep_is_lowered_when_asked(solver):
    lengths = [len(s.b) for s in fd.plan(VP, solver, 6, lower_order_final=True).stages]
    assert lengths == [1, 2, 3, 3, 2, 1]
    assert [len(s.b) for s in fd.plan(VP, solver, 6).stages] == [1, 2, 3, 3, 3, 3]


def test_published_lowering_is_that_of_few_steps():
    few = fd.plan(VP, "dpmpp-3m", 9, grid="logsnr", published=True)
    many = fd.plan(VP, "dpmpp-3m", 10, grid="logsnr", published=True)
    assert [len(s.b) for s in few.stages[-2:]] == [2, 1]
    assert [len(s.b) for s in many.stages[-2:]] == [3, 3]


def test_eta_zero_is_the_flow_and_eta_one_is_ddpm():
    assert fd.plan(VP, "ddim", 6, eta=0.0) == fd.plan(VP, "ddim", 6)
    one, ddpm = fd.plan(VP, "ddim", 6, eta=1.0), fd.plan(VP, "ddpm", 6)
    assert one.stages == ddpm.stages
    assert ddpm.stochastic
    assert not fd.plan(VP, "ddim", 6).stochastic


def test_every_stage_draws_from_its_own_stream():
    streams = [stage.noise[0][0] for stage in fd.plan(VP, "ddpm", 6).stages]
    assert streams == [1, 2, 3, 4, 5, 6]


def test_no_noise_is_added_by_a_step_to_the_data():
    schedule = fd.schedules.VPDiscrete.linear()
    for variance in ("fixed_small", "fixed_large"):
        plan = fd.plan(schedule, "ddpm", 5, grid="trailing", variance=variance)
        assert plan.stages[-1].c == 0.0
        assert plan.stages[-2].c > 0.0


@pytest.mark.parametrize(
    "solver",
    ["ddim", "euler", "heun", "deis-3", "deis-rhoab-4", "deis-logrho-3", "deis-rk4", "ipndm-4",
     "dpm-3", "dpm-3m", "dpmpp-2s", "dpmpp-3s", "dpmpp-2m", "dpmpp-3m"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["edm", "vp-linear", "sd"])
def test_a_grid_may_end_at_the_data(solver, name):
    schedule, _ = SCHEDULES[name]
    model = fd.models.GaussianMixture([1.0], [[0.3, -0.2]], [[0.04, 0.09]])
    grid = {"edm": "auto", "vp-linear": "quadratic", "sd": "trailing"}[name]
    end = {} if grid == "trailing" else {"t_min": 0.0}
    plan = fd.plan(schedule, solver, 250, grid=grid, prediction="x0", **end)
    assert plan.times[-1] == 0.0
    x = fd.noise.prior(plan, (16, 2), seeds=0, dtype=torch.float64)
    out = fd.sample(model.network(schedule, "x0"), x, plan, check=True)
    # the flow of a Gaussian, from unit scale (or sigma_max) to the data's own
    mean, spread = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.2, 0.3]).double()
    start = float(schedule.sigma(plan.times[0]))
    shift = float(schedule.alpha(plan.times[0]))
    exact = mean + spread * (x - shift * mean) / torch.sqrt(shift**2 * spread**2 + start**2)
    assert float((out - exact).abs().max()) < 0.05


def test_default_last_steps_never_blow_up():
    # On a grid uniform in t the last step is a third of the whole in lambda: third order without
    # lowering ends with errors of order one (math of the x0 form: weights of 20 and more).
    weights = [[0.5, 0.5], [[1.0, -0.5, 0.3], [-0.9, 0.6, -1.1]], [[0.04] * 3, [0.1] * 3]]
    network = fd.models.GaussianMixture(*weights).network(VP)
    x = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = fd.sample(network, x, fd.plan(VP, "deis-rk4", 800, grid="logsnr"))
    for solver in (
        "dpmpp-3m",
        "dpm-3m",
        "dpmpp-2m",
        "deis-logrho-3",
        "deis-3",
        "deis-4",
        "ipndm-4",
    ):
        for steps in (5, 8, 12, 20):
            plan = fd.plan(VP, solver, steps, grid="uniform")
            error = float((fd.sample(network, x, plan) - exact).square().mean().sqrt())
            assert error < 0.5, (solver, steps, error)
    wild = fd.plan(VP, "dpmpp-3m", 8, grid="uniform", lower_order_final=False)
    assert float((fd.sample(network, x, wild) - exact).square().mean().sqrt()) > 1.0


def test_an_even_grid_is_not_lowered_by_default():
    plan = fd.plan(VP, "dpmpp-3m", 20, grid="logsnr")
    assert len(plan.stages[-1].b) == 3
    assert len(fd.plan(VP, "dpmpp-3m", 20, grid="uniform").stages[-1].b) == 1
    lowered = fd.plan(VP, "dpmpp-3m", 20, grid="logsnr", lower_order_final=True)
    assert [len(s.b) for s in lowered.stages[-3:]] == [3, 2, 1]


def test_flow_starts_at_pure_noise_where_it_can():
    flow = fd.schedules.FlowMatching()
    for solver in ("ddim", "euler", "heun", "dpmpp-2m", "dpmpp-3m", "dpmpp-2s", "dpmpp-3s"):
        plan = fd.plan(flow, solver, 6, prediction="velocity")
        assert plan.times[0] == 1.0
    for solver in ("deis-3", "dpm-2", "ipndm-4", "deis-rk4"):
        with pytest.raises(ValueError, match=r"t_max = 0\.999"):
            fd.plan(flow, solver, 6, prediction="velocity")


def test_euler_on_a_flow_is_euler():
    plan = fd.plan(fd.schedules.FlowMatching(), "euler", 4, prediction="velocity")
    for stage, s, t in zip(plan.stages, plan.times[:-1], plan.times[1:], strict=True):
        assert (stage.a_x, stage.p, stage.q) == (1.0, 0.0, 1.0)
        assert stage.b == pytest.approx((t - s,))


# -- the generator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(6))
def test_phi_functions_are_accurate_everywhere(k):
    from mpmath import mp, mpf

    mp.dps = 40
    for z in (-30.0, -2.0, -1.999, -0.3, -1e-4, 0.0, 1e-8, 0.5, 1.999, 2.0, 7.0):
        exact = (
            mp.exp(z)
            if k == 0
            else mp.quad(
                lambda s, z=z: mp.exp((1 - s) * mpf(z)) * s ** (k - 1) / mp.factorial(k - 1), [0, 1]
            )
        )
        assert phi(k, z) == pytest.approx(float(exact), rel=2e-13)


@pytest.mark.parametrize("form", ["epsilon", "x0"])
def test_moments_are_the_integrals(form):
    s, t = 0.6, 0.3
    lam_s, lam_t = (float(VP.lambda_t(v)) for v in (s, t))
    x, w = np.polynomial.legendre.leggauss(60)
    u = 0.5 * (lam_t - lam_s) * (x + 1)
    w = 0.5 * (lam_t - lam_s) * w
    h = lam_t - lam_s
    kernel = -VP.sigma(t) * np.exp(h - u) if form == "epsilon" else VP.alpha(t) * np.exp(u - h)
    exact = [(w * kernel * u**p).sum() for p in range(4)]
    np.testing.assert_allclose(moments(VP, form, s, t, 4), exact, rtol=1e-12)


def test_moments_have_their_limits_at_the_data():
    edm = fd.schedules.EDM()
    np.testing.assert_allclose(moments(edm, "epsilon", 0.5, 0.0, 3), [-0.5, -0.5, -1.0])
    np.testing.assert_array_equal(moments(edm, "x0", 0.5, 0.0, 2), [1.0, np.inf])
    near = moments(edm, "epsilon", 0.5, 1e-200, 2)
    np.testing.assert_allclose(near, [-0.5, -0.5], rtol=1e-12)


@pytest.mark.parametrize("form", ["epsilon", "x0"])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_adams_weights_integrate_polynomials_exactly(form, degree):
    nodes = [0.5, 0.62, 0.7, 0.8][: degree + 1]
    u = VP.lambda_t(np.array(nodes)) - VP.lambda_t(0.5)
    b = adams(VP, form, 0.5, 0.4, nodes)
    for p in range(degree + 1):
        exact = moments(VP, form, 0.5, 0.4, degree + 1)[p]
        assert b @ u**p == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("name", ["vp-linear", "vp-cosine", "sd", "edm", "flow"])
def test_quadrature_is_exact_to_twelve_digits(name):
    schedule, _ = SCHEDULES[name]
    start = {"edm": 80.0, "flow": 0.99}.get(name, 0.99)
    for s, t in ((start, 0.5), (0.5, 0.02), (0.02, schedule.t_floor), (start, schedule.t_floor)):
        tau, w = rho_quadrature(schedule, s, t)
        rho_s, rho_t = float(schedule.rho(s)), float(schedule.rho(t))
        assert w.sum() == pytest.approx(rho_t - rho_s, rel=1e-12)
        for p in (1, 2):
            assert (w * schedule.rho(tau) ** p).sum() == pytest.approx(
                (rho_t ** (p + 1) - rho_s ** (p + 1)) / (p + 1), rel=1e-12
            )
        # a function of t: compare with the same rule on halves
        mid = 0.5 * (s + t)
        halves = [rho_quadrature(schedule, s, mid), rho_quadrature(schedule, mid, t)]
        for power in (1, 2, 3):
            split = sum((weights * nodes**power).sum() for nodes, weights in halves)
            assert (w * tau**power).sum() == pytest.approx(split, rel=1e-12)


def test_lagrange_basis_is_a_basis():
    nodes, at = np.array([0.1, 0.4, 0.9]), np.array([0.1, 0.4, 0.9, 0.6])
    basis = lagrange(nodes, at)
    np.testing.assert_allclose(basis[:, :3], np.eye(3), atol=1e-15)
    np.testing.assert_allclose(basis.sum(0), 1.0)


# -- names and options -----------------------------------------------------------------------------


def test_registry_names_are_the_field_names():
    assert set(SOLVERS) == {
        "ddim", "ddpm", "euler", "heun",
        "deis-1", "deis-2", "deis-3", "deis-4",
        "deis-rhoab-1", "deis-rhoab-2", "deis-rhoab-3", "deis-rhoab-4",
        "deis-logrho-1", "deis-logrho-2", "deis-logrho-3",
        "deis-heun", "deis-kutta3", "deis-rk4",
        "ipndm-1", "ipndm-2", "ipndm-3", "ipndm-4",
        "dpm-1", "dpm-2", "dpm-3", "dpm-2m", "dpm-3m",
        "dpmpp-1", "dpmpp-2s", "dpmpp-3s", "dpmpp-2m", "dpmpp-3m",
        "rex-1",
    }  # fmt: skip
    for name in SOLVERS:
        info = fd.solvers.info(name)
        assert info.name == name
        assert "arXiv" in info.source
        assert fd.solvers.get(name).name == name


@pytest.mark.parametrize("name", [n for n in SOLVERS if "clip" in fd.solvers.info(n).options])
def test_what_clips_can_threshold_and_nothing_else_changes(name):
    with_clip = fd.plan(VP, name, 4, clip=1.0)
    plan = fd.plan(VP, name, 4, threshold=0.995)
    assert {stage.threshold for stage in plan.stages} == {(0.995, 1.0)}
    bare = [dataclasses.replace(stage, threshold=None) for stage in plan.stages]
    assert bare == [dataclasses.replace(stage, clip=None) for stage in with_clip.stages]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.plan(VP, "dies-3", 6), ValueError, "'deis-3'"),
        (lambda: fd.plan(VP, "dpmpp-3m", 2), ValueError, "needs at least as many steps"),
        (lambda: fd.plan(VP, "deis-4", 3), ValueError, "needs at least as many steps"),
        (lambda: fd.plan(VP, "deis-3", 0), ValueError, "steps is at least 1"),
        (lambda: fd.plan(VP, "deis-3", 6, prediction="eps_pred"), ValueError, "unknown prediction"),
        (lambda: fd.plan(VP, "deis-3", 6, eta=1.0), TypeError, "no option 'eta'.*warmup"),
        (lambda: fd.plan(VP, "ddim", 6, eta=1.5), ValueError, r"eta lies in \[0, 1\]"),
        (lambda: fd.plan(VP, "dpm-2m", 6, clip=1.0), TypeError, "no option 'clip'"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, solver_type="heun"), ValueError, "is one of"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, clip=(1, 1)), ValueError, "lo < hi"),
        (lambda: fd.plan(VP, "ddim", 6, form="epsilon", clip=1.0), ValueError, "clip applies"),
        (lambda: fd.plan(VP, "dpm-2m", 6, threshold=0.9), TypeError, "no option 'threshold'"),
        (lambda: fd.plan(VP, "deis-logrho-2", 6, threshold=0.9), TypeError, "no option"),
        (lambda: fd.plan(VP, "ddim", 6, form="epsilon", threshold=0.9), ValueError,
         "threshold applies to x0"),
        (lambda: fd.solvers.DPMSolverMultistep(form="epsilon", threshold=0.9), ValueError,
         "threshold applies to x0"),
        (lambda: fd.solvers.DPMSolverSinglestep(form="epsilon", clip=1), ValueError,
         "clip applies to x0"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=0.9, clip=1), ValueError, "not both"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=99.5), ValueError, "quantile <= 1"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=(0.9, 0)), ValueError, "floor > 0"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=True), TypeError, "such as 0.995; got True"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=(0.9, 1, 2)), TypeError, "a pair"),
        (lambda: fd.plan(VP, "deis-3", 6, warmup="rk"), ValueError, "warmup is one of"),
        (lambda: fd.plan(VP, "dpm-3", 6, method="singlestep_fixed"), ValueError, "published=True"),
        (lambda: fd.solvers.get("dpm-3", method="singlestep_fixed", published=True).plan(VP, 2),
         ValueError, "budget"),
        (lambda: fd.plan(VP, "deis-3", 6, published="False"), ValueError, "published is one of"),
        (lambda: fd.plan(VP, "deis-rhoab-3", 6, published=1), ValueError, "published is one of"),
        (lambda: fd.plan(VP, "ddpm", 6, published="no"), ValueError, "published is one of"),
        (lambda: fd.plan(VP, "ddim", 6, eta="1"), TypeError, "eta is a number"),
        (lambda: fd.plan(VP, "ddim", 6, prediction=["v"]), ValueError, "unknown prediction"),
        (lambda: fd.plan(VP, "ddim", 6, prediction="edm"), ValueError, "belongs to the EDM"),
        (lambda: fd.plan(VP, "dpmpp-2s", 6, published=True, grid=5.0), TypeError, "sequence"),
        (lambda: fd.solvers.info([]), ValueError, "unknown solver"),
        (lambda: fd.plan(VP, 3, 6), TypeError, "solver is a name"),
        (lambda: fd.plan(VP, fd.solvers.DDIM(), 6, eta=1.0), TypeError, "Set them on it"),
        (lambda: fd.plan("vp", "ddim", 6), TypeError, "schedule is a"),
        (lambda: fd.plan(fd.schedules.EDM(), "ddpm", 6, variance="fixed_large"),
         ValueError, "variance preserving"),
        (lambda: fd.plan(VP, "deis-3", 6, t_min=0.0, grid="logsnr", t_max=0.0005),
         ValueError, "below t_max"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_the_reason(make, error, says):
    with pytest.raises(error, match=says):
        make()
