# SPDX-License-Identifier: Apache-2.0
"""Pacing: how long the next step of an adaptive run is, and whether the last one is kept.

An error is in units of the tolerance: a step of error 1 is as long as it may be. Everything here is
float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

_LEAST = 1e-10  # an error below it lengthens the step as much as 0 does


class Controller(Protocol):
    """Decides the steps of one sample, or those of a batch that shares them.

    Attributes:
        published: Whether this is a loop that somebody published: an error is taken relative to
            what the lower order gave at the step before, and the evaluation at the start of a step
            that is refused is made again.
    """

    published: bool

    def arrived(self, left: float, times: float) -> bool:
        """Whether a run ends here, `left` of its progress and `times` of its time from the end."""
        ...

    def length(self, left: float) -> float:
        """Length of the next step; `left` takes it to the end."""
        ...

    def keeps(self, error: float) -> bool:
        """Whether the step is kept; the next one is as long as its error allows."""
        ...

    def joined(self, errors: Sequence[float]) -> float:
        """One error for samples that share their steps, of the errors of all."""
        ...


@dataclass
class PI:
    """A proportional-integral controller.

    The next step is longer by 0.9 E^(-0.7/k) E_before^(0.4/k), between 1/5 and 5; after a step that
    is refused by at most 0.9 E^(-1/k), and the first one after that does not grow.

    Source: Gustafsson, "Control theoretic techniques for stepsize selection in explicit Runge-Kutta
    methods", ACM TOMS 17 (1991); exponents of Hairer & Wanner, "Solving ODEs II", IV.2.
    """

    order: int
    h: float
    published: bool = field(default=False, init=False)
    _before: float = field(default=1.0, init=False)
    _refused: bool = field(default=False, init=False)

    def arrived(self, left: float, times: float) -> bool:
        return times == 0.0

    def length(self, left: float) -> float:
        if self.h * 1.01 >= left:
            self.h = left
        elif self.h * 2.0 > left:  # two steps alike, and no short one
            self.h = 0.5 * left
        return self.h

    def keeps(self, error: float) -> bool:
        error = max(error, _LEAST)
        if error > 1.0:
            self.h *= max(0.2, 0.9 * error ** (-1.0 / self.order))
            self._refused = True
            return False
        factor = 0.9 * error ** (-0.7 / self.order) * self._before ** (0.4 / self.order)
        self.h *= min(max(factor, 0.2), 1.0 if self._refused else 5.0)
        self._before, self._refused = max(error, 1e-4), False
        return True

    def joined(self, errors: Sequence[float]) -> float:
        return _worst(errors)


@dataclass
class Authors:
    """The loop of LuChengTHU/dpm-solver 52bc3fb, dpm_solver_adaptive, with its theta and t_err."""

    order: int
    h: float
    published: bool = field(default=True, init=False)

    def arrived(self, left: float, times: float) -> bool:
        return abs(times) <= 1e-5

    def length(self, left: float) -> float:
        self.h = min(self.h, left)
        return self.h

    def keeps(self, error: float) -> bool:
        factor = np.float32(max(error, _LEAST) ** (-1.0 / self.order))  # their cast
        self.h *= 0.9 * float(factor)
        return error <= 1.0

    def joined(self, errors: Sequence[float]) -> float:
        return _worst(errors)


@dataclass
class KDiffusion:
    """The loop of crowsonkb/k-diffusion 4601bf0, sample_dpm_adaptive: its PID controller as it is
    by default, integral alone, with its limiter."""

    order: int
    h: float
    published: bool = field(default=True, init=False)

    def arrived(self, left: float, times: float) -> bool:
        return left <= 1e-5

    def length(self, left: float) -> float:
        return min(self.h, left)

    def keeps(self, error: float) -> bool:
        factor = (1.0 / (error + 1e-8)) ** (1.0 / self.order)
        factor = 1.0 + math.atan(factor - 1.0)
        self.h *= factor
        return factor >= 0.81

    def joined(self, errors: Sequence[float]) -> float:
        return math.sqrt(math.fsum(error * error for error in errors) / len(errors))


def _worst(errors: Sequence[float]) -> float:
    """The largest; NaN where there is one."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@dataclass
class Track:
    """The way of some samples that share their steps, one in all but published loops.

    Attributes:
        samples: Their places in the batch.
        controller: See `Controller`.
        times: Times that were accepted so far; the last is where the samples stand.
        goal: Where the attempt under way would take them.
        nfe, refused: Evaluations, and steps that were refused.
        known: Whether the evaluation at the start of the next step is made already.
        first: The slot that holds it, or will.
        restore: Whether the state has to be put back to where the attempt began.
        error: Error of the last attempt.
        done: Whether they have arrived.
    """

    samples: list[int]
    controller: Controller
    times: list[float]
    goal: float = 0.0
    nfe: int = 0
    refused: int = 0
    known: bool = False
    first: int = 0
    restore: bool = False
    error: float = math.nan
    done: bool = False
