# SPDX-License-Identifier: Apache-2.0
"""Plain autograd: the bare network, and checkpoints of its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from fastdiff.bench.flows import Flow

Run = Callable[[], Sequence[torch.Tensor | None]]


def bare(flow: Flow, steps: int) -> Run:
    """A forward without grad, one with grad and its vector-Jacobian product, for every stage."""
    network, cotangent = flow.network, flow.cotangent
    x, cond, wanted = flow.leaves()
    t = torch.full((len(x),), 0.5, device=x.device)

    def run() -> Sequence[torch.Tensor | None]:
        found: Sequence[torch.Tensor | None] = ()
        for _ in range(steps):
            with torch.no_grad():
                network(x, t, **cond)
            out = network(x, t, **cond)
            found = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
        return found

    return run


def recomputed(network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The network under `torch.utils.checkpoint`: its activations are made again."""

    def call(x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(network, x, t, **options, **cond)

    return call
