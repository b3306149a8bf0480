# SPDX-License-Identifier: Apache-2.0
"""Embedded pairs: two orders of the same evaluations, whose difference is an error of the step.

`fastdiff.adaptive` runs a pair with steps of its own choice. As a `Solver` a pair goes through
times that are given: that replays the steps that were accepted, in the same arithmetic.

A Runge-Kutta pair has a form, the variable in which the flow is integrated:

    "v"         d(x/s)/d theta = v/s      s = hypot(alpha, sigma), theta = atan(sigma/alpha)
    "epsilon"   d(x/alpha)/d rho = epsilon
    "velocity"  dx/dt = velocity

and the controller's steps are steps in theta, in lambda and in t. The angle has both ends of every
schedule within a quarter turn, and the flow bends little in it: at equal error it takes from a half
to two thirds of the evaluations of the others on VPLinear and EDM, and those of "velocity" on
FlowMatching.
"""

from __future__ import annotations

import abc
import itertools
import math
from dataclasses import dataclass

from ..schedules import Array, Schedule
from ..schedules.base import scale_of_unit_data
from .base import Solver, choice
from .entry import Info
from .ode.tableaus import ORDERS, TABLEAUS, Tableau
from .rows import Row, Rows

# Weights of the difference between both orders. The last evaluation is that of the step's end,
# which is the next step's first.
_DIFFERENCES = {
    "bosh3": (-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    "dopri5": (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
}


def _pair(name: str) -> Tableau:
    """(c, rows of A below the diagonal, weights of the difference) with the step's end as a stage.

    The last row of A is the step of the higher order.
    """
    c, a, b = TABLEAUS[name]
    return (*c, 1.0), (*a, b), _DIFFERENCES[name]


PAIRS = {name: _pair(name) for name in _DIFFERENCES}
_FORMS = ("v", "epsilon", "velocity")


@dataclass(frozen=True)
class Embedded(Solver):
    """An embedded pair: what `fastdiff.adaptive` needs to know of it beside its rows."""

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """Order of the step that is kept; the difference falls with this power of its length."""

    @property
    @abc.abstractmethod
    def evaluations(self) -> int:
        """Evaluations of an attempt that makes its first one."""

    @property
    @abc.abstractmethod
    def hands_on(self) -> bool:
        """Whether the last evaluation of a step is the first of the next one."""

    @abc.abstractmethod
    def progress(self, schedule: Schedule, t: float) -> float:
        """The variable, growing along a run, in which a controller's steps are measured."""

    @abc.abstractmethod
    def time_at(self, schedule: Schedule, progress: float) -> float:
        """The inverse of `progress`."""

    @abc.abstractmethod
    def step(self, rows: Rows, s: float, t: float, known: int | None, end: str) -> None:
        """Writes one step from s to t.

        Args:
            rows: What is written to.
            s, t: The step.
            known: Number of the evaluation at s; None: the step makes it.
            end: "error": the last stage leaves x_t in x and the difference of both orders in e.
                "next": x_t in x, the evaluation at t made where the pair hands it on. "last": x_t
                in x, and no evaluation but those that it needs.
        """

    def jumps(self, rows: Rows, t: float) -> bool:
        """Whether a run ends with a jump to t, where sigma is 0: the step before ends at `t_floor`.

        Only the velocity of a straight flow means something there, and is asked for.
        """
        if float(rows.schedule.sigma(t)) != 0.0:
            return False
        told = rows.schedule.straight == "velocity" and rows.prediction in ("velocity", "v")
        return not (told and self.hands_on)

    def jump(self, rows: Rows, s: float, t: float, known: int | None) -> None:
        """Writes the last step to sigma = 0: x_t = alpha_t x0."""
        k = rows.current if known is None else known
        p, q = rows.schedule.conversion(rows.variable, "x0", s)
        alpha = float(rows.schedule.alpha(t))
        rows.add(s, x=Row(x=alpha * p, outputs={k: alpha * q}), evaluate=known is None)

    def write(self, rows: Rows, times: Array) -> None:
        known = None
        jumps = self.jumps(rows, float(times[-1]))
        steps = [(float(s), float(t)) for s, t in itertools.pairwise(times)]
        for i, (s, t) in enumerate(steps):
            last = i + 1 == len(steps)
            if last and jumps:
                self.jump(rows, s, t, known)
                return
            self.step(rows, s, t, known, "last" if last else "next")
            known = rows.current - 1 if self.hands_on else None


@dataclass(frozen=True)
class EmbeddedRK(Embedded):
    """Bogacki and Shampine's pair of orders 2 and 3, or Dormand and Prince's of orders 4 and 5.

    The step of the higher order is kept. The last evaluation is the next step's first: a step takes
    3 ("bosh3") or 6 ("dopri5") evaluations, and a run one more.

    Args:
        tableau: "bosh3" or "dopri5".
        form: "v" (in the angle), "epsilon" (in rho) or "velocity" (in t); see the module.

    Source: Bogacki & Shampine, "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2 (1989);
    Dormand & Prince, "A family of embedded Runge-Kutta formulae", J. Comp. Appl. Math. 6 (1980).
    The angle: Salimans & Ho, "Progressive Distillation", arXiv:2202.00512, appendix D.
    """

    tableau: str = "bosh3"
    form: str = "v"

    def __post_init__(self) -> None:
        choice("adaptive", "tableau", self.tableau, tuple(PAIRS))
        choice(self.name, "form", self.form, _FORMS)

    @property
    def name(self) -> str:
        return self.tableau

    @property
    def order(self) -> int:
        return ORDERS[self.tableau]

    @property
    def evaluations(self) -> int:
        return len(PAIRS[self.tableau][0])

    @property
    def hands_on(self) -> bool:
        return True

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def progress(self, schedule: Schedule, t: float) -> float:
        if self.form == "epsilon":
            return float(schedule.lambda_t(t))
        return -t if self.form == "velocity" else _angles(schedule, t)[1]

    def time_at(self, schedule: Schedule, progress: float) -> float:
        if self.form == "velocity":
            return -progress
        if self.form == "v":
            progress = math.log(math.tan(progress))
        return float(schedule.t_of_lambda(progress))

    def step(self, rows: Rows, s: float, t: float, known: int | None, end: str) -> None:
        c, a, difference = PAIRS[self.tableau]
        schedule, first = rows.schedule, rows.current if known is None else known
        length = self._length(schedule, s, t)
        times = [self._node(schedule, s, t, node) for node in c]
        scales = [self._scale(schedule, time) for time in times]
        gains = [length / (scale if self.form == "v" else 1.0) for scale in scales]

        def row(weights: tuple[float, ...], scale: float, x: float) -> Row:
            pairs = enumerate(zip(weights, gains, strict=False))
            return Row(x=x, outputs={first + j: scale * g * w for j, (w, g) in pairs if w})

        for i, time in enumerate(times[:-1]):
            point = row(a[i + 1], scales[i + 1], scales[i + 1] / scales[0])
            evaluate = i > 0 or known is None
            if end == "last" and i + 2 == len(c):
                rows.add(time, x=point, evaluate=evaluate)
                return
            rows.add(time, e=point, evaluate=evaluate)
        error = row(difference, scales[-1], 0.0) if end == "error" else None
        rows.add(t, x=Row(x=0.0, e=1.0), e=error)

    def _scale(self, schedule: Schedule, t: float) -> float:
        """What x is divided by."""
        if self.form == "epsilon":
            return float(schedule.alpha(t))
        return 1.0 if self.form == "velocity" else scale_of_unit_data(schedule, t)

    def _length(self, schedule: Schedule, s: float, t: float) -> float:
        """The step in theta, rho or t, without the cancellation of a difference."""
        if self.form == "velocity":
            return t - s
        shrunk = math.expm1(-float(schedule.h(s, t)))
        if self.form == "epsilon":
            return float(schedule.rho(s)) * shrunk
        alpha_s, sigma_s = float(schedule.alpha(s)), float(schedule.sigma(s))
        alpha_t, sigma_t = float(schedule.alpha(t)), float(schedule.sigma(t))
        # the angle between (alpha_s, sigma_s) and (alpha_t, sigma_t), by their cross product
        return math.atan2(alpha_t * sigma_s * shrunk, alpha_t * alpha_s + sigma_t * sigma_s)

    def _node(self, schedule: Schedule, s: float, t: float, c: float) -> float:
        """The time at the fraction c of the step."""
        if c in (0.0, 1.0):
            return t if c else s
        if self.form == "velocity":
            return s + c * (t - s)
        if self.form == "epsilon":
            rho = (1 - c) * float(schedule.rho(s)) + c * float(schedule.rho(t))
            return float(schedule.t_of_lambda(-math.log(rho)))
        pairs = zip(_angles(schedule, s), _angles(schedule, t), strict=True)
        theta, rest = ((1 - c) * start + c * stop for start, stop in pairs)
        return float(schedule.t_of_lambda(math.log(math.sin(rest)) - math.log(math.sin(theta))))


def _angles(schedule: Schedule, t: float) -> tuple[float, float]:
    """theta and pi/2 - theta, each to its own rounding."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return math.atan2(sigma, alpha), math.atan2(alpha, sigma)


ADAPTIVE = tuple(
    Info(
        name,
        EmbeddedRK,
        measured_order=ORDERS[name],
        nfe_per_step=len(PAIRS[name][0]) - 1,
        summary=f"{what} in the angle, rho or t",
        source=source,
        fixed={"tableau": name},
        nfe_extra=1,
        quirks=quirks,
    )
    for name, what, source, quirks in (
        ("bosh3", "Bogacki-Shampine 3(2)", "Bogacki & Shampine (1989)", ""),
        (
            "dopri5",
            "Dormand-Prince 5(4)",
            "Dormand & Prince (1980)",
            "torchdiffeq steps past the end and interpolates back: it asks the network for "
            "times outside of the schedule.",
        ),
    )
)
