# SPDX-License-Identifier: Apache-2.0
"""A schedule from two callables."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._text import shown
from .base import (
    Array,
    FromScales,
    ScaledTime,
    Traits,
    as_array,
    positive,
    real,
    scale_of_unit_data,
)

Scale = Callable[[Array], ArrayLike]

# abs(lambda) of scales whose ratio is float64's rounding: one of them stands for 0.
_INFINITE = -math.log(np.finfo(np.float64).eps)


@dataclass(frozen=True, init=False, eq=False)
class Custom(ScaledTime, FromScales):
    """A schedule from two callables; lambda is inverted numerically.

    `to_dict` keeps the name and the numbers, never the functions. A schedule that is read back
    refuses whatever needs the functions, and equals every Custom of its name and numbers. Two
    schedules that both have functions are equal only if the functions are the same objects, too.

    Args:
        alpha, sigma: Functions of float64 arrays of times, to scales (a constant is legal); lambda
            strictly decreases with t. Accurate values near sigma = 0 matter: write
            sqrt(-expm1(2 log alpha)), not sqrt(1 - alpha²).
        t_range: (smallest, largest) time. sigma > 0 and alpha > 0 inside it.
        grid_range: Default (t_min, t_max) of grids. None takes t_range, moved inside by a
            thousandth where lambda is infinite. A scale below float64's rounding of the other, such
            as cos(pi/2) = 6e-17, counts as 0 there.
        time_scale: The network is told t * time_scale.
        name: Name by which the schedule is saved and printed.

    Raises:
        ValueError: lambda does not strictly decrease over the range.
        TypeError: alpha or sigma is not a function of arrays.
    """

    alpha_fn: Scale | None = field(repr=False)
    sigma_fn: Scale | None = field(repr=False)
    t_range: tuple[float, float]
    grid_range: tuple[float, float] | None
    time_scale: float
    name: str

    def __init__(
        self,
        alpha: Scale,
        sigma: Scale,
        t_range: tuple[float, float] = (0.0, 1.0),
        grid_range: tuple[float, float] | None = None,
        time_scale: float = 1.0,
        name: str = "custom",
    ) -> None:
        self._hold(alpha, sigma, t_range, grid_range, time_scale, name)
        nodes = np.linspace(*self.t_range, 1025)
        falls = np.diff(self.lambda_t(nodes)) < 0
        if not np.all(falls):
            bad = int(np.argmin(falls))
            raise ValueError(
                "Custom: lambda = log(alpha/sigma) strictly decreases with t; between t = "
                f"{nodes[bad]:.6g} and {nodes[bad + 1]:.6g} it does not. Check alpha and sigma."
            )

    @classmethod
    def by_name(
        cls,
        name: str,
        t_range: tuple[float, float] = (0.0, 1.0),
        grid_range: tuple[float, float] | None = None,
        time_scale: float = 1.0,
    ) -> Custom:
        """The schedule without its functions, as a file knows it."""
        made = object.__new__(cls)
        made._hold(None, None, t_range, grid_range, time_scale, name)
        return made

    def _hold(
        self,
        alpha: Scale | None,
        sigma: Scale | None,
        t_range: Any,
        grid_range: Any,
        time_scale: Any,
        name: Any,
    ) -> None:
        put = functools.partial(object.__setattr__, self)
        put("alpha_fn", alpha)
        put("sigma_fn", sigma)
        lo, hi = _pair("t_range", t_range)
        put("t_range", (lo, hi))
        put("grid_range", None if grid_range is None else _pair("grid_range", grid_range))
        put("time_scale", positive("Custom", "time_scale", time_scale))
        if not isinstance(name, str) or not name:
            raise TypeError(f"Custom: name is a string of at least one letter; got {shown(name)}.")
        put("name", name)
        if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
            raise ValueError(f"Custom: t_range is (lo, hi) with lo < hi; got {t_range!r}.")
        if self.grid_range and not lo <= self.grid_range[0] < self.grid_range[1] <= hi:
            raise ValueError(
                f"Custom: grid_range is (t_min, t_max) within t_range = {self.t_range}; "
                f"got {grid_range!r}."
            )

    @property
    def traits(self) -> Traits:
        floor = self._inside(0)
        lo, hi = self.grid_range or (floor, self._inside(1))
        return Traits(self.t_range, t_max=hi, t_min=lo, t_floor=floor)

    def describe(self) -> str:
        ranges = f"t_range={self.t_range}, grid_range={self.grid_range}"
        return f"{self.name!r}, {ranges}, time_scale={self.time_scale!r}"

    def _inside(self, end: int) -> float:
        value = self.t_range[end]
        if abs(float(self.lambda_t(value))) < _INFINITE:
            return value
        return value + (1e-3 if end == 0 else -1e-3) * (self.t_range[1] - self.t_range[0])

    def alpha(self, t: ArrayLike) -> Array:
        return self._scale("alpha", self.alpha_fn, as_array(t))

    def sigma(self, t: ArrayLike) -> Array:
        return self._scale("sigma", self.sigma_fn, as_array(t))

    def _scale(self, name: str, function: Scale | None, t: Array) -> Array:
        if function is None:
            raise ValueError(
                f"Custom {self.name!r} was loaded by its name alone, without its functions: give "
                "the schedule itself."
            )
        try:
            return np.array(np.broadcast_to(np.asarray(function(t), dtype=np.float64), t.shape))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Custom: {name} is a function of a float64 array, with its shape or a constant "
                f"(np.cos, not math.cos); at an array of shape {t.shape} it fails: {error}."
            ) from None

    def lambda_t(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    def h(self, s: ArrayLike, t: ArrayLike) -> Array:
        """lambda_t - lambda_s, as accurate as the difference of what the callables return."""
        return self.lambda_t(t) - self.lambda_t(s)

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        """The inverse of `lambda_t`, by bisection to the last float (1100 steps at most)."""
        target = as_array(lambda_t)
        lo = np.full(target.shape, self.t_range[0])
        hi = np.full(target.shape, self.t_range[1])
        at_lo, at_hi = self.lambda_t(lo), self.lambda_t(hi)
        slack = 1e-12 * (1.0 + np.abs(target))  # ends that went through exp and log
        target = np.where((target > at_lo) & (target <= at_lo + slack), at_lo, target)
        target = np.where((target < at_hi) & (target >= at_hi - slack), at_hi, target)
        if np.any(target > at_lo) or np.any(target < at_hi):
            raise ValueError(
                f"{self}: lambda lies in [{at_hi.min():.6g}, {at_lo.max():.6g}] over t_range; got "
                f"{target.min():.6g} to {target.max():.6g}."
            )
        while True:
            mid = 0.5 * (lo + hi)
            inside = (mid > lo) & (mid < hi)
            if not np.any(inside):
                break
            right = self.lambda_t(mid) > target
            lo, hi = np.where(inside & right, mid, lo), np.where(inside & ~right, mid, hi)
        at_lo, at_hi = self.lambda_t(lo), self.lambda_t(hi)
        with np.errstate(invalid="ignore"):  # inf - inf: decided by the equality
            nearer_lo = np.abs(at_lo - target) < np.abs(at_hi - target)
        return np.where(nearer_lo | (at_lo == target), lo, hi)

    def _dot(self, scale: Callable[[Array], Array], t: ArrayLike) -> Array:
        """Derivative by a fourth-order difference kept inside the range."""
        t = as_array(t)
        lo, hi = self.t_range
        step = np.maximum(1e-4 * (hi - lo) * np.ones_like(t), 1e-300)
        center = np.clip(t, lo + 2.0 * step, hi - 2.0 * step)
        # five-point Lagrange derivative at t from nodes centre + k step
        nodes = np.stack([center + k * step for k in range(-2, 3)])
        values = np.stack([scale(node) for node in nodes])
        total = np.zeros_like(t)
        for j in range(5):
            slope = np.zeros_like(t)
            for m in range(5):
                if m == j:
                    continue
                product = 1.0 / (nodes[j] - nodes[m])
                for k in range(5):
                    if k not in (j, m):
                        product = product * (t - nodes[k]) / (nodes[j] - nodes[k])
                slope = slope + product
            total = total + values[j] * slope
        return total

    def alpha_dot(self, t: ArrayLike) -> Array:
        """d alpha / dt by a five-point difference: about ten digits for smooth callables."""
        return self._dot(self.alpha, t)

    def sigma_dot(self, t: ArrayLike) -> Array:
        """d sigma / dt by a five-point difference: about ten digits for smooth callables."""
        return self._dot(self.sigma, t)

    def prior_scale(self, t: float) -> float:
        return scale_of_unit_data(self, t)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "Custom",
            "name": self.name,
            "t_range": [*self.t_range],
            "grid_range": None if self.grid_range is None else [*self.grid_range],
            "time_scale": self.time_scale,
        }

    def _known(self) -> tuple[Any, ...]:
        return self.name, self.t_range, self.grid_range, self.time_scale

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Custom):
            return NotImplemented
        named = self.alpha_fn is None or other.alpha_fn is None
        same = (self.alpha_fn, self.sigma_fn) == (other.alpha_fn, other.sigma_fn)
        return self._known() == other._known() and (named or same)

    def __hash__(self) -> int:
        return hash(self._known())


def _pair(name: str, values: Any) -> tuple[float, float]:
    if not isinstance(values, list | tuple | np.ndarray) or len(values) != 2:
        raise TypeError(f"Custom: {name} is a pair of numbers; got {shown(values)}.")
    lo, hi = (real("Custom", name, value) for value in values)
    return lo, hi
