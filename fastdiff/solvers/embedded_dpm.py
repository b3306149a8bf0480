# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver-12 and DPM-Solver-23: embedded pairs of its singlestep solvers."""

from __future__ import annotations

from dataclasses import dataclass

from ..schedules import Array, Schedule
from .base import choice
from .embedded import Embedded
from .entry import Info
from .exponential import adams, moments, transfer
from .rows import Row, Rows


@dataclass(frozen=True)
class EmbeddedDPM(Embedded):
    """DPM-Solver-12 and DPM-Solver-23: the singlestep solver of an order beside that below it.

    The step of the higher order is kept. With order 2, x_high is singlestep-2 (r1 = 1/2) and x_low
    is DDIM; with order 3, x_high is singlestep-3 and x_low is singlestep-2 with r1 = 1/3. Steps are
    steps in lambda: both ends have alpha > 0, and sigma = 0 is reached from `t_floor` by a jump.

    Args:
        pair: 12 or 23.
        form: "epsilon" (the authors' algorithm_type "dpmsolver") or "x0" ("dpmsolver++").
        solver_type: "dpmsolver" or "taylor", as in `DPMSolverSinglestep`.

    Source: Lu et al., "DPM-Solver", arXiv:2206.00927, appendix C; code LuChengTHU/dpm-solver
    52bc3fb dpm_solver_adaptive; crowsonkb/k-diffusion 4601bf0 sample_dpm_adaptive.
    """

    pair: int = 23
    form: str = "epsilon"
    solver_type: str = "dpmsolver"

    def __post_init__(self) -> None:
        choice("adaptive", "pair", self.pair, (12, 23))
        choice(self.name, "form", self.form, ("epsilon", "x0"))
        choice(self.name, "solver_type", self.solver_type, ("dpmsolver", "taylor"))

    @property
    def name(self) -> str:
        return f"dpm-{self.pair}"

    @property
    def order(self) -> int:
        return self.pair % 10

    @property
    def evaluations(self) -> int:
        return self.order

    @property
    def hands_on(self) -> bool:
        return False

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def progress(self, schedule: Schedule, t: float) -> float:
        return float(schedule.lambda_t(t))

    def time_at(self, schedule: Schedule, progress: float) -> float:
        return float(schedule.t_of_lambda(progress))

    def step(self, rows: Rows, s: float, t: float, known: int | None, end: str) -> None:
        schedule, k = rows.schedule, rows.current if known is None else known
        start, h = float(schedule.lambda_t(s)), float(schedule.h(s, t))
        made = known is not None
        fractions = (0.5,) if self.order == 2 else (1 / 3, 2 / 3)
        nodes = [float(schedule.t_of_lambda(start + r * h)) for r in fractions]
        rows.add(
            s, e=self._row(rows, s, nodes[0], {k: self._w(rows, s, nodes[0])}), evaluate=not made
        )
        low = self._slope(rows, s, t, nodes[0], self.solver_type)
        if self.order == 2:
            high = {k: -low, k + 1: low}
            error = high
        else:
            g = self._slope(rows, s, nodes[1], nodes[0], "taylor")
            total = self._w(rows, s, nodes[1])
            rows.add(nodes[0], e=self._row(rows, s, nodes[1], {k: total - g, k + 1: g}))
            high = self._third(rows, s, t, nodes, k)
            error = {k: high[k] + low, k + 1: high.get(k + 1, 0.0) - low, k + 2: high[k + 2]}
        total = self._w(rows, s, t)
        x = self._row(rows, s, t, {**high, k: total + high[k]})
        rows.add(nodes[-1], x=x, e=Row(x=0.0, outputs=error) if end == "error" else None)

    def _third(
        self, rows: Rows, s: float, t: float, nodes: list[float], k: int
    ) -> dict[int, float]:
        """Weights of order 3 beyond those of order 1."""
        if self.solver_type == "dpmsolver":
            g = self._slope(rows, s, t, nodes[1], "taylor")
            return {k: -g, k + 2: g}
        b = adams(rows.schedule, self.form, s, t, (s, *nodes))
        return {k: -float(b[1] + b[2]), k + 1: float(b[1]), k + 2: float(b[2])}

    def _w(self, rows: Rows, s: float, t: float) -> float:
        return float(moments(rows.schedule, self.form, s, t, 1)[0])

    def _slope(self, rows: Rows, s: float, t: float, node: float, rule: str) -> float:
        """Weight of (output at node) - (output at s)."""
        w = moments(rows.schedule, self.form, s, t, 2)
        ahead = float(rows.schedule.h(s, node))
        if rule == "taylor":
            return float(w[1]) / ahead
        return 0.5 * float(w[0]) * float(rows.schedule.h(s, t)) / ahead

    def _row(self, rows: Rows, s: float, t: float, outputs: dict[int, float]) -> Row:
        return Row(x=transfer(rows.schedule, self.form, s, t), outputs=outputs)


_DPM = "Lu et al., arXiv:2206.00927"

ADAPTIVE = (
    Info(
        "dpm-12",
        EmbeddedDPM,
        measured_order=2,
        nfe_per_step=2,
        summary="DPM-Solver of orders 1 and 2, steps in lambda",
        source=_DPM,
        fixed={"pair": 12},
    ),
    Info(
        "dpm-23",
        EmbeddedDPM,
        measured_order=3,
        nfe_per_step=3,
        summary="DPM-Solver of orders 2 and 3, steps in lambda",
        source=_DPM,
        fixed={"pair": 23},
        aliases={"dpm_adaptive": {}, "sample_dpm_adaptive": {}},  # with k-diffusion's order = 3
        quirks=(
            "Both published loops take one step for the whole batch, so that a sample depends on "
            "its neighbours, and evaluate again at the start of a step that was refused. The "
            "authors' casts the factor of a step to float32 and takes the worst sample's error; "
            "k-diffusion's takes the root mean square over the batch."
        ),
    ),
)
