# SPDX-License-Identifier: Apache-2.0
"""The backward pass of a differentiable run, whichever its gradient is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.job import state_dtype
from .adjoint import continuous
from .options import AdjointDEIS
from .sweep import Sweep
from .trace import Trace
from .undo import undone


def backward(
    trace: Trace, cotangent: torch.Tensor, kept: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x and of the named tensors.

    Args:
        trace: The run.
        cotangent: Of its result.
        kept: What `Trace.loop` kept.
    """
    sweep = Sweep(trace, cotangent.to(state_dtype(cotangent)).contiguous())
    gradient = trace.gradient
    if isinstance(gradient, AdjointDEIS):
        continuous(sweep, gradient, kept)
    elif gradient.undo:
        undone(sweep, kept)
    else:
        sweep.run(trace.plan.transpose(), trace.times, trace.inputs(kept))
    return sweep.x_bar if trace.needs else None, *sweep.gradients()
