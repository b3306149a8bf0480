# SPDX-License-Identifier: Apache-2.0
"""Plain autograd: checkpoints of the network's evaluations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The network under `torch.utils.checkpoint`: its activations are made again."""

    def call(x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(network, x, t, **options, **cond)

    return call
