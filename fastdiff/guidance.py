# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: one batched network call, combined inside the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .plans import PackedRow, Plan


@dataclass(frozen=True, eq=False)
class CFG:
    """Classifier-free guidance: out = uncond + scale (cond - uncond).

    The network is called once on 2 B samples, the unconditional half first, and the combination is
    part of the fused stage: it costs no pass over memory.

    Args:
        scale: A number; a tensor [B], one scale a sample; or a sequence of one scale a stage. The
            number 1 is no guidance, and calls the network on B samples.
        uncond: Conditioning of the unconditional branch, with `cond`'s structure. Keys it lacks are
            shared with `cond`, but it has one at least. Where `cond` has a tensor, it has a tensor
            with B or 1 samples, or a number.

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
                object.__setattr__(self, "scale", scale.detach().cpu().double())
        elif isinstance(scale, list | tuple | np.ndarray):
            object.__setattr__(self, "scale", tuple(float(s) for s in scale))
        elif isinstance(scale, int | float | np.number) and not isinstance(scale, bool):
            object.__setattr__(self, "scale", float(scale))
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
            raise ValueError(f"CFG: scale is finite; got {scale!r}.")

    @property
    def branches(self) -> int:
        """Network outputs combined: 2, or 1 where the scale is the number 1."""
        return 1 if isinstance(self.scale, float) and self.scale == 1.0 else 2

    @property
    def per_sample(self) -> bool:
        """Whether each sample has its own scale."""
        return isinstance(self.scale, torch.Tensor)

    def rows(self, plan: Plan, batch: int) -> list[PackedRow]:
        """The plan's packed rows with guidance weights in them.

        Returns:
            S rows, or S * batch (row s * batch + b for sample b) where the scale is per sample.
        """
        if self.branches == 1:
            return plan.rows()
        stages = len(plan.stages)
        repeats, scale = 1, np.full(stages, self.scale if isinstance(self.scale, float) else 0.0)
        if isinstance(self.scale, torch.Tensor):
            self.check_samples(batch)
            repeats, scale = batch, np.tile(self.scale.numpy(), stages)
        elif isinstance(self.scale, tuple):
            if len(self.scale) != stages:
                raise ValueError(
                    f"CFG: a scale a stage needs {stages} values (plan.stages); got "
                    f"{len(self.scale)}. One a sample is a tensor."
                )
            scale = np.array(self.scale)
        each = [row for row in plan.rows() for _ in range(repeats)]
        return [
            replace(row, k=(row.k[0] * (1.0 - w), row.k[0] * w))
            for row, w in zip(each, scale.tolist(), strict=True)
        ]

    def check_samples(self, batch: int) -> None:
        """Raises a ValueError unless a scale per sample has `batch` of them."""
        if isinstance(self.scale, torch.Tensor) and len(self.scale) != batch:
            raise ValueError(f"CFG: a scale a sample needs {batch} values; got {len(self.scale)}.")

    def padded(self, batch: int) -> CFG:
        """The same for a batch of at least as many samples; those added are not guided."""
        if not isinstance(self.scale, torch.Tensor):
            return self
        more = self.scale.new_ones(batch - len(self.scale))
        return CFG(torch.cat([self.scale, more]), self.uncond)

    def weights(self, stage: int, x: torch.Tensor) -> tuple[Any, Any]:
        """(uncond, cond) weights at a stage, shaped to multiply samples like x."""
        scale: Any = self.scale
        if isinstance(scale, torch.Tensor):
            scale = scale.to(x).reshape(-1, *[1] * (x.ndim - 1))
        elif isinstance(scale, tuple):
            scale = scale[stage]
        return 1.0 - scale, scale


def arguments_of(cond: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword arguments of the network after x and t."""
    if cond is None:
        return (), {}
    return ((), cond) if isinstance(cond, Mapping) else ((cond,), {})


@dataclass(frozen=True, eq=False)
class PerStage:
    """Conditioning that changes along the run: an entry of `cond` with one value a stage.

    Args:
        values: [S, B, ...]: the network is given `values[i]` at stage i of the plan.
    """

    values: torch.Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.values, torch.Tensor) or self.values.ndim < 2:
            got = tuple(self.values.shape) if isinstance(self.values, torch.Tensor) else self.values
            raise ValueError(
                f"PerStage: values is a tensor [S, B, ...], one entry a stage; got {got!r}."
            )


def varies(cond: Any) -> bool:
    """Whether a (nested) dict holds a `PerStage`."""
    if isinstance(cond, Mapping):
        return any(varies(value) for value in cond.values())
    return isinstance(cond, PerStage)


def at_stage(cond: Any, i: int) -> Any:
    """The conditioning at stage i."""
    if isinstance(cond, Mapping):
        return {key: at_stage(value, i) for key, value in cond.items()}
    return cond.values[i] if isinstance(cond, PerStage) else cond


