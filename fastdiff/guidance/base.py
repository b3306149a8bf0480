# SPDX-License-Identifier: Apache-2.0
"""Guidance: the outputs of G branches of the network become one, each with its weight."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..plans import PackedRow, Plan

Weight = float | torch.Tensor


class Guidance(abc.ABC):
    """G branches of the network and the weights that combine their outputs.

    The network is called once on G * B samples, branch after branch. The combination is part of the
    fused stage: the weights stand in the table, and cost no pass over memory.
    """

    @property
    @abc.abstractmethod
    def branches(self) -> int:
        """Branches G."""

    @property
    @abc.abstractmethod
    def per_sample(self) -> bool:
        """Whether each sample has weights of its own."""

    @abc.abstractmethod
    def weights(self, stage: int) -> tuple[Weight, ...]:
        """The weights at a stage, one a branch: numbers, or float64 tensors [B] on the CPU."""

    @abc.abstractmethod
    def combined_weights(self, stage: int, like: torch.Tensor) -> tuple[Weight, ...]:
        """The weights at a stage, shaped to multiply samples like `like`."""

    @abc.abstractmethod
    def check(self, plan: Plan, batch: int) -> None:
        """Raises a ValueError unless the weights fit a plan and B samples."""

    @abc.abstractmethod
    def conditions(self, cond: Any, batch: int) -> Any:
        """The conditioning of all branches, made from that of the samples.

        Raises:
            ValueError, TypeError: The conditioning cannot be joined with that of the other
                branches.
        """

    @abc.abstractmethod
    def conditions_given(self) -> Any:
        """The conditioning that the guidance itself holds for its branches; None: it holds none."""


class Unguided(Guidance):
    """One branch of weight 1."""

    @property
    def branches(self) -> int:
        return 1

    @property
    def per_sample(self) -> bool:
        return False

    def weights(self, stage: int) -> tuple[Weight, ...]:
        return (1.0,)

    def combined_weights(self, stage: int, like: torch.Tensor) -> tuple[Weight, ...]:
        return (1.0,)

    def check(self, plan: Plan, batch: int) -> None:
        """Fits everything."""

    def conditions(self, cond: Any, batch: int) -> Any:
        return cond

    def conditions_given(self) -> Any:
        return None


UNGUIDED = Unguided()


def guided_rows(guidance: Guidance, plan: Plan, batch: int) -> list[PackedRow]:
    """The plan's packed rows with the weights of the branches in them.

    Args:
        guidance: The weights.
        plan: The plan, of S stages.
        batch: Samples B that the table is for. Samples past those that the guidance has weights for
            are not guided.

    Returns:
        S rows. Where each sample has weights of its own there are S * B, and row s * B + b is that
        of sample b at stage s.
    """
    rows = []
    for stage, row in enumerate(plan.rows((1.0,) * guidance.branches)):
        weights = guidance.weights(stage)
        if all(isinstance(w, float) and w == 1.0 for w in weights):
            rows.append(row)
            continue
        if not guidance.per_sample:
            rows.append(_weighed(row, [float(w) for w in weights]))
            continue
        each = torch.stack(
            [torch.as_tensor(w, dtype=torch.float64, device="cpu") for w in weights], dim=-1
        )
        padding = [*[0.0] * (guidance.branches - 1), 1.0]
        values = [*each.tolist(), *[padding] * (batch - len(each))]
        rows += [_weighed(row, own) for own in values]
    return rows


def _weighed(row: PackedRow, weights: Sequence[float]) -> PackedRow:
    return replace(row, k=tuple(k * w for k, w in zip(row.k, weights, strict=True)))


def combine(weights: Sequence[Weight], outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighed sum of the branches' outputs, in their order."""
    total = weights[0] * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output
    return total
