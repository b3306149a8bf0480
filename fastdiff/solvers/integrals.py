# SPDX-License-Identifier: Apache-2.0
"""Integrals of a network's statistics over a step: exact, or by the authors' trapezoids."""

from __future__ import annotations

import abc
import itertools
import math
from dataclasses import dataclass

import numpy as np

from ..schedules import Array
from .semilinear import Coefficient, LinearPart
from .statistics import ModelStatistics

_POWERS = 4  # a polynomial through four outputs at most
_WIDEST = 0.5  # of a panel in lambda: eight nodes are then exact to rounding
_NODES, _WEIGHTS = (0.5 * part for part in np.polynomial.legendre.leggauss(8))
_NODES = _NODES + 0.5
_EXPONENTS = np.arange(8)
# integrals from 0 to each node of the polynomial through values at the nodes
_UP_TO = (_NODES[:, None] ** (_EXPONENTS + 1) / (_EXPONENTS + 1)) @ np.linalg.inv(
    _NODES[:, None] ** _EXPONENTS
)


@dataclass
class Span:
    """Integrals from one lambda to another, relative to the first.

    Attributes:
        big_l, big_s: Integrals of l and s.
        big_b: Integral of e^{-(S - S_s)} b.
        moments: Integrals of e^{(L - L_s) + (S - S_s)} (lambda - lambda_s)^p.
        forced: Integral of e^{(L - L_s) + (S - S_s)} B.
    """

    big_l: Array
    big_s: Array
    big_b: Array
    moments: list[Array]
    forced: Array


class Integrated(LinearPart):
    """A linear part given by statistics; a subclass says how they are integrated."""

    def __init__(self, statistics: ModelStatistics) -> None:
        self.statistics = statistics
        self._spans: dict[tuple[float, float], Span] = {}

    @property
    def elementwise(self) -> bool:
        return self.statistics.shape != ()

    @abc.abstractmethod
    def place(self, t: float) -> float:
        """The lambda at which a time stands on the grid.

        Raises:
            ValueError: The time lies outside of it.
        """

    @abc.abstractmethod
    def integrate(self, start: float, end: float, length: float) -> Span:
        """The integrals from one lambda to a larger one; `length` is their exact difference."""

    def span(self, s: float, t: float) -> Span:
        """The integrals of the step from time s to time t."""
        key = self.place(s), self.place(t)
        if key not in self._spans:
            self._spans[key] = self.integrate(*key, float(self.statistics.schedule.h(s, t)))
        return self._spans[key]

    def offset(self, t: float) -> Coefficient:
        alpha = float(self.statistics.schedule.alpha(t))
        return (at(self.statistics, "l", self.place(t)) - 1.0) / alpha

    def step(self, s: float, t: float, count: int) -> tuple[Coefficient, list[Coefficient]]:
        alpha = self.statistics.schedule.alpha
        if float(self.statistics.schedule.sigma(t)) == 0.0:  # the step is to x0 itself, of order 1
            end = float(alpha(t))
            return -end * self.offset(s), [end]
        found = self.span(s, t)
        scale = float(alpha(t)) * np.exp(-found.big_l)
        return scale / float(alpha(s)), [scale * m for m in found.moments[:count]]

    def drift(self, s: float, t: float) -> Coefficient:
        if float(self.statistics.schedule.sigma(t)) == 0.0:
            return 0.0
        found = self.span(s, t)
        return float(self.statistics.schedule.alpha(t)) * np.exp(-found.big_l) * found.forced

    def node(self, s: float, at: float) -> tuple[Coefficient, Coefficient]:
        if at == s:
            return 1.0, 0.0
        if at < s:  # later in the run
            found = self.span(s, at)
            return np.exp(-found.big_s), found.big_b
        found = self.span(at, s)
        scale = np.exp(found.big_s)
        return scale, -scale * found.big_b


def interval(statistics: ModelStatistics, lam: float) -> int:
    """Number of the interval of the grid that lambda lies in, or is nearest to."""
    grid = statistics.lambda_grid
    return min(max(int(np.searchsorted(grid, lam)) - 1, 0), len(grid) - 2)


def at(statistics: ModelStatistics, name: str, lam: float) -> Array:
    """A statistic at one lambda, [*shape]."""
    grid, values = statistics.lambda_grid, getattr(statistics, name)
    i = interval(statistics, lam)
    part = (lam - grid[i]) / (grid[i + 1] - grid[i])
    value: Array = (1.0 - part) * values[i] + part * values[i + 1]
    return value


