# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver (on epsilon) and DPM-Solver++ (on x0), multistep, and DEIS in log rho."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ...schedules import Array, Schedule
from ..base import Solver, X0Limits, choice, enough_steps
from ..entry import Info
from ..exponential import adams, lambda_gaps, moments, transfer
from ..rows import Row, Rows
from .dpm_singlestep import DPM, DPMPP, FORMS, family, singlestep
from .multistep import fixed_options

# A step among the last is better lowered where sum |b| / |sum b| is above these, by form and
# order: measured on two problems, four grids, 4 to 40 steps (docs/choosing.md). An even grid has 2
# at order 2 and 3 to 4 at order 3; uniform t ends with 5 and 50.
SHORT_STEP = 0.25  # in lambda: a shorter step extrapolates safely
AMPLIFICATION = {
    "epsilon": {1: math.inf, 2: 3.75, 3: 5.0},
    "x0": {1: math.inf, 2: 0.0, 3: 4.4},
}


def lowers(form: str, h: float, b: Array) -> bool:
    """Whether a step of length h among the last is better lowered than taken with weights b."""
    limits = AMPLIFICATION[form]
    most = limits[min(len(b), max(limits))]
    # rounding may leave nothing of a sum of large weights
    return h > SHORT_STEP and most < math.inf and bool(np.abs(b).sum() > most * abs(b.sum()))


@dataclass(frozen=True)
class DPMSolverMultistep(X0Limits):
    """DPM-Solver and DPM-Solver++, multistep (2M, 3M), and DEIS in log rho.

        x_{i+1} = a x_i + sum_j b_j h_{i-j},   h = epsilon or x0

    Order 2: "dpmsolver" takes the output extrapolated half a step ahead,
    b = w_1 (1 + 1/(2r), -1/(2r)) with r = h_{i-1}/h_i; "taylor" integrates the line through two
    outputs exactly. Order 3 integrates the parabola in lambda exactly; it is of order 3 with the
    runge-kutta warm-up, asymptotically at most 2 without. Steps from alpha = 0 or to sigma = 0
    are of order 1.

    The third-order rule as published weighs the second divided difference by the coefficient of
    the second derivative, twice the difference: half of the third-order term is missing and the
    order is 2 (observed 2.0, ours 3). `published=True` reproduces it.

    Args:
        order: Outputs combined, 1 to 3.
        form: "epsilon" (DPM-Solver) or "x0" (DPM-Solver++).
        solver_type: "dpmsolver" or "taylor": the rule at order 2, also on the way to order 3.
        lower_order_final: True lowers the last steps to order .. 2, 1. False lowers none, except a
            step to sigma = 0. "auto", the default, lowers a last step whose weights amplify errors
            too much, sum |b| / |sum b| above `AMPLIFICATION`: extrapolating over a last step that
            is long in lambda (a third of the range on a grid uniform in t) gives errors of order
            one, while on an even or fine grid lowering costs accuracy. With published=True "auto"
            is the authors' rule, which lowers all of them if steps < 10.
        warmup: "lower" (orders 1, 2, ..; no extra evaluations) or "runge-kutta" (the first
            order - 1 steps by the singlestep method of the same order).
        published: True takes the published third-order rule (see above).
        clip, threshold: Limits of x0, as in `X0Limits`; form "x0" alone has them.

    Source: Lu et al., "DPM-Solver", arXiv:2206.00927; "DPM-Solver++", arXiv:2211.01095,
    Algorithm 2; code LuChengTHU/dpm-solver 52bc3fb.
    """

    order: int = 2
    form: str = "x0"
    solver_type: str = "dpmsolver"
    lower_order_final: bool | str = "auto"
    warmup: str = "lower"
    published: bool = False

    def __post_init__(self) -> None:
        choice(self.name, "order", self.order, (1, 2, 3))
        choice(self.name, "form", self.form, FORMS)
        choice(self.name, "solver_type", self.solver_type, ("dpmsolver", "taylor"))
        choice(self.name, "lower_order_final", self.lower_order_final, ("auto", True, False))
        choice(self.name, "warmup", self.warmup, ("lower", "runge-kutta"))
        choice(self.name, "published", self.published, (False, True))
        self.check_limits(self.form)

    @property
    def name(self) -> str:
        return f"{family(self.form)}-{self.order}" + ("m" if self.order > 1 else "")

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def write(self, rows: Rows, times: Array) -> None:
        enough_steps(self.name, self.order, times)
        self.limit(rows)
        schedule = rows.schedule
        lam = schedule.lambda_t(times)
        steps = len(times) - 1
        evaluations: list[int] = []
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            if self.warmup == "runge-kutta" and i + 1 < self.order:
                evaluations.append(singlestep(rows, self.order, s, t, self.solver_type))
                continue
            evaluations.append(rows.current)
            usable = int(np.isfinite(lam[: i + 1]).sum())  # outputs to extrapolate from
            k = min(self.order, max(usable, 1)) if np.isfinite(lam[i + 1]) else 1
            b = self._weights(schedule, times[i::-1][:k], t)
            if steps - i < k and self._lowers(steps, float(schedule.h(s, t)), b):
                k = steps - i
                b = self._weights(schedule, times[i::-1][:k], t)
            a = transfer(schedule, self.form, s, t)
            newest = evaluations[::-1][:k]
            rows.add(s, x=Row(x=a, outputs=dict(zip(newest, b.tolist(), strict=True))))

    def _lowers(self, steps: int, h: float, b: Array) -> bool:
        """Whether a step of length h among the last is lowered, given its weights at full order."""
        if self.lower_order_final != "auto":
            return bool(self.lower_order_final)
        return steps < 10 if self.published else lowers(self.form, h, b)

    def _weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        """Weights of the outputs at `nodes`, newest first."""
        s = float(nodes[0])
        if len(nodes) == 2 and self.solver_type == "dpmsolver":
            w = moments(schedule, self.form, s, t, 1)[0]
            g = 0.5 * w * float(schedule.h(s, t) / schedule.h(nodes[1], s))
            return np.array([w + g, -g])
        b = adams(schedule, self.form, s, t, nodes.tolist())
        if len(nodes) == 3 and self.published:
            gaps = lambda_gaps(schedule, nodes.tolist())
            second_difference = np.array([1.0 / np.prod(np.delete(gaps[j], j)) for j in range(3)])
            b = b - 0.5 * moments(schedule, self.form, s, t, 3)[2] * second_difference
        return b


