# SPDX-License-Identifier: Apache-2.0
"""What a backend is: it binds registers and a packed table once, then runs stages.

The row's formulas stand in `fastdiff.plans.plan`. They are elementwise but for one: a row with the
THRESHOLD flag needs of each sample

    s = max(quantile of |h|, floor),    h <- clip(h, -s, s) / s

before h enters the update, the history or anything else. The quantile lies at position
quantile (n - 1), in float64, between the exact order statistics of the sample's n magnitudes;
interpolated linearly in float64 and rounded once to the state's dtype. It depends on that sample
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..plans import Layout

RunStage = Callable[[int, torch.Tensor | None, torch.Tensor | None], None]


@dataclass(frozen=True)
class Registers:
    """The tensors of one run: B samples of n elements each. Every tensor is contiguous.

    Attributes:
        x: State, [B, ...], float32 or float64 (torch backend: any floating dtype). Updated in
            place.
        e: Evaluation point, like x; None where the plan never writes one.
        history: Slots of earlier h, [slots, B, ...], the state's dtype. May hold anything at first.
        m: The network's next input, [copies * B, ...], the network's dtype: each stage writes
            c_in_next * point once per copy. None where the network is given x or e itself.
        bank: Read-only input registers, [K, 1 or B, ...], the state's dtype; rows name them by
            number. With one sample all of B read it.
        scalars: S, [B, C]: numbers of each sample that measures leave and coefficients are
            multiplied by. The arithmetic dtype: float32, float64 for a float64 state.
        seeds: One 64-bit seed a sample as int64 bit patterns, [B]; None for plans without noise.
    """

    x: torch.Tensor
    e: torch.Tensor | None = None
    history: torch.Tensor | None = None
    m: torch.Tensor | None = None
    bank: torch.Tensor | None = None
    scalars: torch.Tensor | None = None
    seeds: torch.Tensor | None = None


class Backend(Protocol):
    """One implementation of the stage."""

    name: str

    def missing(self) -> str | None:
        """None where the backend can run here; else what is missing and how to get it."""
        ...

    def supports(
        self, state: torch.dtype, network: torch.dtype, device: torch.device
    ) -> str | None:
        """None where the dtypes and device can be served; else the reason."""
        ...

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
    ) -> RunStage:
        """Prepares the stage for these registers.

        Args:
            registers: Tensors of the run; they stay where they are for the life of the result.
            table: Packed rows, float64 [rows, layout.width], CPU; read at every call, so that its
                coefficients may be replaced in place between runs.
            layout: Columns of the table.
            stage_index: int64 [B]: sample b runs row `row + stage_index[b]`. None: all run `row`.
            row_index: int64 [1], added to `row` for all. Both are read at every call, and lie
                beside the registers.

        Returns:
            `run(row, out, xi)`. `out`: the network's output, [layout.branches * B, ...], branch g
            at [g * B, (g + 1) * B), any floating dtype; None where the row does not evaluate.
            `xi`: noise [B, ...] in the state's dtype, used instead of the row's own draws; None
            draws.
        """
        ...
