# SPDX-License-Identifier: Apache-2.0
"""The order law: the slope of log error over 160 -> 320 steps is the registry's measured order."""

import numpy as np
import pytest
from support import problems
from support.problems import GAUSSIAN, T_MAX, T_MIN, VP
from support.solvers import DETERMINISTIC, STOCHASTIC, follow

import fastdiff as fd
from fastdiff.solvers.ode.tableaus import ORDERS

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
    measured = slope(solver, name, grid, steps_of(case))
    assert order - 0.25 <= measured <= order + allowance(case)


def steps_of(case):
    """Steps of the coarser run: above order 4 the leading error shows late, and rounding early."""
    return 160 if case.info.measured_order < 5 else 320 // case.info.nfe_per_step


def allowance(case):
    """What a slope may have more than its order.

    A tableau of six stages has leading errors so small that rounding hides them before the terms
    of one order more have died out.
    """
    return 0.5 if case.info.nfe_per_step <= 4 else 1.5


def in_velocity(case):
    """Whether the solver combines velocities on a schedule whose straight variable they are."""
    try:
        plan = case.plan(problems.FLOW, 6, prediction="velocity")
    except ValueError:  # it does not start at alpha = 0
        return False
    return plan.variable == "velocity"


@pytest.mark.parametrize("case", [*filter(in_velocity, CONVERGENT)], ids=str)
def test_solvers_in_velocity_have_their_order_from_noise_to_data(case):
    network, x, exact = problems.flow_problem()
    solver, errors = fd.solvers.get(case.name, **full(case.name)), []
    for count in (steps_of(case), 2 * steps_of(case)):
        plan = fd.plan(problems.FLOW, solver, count, prediction="velocity")
        assert (plan.times[0], plan.times[-1]) == (1.0, 0.0)
        errors.append(float((fd.sample(network, x, plan) - exact).norm()))
    order = case.info.measured_order
    assert 0.95 * order <= problems.slope(errors) <= order + allowance(case)


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
def test_tableau_satisfies_the_conditions_of_its_order_and_not_of_the_next(tableau):
    c, a, b = fd.solvers.TABLEAUS[tableau]
    matrix = np.zeros((len(c), len(c)))
    for i, row in enumerate(a):
        matrix[i, : len(row)] = row
    c, b = np.array(c), np.array(b)
    np.testing.assert_allclose(matrix.sum(1), c, atol=1e-14)
    ac, ac2, aac = matrix @ c, matrix @ c**2, matrix @ matrix @ c
    conditions = {  # one for each rooted tree; Hairer, Norsett & Wanner, section II.2
        1: [(b.sum(), 1)],
        2: [(b @ c, 2)],
        3: [(b @ c**2, 3), (b @ ac, 6)],
        4: [(b @ c**3, 4), (b @ (c * ac), 8), (b @ ac2, 12), (b @ aac, 24)],
        5: [
            *((b @ c**4, 5), (b @ (c**2 * ac), 10), (b @ (c * ac2), 15), (b @ (c * aac), 30)),
            *((b @ ac**2, 20), (b @ matrix @ c**3, 20), (b @ matrix @ (c * ac), 40)),
            *((b @ matrix @ ac2, 60), (b @ matrix @ aac, 120)),
        ],
    }
    reached = 0
    for order, each in conditions.items():
        if any(abs(value - 1 / inverse) > 1e-14 for value, inverse in each):
            break
        reached = order
    assert reached == ORDERS[tableau]


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
