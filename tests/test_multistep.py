# SPDX-License-Identifier: Apache-2.0
"""PNDM, LMS, ipndm_v, RES, exponential Heun and gradient estimation, against loops and laws."""

import itertools

import numpy as np
import pytest
import torch
from oracles import multistep as oracles
from support import problems

import fastdiff as fd

EDM = fd.schedules.EDM()
VP = fd.schedules.VPLinear()
SIGMAS = np.array([40.0, 22.0, 9.0, 5.5, 2.1, 1.3, 0.4, 0.15, 0.04])
MIXTURE = fd.models.GaussianMixture(problems.WEIGHTS, problems.MEANS, problems.VARIANCES)
START = np.random.default_rng(3).standard_normal((5, 4))


def called(network, x, time):
    """The network's output for arrays, at one time."""
    at = torch.full((len(x),), float(time), dtype=torch.float64)
    return network(torch.from_numpy(x), at).numpy()


def denoise(x, sigma):
    return called(MIXTURE.network(EDM, "x0"), x, sigma)


def run(name, sigmas=SIGMAS, x=None, **options):
    plan = fd.plan(EDM, name, len(sigmas) - 1, grid=sigmas, prediction="x0", **options)
    x = torch.from_numpy(sigmas[0] * START if x is None else x)
    return fd.sample(MIXTURE.network(EDM, "x0"), x, plan).numpy()


ORACLES = {
    **{f"lms-{k}": (lambda *a, k=k: oracles.linear_multistep(*a, k), {}) for k in (1, 2, 3, 4)},
    **{f"ipndm-v-{k}": (lambda *a, k=k: oracles.linear_multistep(*a, k), {}) for k in (2, 3, 4)},
    "gradient-estimation": (lambda *a: oracles.gradient_estimation(*a, 2.0), {}),
    "gradient-estimation gamma": (
        lambda *a: oracles.gradient_estimation(*a, 1.4),
        {"gamma": 1.4},
    ),
    "res-2m": (lambda *a: oracles.res_multistep(*a, 2), {"lower_order_final": False}),
    "res-3m": (lambda *a: oracles.res_multistep(*a, 3), {"lower_order_final": False}),
    "res-2s": (lambda *a: oracles.res_singlestep(*a, (0.5,)), {}),
    "res-2s c2": (lambda *a: oracles.res_singlestep(*a, (0.8,)), {"c2": 0.8}),
    "exp-heun-2": (lambda *a: oracles.res_singlestep(*a, (1.0,)), {}),
    "res-3s": (lambda *a: oracles.res_singlestep(*a, (0.5, 1.0)), {}),
    "res-3s c": (lambda *a: oracles.res_singlestep(*a, (0.3, 0.6)), {"c2": 0.3, "c3": 0.6}),
}


@pytest.mark.parametrize("case", ORACLES)
def test_a_plan_ends_where_the_papers_loop_ends(case):
    loop, options = ORACLES[case]
    expected = loop(denoise, SIGMAS[0] * START, SIGMAS)
    np.testing.assert_allclose(run(case.split()[0], **options), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("pndm", 4), ("pndm", 5), ("pndm", 9), ("plms", 1), ("plms", 2), ("plms", 4), ("plms", 9)],
)
def test_pndm_ends_where_the_papers_loop_ends(name, steps):
    plan = fd.plan(VP, name, steps, grid="uniform")
    network = MIXTURE.network(VP)

    def epsilon(x, t):
        return called(network, x, t)

    args = (VP.alpha, VP.sigma, START, plan.times, name == "plms")
    expected = oracles.pndm(epsilon, *args)
    got = fd.sample(network, torch.from_numpy(START), plan).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    assert plan.nfe == steps + ({"plms": 1, "pndm": 9}[name] if steps > 1 else 0)


def test_a_first_step_to_the_data_needs_no_evaluation_there():
    plan = fd.plan(EDM, "plms", 1, grid=[3.0, 0.0], prediction="x0")
    assert plan.nfe == 1
    np.testing.assert_allclose(plan.stages[0].a_x, 1.0)


def stages_of(name, steps=7, grid="karras", schedule=VP, **options):
    return fd.plan(schedule, name, steps, grid=grid, **options).stages


