# SPDX-License-Identifier: Apache-2.0
"""Gradient estimation: DDIM on an output that is extrapolated from the last two."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ...schedules import Array, Schedule
from ...schedules.base import real
from ..base import Solver, choice
from ..entry import Info
from ..exponential import moments, transfer
from ..rows import Row, Rows


@dataclass(frozen=True)
class GradientEstimation(Solver):
    """Gradient estimation (ge-gamma): the step of DDIM with a weighted output.

        x_{i+1} = (alpha_{i+1}/alpha_i) x_i + w (gamma epsilon_i + (1 - gamma) epsilon_{i-1})

    with w the weight of DDIM's step, which is Euler's in sigma/alpha. The first step is DDIM's. The
    method is of order 1, and gamma = 1 is DDIM. On a grid that is uniform in sigma/alpha,
    gamma = 3/2 is Adams-Bashforth of order 2. Ends at sigma = 0 are legal.

    Args:
        gamma: Weight of the newest output, a finite number; the paper takes 2.
        lower_order_final: False as published; True makes the last step DDIM's, "zero" only a last
            step to sigma = 0.

    Source: Permenter & Yuan, "Interpreting and Improving Diffusion Models from an Optimization
    Perspective", arXiv:2306.04848, the gradient-estimation sampler; code
    yuanchenyang/smalldiffusion.
    """

    gamma: float = 2.0
    lower_order_final: bool | str = False

    def __post_init__(self) -> None:
        if not math.isfinite(real(self.name, "gamma", self.gamma)):
            raise ValueError(f"{self.name}: gamma is finite; got {self.gamma!r}.")
        choice(self.name, "lower_order_final", self.lower_order_final, (False, True, "zero"))

    @property
    def name(self) -> str:
        return "gradient-estimation"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "epsilon"

    def write(self, rows: Rows, times: Array) -> None:
        schedule, steps = rows.schedule, len(times) - 1
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            lowered = self.lower_order_final is True and i + 1 == steps
            if self.lower_order_final == "zero":
                lowered = float(schedule.sigma(t)) == 0.0
            gamma = 1.0 if i == 0 or lowered else float(self.gamma)
            k = rows.current
            w = float(moments(schedule, "epsilon", s, t, 1)[0])
            outputs = {k: w * gamma}
            if gamma != 1.0:
                outputs[k - 1] = w * (1.0 - gamma)
            rows.add(s, x=Row(x=transfer(schedule, "epsilon", s, t), outputs=outputs))


SOLVERS = (
    Info(
        "gradient-estimation",
        GradientEstimation,
        measured_order=1,
        nfe_per_step=1,
        summary="ddim on an extrapolated output (ge-gamma)",
        source="Permenter & Yuan, arXiv:2306.04848",
        aliases={"gradient_estimation": {"lower_order_final": "zero"}},
        quirks="ComfyUI takes x' = x0 for the step to sigma = 0, where the paper's code "
        "extrapolates as in any other step.",
    ),
)
