# SPDX-License-Identifier: Apache-2.0
"""Plans over the times that diffusers' schedulers step through by default."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastdiff as fd


def training_times(steps: int) -> list[float]:
    """The times that the schedulers step through, in `VPDiscrete`'s units."""
    index = np.linspace(0, 999, steps + 1).round()[::-1]
    return [*((index[:-1] + 1.0) / 1000.0).tolist(), 1e-3]


def plan_on_training_times(solver: str, steps: int, **options: Any) -> fd.Plan:
    """fastdiff's plan over the schedulers' times."""
    schedule = fd.schedules.VPDiscrete.scaled_linear()
    return fd.plan(schedule, solver, steps, grid=training_times(steps), **options)
