# SPDX-License-Identifier: Apache-2.0
"""Bytes that a stage must move between memory and processor, counted from its plan's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from ..plans import AT_E, EVALUATE, WRITES_E, WRITES_X, Layout, Plan, Transposed


@dataclass(frozen=True)
class Backward:
    """A transposed plan with the attributes that are read of a plan."""

    transposed: Transposed

    @property
    def layout(self) -> Layout:
        return self.transposed.layout

    @property
    def slots(self) -> int:
        return self.transposed.slots

    @property
    def stages(self) -> tuple[Any, ...]:
        """Whether each row evaluates; row 0 makes h_bar of the last stage and evaluates nothing."""
        flags = (row.flags for row in self.transposed.rows)
        return tuple(SimpleNamespace(evaluate=bool(f & EVALUATE)) for f in flags)

    def pack(self, weights: Sequence[float]) -> Any:
        return self.transposed.pack(len(weights))


def stage_registers(
    plan: Plan | Backward, row: int, weights: Sequence[float] = (1.0,)
) -> tuple[int, int]:
    """(reads, writes) of whole registers that one row of a plan costs, by its table.

    Reads: x, e, one output per guidance branch (`weights`), each earlier h that is weighed, each
    extra register. Writes: x, e and the push. The network's input m is not among them
    (`stage_bytes` adds it).
    """
    layout = replace(plan.layout, branches=len(weights))
    value = dict(zip(layout.columns, plan.pack(weights)[row].tolist(), strict=True))
    flags = int(value["flags"])
    writes_x, writes_e = bool(flags & WRITES_X), bool(flags & WRITES_E)
    evaluates, at_e = bool(flags & EVALUATE), bool(flags & AT_E)
    point = evaluates and value["p"] != 0.0
    reads_x = (writes_x and value["a_x"] != 0.0) or (writes_e and value["d_x"] != 0.0)
    reads_e = (writes_x and value["a_e"] != 0.0) or (writes_e and value["d_e"] != 0.0)
    reads = int(reads_x or (point and not at_e)) + int(reads_e or (point and at_e))
    if evaluates:
        reads += sum(value[f"k_{g}"] != 0.0 for g in range(layout.branches))
    pairs = [(f"past_b_{k}", f"past_g_{k}") for k in range(int(value["n_terms"]))]
    pairs += [(f"r_{i}", f"s_{i}") for i in range(layout.extras)]
    reads += sum((writes_x and value[b] != 0.0) or (writes_e and value[g] != 0.0) for b, g in pairs)
    return reads, int(writes_x) + int(writes_e) + int(value["push"] >= 0) + int(
        value["push_x"] >= 0
    )


def stage_bytes(
    plan: Plan | Backward,
    row: int,
    numel: int,
    state: torch.dtype = torch.float32,
    network: torch.dtype | None = None,
    weights: Sequence[float] = (1.0,),
    copies: int | None = None,
) -> int:
    """Bytes that one row of a plan moves between memory and processor at best.

    Args:
        plan: The plan.
        row: Which stage.
        numel: Elements of the state.
        state: Dtype of the registers.
        network: Dtype of the network's inputs and outputs. None: the state's, and the network is
            given x or e itself. Another one: the input m is written as well, except by the last
            row.
        weights: Of the guidance branches, one output each.
        copies: How often the input m is written. None: once where the dtypes differ, else not.
    """
    reads, writes = stage_registers(plan, row, weights)
    network = state if network is None else network
    if copies is None:
        copies = int(network != state)
    outputs = plan.stages[row].evaluate * sum(w != 0.0 for w in weights)
    inputs = copies * (row + 1 < len(plan.stages))
    whole = (reads - outputs + writes) * state.itemsize
    return (whole + (outputs + inputs) * network.itemsize) * numel
