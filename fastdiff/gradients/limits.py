# SPDX-License-Identifier: Apache-2.0
"""The cotangent of y, taken back through the clip or the threshold of a stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends import Registers
from ..backends.torch import threshold
from ..guidance import combine
from .options import Discrete
from .trace import Trace

# What is added to the cotangent of y after the limit; see `Transposed.raw`.
Raw = Sequence[tuple[float, int | None, int | None]]


def held(registers: Registers, slot: int | None) -> torch.Tensor:
    """The cotangent that a backward row reads: a slot of the history, or x for None."""
    if slot is None:
        return registers.x
    assert registers.history is not None
    return registers.history[slot]


def through_limit(
    trace: Trace, at: tuple[int, torch.Tensor, torch.Tensor], registers: Registers, raw: Raw
) -> None:
    """Replaces what a backward row left in e, and q times it in m, by the cotangent of y.

    Args:
        trace: The run.
        at: The stage, the network's output there, and the evaluation point.
        registers: Of the backward run; e holds the cotangent of what the limit gives.
        raw: What is added after the limit.
    """
    i, out, point = at
    stage, gradient = trace.plan.stages[i], trace.gradient
    assert isinstance(gradient, Discrete)
    assert registers.e is not None
    assert registers.m is not None
    passed = stage.threshold is not None and gradient.threshold == "straight-through"
    if passed and not raw:
        return
    y_bar = registers.e
    if not passed:
        outputs = out.to(point.dtype).view(-1, *point.shape)
        combined = combine(trace.weights(i), list(outputs))
        with torch.enable_grad():
            h = (stage.q * combined + stage.p * point).requires_grad_()
            for product in stage.products:
                if product.into == "y":
                    h = h + product.weight * trace.entry(product.entry, point) * point
            limited = h.clamp(*stage.clip) if stage.clip is not None else h
            if stage.threshold is not None:
                limited = threshold(h, *stage.threshold)
        (y_bar,) = torch.autograd.grad(limited, h, registers.e)
    for weight, slot, entry in raw:
        term = held(registers, slot)
        factor = 1.0 if entry is None else trace.entry(entry, point)
        y_bar = y_bar + weight * factor * term
    registers.e.copy_(y_bar)
    registers.m.view(-1, *point.shape).copy_(y_bar * stage.q)
