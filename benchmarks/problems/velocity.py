# SPDX-License-Identifier: Apache-2.0
"""A small velocity network in the plane, trained by flow matching, and the data it was trained on.

The weights stand beside this file; `train_flow.py` made them and makes them again.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

WEIGHTS = Path(__file__).with_suffix(".safetensors")


def two_moons(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Points of two half circles that reach into each other, blurred by 0.2, [count, 2]."""
    turn = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, turn.cos(), 1 - turn.cos())
    y = torch.where(upper, turn.sin(), 0.5 - turn.sin())
    blur = 0.2 * torch.randn(count, 2, generator=generator)
    return 3 * (torch.stack([x, y], 1) + blur) - 1


class Velocity(nn.Module):
    """Three hidden layers of 64 over (x, time), the shape of torchcfm's own MLP.

    The trained function follows torchcfm's clock, which is 0 at the noise and 1 at the data.
    `forward` follows `fastdiff.schedules.FlowMatching`, which runs the other way: there the
    velocity is dx/dt with t = 1 at the noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(3, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU()),
            *(nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 2)),
        )

    def to_data(self, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        """dx/d clock at x [B, 2] and clock [B], as it is trained."""
        return self.layers(torch.cat([x, clock.to(x.dtype)[:, None]], 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """dx/dt at x [B, 2] and t, [B] or [] for all."""
        return -self.to_data(x, 1 - t.expand(len(x)))


def trained(path: Path = WEIGHTS) -> Velocity:
    """The trained network, frozen."""
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):  # initial values that are overwritten next
        network = Velocity()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)
