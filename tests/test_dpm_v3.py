# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver-v3: what its rows are, with statistics and without."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from support.problems import two_blobs
from support.statistics import MIXTURE, START, VP, published, sampled

import fastdiff as fd

SPAN = {"grid": "logsnr", "t_max": 0.9, "t_min": 0.02}
SHARED = fd.tune.Statistics(VP, [0.9, 0.1], [0.5, -0.5], [0.2, 0.1], [-5.1, 4.6])


@functools.cache
def exact_flow():
    plan = fd.plan(VP, "deis-rk4", 400, **SPAN)
    return fd.sample(MIXTURE.network(VP), START, plan)


# -- without statistics ----------------------------------------------------------------------------


def test_without_statistics_the_predictor_is_dpm_solver_plus_plus():
    for order, other in ((1, "dpmpp-1"), (2, "dpmpp-2m"), (3, "dpmpp-3m")):
        plan = fd.plan(VP, f"dpm-v3-{order}", 8, use_corrector=False)
        taylor = {"solver_type": "taylor"} if order > 1 else {}
        wanted = fd.plan(VP, other, 8, **taylor)
        for stage, its in zip(plan.stages, wanted.stages, strict=True):
            np.testing.assert_allclose(stage.a_x, its.a_x, rtol=1e-13)
            np.testing.assert_allclose(stage.b, its.b, rtol=1e-11)


def test_degenerated_leaves_the_statistics_out():
    plan = fd.plan(VP, "dpm-v3-3", 8, statistics=published(), degenerated=True, **SPAN)
    assert plan.stages == fd.plan(VP, "dpm-v3-3", 8, **SPAN).stages
    assert plan.extras == len(published().extras(plan)) == 0


@pytest.mark.parametrize("order", [2, 3])
def test_a_pseudo_order_is_two(order):
    def error(steps):
        options = {"warmup": "runge-kutta", "use_corrector": False, "p_pseudo": True}
        plan = fd.plan(VP, f"dpm-v3-{order}", steps, **SPAN, **options)
        return float((fd.sample(MIXTURE.network(VP), START, plan) - exact_flow()).norm())

    assert 1.8 < np.log2(error(80) / error(160)) < 2.3


def test_the_corrector_divides_the_error():
    def error(**options):
        plan = fd.plan(VP, "dpm-v3-3", 20, warmup="runge-kutta", **SPAN, **options)
        return float((fd.sample(MIXTURE.network(VP), START, plan) - exact_flow()).norm())

    assert error() < 0.5 * error(use_corrector=False)


def test_half_corrects_the_noisy_half_alone():
    full, half, none = (
        fd.plan(VP, "dpm-v3-3", 10, grid="uniform", **options)
        for options in ({}, {"half": True}, {"use_corrector": False})
    )
    assert [stage.writes_e for stage in half.stages] == [
        stage.writes_e and t > 0.5 for stage, t in zip(full.stages, half.times[1:], strict=True)
    ]
    assert sum(stage.writes_e for stage in half.stages) == 4
    assert not any(stage.writes_e for stage in none.stages)


# -- with statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches", [*itertools.product((1, 2, 3), (False, True), (False, True), (False, True))]
)
def test_every_combination_is_one_launch_an_evaluation(switches):
    order, pseudo, corrector, more = switches
    statistics = published()
    plan = fd.plan(
        VP, f"dpm-v3-{order}", 7, statistics=statistics, p_pseudo=pseudo, use_corrector=corrector,
        c_pseudo=more, **SPAN,
    )  # fmt: skip
    assert plan.nfe == len(plan.stages) == 7
    assert plan.extras == len(statistics.extras(plan))
    assert max(len(stage.products) for stage in plan.stages) <= 8


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("corrector", [False, True])
def test_with_statistics_runs_converge_to_the_flow(order, corrector):
    def error(steps):
        options = {"warmup": "runge-kutta", "use_corrector": corrector}
        plan = fd.plan(VP, f"dpm-v3-{order}", steps, statistics=published(), **SPAN, **options)
        return float((sampled(plan, published()) - exact_flow()).norm())

    # statistics of finitely many samples have a kink at each of their points: no full third order
    assert error(160) < 0.25 * error(40)


