# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver (on epsilon) and DPM-Solver++ (on x0), singlestep."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import grids
from ..._text import shown
from ...schedules import Array, Schedule
from ..base import X0Limits, choice
from ..entry import Info
from ..exponential import from_moments, moments, transfer
from ..rows import Row, Rows

FORMS = ("epsilon", "x0")
DPM = "Lu et al., arXiv:2206.00927"
DPMPP = "Lu et al., arXiv:2211.01095"
_METHODS = ("singlestep", "singlestep_fixed", "diffusers")


def family(form: str) -> str:
    """The first part of a solver's name."""
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
        rows: What is written to; its variable is the form.
        order: 1 (DDIM), 2 or 3. Steps from alpha = 0 or to sigma = 0 are of order 1.
        s, t: The step.
        solver_type: "dpmsolver" or "taylor".
        inner: Times of the inner nodes; empty: 1/2, or 1/3 and 2/3 of the step in lambda.
        inner_type: Rule of the second inner node at order 3.
    """
    schedule, form = rows.schedule, rows.variable
    h = float(schedule.h(s, t))
    first = rows.current
    end = (t, h)
    if math.isinf(h):
        order = 1
    if order == 1:
        rows.add(s, x=_first_order(schedule, form, s, end, first))
        return first
    if inner:
        nodes = [(time, float(schedule.h(s, time))) for time in inner]
    else:
        fractions = (0.5,) if order == 2 else (1 / 3, 2 / 3)
        lam = float(schedule.lambda_t(s))
        nodes = [(float(schedule.t_of_lambda(lam + r * h)), r * h) for r in fractions]
    rows.add(s, e=_first_order(schedule, form, s, nodes[0], first))
    if order == 2:
        row = _second_order(schedule, form, s, end, nodes[0], (first, first + 1), solver_type)
        rows.add(nodes[0][0], x=row)
        return first
    row = _second_order(schedule, form, s, nodes[1], nodes[0], (first, first + 1), inner_type)
    rows.add(nodes[0][0], e=row)
    if solver_type == "dpmsolver":
        row = _second_order(schedule, form, s, end, nodes[1], (first, first + 2), "taylor")
    else:
        u = np.array([0.0, *(length for _, length in nodes)])
        b = from_moments(moments(schedule, form, s, t, 3), np.subtract.outer(u, u))
        outputs = dict(zip(range(first, first + 3), b.tolist(), strict=True))
        row = Row(x=transfer(schedule, form, s, t), outputs=outputs)
    rows.add(nodes[1][0], x=row)
    return first


# A time in a step, and lambda there minus lambda at the start of the step.
Node = tuple[float, float]


def _first_order(schedule: Schedule, form: str, s: float, end: Node, k: int) -> Row:
    t, h = end
    a, b = transfer(schedule, form, s, t), moments(schedule, form, s, t, 1, h)[0]
    return Row(x=a, outputs={k: b})


def _second_order(
    schedule: Schedule,
    form: str,
    s: float,
    end: Node,
    node: Node,
    evaluations: tuple[int, int],
    solver_type: str,
) -> Row:
    """From s to the end, with the outputs at s and at the node."""
    (t, h), (_, u) = end, node
    w = moments(schedule, form, s, t, 2, h)
    # half a step from the middle is the whole weight, to the last bit
    g = (0.5 * h / u) * w[0] if solver_type == "dpmsolver" else w[1] / u
    outputs = dict(zip(evaluations, (w[0] - g, g), strict=True))
    return Row(x=transfer(schedule, form, s, t), outputs=outputs)


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
        clip, threshold: Limits of x0, as in `X0Limits`; form "x0" alone has them.

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
        choice(self.name, "form", self.form, FORMS)
        choice(self.name, "solver_type", self.solver_type, ("dpmsolver", "taylor"))
        choice(self.name, "published", self.published, (False, True))
        choice(self.name, "method", self.method, _METHODS)
        if self.method != "singlestep" and not self.published:
            raise ValueError(
                f"{self.name}: method={self.method!r} spends a budget of evaluations: it needs "
                "published=True. Without it every step is of full order already."
            )
        self.check_limits(self.form)

    @property
    def name(self) -> str:
        suffix = "s" if self.form == "x0" and self.order > 1 else ""
        return f"{family(self.form)}-{self.order}{suffix}"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def intervals(self, schedule: Schedule, steps: int, grid: str | ArrayLike) -> int:
        if not self.published:
            return steps
        orders = self._orders(steps)
        if isinstance(grid, str):
            name = schedule.default_grid if grid == "auto" else grid
            outer = name in ("logsnr", "exponential")
        else:
            outer = len(grids.as_times(grid)) == len(orders) + 1
        return len(orders) if outer and self.method != "diffusers" else sum(orders)

    def write(self, rows: Rows, times: Array) -> None:
        self.limit(rows)
        if self.published:
            self._write_published(rows, times)
            return
        for s, t in itertools.pairwise(times):
            singlestep(rows, self.order, s, t, self.solver_type)

    def _write_published(self, rows: Rows, fine: Array) -> None:
        """Writes the authors' steps over the outer times, or over all those of their grid."""
        orders = self._orders(rows.steps)
        outer = len(fine) == len(orders) + 1
        starts = np.arange(len(orders) + 1) if outer else np.cumsum([0, *orders])
        inner_type = self.solver_type if self.method == "diffusers" else "taylor"
        for k, order in enumerate(orders):
            i, j = starts[k], starts[k + 1]
            inner = tuple(fine[i + 1 : j].tolist())
            singlestep(rows, order, fine[i], fine[j], self.solver_type, inner, inner_type)
        rows.times = fine[starts]

    def _orders(self, budget: int) -> list[int]:
        """The authors' orders of the outer steps for a budget of evaluations."""
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
            raise ValueError(f"{self.name}: steps is a budget of at least 1; got {shown(budget)}.")
        if budget > grids.MAX_STEPS:
            raise ValueError(
                f"{self.name}: steps is at most {grids.MAX_STEPS}; got {shown(budget)}."
            )
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


