# SPDX-License-Identifier: Apache-2.0
"""What a backend is: it binds registers and a packed table once, then runs stages.

The row's formulas stand in `fastdiff.plans`. They are elementwise but for two things. A row with
the THRESHOLD flag needs of each sample

    s = min(max(quantile of |y|, floor), ceiling),    h <- clip(y, -s, s) / s

before h enters the update, the history or anything else. The quantile lies at position
quantile (n - 1), in float64, between the exact order statistics of the sample's n magnitudes;
interpolated linearly in float64 and rounded once to the state's dtype. It depends on that sample
alone. And a row with measures leaves numbers of each sample in `Registers.scalars`, in a launch of
its own before the row's update: `BoundStage.measure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..plans import Layout


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


class BoundStage(Protocol):
    """A backend with registers and a table: it runs the table's rows.

    Attributes:
        capturable: As of the backend.
    """

    capturable: bool

    @property
    def table(self) -> torch.Tensor:
        """The rows that `run` reads, [rows, layout.width].

        They lie beside the registers where the backend keeps them on a device. Values may be
        replaced in place between runs.
        """
        ...

    def run(self, row: int, out: torch.Tensor | None, xi: torch.Tensor | None) -> None:
        """Updates the registers by one row.

        Args:
            row: Its number; stage_index and row_index are added to it.
            out: The network's output, [layout.branches * B, ...], branch g at
                [g * B, (g + 1) * B), any floating dtype; None where the row does not evaluate.
            xi: Noise [B, ...] in the state's dtype, used instead of the row's own draws; None
                draws.
        """
        ...

    def measure(self, row: int, out: torch.Tensor | None, xi: torch.Tensor | None) -> None:
        """Makes the row's measures and leaves them in `Registers.scalars`.

        It is called before `run` for rows that have measures, with the same arguments.
        """
        ...

    def refresh(self, table: torch.Tensor) -> None:
        """Puts other rows in the table's place: float64, of the same size."""
        ...

    def check(self) -> None:
        """Raises what a device has refused since; waits for it."""
        ...


class Backend(Protocol):
    """One implementation of the stage.

    Attributes:
        name: What `get` and `backend=` take.
        capturable: Whether a launch may be recorded and replayed: it reads the table, the indices
            and the noise's seeds where they lie, and waits for nothing.
        counts_writes: Whether PyTorch's version counters see what a stage writes.
    """

    name: str
    capturable: bool
    counts_writes: bool

    def missing(self) -> str | None:
        """None where the backend can run here; else what is missing and how to get it."""
        ...

    def supports(
        self,
        state: torch.dtype,
        network: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
    ) -> str | None:
        """None where the dtypes, the device and the layout can be served; else the reason."""
        ...

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        offset: int = 0,
    ) -> BoundStage:
        """Prepares the stage for these registers.

        Args:
            registers: Tensors of the run; they stay where they are for the life of the result.
            table: Packed rows, float64 [rows, layout.width], CPU; read at every call, so that its
                coefficients may be replaced in place between runs.
            layout: Columns of the table.
            stage_index: int64 [B]: sample b runs row `row + stage_index[b]`. None: all run `row`.
            row_index: int64 [1], added to `row` for all. Both are read at every call, and lie
                beside the registers.
            offset: The noise of element i of a sample is that of element i + offset: the registers
                hold a part of longer samples. A multiple of 4. Thresholds and measures see the
                part alone.
        """
        ...
