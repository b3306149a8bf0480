# SPDX-License-Identifier: Apache-2.0
"""The generator of coefficients: phi functions, moments, Adams weights and quadrature."""

import numpy as np
import pytest
from support.solvers import SCHEDULES, VP

import fastdiff as fd
from fastdiff.solvers.exponential import adams, lagrange, moments, phi, rho_quadrature


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
        offsets, w = rho_quadrature(schedule, s, t)
        tau = s + offsets
        rho_s, rho_t = float(schedule.rho(s)), float(schedule.rho(t))
        assert w.sum() == pytest.approx(rho_t - rho_s, rel=1e-12)
        for p in (1, 2):
            assert (w * schedule.rho(tau) ** p).sum() == pytest.approx(
                (rho_t ** (p + 1) - rho_s ** (p + 1)) / (p + 1), rel=1e-12
            )
        # a function of t: compare with the same rule on halves
        mid = 0.5 * (s + t)
        halves = [(a, *rho_quadrature(schedule, a, b)) for a, b in ((s, mid), (mid, t))]
        for power in (1, 2, 3):
            split = sum((weights * (a + nodes) ** power).sum() for a, nodes, weights in halves)
            assert (w * tau**power).sum() == pytest.approx(split, rel=1e-12)


def test_lagrange_basis_is_a_basis():
    nodes, at = np.array([0.1, 0.4, 0.9]), np.array([0.1, 0.4, 0.9, 0.6])
    basis = lagrange(nodes, at)
    np.testing.assert_allclose(basis[:, :3], np.eye(3), atol=1e-15)
    np.testing.assert_allclose(basis.sum(0), 1.0)
