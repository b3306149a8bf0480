# SPDX-License-Identifier: Apache-2.0
"""Adams-Bashforth in rho = sigma/alpha on any grid: LMS, and iPNDM with variable steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...schedules import Array, Schedule
from ..base import choice
from ..entry import Info
from .deis import RhoAB
from .multistep import EpsilonMultistep, fixed_options


@dataclass(frozen=True)
class LMS(EpsilonMultistep):
    """Linear multistep in rho = sigma/alpha, the weights integrated exactly.

        x_{i+1} = (alpha_{i+1}/alpha_i) x_i + alpha_{i+1} sum_j int L_j(rho) d rho epsilon_{i-j}

    with L_j the Lagrange basis over rho_i, rho_{i-1}, .. This is the table of `RhoAB`. The order is
    `order` with the runge-kutta warm-up, at most 2 without; order = 1 is DDIM. Ends at sigma = 0
    are legal.

    Args:
        order, lower_order_final, warmup: The options of `DEIS`.

    Source: Crowson, k-diffusion 4601bf0, sample_lms, in the variable of Karras et al.,
    "Elucidating the Design Space", arXiv:2206.00364; diffusers 0.42.1 LMSDiscreteScheduler.
    """

    order: int = 4

    def __post_init__(self) -> None:
        self.check_multistep()

    @property
    def name(self) -> str:
        return f"lms-{self.order}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        return RhoAB(order=len(nodes)).weights(schedule, nodes, t)


@dataclass(frozen=True)
class IPNDMV(EpsilonMultistep):
    """iPNDM with the weights of variable steps (ipndm_v), mended: Adams-Bashforth in rho.

    The right weights are those of `LMS`. The published ones lack a parenthesis at order 3, and at
    order 4 have that slip, a wrong sign and a wrong ratio besides: on steps of uneven lengths order
    3 converges at order 2, and order 4 not at all, since its weights do not sum to the step. On
    smooth grids the slips cost accuracy and, at order 4, the order. Order 2 is right.

    Args:
        order: Outputs combined by a full step, 2 to 4 (`max_order` in the authors' code).
        lower_order_final, warmup: The options of `DEIS`.
        published: True takes the authors' weights at orders 3 and 4, of the warm-up as well.

    Source: Zhou et al., "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps",
    arXiv:2312.00094; code zju-pi/diff-sampler 68d5ce4, ipndm_v_sampler.
    """

    order: int = 4
    published: bool = False

    def __post_init__(self) -> None:
        self.check_multistep()
        choice(self.name, "order", self.order, (2, 3, 4))
        choice(self.name, "published", self.published, (False, True))

    @property
    def name(self) -> str:
        return f"ipndm-v-{self.order}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        if not self.published or len(nodes) < 3:
            return RhoAB(order=len(nodes)).weights(schedule, nodes, t)
        # lengths in rho of this step and of those before, newest first
        starts, ends = np.array(nodes), np.array([t, *nodes[:-1]])
        lengths = schedule.rho(starts) * np.expm1(-schedule.h(starts, ends))
        return float(schedule.alpha(t)) * lengths[0] * _published(*lengths.tolist())


def _published(h: float, h1: float, h2: float, h3: float | None = None) -> Array:
    """The authors' weights of three or four outputs, as fractions of the step h, newest first."""
    third = 0.5 * (1.0 - h / (3.0 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2)))
    second = 0.5 * h / h1
    b = [1.0 + second + third, -second - (1.0 + h1 / h2) * third, third * h1 / h2]
    if h3 is None:
        return np.array(b)
    inner = 0.5 * (1.0 - h / (3.0 * (h + h1)))
    inner += (1.0 - h / (2.0 * (h + h1))) * h / (6.0 * (h + h1 + h2))
    before = h1 * (h1 + h2) * (h1 + h2 + h3)
    fourth = inner * h * (h + h1) * (h + h1 + h2) / before
    ratio = h1 * (h1 + h2) / (h2 * (h2 + h3))
    of_fourth = [1.0, -(1.0 + h1 / h2 + ratio), h1 / h2 + ratio * (1.0 + h2 / h3)]
    b = [w + fourth * v for w, v in zip(b, of_fourth, strict=True)]
    return np.array([*b, -fourth * ratio * h1 / h2])


_LMS = "Crowson, k-diffusion, after Karras et al., arXiv:2206.00364"
_QUADRATURE = (
    "k-diffusion, ComfyUI and diffusers integrate each weight by scipy's quad while sampling. The "
    "integrand is a polynomial, so the rule is exact, but diffusers keeps float32 sigmas: its "
    "weights are off by 1e-5 at 25 steps and 1e-4 at 500. ComfyUI makes the step to sigma = 0 of "
    "order 1."
)
_SLIPS = {
    3: "diff-sampler's ipndm_v_sampler lacks a parenthesis at order 3, and its ports (ComfyUI's "
    "ipndm_v) with it: order 2 on uneven steps. published=True gives those weights.",
    4: "diff-sampler's ipndm_v_sampler lacks a parenthesis, and has a wrong sign and a wrong ratio "
    "in the fourth-order term, and its ports (ComfyUI's ipndm_v) with it: the weights do not sum "
    "to the step, and on uneven steps it does not converge. published=True gives those weights.",
}
_DENOISED = {"lower_order_final": "zero"}  # ComfyUI takes x' = x0 for a step to sigma = 0

SOLVERS = (
    *(
        Info(
            f"lms-{order}",
            LMS,
            measured_order=order,
            nfe_per_step=1,
            summary="Adams-Bashforth in rho, exact integrals",
            source=_LMS,
            fixed=fixed_options(order, lower_order_final=False, warmup="lower"),
            least_steps=order,
            aliases={"sample_lms": {}, "LMSDiscreteScheduler": {}, "lms": _DENOISED}
            if order == 4
            else {},
            same="ddim" if order == 1 else f"deis-rhoab-{order}",
            quirks="" if order == 1 else _QUADRATURE,
        )
        for order in (1, 2, 3, 4)
    ),
    *(
        Info(
            f"ipndm-v-{order}",
            IPNDMV,
            measured_order=order,
            nfe_per_step=1,
            summary="iPNDM with the weights of variable steps",
            source="Zhou et al., arXiv:2312.00094",
            fixed={"order": order},
            least_steps=order,
            aliases={"ipndm_v": _DENOISED} if order == 4 else {},
            same=f"deis-rhoab-{order}",
            quirks="" if order == 2 else _SLIPS[order],
        )
        for order in (2, 3, 4)
    ),
)