@dataclass(frozen=True)
class LogRhoDEIS(Solver):
    """DEIS with a polynomial in log rho = -lambda: DPM-Solver multistep with "taylor" weights.

    Order `order` with the runge-kutta warm-up, at most 2 without. diffusers calls it DEIS.

    Args:
        order: Outputs combined, 1 to 3.
        lower_order_final, warmup: The options of `DPMSolverMultistep`.

    Source: Zhang & Chen, arXiv:2204.13902, with the variable of Lu et al., arXiv:2206.00927;
    diffusers 0.42.1 DEISMultistepScheduler.
    """

    order: int = 2
    lower_order_final: bool | str = "auto"
    warmup: str = "lower"

    def __post_init__(self) -> None:
        choice(self.name, "order", self.order, (1, 2, 3))
        choice(self.name, "lower_order_final", self.lower_order_final, ("auto", True, False))
        choice(self.name, "warmup", self.warmup, ("lower", "runge-kutta"))

    @property
    def name(self) -> str:
        return f"deis-logrho-{self.order}"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "epsilon"

    def write(self, rows: Rows, times: Array) -> None:
        enough_steps(self.name, self.order, times)
        same = DPMSolverMultistep(
            order=self.order,
            form="epsilon",
            solver_type="taylor",
            lower_order_final=self.lower_order_final,
            warmup=self.warmup,
        )
        same.write(rows, times)


_HALF = (
    "the third-order rule of the authors, diffusers, k-diffusion's dpmpp_3m_sde and diff-sampler "
    "has half of the third-order term: order 2"
)

SOLVERS = (
    *(
        Info(
            f"deis-logrho-{order}",
            LogRhoDEIS,
            measured_order=order,
            nfe_per_step=1,
            summary="multistep, polynomial in log rho (diffusers' DEIS)",
            source="Zhang & Chen, arXiv:2204.13902",
            fixed=fixed_options(order, lower_order_final="auto", warmup="lower"),
            least_steps=order,
            # with its defaults, whose grid ends at sigma = 0
            aliases={"DEISMultistepScheduler": {"lower_order_final": True}} if order == 2 else {},
            same="ddim" if order == 1 else "",
            quirks="diffusers' DEISMultistepScheduler repeats the last of karras, exponential and "
            "beta sigmas, so that its last step does nothing, and loses up to 7e-5 of its weights "
            "to differences in float32",
        )
        for order in (1, 2, 3)
    ),
    *(
        Info(
            f"dpm-{order}m",
            DPMSolverMultistep,
            measured_order=order,
            nfe_per_step=1,
            summary="multistep on epsilon",
            source=DPM,
            fixed={"order": order, "form": "epsilon", "clip": None, "threshold": None},
            least_steps=order,
            quirks=_HALF if order == 3 else "",
        )
        for order in (2, 3)
    ),
    Info(
        "dpmpp-2m",
        DPMSolverMultistep,
        measured_order=2,
        nfe_per_step=1,
        summary="multistep on x0",
        source=DPMPP,
        fixed={"order": 2, "form": "x0"},
        least_steps=2,
        aliases={
            "dpmpp_2m": {"lower_order_final": False},  # k-diffusion and ComfyUI
            "sample_dpmpp_2m": {"lower_order_final": False},
            # with its defaults, whose grid ends at sigma = 0
            "DPMSolverMultistepScheduler": {"lower_order_final": True},
        },
    ),
    Info(
        "dpmpp-3m",
        DPMSolverMultistep,
        measured_order=3,
        nfe_per_step=1,
        summary="multistep on x0",
        source=DPMPP,
        fixed={"order": 3, "form": "x0"},
        least_steps=3,
        quirks=_HALF,
    ),
)
