# SPDX-License-Identifier: Apache-2.0
"""Schedules: alpha(t), sigma(t) and everything that follows from them, in float64.

A schedule says x_t = alpha_t x0 + sigma_t eps. Time runs from noise (large) to data (small), and
lambda_t = log(alpha_t / sigma_t) grows along a run. Every method takes a time or an array of times
and returns float64 of the same shape. Infinite limits are values, not errors: lambda is +inf where
sigma = 0 and -inf where alpha = 0.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._text import shown, unknown

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


def prediction_name(prediction: str) -> str:
    """The canonical name of a prediction; diffusers' names are accepted.

    Raises:
        ValueError: The name is unknown (the nearest is suggested).
    """
    name = _ALIASES.get(prediction, prediction) if isinstance(prediction, str) else prediction
    if name not in PREDICTIONS:
        raise unknown("prediction", "prediction", prediction, PREDICTIONS)
    return name


# -- numbers that users give -----------------------------------------------------------------------


def real(who: str, name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError: The value is not a real number.
        ValueError: The value is an integer beyond float64.
    """
    kinds = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{who}: {name} is a number; got {shown(value)}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{who}: {name} is a number that float64 can hold; got {shown(value)}."
        ) from None


def positive(who: str, name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError: The value is not a real number.
        ValueError: The value is not positive and finite, or an integer beyond float64.
    """
    number = real(who, name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{who}: {name} is positive and finite; got {value!r}.")
    return number


def as_array(t: ArrayLike) -> Array:
    return np.asarray(t, dtype=np.float64)


# -- the schedule ----------------------------------------------------------------------------------


def _no_times() -> Array:
    return np.empty(0)


@dataclass(frozen=True)
class Traits:
    """What a schedule says about itself beside its functions of time.

    Args:
        domain: (smallest, largest) time at which the schedule is defined.
        t_max: Time at which sampling grids start by default.
        t_min: Time at which sampling grids end by default.
        t_floor: Smallest time with sigma > 0 that grids use: a grid that ends at sigma = 0 takes
            its last step from there.
        default_grid: Grid that `grid="auto"` stands for.
        straight: Variable that a straight flow keeps constant, which Euler and Heun follow:
            "epsilon" (for d(x/alpha)/d(sigma/alpha)) or "velocity" (for dx/dt).
        training_steps: Number N of training steps at times 1/N, 2/N, .., 1; None: a continuum.
        sigma_data: Standard deviation of the data in EDM's preconditioning; None: the schedule has
            no preconditioning, and prediction "edm" is refused.
        knots: Times at which the schedule's derivative jumps, increasing; quadrature splits there.
    """

    domain: tuple[float, float]
    t_max: float
    t_min: float
    t_floor: float
    default_grid: str = "logsnr"
    straight: str = "epsilon"
    training_steps: int | None = None
    sigma_data: float | None = None
    knots: Array = field(default_factory=_no_times)


@dataclass(frozen=True)
class Schedule(abc.ABC):
    """A noise schedule: functions of time that a subclass gives, and all that follows from them.

    Each abstract method is defined once, by the schedule or by one of `FromLogAlpha`, `ScaledTime`
    and `FromScales`. Everything else is final. A subclass is a frozen dataclass.
    """

    @property
    @abc.abstractmethod
    def traits(self) -> Traits:
        """The range of times, the default grid, and other facts that are no function of time."""

    @property
    def domain(self) -> tuple[float, float]:
        """(smallest, largest) time at which the schedule is defined."""
        return self.traits.domain

    @property
    def t_max(self) -> float:
        """Time at which sampling grids start by default."""
        return self.traits.t_max

    @property
    def t_min(self) -> float:
        """Time at which sampling grids end by default."""
        return self.traits.t_min

    @property
    def t_floor(self) -> float:
        """Smallest time with sigma > 0 that grids use."""
        return self.traits.t_floor

    @property
    def default_grid(self) -> str:
        """Grid that `grid="auto"` stands for."""
        return self.traits.default_grid

    @property
    def straight(self) -> str:
        """Variable that a straight flow keeps constant: "epsilon" or "velocity"."""
        return self.traits.straight

    @property
    def training_steps(self) -> int | None:
        """Number of training steps; None: the schedule knows no steps."""
        return self.traits.training_steps

    @property
    def knots(self) -> Array:
        """Times at which the schedule's derivative jumps, increasing; quadrature splits there."""
        return self.traits.knots

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
    def h(self, s: ArrayLike, t: ArrayLike) -> Array:
        """lambda_t - lambda_s, the length of the step from s to t, without its cancellation."""

    @abc.abstractmethod
    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        """The inverse of `lambda_t`."""

    @abc.abstractmethod
    def alpha_dot(self, t: ArrayLike) -> Array:
        """d alpha / dt; at a knot, the derivative of the piece on its larger-t side."""

    @abc.abstractmethod
    def sigma_dot(self, t: ArrayLike) -> Array:
        """d sigma / dt; infinite where the noise starts like sqrt(t)."""

    @abc.abstractmethod
    def rho(self, t: ArrayLike) -> Array:
        """sigma_t / alpha_t = exp(-lambda_t)."""

    @abc.abstractmethod
    def f(self, t: ArrayLike) -> Array:
        """Drift of the forward SDE dx = f x dt + g dw: d log alpha / dt."""

    @abc.abstractmethod
    def g2(self, t: ArrayLike) -> Array:
        """Squared diffusion of that SDE, d sigma²/dt - 2 f sigma² = -2 sigma² d lambda/dt."""

    @abc.abstractmethod
    def prior_scale(self, t: float) -> float:
        """Standard deviation of the starting noise at t."""

    @abc.abstractmethod
    def model_time(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        """The time the network is told at t."""

    @abc.abstractmethod
    def time_of_model(self, model_time: ArrayLike, prediction: str = "epsilon") -> Array:
        """The inverse of `model_time`."""

    @abc.abstractmethod
    def c_in(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        """The network is given c_in * x."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The schedule as data that JSON can hold; `fastdiff.schedules.from_dict` reads it back.

        The schedule that is read back equals this one, and its floats have the same bits.
        """

    def components(self, quantity: str, t: ArrayLike) -> tuple[Array, Array]:
        """(u, w) with quantity = u x0 + w eps at time t.

        Args:
            quantity: One of PREDICTIONS, or "x" for the state itself.
            t: Times.
        """
        t = as_array(t)
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
        d = self.traits.sigma_data
        if d is None:
            raise ValueError(
                f"{self}: prediction 'edm' is the raw network of EDM's preconditioning, which "
                "belongs to the EDM schedule (c_in, log(sigma)/4, sigma_data). Use "
                "fastdiff.schedules.EDM, or a network that predicts x0."
            )
        s = self.rho(t)
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

    @abc.abstractmethod
    def describe(self) -> str:
        """The arguments as `str` shows them; two schedules that differ read differently."""

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"


class ScaledTime(Schedule):
    """A schedule whose networks are told t * time_scale and given x as it is."""

    time_scale: float

    def model_time(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        return as_array(t) * self.time_scale

    def time_of_model(self, model_time: ArrayLike, prediction: str = "epsilon") -> Array:
        return as_array(model_time) / self.time_scale

    def c_in(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        return np.ones_like(as_array(t))


class FromScales(Schedule):
    """A schedule whose rho, f and g² follow from lambda, the scales and their derivatives."""

    def rho(self, t: ArrayLike) -> Array:
        return np.exp(-self.lambda_t(t))

    def f(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return self.alpha_dot(t) / self.alpha(t)

    def g2(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            sigma = self.sigma(t)
            return 2.0 * sigma * (self.sigma_dot(t) - self.f(t) * sigma)


def log_ratio(start: ArrayLike, end: ArrayLike, change: ArrayLike) -> Array:
    """log(end/start), given change = end - start to its own rounding.

    Args:
        start: Positive.
        end: At least 0; the result is -inf at 0.
        change: end - start where the two are close; where they are not, nothing reads it.
    """
    start, end, change = as_array(start), as_array(end), as_array(change)
    near = np.abs(change) < 0.5 * start
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        apart = np.log(end) - np.log(start)
        return np.where(near, np.log1p(np.where(near, change / start, 0.0)), apart)


def scale_of_unit_data(schedule: Schedule, t: float) -> float:
    """sqrt(alpha² + sigma²): the standard deviation of x_t where the data's is 1."""
    return float(np.hypot(schedule.alpha(t), schedule.sigma(t)))


def plain_record(schedule: Schedule) -> dict[str, Any]:
    """`to_dict` of a schedule whose fields are all numbers, booleans, strings or None."""
    values = {item.name: getattr(schedule, item.name) for item in fields(schedule)}
    return {"kind": type(schedule).__name__, **values}


def plain_text(schedule: Schedule) -> str:
    """`describe` of such a schedule: floats that six digits hold are shown short."""

    def brief(value: Any) -> str:
        short = isinstance(value, float) and float(f"{value:g}") == value
        return f"{value:g}" if short else str(value)

    names = (item.name for item in fields(schedule))
    return ", ".join(f"{name}={brief(getattr(schedule, name))}" for name in names)
