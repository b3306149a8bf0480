# SPDX-License-Identifier: Apache-2.0
"""Solvers of dx/dt = velocity in its own variable: Runge-Kutta, Adams-Bashforth, Adams-Moulton.

They know nothing of alpha and sigma, so they start at t = 1 of FlowMatching, where alpha = 0, and
end at t = 0. They run on every schedule whose velocity exists. A step that ends where the velocity
is infinite (sigma = 0 of a VP schedule) is x' = x0.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ...schedules import Array, Schedule
from ..base import Solver, choice, enough_steps
from ..entry import Info
from ..exponential import lagrange
from ..rows import Row, Rows
from .multistep import fixed_options
from .runge_kutta import bounded, jump, runge_kutta_step, tells, write_runge_kutta
from .tableaus import ORDERS, TABLEAUS

CHOSEN = ("midpoint", "heun3", "bosh3", "rk4", "rk4-38", "dopri5")
_STARTERS = {2: "midpoint", 3: "heun3", 4: "rk4-38", 5: "dopri5"}


@dataclass(frozen=True)
class InVelocity(Solver):
    """A solver whose rows combine velocities."""

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "velocity"


@dataclass(frozen=True)
class VelocityRK(InVelocity):
    """Explicit Runge-Kutta of fixed steps for dx/dt = velocity.

        k_j = velocity(x + (t' - t) sum_l a_jl k_l, t + c_j (t' - t))
        x'  = x + (t' - t) sum_j b_j k_j

    The order is that of the tableau (midpoint 2; heun3 and bosh3 3; rk4 and rk4-38 4; dopri5 5). A
    step takes as many evaluations as the tableau has stages. "rk4" is the classical method and
    "rk4-38" the 3/8 rule, which torchdiffeq calls rk4. "bosh3" and "dopri5" are the methods of
    Bogacki & Shampine and of Dormand & Prince without their estimate of the error: 3 and 6
    evaluations a step, because the last of the published 4 and 7 is the first of the next step.

    A stage at sigma = 0 is evaluated on FlowMatching, where the velocity follows from the
    prediction. Elsewhere the last step to sigma = 0 is that of a tableau without such a stage:
    "midpoint", or "heun3" above order 2.

    Args:
        tableau: "midpoint", "heun3", "bosh3", "rk4", "rk4-38" or "dopri5".

    Source: Kutta, "Beitrag zur näherungsweisen Integration" (1901); Bogacki & Shampine, "A 3(2)
    pair of Runge-Kutta formulas" (1989); Dormand & Prince, "A family of embedded Runge-Kutta
    formulae" (1980); for flows Lipman et al., arXiv:2210.02747.
    """

    tableau: str = "midpoint"

    def __post_init__(self) -> None:
        choice(self.name, "tableau", self.tableau, CHOSEN)

    @property
    def name(self) -> str:
        return self.tableau

    def write(self, rows: Rows, times: Array) -> None:
        write_runge_kutta(rows, self.tableau, times)


def integrals(nodes: ArrayLike, s: float, t: float) -> Array:
    """Weights of velocities at `nodes`: integrals from s to t of the Lagrange polynomials in t.

    They are accurate to rounding for steps of any length, because all times are taken from s.
    """
    offsets, length = np.asarray(nodes, dtype=np.float64) - s, t - s
    x, w = np.polynomial.legendre.leggauss((len(offsets) + 1) // 2)  # exact for these degrees
    return lagrange(offsets, 0.5 * length * (1.0 + x)) @ (0.5 * length * w)


@dataclass(frozen=True)
class AdamsMethod(InVelocity):
    """Multistep in velocity: `order`, the warm-up and the last steps."""

    lower_order_final: bool = field(default=False, kw_only=True)

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """Velocities that a full predictor combines."""

    @property
    @abc.abstractmethod
    def warmup(self) -> str:
        """How a run begins."""

    def check_adams(self, orders: Sequence[int], warmups: tuple[str, ...]) -> None:
        """Raises where an option has a value it cannot have, such as none of these orders."""
        choice(self.name, "order", self.order, tuple(orders))
        choice(self.name, "lower_order_final", self.lower_order_final, (False, True))
        choice(self.name, "warmup", self.warmup, warmups)

    def reach(self, i: int, steps: int) -> int:
        """Velocities that the predictor of step i of `steps` combines."""
        k = min(self.order, i + 1)
        return min(k, steps - i) if self.lower_order_final else k

    def starter(self, i: int) -> str | None:
        """The tableau of step i, where it is one of the warm-up's."""
        if self.warmup == "runge-kutta":
            return _STARTERS[self.order] if i + 1 < self.order else None
        first = self.warmup == "first" or (self.warmup == "auto" and self.order > 3)
        return "heun3" if first and i == 0 else None


