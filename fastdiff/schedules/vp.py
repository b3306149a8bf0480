# SPDX-License-Identifier: Apache-2.0
"""Variance preserving schedules: alpha² + sigma² = 1."""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .base import (
    Array,
    FromScales,
    ScaledTime,
    Schedule,
    Traits,
    as_array,
    log_ratio,
    plain_record,
    plain_text,
    positive,
    real,
    scale_of_unit_data,
)

UNIT_TIME = (0.0, 1.0)
_T_MIN = 1e-3  # the end that the literature samples to


class FromLogAlpha(Schedule):
    """A variance preserving schedule from log alpha alone."""

    @abc.abstractmethod
    def log_alpha(self, t: ArrayLike) -> Array:
        """log alpha_t <= 0."""

    @abc.abstractmethod
    def log_alpha_rise(self, s: ArrayLike, t: ArrayLike) -> Array:
        """log alpha_t - log alpha_s, without its cancellation."""

    @abc.abstractmethod
    def log_alpha_dot(self, t: ArrayLike) -> Array:
        """d log alpha / dt <= 0."""

    @abc.abstractmethod
    def t_of_log_alpha(self, log_alpha: Array) -> Array:
        """The inverse of `log_alpha`."""

    def alpha(self, t: ArrayLike) -> Array:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: ArrayLike) -> Array:
        return np.sqrt(-np.expm1(2.0 * self.log_alpha(t)))

    def lambda_t(self, t: ArrayLike) -> Array:
        log_alpha = self.log_alpha(t)
        with np.errstate(divide="ignore"):
            return log_alpha - 0.5 * np.log(-np.expm1(2.0 * log_alpha))

    def h(self, s: ArrayLike, t: ArrayLike) -> Array:
        rise = self.log_alpha_rise(s, t)
        # sigma_t² - sigma_s² = alpha_s² - alpha_t²
        gain = -(self.alpha(s) ** 2) * np.expm1(2.0 * rise)
        return rise - 0.5 * log_ratio(self.sigma(s) ** 2, self.sigma(t) ** 2, gain)

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        return self.t_of_log_alpha(-0.5 * np.logaddexp(0.0, -2.0 * as_array(lambda_t)))

    def alpha_dot(self, t: ArrayLike) -> Array:
        return self.alpha(t) * self.log_alpha_dot(t)

    def sigma_dot(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -(self.alpha(t) ** 2) * self.log_alpha_dot(t) / self.sigma(t)

    def rho(self, t: ArrayLike) -> Array:
        return np.exp(-self.lambda_t(t))

    def f(self, t: ArrayLike) -> Array:
        return self.log_alpha_dot(t)

    def g2(self, t: ArrayLike) -> Array:
        return -2.0 * self.log_alpha_dot(t)

    def prior_scale(self, t: float) -> float:
        return scale_of_unit_data(self, t)


@dataclass(frozen=True)
class VPLinear(ScaledTime, FromLogAlpha):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1].

    Args:
        beta_min, beta_max: Rates at t = 0 and t = 1; 0 < beta_min <= beta_max.
        time_scale: The network is told t * time_scale (1000 for networks trained on indices).

    Source: Song et al., "Score-Based Generative Modeling through SDEs", arXiv:2011.13456, eq. 32.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("beta_min", positive("VPLinear", "beta_min", self.beta_min))
        put("time_scale", positive("VPLinear", "time_scale", self.time_scale))
        put("beta_max", real("VPLinear", "beta_max", self.beta_max))
        if not (math.isfinite(self.beta_max) and self.beta_max >= self.beta_min):
            raise ValueError(
                f"VPLinear: beta_max is finite and at least beta_min = {self.beta_min}; "
                f"got {self.beta_max!r}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(UNIT_TIME, t_max=1.0, t_min=_T_MIN, t_floor=_T_MIN)

    def log_alpha(self, t: ArrayLike) -> Array:
        t = as_array(t)
        return -(0.25 * (self.beta_max - self.beta_min) * t + 0.5 * self.beta_min) * t

    def log_alpha_rise(self, s: ArrayLike, t: ArrayLike) -> Array:
        s, t = as_array(s), as_array(t)
        slope = 0.25 * (self.beta_max - self.beta_min) * (s + t) + 0.5 * self.beta_min
        return (s - t) * slope

    def log_alpha_dot(self, t: ArrayLike) -> Array:
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * as_array(t))

    def t_of_log_alpha(self, log_alpha: Array) -> Array:
        # The root of (d/4) t² + (b/2) t + log_alpha = 0 in the form without cancellation.
        b, d = 0.5 * self.beta_min, self.beta_max - self.beta_min
        return -2.0 * log_alpha / (b + np.sqrt(b * b - d * log_alpha))

    def to_dict(self) -> dict[str, Any]:
        return plain_record(self)

    def describe(self) -> str:
        return plain_text(self)


