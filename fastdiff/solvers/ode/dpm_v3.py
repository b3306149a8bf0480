# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver-v3: multistep with the linear part of a network's own statistics."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...plans import Plan, Product, Stage
from ...schedules import Array, Schedule
from ..base import Solver, choice, enough_steps
from ..entry import Info
from ..integrals import Exact, Trapezoids
from ..rows import Rows
from ..semilinear import Coefficient, LinearPart, NoLinearPart, Update, Writer, update
from ..statistics import ModelStatistics
from .dpm_multistep import AMPLIFICATION, SHORT_STEP

PUBLISHED_INTERVALS = 120  # of the authors' grids of statistics
HALF = 0.5  # the time down to which `half` corrects


@dataclass(frozen=True)
class DPMSolverV3(Solver):
    """DPM-Solver-v3: multistep on h = x0 + (l - 1) x / alpha, where dh/dlambda is near s h - b.

    l, s and b are statistics of the network (`fastdiff.tune.ems`), chosen so that what is left for
    the polynomial of the multistep is small. The formulas stand in `fastdiff.solvers.semilinear`.
    A step predicts from `order` outputs; where `use_corrector` is set it is made again once the
    output at its end is known, as in UniPC, in the launch that predicts the next one.

    Statistics of each element make products with a bank of tensors, which
    `fastdiff.tune.Statistics.extras(plan)` gives; a plan without statistics, or with one number for
    all elements, is made of plain weights. In a plan with a bank the state between stages holds the
    corrector's sum without its newest output, so that predictor and corrector are eight products
    and one launch at order 3; the result and all points of evaluation are those of the method.

    The defaults are of order `order` with the runge-kutta warm-up. A pseudo-order polynomial is of
    order 2 at most, whatever `order` is; at few steps it can still be the better one.

    Args:
        order: Outputs that the predictor combines, 1 to 3.
        statistics: Statistics of the network; None: l = 1, s = b = 0, exactly, which makes the
            predictor that of DPM-Solver++.
        p_pseudo: Whether the predictor's polynomial is of pseudo-order: divided differences in
            place of derivatives. It changes orders from 3 on.
        use_corrector: Whether steps but the last are corrected.
        c_pseudo: Whether the corrector combines one more output than the predictor of its step, by
            a polynomial of pseudo-order. Without it the corrector combines as many.
        lower_order_final: True lowers the last steps to order .. 2, 1; False lowers none; "auto"
            lowers a last step that would amplify errors, as in `DPMSolverMultistep`, and with
            statistics each of them that is longer than 0.25 in lambda (measured at 5 to 10 steps).
            With published=True "auto" is True.
        degenerated: Leaves the statistics out: l = 1, s = b = 0.
        half: Whether only states at t > 0.5 are corrected.
        warmup: "lower" (orders 1, 2, ..) or "runge-kutta" (the first order - 1 steps by a
            singlestep method of the same order).
        published: Takes the authors' integrals, by trapezoids on the grid of the statistics (of 120
            intervals over the plan's range without statistics), and moves the times to that grid.
            By default the piecewise linear statistics are integrated exactly, at any times.

    Source: Zheng et al., "DPM-Solver-v3", arXiv:2310.13268, sections 3 and 4 and the appendix on
    pseudo-order; code thu-ml/DPM-Solver-v3 ba16871 dpm_solver_v3.py.
    """

    order: int = 3
    statistics: ModelStatistics | None = None
    p_pseudo: bool = False
    use_corrector: bool = True
    c_pseudo: bool = False
    lower_order_final: bool | str = "auto"
    degenerated: bool = False
    half: bool = False
    warmup: str = "lower"
    published: bool = False

    def __post_init__(self) -> None:
        choice(self.known_as, "order", self.order, (1, 2, 3))
        choice(self.known_as, "lower_order_final", self.lower_order_final, ("auto", True, False))
        choice(self.known_as, "warmup", self.warmup, ("lower", "runge-kutta"))
        for name in _SWITCHES:
            choice(self.known_as, name, getattr(self, name), (False, True))
        if not isinstance(self.statistics, ModelStatistics | None):
            raise TypeError(
                f"{self.known_as}: statistics are those that fastdiff.tune.ems estimates, or None; "
                f"got {type(self.statistics).__name__}."
            )

    @property
    def known_as(self) -> str:
        """The registered name."""
        return f"dpm-v3-{self.order}"

    @property
    def name(self) -> str:
        """The registered name; with statistics the options and the statistics' digest after it."""
        if self.statistics is None:
            return self.known_as
        given = [f"{n}={getattr(self, n)}" for n in _OPTIONS if getattr(self, n) != _DEFAULTS[n]]
        return f"{self.known_as} ({', '.join([*given, f'statistics={self.statistics.digest}'])})"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "x0"

    def write(self, rows: Rows, times: Array) -> None:
        self.written(rows, times)

    def written(self, rows: Rows, times: Array) -> list[Array]:
        """Adds the stages to `rows`; returns the entries of the bank that they name."""
        enough_steps(self.known_as, self.order, times)
        if self.statistics is not None:
            self.statistics.check_plan(rows.schedule, rows.prediction)
        part = self._linear_part(rows.schedule, times)
        if isinstance(part, Trapezoids):
            rows.times = times = part.snapped(times)
        writer = Writer(rows, part)
        with np.errstate(over="ignore", invalid="ignore"):  # the writer refuses what is not finite
            _Steps(self, writer, times).write()
        return writer.bank

    def _linear_part(self, schedule: Schedule, times: Array) -> LinearPart:
        given = self.statistics
        if given is not None and not self.degenerated:
            return Trapezoids(given) if self.published else Exact(given)
        if not self.published:
            return NoLinearPart(schedule)
        if given is None:
            first, last = (float(schedule.lambda_t(t)) for t in times[[0, -1]])
            if not (np.isfinite(first) and np.isfinite(last)):
                raise ValueError(
                    f"{self.known_as}: with published=True the grid of statistics is even in "
                    f"lambda, which is finite; got {first:g} at t = {times[0]:g} and {last:g} at "
                    f"t = {times[-1]:g}. Set t_max and t_min inside, or published=False."
                )
            grid = np.linspace(first, last, PUBLISHED_INTERVALS + 1)
        else:
            grid = given.lambda_grid
        none = np.zeros(len(grid))
        return Trapezoids(ModelStatistics(schedule, none + 1.0, none, none, grid))


