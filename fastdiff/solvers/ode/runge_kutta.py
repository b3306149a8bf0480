# SPDX-License-Identifier: Apache-2.0
"""Explicit Runge-Kutta: rhoRK on (x/alpha, sigma/alpha), and EDM's Euler and Heun."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ...schedules import Array, Schedule
from ..base import Solver, choice
from ..entry import Info
from ..exponential import rho_gap
from ..rows import Row, Rows

Tableau = tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]

# name -> (c, rows of A below the diagonal, b); Butcher's notation.
TABLEAUS: dict[str, Tableau] = {
    "euler": ((0.0,), ((),), (1.0,)),
    "heun": ((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "kutta3": ((0.0, 1 / 2, 1.0), ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)),
    "heun3": ((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "ralston3": ((0.0, 1 / 2, 3 / 4), ((), (1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "vdh3": ((0.0, 8 / 15, 2 / 3), ((), (8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "ssprk3": ((0.0, 1.0, 1 / 2), ((), (1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "rk4": (
        (0.0, 1 / 2, 1 / 2, 1.0),
        ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


def runge_kutta_step(rows: Rows, tableau: str, s: float, t: float) -> int:
    """Writes one step from s to t; returns the number of the evaluation at s.

    With variable "epsilon": v = x/alpha moves by d v = epsilon d rho, stages at
    rho_s + c (rho_t - rho_s). With "x0": v = x/sigma moves by d v = x0 d(1/rho), stages likewise.
    With "velocity": x itself moves by d x = velocity d t.
    A step to sigma = 0 is Euler's, whatever the tableau (a stage at c = 1 would ask the network
    for a noise that is not there).
    """
    schedule = rows.schedule
    straight, of_x0 = rows.variable == "velocity", rows.variable == "x0"
    if float(schedule.sigma(t)) == 0.0:
        tableau = "euler"
    c, a, b = TABLEAUS[tableau]
    if straight:
        start, length = s, t - s
    elif of_x0:
        start = float(1.0 / schedule.rho(s))
        length = start * float(np.expm1(schedule.h(s, t)))
    else:
        start, length = float(schedule.rho(s)), rho_gap(schedule, s, t)

    def time_at(node: float) -> float:
        if node in (0.0, 1.0):
            return t if node else s
        at = start + node * length
        lam = np.log(at) if of_x0 else -np.log(at)
        return at if straight else float(schedule.t_of_lambda(lam))

    times = [time_at(node) for node in c]
    of = schedule.sigma if of_x0 else schedule.alpha
    scale = [1.0 if straight else float(of(time)) for time in (*times, t)]
    first = rows.current
    alpha_s = scale[0]
    for i, time in enumerate(times):
        last = i + 1 == len(c)
        weights = b if last else a[i + 1]
        factor = scale[i + 1]
        outputs = {first + j: factor * length * w for j, w in enumerate(weights) if w}
        row = Row(x=factor / alpha_s, outputs=outputs)
        if last:
            rows.add(time, x=row)
        else:
            rows.add(time, e=row)
    return first


def write_runge_kutta(rows: Rows, tableau: str, times: Array) -> None:
    """Writes a run through `times` with this tableau."""
    for s, t in itertools.pairwise(times):
        runge_kutta_step(rows, tableau, s, t)


@dataclass(frozen=True)
class RhoRK(Solver):
    """rhoRK-DEIS: explicit Runge-Kutta for d(x/alpha)/d(sigma/alpha) = epsilon.

    The order is that of the tableau (euler 1, heun 2, rk4 4, the others 3), and a step takes as
    many evaluations as the tableau has stages. A step to sigma = 0 is Euler's. rhoRK-Heun on an EDM
    schedule is EDM's sampler.

    Args:
        tableau: A name in `TABLEAUS`: "euler", "heun", "kutta3", "heun3", "ralston3", "vdh3",
            "ssprk3", "rk4".

    Source: Zhang & Chen, "DEIS", arXiv:2204.13902, section 3.3.
    """

    tableau: str = "heun"

    def __post_init__(self) -> None:
        choice(self.name, "tableau", self.tableau, tuple(TABLEAUS))

    @property
    def name(self) -> str:
        return f"deis-{self.tableau}"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "epsilon"

    def write(self, rows: Rows, times: Array) -> None:
        write_runge_kutta(rows, self.tableau, times)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun in the schedule's own straight variable, the last step to sigma = 0 by Euler.

    On EDM and VP schedules d(x/alpha)/d(sigma/alpha) = epsilon (there it is rhoRK-Heun); on
    FlowMatching dx/dt = velocity. Order 2, two evaluations a step, 2 steps - 1 when the grid ends
    at sigma = 0.

    Source: Karras et al., "Elucidating the Design Space", arXiv:2206.00364, Algorithm 1.
    """

    @property
    def name(self) -> str:
        return "heun"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return schedule.straight

    def write(self, rows: Rows, times: Array) -> None:
        write_runge_kutta(rows, "heun", times)


@dataclass(frozen=True)
class Euler(Solver):
    """Euler in the schedule's own straight variable; order 1.

    On EDM and VP schedules the numbers are those of ddim. On FlowMatching
    x' = x + (t' - t) velocity, which is ddim as well, and is defined at both ends t = 1 and t = 0.

    Source: Karras et al., arXiv:2206.00364, Algorithm 1 without its correction.
    """

    @property
    def name(self) -> str:
        return "euler"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return schedule.straight

    def write(self, rows: Rows, times: Array) -> None:
        write_runge_kutta(rows, "euler", times)


_EDM = "Karras et al., arXiv:2206.00364"
_ORDERS = {"euler": 1, "heun": 2, "rk4": 4}  # the others are of order 3

SOLVERS = (
    Info(
        "euler",
        Euler,
        measured_order=1,
        nfe_per_step=1,
        summary="Euler in the schedule's straight variable",
        source=_EDM,
        same="ddim",
        quirks="diffusers' FlowMatchEulerDiscreteScheduler shifts the lower end of its times twice "
        "(issue 13243)",
        aliases={
            "sample_euler": {},  # k-diffusion, with its default s_churn = 0
            "EulerDiscreteScheduler": {},
            "FlowMatchEulerDiscreteScheduler": {},
        },
    ),
    Info(
        "heun",
        Heun,
        measured_order=2,
        nfe_per_step=2,
        summary="Heun in the schedule's straight variable",
        source=_EDM,
        aliases={"sample_heun": {}, "HeunDiscreteScheduler": {}},
    ),
    *(
        Info(
            f"deis-{tableau}",
            RhoRK,
            measured_order=_ORDERS.get(tableau, 3),
            nfe_per_step=len(nodes),
            summary="Runge-Kutta in rho",
            source="Zhang & Chen, arXiv:2204.13902",
            fixed={"tableau": tableau},
            same={"euler": "ddim", "heun": "heun"}.get(tableau, ""),
        )
        for tableau, (nodes, _, _) in TABLEAUS.items()
    ),
)