def _sine_ratio(start: Array, end: Array, change: Array) -> Array:
    """log(sin(end)/sin(start)) of angles in [0, pi], given change = end - start."""
    rise = 2.0 * np.cos(0.5 * (start + end)) * np.sin(0.5 * change)
    return log_ratio(np.sin(start), np.sin(end), rise)


@dataclass(frozen=True)
class VPCosine(ScaledTime, FromScales):
    """Variance preserving, alpha_t = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)), t in [0, 1].

    alpha is 0 at t = 1, so that grids start at t_max = 0.9946 by default, as DPM-Solver's do.

    Args:
        s: Offset; s >= 0.
        time_scale: The network is told t * time_scale.

    Source: Nichol & Dhariwal, "Improved DDPM", arXiv:2102.09672, eq. 17; t_max from Lu et al.,
    arXiv:2206.00927, appendix D.
    """

    s: float = 0.008
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("time_scale", positive("VPCosine", "time_scale", self.time_scale))
        put("s", real("VPCosine", "s", self.s))
        if not (math.isfinite(self.s) and self.s >= 0):
            raise ValueError(f"VPCosine: s is at least 0 and finite; got {self.s!r}.")

    @property
    def traits(self) -> Traits:
        return Traits(UNIT_TIME, t_max=0.9946, t_min=_T_MIN, t_floor=_T_MIN)

    @property
    def _theta_0(self) -> float:
        return 0.5 * math.pi * self.s / (1.0 + self.s)

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def alpha(self, t: ArrayLike) -> Array:
        # cos(theta) through its distance to pi/2, exact to rounding where alpha -> 0.
        return np.sin(self._rate * (1.0 - as_array(t))) / math.cos(self._theta_0)

    def sigma(self, t: ArrayLike) -> Array:
        # cos²(theta_0) sigma² = sin²(theta) - sin²(theta_0), written without the difference.
        turn = self._rate * as_array(t)
        product = np.sin(turn) * np.sin(turn + 2.0 * self._theta_0)
        return np.sqrt(product) / math.cos(self._theta_0)

    def lambda_t(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    def h(self, s: ArrayLike, t: ArrayLike) -> Array:
        s, t = as_array(s), as_array(t)
        turn_s, turn_t = self._rate * s, self._rate * t
        turned = self._rate * (t - s)
        # alpha = sin(rate - turn) / c, sigma² = sin(turn) sin(turn + 2 theta_0) / c²
        of_alpha = _sine_ratio(self._rate * (1.0 - s), self._rate * (1.0 - t), -turned)
        of_sigma = _sine_ratio(turn_s, turn_t, turned)
        wide = 2.0 * self._theta_0
        return of_alpha - 0.5 * (of_sigma + _sine_ratio(turn_s + wide, turn_t + wide, turned))

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        # tan²(theta) = (rho² + sin²(theta_0)) / cos²(theta_0); theta - theta_0 by the tangent rule.
        lam = as_array(lambda_t)
        c, tan_0 = math.cos(self._theta_0), math.tan(self._theta_0)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            rho = np.exp(-lam) / c
            tan = np.hypot(rho, tan_0)
            turn = np.arctan(rho * rho / (tan + tan_0) / (1.0 + tan * tan_0))
            # beyond rho = 1e8 the product overflows the rule: theta = pi/2 - atan(1/tan)
            far = 0.5 * math.pi - np.arctan(1.0 / tan) - self._theta_0
        if tan_0 == 0.0:
            turn = np.arctan(rho)
        return np.where(rho > 1e3, far, np.where(rho == 0.0, 0.0, turn)) / self._rate

    def alpha_dot(self, t: ArrayLike) -> Array:
        return -self._rate * np.cos(self._rate * (1.0 - as_array(t))) / math.cos(self._theta_0)

    def sigma_dot(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def prior_scale(self, t: float) -> float:
        return scale_of_unit_data(self, t)

    def to_dict(self) -> dict[str, Any]:
        return plain_record(self)

    def describe(self) -> str:
        return plain_text(self)
