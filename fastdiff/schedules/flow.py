# SPDX-License-Identifier: Apache-2.0
"""Flow matching: straight lines from noise to data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .base import (
    Array,
    FromScales,
    ScaledTime,
    Traits,
    as_array,
    log_ratio,
    plain_record,
    plain_text,
    positive,
)


@dataclass(frozen=True)
class FlowMatching(ScaledTime, FromScales):
    """Rectified flow: alpha = 1 - t, sigma = t, t in [0, 1]; velocity = eps - x0.

    Any resolution shift belongs to the grid (`grid="shift(3)"`), never to the schedule.

    Args:
        time_scale: The network is told t * time_scale (1000 for diffusers' flow models).

    Source: Lipman et al., "Flow Matching", arXiv:2210.02747; Liu et al., arXiv:2209.03003.
    """

    time_scale: float = 1.0

    def __post_init__(self) -> None:
        scale = positive("FlowMatching", "time_scale", self.time_scale)
        object.__setattr__(self, "time_scale", scale)

    @property
    def traits(self) -> Traits:
        return Traits(
            (0.0, 1.0),
            t_max=1.0,
            t_min=0.0,
            t_floor=1e-3,
            default_grid="uniform",
            straight="velocity",
        )

    def alpha(self, t: ArrayLike) -> Array:
        return 1.0 - as_array(t)

    def sigma(self, t: ArrayLike) -> Array:
        return as_array(t) * 1.0

    def lambda_t(self, t: ArrayLike) -> Array:
        t = as_array(t)
        with np.errstate(divide="ignore"):
            return np.log1p(-t) - np.log(t)

    def h(self, s: ArrayLike, t: ArrayLike) -> Array:
        s, t = as_array(s), as_array(t)
        return log_ratio(1.0 - s, 1.0 - t, s - t) - log_ratio(s, t, t - s)

    def t_of_lambda(self, lambda_t: ArrayLike) -> Array:
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(as_array(lambda_t)))

    def alpha_dot(self, t: ArrayLike) -> Array:
        return -np.ones_like(as_array(t))

    def sigma_dot(self, t: ArrayLike) -> Array:
        return np.ones_like(as_array(t))

    def prior_scale(self, t: float) -> float:
        """sigma_t: at t = 1 the state is the noise itself."""
        return float(t)

    def to_dict(self) -> dict[str, Any]:
        return plain_record(self)

    def describe(self) -> str:
        return plain_text(self)