class Exact(Integrated):
    """The integrals of the piecewise linear statistics, to rounding, at any times of the grid."""

    def place(self, t: float) -> float:
        return self.statistics.inside(t)

    def integrate(self, start: float, end: float, length: float) -> Span:
        offsets = self.statistics.lambda_grid - start
        zero = np.zeros(self.statistics.shape)
        found = Span(zero, zero, zero, [zero] * _POWERS, zero)
        knots = [0.0, *offsets[(offsets > 0.0) & (offsets < length)].tolist(), length]
        for left, right in itertools.pairwise(knots):
            if right > left:
                pieces = math.ceil((right - left) / _WIDEST)
                ends = np.linspace(left, right, pieces + 1).tolist()
                for a, b in itertools.pairwise(ends):
                    self._add_panel(found, start, a, b)
        return found

    def _add_panel(self, found: Span, start: float, left: float, right: float) -> None:
        """Adds a panel, between two offsets from the start, on which l, s and b are linear."""
        width = right - left
        delta = (width * _NODES).reshape(-1, *[1] * len(self.statistics.shape))
        middle = start + 0.5 * (left + right)

        def linear(name: str) -> tuple[Array, Array]:
            """Value at the left end, and slope."""
            value = at(self.statistics, name, middle)
            i = interval(self.statistics, middle)
            knots, values = self.statistics.lambda_grid, getattr(self.statistics, name)
            slope = (values[i + 1] - values[i]) / (knots[i + 1] - knots[i])
            return value - 0.5 * width * slope, slope

        def integral(name: str, to: Array | float) -> Array:
            value, slope = linear(name)
            return to * (value + 0.5 * to * slope)

        big_l = found.big_l + integral("l", delta)
        big_s = found.big_s + integral("s", delta)
        value, slope = linear("b")
        inner = np.exp(-big_s) * (value + slope * delta)
        big_b = found.big_b + width * np.tensordot(_UP_TO, inner, 1)
        weighed = np.exp(big_l + big_s)
        offsets = left + width * _NODES
        found.moments = [
            m + width * np.tensordot(_WEIGHTS * offsets**p, weighed, 1)
            for p, m in enumerate(found.moments)
        ]
        found.forced = found.forced + width * np.tensordot(_WEIGHTS, weighed * big_b, 1)
        found.big_b = found.big_b + width * np.tensordot(_WEIGHTS, inner, 1)
        found.big_l = found.big_l + integral("l", width)
        found.big_s = found.big_s + integral("s", width)


class Trapezoids(Integrated):
    """The authors' integrals: trapezoids on the grid, between times that stand on it."""

    def place(self, t: float) -> float:
        lam = self.statistics.inside(t)
        grid = self.statistics.lambda_grid
        return float(grid[int(np.argmin(np.abs(grid - lam)))])

    def snapped(self, times: Array) -> Array:
        """The times moved to the grid.

        Raises:
            ValueError: Two of them fall on one point.
        """
        places = np.array([self.place(float(t)) for t in times])
        if (np.diff(places) <= 0).any():
            raise ValueError(
                f"dpm-v3: with published=True each time stands on a point of its own of the "
                f"statistics' grid of {self.statistics.intervals} intervals; got {len(times)} "
                "times, of which two fall on one point. Take fewer steps, or published=False."
            )
        moved: Array = self.statistics.schedule.t_of_lambda(places)
        return moved

    def integrate(self, start: float, end: float, length: float) -> Span:
        statistics = self.statistics
        grid = statistics.lambda_grid
        i, j = (int(np.searchsorted(grid, lam)) for lam in (start, end))
        part = slice(i, j + 1)
        shape = (-1, *[1] * len(statistics.shape))
        gaps = np.diff(grid[part]).reshape(shape)

        def cumulated(values: Array) -> Array:
            sums = np.cumsum(0.5 * gaps * (values[1:] + values[:-1]), 0)
            return np.concatenate([np.zeros_like(values[:1]), sums])

        big_l, big_s = cumulated(statistics.l[part]), cumulated(statistics.s[part])
        big_b = cumulated(np.exp(-big_s) * statistics.b[part])
        weighed = np.exp(big_l + big_s)
        offsets = (grid[part] - start).reshape(shape)
        return Span(
            big_l[-1],
            big_s[-1],
            big_b[-1],
            [cumulated(weighed * offsets**p)[-1] for p in range(_POWERS)],
            cumulated(weighed * big_b)[-1],
        )
