# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: alpha(t), sigma(t) and everything that follows from them, in float64.

A schedule says x_t = alpha_t x0 + sigma_t eps. Time runs from noise (large) to data (small), and
lambda_t = log(alpha_t / sigma_t) grows along a run. Every method takes a time or an array of times
and returns float64 of the same shape. Infinite limits are values, not errors: lambda is +inf where
sigma = 0 and -inf where alpha = 0.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._text import unknown

Array = NDArray[np.float64]

PREDICTIONS = ("epsilon", "x0", "v", "velocity", "score", "edm")
_ALIASES = {
    "eps": "epsilon",
    "noise": "epsilon",
    "sample": "x0",
    "data": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}

__all__ = [
    "EDM",
    "PREDICTIONS",
    "VE",
    "Custom",
    "FlowMatching",
    "Schedule",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "prediction_name",
]


def prediction_name(prediction: str) -> str:
    """The canonical name of a prediction; diffusers' names are accepted.

    Raises:
        ValueError: The name is unknown (the nearest is suggested).
    """
    name = _ALIASES.get(prediction, prediction) if isinstance(prediction, str) else prediction
    if name not in PREDICTIONS:
        raise unknown("prediction", "prediction", prediction, PREDICTIONS)
    return name


def _array(t: ArrayLike) -> Array:
    return np.asarray(t, dtype=np.float64)


