# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: one batched network call, combined inside the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._text import shown
from ..plans import Plan
from .base import Guidance, Weight
from .joining import joined


@dataclass(frozen=True, eq=False)
class CFG(Guidance):
    """Classifier-free guidance: out = uncond + scale (cond - uncond).

    The network is called once on 2 B samples, the unconditional half first, and the combination is
    part of the fused stage: it costs no pass over memory.

    Args:
        scale: A number; a tensor [B], one scale a sample; or a sequence of one scale a stage. The
            number 1 is no guidance, and calls the network on B samples.
        uncond: Conditioning of the unconditional branch, with `cond`'s structure. It has one key at
            least; keys that it lacks are shared with `cond`. Where `cond` has a tensor, `uncond`
            has a tensor with B or 1 samples, or a number. A tensor inside a list, a tuple or a
            dataclass of `cond` is handed whole to both branches; where its first dimension is B,
            `uncond` has to name the same tensor, so that nothing is shared by mistake.

    Source: Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, with
    scale = 1 + w.
    """

    scale: float | torch.Tensor | Sequence[float] = 1.0
    uncond: Any = None

    def __post_init__(self) -> None:
        scale = self.scale
        if isinstance(scale, torch.Tensor):
            if scale.ndim > 1 or scale.is_complex() or scale.dtype == torch.bool:
                raise ValueError(
                    "CFG: scale is a number, a real tensor [B] or a sequence of one a stage; got a "
                    f"{scale.dtype} tensor of shape {tuple(scale.shape)}."
                )
            if scale.requires_grad:
                raise ValueError(
                    "CFG: scale has no gradient; got a tensor that requires grad. Detach it."
                )
            if scale.ndim == 0:
                object.__setattr__(self, "scale", float(scale))
            else:
                own = scale.detach().to("cpu", torch.float64, copy=True)
                object.__setattr__(self, "scale", own)
        elif isinstance(scale, list | tuple | np.ndarray):
            object.__setattr__(self, "scale", _numbers(scale))
        elif isinstance(scale, int | float | np.number) and not isinstance(scale, bool):
            object.__setattr__(self, "scale", _number(scale))
        else:
            raise TypeError(
                f"CFG: scale is a number, a tensor [B] or a sequence of one a stage; got {scale!r}."
            )
        if isinstance(self.scale, torch.Tensor):
            # a value is not to be looked at while a function is compiled
            finite = torch.compiler.is_compiling() or bool(torch.isfinite(self.scale).all())
        else:
            scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
            finite = all(math.isfinite(s) for s in scales)
        if not finite:
            raise ValueError(f"CFG: scale is finite; got {shown(scale)}.")

    @property
    def branches(self) -> int:
        """Network outputs combined: 2, or 1 where the scale is the number 1."""
        return 1 if isinstance(self.scale, float) and self.scale == 1.0 else 2

    @property
    def per_sample(self) -> bool:
        """Whether each sample has its own scale."""
        return isinstance(self.scale, torch.Tensor)

    def weights(self, stage: int) -> tuple[Weight, ...]:
        """See `Guidance.weights`: (1 - scale, scale)."""
        scale: Any = self.scale[stage] if isinstance(self.scale, tuple) else self.scale
        return (1.0,) if self.branches == 1 else (1.0 - scale, scale)

    def combined_weights(self, stage: int, like: torch.Tensor) -> tuple[Weight, ...]:
        """See `Guidance.combined_weights`. A scale of each sample is rounded to like's dtype."""
        if not isinstance(self.scale, torch.Tensor):
            return self.weights(stage)
        scale = self.scale.to(like).reshape(-1, *[1] * (like.ndim - 1))
        return 1.0 - scale, scale

    def check(self, plan: Plan, batch: int) -> None:
        """See `Guidance.check`."""
        stages = len(plan.stages)
        if isinstance(self.scale, torch.Tensor) and len(self.scale) != batch:
            raise ValueError(
                f"CFG: a tensor of scales, one a sample, needs {batch} values; got "
                f"{len(self.scale)}."
            )
        if isinstance(self.scale, tuple) and len(self.scale) != stages:
            raise ValueError(
                f"CFG: a sequence of scales, one a stage, needs {stages} values (plan.stages); got "
                f"{len(self.scale)}. For one a sample give a tensor."
            )

    def conditions(self, cond: Any, batch: int) -> Any:
        """See `Guidance.conditions`: uncond first, then cond."""
        if self.branches == 1:
            return cond
        for name, value in (("cond", cond), ("uncond", self.uncond)):
            if value is None or (isinstance(value, Mapping) and not value):
                raise ValueError(
                    "sample: guidance compares a conditional and an unconditional output; got "
                    f"{name}={value}. Give cond={{...}} and CFG(scale, uncond={{...}})."
                )
        return joined((self.uncond, cond), batch)

    def conditions_given(self) -> Any:
        """See `Guidance.conditions_given`."""
        return self.uncond


def _numbers(scale: Any) -> tuple[float, ...]:
    try:
        return tuple(_number(s) for s in scale)
    except (TypeError, ValueError):
        raise TypeError(
            f"CFG: a scale a stage is a sequence of numbers; got {shown(scale)}."
        ) from None


def _number(scale: Any) -> float:
    """A scale as a float; infinite where it is larger than any."""
    try:
        return float(scale)
    except OverflowError:
        return math.inf
