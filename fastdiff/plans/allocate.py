# SPDX-License-Identifier: Apache-2.0
"""Allotting the slots of the history: which slot keeps each output, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .stage import Stage


@dataclass(frozen=True)
class Allocation:
    """Slots allotted by liveness.

    Attributes:
        slots: How many slots there are.
        pushes: The slot that each stage keeps its h in; -1 where no later stage reads that h.
        reads: For each stage, the slot that holds each H_j that it reads.
    """

    slots: int
    pushes: tuple[int, ...]
    reads: tuple[dict[int, int], ...]


def allocate(stages: Sequence[Stage]) -> Allocation:
    """Allots as few slots as serve: a slot is free as soon as nothing reads what it holds.

    A stage's own push may take a slot that it reads for the last time: every element is read before
    it is written.
    """
    reads: list[list[tuple[int, int]]] = []  # (j, evaluation)
    last_read: dict[int, int] = {}
    done = 0
    for i, stage in enumerate(stages):
        reads.append([(j, done - j) for j in stage.history])
        last_read.update({source: i for _, source in reads[i]})
        done += stage.evaluate
    free: list[int] = []
    count = evaluation = 0
    slot_of: dict[int, int] = {}
    pushes, slotted = [], []
    for i, stage in enumerate(stages):
        slotted.append({j: slot_of[source] for j, source in reads[i]})
        free += [slot_of[source] for _, source in reversed(reads[i]) if last_read[source] == i]
        push = -1
        if stage.evaluate:
            if evaluation in last_read:
                if not free:
                    free.append(count)
                    count += 1
                push = slot_of[evaluation] = free.pop()
            evaluation += 1
        pushes.append(push)
    return Allocation(count, tuple(pushes), tuple(slotted))
