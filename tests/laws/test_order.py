# SPDX-License-Identifier: Apache-2.0
"""The order law: the slope of log error over 160 -> 320 steps is the registry's measured order."""

import numpy as np
import pytest
from support import problems
from support.problems import GAUSSIAN, T_MAX, T_MIN, VP
from support.solvers import DETERMINISTIC, STOCHASTIC, follow

import fastdiff as fd

CONVERGENT = [case for case in DETERMINISTIC if case.info.measured_order is not None]
CONVERGENT_IN_LAW = [case for case in STOCHASTIC if case.info.measured_order is not None]


def full(name):
    """Options under which a solver has the order that its registry entry states."""
    options = fd.solvers.info(name).options
    found = {"warmup": "runge-kutta"} if "warmup" in options else {}
    # a corrector of the predictor's order cancels most of its error, and the slope shows the order
    # on grids alone that are finer than these
    return found | ({"use_corrector": False} if "use_corrector" in options else {})


def slope(solver, name, grid, steps=160):
    network, x, exact = problems.problem(name)
    errors = []
    for count in (steps, 2 * steps):
        plan = fd.plan(VP, solver, count, grid=grid, t_max=T_MAX, t_min=T_MIN)
        errors.append(float((fd.sample(network, x, plan) - exact).norm()))
    return problems.slope(errors)


@pytest.mark.parametrize("grid", ["uniform", "logsnr"])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
@pytest.mark.parametrize("case", CONVERGENT, ids=str)
def test_registry_states_the_measured_order(case, name, grid):
    solver = fd.solvers.get(case.name, **full(case.name))
    order = case.info.measured_order
    measured = slope(solver, name, grid, steps=160 if order < 5 else 320)
    assert order - 0.25 <= measured <= order + 0.5


def weak_error(case, variance, steps, grid):
    """Error of the result's variance on Gaussian data, whose network is linear: exact, no draws."""
    plan = case.plan(VP, steps, grid=grid, t_max=T_MAX, t_min=T_MIN, **full(case.name))

    def spread(t):
        return float(VP.alpha(t) ** 2 * variance + VP.sigma(t) ** 2)

    def network(stage, point):
        return float(VP.sigma(stage.t)) / spread(stage.t) * point

    x = follow(plan, np.array([np.sqrt(spread(T_MAX))]), network)[-1]
    return abs(float(x @ x) - spread(T_MIN))


@pytest.mark.parametrize("grid", ["uniform", "logsnr"])
@pytest.mark.parametrize("case", CONVERGENT_IN_LAW, ids=str)
def test_stochastic_solvers_have_their_order_in_distribution(case, grid):
    errors = [
        np.linalg.norm([weak_error(case, variance, steps, grid) for variance in GAUSSIAN])
        for steps in (160, 320)
    ]
    order = case.info.measured_order
    assert order - 0.25 <= problems.slope(errors) <= order + 0.5


@pytest.mark.parametrize("tableau", fd.solvers.TABLEAUS)
def test_tableau_satisfies_its_order_conditions(tableau):
    c, a, b = fd.solvers.TABLEAUS[tableau]
    n = len(c)
    matrix = np.zeros((n, n))
    for i, row in enumerate(a):
        matrix[i, : len(row)] = row
    c, b = np.array(c), np.array(b)
    order = {"euler": 1, "heun": 2, "rk4": 4}.get(tableau, 3)
    conditions = [(1, b.sum(), 1.0), (2, b @ c, 1 / 2), (3, b @ c**2, 1 / 3)]
    conditions += [
        (3, b @ matrix @ c, 1 / 6),
        (4, b @ c**3, 1 / 4),
        (4, (b * c) @ matrix @ c, 1 / 8),
    ]
    conditions += [(4, b @ matrix @ c**2, 1 / 12), (4, b @ matrix @ matrix @ c, 1 / 24)]
    np.testing.assert_allclose(matrix.sum(1), c, atol=1e-15)
    for needs, value, target in conditions:
        if needs <= order:
            assert value == pytest.approx(target, abs=1e-15)


@pytest.mark.parametrize("solver", ["dpm-3m", "dpmpp-3m"])
def test_published_third_order_multistep_is_of_order_two(solver):
    wrong = fd.solvers.get(solver, published=True, lower_order_final=False, warmup="runge-kutta")
    assert 1.75 <= slope(wrong, "mixture", "logsnr") <= 2.5


def test_lower_order_warmup_caps_the_order_at_two():
    # one first-order step leaves h² behind, which overtakes h³ only on fine grids
    lower = fd.solvers.get("deis-3", warmup="lower")
    assert slope(lower, "gaussian", "uniform", steps=1600) < 2.7
    best = fd.solvers.get("deis-3", warmup="runge-kutta")
    assert slope(best, "gaussian", "uniform", steps=1600) > 2.9
