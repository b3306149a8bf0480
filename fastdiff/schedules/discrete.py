# SPDX-License-Identifier: Apache-2.0
"""A variance preserving schedule known at its training steps."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._text import shown
from .base import Array, Traits, as_array, positive
from .vp import UNIT_TIME, FromLogAlpha

MAX_TRAINING_STEPS = 1_000_000


@dataclass(frozen=True, eq=False)
class VPDiscrete(FromLogAlpha):
    """Variance preserving on N training steps: index i stands at t = (i + 1)/N, data at t = 0.

    log alpha is linear in t between the training steps and between the first one and t = 0, where
    alpha = 1. The network is told the index as a float, model_time = N t - 1; before the first
    training step, t < 1/N, it is told 0, since no network has seen a smaller index. So
    `time_of_model` is the inverse on [1/N, 1].

    Two schedules are equal if their log alpha is, bit for bit, however they were made. `to_dict`
    keeps the recipe of `linear` and `scaled_linear` (three numbers); of other schedules it keeps
    log alpha itself.

    Args:
        alphas_cumprod: alpha² at the N >= 1 training steps, strictly decreasing in (0, 1), [N].
            (diffusers' `alphas_cumprod`.)
        betas: What is given in place of alphas_cumprod = cumprod(1 - betas), [N].

    Raises:
        ValueError: Neither or both are given, or the values are out of range. A last value of 0
            (zero terminal SNR) has lambda = -inf and is refused; drop that step.
        TypeError: The values are not a sequence of numbers.

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
            betas = _values("betas", self.betas)
            if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas < 1)):
                raise ValueError(
                    "VPDiscrete: betas is a non-empty sequence of values in (0, 1); got shape "
                    f"{betas.shape}, values {_span(betas)}."
                )
            log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
        else:
            product = _values("alphas_cumprod", self.alphas_cumprod)
            good = product.ndim == 1 and product.size and np.all((product > 0) & (product < 1))
            if not good or not np.all(np.diff(product) < 0):
                raise ValueError(
                    "VPDiscrete: alphas_cumprod strictly decreases within (0, 1); got shape "
                    f"{product.shape}, values {_span(product)}. It is alpha², newest step last."
                )
            log_alpha = 0.5 * np.log(product)
        self._hold(log_alpha)

    def _hold(self, log_alpha: Array) -> None:
        """Makes this the schedule of these values of log alpha at the training steps, [N]."""
        good = log_alpha.ndim == 1 and log_alpha.size and np.all(np.isfinite(log_alpha))
        if not good or not np.all(np.diff(log_alpha, prepend=0.0) < 0):
            raise ValueError(
                "VPDiscrete: log_alpha strictly decreases from below 0 and is finite; got shape "
                f"{log_alpha.shape}, values {_span(log_alpha)}. Are two training steps so close "
                "that float64 cannot tell them apart?"
            )
        at_knots = np.concatenate([[0.0], log_alpha])
        at_knots.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", np.exp(2.0 * at_knots[1:]))
        object.__setattr__(self, "betas", -np.expm1(2.0 * np.diff(at_knots)))
        object.__setattr__(self, "_log_alpha", at_knots)

    _log_alpha: Any = field(default=None, init=False, repr=False)
    _recipe: Any = field(default=None, init=False, repr=False)

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = 1000
    ) -> VPDiscrete:
        """The schedule of DDPM: betas uniform from beta_start to beta_end."""
        start, end, count = _recipe_numbers("linear", beta_start, beta_end, num_steps)
        return cls(betas=np.linspace(start, end, count))._made_by("linear", start, end, count)

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_steps: int = 1000
    ) -> VPDiscrete:
        """The schedule of Stable Diffusion: sqrt(beta) uniform between those of the two ends."""
        start, end, count = _recipe_numbers("scaled_linear", beta_start, beta_end, num_steps)
        made = cls(betas=np.linspace(start**0.5, end**0.5, count) ** 2)
        return made._made_by("scaled_linear", start, end, count)

    @classmethod
    def of_log_alpha(cls, log_alpha: Any) -> VPDiscrete:
        """The schedule with these values of log alpha at its training steps, bit for bit.

        Raises:
            ValueError: log alpha does not strictly decrease from below 0, or is not finite.
            TypeError: The values are not a sequence of numbers.
        """
        made = object.__new__(cls)
        made._hold(_values("log_alpha", log_alpha))
        return made

    def _made_by(self, recipe: str, start: float, end: float, count: int) -> VPDiscrete:
        record = {"recipe": recipe, "beta_start": start, "beta_end": end, "num_steps": count}
        object.__setattr__(self, "_recipe", record)
        return self

    @property
    def num_steps(self) -> int:
        """Training steps N."""
        return len(self._log_alpha) - 1

    @functools.cached_property
    def _knots(self) -> Array:
        knots = np.arange(self.num_steps + 1) / self.num_steps
        knots.setflags(write=False)
        return knots

    @functools.cached_property
    def traits(self) -> Traits:
        return Traits(
            UNIT_TIME,
            t_max=1.0,
            t_min=1.0 / self.num_steps,
            t_floor=1.0 / self.num_steps,
            training_steps=self.num_steps,
            knots=self._knots,
        )

    def log_alpha(self, t: ArrayLike) -> Array:
        return np.interp(as_array(t), self._knots, self._log_alpha)

    def log_alpha_rise(self, s: ArrayLike, t: ArrayLike) -> Array:
        s, t = as_array(s), as_array(t)
        first, last = self._piece(s), self._piece(t)
        slope = np.diff(self._log_alpha) * self.num_steps
        # within a piece the difference of times is exact; between two, knots lie in between
        over = (s - self._knots[first]) * slope[first] - (t - self._knots[last]) * slope[last]
        across = self._log_alpha[last] - self._log_alpha[first] - over
        return np.where(first == last, (t - s) * slope[first], across)

    def _piece(self, t: Array) -> Any:
        """Number of the piece between two knots in which a time lies."""
        return np.clip(np.floor(t * self.num_steps).astype(int), 0, self.num_steps - 1)

    def log_alpha_dot(self, t: ArrayLike) -> Array:
        return (np.diff(self._log_alpha) * self.num_steps)[self._piece(as_array(t))]

    def t_of_log_alpha(self, log_alpha: Array) -> Array:
        return np.interp(-log_alpha, -self._log_alpha, self._knots)

    def model_time(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        index = np.maximum(as_array(t) * self.num_steps - 1.0, 0.0)
        nearest = np.round(index)  # a training step is told its index exactly
        return np.where(np.abs(index - nearest) < 1e-9 * self.num_steps, nearest, index)

    def time_of_model(self, model_time: ArrayLike, prediction: str = "epsilon") -> Array:
        return (np.maximum(as_array(model_time), 0.0) + 1.0) / self.num_steps

    def c_in(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        return np.ones_like(as_array(t))

    def to_dict(self) -> dict[str, Any]:
        if self._recipe is not None:
            return {"kind": "VPDiscrete", **self._recipe}
        return {"kind": "VPDiscrete", "log_alpha": self._log_alpha[1:].tolist()}

    def describe(self) -> str:
        first, last = self.alphas_cumprod[[0, -1]]
        digest = hashlib.sha256(self._log_alpha.tobytes()).hexdigest()[:8]
        return f"{self.num_steps} steps, alphas_cumprod {first:.6g} to {last:.6g}, {digest}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VPDiscrete):
            return NotImplemented
        return np.array_equal(self._log_alpha, other._log_alpha)

    def __hash__(self) -> int:
        return hash(self._log_alpha.tobytes())


def _values(name: str, values: Any) -> Array:
    """A float64 copy of a sequence, array or tensor."""
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().cpu().numpy()
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"VPDiscrete: {name} is a sequence of numbers that float64 can hold; got "
            f"{type(values).__name__}."
        ) from None


def _span(values: Array) -> str:
    if not values.size:
        return "none"
    return f"from {np.min(values):.6g} to {np.max(values):.6g}"


def _recipe_numbers(recipe: str, start: Any, end: Any, count: Any) -> tuple[float, float, int]:
    who = f"VPDiscrete.{recipe}"
    start, end = positive(who, "beta_start", start), positive(who, "beta_end", end)
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise TypeError(f"{who}: num_steps is an integer; got {shown(count)}.")
    if not 1 <= count <= MAX_TRAINING_STEPS:
        raise ValueError(
            f"{who}: num_steps lies between 1 and {MAX_TRAINING_STEPS}; got {shown(count)}."
        )
    return start, end, int(count)
