# SPDX-License-Identifier: Apache-2.0
"""DEIS: multistep exponential integrators on epsilon, and iPNDM, which shares their transfer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ..schedules import Array, Schedule
from .base import Rows, Solver, choice
from .exponential import lagrange, moments, rho_quadrature, transfer
from .runge_kutta import runge_kutta_step

# Adams-Bashforth weights on a uniform grid, newest first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_STARTERS = {1: "euler", 2: "heun", 3: "kutta3", 4: "rk4"}
_RIEMANN_NODES = 10_000


@dataclass(frozen=True)
class _EpsilonMultistep(Solver):
    """Multistep on epsilon: the transfer alpha'/alpha and a rule for the weights."""

    points: int = 3
    lower_order_final: bool = False
    warmup: str = "lower"

    def __post_init__(self) -> None:
        choice(self.name, "points", self.points, (1, 2, 3, 4))
        choice(self.name, "lower_order_final", self.lower_order_final, (False, True))
        choice(self.name, "warmup", self.warmup, ("lower", "runge-kutta"))

    @property
    def history(self) -> int:
        return self.points

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "epsilon"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        """Weights of the outputs at `nodes` (newest first, nodes[0] = start of the step) [k]."""
        raise NotImplementedError(f"{type(self).__name__} must define its weights")

    def write(self, rows: Rows, times: Array) -> None:
        steps = len(times) - 1
        evaluations: list[int] = []  # at each accepted time
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            if self.warmup == "runge-kutta" and i + 1 < self.points:
                evaluations.append(runge_kutta_step(rows, _STARTERS[self.points], s, t))
                continue
            k = min(self.points, i + 1)
            if self.lower_order_final:
                k = min(k, steps - i)
            evaluations.append(rows.current)
            newest = slice(-1, -k - 1, -1)
            b = self.weights(rows.schedule, times[: i + 1][newest], t)
            a = transfer(rows.schedule, "epsilon", s, t)
            rows.add(s, x=(a, dict(zip(evaluations[newest], b.tolist(), strict=True))))


@dataclass(frozen=True)
class DEIS(_EpsilonMultistep):
    """tAB-DEIS: epsilon extrapolated by a polynomial in t, integrated under the exact kernel.

        x_{i+1} = (alpha_{i+1}/alpha_i) x_i + sum_j C_ij epsilon_{i-j}
        C_ij = alpha_{i+1} int_{t_i}^{t_{i+1}} (d rho/d tau) L_j(tau) d tau

    Order `points` with the runge-kutta warm-up, at most 2 without. The paper's tAB-r has points
    r + 1; points = 1 is DDIM. Ends at sigma = 0 are legal. The integrals are exact to 1e-12.

    Args:
        points: Outputs combined by a full step, 1 to 4.
        lower_order_final: True lowers the last steps to points .. 2, 1. Default False: these
            methods, as published, do not, and do not need it.
        warmup: "lower" (steps 1, 2, .. of order 1, 2, ..; no extra evaluations, but the asymptotic
            order is at most 2) or "runge-kutta" (the first points - 1 steps by rhoRK of the same
            order; full order).
        published: True takes the authors' integrals, a left Riemann sum of 10000 nodes: relative
            error of the weights up to 2e-4, of samples at 6 steps up to 4e-3; points = 1 is then
            not exactly DDIM.

    Source: Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator",
    arXiv:2204.13902, eqs. 14-15; code qsh-zh/deis a30709f.
    """

    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self.name, "published", self.published, (False, True))

    @property
    def name(self) -> str:
        return f"deis-{self.points}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        s = float(nodes[0])
        if self.published:
            tau = np.linspace(s, t, _RIEMANN_NODES, endpoint=False)
            alpha, sigma = schedule.alpha(tau), schedule.sigma(tau)
            rho_dot = (schedule.sigma_dot(tau) - sigma * schedule.f(tau)) / alpha
            w = rho_dot * (t - s) / _RIEMANN_NODES
        else:
            tau, w = rho_quadrature(schedule, s, t)
        return float(schedule.alpha(t)) * (lagrange(nodes, tau) @ w)


@dataclass(frozen=True)
class RhoAB(_EpsilonMultistep):
    """rhoAB-DEIS: epsilon extrapolated by a polynomial in rho = sigma/alpha.

        x_{i+1} = (alpha_{i+1}/alpha_i) x_i + alpha_{i+1} sum_j int L_j(rho) d rho epsilon_{i-j}

    Order `points` with the runge-kutta warm-up, at most 2 without. Ends at sigma = 0 are legal.

    Args:
        points, lower_order_final, warmup: As in `DEIS`.
        published: True takes the authors' left Riemann sums of 10000 nodes (relative error of the
            weights 2e-5).

    Source: Zhang & Chen, arXiv:2204.13902, section 3.3; code qsh-zh/deis a30709f.
    """

    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self.name, "published", self.published, (False, True))

    @property
    def name(self) -> str:
        return f"deis-rhoab-{self.points}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        rho, rho_t = schedule.rho(nodes), float(schedule.rho(t))
        if self.published:
            u = np.linspace(rho[0], rho_t, _RIEMANN_NODES, endpoint=False)
            w = np.full(_RIEMANN_NODES, (rho_t - rho[0]) / _RIEMANN_NODES)
        else:
            x, w = np.polynomial.legendre.leggauss(4)
            u = 0.5 * (rho[0] + rho_t) + 0.5 * (rho_t - rho[0]) * x
            w = 0.5 * (rho_t - rho[0]) * w
        return float(schedule.alpha(t)) * (lagrange(rho, u) @ w)


@dataclass(frozen=True)
class IPNDM(_EpsilonMultistep):
    """iPNDM: Adams-Bashforth weights of a uniform grid under DDIM's exact transfer.

    Order 2 for every points >= 2 unless the grid is uniform in rho, for which the weights are made;
    order 1 for points = 1, which is DDIM. Ends at sigma = 0 are legal.

    Args:
        points, lower_order_final, warmup: As in `DEIS`.

    Source: Zhang & Chen, arXiv:2204.13902, appendix H.2, after Liu et al., "PNDM",
    arXiv:2202.09778; code qsh-zh/deis a30709f and zju-pi/diff-sampler 68d5ce4.
    """

    points: int = 4

    @property
    def name(self) -> str:
        return f"ipndm-{self.points}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        whole = moments(schedule, "epsilon", float(nodes[0]), t, 1)[0]
        return whole * np.array(ADAMS_BASHFORTH[len(nodes) - 1])