def _number(who: str, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{who}: {name} is a number; got {value!r}.")


def _positive(who: str, **values: float) -> None:
    _number(who, **values)
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{who}: {name} is positive and finite; got {value!r}.")


def _values(values: Any) -> Array:
    """A float64 copy of a sequence, array or tensor."""
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().cpu().numpy()
    return np.array(values, dtype=np.float64)


@dataclass(frozen=True)
class Schedule(abc.ABC):
    """A noise schedule. Subclasses give the signal's and the noise's scale, and their inverse.

    Attributes:
        domain: (smallest, largest) time at which the schedule is defined.
        t_max: Where a sampling grid starts unless told otherwise.
        t_min: Where it ends unless told otherwise.
        default_grid: Grid that `grid="auto"` stands for.
    """

    @property
    def domain(self) -> tuple[float, float]:
        return (0.0, 1.0)

    @property
    def t_max(self) -> float:
        return self.domain[1]

    @property
    def t_min(self) -> float:
        return 1e-3

    @property
    def t_floor(self) -> float:
        """Smallest time with sigma > 0 that grids use: where one ending at sigma = 0 steps from."""
        return self.t_min if self.t_min > 0.0 else 1e-3

    @property
    def default_grid(self) -> str:
        return "logsnr"

    @property
    def knots(self) -> Array:
        """Times at which the schedule's derivative jumps, increasing; quadrature splits there."""
        return np.empty(0)

    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> Array:
        """Signal scale alpha_t."""

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> Array:
        """Noise scale sigma_t, accurate to rounding down to sigma = 0."""

    @abc.abstractmethod
    def lambda_t(self, t: ArrayLike) -> Array:
        """lambda_t = log(alpha_t / sigma_t): half the log signal-to-noise ratio."""

    @abc.abstractmethod
    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        """The inverse of `lambda_t`."""

    @abc.abstractmethod
    def alpha_dot(self, t: ArrayLike) -> Array:
        """d alpha / dt; at a knot, of the piece on its larger-t side."""

    @abc.abstractmethod
    def sigma_dot(self, t: ArrayLike) -> Array:
        """d sigma / dt; infinite where the noise starts like sqrt(t)."""

    def rho(self, t: ArrayLike) -> Array:
        """sigma_t / alpha_t = exp(-lambda_t)."""
        return np.exp(-self.lambda_t(t))

    def f(self, t: ArrayLike) -> Array:
        """Drift of the forward SDE dx = f x dt + g dw: d log alpha / dt."""
        with np.errstate(divide="ignore"):
            return self.alpha_dot(t) / self.alpha(t)

    def g2(self, t: ArrayLike) -> Array:
        """Squared diffusion of that SDE, d sigma²/dt - 2 f sigma² = -2 sigma² d lambda/dt."""
        with np.errstate(divide="ignore", invalid="ignore"):
            sigma = self.sigma(t)
            return 2.0 * sigma * (self.sigma_dot(t) - self.f(t) * sigma)

    def prior_scale(self, t: float) -> float:
        """Standard deviation of the starting noise at t: sqrt(alpha² + sigma²) for unit data."""
        return float(np.hypot(self.alpha(t), self.sigma(t)))

    def model_time(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        """The time the network is told at t."""
        return _array(t) * getattr(self, "time_scale", 1.0)

    def time_of_model(self, model_time: ArrayLike, prediction: str = "epsilon") -> Array:
        """The inverse of `model_time`."""
        return _array(model_time) / getattr(self, "time_scale", 1.0)

    def c_in(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        """The network is given c_in * x."""
        return np.ones_like(_array(t))

    def components(self, quantity: str, t: ArrayLike) -> tuple[Array, Array]:
        """(u, w) with quantity = u x0 + w eps at time t.

        Args:
            quantity: One of PREDICTIONS, or "x" for the state itself.
            t: Times.
        """
        t = _array(t)
        zero, one = np.zeros_like(t), np.ones_like(t)
        if quantity == "x":
            return self.alpha(t), self.sigma(t)
        quantity = prediction_name(quantity)
        if quantity == "epsilon":
            return zero, one
        if quantity == "x0":
            return one, zero
        if quantity == "v":
            return -self.sigma(t), self.alpha(t)
        if quantity == "velocity":
            return self.alpha_dot(t), self.sigma_dot(t)
        if quantity == "score":
            with np.errstate(divide="ignore"):
                return zero, -1.0 / self.sigma(t)
        # EDM's F = (x0 - c_skip x/alpha) / c_out with s = sigma/alpha; arXiv:2206.00364, Table 1.
        if not isinstance(self, EDM):
            raise ValueError(
                f"{self}: prediction 'edm' is the raw network of EDM's preconditioning, which "
                "belongs to the EDM schedule (c_in, log(sigma)/4, sigma_data). Use "
                "fastdiff.schedules.EDM, or a network that predicts x0."
            )
        s, d = self.rho(t), self.sigma_data
        root = np.hypot(s, d)
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(s), 1.0, s / root) / d, -d / root

    def conversion(self, source: str, target: str, t: float) -> tuple[float, float]:
        """(p, q) with target = p x + q source at time t: predictions are linear in each other.

        Args:
            source, target: Names in PREDICTIONS.
            t: One time.

        Raises:
            ValueError: At this t the target does not follow from the source (an x0 from an epsilon
                where alpha = 0, an epsilon from an x0 where sigma = 0).
        """
        if prediction_name(source) == prediction_name(target):
            return 0.0, 1.0
        (alpha, sigma), (u, w), (u_new, w_new) = (
            self.components(quantity, t) for quantity in ("x", source, target)
        )
        with np.errstate(all="ignore"):
            det = alpha * w - sigma * u
            p, q = (u_new * w - w_new * u) / det, (alpha * w_new - sigma * u_new) / det
        if not (np.isfinite(p) and np.isfinite(q)):
            raise ValueError(
                f"{self}: {target} does not follow from {source} at t = {t} "
                f"(alpha = {float(alpha):.3g}, sigma = {float(sigma):.3g}). Keep t_max and t_min "
                "away from this end, or use a network that predicts v or velocity."
            )
        return float(p), float(q)

    def __str__(self) -> str:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.repr}
        shown = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class _VariancePreserving(Schedule):
    """alpha² + sigma² = 1, from log alpha alone."""

    @abc.abstractmethod
    def log_alpha(self, t: ArrayLike) -> Array:
        """log alpha_t <= 0."""

    @abc.abstractmethod
    def log_alpha_dot(self, t: ArrayLike) -> Array:
        """d log alpha / dt <= 0."""

    @abc.abstractmethod
    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        """The inverse of `log_alpha`."""

    def alpha(self, t: ArrayLike) -> Array:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: ArrayLike) -> Array:
        return np.sqrt(-np.expm1(2.0 * self.log_alpha(t)))

    def lambda_t(self, t: ArrayLike) -> Array:
        log_alpha = self.log_alpha(t)
        with np.errstate(divide="ignore"):
            return log_alpha - 0.5 * np.log(-np.expm1(2.0 * log_alpha))

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        return self._t_of_log_alpha(-0.5 * np.logaddexp(0.0, -2.0 * _array(lambda_t)))

    def alpha_dot(self, t: ArrayLike) -> Array:
        return self.alpha(t) * self.log_alpha_dot(t)

    def sigma_dot(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -(self.alpha(t) ** 2) * self.log_alpha_dot(t) / self.sigma(t)

    def f(self, t: ArrayLike) -> Array:
        return self.log_alpha_dot(t)

    def g2(self, t: ArrayLike) -> Array:
        return -2.0 * self.log_alpha_dot(t)


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
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
        _positive("VPLinear", beta_min=self.beta_min, time_scale=self.time_scale)
        _number("VPLinear", beta_max=self.beta_max)
        if not (math.isfinite(self.beta_max) and self.beta_max >= self.beta_min):
            raise ValueError(
                f"VPLinear: beta_max is finite and at least beta_min = {self.beta_min}; "
                f"got {self.beta_max!r}."
            )

    def log_alpha(self, t: ArrayLike) -> Array:
        t = _array(t)
        return -(0.25 * (self.beta_max - self.beta_min) * t + 0.5 * self.beta_min) * t

    def log_alpha_dot(self, t: ArrayLike) -> Array:
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * _array(t))

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        # The root of (d/4) t² + (b/2) t + log_alpha = 0 in the form without cancellation.
        b, d = 0.5 * self.beta_min, self.beta_max - self.beta_min
        return -2.0 * log_alpha / (b + np.sqrt(b * b - d * log_alpha))


