# SPDX-License-Identifier: Apache-2.0
"""Small networks that tests share."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """A smooth network whose parameters, conditioning and time all matter.

    Args:
        n: Elements of the last dimension.
        idle: Whether there is a parameter, `idle`, that the output does not depend on.
        dropout: The probability of dropout, which makes a training network draw random numbers.
    """

    def __init__(self, n: int = 5, *, idle: bool = False, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(n, n)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        if idle:
            self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x, t, y=None):
        h = self.drop(self.linear(x))
        if y is not None:
            h = h + y.reshape(-1, *[1] * (x.ndim - 1)).to(h.dtype)
        return torch.tanh(h) * (1 + 0.1 * t.reshape(-1, *[1] * (x.ndim - 1)).to(h.dtype))
