# SPDX-License-Identifier: Apache-2.0
"""Probability flows from fixed starts, with what is differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastdiff as fd

VP = fd.schedules.VPLinear(beta_min=0.1, beta_max=20.0)
ENDS = {"t_max": 1.0, "t_min": 1e-2}  # first and last time of the runs that are differentiated


@dataclass(frozen=True)
class Flow:
    """A network, where to start, and the functional <cotangent, sample> to differentiate.

    Attributes:
        title: As printed.
        network: `network(x, t, **cond)`.
        prediction: What it returns.
        start: x at t = 1, [B, ...].
        cond: Conditioning by keyword. Floating tensors in it want a gradient.
        theta: Whether the parameters do.
        schedule: What the network was made for; t = 1 is its first time.
    """

    title: str
    network: Callable[..., torch.Tensor]
    prediction: str
    start: torch.Tensor
    cond: Mapping[str, torch.Tensor] = field(default_factory=dict)
    theta: bool = True
    schedule: fd.schedules.Schedule = VP

    @functools.cached_property
    def cotangent(self) -> torch.Tensor:
        drawn = fd.noise.normal(self.start.shape, 0, 1, dtype=self.start.dtype)
        return drawn.to(self.start.device)

    @property
    def parameters(self) -> list[torch.Tensor]:
        if not (isinstance(self.network, nn.Module) and self.theta):
            return []
        return [p for p in self.network.parameters() if p.requires_grad]

    def plan(self, solver: str, steps: int, **options: Any) -> fd.Plan:
        """A plan on the flow's schedule for its network."""
        return fd.plan(self.schedule, solver, steps, prediction=self.prediction, **options)

    def run(self, plan: fd.Plan) -> torch.Tensor:
        """The state in which a run of the plan ends."""
        return fd.sample(self.network, self.start, plan, cond=dict(self.cond) or None)

    def leaves(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        """Fresh tensors: x, the conditioning, and the list of all that wants a gradient."""
        x = self.start.clone().requires_grad_()
        cond = {
            k: v.clone().requires_grad_() if v.is_floating_point() else v
            for k, v in self.cond.items()
        }
        return x, cond, [x, *(v for v in cond.values() if v.requires_grad), *self.parameters]

    def named(self, found: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Gradients of the leaves by name: x, z, theta (all parameters as one vector)."""
        _, cond, wanted = self.leaves()
        filled = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(wanted, found, strict=True)
        ]
        gradients = {"x": filled[0]}
        names = [k for k, v in cond.items() if v.requires_grad]
        gradients |= dict(zip(names, filled[1:], strict=False))
        if self.parameters:
            rest = filled[1 + len(names) :]
            gradients["theta"] = torch.cat([g.flatten() for g in rest])
        return gradients


def vp_plan(flow: Flow, solver: str, steps: int, grid: Any = "logsnr", **options: Any) -> fd.Plan:
    ends: dict[str, Any] = ENDS if isinstance(grid, str) else {}
    return fd.plan(VP, solver, steps, grid=grid, prediction=flow.prediction, **ends, **options)
