# SPDX-License-Identifier: Apache-2.0
"""A flow as rivals see it: x0, epsilon or dx/dt at a point, and the calls of the network."""

from __future__ import annotations

import numpy as np
import torch

from fastdiff.bench.flows import Flow

# name -> evaluations a step, and beside those of the steps
Offered = dict[str, tuple[int, int]]


class Field:
    """The outputs of a flow's network in any variable, counted."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.schedule, self.calls = flow, flow.schedule, 0

    def __call__(self, variable: str, x: torch.Tensor, t: float) -> torch.Tensor:
        """x0, epsilon, v or velocity at x and t."""
        self.calls += 1
        told = torch.full((len(x),), t, dtype=torch.float64)
        out = self.flow.network(x.double(), told, **self.flow.cond)
        p, q = self.schedule.conversion(self.flow.prediction, variable, t)
        return p * x + q * out if p else q * out

    def rho(self, times: np.ndarray) -> np.ndarray:
        """sigma/alpha of times, which k-diffusion calls sigma."""
        return self.schedule.rho(times)

    def time(self, rho: float) -> float:
        return float(self.schedule.t_of_lambda(-np.log(rho)))
