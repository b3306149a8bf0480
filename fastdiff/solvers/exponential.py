# SPDX-License-Identifier: Apache-2.0
"""Exponential-integrator weights, the one generator of every solver's coefficients.

With h = lambda_t - lambda_s > 0 for a step from s to t, and rho = sigma/alpha,

    form "epsilon":  x_t = (alpha_t/alpha_s) x_s + alpha_t int_{rho_s}^{rho_t} epsilon d rho
    form "x0":       x_t = (sigma_t/sigma_s) x_s + sigma_t int_{1/rho_s}^{1/rho_t} x0 d(1/rho)

are exact, and a solver is a polynomial for epsilon or x0 in some variable. All in float64, with
no difference of nearly equal exponentials and no division by a sigma_t that may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..schedules import Array, Schedule

_SERIES_RADIUS = 2.0
_SERIES_TERMS = 32  # 2^32 / 36! < 1e-31


def phi(k: int, z: float) -> float:
    """phi_k(z): phi_0 = exp, phi_{k+1}(z) = (phi_k(z) - 1/k!)/z, phi_k(0) = 1/k!.

    Relative error below 1e-14 for k <= 5: a series for |z| < 2, the recursion beyond, where it
    loses nothing.
    """
    if abs(z) < _SERIES_RADIUS:
        return math.fsum(z**n / math.factorial(n + k) for n in range(_SERIES_TERMS))
    value = math.expm1(z) / z
    if k == 0:
        return math.exp(z)
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def transfer(schedule: Schedule, form: str, s: float, t: float) -> float:
    """Weight of x_s: alpha_t/alpha_s (form "epsilon") or sigma_t/sigma_s (form "x0")."""
    scale = schedule.alpha if form == "epsilon" else schedule.sigma
    return float(scale(t) / scale(s))


def moments(schedule: Schedule, form: str, s: float, t: float, count: int) -> Array:
    """J_p = weight of (lambda - lambda_s)^p under the step's integral, p = 0 .. count - 1.

    epsilon: J_p = -sigma_t p! h^{p+1} phi_{p+1}(h); its limit -alpha_t rho_s p! where sigma_t = 0.
    x0:      J_p =  alpha_t p! h^{p+1} phi_{p+1}(-h); infinite for p > 0 where h is.
    """
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    h = float(schedule.h(s, t))
    values = []
    for p in range(count):
        if form == "epsilon" and h > 30.0:  # sigma_t exp(h) = alpha_t rho_s, without the overflow
            tail = sum(sigma * h**j / math.factorial(j) for j in range(p + 1)) if sigma else 0.0
            values.append(-math.factorial(p) * (alpha * float(schedule.rho(s)) - tail))
        elif form == "epsilon":
            values.append(-sigma * math.factorial(p) * h ** (p + 1) * phi(p + 1, h))
        elif math.isinf(h):
            values.append(alpha if p == 0 else math.inf)
        else:
            values.append(alpha * math.factorial(p) * h ** (p + 1) * phi(p + 1, -h))
    return np.array(values)


def adams(schedule: Schedule, form: str, s: float, t: float, nodes: Sequence[float]) -> Array:
    """Weights of outputs at `nodes` (times, nodes[0] = s): exact for polynomials in lambda.

    Adams-Bashforth in lambda under the exponential weight: order len(nodes).
    """
    j = moments(schedule, form, s, t, len(nodes))
    if len(nodes) == 1:  # defined where lambda_s = -inf, too
        return j
    u = schedule.h(s, np.asarray(nodes))
    scale = np.abs(u).max()  # conditioning only
    powers = np.arange(len(nodes))
    return np.linalg.solve(np.vander(u / scale, increasing=True).T, j / scale**powers)


def lagrange(nodes: Array, at: Array) -> Array:
    """Lagrange basis over `nodes` [k] evaluated at points [n]: [k, n]."""
    basis = np.ones((len(nodes), len(at)))
    for j, node in enumerate(nodes):
        for m, other in enumerate(nodes):
            if m != j:
                basis[j] *= (at - other) / (node - other)
    return basis


def rho_quadrature(schedule: Schedule, s: float, t: float) -> tuple[Array, Array]:
    """Nodes tau [n] and weights w [n] with sum w F(tau) = int_{rho_s}^{rho_t} F(t(rho)) d rho.

    Gauss-Legendre on panels that end at the schedule's knots and are at most 1 wide in lambda;
    below rho = 1/4 the panels are in rho itself, where t(rho) is smooth down to sigma = 0. Relative
    error below 1e-13 for the schedules of this library.
    """
    x, w = np.polynomial.legendre.leggauss(24)
    knots = schedule.knots[(schedule.knots > t) & (schedule.knots < s)]
    ends = np.concatenate([[s], knots[::-1], [t]])  # from noise to data
    rho_ends = schedule.rho(ends)
    taus, weights = [], []
    for i in range(len(ends) - 1):
        rho_a, rho_b = float(rho_ends[i]), float(rho_ends[i + 1])
        cut = min(rho_a, max(rho_b, 0.25))
        if rho_a > cut:
            lam_a, lam_b = -math.log(rho_a), -math.log(cut)
            panels = np.linspace(lam_a, lam_b, math.ceil(lam_b - lam_a) + 1)
            half = 0.5 * np.diff(panels)[:, None]
            lam = (0.5 * (panels[1:] + panels[:-1])[:, None] + half * x).ravel()
            taus.append(schedule.t_of_lambda(lam))
            weights.append(-(np.exp(-lam) * (half * w).ravel()))
        if cut > rho_b:
            rho = 0.5 * (cut + rho_b) + 0.5 * (rho_b - cut) * x
            taus.append(schedule.t_of_lambda(-np.log(rho)))
            weights.append(0.5 * (rho_b - cut) * w)
    return np.concatenate(taus), np.concatenate(weights)
