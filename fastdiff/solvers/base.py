# SPDX-License-Identifier: Apache-2.0
"""Solvers: each is a set of options, and a method that writes the rows of a plan."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import grids
from .._text import shown
from ..plans import LEAST_FLOOR, Plan
from ..schedules import Array, Schedule, prediction_name
from ..schedules.base import real
from .rows import Row, Rows


@dataclass(frozen=True)
class Solver(abc.ABC):
    """A sampler's options. Subclasses are frozen dataclasses with a `name`, `variable` and `write`.

    `fastdiff.plan` calls `plan`, which builds the grid, asks for the rows and packs them. Of the
    methods defined here three may be overridden: `intervals` by a solver that counts steps in its
    own way, `default_grid` by one whose network knows certain times alone, and `write_jump` by one
    whose steps are jumps already.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name in plans and errors; the registry's where the solver is registered."""

    @abc.abstractmethod
    def variable(self, schedule: Schedule, times: Array) -> str:
        """The variable that the rows combine: "epsilon", "x0" or "velocity"."""

    @abc.abstractmethod
    def write(self, rows: Rows, times: Array) -> None:
        """Adds the stages that go through `times` to `rows`."""

    def intervals(self, schedule: Schedule, steps: int, grid: str | ArrayLike) -> int:
        """Intervals of the grid that `write` is given; by default one for each step."""
        return steps

    def default_grid(self, schedule: Schedule) -> tuple[str, float | None]:
        """The grid that "auto" stands for, and its last time; None: the grid's own."""
        return schedule.default_grid, None

    def write_jump(self, rows: Rows, times: Array) -> None:
        """Adds a run through all `times` but the last, and an evaluation whose x0 is the result."""
        start = float(times[-2])
        if len(times) > 2:
            try:
                self.write(rows, times[:-1])
            except TooFewSteps as error:
                raise TooFewSteps(
                    f"{error} (With jump=True one of the steps is the jump itself.)"
                ) from None
        if rows.times is not None:  # the solver has moved the times
            start = float(rows.times[-1])
            rows.times = np.append(rows.times, times[-1])
        p, q = rows.schedule.conversion(rows.variable, "x0", start)
        rows.add(start, x=Row(x=p, outputs={rows.current: q}))

    def plan(
        self,
        schedule: Schedule,
        steps: int,
        *,
        grid: str | ArrayLike = "auto",
        t_max: float | None = None,
        t_min: float | None = None,
        prediction: str = "epsilon",
        jump: bool = False,
    ) -> Plan:
        """Compiles the plan; see `fastdiff.plan`."""
        if not isinstance(schedule, Schedule):
            raise TypeError(f"plan: schedule is a fastdiff.schedules.Schedule; got {schedule!r}.")
        choice("plan", "jump", jump, (False, True))
        if isinstance(grid, str) and grid == "auto":
            grid, end = self.default_grid(schedule)
            t_min = end if t_min is None else t_min
        count = self._count(schedule, steps, grid, jump)
        times = grids.build(schedule, count, grid, t_max=t_max, t_min=t_min)
        prediction = prediction_name(prediction)
        variable = self.variable(schedule, times)
        self._check_start(schedule, times, variable)
        rows = Rows(schedule, prediction, variable, int(steps) - jump)
        if jump:
            self.write_jump(rows, times)
        else:
            self.write(rows, times)
        accepted = times if rows.times is None else rows.times
        end = data_time(schedule)
        if jump and end is not None:
            accepted = np.append(accepted[:-1], end)
        return Plan(
            stages=tuple(rows.stages),
            times=tuple(accepted.tolist()),
            solver=self.name,
            prediction=prediction,
            variable=variable,
            schedule=schedule,
            prior_scale=schedule.prior_scale(float(times[0])),
        )

    def _count(self, schedule: Schedule, steps: int, grid: str | ArrayLike, jump: bool) -> int:
        """Intervals of the grid; a jump takes the place of the last one."""
        whole = isinstance(steps, int | np.integer) and steps > 1
        if not (jump and whole):
            return steps if jump else self.intervals(schedule, steps, grid)
        known = grid if isinstance(grid, str) else grids.as_times(grid)[:-1]
        return self.intervals(schedule, steps - 1, known) + 1

    def _check_start(self, schedule: Schedule, times: Array, variable: str) -> None:
        if variable == "epsilon" and float(schedule.alpha(times[0])) == 0.0:
            straight = ", euler or heun" if schedule.straight == "velocity" else ""
            raise ValueError(
                f"{self.name}: the epsilon form divides by alpha, which is 0 at t_max = "
                f"{times[0]:g} of {schedule}. Take a solver that starts there: ab-3, midpoint or "
                f"rk4 (in velocity), or ddim, dpmpp-2m or dpmpp-3m (in x0){straight}."
            )