def test_statistics_pay_at_few_steps():
    def error(**options):
        plan = fd.plan(VP, "dpm-v3-3", 8, **SPAN, **options)
        return float((sampled(plan, published()) - exact_flow()).norm())

    network, exact = MIXTURE.network(VP), exact_flow()
    plain = fd.plan(VP, "dpm-v3-3", 8, **SPAN)
    without = float((fd.sample(network, START, plain) - exact).norm())
    assert error(statistics=published()) < 0.7 * without


def test_a_bank_does_what_weights_do():
    # the same statistics as numbers and as tensors: one is written as weights and the natural
    # rows, the other as products and carried sums
    wide = fd.tune.Statistics(
        VP, *(np.repeat(v[:, None], 8, 1) for v in (SHARED.l, SHARED.s, SHARED.b)), [-5.1, 4.6]
    )
    # one element differs by so little that the results agree, and is a tensor all the same
    nudged = [np.array(getattr(wide, name)) for name in ("l", "s", "b")]
    for value in nudged:
        value[:, 0] += 1e-12
    almost = fd.tune.Statistics(VP, *nudged, [-5.1, 4.6])
    for options in ({}, {"c_pseudo": True}, {"warmup": "runge-kutta"}, {"use_corrector": False}):
        plans = [
            fd.plan(VP, "dpm-v3-3", 7, statistics=each, **SPAN, **options)
            for each in (SHARED, wide, almost)
        ]
        assert [max(len(s.products) for s in p.stages) > 0 for p in plans] == [False, False, True]
        first, *others = (sampled(p, s) for p, s in zip(plans, (SHARED, wide, almost), strict=True))
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


def test_perfect_linear_statistics_make_a_gaussian_exact():
    # f of a Gaussian is linear in x: with its own l, s, b nothing is left for the polynomial
    mean, spread = np.array([0.3, -0.2]), np.array([0.2, 0.7])
    lam = np.linspace(-4.0, 3.0, 2001)
    t = VP.t_of_lambda(lam)
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    variance = alpha**2 * spread**2 + sigma**2
    slope = sigma**2 / variance  # sigma d eps/dx; f = -mean slope: a constant of the sample
    rate = np.gradient(slope, lam, axis=0, edge_order=2)
    statistics = fd.tune.Statistics(VP, slope, 0.0 * slope, -mean * rate, lam)
    network = fd.models.GaussianMixture([1.0], mean[None], spread[None] ** 2).network(VP)
    ends = {"t_max": float(t[0]), "t_min": float(t[-1]), "grid": "logsnr"}
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = fd.sample(network, x, fd.plan(VP, "deis-rk4", 400, **ends))
    for order, steps in ((1, 1), (3, 3)):
        plan = fd.plan(VP, f"dpm-v3-{order}", steps, statistics=statistics, **ends)
        torch.testing.assert_close(sampled(plan, statistics, x, network), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_integrals_of_no_linear_part_are_the_closed_form(order):
    edm = fd.schedules.EDM()
    lam = np.linspace(*edm.lambda_t([80.0, 2e-3]), 31)
    none = fd.tune.Statistics(edm, np.ones(31), np.zeros(31), np.zeros(31), lam)
    sigma = 1.3 * np.exp(-np.array([0.0, 1e-8, 2.5e-8, 1e-6, 1e-2, 0.5, 5.5]))  # steps of all sizes
    for options in ({}, {"p_pseudo": True, "c_pseudo": True}):
        integrated, closed = (
            fd.plan(edm, f"dpm-v3-{order}", 6, grid=sigma, **options, **given)
            for given in ({"statistics": none}, {})
        )
        for stage, other in zip(integrated.stages, closed.stages, strict=True):
            for name in ("a_x", "b", "d_x", "g"):
                got, wanted = (np.atleast_1d(getattr(s, name)) for s in (stage, other))
                # the differences of old outputs over a small gap are large, and cancel
                np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "score"])
def test_every_prediction_gives_one_trajectory(prediction):
    results = []
    for name in ("velocity", prediction):
        statistics = published(name)
        plan = fd.plan(VP, "dpm-v3-3", 6, statistics=statistics, prediction=name, **SPAN)
        results.append(sampled(plan, statistics))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


# -- everywhere ------------------------------------------------------------------------------------


