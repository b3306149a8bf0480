# SPDX-License-Identifier: Apache-2.0
"""PNDM and PLMS: the weights of a uniform grid, with evaluations of their own to start from."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ...schedules import Array, Schedule
from ..base import Solver, choice, enough_steps
from ..entry import Info
from ..exponential import moments, transfer
from ..rows import Row, Rows
from .ipndm import ADAMS_BASHFORTH

_RK_STEPS = 3  # each leaves one output behind, and the fourth step combines four


@dataclass(frozen=True)
class PNDM(Solver):
    """PNDM: Adams-Bashforth weights of a uniform grid under DDIM's transfer, started two ways.

        x_{i+1} = DDIM(x_i, sum_j b_j epsilon_{i-j}),  b = (55, -59, 37, -9)/24

    - `skip_prk_steps=False` (PNDM): each of the first three steps, from s to t with m halfway in
      time, is a pseudo Runge-Kutta step of four evaluations, of which the first is kept:
      e_1 at x, e_2 at DDIM(x, e_1, s -> m), e_3 at DDIM(x, e_2, s -> m), e_4 at
      DDIM(x, e_3, s -> t), and then DDIM(x, (e_1 + 2 e_2 + 2 e_3 + e_4)/6, s -> t).
    - `skip_prk_steps=True` (PLMS, Stable Diffusion 1's default): the first step is a trial step,
      made again from x with the mean of the outputs at its ends; the next ones have the weights
      (3, -1)/2 and (23, -16, 5)/12. The output at the trial point is not kept. One step alone, or
      a first step to sigma = 0, is DDIM's.

    Of order 2, as the weights are those of a uniform grid in rho. It takes 9 evaluations, or 1,
    more than steps. Ends at sigma = 0 are legal.

    Args:
        skip_prk_steps: True is PLMS.
        published: True rounds the middle of a pseudo Runge-Kutta step to training indices as
            diffusers does, which matters where a step spans an odd number of them: the state moves
            to one index and the network is told the next. A schedule without training steps has
            nothing to round.

    Source: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds",
    arXiv:2202.09778, eqs. 9, 12, 13 and Algorithm 2; Rombach et al., arXiv:2112.10752, code
    latent-diffusion PLMSSampler; diffusers 0.42.1 PNDMScheduler.
    """

    skip_prk_steps: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        choice(self.name, "skip_prk_steps", self.skip_prk_steps, (False, True))
        choice(self.name, "published", self.published, (False, True))

    @property
    def name(self) -> str:
        return "plms" if self.skip_prk_steps else "pndm"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "epsilon"

    def write(self, rows: Rows, times: Array) -> None:
        kept: list[int] = []  # evaluations at accepted times
        if not self.skip_prk_steps:
            enough_steps(self.name, len(ADAMS_BASHFORTH), times)
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            kept.append(rows.current)
            if i < _RK_STEPS and not self.skip_prk_steps:
                self._pseudo_runge_kutta(rows, s, t)
            elif i == 0 and len(times) > 2 and float(rows.schedule.sigma(t)) > 0.0:
                rows.add(s, e=_ddim(rows.schedule, s, t, {kept[0]: 1.0}))
                mean = {kept[0]: 0.5, kept[0] + 1: 0.5}
                rows.add(t, x=_ddim(rows.schedule, s, t, mean))
            else:
                newest = kept[: -len(ADAMS_BASHFORTH) - 1 : -1]
                b = ADAMS_BASHFORTH[len(newest) - 1]
                rows.add(s, x=_ddim(rows.schedule, s, t, dict(zip(newest, b, strict=True))))

    def _pseudo_runge_kutta(self, rows: Rows, s: float, t: float) -> None:
        """Writes the step of four evaluations from s to t."""
        schedule, k = rows.schedule, rows.current
        h: float | None = None
        training_steps = schedule.traits.training_steps
        if self.published and training_steps:
            half = round((s - t) * training_steps) // 2 / training_steps
            reached, told = s - half, t + half
        else:
            reached = told = 0.5 * (s + t)
            h = _half_length(schedule, s, t)
        rows.add(s, e=_ddim(schedule, s, reached, {k: 1.0}, h))
        rows.add(told, e=_ddim(schedule, s, told, {k + 1: 1.0}, h))
        rows.add(told, e=_ddim(schedule, s, t, {k + 2: 1.0}))
        weights = {k: 1 / 6, k + 1: 1 / 3, k + 2: 1 / 3, k + 3: 1 / 6}
        rows.add(t, x=_ddim(schedule, s, t, weights))


def _half_length(schedule: Schedule, s: float, t: float) -> float:
    """lambda halfway in time between s and t, minus lambda_s.

    The middle, rounded to a float64 time, would lose most digits of a short step. What the rounding
    left over is put back by the derivative, d lambda/dt = -g²/(2 sigma²).
    """
    middle = 0.5 * (s + t)
    left_over = 0.5 * ((s - middle) - (middle - t))
    slope = -0.5 * float(schedule.g2(middle)) / float(schedule.sigma(middle)) ** 2
    return float(schedule.h(s, middle)) + slope * left_over


def _ddim(
    schedule: Schedule, s: float, t: float, weights: dict[int, float], h: float | None = None
) -> Row:
    """DDIM's step from s to t, of length h in lambda, with a weighted sum of outputs."""
    if h is None:
        w = float(moments(schedule, "epsilon", s, t, 1)[0])
    else:
        w = -float(schedule.sigma(t)) * math.expm1(h)
    outputs = {k: w * weight for k, weight in weights.items()}
    return Row(x=transfer(schedule, "epsilon", s, t), outputs=outputs)


_PNDM = "Liu et al., arXiv:2202.09778"
_QUIRK = (
    "diffusers' PNDMScheduler combines raw outputs before it converts them, so that "
    "prediction_type='v_prediction' is of order 1. With timestep_spacing='linspace' it moves the "
    "state by less than its times lie apart. With its defaults (steps_offset=0, "
    "set_alpha_to_one=False) the last step has no length."
)

SOLVERS = (
    Info(
        "pndm",
        PNDM,
        measured_order=2,
        nfe_per_step=1,
        nfe_extra=9,
        summary="uniform-grid Adams-Bashforth weights, started by pseudo Runge-Kutta",
        source=_PNDM,
        least_steps=4,
        aliases={"PNDMScheduler": {}},
        quirks=_QUIRK + " Its pseudo Runge-Kutta steps of odd length in training indices move the "
        "state half an index away from where they tell the network (published=True).",
    ),
    Info(
        "plms",
        PNDM,
        measured_order=2,
        nfe_per_step=1,
        nfe_extra=1,
        summary="uniform-grid Adams-Bashforth weights, the first step made twice",
        source=_PNDM,
        fixed={"skip_prk_steps": True, "published": False},
        quirks=_QUIRK,
    ),
)
