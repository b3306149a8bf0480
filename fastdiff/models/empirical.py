# SPDX-License-Identifier: Apache-2.0
"""The exact optimal denoiser of a finite data set: what an infinitely large network would learn."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .mixture import ExactModel, as_float64

# Distances held at a time: 64 MiB of float64.
_BLOCK = 1 << 23
# Stand-ins for zero whose squares are still normal float64 numbers.
_TINY = 1e-150


class EmpiricalDenoiser(ExactModel):
    """E[x0 | x_t] when x0 is drawn from N given samples, each as likely as any other.

        x0    = sum_i r_i x_i,   r = softmax_i(-|x - alpha x_i|² / (2 sigma²))
        score = (alpha x0 - x) / sigma²

    It samples its data back: useful where the true flow of realistic data must be known exactly.
    At sigma = 0, x0 is the nearest x_i (in the metric |x - alpha x_i|; the mean of several equally
    near) and epsilon is 0, its limit on the data; off the data epsilon has no limit and the score
    overflows. At alpha = 0, x0 is the mean of the data.

    Args:
        data: Samples, [N, ...], N >= 1; kept in float64.
        labels: Class ids, integers >= 0, [N]; they allow conditioning by y. None: no classes.

    Raises:
        ValueError: The data are empty or not finite, or labels do not fit.
        TypeError: labels are not integers.

    Memory is O(B N): distances are summed directly, never as |x|² - 2 x.x_i + |x_i|², which loses
    every digit once sigma is 1e-8 of |x|. Without gradients the batch is worked off in blocks.
    Differentiable in x alone.
    """

    def __init__(self, data: ArrayLike | Tensor, labels: ArrayLike | Tensor | None = None) -> None:
        data = as_float64(data).detach()
        if data.ndim < 2 or not data.numel():
            raise ValueError(
                f"EmpiricalDenoiser: data has shape [N, ...] with N >= 1; got {list(data.shape)}. "
                "Stack the samples along the first dimension."
            )
        if not bool(data.isfinite().all()):
            raise ValueError(
                "EmpiricalDenoiser: data are finite; got "
                f"{int((~data.isfinite()).sum())} values that are not. Remove them."
            )
        self.data = data
        self.labels = None
        if labels is not None:
            ids = torch.as_tensor(labels, device=data.device)
            if ids.is_floating_point():
                raise TypeError(
                    f"EmpiricalDenoiser: labels are integers; got {ids.dtype}. Use labels.long()."
                )
            if ids.shape != data.shape[:1] or bool((ids < 0).any()):
                raise ValueError(
                    f"EmpiricalDenoiser: labels are ids >= 0 of shape [N] = [{len(data)}]; got "
                    f"shape {list(ids.shape)}, smallest {ids.min() if ids.numel() else None}. "
                    "-1 means no class, and belongs in y."
                )
            self.labels = ids.long()

    @property
    def _shape(self) -> torch.Size:
        return self.data.shape[1:]

    def _x0_and_score(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        data = self.data.reshape(len(self.data), -1).to(x.device)
        alpha, sigma = alpha.expand(len(x), 1), sigma.expand(len(x), 1)
        prior = self._among(y, x.new_zeros(len(data))).expand(len(x), -1)
        rows = max(1, _BLOCK // len(data))
        blocks = zip(*(part.split(rows) for part in (x, alpha, sigma, prior)), strict=True)
        x0 = torch.cat([_posterior_mean(data, *block) for block in blocks])
        return x0, (alpha * x0 - x) / sigma.clamp(min=_TINY).square()


def _posterior_mean(data: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prior: Tensor) -> Tensor:
    """x [B, D], alpha and sigma [B, 1], prior [B, N] (0 or -inf) -> [B, D]."""
    with torch.no_grad():
        # |x - alpha x_i|² / sigma² = |x/alpha - x_i|² (alpha/sigma)², alpha not 0
        scale = alpha.clamp(min=_TINY**0.5)
        distance = torch.cdist(x / scale, data, compute_mode="donot_use_mm_for_euclid_dist")
        squared = distance.square_().masked_fill_(prior.isneginf(), np.inf)
        # from the nearest, so that 0 / tiny is 0 and the rest is -inf at sigma = 0
        squared -= squared.amin(1, keepdim=True)
        logits = squared.mul_(-0.5) / (sigma / scale).clamp(min=_TINY).square()
    if x.requires_grad:
        # Up to a shift common to all i, the logits are linear in x: this term is 0 in value and
        # exact in every derivative, and autograd keeps [B, N] instead of [B, N, D].
        slope = alpha / sigma.clamp(min=_TINY).square()
        center = data - data.mean(0)
        logits = logits + slope * ((x - x.detach()) @ center.T)
    return logits.softmax(1) @ data
