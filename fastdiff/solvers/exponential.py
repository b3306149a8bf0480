# SPDX-License-Identifier: Apache-2.0
"""Exponential-integrator weights, the one generator of every solver's coefficients.

With h = lambda_t - lambda_s > 0 for a step from s to t, and rho = sigma/alpha,

    form "epsilon":  x_t = (alpha_t/alpha_s) x_s + alpha_t int_{rho_s}^{rho_t} epsilon d rho
    form "x0":       x_t = (sigma_t/sigma_s) x_s + sigma_t int_{1/rho_s}^{1/rho_t} x0 d(1/rho)

are exact, and a solver is a polynomial for epsilon or x0 in some variable. All in float64, with
no difference of nearly equal numbers and no division by a sigma_t that may be 0: the weights keep
ten digits for h from 1e-8 to 50, however the lengths of the steps differ. For that, nothing here
subtracts two lambdas, two rhos, or a time that was computed from another. Lengths in lambda come
from `Schedule.h` or from the fraction of a step that was asked for, lengths in rho from `rho_gap`.
"""

from __future__ import annotations

import itertools
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


def moments(
    schedule: Schedule, form: str, s: float, t: float, count: int, h: float | None = None
) -> Array:
    """J_p = weight of (lambda - lambda_s)^p under the step's integral, p = 0 .. count - 1.

    epsilon: J_p = -sigma_t p! h^{p+1} phi_{p+1}(h); its limit -alpha_t rho_s p! where sigma_t = 0.
    x0:      J_p =  alpha_t p! h^{p+1} phi_{p+1}(-h); infinite for p > 0 where h is.

    Args:
        schedule, form: The schedule, and "epsilon" or "x0".
        s, t: The step.
        count: Number of moments.
        h: Length of the step. None: `schedule.h(s, t)`. A step to an inner node has its fraction
            of the whole step's length, which the node's time has lost to rounding.
    """
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    if h is None:
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


def from_moments(j: Array, gaps: Array) -> Array:
    """Weights b [k] with sum_m b_m u_m^p = j_p for p < k, where nodes[0] has u = 0.

    Newton's form: the moments of (u - u_0) .. (u - u_{m-1}), then the divided differences. For
    nodes behind the step, newest first, no operation cancels.

    Args:
        j: Moments [k].
        gaps: gaps[m, n] = u_m - u_n [k, k], each to its own rounding.

    Source: Björck & Pereyra, "Solution of Vandermonde systems of equations", 1970.
    """
    b, last = j.copy(), len(j) - 1
    for k in range(1, last):  # at k = 0 the node is 0
        b[k + 1 :] -= gaps[k, 0] * b[k:-1]
    for k in range(last - 1, -1, -1):
        for i in range(k + 1, last + 1):
            b[i] /= gaps[i, i - k - 1]
        b[k:-1] -= b[k + 1 :]
    return b


def lambda_gaps(schedule: Schedule, nodes: Sequence[float]) -> Array:
    """gaps[m, n] = lambda of nodes[m] minus lambda of nodes[n], without cancellation [k, k]."""
    times = np.array(nodes)
    return schedule.h(times[None, :], times[:, None])


def adams(schedule: Schedule, form: str, s: float, t: float, nodes: Sequence[float]) -> Array:
    """Weights of outputs at `nodes` (times, nodes[0] = s): exact for polynomials in lambda.

    Adams-Bashforth in lambda under the exponential weight: order len(nodes).
    """
    j = moments(schedule, form, s, t, len(nodes))
    if len(nodes) == 1:  # defined where lambda_s = -inf, too
        return j
    return from_moments(j, lambda_gaps(schedule, nodes))


def rho_gap(schedule: Schedule, s: float, t: float) -> float:
    """rho_t - rho_s, without cancellation."""
    return float(schedule.rho(s) * np.expm1(-schedule.h(s, t)))


def lagrange(nodes: Array, at: Array) -> Array:
    """Lagrange basis over `nodes` [k] evaluated at points [n]: [k, n]."""
    return lagrange_at(np.subtract.outer(nodes, nodes), at - nodes[0])


def lagrange_at(gaps: Array, offsets: Array) -> Array:
    """Lagrange basis over k nodes, at n points: [k, n], without cancellation.

    Args:
        gaps: gaps[j, m] = node j minus node m, each to its own rounding [k, k].
        offsets: The points minus node 0 [n].
    """
    basis = np.ones_like(offsets) * np.ones_like(gaps[:, :1])
    for j in range(len(gaps)):
        for m in range(len(gaps)):
            if m != j:
                basis[j] *= (offsets + gaps[0, m]) / gaps[j, m]
    return basis


def time_offsets(schedule: Schedule, s: float, u: Array) -> Array:
    """tau - s of the times tau with lambda_tau = lambda_s + u.

    A time in float64 resolves a short step badly. What its rounding leaves over follows from one
    step of Newton's method, with d lambda/dt = -g²/(2 sigma²).
    """
    tau = schedule.t_of_lambda(schedule.lambda_t(s) + u)
    slope = -0.5 * schedule.g2(tau) / schedule.sigma(tau) ** 2
    return (tau - s) + (u - schedule.h(s, tau)) / slope


_NODES = 24
_PANEL = 2.0  # in lambda; t(lambda) has its singularities pi/2 away from the real line
_LEAST_RHO = 1e-3  # below it t(rho) is smooth down to sigma = 0


def rho_quadrature(schedule: Schedule, s: float, t: float) -> tuple[Array, Array]:
    """Offsets tau - s [n] and weights w [n]: sum w F(tau) = int_{rho_s}^{rho_t} F(t(rho)) d rho.

    Gauss-Legendre on panels that end at the schedule's knots and are at most 2 wide in lambda;
    below rho = 1e-3, on the way to sigma = 0, the panel is in rho itself. Relative error below
    1e-12 for the schedules of this library, for steps of any length.
    """
    x, w = np.polynomial.legendre.leggauss(_NODES)
    knots = schedule.knots[(schedule.knots > t) & (schedule.knots < s)]
    ends = np.append(np.append(s, knots[::-1]), t)  # from noise to data
    offsets, weights = [], []
    for a, b in itertools.pairwise(ends):
        rho, to_knot = float(schedule.rho(a)), a - s
        length = float(schedule.h(a, b))
        in_rho = math.isinf(length)
        if in_rho:
            length = max(math.log(rho / _LEAST_RHO), 0.0)
        count = math.ceil(length / _PANEL)
        half = 0.5 * length / max(count, 1)
        u = (half * (2 * np.arange(count)[:, None] + 1 + x)).ravel()
        offsets.append(to_knot + time_offsets(schedule, a, u))
        weights.append(-rho * half * np.exp(-u) * np.tile(w, count))
        if in_rho:
            rho = rho * math.exp(-length)
            at = 0.5 * rho * (1.0 + x)
            offsets.append((a - s) + (schedule.t_of_lambda(-np.log(at)) - a))
            weights.append(-0.5 * rho * w)
    return np.concatenate(offsets), np.concatenate(weights)
