# SPDX-License-Identifier: Apache-2.0
"""Networks that cost nothing, and a small policy with random weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn


class Feed:
    """A network that costs nothing: it returns tensors made beforehand, in turn."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self.outputs = outputs
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


def constant(output: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A network that returns one tensor, whatever it is given."""
    return lambda x, t, **cond: output


class TimeEmbedding(nn.Module):
    """Sines and cosines of t [B] at frequencies from 1 to 1e-4: [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.linspace(0.0, 1.0, width // 2)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * exponents))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Mlp(nn.Module):
    """A policy of three layers: noisy action [B, actions], time and observation to epsilon."""

    kept = 6 * 256 + 128  # numbers of a sample that autograd keeps, beside four times its actions

    def __init__(self, actions: int, observed: int, width: int = 256) -> None:
        super().__init__()
        self.embed = TimeEmbedding(64)
        sizes = (actions + 64 + observed, width, width, width)
        hidden = [[nn.Linear(a, b), nn.Mish()] for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, actions))

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, self.embed(t), obs], dim=1))
