# SPDX-License-Identifier: Apache-2.0
"""Sums and quantiles of the reference: linear combinations, and numbers of each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LANES = 1024  # of a reduction
Weight = float | Tensor


def combine(like: Tensor, terms: Sequence[tuple[Weight, Tensor]]) -> Tensor:
    """The sum of weight * tensor in order. A coefficient of 0 never reads its tensor."""
    total = torch.zeros_like(like)
    for weight, term in terms:
        if isinstance(weight, Tensor) or weight != 0.0:
            total = total + weight * term
    return total


def quantile_of(values: Tensor, rank: float) -> Tensor:
    """The quantile of each sample's magnitudes, float64 [B].

    torch.quantile's "linear" one, at position rank (n - 1) of the n magnitudes, for samples of any
    size.

    Args:
        values: [B, ...], floating, with elements.
        rank: 0 to 1.
    """
    ordered = values.abs().reshape(len(values), -1).sort(dim=1).values
    position = rank * (ordered.shape[1] - 1)
    at = math.floor(position)
    low, high = ordered[:, at].double(), ordered[:, math.ceil(position)].double()
    return low + (position - at) * (high - low)


def lane_sum(values: Tensor) -> Tensor:
    """Sums of float64 [B, n] in the order of every backend.

    Lane l of 1024 adds elements l, l + 1024, ... in order; then the upper half of the lanes is
    added to the lower, until one is left.
    """
    lanes = values.new_zeros(len(values), _LANES)
    for block in values.split(_LANES, dim=1):
        lanes[:, : block.shape[1]] += block
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
