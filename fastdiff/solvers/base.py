# SPDX-License-Identifier: Apache-2.0
"""What a solver is: options, and one method that writes the rows of a plan."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import grids
from ..plans import LEAST_FLOOR, Plan, Stage
from ..schedules import Array, Schedule, prediction_name

Weights = Mapping[int, float]


@dataclass
class Rows:
    """Collects the stages of a plan, with evaluations named by their number.

    A solver thinks of "the output of evaluation k"; a stage counts backwards from itself. `add`
    does the translation, fills in what follows from the schedule (conversion, c_in, the network's
    time), and gives every noise its own stream.

    Args:
        schedule, prediction: Of the plan.
        variable: What the solver combines: h is converted to it.
        clip: (lo, hi) for every evaluation, or None.
        threshold: (quantile, floor) for every evaluation, or None.
    """

    schedule: Schedule
    prediction: str
    variable: str
    clip: tuple[float, float] | None = None
    threshold: tuple[float, float] | None = None
    stages: list[Stage] = field(default_factory=list)
    evaluations: int = 0

    @property
    def current(self) -> int:
        """Number of the evaluation that the next `add` makes."""
        return self.evaluations

    def add(
        self,
        t: float,
        *,
        x: tuple[float, Weights] | None = None,
        e: tuple[float, Weights] | None = None,
        d_e: float = 0.0,
        c: float = 0.0,
        c_e: float = 0.0,
    ) -> int:
        """Evaluates the network at t, then updates.

        Args:
            t: Time of the evaluation; the point is e where the last `add` gave an e, else x.
            x: (weight of x, {evaluation: weight}) for x'; None leaves x as it is.
            e: The same for e', where the next evaluation is to be; None: the next is at x'.
            d_e: Weight of the e before in e'.
            c, c_e: Weight of a fresh standard normal in x' and (the same normal) in e'.

        Returns:
            The number of this evaluation.
        """
        k = self.current
        a_x, past_x = x if x is not None else (1.0, {})
        d_x, past_e = e if e is not None else (0.0, {})
        p, q = self.schedule.conversion(self.prediction, self.variable, t)
        x0_p, x0_q = self._to_x0(t)
        self.stages.append(
            Stage(
                t=float(t),
                model_time=float(self.schedule.model_time(t, self.prediction)),
                c_in=float(self.schedule.c_in(t, self.prediction)),
                p=p,
                q=q,
                x0_p=x0_p,
                x0_q=x0_q,
                a_x=a_x,
                b=_backwards(k, past_x),
                c=c,
                d_x=d_x,
                d_e=d_e,
                g=_backwards(k, past_e),
                c_e=c_e,
                noise=((len(self.stages) + 1, 1.0),) if c or c_e else (),
                clip=self.clip,
                threshold=self.threshold,
            )
        )
        self.evaluations += 1
        return k

    def _to_x0(self, t: float) -> tuple[float, float]:
        if float(self.schedule.alpha(t)) == 0.0 and self.prediction == "epsilon":
            return np.nan, np.nan
        return self.schedule.conversion(self.prediction, "x0", t)


def _backwards(k: int, weights: Weights) -> tuple[float, ...]:
    values = [0.0] * (1 + max((k - j for j in weights), default=-1))
    for j, weight in weights.items():
        values[k - j] = float(weight)
    return tuple(values)


@dataclass(frozen=True)
class Solver(abc.ABC):
    """A sampler's options. Subclasses are frozen dataclasses that implement `write`.

    `fastdiff.plan` calls `plan`, which builds the grid, asks for the rows and packs them.
    """

    @property
    def name(self) -> str:
        """For people: the registry's name, or the class."""
        return type(self).__name__

    @property
    def history(self) -> int:
        """Outputs a full step combines; a plan needs at least as many steps."""
        return 1

    @abc.abstractmethod
    def variable(self, schedule: Schedule, times: Array) -> str:
        """What h is: "epsilon", "x0" or "velocity"."""

    @abc.abstractmethod
    def write(self, rows: Rows, times: Array) -> None:
        """Adds the stages that go through `times` [steps + 1] to `rows`."""

    @property
    def clipping(self) -> tuple[float, float] | None:
        """(lo, hi) that x0 predictions are clipped to, or None."""
        return None

    @property
    def thresholding(self) -> tuple[float, float] | None:
        """(quantile, floor) that x0 predictions are thresholded with, or None."""
        return None

    def times(
        self,
        schedule: Schedule,
        steps: int,
        grid: str | ArrayLike,
        t_max: float | None,
        t_min: float | None,
    ) -> Array:
        """The accepted times: `steps` intervals of the grid."""
        times = grids.build(schedule, steps, grid, t_max=t_max, t_min=t_min)
        if self.history > steps:
            raise ValueError(
                f"{self.name}: it combines {self.history} outputs and needs at least as many "
                f"steps; got steps = {steps}. Take more steps or a lower order."
            )
        return times

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
        """Compiles the plan; see `fastdiff.plan`."""
        times = self.times(self._schedule(schedule), steps, grid, t_max, t_min)
        return self._compile(schedule, prediction, times, lambda rows: self.write(rows, times))

    @staticmethod
    def _schedule(schedule: Any) -> Schedule:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"plan: schedule is a fastdiff.schedules.Schedule; got {schedule!r}.")
        return schedule

    def _compile(
        self, schedule: Schedule, prediction: str, times: Array, write: Callable[[Rows], None]
    ) -> Plan:
        prediction = prediction_name(prediction)
        variable = self.variable(schedule, times)
        self._check_start(schedule, times, variable)
        rows = Rows(schedule, prediction, variable, self.clipping, self.thresholding)
        write(rows)
        plan = Plan(
            stages=tuple(rows.stages),
            times=tuple(times.tolist()),
            solver=self.name,
            prediction=prediction,
            variable=variable,
            schedule=str(schedule),
            prior_scale=schedule.prior_scale(float(times[0])),
        )
        object.__setattr__(plan, "made_for", schedule)
        return plan

    def _check_start(self, schedule: Schedule, times: Array, variable: str) -> None:
        if variable == "epsilon" and float(schedule.alpha(times[0])) == 0.0:
            raise ValueError(
                f"{self.name}: the epsilon form divides by alpha, which is 0 at t_max = "
                f"{times[0]:g} of {schedule}. Take t_max = {times[0] - 1e-3:g}, or a solver in "
                "x0 form (ddim, dpmpp-...) or euler."
            )