@dataclass(frozen=True)
class VPCosine(Schedule):
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
        _positive("VPCosine", time_scale=self.time_scale)
        _number("VPCosine", s=self.s)
        if not (math.isfinite(self.s) and self.s >= 0):
            raise ValueError(f"VPCosine: s is at least 0 and finite; got {self.s!r}.")

    @property
    def t_max(self) -> float:
        return 0.9946

    @property
    def _theta_0(self) -> float:
        return 0.5 * math.pi * self.s / (1.0 + self.s)

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def alpha(self, t: ArrayLike) -> Array:
        # cos(theta) through its distance to pi/2, exact to rounding where alpha -> 0.
        return np.sin(self._rate * (1.0 - _array(t))) / math.cos(self._theta_0)

    def sigma(self, t: ArrayLike) -> Array:
        # cos²(theta_0) sigma² = sin²(theta) - sin²(theta_0), written without the difference.
        turn = self._rate * _array(t)
        product = np.sin(turn) * np.sin(turn + 2.0 * self._theta_0)
        return np.sqrt(product) / math.cos(self._theta_0)

    def lambda_t(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        # tan²(theta) = (rho² + sin²(theta_0)) / cos²(theta_0); theta - theta_0 by the tangent rule.
        lam = _array(lambda_t)
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
        return -self._rate * np.cos(self._rate * (1.0 - _array(t))) / math.cos(self._theta_0)

    def sigma_dot(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)


@dataclass(frozen=True, eq=False)
class VPDiscrete(_VariancePreserving):
    """Variance preserving on N training steps: index i stands at t = (i + 1)/N, data at t = 0.

    log alpha is linear in t between the training steps and between the first one and t = 0, where
    alpha = 1. The network is told the index as a float: model_time = N t - 1.

    Args:
        alphas_cumprod: alpha² at the N >= 1 training steps, strictly decreasing in (0, 1), [N].
            (diffusers' `alphas_cumprod`.)
        betas: Given instead: alphas_cumprod = cumprod(1 - betas).

    Raises:
        ValueError: Neither or both are given, or the values are out of range. A last value of 0
            (zero terminal SNR) has lambda = -inf and is refused; drop that step.

    Source: Ho et al., "DDPM", arXiv:2006.11239; the continuous extension is DPM-Solver's
    (Lu et al., arXiv:2206.00927, appendix D).
    """

    alphas_cumprod: Any = field(default=None, repr=False)
    betas: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.alphas_cumprod is None) == (self.betas is None):
            raise ValueError(
                "VPDiscrete: give exactly one of alphas_cumprod and betas; got "
                + ("neither." if self.betas is None else "both.")
            )
        if self.betas is not None:
            betas = _values(self.betas)
            if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas < 1)):
                raise ValueError(
                    "VPDiscrete: betas is a non-empty sequence of values in (0, 1); got shape "
                    f"{betas.shape}, values {_span(betas)}."
                )
            log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
        else:
            product = _values(self.alphas_cumprod)
            good = product.ndim == 1 and product.size and np.all((product > 0) & (product < 1))
            if not good or not np.all(np.diff(product) < 0):
                raise ValueError(
                    "VPDiscrete: alphas_cumprod strictly decreases within (0, 1); got shape "
                    f"{product.shape}, values {_span(product)}. It is alpha², newest step last."
                )
            log_alpha = 0.5 * np.log(product)
        log_alpha = np.concatenate([[0.0], log_alpha])
        log_alpha.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", np.exp(2.0 * log_alpha[1:]))
        object.__setattr__(self, "betas", -np.expm1(2.0 * np.diff(log_alpha)))
        object.__setattr__(self, "_log_alpha", log_alpha)

    _log_alpha: Any = field(default=None, init=False, repr=False)

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = 1000
    ) -> VPDiscrete:
        """Betas uniform from beta_start to beta_end (DDPM)."""
        return cls(betas=np.linspace(beta_start, beta_end, num_steps))

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_steps: int = 1000
    ) -> VPDiscrete:
        """sqrt(beta) uniform from beta_start to beta_end (Stable Diffusion)."""
        return cls(betas=np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)

    @property
    def num_steps(self) -> int:
        """Training steps N."""
        return len(self._log_alpha) - 1

    @property
    def t_min(self) -> float:
        return 1.0 / self.num_steps

    @functools.cached_property
    def _knots(self) -> Array:
        return np.arange(self.num_steps + 1) / self.num_steps

    @property
    def knots(self) -> Array:
        return self._knots

    def log_alpha(self, t: ArrayLike) -> Array:
        return np.interp(_array(t), self._knots, self._log_alpha)

    def log_alpha_dot(self, t: ArrayLike) -> Array:
        piece = np.clip(np.floor(_array(t) * self.num_steps).astype(int), 0, self.num_steps - 1)
        return (np.diff(self._log_alpha) * self.num_steps)[piece]

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        return np.interp(-log_alpha, -self._log_alpha, self._knots)

    def model_time(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        index = _array(t) * self.num_steps - 1.0
        nearest = np.round(index)  # a training step is told its index exactly
        return np.where(np.abs(index - nearest) < 1e-9 * self.num_steps, nearest, index)

    def time_of_model(self, model_time: ArrayLike, prediction: str = "epsilon") -> Array:
        return (_array(model_time) + 1.0) / self.num_steps

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VPDiscrete):
            return NotImplemented
        return np.array_equal(self._log_alpha, other._log_alpha)

    def __hash__(self) -> int:
        return hash(self._log_alpha.tobytes())

    def __str__(self) -> str:
        return f"VPDiscrete({self.num_steps} steps)"