@dataclass(frozen=True)
class AdamsBashforth(AdamsMethod):
    """Adams-Bashforth for dx/dt = velocity, on any grid: one evaluation a step.

        x_{i+1} = x_i + sum_j w_j velocity_{i-j},   w_j = int_{t_i}^{t_{i+1}} L_j(t) dt

    where L_j are the Lagrange polynomials through the last `order` evaluations. The integrals are
    exact. Order `order` with the runge-kutta warm-up, at most 2 without. On a uniform grid the
    weights are the well-known ones; on an EDM schedule it is deis-rhoab. Order 1 is Euler's step in
    t on every schedule, which on a curved one is not that of "euler".

    Args:
        order: Velocities combined by a full step, 1 to 4.
        lower_order_final: True lowers the last steps to order .. 2, 1.
        warmup: "lower" (steps 1, 2, .. of order 1, 2, ..; no extra evaluations) or "runge-kutta"
            (the first order - 1 steps by a Runge-Kutta method; full order).

    Source: Bashforth & Adams (1883); Hairer, Norsett & Wanner, "Solving Ordinary Differential
    Equations I", section III.5 (variable steps); for flows Lipman et al., arXiv:2210.02747.
    """

    order: int = 3
    warmup: str = field(default="lower", kw_only=True)

    def __post_init__(self) -> None:
        self.check_adams(range(1, 5), ("lower", "runge-kutta"))

    @property
    def name(self) -> str:
        return f"ab-{self.order}"

    def write(self, rows: Rows, times: Array) -> None:
        enough_steps(self.name, self.order, times)
        evaluations: list[int] = []  # at each time so far
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            if starter := self.starter(i):
                evaluations.append(runge_kutta_step(rows, starter, s, t))
                continue
            evaluations.append(rows.current)
            if not bounded(rows.schedule, t):
                jump(rows, s, t, Row())
                continue
            k = self.reach(i, len(times) - 1)
            weights = integrals(times[i::-1][:k], s, t)
            rows.add(s, x=Row(outputs=weighted(evaluations, weights)))


def weighted(evaluations: Sequence[int], weights: Array, scale: float = 1.0) -> dict[int, float]:
    """{evaluation: scale * weight}, newest first."""
    return dict(zip(evaluations[::-1], (scale * weights).tolist(), strict=False))


def summed(*parts: dict[int, float]) -> dict[int, float]:
    """The sum of weights by evaluation."""
    total: dict[int, float] = {}
    for part in parts:
        for k, w in part.items():
            total[k] = total.get(k, 0.0) + w
    return total


