# SPDX-License-Identifier: Apache-2.0
"""DEIS: multistep exponential integrators on epsilon, with polynomials in t or in rho."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...schedules import Array, Schedule
from ..base import choice
from ..entry import Info
from ..exponential import lagrange_at, rho_gap, rho_quadrature
from .multistep import EpsilonMultistep, fixed_options

_RIEMANN_NODES = 10_000


@dataclass(frozen=True)
class Integrated(EpsilonMultistep):
    """Multistep on epsilon whose weights are integrals of polynomials through its nodes.

    Args:
        order: Outputs combined by a full step, 1 to 4.
        published: True takes the authors' Riemann sums in place of the integrals.
    """

    order: int = 3
    published: bool = False

    def __post_init__(self) -> None:
        self.check_multistep()
        choice(self.name, "published", self.published, (False, True))


@dataclass(frozen=True)
class DEIS(Integrated):
    """tAB-DEIS: epsilon extrapolated by a polynomial in t, integrated under the exact kernel.

        x_{i+1} = (alpha_{i+1}/alpha_i) x_i + sum_j C_ij epsilon_{i-j}
        C_ij = alpha_{i+1} int_{t_i}^{t_{i+1}} (d rho/d tau) L_j(tau) d tau

    Order `order` with the runge-kutta warm-up, at most 2 without. The paper's tAB-r has order
    r + 1; order = 1 is DDIM. Ends at sigma = 0 are legal. The integrals are exact to 1e-12.

    Args:
        order: Outputs combined by a full step, 1 to 4.
        lower_order_final: True lowers the last steps to order .. 2, 1; "zero" lowers a step to
            sigma = 0 alone, to x' = x0. The default is False: as published, these methods do not
            lower, and they do not need to.
        warmup: "lower" (steps 1, 2, .. of order 1, 2, ..; no extra evaluations, but the asymptotic
            order is at most 2) or "runge-kutta" (the first order - 1 steps by rhoRK of the same
            order; full order).
        published: True takes the authors' integrals, a left Riemann sum of 10000 nodes: relative
            error of the weights up to 2e-4, of samples at 6 steps up to 4e-3; order = 1 is then
            not exactly DDIM.

    Source: Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator",
    arXiv:2204.13902, eqs. 14-15; code qsh-zh/deis a30709f.
    """

    @property
    def name(self) -> str:
        return f"deis-{self.order}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        s = float(nodes[0])
        if self.published:
            tau = np.linspace(s, t, _RIEMANN_NODES, endpoint=False)
            alpha, sigma = schedule.alpha(tau), schedule.sigma(tau)
            rho_dot = (schedule.sigma_dot(tau) - sigma * schedule.f(tau)) / alpha
            offsets, w = tau - s, rho_dot * (t - s) / _RIEMANN_NODES
        else:
            offsets, w = rho_quadrature(schedule, s, t)
        gaps = np.subtract.outer(nodes, nodes)
        return float(schedule.alpha(t)) * (lagrange_at(gaps, offsets) @ w)


@dataclass(frozen=True)
class RhoAB(Integrated):
    """rhoAB-DEIS: epsilon extrapolated by a polynomial in rho = sigma/alpha.

        x_{i+1} = (alpha_{i+1}/alpha_i) x_i + alpha_{i+1} sum_j int L_j(rho) d rho epsilon_{i-j}

    Order `order` with the runge-kutta warm-up, at most 2 without. Ends at sigma = 0 are legal.

    Args:
        order, lower_order_final, warmup: The options of `DEIS`.
        published: True takes the authors' left Riemann sums of 10000 nodes (relative error of the
            weights 2e-5).

    Source: Zhang & Chen, arXiv:2204.13902, section 3.3; code qsh-zh/deis a30709f.
    """

    @property
    def name(self) -> str:
        return f"deis-rhoab-{self.order}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        length = rho_gap(schedule, nodes[0], t)
        if self.published:
            offsets = np.linspace(0.0, length, _RIEMANN_NODES, endpoint=False)
            w = np.full(_RIEMANN_NODES, length / _RIEMANN_NODES)
        else:
            x, w = np.polynomial.legendre.leggauss(4)
            offsets, w = 0.5 * length * (1.0 + x), 0.5 * length * w
        gaps = np.array([[rho_gap(schedule, m, j) for m in nodes] for j in nodes])
        return float(schedule.alpha(t)) * (lagrange_at(gaps, offsets) @ w)


_DEIS = "Zhang & Chen, arXiv:2204.13902"
_SUMS = "the authors integrate by Riemann sums of 10000 nodes: weights are off by up to 2e-5"

SOLVERS = (
    *(
        Info(
            f"deis-{order}",
            DEIS,
            measured_order=order,
            nfe_per_step=1,
            summary="multistep, polynomial in t (tAB)",
            source=_DEIS,
            fixed=fixed_options(order, lower_order_final=False, warmup="lower"),
            least_steps=order,
            same="ddim" if order == 1 else "",
            quirks="the authors and diff-sampler integrate by Riemann sums of 10000 nodes: weights "
            "are off by up to 2e-4, samples of 6 steps by up to 4e-3",
        )
        for order in (1, 2, 3, 4)
    ),
    *(
        Info(
            f"deis-rhoab-{order}",
            RhoAB,
            measured_order=order,
            nfe_per_step=1,
            summary="multistep, polynomial in rho",
            source=_DEIS,
            # a Riemann sum of a constant is exact
            fixed=fixed_options(order, lower_order_final=False, warmup="lower", published=False),
            least_steps=order,
            same="ddim" if order == 1 else "",
            quirks=_SUMS if order > 1 else "",
        )
        for order in (1, 2, 3, 4)
    ),
)
