# SPDX-License-Identifier: Apache-2.0
"""Empirical model statistics: l, s and b of a network on a grid of lambda, and their integrals."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..schedules import Array, Schedule, prediction_name

_AT_END = 1e-9  # in lambda: so near an end of the grid a time stands on it


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """l, s and b of a network on a grid of lambda, linear between its points.

    Args:
        schedule: The schedule that they were estimated on.
        l, s, b: float64 [M + 1, *shape], or [M + 1] for numbers that all elements share.
        lambda_grid: The M + 1 values of lambda, increasing; None: uniform from the schedule's t_max
            to its t_min (to its least sigma > 0), where the authors' files have them.
        prediction: What the network returns.

    Raises:
        ValueError: Shapes differ, a value is not finite, or lambda does not increase.
        TypeError: schedule is none.

    Source: Zheng et al., "DPM-Solver-v3", arXiv:2310.13268, section 3.
    """

    schedule: Schedule
    l: Array
    s: Array
    b: Array
    lambda_grid: Any = None
    prediction: str = field(default="epsilon", kw_only=True)

    def __post_init__(self) -> None:
        who = "statistics"
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"{who}: schedule is a fastdiff.schedules.Schedule; got {self.schedule!r}."
            )
        object.__setattr__(self, "prediction", prediction_name(self.prediction))
        for name in ("l", "s", "b"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        grid = self.lambda_grid
        if grid is None:
            first, last = (float(self.schedule.lambda_t(t)) for t in default_ends(self.schedule))
            grid = np.linspace(first, last, len(np.atleast_1d(self.l)))
        object.__setattr__(self, "lambda_grid", _frozen(grid))
        lam = self.lambda_grid
        if lam.ndim != 1 or len(lam) < 2 or not np.isfinite(lam).all() or (np.diff(lam) <= 0).any():
            raise ValueError(
                f"{who}: lambda_grid has at least two finite values that increase; got "
                f"{lam.shape} from {lam.flat[0] if lam.size else None} on."
            )
        for name in ("l", "s", "b"):
            value = getattr(self, name)
            if value.shape != self.l.shape or value.shape[:1] != lam.shape:
                raise ValueError(
                    f"{who}: l, s and b are [{len(lam)}, *shape], one entry a point of "
                    f"lambda_grid; got {name} of shape {value.shape} and l of {self.l.shape}."
                )
            if not np.isfinite(value).all():
                raise ValueError(f"{who}: {name} is finite; got NaN or infinity in it.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample; () for numbers that all elements share."""
        return self.l.shape[1:]

    @property
    def intervals(self) -> int:
        """Intervals M of the grid."""
        return len(self.lambda_grid) - 1

    @functools.cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the numbers, the schedule and the prediction."""
        head = json.dumps([self.schedule.to_dict(), self.prediction, self.l.shape], sort_keys=True)
        digest = hashlib.sha256(head.encode())
        for name in ("lambda_grid", "l", "s", "b"):
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()[:12]

    def inside(self, t: float) -> float:
        """lambda at a time of the grid.

        Raises:
            ValueError: The grid does not reach it.
        """
        lam = float(self.schedule.lambda_t(t))
        first, last = float(self.lambda_grid[0]), float(self.lambda_grid[-1])
        if not first - _AT_END <= lam <= last + _AT_END:
            ends = self.schedule.t_of_lambda([first, last])
            raise ValueError(
                f"statistics: times lie where they were estimated, from t = {ends[0]:.6g} to "
                f"{ends[1]:.6g}; got t = {t:.6g}. Set t_max and t_min, or estimate them there."
            )
        return min(max(lam, first), last)

    def __repr__(self) -> str:
        what = f"{self.intervals} intervals, samples of shape {self.shape}, digest {self.digest}"
        return f"{type(self).__name__}({self.schedule}, {self.prediction!r}, {what})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelStatistics) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def check_plan(self, schedule: Schedule, prediction: str) -> None:
        """Raises where a plan of this schedule and prediction cannot take the statistics."""
        if schedule != self.schedule:
            raise ValueError(
                f"statistics: they belong to the schedule that they were estimated on, "
                f"{self.schedule}; got {schedule}. Estimate them again with fastdiff.tune.ems."
            )
        if prediction != self.prediction:
            raise ValueError(
                f"statistics: they belong to a network that predicts {self.prediction!r}; got a "
                f"plan of prediction={prediction!r}. Give the plan the network's own prediction."
            )


def default_ends(schedule: Schedule) -> tuple[float, float]:
    """(t_max, t_min) of a schedule, or of its least sigma > 0 where t_min is at sigma = 0."""
    to_data = float(schedule.sigma(schedule.t_min)) == 0.0
    return schedule.t_max, schedule.t_floor if to_data else schedule.t_min


def _frozen(values: ArrayLike) -> Array:
    array = np.array(values, dtype=np.float64, order="C")
    array.setflags(write=False)
    return array
