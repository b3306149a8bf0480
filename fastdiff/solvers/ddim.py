# SPDX-License-Identifier: Apache-2.0
"""DDIM and DDPM: one output a step, with or without noise."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ..schedules import Array, Schedule
from .base import Rows, X0Limits, choice
from .exponential import moments, transfer


@dataclass(frozen=True)
class DDIM(X0Limits):
    """DDIM: the exact flow of a constant epsilon (equally, of a constant x0) over each step.

        x_{i+1} = alpha_{i+1} x0 + sqrt(sigma_{i+1}² - s²) eps + s z
        s = eta sigma_{i+1} sqrt(1 - exp(-2 h))

    Order 1. eta = 0 is deis-1, dpm-1, dpmpp-1 and, on an EDM or flow schedule, Euler. eta = 1 is
    DDPM's posterior. A step that ends at sigma = 0 is x' = x0, without noise.

    Args:
        eta: Share of fresh noise, in [0, 1].
        form: Variable of the rows: "epsilon", "x0", or "auto": epsilon unless x0 is limited
            or alpha = 0 at the start. The forms agree to rounding.
        clip, threshold: Of x0, as in `X0Limits`; epsilon is then recomputed from the limited x0.

    Source: Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502, eqs. 12 and 16.
    """

    eta: float = 0.0
    form: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.eta, bool) or not isinstance(self.eta, int | float | np.number):
            raise TypeError(f"{self.name}: eta is a number in [0, 1]; got {self.eta!r}.")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"{self.name}: eta lies in [0, 1]; got {self.eta!r}.")
        choice(self.name, "form", self.form, ("auto", "epsilon", "x0"))
        self._check_limits(self.form)

    @property
    def name(self) -> str:
        return "ddim"

    def variable(self, schedule: Schedule, times: Array) -> str:
        if self.form != "auto":
            return self.form
        needs_x0 = self.limits or float(schedule.alpha(times[0])) == 0.0
        return "x0" if needs_x0 else "epsilon"

    def write(self, rows: Rows, times: Array) -> None:
        for s, t in itertools.pairwise(times):
            a, b, c = self._row(rows.schedule, rows.variable, s, t)
            rows.add(s, x=(a, {rows.current: b}), c=c)

    def _row(self, schedule: Schedule, form: str, s: float, t: float) -> tuple[float, float, float]:
        if self.eta == 0.0:
            return transfer(schedule, form, s, t), moments(schedule, form, s, t, 1)[0], 0.0
        h = float(schedule.lambda_t(t) - schedule.lambda_t(s))
        sigma = float(schedule.sigma(t))
        noise = self.eta * sigma * math.sqrt(-math.expm1(-2.0 * h))
        # sigma² - noise² without cancellation at eta = 1: sigma² exp(-2h) + (1 - eta²) (...)
        rest = math.exp(-2.0 * h) + (1.0 - self.eta**2) * -math.expm1(-2.0 * h)
        direct = sigma * math.sqrt(rest)
        alpha_s, sigma_s = float(schedule.alpha(s)), float(schedule.sigma(s))
        alpha_t = float(schedule.alpha(t))
        if form == "epsilon":
            return alpha_t / alpha_s, direct - alpha_t * sigma_s / alpha_s, noise
        return direct / sigma_s, alpha_t - direct * alpha_s / sigma_s, noise


@dataclass(frozen=True)
class DDPM(DDIM):
    """DDPM's ancestral sampling: DDIM with eta = 1, or its upper variance.

    "fixed_small" is the posterior given x0, and DDIM's eta = 1. "fixed_large" keeps the posterior's
    mean and draws with variance beta = 1 - alpha_s²/alpha_t² of the step; it needs a variance
    preserving schedule and does not preserve the marginals. No noise at a step to sigma = 0.

    Args:
        variance: "fixed_small" or "fixed_large".
        published: True keeps "fixed_large" as the code has it, which leaves the noise out only
            where the step starts at training index 0: a coarser sequence ends with noise of
            standard deviation sigma_s on its result.
        form, clip, threshold: As in `DDIM`.

    Source: Ho et al., "DDPM", arXiv:2006.11239, section 3.2 and algorithm 2; published code
    ermongroup/ddim functions/denoising.py:ddpm_steps.
    """

    eta: float = 1.0
    variance: str = "fixed_small"
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self.name, "variance", self.variance, ("fixed_small", "fixed_large"))
        choice(self.name, "published", self.published, (False, True))
        if self.eta != 1.0:
            raise ValueError(f"ddpm: eta is 1; got {self.eta!r}. Use ddim for other values.")

    @property
    def name(self) -> str:
        return "ddpm"

    def _row(self, schedule: Schedule, form: str, s: float, t: float) -> tuple[float, float, float]:
        a, b, c = super()._row(schedule, form, s, t)
        ends = float(schedule.sigma(t)) == 0.0
        if self.published:
            ends = float(schedule.model_time(s)) == 0.0
        if self.variance == "fixed_large" and not ends:
            alpha, sigma = float(schedule.alpha(s)), float(schedule.sigma(s))
            if not np.isclose(alpha * alpha + sigma * sigma, 1.0, rtol=1e-9):
                raise ValueError(
                    "ddpm: variance='fixed_large' needs a variance preserving schedule "
                    f"(VPLinear, VPCosine, VPDiscrete); got {schedule}. Use 'fixed_small'."
                )
            ratio = alpha / float(schedule.alpha(t))
            c = math.sqrt((1.0 - ratio) * (1.0 + ratio))
        return a, b, c
