# SPDX-License-Identifier: Apache-2.0
"""DDIM: one output a step, with or without noise."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ...schedules import Array, Schedule
from ..base import X0Limits, choice, within
from ..entry import Info
from ..exponential import moments, transfer
from ..rows import Row, Rows


@dataclass(frozen=True)
class DDIM(X0Limits):
    """DDIM: the exact flow of a constant epsilon (equally, of a constant x0) over each step.

        x_{i+1} = alpha_{i+1} x0 + sqrt(sigma_{i+1}² - s²) eps + s z
        s = eta sigma_{i+1} sqrt(1 - exp(-2 h))

    Order 1. eta = 0 is deis-1, dpm-1, dpmpp-1 and, on an EDM or flow schedule, Euler. eta = 1 is
    DDPM's posterior. A step that ends at sigma = 0 is x' = x0, without noise.

    Args:
        eta: Share of fresh noise, in [0, 1].
        form: Variable of the rows: "epsilon", "x0", or "auto", which is epsilon unless x0 is
            limited or alpha = 0 at the start. The forms agree to rounding.
        clip, threshold: Limits of x0, as in `X0Limits`; epsilon follows from the limited x0.

    Source: Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502, eqs. 12 and 16.
    """

    eta: float = 0.0
    form: str = "auto"

    def __post_init__(self) -> None:
        within(self.name, "eta", self.eta, 0.0, 1.0)
        choice(self.name, "form", self.form, ("auto", "epsilon", "x0"))
        self.check_limits(self.form)

    @property
    def name(self) -> str:
        return "ddim"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return form_of(self.form, self.limits, schedule, times)

    def write(self, rows: Rows, times: Array) -> None:
        self.limit(rows)
        for s, t in itertools.pairwise(times):
            a, b, c = ddim_row(rows.schedule, rows.variable, s, t, self.eta)
            rows.add(s, x=Row(x=a, outputs={rows.current: b}, noise=c))


def form_of(form: str, limited: bool, schedule: Schedule, times: Array) -> str:
    """The form; "auto" stands for epsilon, unless x0 is limited or alpha = 0 at the start."""
    if form != "auto":
        return form
    return "x0" if limited or float(schedule.alpha(times[0])) == 0.0 else "epsilon"


def ddim_row(
    schedule: Schedule, form: str, s: float, t: float, eta: float
) -> tuple[float, float, float]:
    """Weights of x, of the output at s and of fresh noise in DDIM's step from s to t."""
    if eta == 0.0:
        return transfer(schedule, form, s, t), moments(schedule, form, s, t, 1)[0], 0.0
    h = float(schedule.h(s, t))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    lost, kept = -math.expm1(-2.0 * h), math.exp(-2.0 * h)  # of the noise-to-signal ratio squared
    noise = eta * sigma * math.sqrt(lost)
    # sqrt(sigma² - noise²)/sigma, without cancellation at eta = 1
    direct = math.sqrt(kept + (1.0 - eta**2) * lost)
    if form == "epsilon":
        if h < 1.0:  # both terms are negative; beyond, their difference loses nothing
            b = sigma * (-(eta**2) * lost / (1.0 + direct) - math.expm1(h))
        else:
            b = sigma * direct - alpha * float(schedule.rho(s))
        return transfer(schedule, form, s, t), b, noise
    # 1 - direct exp(-h), by the difference of the squares
    b = alpha * lost * (1.0 + eta**2 * kept) / (1.0 + direct * math.exp(-h))
    return direct * transfer(schedule, form, s, t), b, noise


SOLVERS = (
    Info(
        "ddim",
        DDIM,
        measured_order=1,
        nfe_per_step=1,
        summary="exact flow of a constant output; eta adds noise",
        source="Song et al., arXiv:2010.02502",
        quirks="diffusers' DDIMScheduler clips x0 by default, and keeps the epsilon of the x0 that "
        "was not clipped",
    ),
)
