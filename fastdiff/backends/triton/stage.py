# SPDX-License-Identifier: Apache-2.0
"""A stage bound to registers and a table: what a call may still get wrong, and its launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...plans import Layout
from ..base import Registers
from ..compiled import upload
from .checks import arithmetic, span
from .launches import (
    BLOCK,
    MEASURE_OPTIONS,
    OPTIONS,
    SCALE_OPTIONS,
    STATES,
    Facts,
    Launch,
    interpreting,
    launch_shape,
    launcher,
    names,
    sample_shape,
)
from .rows import Rows, check_rows

Tensor = torch.Tensor
# What is launched for outputs and noise of one dtype, alignment and stride.
Step = Callable[[int, Tensor | None, Tensor | None], None]


class TritonStage:
    """A bound stage; `run(row, out, xi)` is that of `BoundStage`.

    Attributes:
        table: The rows on the device, [rows, width] in the arithmetic type (float32; float64 for a
            float64 state). Kernels read it at every launch, captured ones too: coefficients may be
            overwritten in place; nothing checks what is written. Coefficients that underflow to 0
            in float32 count as 0.
        exact: The rows on the device in float64, None where no row thresholds or measures; for a
            float64 state `table` itself. Quantiles and all columns of measures are read here,
            everything else in `table`.

    A change made to the CPU table by PyTorch is uploaded at the next call; `refresh` does so at
    once, and for changes that PyTorch does not see. Neither happens inside a replayed graph.
    A row index outside the table is not reported: its sample is left as it is.
    """

    capturable = True

    def __init__(
        self,
        registers: Registers,
        table: Tensor,
        layout: Layout,
        stage_index: Tensor | None,
        row_index: Tensor | None,
        offset: int,
    ) -> None:
        x, m, bank, scalars = registers.x, registers.m, registers.bank, registers.scalars
        self._registers, self._layout = registers, layout
        self._indices = (stage_index, row_index)
        self._row_is_known = stage_index is None and row_index is None
        self._first_quad = offset // 4 or None
        self._batch, self._size = x.shape[0], math.prod(x.shape[1:])
        self._wanted = torch.Size((layout.branches * x.shape[0], *x.shape[1:]))
        self._steps: dict[tuple[Any, ...], tuple[Step, Step]] = {}
        self._spans = [span(t) for t in (x, registers.e, m) if t is not None and t.numel()]
        self._interpreted = interpreting()

        rows = check_rows(table.numpy(), layout, registers)
        self._facts = Facts(
            layout,
            rows.needs(),
            copies=m.shape[0] // self._batch if m is not None and self._batch else 0,
            columns=0 if scalars is None else scalars.shape[1],
            shared=bank is not None and bank.shape[1] < self._batch,
        )
        needs = self._facts.needs
        number = arithmetic(x.dtype)
        self.table = torch.empty(table.shape, dtype=number, device=x.device)
        self.exact: Tensor | None = None
        if needs.thresholds or needs.measures:
            self.exact = self.table
            if number != torch.float64:
                self.exact = torch.empty(table.shape, dtype=torch.float64, device=x.device)
        self._scale: Tensor | None = None
        if needs.thresholds:
            self._scale = torch.ones(self._batch, dtype=number, device=x.device)
        self._take(rows, table)

    def refresh(self, table: Tensor) -> None:
        """Uploads a table of the same structure over `self.table`.

        Args:
            table: float64 [rows, width], CPU. It is checked, and read from here on.

        Raises:
            TypeError, ValueError: It is no such table, or its rows need what those of the bound
                table do not: more draws, a clip, a threshold, ...
        """
        if table.shape != self.table.shape or table.dtype != torch.float64 or not table.is_cpu:
            raise ValueError(
                f"triton backend: the table is float64 {list(self.table.shape)} on the CPU; got "
                f"{table.dtype} {list(table.shape)} on {table.device}."
            )
        rows = check_rows(table.numpy(), self._layout, self._registers)
        beyond = rows.needs().beyond(self._facts.needs)
        if beyond:
            raise ValueError(
                "triton backend: kernels are bound for what the rows of a table do; those of the "
                f"new one also {', '.join(beyond)}. Bind it anew."
            )
        self._take(rows, table)

    def check(self) -> None:
        """Raises nothing: the kernels refuse no row; see the class."""

    def run(self, row: int, out: Tensor | None, xi: Tensor | None) -> None:
        """Runs one row: the scales of its threshold, where it has one, and the update.

        Raises:
            IndexError: The table has no such row.
            TypeError, ValueError: out or xi is missing, or is not what the row needs.
        """
        self._launch(0, row, out, xi)

    __call__ = run

    def measure(self, row: int, out: Tensor | None, xi: Tensor | None) -> None:
        """Makes the measures of one row, into `Registers.scalars`; to be called before `run`.

        Arguments and errors are those of `run`. Nothing is done where no row of the table measures.
        """
        self._launch(1, row, out, xi)

    def _take(self, rows: Rows, table: Tensor) -> None:
        self._source, self._version = table, _version(table)
        upload(self.table, table)
        if self.exact is not None and self.exact is not self.table:
            upload(self.exact, table)
        # what a row needs of a call; with indices on the device every row may run
        noise, draws = rows.reads_noise(), rows["draws"] != 0
        undrawn, drawn = noise & ~draws, noise & draws
        if not self._row_is_known:
            undrawn, drawn = undrawn | undrawn.any(), drawn | drawn.any()
        self._needs_out = rows.evaluates.tolist()
        self._needs_xi, self._needs_seeds = undrawn.tolist(), drawn.tolist()

    def _launch(self, which: int, row: int, out: Tensor | None, xi: Tensor | None) -> None:
        if self._version != _version(self._source):
            self.refresh(self._source)
        if out is not None:
            out = self._checked_out(out)
        if xi is not None:
            xi = self._checked_xi(xi)
        self._check_row(row, out, xi)
        if self._batch == 0 or self._size == 0:
            return
        key = (
            None if out is None else (out.dtype, out.data_ptr() % 16 == 0, out.stride()),
            None if xi is None else xi.data_ptr() % 16 == 0,
        )
        steps = self._steps.get(key)
        if steps is None:
            steps = self._steps[key] = self._prepared(out, xi)
        device = self._registers.x.device
        if self._interpreted or torch.cuda.current_device() == device.index:
            steps[which](row, out, xi)
        else:
            with torch.cuda.device(device):
                steps[which](row, out, xi)

    def _prepared(self, out: Tensor | None, xi: Tensor | None) -> tuple[Step, Step]:
        """What `run` and `measure` do for outputs and noise of this dtype, alignment and stride."""
        needs, facts = self._facts.needs, self._facts
        # the stride of samples; a network may return any where there is one sample
        stride = self._size if out is None or out.is_contiguous() else out.stride(0)
        draws = 0 if xi is not None else needs.draws
        thresholds = needs.thresholds and out is not None
        apart = self._indices[0] is not None or thresholds or needs.scalars or facts.shared
        bytes_each = self.table.element_size()
        sizes = (self._batch, self._size, stride)
        shape = launch_shape(*sizes, draws, apart, BLOCK[bytes_each])
        constants = facts.constants() | {"MOST_DRAWS": draws}
        update = self._update(shape, constants, scaled=thresholds)
        if not (thresholds or needs.measures):
            return update, _nothing
        # one program a sample: they are always apart
        _, numbers, units = launch_shape(*sizes, 0, True, BLOCK[bytes_each])
        after = (self.table.shape[0], *numbers)
        grid, tile = sample_shape(self._batch, self._size, bytes_each)
        constants |= units | tile
        measure = self._measures(grid, constants, after, draws) if needs.measures else _nothing
        if not thresholds:
            return update, measure
        scale = self._scales(grid, constants, after)

        def run(row: int, out: Tensor | None, xi: Tensor | None) -> None:
            # at rows without a threshold too: a captured launch may meet another table
            scale(row, out, xi)
            update(row, out, xi)

        return run, measure

    def _update(self, shape: Any, constants: dict[str, int], scaled: bool) -> Step:
        from ...kernels.stage import stage_kernel

        r, needs = self._registers, self._facts.needs
        grid, numbers, units = shape
        history = r.history if r.history is not None and r.history.shape[0] else None
        bank = r.bank if self._layout.extras or needs.products else None
        seeds = r.seeds if constants["MOST_DRAWS"] else None
        scalars = r.scalars if needs.scalars else None
        scale = self._scale if scaled else None
        first_quad = self._first_quad if constants["MOST_DRAWS"] else None
        constants = constants | units
        if scalars is None:
            constants["SCALARS"] = 0
        launch = launcher(stage_kernel, grid, constants, OPTIONS)
        before = (r.x, r.e, history, r.m)
        between = (bank, seeds, self.table, *self._indices, scale, scalars)
        after = (self.table.shape[0], *numbers, first_quad)

        def step(row: int, out: Tensor | None, xi: Tensor | None) -> None:
            launch(*before, out, xi, *between, row, *after)

        return step

    def _scales(self, grid: Any, constants: dict[str, int], after: tuple[int, ...]) -> Step:
        from ...kernels.threshold import scale_kernel

        r, needs = self._registers, self._facts.needs
        launch: Launch = launcher(scale_kernel, grid, constants, SCALE_OPTIONS)
        before = (self._scale, self.exact, r.x, r.e)
        bank = r.bank if needs.products else None
        scalars = r.scalars if needs.scalars else None
        between = (bank, self.table, *self._indices, scalars)

        def step(row: int, out: Tensor | None, xi: Tensor | None) -> None:
            launch(*before, out, *between, row, *after)

        return step

    def _measures(
        self, grid: Any, constants: dict[str, int], after: tuple[int, ...], draws: int
    ) -> Step:
        from ...kernels.reduce import measure_kernel

        r = self._registers
        launch: Launch = launcher(measure_kernel, grid, constants, MEASURE_OPTIONS)
        before = (r.scalars, self.exact, r.x, r.e, r.history)
        seeds = r.seeds if draws else None
        between = (r.bank, seeds, self.table, *self._indices)
        first_quad = self._first_quad if draws else None

        def step(row: int, out: Tensor | None, xi: Tensor | None) -> None:
            launch(*before, out, xi, *between, row, *after, first_quad)

        return step

    def _check_row(self, row: int, out: Tensor | None, xi: Tensor | None) -> None:
        if not 0 <= row < len(self._needs_out):
            raise IndexError(
                f"triton backend: row lies in [0, {len(self._needs_out)}), the table's; got {row}."
            )
        if out is None and self._row_is_known and self._needs_out[row]:
            raise ValueError(f"triton backend: row {row} evaluates the network. Give out.")
        if xi is None:
            if self._needs_xi[row]:
                raise ValueError(
                    "triton backend: a row that weighs noise draws it or is given it; row "
                    f"{row} draws none. Give xi."
                )
            if self._needs_seeds[row] and self._registers.seeds is None:
                raise ValueError(
                    f"triton backend: row {row} draws noise. Bind Registers.seeds, or give xi."
                )

    def _checked_out(self, out: Tensor) -> Tensor:
        device = self._registers.x.device
        if out.dtype not in STATES:
            raise TypeError(
                f"network output: its dtype is one of {names(STATES)}; got {out.dtype}. "
                'Cast it, or use backend="torch".'
            )
        if out.shape != self._wanted:
            raise ValueError(
                f"network output: its shape is {list(self._wanted)}, the sample's (times the "
                f"guidance branches); got {list(out.shape)}. Slice off what the network returns "
                "besides."
            )
        if out.device != device:
            raise ValueError(
                f"network output: it lies on {device}, with the registers; got {out.device}."
            )
        if not out.is_contiguous() and (out.numel() == 0 or not out[0].is_contiguous()):
            return out.contiguous()
        address = out.data_ptr()
        for low, high in self._spans:
            # a register itself is read and written element by element; any other view of one
            # would be read by programs other than those that write it
            if low < address < high or (address == low and not out.is_contiguous()):
                return out.clone(memory_format=torch.contiguous_format)
        return out

    def _checked_xi(self, xi: Tensor) -> Tensor:
        x = self._registers.x
        if xi.dtype != x.dtype:
            raise TypeError(f"triton backend: xi is {x.dtype}; got {xi.dtype}.")
        if xi.shape != x.shape:
            raise ValueError(f"triton backend: xi is {list(x.shape)}; got {list(xi.shape)}.")
        if xi.device != x.device:
            raise ValueError(f"triton backend: xi lies on {x.device}; got {xi.device}.")
        return xi.contiguous()


def _nothing(row: int, out: Tensor | None, xi: Tensor | None) -> None:
    """The measures of a table that has none."""


def _version(table: Tensor) -> int:
    return 0 if table.is_inference() else table._version