def check_stages(cond: Any, stages: int, where: str = "cond") -> None:
    """Raises unless every `PerStage` has one entry a stage."""
    if isinstance(cond, Mapping):
        for key, value in cond.items():
            check_stages(value, stages, f"{where}[{key!r}]")
    elif isinstance(cond, PerStage) and len(cond.values) != stages:
        raise ValueError(
            f"sample: a PerStage has one entry a stage of the plan, {stages} here; got {where} of "
            f"shape {tuple(cond.values.shape)}."
        )


def check_batch(cond: Any, batch: int, where: str = "cond") -> None:
    """Raises unless every tensor in a (nested) dict has `batch` samples in its first dimension."""
    if isinstance(cond, PerStage):
        check_batch(cond.values[0], batch, f"one stage of {where}")
    elif isinstance(cond, Mapping):
        for key, value in cond.items():
            check_batch(value, batch, f"{where}[{key!r}]")
    elif isinstance(cond, torch.Tensor) and (cond.ndim == 0 or cond.shape[0] != batch):
        raise ValueError(
            f"sample: a tensor in the conditioning has one entry a sample in its first dimension, "
            f"{batch} here; got {where} of shape {tuple(cond.shape)}. Expand it, or put a tensor "
            "without a batch dimension inside a tuple, which is handed to the network as it is."
        )


def batched(cond: Any, uncond: Any, batch: int, where: str = "cond") -> Any:
    """Conditioning of the doubled batch: uncond first, then cond, leaf by leaf.

    Args:
        cond, uncond: See `CFG`.
        batch: Samples B.
        where: Path, for errors.
    """
    if isinstance(cond, Mapping):
        if not isinstance(uncond, Mapping):
            raise TypeError(
                f"CFG: uncond has the structure of cond; {where} is a dict and uncond has "
                f"{type(uncond).__name__} there."
            )
        for key in uncond:
            if key not in cond:
                raise ValueError(
                    f"CFG: uncond has the structure of cond; {where} has no {key!r} "
                    f"(it has {', '.join(map(repr, cond)) or 'nothing'})."
                )
        return {
            key: batched(value, uncond.get(key, _shared(value)), batch, f"{where}[{key!r}]")
            for key, value in cond.items()
        }
    if isinstance(cond, PerStage):
        stages = len(cond.values)
        if not isinstance(uncond, PerStage):
            if isinstance(uncond, torch.Tensor) and uncond.ndim:
                uncond = uncond.expand(stages, *uncond.shape)
        elif len(uncond.values) != stages:
            raise ValueError(
                f"CFG: where cond has a PerStage of {stages} stages uncond has one of as many, a "
                f"tensor or a number; got {len(uncond.values)} for {where}."
            )
        else:
            uncond = uncond.values
        each = [
            batched(value, uncond[i] if isinstance(uncond, torch.Tensor) else uncond, batch, where)
            for i, value in enumerate(cond.values)
        ]
        return PerStage(torch.stack(each))
    if isinstance(cond, torch.Tensor):
        if uncond is cond:
            other = cond
        elif isinstance(uncond, torch.Tensor | int | float) and not isinstance(uncond, bool):
            if isinstance(uncond, float) and not (cond.is_floating_point() or uncond.is_integer()):
                raise ValueError(
                    f"CFG: {where} holds {cond.dtype}; got the unconditional value {uncond}."
                )
            if isinstance(uncond, torch.Tensor):
                other = uncond.to(cond.device, cond.dtype)
            else:
                other = cond.new_full((), uncond)  # no copy from the host
            if other.ndim == 0 or (other.ndim == cond.ndim and other.shape[0] == 1):
                other = other.expand(batch, *(other.shape[1:] or cond.shape[1:]))
        else:
            raise TypeError(
                f"CFG: where cond has a tensor uncond has a tensor or a number; got "
                f"{type(uncond).__name__} for {where}."
            )
        if other.shape != cond.shape:
            raise ValueError(
                f"CFG: uncond has cond's shape, or one sample of it; {where} is "
                f"{tuple(cond.shape)} and uncond has {tuple(other.shape)}."
            )
        return torch.cat([other, cond])
    if uncond is not cond:
        same = type(uncond) is type(cond) and isinstance(cond, str | int | float) and uncond == cond
        if not same:
            raise TypeError(
                f"CFG: only tensors can differ between the branches, which share one network call; "
                f"{where} is {type(cond).__name__}. Leave it out of uncond, or give tensors."
            )
    return cond


def _shared(value: Any) -> Any:
    """What uncond has for an entry that it lacks: cond's own."""
    return {} if isinstance(value, Mapping) else value