@dataclass(frozen=True)
class X0Limits(Solver):
    """What a solver in x0 form may do to every x0 prediction before it is used.

    Args:
        clip: Bound or (lo, hi): x0 is clipped to [lo, hi].
        threshold: Quantile or (quantile, floor), the floor 1 by default: dynamic thresholding. Each
            sample's x0 is clipped to [-s, s] and divided by s = max(quantile of its |x0|, floor),
            which keeps it in [-1, 1] without saturating under strong guidance. For pixels; Imagen
            takes 0.995. diffusers names the two `dynamic_thresholding_ratio` and
            `sample_max_value`, and clamps s to [1, sample_max_value]: with its default of 1 that
            is clip=1, whatever the ratio. Here s has a floor and no ceiling, as in the paper.

    Source: Saharia et al., "Imagen", arXiv:2205.11487, section 2.3; Lu et al., "DPM-Solver++",
    arXiv:2211.01095; code LuChengTHU/dpm-solver 52bc3fb dynamic_thresholding_fn.
    """

    clip: Any = field(default=None, kw_only=True)
    threshold: Any = field(default=None, kw_only=True)

    @property
    def clipping(self) -> tuple[float, float] | None:
        return clip_range(self.name, self.clip)

    @property
    def thresholding(self) -> tuple[float, float] | None:
        return threshold_pair(self.name, self.threshold)

    @property
    def limits(self) -> bool:
        """Whether x0 predictions are clipped or thresholded."""
        return self.clipping is not None or self.thresholding is not None

    def _check_limits(self, form: str) -> None:
        """Raises where they make no sense, together or in this form ("epsilon", "x0", "auto")."""
        if self.clipping is not None and self.thresholding is not None:
            raise ValueError(
                f"{self.name}: x0 is clipped or thresholded, not both; got clip={self.clip!r} and "
                f"threshold={self.threshold!r}. Leave one out."
            )
        if self.limits and form == "epsilon":
            option = "clip" if self.clipping is not None else "threshold"
            raise ValueError(
                f"{self.name}: {option} applies to x0 and this solver combines epsilon. Use "
                "form='x0', or dpmpp-..."
            )


def clip_range(who: str, clip: Any) -> tuple[float, float] | None:
    """(lo, hi) from None, a bound (-> (-bound, bound)) or a pair."""
    if clip is None:
        return None
    try:
        lo, hi = (-float(clip), float(clip)) if np.ndim(clip) == 0 else map(float, clip)
    except (TypeError, ValueError):
        raise TypeError(f"{who}: clip is a bound or a pair (lo, hi); got {clip!r}.") from None
    if not (np.isfinite(lo) and np.isfinite(hi) and lo < hi):
        raise ValueError(f"{who}: clip needs lo < hi, both finite; got {clip!r}.")
    return lo, hi


def threshold_pair(who: str, threshold: Any) -> tuple[float, float] | None:
    """(quantile, floor) from None, a quantile (-> (quantile, 1)) or a pair."""
    if threshold is None:
        return None
    try:
        if isinstance(threshold, bool | np.bool_):
            raise TypeError
        pair = (threshold, 1.0) if np.ndim(threshold) == 0 else threshold
        quantile, floor = map(float, pair)
    except (TypeError, ValueError):
        raise TypeError(
            f"{who}: threshold is a quantile or a pair (quantile, floor), such as 0.995; got "
            f"{threshold!r}."
        ) from None
    if not (0.0 < quantile <= 1.0 and LEAST_FLOOR <= floor < np.inf):
        raise ValueError(
            f"{who}: threshold needs 0 < quantile <= 1 and a finite floor > 0; got {threshold!r}."
        )
    return quantile, floor


def choice(who: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises a ValueError unless value is one of `allowed`."""
    if not any(
        value is option or (type(value) is type(option) and value == option) for option in allowed
    ):
        shown = ", ".join(map(repr, allowed))
        raise ValueError(f"{who}: {name} is one of {shown}; got {value!r}.")
