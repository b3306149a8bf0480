# SPDX-License-Identifier: Apache-2.0
"""Noise added on the way up: from a time near the data to a noisier one."""

from __future__ import annotations

import math

from ..schedules import Schedule


def renoise(schedule: Schedule, low: float, high: float) -> tuple[float, float]:
    """(scale, noise) with x_high = scale x_low + noise z, which keeps the marginals.

        x_s = (alpha_s/alpha_t) x_t + sqrt(sigma_s² - (alpha_s/alpha_t)² sigma_t²) z

    from t = low to s = high. The square root is sigma_s sqrt(1 - exp(-2 h)) with
    h = lambda_t - lambda_s, which does not cancel. A step from sigma = 0 is legal, and one from a
    time to itself adds nothing.
    """
    scale = float(schedule.alpha(high) / schedule.alpha(low))
    if low == high:
        return 1.0, 0.0
    h = float(schedule.h(high, low))
    return scale, float(schedule.sigma(high)) * math.sqrt(-math.expm1(-2.0 * h))