def _span(values: Array) -> str:
    if not values.size:
        return "none"
    return f"from {np.min(values):.6g} to {np.max(values):.6g}"


@dataclass(frozen=True)
class EDM(Schedule):
    """Variance exploding with t = sigma: alpha = 1, sigma_t = t. Also known as VE.

    Grids start at sigma_max and, by default, end with the step from sigma_min to sigma = 0. With
    prediction "edm" the network is the raw F of the preconditioning: it is given c_in x with
    c_in = 1/sqrt(sigma² + sigma_data²) and told c_noise = log(sigma)/4. With any other prediction
    it is given x and told sigma.

    Args:
        sigma_min, sigma_max: Range of noise levels; 0 < sigma_min < sigma_max.
        sigma_data: Standard deviation of the data.
        scale_input: True or False forces c_in on or off (k-diffusion gives epsilon networks
            x/sqrt(sigma² + 1): scale_input=True, sigma_data=1). None: on for "edm" alone.

    Source: Karras et al., "Elucidating the Design Space", arXiv:2206.00364, Table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    scale_input: bool | None = None

    def __post_init__(self) -> None:
        _positive("EDM", sigma_min=self.sigma_min, sigma_data=self.sigma_data)
        _number("EDM", sigma_max=self.sigma_max)
        if self.scale_input not in (None, True, False):
            raise TypeError(f"EDM: scale_input is True, False or None; got {self.scale_input!r}.")
        if not (math.isfinite(self.sigma_max) and self.sigma_max > self.sigma_min):
            raise ValueError(
                f"EDM: sigma_max is finite and above sigma_min = {self.sigma_min}; "
                f"got {self.sigma_max!r}."
            )

    @property
    def domain(self) -> tuple[float, float]:
        return (0.0, math.inf)

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_floor(self) -> float:
        return self.sigma_min

    @property
    def default_grid(self) -> str:
        return "karras"

    def alpha(self, t: ArrayLike) -> Array:
        return np.ones_like(_array(t))

    def sigma(self, t: ArrayLike) -> Array:
        return _array(t) * 1.0

    def lambda_t(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -np.log(_array(t))

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        return np.exp(-_array(lambda_t))

    def rho(self, t: ArrayLike) -> Array:
        return _array(t) * 1.0

    def alpha_dot(self, t: ArrayLike) -> Array:
        return np.zeros_like(_array(t))

    def sigma_dot(self, t: ArrayLike) -> Array:
        return np.ones_like(_array(t))

    def prior_scale(self, t: float) -> float:
        """sigma: the data's own scale is small beside it."""
        return float(t)

    def model_time(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        with np.errstate(divide="ignore"):
            return 0.25 * np.log(_array(t)) if prediction == "edm" else _array(t) * 1.0

    def time_of_model(self, model_time: ArrayLike, prediction: str = "epsilon") -> Array:
        return np.exp(4.0 * _array(model_time)) if prediction == "edm" else _array(model_time) * 1.0

    def c_in(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        scaled = prediction == "edm" if self.scale_input is None else self.scale_input
        return 1.0 / np.hypot(_array(t), self.sigma_data) if scaled else np.ones_like(_array(t))


VE = EDM


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t, t in [0, 1]; velocity = eps - x0.

    Any resolution shift belongs to the grid (`grid="shift(3)"`), never to the schedule.

    Args:
        time_scale: The network is told t * time_scale (1000 for diffusers' flow models).

    Source: Lipman et al., "Flow Matching", arXiv:2210.02747; Liu et al., arXiv:2209.03003.
    """

    time_scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("FlowMatching", time_scale=self.time_scale)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def default_grid(self) -> str:
        return "uniform"

    def alpha(self, t: ArrayLike) -> Array:
        return 1.0 - _array(t)

    def sigma(self, t: ArrayLike) -> Array:
        return _array(t) * 1.0

    def lambda_t(self, t: ArrayLike) -> Array:
        t = _array(t)
        with np.errstate(divide="ignore"):
            return np.log1p(-t) - np.log(t)

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(_array(lambda_t)))

    def alpha_dot(self, t: ArrayLike) -> Array:
        return -np.ones_like(_array(t))

    def sigma_dot(self, t: ArrayLike) -> Array:
        return np.ones_like(_array(t))

    def prior_scale(self, t: float) -> float:
        """sigma: at t = 1 the state is the noise itself."""
        return float(t)


@dataclass(frozen=True, init=False)
class Custom(Schedule):
    """A schedule from two callables; lambda is inverted numerically.

    Args:
        alpha, sigma: Functions of float64 arrays of times, to scales (a constant is legal); lambda
            strictly decreases with t. Accurate values near sigma = 0 matter: write
            sqrt(-expm1(2 log alpha)), not sqrt(1 - alpha²).
        t_range: (smallest, largest) time. sigma > 0 and alpha > 0 inside it.
        grid_range: Default (t_min, t_max) of grids; None: t_range, moved inside by a thousandth
            where lambda is infinite.
        time_scale: The network is told t * time_scale.

    Raises:
        ValueError: lambda does not strictly decrease over the range.
        TypeError: alpha or sigma is not a function of arrays.
    """

    alpha_fn: Callable[[Array], ArrayLike] = field(repr=False)
    sigma_fn: Callable[[Array], ArrayLike] = field(repr=False)
    t_range: tuple[float, float]
    grid_range: tuple[float, float] | None
    time_scale: float

    def __init__(
        self,
        alpha: Callable[[Array], ArrayLike],
        sigma: Callable[[Array], ArrayLike],
        t_range: tuple[float, float] = (0.0, 1.0),
        grid_range: tuple[float, float] | None = None,
        time_scale: float = 1.0,
    ) -> None:
        put = functools.partial(object.__setattr__, self)
        put("alpha_fn", alpha)
        put("sigma_fn", sigma)
        put("t_range", tuple(map(float, t_range)))
        put("grid_range", None if grid_range is None else tuple(map(float, grid_range)))
        put("time_scale", time_scale)
        _positive("Custom", time_scale=time_scale)
        lo, hi = self.t_range
        if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
            raise ValueError(f"Custom: t_range is (lo, hi) with lo < hi; got {t_range!r}.")
        if self.grid_range and not lo <= self.grid_range[0] < self.grid_range[1] <= hi:
            raise ValueError(
                f"Custom: grid_range is (t_min, t_max) within t_range = {self.t_range}; "
                f"got {grid_range!r}."
            )
        nodes = np.linspace(lo, hi, 1025)
        falls = np.diff(self.lambda_t(nodes)) < 0
        if not np.all(falls):
            bad = int(np.argmin(falls))
            raise ValueError(
                "Custom: lambda = log(alpha/sigma) strictly decreases with t; between t = "
                f"{nodes[bad]:.6g} and {nodes[bad + 1]:.6g} it does not. Check alpha and sigma."
            )

    @property
    def domain(self) -> tuple[float, float]:
        return self.t_range

    def _inside(self, end: int) -> float:
        value = self.t_range[end]
        if np.isfinite(self.lambda_t(value)):
            return value
        return value + (1e-3 if end == 0 else -1e-3) * (self.t_range[1] - self.t_range[0])

    @property
    def t_max(self) -> float:
        return self.grid_range[1] if self.grid_range else self._inside(1)

    @property
    def t_min(self) -> float:
        return self.grid_range[0] if self.grid_range else self._inside(0)

    @property
    def t_floor(self) -> float:
        return self._inside(0)

    def alpha(self, t: ArrayLike) -> Array:
        return self._scale("alpha", self.alpha_fn, _array(t))

    def sigma(self, t: ArrayLike) -> Array:
        return self._scale("sigma", self.sigma_fn, _array(t))

    @staticmethod
    def _scale(name: str, function: Callable[[Array], ArrayLike], t: Array) -> Array:
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

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        """By bisection in t until no float lies between the ends (at most 1100 steps)."""
        target = _array(lambda_t)
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
        t = _array(t)
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
        """By a five-point difference: about ten digits for smooth callables."""
        return self._dot(self.alpha, t)

    def sigma_dot(self, t: ArrayLike) -> Array:
        """By a five-point difference: about ten digits for smooth callables."""
        return self._dot(self.sigma, t)