_SWITCHES = ("p_pseudo", "use_corrector", "c_pseudo", "degenerated", "half", "published")
_OPTIONS = (*_SWITCHES, "lower_order_final", "warmup")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(DPMSolverV3)}
_NAME = re.compile(r"dpm-v3-([123]) \(((?:\w+=[\w-]+, )*)statistics=([0-9a-f]{12})\)")


def bank_of(plan: Plan, statistics: ModelStatistics) -> list[Array]:
    """The tensors that a plan made with these statistics reads, float64, in order.

    Raises:
        ValueError: The plan is none of dpm-v3 with statistics, or was made with others.
    """
    named = _NAME.fullmatch(plan.solver)
    if named is None:
        raise ValueError(
            f"statistics: a plan of dpm-v3 made with statistics= reads them; got one of "
            f"{plan.solver!r}."
        )
    if named[3] != statistics.digest:
        raise ValueError(
            f"statistics: the plan was made with those of digest {named[3]}; got those of digest "
            f"{statistics.digest}. Load the file that was saved beside the plan, or make the plan "
            "again with these."
        )
    values = {"True": True, "False": False}
    options: dict[str, Any] = {"order": int(named[1]), "statistics": statistics}
    for item in filter(None, named[2].split(", ")):
        option, value = item.split("=")
        options[option] = values.get(value, value)
    solver = DPMSolverV3(**options)
    assert plan.schedule is not None
    made = [_reads(stage) for stage in plan.stages]
    for jumps in (True, False):  # a jump is one more row, which reads nothing
        times = np.array(plan.times[:-1] if jumps else plan.times)
        if jumps and 1 < len(times) <= solver.order:
            continue
        rows = Rows(plan.schedule, plan.prediction, plan.variable, len(times) - 1)
        bank = solver.written(rows, times) if len(times) > 1 else []
        if made == [*map(_reads, rows.stages), *[(times[-1], (), 0, 0)] * jumps]:
            return bank
    raise ValueError(
        f"statistics: the rows are those that {solver.name} writes; got a plan whose rows were "
        "changed. Give its extras as tensors of your own."
    )


def _reads(stage: Stage) -> tuple[float, tuple[Product, ...], int, int]:
    """What a stage reads of the bank, and where it is evaluated."""
    return stage.t, stage.products, len(stage.r), len(stage.s)