SAME = [
    (name, fd.solvers.info(name).same)
    for name in fd.solvers.names()
    if name.startswith(("lms", "ipndm")) and fd.solvers.info(name).same
]


@pytest.mark.parametrize("grid", ["karras", "uniform"])
@pytest.mark.parametrize(("name", "same"), SAME)
def test_a_name_that_says_it_is_another_has_its_table(name, same, grid):
    for mine, its in zip(stages_of(name, grid=grid), stages_of(same, grid=grid), strict=True):
        np.testing.assert_allclose(mine.b, its.b, rtol=1e-12)
        assert mine.a_x == pytest.approx(its.a_x, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "other", "others"),
    [
        ("res-2m", {}, "dpmpp-2m", {"solver_type": "taylor"}),
        ("res-3m", {}, "dpmpp-3m", {"solver_type": "taylor"}),
        ("res-2s", {}, "dpmpp-2s", {"solver_type": "taylor"}),
        ("res-3s", {"c2": 1 / 3, "c3": 2 / 3 + 1e-15}, "dpmpp-3s", {}),
        ("exp-heun-2", {}, "res-2s", {"c2": 1.0}),
        ("gradient-estimation", {"gamma": 1.0}, "ddim", {}),
    ],
)
def test_members_of_other_families_are_the_same_rows(name, options, other, others):
    pairs = zip(stages_of(name, **options), stages_of(other, **others), strict=True)
    for mine, its in pairs:
        for field in ("b", "g", "a_x", "d_x"):
            np.testing.assert_allclose(
                getattr(mine, field), getattr(its, field), rtol=1e-9, atol=1e-12
            )


def test_ipndm_on_a_grid_uniform_in_rho_is_ipndm_v_published_or_not():
    grid = np.linspace(8.0, 0.5, 9)
    for order in (3, 4):
        right = stages_of(f"ipndm-v-{order}", 8, grid, EDM)
        fixed = stages_of(f"ipndm-{order}", 8, grid, EDM)
        for mine, its in zip(right, fixed, strict=True):
            np.testing.assert_allclose(mine.b, its.b, rtol=1e-10)
    third = stages_of("ipndm-v-3", 8, grid, EDM, published=True)
    for mine, its in zip(third, stages_of("ipndm-3", 8, grid, EDM), strict=True):
        np.testing.assert_allclose(mine.b, its.b, rtol=1e-10)  # its slip does not show there


