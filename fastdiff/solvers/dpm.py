# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver (on epsilon) and DPM-Solver++ (on x0), multistep and singlestep."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import grids
from ..plans import Plan
from ..schedules import Array, Schedule
from .base import Rows, X0Limits, choice
from .exponential import adams, moments, transfer

_FORMS = ("epsilon", "x0")
_METHODS = ("singlestep", "singlestep_fixed", "diffusers")

# Above which sum |b| / |sum b|, by form and order, a step among the last is better lowered:
# measured on two problems, four grids, 4 to 40 steps (docs/choosing.md). An even grid has 2 at
# order 2 and 3 to 4 at order 3; uniform t ends with 5 and 50.
SHORT_STEP = 0.25  # in lambda: a shorter step extrapolates safely
AMPLIFICATION = {
    "epsilon": {1: math.inf, 2: 3.75, 3: 5.0},
    "x0": {1: math.inf, 2: 0.0, 3: 4.4},
}


def _prefix(form: str) -> str:
    return "dpm" if form == "epsilon" else "dpmpp"


def singlestep(
    rows: Rows,
    order: int,
    s: float,
    t: float,
    solver_type: str,
    inner: tuple[float, ...] = (),
    inner_type: str = "taylor",
) -> int:
    """Writes one singlestep of order 1, 2 or 3 from s to t; returns the evaluation's number at s.

    Args:
        rows: Where to; its variable is the form.
        order: 1 (DDIM), 2 or 3. Steps from alpha = 0 or to sigma = 0 are of order 1.
        s, t: The step.
        solver_type: "dpmsolver" or "taylor".
        inner: Times of the inner nodes; empty: 1/2, or 1/3 and 2/3 of the step in lambda.
        inner_type: Rule of the second inner node at order 3.
    """
    schedule, form = rows.schedule, rows.variable
    lam_s, lam_t = float(schedule.lambda_t(s)), float(schedule.lambda_t(t))
    h = lam_t - lam_s
    first = rows.current
    if math.isinf(h):
        order = 1
    if order == 1:
        rows.add(s, x=_first_order(schedule, form, s, t, first))
        return first
    if not inner:
        fractions = (0.5,) if order == 2 else (1 / 3, 2 / 3)
        inner = tuple(float(schedule.t_of_lambda(lam_s + r * h)) for r in fractions)
    rows.add(s, e=_first_order(schedule, form, s, inner[0], first))
    if order == 2:
        row = _second_order(schedule, form, s, t, inner[0], first, first + 1, solver_type)
        rows.add(inner[0], x=row)
        return first
    row = _second_order(schedule, form, s, inner[1], inner[0], first, first + 1, inner_type)
    rows.add(inner[0], e=row)
    if solver_type == "dpmsolver":
        row = _second_order(schedule, form, s, t, inner[1], first, first + 2, "taylor")
        rows.add(inner[1], x=row)
    else:
        a = transfer(schedule, form, s, t)
        b = adams(schedule, form, s, t, (s, *inner))
        rows.add(inner[1], x=(a, dict(zip(range(first, first + 3), b.tolist(), strict=True))))
    return first


def _first_order(
    schedule: Schedule, form: str, s: float, t: float, k: int
) -> tuple[float, dict[int, float]]:
    return transfer(schedule, form, s, t), {k: moments(schedule, form, s, t, 1)[0]}