# A step of order 1 has no inner node that these could move.
_DEAD_AT_ORDER_1 = {"solver_type": "dpmsolver", "published": False, "method": "singlestep"}

_BUDGET = "steps is a budget of evaluations in the authors' code, which ends with lower orders"
_BUDGETS = {
    2: _BUDGET,
    3: _BUDGET + "; in diffusers the second inner node follows solver_type as well",
}
_ALIASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dpm_2": {}, "sample_dpm_2": {}, "KDPM2DiscreteScheduler": {}},
    # on the grid "logsnr"
    3: {"dpm_fast": {"published": True}, "sample_dpm_fast": {"published": True}},
}

SOLVERS = (
    *(
        Info(
            f"dpm-{order}",
            DPMSolverSinglestep,
            measured_order=order,
            nfe_per_step=order,
            summary="singlestep on epsilon",
            source=DPM,
            fixed={"order": order, "form": "epsilon", "clip": None, "threshold": None}
            | (_DEAD_AT_ORDER_1 if order == 1 else {}),
            aliases=_ALIASES.get(order, {}),
            same="ddim" if order == 1 else "",
            quirks=_BUDGETS.get(order, ""),
        )
        for order in (1, 2, 3)
    ),
    Info(
        "dpmpp-1",
        DPMSolverSinglestep,
        measured_order=1,
        nfe_per_step=1,
        summary="ddim on x0",
        source=DPMPP,
        fixed={"order": 1, "form": "x0"} | _DEAD_AT_ORDER_1,
        same="ddim",
    ),
    *(
        Info(
            f"dpmpp-{order}s",
            DPMSolverSinglestep,
            measured_order=order,
            nfe_per_step=order,
            summary="singlestep on x0",
            source=DPMPP,
            fixed={"order": order, "form": "x0"},
            # with its defaults, which end at sigma = 0
            aliases={"DPMSolverSinglestepScheduler": {"published": True, "method": "diffusers"}}
            if order == 2
            else {},
            quirks=_BUDGETS[order],
        )
        for order in (2, 3)
    ),
)
