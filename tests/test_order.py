# SPDX-License-Identifier: Apache-2.0
"""Observed order of every registered solver: the slope of log error over 160 -> 320 steps."""

import functools

import numpy as np
import pytest
import torch

import fastdiff as fd

VP = fd.schedules.VPLinear()
T_MAX, T_MIN = 0.8, 0.05
# Several, because the leading error of one scalar problem may change sign near 160 steps.
GAUSSIAN = np.array([0.4, 0.5, 0.6, 0.7])
WEIGHTS = [0.5, 0.3, 0.2]
MEANS = [[1.0, -0.5, 0.3, 0.8], [-0.9, 0.6, -1.1, 0.2], [0.2, 1.4, 0.5, -1.0]]
VARIANCES = [[0.04, 0.09, 0.05, 0.16], [0.1, 0.05, 0.08, 0.06], [0.07, 0.12, 0.25, 0.05]]
SOLVERS = [name for name in fd.solvers.names() if not fd.solvers.info(name).stochastic]


@functools.cache
def problem(name):
    """(network, x at T_MAX, exact x at T_MIN)."""
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if name == "gaussian":
        model = fd.models.GaussianMixture([1.0], [[0.0] * 4], GAUSSIAN[None])
        scale = [np.hypot(np.sqrt(GAUSSIAN) * VP.alpha(t), VP.sigma(t)) for t in (T_MAX, T_MIN)]
        return model.network(VP), x, x * torch.from_numpy(scale[1] / scale[0])
    network = fd.models.GaussianMixture(WEIGHTS, MEANS, VARIANCES).network(VP)
    fine = fd.plan(VP, "deis-rk4", 1500, grid="logsnr", t_max=T_MAX, t_min=T_MIN)
    return network, x, fd.sample(network, x, fine)


def slope(solver, name, grid, steps=160):
    network, x, exact = problem(name)
    options = fd.solvers.info(solver).options if isinstance(solver, str) else {}
    full = {"warmup": "runge-kutta"} if "warmup" in options else {}
    errors = []
    for count in (steps, 2 * steps):
        plan = fd.plan(VP, solver, count, grid=grid, t_max=T_MAX, t_min=T_MIN, **full)
        errors.append(float((fd.sample(network, x, plan) - exact).norm()))
    return float(np.log2(errors[0] / errors[1]))


@pytest.mark.parametrize("grid", ["uniform", "logsnr"])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_registry_states_the_measured_order(solver, name, grid):
    order, measured = fd.solvers.info(solver).measured_order, slope(solver, name, grid)
    assert order - 0.25 <= measured <= order + 0.5


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
    assert slope("deis-3", "gaussian", "uniform", steps=1600) > 2.9
