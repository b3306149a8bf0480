# SPDX-License-Identifier: Apache-2.0
"""A reversible exponential integrator: a run can be undone algebraically, without stored states."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ...schedules import Array, Schedule
from ...schedules.base import real
from ..base import Solver, choice
from ..entry import Info
from ..exponential import moments, transfer
from ..rows import Row, Rows


@dataclass(frozen=True)
class Reversible(Solver):
    """Two coupled copies of the state, each moved by the exponential Euler step at the other.

    With A and B the weights of DDIM's step from s to t, h(.) the network's epsilon or x0, and
    z = y = x at the start,

        y_t = A (zeta y_s + (1 - zeta) z_s) + B h(z_s, s)
        z_t = A z_s + B h(y_t, t)

    which can be solved for (y_s, z_s) as it stands. The sample is z at the end. The solver is of
    order 1 and takes two evaluations a step. zeta below 1 couples the copies; going back divides by
    it at every step, so rounding errors grow like zeta^-steps. A step to sigma = 0 is DDIM's, of z
    alone, and cannot be undone.

    Args:
        form: Variable that is held constant over a step: "epsilon" or "x0".
        zeta: Strength of the coupling, in (0, 1).

    Source: McCallum & Foster, "Efficient, accurate and stable gradients for neural ODEs",
    arXiv:2410.11648, in the exponential variables of Blasingame & Liu's Rex, with the exponential
    Euler step as the base.
    """

    form: str = "x0"
    zeta: float = 0.999

    def __post_init__(self) -> None:
        choice(self.name, "form", self.form, ("epsilon", "x0"))
        if not 0.0 < real(self.name, "zeta", self.zeta) < 1.0:
            raise ValueError(f"{self.name}: zeta lies between 0 and 1; got {self.zeta!r}.")

    @property
    def name(self) -> str:
        return "rex-1"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def write(self, rows: Rows, times: Array) -> None:
        schedule = rows.schedule
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            a = transfer(schedule, self.form, s, t)
            b = float(moments(schedule, self.form, s, t, 1)[0])
            own = self.zeta if i > 0 else 0.0  # at the start both are x
            k = rows.current
            if float(schedule.sigma(t)) == 0.0:  # the end of the schedule: DDIM's step
                rows.add(s, x=Row(x=a, outputs={k: b}))
                continue
            rows.add(s, e=Row(x=a * (1.0 - own), e=a * own, outputs={k: b}))
            rows.add(t, x=Row(x=a, outputs={k + 1: b}))


SOLVERS = (
    Info(
        "rex-1",
        Reversible,
        measured_order=1,
        nfe_per_step=2,
        summary="two coupled copies, undone without stored states",
        source="McCallum & Foster, arXiv:2410.11648",
    ),
)