class _Steps:
    """The steps of one plan."""

    def __init__(self, solver: DPMSolverV3, writer: Writer, times: Array) -> None:
        self.solver, self.writer = solver, writer
        self.schedule = writer.rows.schedule
        self.times: list[float] = times.tolist()
        self.finite = np.isfinite(self.schedule.lambda_t(times)).tolist()
        self.evaluations: list[int] = []  # at each accepted time
        # What x holds stands for the state only together with these outputs and constants.
        self.state: dict[int | str, Coefficient] = {"x": 1.0}

    def write(self) -> None:
        for i, (s, t) in enumerate(itertools.pairwise(self.times)):
            starts = self.solver.warmup == "runge-kutta" and i + 1 < self.solver.order
            if starts and self.finite[i] and self.finite[i + 1]:
                self.evaluations.append(self._singlestep(s, t))
                continue
            self.evaluations.append(self.writer.rows.current)
            nodes = self.times[i::-1]
            order = self._order(i)
            predictor = self._update(t, nodes[:order], self.solver.p_pseudo)
            corrects = order + self.solver.c_pseudo
            if not self._corrects(i) or corrects == 1:
                self.writer.add(s, x=predictor.of(self.state, self._newest(order)))
                self.state = {"x": 1.0}
                continue
            corrector = self._update(t, [s, t, *nodes[1:]][:corrects], self.solver.c_pseudo)
            self._correct(s, predictor, corrector)

    def _update(self, t: float, nodes: Sequence[float], pseudo: bool) -> Update:
        return update(self.writer.part, self.schedule, t, nodes, pseudo)

    def _newest(self, count: int) -> list[int]:
        """The numbers of the newest outputs at accepted times."""
        return self.evaluations[::-1][:count]

    def _corrects(self, i: int) -> bool:
        """Whether the state at the end of step i is corrected."""
        inside = i + 2 < len(self.times) and self.finite[i] and self.finite[i + 1]
        solver = self.solver
        return solver.use_corrector and inside and (not solver.half or self.times[i + 1] > HALF)

    def _correct(self, s: float, predictor: Update, corrector: Update) -> None:
        """The stage at s, whose step the next stage corrects."""
        coming = self.writer.rows.current + 1  # the evaluation at the end of the step
        own = self._newest(len(predictor.weights))
        used = [own[0], coming, *self._newest(len(corrector.weights) - 1)[1:]]
        if not self.writer.part.elementwise:
            self.writer.add(s, x=self.state, e=predictor.of(self.state, own))
            self.state = corrector.of({"x": 1.0}, used)
            return
        # x takes what the corrector knows already, with the predictor's constant: so e needs none
        weights = dict(zip(used, corrector.weights, strict=True))
        newest = weights.pop(coming)
        known = Update(corrector.a, list(weights.values()), predictor.shift)
        change: dict[int | str, Coefficient] = {"new": 1.0}
        for key, weight in zip(own, predictor.weights, strict=True):
            change[key] = weight - weights.get(key, 0.0)
        for key in weights.keys() - set(own):
            change[key] = -weights[key]
        self.writer.add(s, x=known.of(self.state, list(weights)), e=change)
        self.state = {"x": 1.0, coming: newest, "one": corrector.shift - predictor.shift}

    def _order(self, i: int) -> int:
        """Outputs that the predictor of step i combines."""
        if not self.finite[i + 1]:
            return 1
        order = min(self.solver.order, max(sum(self.finite[: i + 1]), 1))
        left = len(self.times) - 1 - i
        return left if left < order and self._lowers(i, order) else order

    def _lowers(self, i: int, order: int) -> bool:
        """Whether step i, among the last, is lowered."""
        rule = self.solver.lower_order_final
        if rule != "auto":
            return bool(rule)
        if self.solver.published:
            return True
        s, t = self.times[i], self.times[i + 1]
        if float(self.schedule.h(s, t)) <= SHORT_STEP:
            return False
        if not isinstance(self.writer.part, NoLinearPart):
            return True
        weights = self._update(t, self.times[i::-1][:order], self.solver.p_pseudo).weights
        spread, total = sum(map(np.abs, weights)), np.abs(sum(weights))
        amplification = float(np.mean(spread / total))
        return amplification > AMPLIFICATION["x0"][order]

    def _singlestep(self, s: float, t: float) -> int:
        """A step of two or three evaluations, of that order; returns the number of the first."""
        writer, order = self.writer, self.solver.order
        first = writer.rows.current
        lam, h = float(self.schedule.lambda_t(s)), float(self.schedule.h(s, t))
        nodes = [s]
        for j in range(1, order):
            inner = float(self.schedule.t_of_lambda(lam + j / order * h))
            evaluations = range(first, first + j)
            writer.add(nodes[-1], e=self._update(inner, nodes, False).of({"x": 1.0}, evaluations))
            nodes.append(inner)
        last = self._update(t, nodes, False)
        writer.add(nodes[-1], x=last.of({"x": 1.0}, range(first, first + order)))
        return first


SOLVERS = tuple(
    Info(
        f"dpm-v3-{order}",
        DPMSolverV3,
        measured_order=order,
        nfe_per_step=1,
        summary="multistep with a network's statistics, predictor-corrector",
        source="Zheng et al., arXiv:2310.13268",
        fixed={"order": order, **({"warmup": "lower"} if order == 1 else {})},
        least_steps=order,
        same="ddim" if order == 1 else "",
        quirks="The published code moves the times to the grid of the statistics and integrates by "
        "trapezoids there: with l = 1, s = b = 0 it ends 2e-3 to 4e-3 away from DPM-Solver++.",
    )
    for order in (1, 2, 3)
)
