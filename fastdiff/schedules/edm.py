# SPDX-License-Identifier: Apache-2.0
"""Variance exploding with t = sigma, and EDM's preconditioning."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .base import (
    Array,
    Schedule,
    Traits,
    as_array,
    log_ratio,
    plain_record,
    plain_text,
    positive,
    real,
)


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
        put = functools.partial(object.__setattr__, self)
        put("sigma_min", positive("EDM", "sigma_min", self.sigma_min))
        put("sigma_data", positive("EDM", "sigma_data", self.sigma_data))
        put("sigma_max", real("EDM", "sigma_max", self.sigma_max))
        if self.scale_input is not None and not isinstance(self.scale_input, bool):
            raise TypeError(f"EDM: scale_input is True, False or None; got {self.scale_input!r}.")
        if not (math.isfinite(self.sigma_max) and self.sigma_max > self.sigma_min):
            raise ValueError(
                f"EDM: sigma_max is finite and above sigma_min = {self.sigma_min}; "
                f"got {self.sigma_max!r}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            (0.0, math.inf),
            t_max=self.sigma_max,
            t_min=0.0,
            t_floor=self.sigma_min,
            default_grid="karras",
            sigma_data=self.sigma_data,
        )

    def alpha(self, t: ArrayLike) -> Array:
        return np.ones_like(as_array(t))

    def sigma(self, t: ArrayLike) -> Array:
        return as_array(t) * 1.0

    def lambda_t(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -np.log(as_array(t))

    def h(self, s: ArrayLike, t: ArrayLike) -> Array:
        return -log_ratio(s, t, as_array(t) - as_array(s))

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        return np.exp(-as_array(lambda_t))

    def alpha_dot(self, t: ArrayLike) -> Array:
        return np.zeros_like(as_array(t))

    def sigma_dot(self, t: ArrayLike) -> Array:
        return np.ones_like(as_array(t))

    def rho(self, t: ArrayLike) -> Array:
        return as_array(t) * 1.0

    def f(self, t: ArrayLike) -> Array:
        return np.zeros_like(as_array(t))

    def g2(self, t: ArrayLike) -> Array:
        return 2.0 * as_array(t)

    def prior_scale(self, t: float) -> float:
        """sigma_t: the data's own scale is small beside it."""
        return float(t)

    def model_time(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        with np.errstate(divide="ignore"):
            return 0.25 * np.log(as_array(t)) if prediction == "edm" else as_array(t) * 1.0

    def time_of_model(self, model_time: ArrayLike, prediction: str = "epsilon") -> Array:
        value = as_array(model_time)
        return np.exp(4.0 * value) if prediction == "edm" else value * 1.0

    def c_in(self, t: ArrayLike, prediction: str = "epsilon") -> Array:
        scaled = prediction == "edm" if self.scale_input is None else self.scale_input
        t = as_array(t)
        return 1.0 / np.hypot(t, self.sigma_data) if scaled else np.ones_like(t)

    def to_dict(self) -> dict[str, Any]:
        return plain_record(self)

    def describe(self) -> str:
        return plain_text(self)


VE = EDM