@dataclass(frozen=True)
class X0Limits(Solver):
    """A solver in x0 form, which may limit every x0 prediction before it uses it.

    Args:
        clip: A bound or (lo, hi): x0 is clipped to [lo, hi].
        threshold: A quantile or (quantile, floor), where the floor is 1 by default. This is dynamic
            thresholding: each sample's x0 is clipped to [-s, s] and divided by
            s = max(quantile of its |x0|, floor), which keeps it in [-1, 1] without saturating under
            strong guidance. It is meant for pixels; Imagen takes 0.995. diffusers names the two
            `dynamic_thresholding_ratio` and `sample_max_value`, and clamps s to
            [1, sample_max_value]: with its default of 1 that is clip=1, whatever the ratio. Here s
            has a floor and no ceiling, as in the paper.

    Source: Saharia et al., "Imagen", arXiv:2205.11487, section 2.3; Lu et al., "DPM-Solver++",
    arXiv:2211.01095; code LuChengTHU/dpm-solver 52bc3fb dynamic_thresholding_fn.
    """

    clip: Any = field(default=None, kw_only=True)
    threshold: Any = field(default=None, kw_only=True)

    @property
    def clipping(self) -> tuple[float, float] | None:
        """(lo, hi) that x0 predictions are clipped to, or None."""
        return clip_range(self.name, self.clip)

    @property
    def thresholding(self) -> tuple[float, float] | None:
        """(quantile, floor) that x0 predictions are thresholded with, or None."""
        return threshold_pair(self.name, self.threshold)

    @property
    def limits(self) -> bool:
        """Whether x0 predictions are clipped or thresholded."""
        return self.clipping is not None or self.thresholding is not None

    def write_jump(self, rows: Rows, times: Array) -> None:
        self.limit(rows)  # the jump may be the only row
        super().write_jump(rows, times)

    def limit(self, rows: Rows) -> None:
        """Makes every evaluation of `rows` limit its x0."""
        rows.clip, rows.threshold = self.clipping, self.thresholding

    def check_limits(self, form: str) -> None:
        """Raises where the limits make no sense in this form ("epsilon", "x0", "auto")."""
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


def data_time(schedule: Schedule) -> float | None:
    """The time at which sigma = 0; None where the schedule has none."""
    lo = float(schedule.domain[0])
    return lo if float(schedule.sigma(lo)) == 0.0 else None


def clip_range(who: str, clip: Any) -> tuple[float, float] | None:
    """(lo, hi) from None, a bound (-> (-bound, bound)) or a pair."""
    if clip is None:
        return None
    try:
        if np.array(clip).dtype.kind in "SU":  # float() would read a number out of it
            raise TypeError
        lo, hi = (-float(clip), float(clip)) if np.ndim(clip) == 0 else map(float, clip)
    except OverflowError:
        raise ValueError(f"{who}: clip is finite; got {shown(clip)}.") from None
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
    except OverflowError:
        raise ValueError(f"{who}: threshold is finite; got {shown(threshold)}.") from None
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
        options = ", ".join(map(repr, allowed))
        raise ValueError(f"{who}: {name} is one of {options}; got {shown(value)}.")


def within(who: str, name: str, value: Any, lo: float, hi: float) -> None:
    """Raises unless value is a number in [lo, hi]."""
    number = real(who, name, value)
    if not lo <= number <= hi:
        raise ValueError(f"{who}: {name} lies in [{lo:g}, {hi:g}]; got {value!r}.")


class TooFewSteps(ValueError):
    """A run has fewer steps than its solver combines outputs; nothing of it is written."""


def enough_steps(who: str, order: int, times: Array) -> None:
    """Raises unless a run through `times` has the steps that combining `order` outputs needs."""
    steps = len(times) - 1
    if order > steps:
        raise TooFewSteps(
            f"{who}: it combines {order} outputs and needs at least as many "
            f"steps; got steps = {steps}. Take more steps or a lower order."
        )