@dataclass(frozen=True)
class AdamsMoulton(AdamsMethod):
    """Adams-Bashforth predictor and Adams-Moulton corrector for dx/dt = velocity, on any grid.

        predicted  p_{i+1} = x_i + sum_j w_j velocity_{i-j}                        j = 0 .. order-1
        corrected  x_{i+1} = x_i + c velocity(p_{i+1}) + sum_j c_j velocity_{i-j}

    Both are integrals of Lagrange polynomials, the corrector's through one velocity more.

    In mode "pec" the velocity at the predicted point is the only evaluation of a step: it corrects
    the state and stays in the history, and the correction and the next prediction are one update.
    x holds predicted states, and the last one is not corrected. On a uniform grid the rows after
    the first steps are those of Adams-Bashforth with one velocity more. What differs is the start:
    the Euler step that begins a run is corrected at no cost, which at few evaluations leaves from
    a half to a tenth of the error of ab-2 to ab-4.

    In mode "pece" the network is evaluated again at the corrected state: two evaluations a step, a
    larger region of stability, and every state is corrected, except one at sigma = 0 where the
    network does not tell the velocity. At equal evaluations it seldom wins.

    The order is `order` + 1 with the runge-kutta warm-up, at most 4 with "first", 3 with "lower".

    Args:
        order: Velocities that the predictor combines, 2 to 5.
        mode: "pec" or "pece".
        lower_order_final: True lowers the last steps to order .. 2, 1.
        warmup: "lower" (steps of order 1, 2, ..; no extra evaluations), "first" (the first step by
            heun3, two evaluations more, the next of order 2, 3, ..) or "runge-kutta" (the first
            order - 1 steps by a Runge-Kutta method). "auto" is "lower" up to order 3, then "first".

    Source: Moulton (1926); Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I",
    sections III.1 and III.5; for flows Lipman et al., arXiv:2210.02747.
    """

    order: int = 3
    mode: str = "pec"
    warmup: str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        self.check_adams(range(2, 6), ("auto", "lower", "first", "runge-kutta"))
        choice(self.name, "mode", self.mode, ("pec", "pece"))

    @property
    def name(self) -> str:
        return f"abm-{self.order}"

    def write(self, rows: Rows, times: Array) -> None:
        enough_steps(self.name, self.order, times)
        evaluations: list[int] = []  # at each time so far
        owed: dict[int, float] = {}  # weights of the predicted increment that is to be corrected
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            if starter := self.starter(i):
                evaluations.append(runge_kutta_step(rows, starter, s, t))
                continue
            evaluations.append(rows.current)
            nodes, k = times[i::-1], self.reach(i, len(times) - 1)
            correction: dict[int, float] = {}
            if owed:
                better = integrals(nodes[: len(owed) + 1], times[i - 1], s)
                correction = summed(weighted(evaluations, better), {j: -w for j, w in owed.items()})
            if not bounded(rows.schedule, t):
                jump(rows, s, t, Row(outputs=correction))
                continue
            predicted = weighted(evaluations, integrals(nodes[:k], s, t))
            if self.mode == "pec":
                owed = predicted
                rows.add(s, x=Row(outputs=summed(correction, predicted)))
            elif float(rows.schedule.sigma(t)) == 0.0 and not tells(rows, t):
                rows.add(s, x=Row(outputs=predicted))
            else:
                rows.add(s, e=Row(outputs=predicted))
                corrected = integrals([t, *nodes[:k]], s, t)
                made = [*evaluations, rows.current]
                rows.add(t, x=Row(outputs=weighted(made, corrected)))


_LIPMAN = "Lipman et al., arXiv:2210.02747"
_QUIRKS = {"rk4-38": "torchdiffeq calls it rk4, a name that elsewhere means the classical method"}
_THEIR_ADAMS = (
    "torchdiffeq's explicit_adams combines one velocity less than its max_order says, starts with "
    "two steps of the 3/8 rule whatever the order, and has weights of equal steps alone"
)

SOLVERS = (
    *(
        Info(
            tableau,
            VelocityRK,
            measured_order=ORDERS[tableau],
            nfe_per_step=len(TABLEAUS[tableau][0]),
            summary="Runge-Kutta in velocity",
            source=_LIPMAN,
            fixed={"tableau": tableau},
            quirks=_QUIRKS.get(tableau, ""),
        )
        for tableau in CHOSEN
    ),
    *(
        Info(
            f"ab-{order}",
            AdamsBashforth,
            measured_order=order,
            nfe_per_step=1,
            summary="Adams-Bashforth in velocity",
            source=_LIPMAN,
            fixed=fixed_options(order, lower_order_final=False, warmup="lower"),
            least_steps=order,
            quirks=_THEIR_ADAMS if order > 1 else "",
        )
        for order in (1, 2, 3, 4)
    ),
    *(
        Info(
            f"abm-{order}",
            AdamsMoulton,
            measured_order=order + 1,
            nfe_per_step=1,
            summary="Adams-Bashforth predictor, Adams-Moulton corrector, in velocity",
            source=_LIPMAN,
            fixed={"order": order},
            least_steps=order,
            nfe_extra=2 if order > 3 else 0,
        )
        for order in (2, 3, 4, 5)
    ),
)
