# SPDX-License-Identifier: Apache-2.0
"""DDPM: ancestral sampling."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ...schedules import Array, Schedule
from ..base import X0Limits, choice
from ..entry import Info
from ..ode.ddim import ddim_row, form_of
from ..rows import Row, Rows


@dataclass(frozen=True)
class DDPM(X0Limits):
    """DDPM's ancestral sampling: DDIM with eta = 1, or its upper variance.

    "fixed_small" is the posterior given x0, and DDIM's eta = 1. "fixed_large" keeps the posterior's
    mean and draws with variance beta = 1 - alpha_s²/alpha_t² of the step; it needs a variance
    preserving schedule and does not preserve the marginals. A step to sigma = 0 adds no noise.

    Args:
        variance: "fixed_small" or "fixed_large".
        published: True keeps "fixed_large" as the code has it, which leaves the noise out only
            where the step starts at training index 0: a coarser sequence ends with noise of
            standard deviation sigma_s on its result.
        form, clip, threshold: The options of `DDIM`.

    Source: Ho et al., "DDPM", arXiv:2006.11239, section 3.2 and algorithm 2; published code
    ermongroup/ddim functions/denoising.py:ddpm_steps.
    """

    form: str = "auto"
    variance: str = "fixed_small"
    published: bool = False

    def __post_init__(self) -> None:
        choice(self.name, "form", self.form, ("auto", "epsilon", "x0"))
        choice(self.name, "variance", self.variance, ("fixed_small", "fixed_large"))
        choice(self.name, "published", self.published, (False, True))
        self.check_limits(self.form)

    @property
    def name(self) -> str:
        return "ddpm"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return form_of(self.form, self.limits, schedule, times)

    def write(self, rows: Rows, times: Array) -> None:
        self.limit(rows)
        for s, t in itertools.pairwise(times):
            a, b, c = ddim_row(rows.schedule, rows.variable, s, t, eta=1.0)
            if self.variance == "fixed_large" and not self._ends(rows.schedule, s, t):
                c = _upper(rows.schedule, s, t)
            rows.add(s, x=Row(x=a, outputs={rows.current: b}, noise=c))

    def _ends(self, schedule: Schedule, s: float, t: float) -> bool:
        """Whether the step from s to t is the one without noise."""
        if self.published:
            return float(schedule.model_time(s)) == 0.0
        return float(schedule.sigma(t)) == 0.0


def _upper(schedule: Schedule, s: float, t: float) -> float:
    """sqrt(beta) of the step: the posterior's standard deviation for data of unit variance."""
    alpha, sigma = float(schedule.alpha(s)), float(schedule.sigma(s))
    if not np.isclose(alpha * alpha + sigma * sigma, 1.0, rtol=1e-9):
        raise ValueError(
            "ddpm: variance='fixed_large' needs a variance preserving schedule "
            f"(VPLinear, VPCosine, VPDiscrete); got {schedule}. Use 'fixed_small'."
        )
    # alpha² = 1/(1 + rho²): 1 - alpha_s²/alpha_t² = sigma_s² (1 - rho_t²/rho_s²)
    return sigma * math.sqrt(-math.expm1(-2.0 * float(schedule.h(s, t))))


SOLVERS = (
    Info(
        "ddpm",
        DDPM,
        measured_order=1,
        nfe_per_step=1,
        summary="ancestral sampling",
        source="Ho et al., arXiv:2006.11239",
        stochastic=True,
        quirks='variance="fixed_large" of the published code leaves noise on the result of a '
        "subsampled sequence",
    ),
)
