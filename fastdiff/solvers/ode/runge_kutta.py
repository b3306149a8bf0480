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
from .tableaus import ORDERS, TABLEAUS

RHO = ("euler", "heun", "kutta3", "heun3", "ralston3", "vdh3", "ssprk3", "rk4")  # of `RhoRK`


def runge_kutta_step(rows: Rows, tableau: str, s: float, t: float) -> int:
    """Writes one step from s to t; returns the number of the evaluation at s.

    With variable "epsilon": v = x/alpha moves by d v = epsilon d rho, stages at
    rho_s + c (rho_t - rho_s). With "x0": v = x/sigma moves by d v = x0 d(1/rho), stages likewise.
    With "velocity": x itself moves by d x = velocity d t.

    A step to sigma = 0 is Euler's in "epsilon" and "x0", whatever the tableau (a stage at c = 1
    would ask the network for a noise that is not there). In "velocity" it is the tableau's own
    where the network tells the velocity at sigma = 0; see `closing`.
    """
    schedule = rows.schedule
    straight, of_x0 = rows.variable == "velocity", rows.variable == "x0"
    if float(schedule.sigma(t)) == 0.0:
        if straight and not bounded(schedule, t):
            return jump(rows, s, t, Row())
        tableau = closing(rows, tableau, t) if straight else "euler"
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


def bounded(schedule: Schedule, t: float) -> bool:
    """Whether dx/dt is finite at t, along paths of finite x0 and noise."""
    return bool(np.isfinite(schedule.alpha_dot(t)) and np.isfinite(schedule.sigma_dot(t)))


def tells(rows: Rows, t: float) -> bool:
    """Whether the network is asked for the velocity at t, a time with sigma = 0.

    It is on a schedule whose straight variable is the velocity, because its networks are trained
    down to there, if the velocity follows from what it predicts.
    """
    try:
        rows.schedule.conversion(rows.prediction, "velocity", t)
    except ValueError:
        return False
    return rows.schedule.straight == "velocity"


def closing(rows: Rows, tableau: str, t: float) -> str:
    """The tableau of a step in velocity that ends at sigma = 0.

    It is the one asked for, where that has no stage at the end or the network tells the velocity
    there. Elsewhere it is one without such a stage, of an order that keeps the order of a run up to
    4: one step may be of one order less.
    """
    if 1.0 not in TABLEAUS[tableau][0] or tells(rows, t):
        return tableau
    return "midpoint" if ORDERS[tableau] == 2 else "heun3"


def jump(rows: Rows, s: float, t: float, state: Row) -> int:
    """Writes x' = alpha_t x0, a step in velocity to sigma = 0; returns the evaluation at s.

    Args:
        rows, s, t: The rows, and the ends of the step.
        state: What makes the state at s of the register x and the outputs.
    """
    p, q = rows.schedule.conversion("velocity", "x0", s)
    alpha = float(rows.schedule.alpha(t))
    outputs = {k: alpha * p * w for k, w in state.outputs.items()}
    outputs[rows.current] = outputs.get(rows.current, 0.0) + alpha * q
    return rows.add(s, x=Row(x=alpha * p * state.x, outputs=outputs))


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
        tableau: "euler", "heun", "kutta3", "heun3", "ralston3", "vdh3", "ssprk3" or "rk4".

    Source: Zhang & Chen, "DEIS", arXiv:2204.13902, section 3.3.
    """

    tableau: str = "heun"

    def __post_init__(self) -> None:
        choice(self.name, "tableau", self.tableau, RHO)

    @property
    def name(self) -> str:
        return f"deis-{self.tableau}"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "epsilon"

    def write(self, rows: Rows, times: Array) -> None:
        write_runge_kutta(rows, self.tableau, times)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun in the schedule's own straight variable.

    On EDM and VP schedules d(x/alpha)/d(sigma/alpha) = epsilon (there it is rhoRK-Heun), and a step
    to sigma = 0 is Euler's: 2 steps - 1 evaluations. On FlowMatching dx/dt = velocity, and the last
    step is Heun's too; where the network predicts x0, from which no velocity follows at t = 0, it
    is the midpoint's. Order 2, two evaluations a step.

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
        quirks="FlowMatchHeunDiscreteScheduler ends a flow with a step of Euler's",
    ),
    *(
        Info(
            f"deis-{tableau}",
            RhoRK,
            measured_order=ORDERS[tableau],
            nfe_per_step=len(TABLEAUS[tableau][0]),
            summary="Runge-Kutta in rho",
            source="Zhang & Chen, arXiv:2204.13902",
            fixed={"tableau": tableau},
            same={"euler": "ddim", "heun": "heun"}.get(tableau, ""),
        )
        for tableau in RHO
    ),
)