def _second_order(
    schedule: Schedule,
    form: str,
    s: float,
    t: float,
    node: float,
    k_s: int,
    k_node: int,
    solver_type: str,
) -> tuple[float, dict[int, float]]:
    """From s to t with the outputs k_s at s and k_node at `node`."""
    w = moments(schedule, form, s, t, 2)
    lam = schedule.lambda_t(np.array([s, node, t]))
    ahead = 1.0 / (lam[1] - lam[0])
    g = 0.5 * w[0] * (lam[2] - lam[0]) * ahead if solver_type == "dpmsolver" else w[1] * ahead
    return transfer(schedule, form, s, t), {k_s: w[0] - g, k_node: g}


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
        lower_order_final: True lowers the last steps to order .. 2, 1; False never does (but to
            sigma = 0). "auto", the default, lowers those of them whose weights amplify errors too
            much, sum |b| / |sum b| above `AMPLIFICATION`: extrapolating over a last step that is
            long in lambda (a third of the whole on a grid uniform in t) gives errors of order one,
            while on an even or fine grid lowering costs accuracy. With published=True "auto" is the
            authors' rule: all of them if steps < 10.
        warmup: "lower" (orders 1, 2, ..; no extra evaluations) or "runge-kutta" (the first
            order - 1 steps by the singlestep method of the same order).
        published: See above.
        clip, threshold: Of x0, as in `X0Limits`; form "x0" only.

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
        choice(self.name, "form", self.form, _FORMS)
        choice(self.name, "solver_type", self.solver_type, ("dpmsolver", "taylor"))
        choice(self.name, "lower_order_final", self.lower_order_final, ("auto", True, False))
        choice(self.name, "warmup", self.warmup, ("lower", "runge-kutta"))
        choice(self.name, "published", self.published, (False, True))
        self._check_limits(self.form)

    @property
    def name(self) -> str:
        return f"{_prefix(self.form)}-{self.order}" + ("m" if self.order > 1 else "")

    @property
    def history(self) -> int:
        return self.order

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def write(self, rows: Rows, times: Array) -> None:
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
            if steps - i < k and self._lowers(steps, lam[i + 1] - lam[i], b):
                k = steps - i
                b = self._weights(schedule, times[i::-1][:k], t)
            a = transfer(schedule, self.form, s, t)
            newest = evaluations[::-1][:k]
            rows.add(s, x=(a, dict(zip(newest, b.tolist(), strict=True))))

    def _lowers(self, steps: int, h: float, b: Array) -> bool:
        """Whether a step of length h among the last is lowered, given its weights at full order."""
        if self.lower_order_final != "auto":
            return bool(self.lower_order_final)
        if self.published:
            return steps < 10
        amplification = float(np.abs(b).sum() / abs(b.sum()))
        return h > SHORT_STEP and amplification > AMPLIFICATION[self.form][len(b)]

    def _weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        """Weights of the outputs at `nodes`, newest first."""
        s = float(nodes[0])
        if len(nodes) == 2 and self.solver_type == "dpmsolver":
            lam = schedule.lambda_t(np.append(nodes, t))
            w = moments(schedule, self.form, s, t, 1)[0]
            g = 0.5 * w * (lam[2] - lam[0]) / (lam[0] - lam[1])
            return np.array([w + g, -g])
        b = adams(schedule, self.form, s, t, nodes.tolist())
        if len(nodes) == 3 and self.published:
            u = schedule.lambda_t(nodes) - schedule.lambda_t(s)
            second_difference = np.array([1.0 / np.prod(u[j] - np.delete(u, j)) for j in range(3)])
            b = b - 0.5 * moments(schedule, self.form, s, t, 3)[2] * second_difference
        return b


@dataclass(frozen=True)
class LogRhoDEIS(DPMSolverMultistep):
    """DEIS with a polynomial in log rho = -lambda: DPM-Solver multistep with "taylor" weights.

    Order `order` with the runge-kutta warm-up, at most 2 without. What diffusers calls DEIS.

    Args:
        order: Outputs combined, 1 to 3.
        lower_order_final, warmup: As in `DPMSolverMultistep`.

    Source: Zhang & Chen, arXiv:2204.13902, with the variable of Lu et al., arXiv:2206.00927;
    diffusers 0.42.1 DEISMultistepScheduler.
    """

    form: str = "epsilon"
    solver_type: str = "taylor"

    @property
    def name(self) -> str:
        return f"deis-logrho-{self.order}"