def uneven(steps):
    """Times whose steps in lambda are alternately long and short, 2 to 1."""
    ends = [float(problems.VP.lambda_t(t)) for t in (problems.T_MAX, problems.T_MIN)]
    share = np.concatenate([[0.0], np.cumsum(np.tile([1.0, 2.0], steps // 2))])
    times = problems.VP.t_of_lambda(ends[0] + share / share[-1] * (ends[1] - ends[0]))
    times[[0, -1]] = problems.T_MAX, problems.T_MIN
    return times


def slope_on_uneven_times(solver):
    network, x, exact = problems.problem("mixture")
    errors = []
    for steps in (80, 160):
        plan = fd.plan(problems.VP, solver, steps, grid=uneven(steps))
        errors.append(float((fd.sample(network, x, plan) - exact).norm()))
    return problems.slope(errors)


@pytest.mark.parametrize(("order", "published_order"), [(3, 2), (4, 0)])
def test_published_ipndm_v_loses_its_order_on_uneven_times(order, published_order):
    options = {"warmup": "runge-kutta"}
    right = fd.solvers.get(f"ipndm-v-{order}", **options)
    theirs = fd.solvers.get(f"ipndm-v-{order}", published=True, **options)
    assert slope_on_uneven_times(right) == pytest.approx(order, abs=0.25)
    assert slope_on_uneven_times(theirs) == pytest.approx(published_order, abs=0.25)


def test_published_fourth_order_ipndm_v_leaves_the_marginal():
    # where the network is right, a row is right if its weights sum to those of DDIM
    def off(name, **options):
        rows = stages_of(name, 8, uneven(8), problems.VP, **options)
        ddim = stages_of("ddim", 8, uneven(8), problems.VP)
        return max(abs(sum(a.b) / b.b[0] - 1.0) for a, b in zip(rows, ddim, strict=True))

    assert off("ipndm-v-4") < 1e-12
    assert off("ipndm-v-3", published=True) < 1e-12
    assert off("ipndm-v-4", published=True) > 0.01


def refined(sigmas, parts=8):
    """Levels with each step cut in `parts`, evenly in log sigma."""
    lam, at = np.log(sigmas), np.arange(len(sigmas))
    return np.exp(np.interp(np.arange(parts * (len(sigmas) - 1) + 1) / parts, at, lam))


def geometric(steps):
    return np.geomspace(5.0, 0.1, steps + 1)


def slope(errors_of, exact, steps=40):
    return problems.slope([np.linalg.norm(errors_of(n) - exact) for n in (steps, 2 * steps)])


def test_the_condition_of_res4lyf_costs_an_order():
    x = 5.0 * START
    exact = run("deis-rk4", geometric(240), x)

    def multistep(power):
        def end(steps):
            levels = geometric(steps)
            start = [run("deis-rk4", refined(levels[: k + 1]), x) for k in (1, 2)]
            return oracles.res4lyf_3m(denoise, x, levels, start, power)

        return slope(end, exact)

    assert multistep(3) < 2.3
    assert multistep(2) > 2.7
    at = (0.5, 0.75)
    theirs = slope(lambda n: oracles.res_singlestep(denoise, x, geometric(n), at, 3), exact)
    ours = slope(lambda n: run("res-3s", geometric(n), x, c3=0.75), exact)
    assert theirs < 2.3
    assert ours > 2.7


@pytest.mark.parametrize(
    ("name", "option"), [("lms-4", "zero"), ("ipndm-4", "zero"), ("deis-3", "zero")]
)
def test_a_step_to_the_data_alone_can_be_lowered(name, option):
    ends = fd.plan(EDM, name, 6, prediction="x0", lower_order_final=option)
    assert [len(s.b) for s in ends.stages][-2:] == [int(name[-1]), 1]
    above = fd.plan(EDM, name, 6, grid=SIGMAS[:7], prediction="x0", lower_order_final=option)
    assert len(above.stages[-1].b) == int(name[-1])


def test_gradient_estimation_is_adams_bashforth_where_its_order_is_two():
    def order(gamma):
        x = 8.0 * START
        exact = run("deis-rk4", np.linspace(8.0, 0.5, 241), x)
        levels = {n: np.linspace(8.0, 0.5, n + 1) for n in (80, 160)}
        name = "gradient-estimation"
        return slope(lambda n: run(name, levels[n], x, gamma=gamma), exact, 80)

    assert order(1.5) > 1.75
    assert order(2.0) < 1.25


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gradient-estimation", {"gamma": float("nan")}, "gamma is finite"),
        ("gradient-estimation", {"lower_order_final": "auto"}, "lower_order_final is one of"),
        ("res-2s", {"c2": 0.0}, r"c2 lies in \(0, 1\]"),
        ("res-3s", {"c3": 1.5}, r"c3 lies in \(0, 1\]"),
        ("res-3s", {"c2": 2 / 3}, "no solution; got c2 = 0.666"),
        ("res-3s", {"c2": 0.5, "c3": 0.5}, "c2 differs from c3"),
        ("res-3s", {"c2": 0.5, "c3": 0.5 + 1e-9}, "c2 differs from c3"),
        ("pndm", {"skip_prk_steps": 1}, "skip_prk_steps is one of False, True"),
        ("plms", {"published": True}, "no option 'published'"),
        ("lms-4", {"lower_order_final": "auto"}, "one of False, True, 'zero'"),
    ],
)
def test_bad_options_are_refused_with_the_reason(name, options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        fd.plan(VP, name, 6, **options)


def test_orders_that_no_name_has_are_refused():
    makers = (fd.solvers.IPNDMV, fd.solvers.RESMultistep, fd.solvers.RESSinglestep)
    for make, order in itertools.product(makers, (1, 5)):
        with pytest.raises(ValueError, match="order is one of"):
            make(order=order)