def wavy(x, t, y=None):
    """A network with a derivative and a class."""
    shift = 0.0 if y is None else y.to(x.dtype).reshape(-1, 1)
    return 0.6 * x - 0.1 * torch.tanh(x + shift) + 0.1 * t.to(x.dtype).reshape(-1, 1)


PLAN = fd.plan(VP, "dpm-v3-3", 6, statistics=published(), c_pseudo=True, **SPAN)
GUIDED = {
    "cond": {"y": torch.tensor([1.0, 2.0, 3.0, 4.0])},
    "guidance": fd.CFG(2.5, uncond={"y": 0.0}),
}


@pytest.mark.parametrize("guided", [False, True])
def test_backends_agree(guided):
    options = GUIDED if guided else {}
    backends = [n for n, state in fd.backends.status().items() if state == "available"]
    for dtype in (torch.float32, torch.float64):
        x = START.to(dtype)
        wanted = sampled(PLAN, published(), START, wavy, backend="torch", **options)
        for backend in backends:
            got = sampled(PLAN, published(), x, wavy, backend=backend, **options)
            # eight products and five terms in each of six stages
            tolerance = 20 * 13 * 6 * torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("more", [False, True])
def test_the_discrete_gradient_is_that_of_autograd(guided, order, more):
    options = GUIDED if guided else {}
    statistics = published()
    plan = fd.plan(VP, f"dpm-v3-{order}", 6, statistics=statistics, c_pseudo=more, **SPAN)
    gradients = []
    for gradient in ("discrete", "backprop"):
        x = START.clone().requires_grad_()
        out = sampled(plan, statistics, x, wavy, gradient=gradient, **options)
        gradients.append(torch.autograd.grad((out * torch.arange(8.0)).sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_plan_with_a_bank_compiles():
    extras = published().extras(PLAN, START)

    def run(x):
        return fd.sample(wavy, x, PLAN, extras=extras)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(START), run(START), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("published_too", [False, True])
@pytest.mark.parametrize(("order", "steps"), [(1, 1), (1, 2), (3, 4), (3, 7)])
def test_a_jump_reads_no_statistics_and_starts_where_the_steps_end(order, steps, published_too):
    statistics, options = published(), {"grid": "uniform", "published": published_too}
    name, options = f"dpm-v3-{order}", options | {"statistics": statistics}
    plan = fd.plan(VP, name, steps, jump=True, **options)
    assert plan.stages[-1].t == plan.times[-2]
    x = START
    if steps > 1:
        before = fd.plan(VP, name, steps - 1, **options | {"grid": plan.times[:-1]})
        x = sampled(before, statistics)
    t = torch.full((len(x),), plan.times[-2], dtype=torch.float64)
    alpha, sigma = float(VP.alpha(plan.times[-2])), float(VP.sigma(plan.times[-2]))
    wanted = (x - sigma * MIXTURE.network(VP)(x, t)) / alpha
    torch.testing.assert_close(sampled(plan, statistics), wanted, rtol=1e-9, atol=1e-9)


# -- files and refusals ----------------------------------------------------------------------------


def test_plan_and_statistics_are_saved_side_by_side(tmp_path):
    statistics = published()
    PLAN.save(tmp_path / "plan.json")
    statistics.save(tmp_path / "statistics.npz")
    plan = fd.Plan.load(tmp_path / "plan.json")
    loaded = fd.tune.Statistics.load(tmp_path / "statistics.npz")
    assert (plan, loaded) == (PLAN, statistics)
    assert loaded.digest == statistics.digest
    assert torch.equal(sampled(plan, loaded), sampled(PLAN, statistics))


OTHER = fd.tune.Statistics(VP, published().l, 2.0 * published().s, published().b)
TALL = fd.tune.Statistics(VP, *(np.ones((3, 2, 4, 4)) for _ in range(3)))
FLOW = fd.schedules.FlowMatching()
FEWER = dataclasses.replace(PLAN.stages[0], products=PLAN.stages[0].products[:1])
CHANGED = dataclasses.replace(PLAN, stages=(FEWER, *PLAN.stages[1:]))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.plan(fd.schedules.VPCosine(), "dpm-v3-3", 6, statistics=OTHER), ValueError,
         r"belong to the schedule that they were estimated on, VPLinear.*; got VPCosine"),
        (lambda: fd.plan(VP, "dpm-v3-3", 6, statistics=OTHER, prediction="v"), ValueError,
         "a network that predicts 'epsilon'; got a plan of prediction='v'"),
        (lambda: fd.plan(VP, "dpm-v3-3", 6, statistics={"l": 1}), TypeError, "got dict"),
        (lambda: fd.plan(VP, "dpm-v3-3", 6, statistics=OTHER, t_min=1e-4), ValueError,
         r"from t = 1 to 0\.001; got t = 0\.0001"),
        (lambda: fd.plan(VP, "dpm-v3-3", 90, grid="uniform", statistics=OTHER, published=True),
         ValueError, "two fall on one point"),
        (lambda: fd.plan(FLOW, "dpm-v3-3", 6, prediction="v", published=True), ValueError,
         "lambda, which is finite; got -inf"),
        (lambda: fd.plan(VP, "dpm-v3-3", 6, use_corrector=1), ValueError, "use_corrector is one"),
        (lambda: OTHER.extras(PLAN), ValueError, "plan was made with those of digest"),
        (lambda: OTHER.extras(fd.plan(VP, "dpmpp-3m", 6)), ValueError, "'dpmpp-3m'"),
        (lambda: OTHER.extras(fd.plan(VP, "dpm-v3-3", 6)), ValueError, "made with statistics="),
        (lambda: published().extras(PLAN, START[:, :4]), ValueError, r"got x of shape \(4, 4\)"),
        (lambda: published().extras(PLAN, START[:, None]), ValueError, r"got x of .*\(4, 1, 8\)"),
        (lambda: published().extras(CHANGED),
         ValueError, "a plan whose rows were changed"),
        (lambda: fd.sample(wavy, START, PLAN), ValueError, "the plan reads 41 extra"),
        (lambda: published().check(wavy), ValueError, "a fingerprint, which these do not hold"),
        (lambda: fd.tune.Statistics(VP, [1.0, 0.5], [0.0], [0.0, 0.0]), ValueError,
         r"one entry a point of lambda_grid; got s of shape \(1,\)"),
        (lambda: fd.tune.Statistics(VP, [1.0, np.nan], [0.0] * 2, [0.0] * 2), ValueError,
         "l is finite"),
        (lambda: fd.tune.Statistics(VP, [1.0] * 2, [0.0] * 2, [0.0] * 2, [1.0, 0.0]), ValueError,
         "values that increase"),
        (lambda: fd.tune.Statistics("vp", [1.0] * 2, [0.0] * 2, [0.0] * 2), TypeError,
         "schedule is a"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    for content in (b"", b"text", PLAN.to_json().encode()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz' holds no statistics"):
            fd.tune.Statistics.load(path)
    np.savez(path, head=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="holds no statistics"):
        fd.tune.Statistics.load(path)
    np.savez(path, l=np.ones(3))
    with pytest.raises(ValueError, match="holds no statistics"):
        fd.tune.Statistics.load(path)


def test_the_default_is_the_networks_blobs_on_every_schedule():
    # without statistics it needs no bank, and starts where alpha = 0 and ends where sigma = 0
    plan = fd.plan(FLOW, "dpm-v3-3", 8, prediction="v", t_min=0.0)
    x = fd.noise.prior(plan, (5, 2), seeds=0, dtype=torch.float64)
    assert bool(fd.sample(two_blobs(FLOW, "v"), x, plan, check=True).isfinite().all())


@pytest.mark.parametrize("shape", [(), (8,)])
@pytest.mark.parametrize("of_s", [3000.0, -3000.0])
def test_statistics_that_grow_too_fast_are_refused(shape, of_s):
    # the tensors of a plan are no coefficients of its stages: none of them may be NaN
    l, s, b = (np.full((2, *shape), value) for value in (0.5, of_s, 0.1))
    s[0] *= 0.99  # and elements differ
    if shape:
        s[:, 0] = 0.0
    statistics = fd.tune.Statistics(VP, l, s, b, [-5.1, 4.6])
    with pytest.raises(ValueError, match=r"coefficients are finite; got NaN .* more samples"):
        fd.plan(VP, "dpm-v3-3", 8, statistics=statistics, **SPAN)