@dataclass(frozen=True)
class DPMSolverSinglestep(X0Limits):
    """DPM-Solver and DPM-Solver++, singlestep (2S, 3S): inner evaluations instead of history.

    Order `order` on any grid, `order` evaluations a step. Inner nodes stand at 1/2, or at 1/3 and
    2/3, of the step in lambda. A step from alpha = 0 or to sigma = 0 is of order 1. k-diffusion's
    dpm_2 is dpm-2, its dpmpp_2s without noise dpmpp-2s, both on an EDM schedule.

    Args:
        order: 1 to 3.
        form: "epsilon" (DPM-Solver) or "x0" (DPM-Solver++).
        solver_type: "dpmsolver" or "taylor". At order 3 "taylor" integrates the parabola through
            the three outputs exactly; "dpmsolver" uses two of them.
        published: True takes the authors' bookkeeping: `steps` is a budget of network evaluations,
            spent on the orders 3, .., 3, (2, 1 | 1 | 2) or 2, .., 2, (1); the outer times are
            uniform in lambda for the grids that are, and else every order-th time of a grid of
            `steps` intervals, whose times between are the inner nodes. An explicit grid gives
            either steps + 1 times or the outer ones.
        method: With published=True: "singlestep" (the above), "singlestep_fixed" (steps // order
            steps, all of full order), or "diffusers": diffusers 0.42.1's reading, in which the
            outer times are always taken from a grid of `steps` intervals, an even budget ends with
            two first-order steps at order 2, and the second inner node at order 3 follows
            solver_type ("midpoint" and "heun" there are "dpmsolver" and "taylor" here).
        clip, threshold: Of x0, as in `X0Limits`; form "x0" only.

    Source: Lu et al., arXiv:2206.00927, Algorithms 1, 2 and appendix D; arXiv:2211.01095,
    Algorithm 1; code LuChengTHU/dpm-solver 52bc3fb.
    """

    order: int = 2
    form: str = "x0"
    solver_type: str = "dpmsolver"
    published: bool = False
    method: str = "singlestep"

    def __post_init__(self) -> None:
        choice(self.name, "order", self.order, (1, 2, 3))
        choice(self.name, "form", self.form, _FORMS)
        choice(self.name, "solver_type", self.solver_type, ("dpmsolver", "taylor"))
        choice(self.name, "published", self.published, (False, True))
        choice(self.name, "method", self.method, _METHODS)
        if self.method != "singlestep" and not self.published:
            raise ValueError(
                f"{self.name}: method={self.method!r} spends a budget of evaluations: it needs "
                "published=True. Without it every step is of full order already."
            )
        self._check_limits(self.form)

    @property
    def name(self) -> str:
        suffix = "s" if self.form == "x0" and self.order > 1 else ""
        return f"{_prefix(self.form)}-{self.order}{suffix}"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def write(self, rows: Rows, times: Array) -> None:
        for s, t in itertools.pairwise(times):
            singlestep(rows, self.order, s, t, self.solver_type)

    def plan(
        self,
        schedule: Schedule,
        steps: int,
        *,
        grid: str | ArrayLike = "auto",
        t_max: float | None = None,
        t_min: float | None = None,
        prediction: str = "epsilon",
    ) -> Plan:
        """Compiles the plan; see `fastdiff.plan`, and `published` for what `steps` means."""
        ends = {"t_max": t_max, "t_min": t_min}
        if not self.published:
            return super().plan(schedule, steps, grid=grid, prediction=prediction, **ends)
        schedule = self._schedule(schedule)
        orders = self._orders(steps)
        named = isinstance(grid, str)
        name: Any = schedule.default_grid if named and grid == "auto" else grid
        if not named:
            name = grids.as_times(grid)
        outer = self.method != "diffusers" and (
            name in ("logsnr", "exponential") if named else len(name) == len(orders) + 1
        )
        fine = grids.build(schedule, len(orders) if outer else sum(orders), grid, **ends)
        starts = np.arange(len(orders) + 1) if outer else np.cumsum([0, *orders])
        inner_type = self.solver_type if self.method == "diffusers" else "taylor"

        def write(rows: Rows) -> None:
            for k, order in enumerate(orders):
                i, j = starts[k], starts[k + 1]
                inner = tuple(fine[i + 1 : j].tolist())
                singlestep(rows, order, fine[i], fine[j], self.solver_type, inner, inner_type)

        return self._compile(schedule, prediction, fine[starts], write)

    def _orders(self, budget: int) -> list[int]:
        """The authors' orders of the outer steps for a budget of evaluations."""
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
            raise ValueError(f"{self.name}: steps is a budget of at least 1; got {budget!r}.")
        full, rest = divmod(int(budget), self.order)
        if self.method == "singlestep_fixed":
            if full == 0:
                raise ValueError(
                    f"{self.name}: a budget of at least {self.order} evaluations is needed for one "
                    f"step; got steps = {budget}."
                )
            return [self.order] * full
        if self.order == 3 and rest == 0:
            return [3] * (full - 1) + [2, 1]
        if self.order == 2 and rest == 0 and self.method == "diffusers":
            return [2] * (full - 1) + [1, 1]
        return [self.order] * full + [rest] * (rest > 0)
