# SPDX-License-Identifier: Apache-2.0
"""Triton: one stage in one pass over memory, on NVIDIA GPUs, compiled at its first call.

`bind` checks everything that does not change between stages, uploads the table and fixes the
launch; a stage is then one launch on the current stream (two where a row of the table thresholds:
the first finds each sample's scale), with no copy, no synchronisation and no allocation. Triton is
imported by the first `bind`. Under Triton's interpreter (TRITON_INTERPRET=1 set before triton is
imported) the same kernels run on CPU tensors, a hundred times slower, for tests; `choose` never
picks that.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..plans import AT_E, CLIP, EVALUATE, THRESHOLD, WRITES_E, WRITES_X, Layout
from ..plans.layout import ALL_FLAGS
from .base import Registers
from .compiled import upload

_STATES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OLDEST = (3, 3)  # the first with tuples of pointers as kernel arguments

WARPS = 4
# Elements of a program's tile, at most: 8 a thread, two 16-byte vectors of float32 or one of 16
# bits; 4 in float64, which takes twice the registers.
BLOCK = {4: 1024, 8: 512}
# The kernel of the scales has one program a sample, so it is given more warps and a larger tile;
# and registers such that two programs fit a multiprocessor.
SCALE_WARPS = 16
SCALE_BLOCK = {4: 4096, 8: 2048}
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
SCALE_OPTIONS = {"num_warps": SCALE_WARPS, "enable_fp_fusion": False, "maxnreg": 64}
_MOST_PROGRAMS = 2**31 - 1
# Constants of the stage's kernel that do not depend on the sizes, in its order.
_FACTS = (
    *("TERMS", "BRANCHES", "EXTRAS", "BRANCH_AT", "EXTRA_AT", "WIDTH"),
    *("SHARED", "COPIES", "MOST_DRAWS", "CLIPS", "PUSHES_X"),
)


class TritonBackend:
    name = "triton"
    capturable = True
    counts_writes = False

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # under another name
            version = importlib.metadata.version("triton")
            if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
                return f"triton {version} is too old; pip install --upgrade triton"
        if not interpreting() and not torch.cuda.is_available():
            return (
                "it needs an NVIDIA GPU with its driver and a CUDA build of torch "
                "(torch.cuda.is_available() is False); for tests, TRITON_INTERPRET=1 set before "
                "Python starts runs it on CPU tensors"
            )
        return None

    def supports(
        self,
        state: torch.dtype,
        network: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
    ) -> str | None:
        served = "cpu" if interpreting() else "cuda"
        if device.type != served:
            how = " (TRITON_INTERPRET=1 is set)" if interpreting() else ""
            return f"it runs {served} tensors{how}; got {device}"
        if state not in _STATES:
            return f"it keeps the state in {_names(_STATES)}; got {state}"
        if network not in _STATES:
            return f"it serves networks in {_names(_STATES)}; got {network}"
        return None

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        offset: int = 0,
    ) -> Run:
        """As `Backend.bind`; the result also has `table` and `refresh`.

        Args:
            registers, table, layout: See there.
            stage_index: int64 [B], beside the registers: sample b runs `row + stage_index[b]`. A
                sample whose row lies outside the table is left as it is.
            row_index: int64 [1], beside the registers, likewise, added to `row`: a captured launch
                runs the row that stands there at the replay.

        Raises:
            RuntimeError: Triton or the driver is missing.
            NotImplementedError: A dtype or device that is not served.
            TypeError, ValueError: Registers, table or index contradict each other or the contract.
        """
        missing = self.missing()
        if missing is not None:
            raise RuntimeError(f"triton backend: it does not run here; {missing}.")
        x, m = registers.x, registers.m
        if not x.shape:
            raise ValueError("triton backend: x is [B, ...]; got a scalar tensor.")
        reason = self.supports(x.dtype, x.dtype if m is None else m.dtype, x.device)
        if reason is not None:
            raise NotImplementedError(f'triton backend: {reason}. Use backend="torch".')
        _check_registers(registers, table, layout, stage_index, row_index)
        return Run(registers, table, layout, stage_index, row_index)


class Run:
    """A bound stage: `run(row, out, xi)` as in `Backend.bind`.

    Attributes:
        table: The rows on the device, [rows, width] in the arithmetic type (float32; float64 for a
            float64 state). Kernels read it at every launch, captured ones too: coefficients may be
            overwritten in place; nothing checks what is written. Coefficients that underflow to 0
            in float32 count as 0.
        quantiles: float64 [rows] on the device, None where no row thresholds. Those of thresholds
            are read here, and not in `table`, where their floors are; likewise.

    A change made to the CPU table by PyTorch is uploaded at the next call; `refresh` does so at
    once, and for changes that PyTorch does not see. Neither happens inside a replayed graph.
    A row index outside the table is not reported: its sample is left as it is.
    """

    def __init__(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None,
        row_index: torch.Tensor | None,
    ) -> None:
        from ..kernels.stage import stage_kernel
        from ..kernels.threshold import scale_kernel

        x, history, m = registers.x, registers.history, registers.m
        self._kernel: Any = stage_kernel
        self._scale_kernel: Any = scale_kernel
        self._interpreted = interpreting()
        self._registers, self._layout = registers, layout
        self._stage_index, self._row_index = stage_index, row_index
        self._row_is_known = stage_index is None and row_index is None
        self._batch, self._size = x.shape[0], math.prod(x.shape[1:])
        self._wanted = torch.Size((layout.branches * x.shape[0], *x.shape[1:]))
        self._device = x.device
        self._launches: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._spans = [_span(t) for t in (x, registers.e, m) if t is not None and t.numel()]
        self._copies = m.shape[0] // self._batch if m is not None and self._batch else 0
        self._slots = 0 if history is None else history.shape[0]

        # the first table is bounded by nothing
        self._draws, self._clips, self._thresholds, self._pushes_x = 2, True, True, True
        arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.table = torch.empty(table.shape, dtype=arithmetic, device=x.device)
        self.quantiles: torch.Tensor | None = None
        self._source = table
        self.refresh(table)
        self._draws, self._clips, self._thresholds, self._pushes_x = _needs(self._rows, layout)
        if self._thresholds:
            quantiles = self._rows[:, layout.column("quantile")]
            self.quantiles = torch.tensor(quantiles, device=x.device)
            self._scale = torch.ones(self._batch, dtype=arithmetic, device=x.device)

    def refresh(self, table: torch.Tensor) -> None:
        """Uploads a table of the same structure over `self.table`.

        Args:
            table: float64 [rows, width], CPU. It is checked, and read from here on.

        Raises:
            TypeError, ValueError: It is no such table, or its rows draw more noise, clip or
                threshold where those of the bound table do not.
        """
        if table.shape != self.table.shape or table.dtype != torch.float64 or not table.is_cpu:
            raise ValueError(
                f"triton backend: the table is float64 {list(self.table.shape)} on the CPU; got "
                f"{table.dtype} {list(table.shape)} on {table.device}."
            )
        rows = table.numpy().copy()
        _check_rows(rows, self._layout, self._slots, self._registers)
        bound = (self._draws, self._clips, self._thresholds, self._pushes_x)
        if any(new > old for new, old in zip(_needs(rows, self._layout), bound, strict=True)):
            raise ValueError(
                f"triton backend: the bound kernel draws {self._draws} times, "
                f"{'clips' if self._clips else 'does not clip'}, "
                f"{'thresholds' if self._thresholds else 'does not threshold'} and "
                f"{'pushes' if self._pushes_x else 'does not push'} x; the new table needs more. "
                "Bind it anew."
            )
        self._rows = rows
        self._source, self._version = table, _version(table)
        upload(self.table, table)
        column = self._layout.column
        if self.quantiles is not None:
            upload(self.quantiles, table[:, column("quantile")])
        # what a row needs of a call; with indices on the device every row may run
        flags, draws = rows[:, column("flags")].astype(int), rows[:, column("draws")] != 0
        weighs = ((flags & WRITES_X) != 0) & (rows[:, column("c")] != 0)
        weighs |= ((flags & WRITES_E) != 0) & (rows[:, column("c_e")] != 0)
        self._needs_out = ((flags & EVALUATE) != 0).tolist()
        undrawn, drawn = weighs & ~draws, weighs & draws
        if not self._row_is_known:
            undrawn, drawn = undrawn | undrawn.any(), drawn | drawn.any()
        self._needs_xi, self._needs_seeds = undrawn.tolist(), drawn.tolist()

    def run(self, row: int, out: torch.Tensor | None, xi: torch.Tensor | None) -> None:
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
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._prepared(out, xi)
        if self._interpreted or torch.cuda.current_device() == self._device.index:
            launch(row, out, xi)
        else:
            with torch.cuda.device(self._device):
                launch(row, out, xi)

    def _prepared(self, out: torch.Tensor | None, xi: torch.Tensor | None) -> Callable[..., Any]:
        """The launch for outputs and noise of this dtype, alignment and stride."""
        r = self._registers
        # the stride of samples; a network may return any where there is one sample
        stride = self._size if out is None or out.is_contiguous() else out.stride(0)
        draws = 0 if xi is not None else self._draws
        thresholds = self._thresholds and out is not None
        bank = r.bank if self._layout.extras else None
        shared = bank is not None and bank.shape[1] < self._batch
        apart = self._stage_index is not None or thresholds or shared
        grid, numbers, constants = launch_shape(
            *(self._batch, self._size, stride, draws),
            *(apart, BLOCK[self.table.element_size()]),
        )
        constants |= layout_constants(self._layout)
        constants |= {
            "SHARED": shared,
            "COPIES": self._copies,
            "MOST_DRAWS": draws,
            "CLIPS": self._clips,
            "PUSHES_X": self._pushes_x,
        }
        history = r.history if self._slots else None
        seeds = r.seeds if draws else None
        indices = (self._stage_index, self._row_index)
        before = (r.x, r.e, history, r.m)
        scale = self._scale if thresholds else None
        between = (bank, seeds, self.table, *indices, scale)
        after = (self.table.shape[0], *numbers)
        stage = self._launcher(self._kernel, grid, constants, OPTIONS)
        if not thresholds:

            def launch(row: int, out: torch.Tensor | None, xi: torch.Tensor | None) -> None:
                stage(*before, out, xi, *between, row, *after)

            return launch

        measured = (self._scale, self.quantiles, r.x, r.e)
        grid, constants = scale_shape(self._batch, self._size, self.table.element_size(), constants)
        measure = self._launcher(self._scale_kernel, grid, constants, SCALE_OPTIONS)

        def launch_both(row: int, out: torch.Tensor | None, xi: torch.Tensor | None) -> None:
            # at rows without a threshold too: a captured launch may meet another table
            measure(*measured, out, self.table, *indices, row, *after)
            stage(*before, out, xi, *between, row, *after)

        return launch_both

    def _launcher(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: dict[str, int],
        options: dict[str, int],
    ) -> Callable[..., None]:
        """Launches `kernel` with arguments in its order, without the constants."""
        if self._interpreted:

            def interpret(*arguments: Any) -> None:
                with np.errstate(all="ignore"):
                    kernel[grid](*arguments, **constants)

            return interpret

        compiled: list[Callable[..., Any]] = []
        values = tuple(constants.values())  # in the kernel's order

        def launch(*arguments: Any) -> None:
            if compiled:
                # past Triton's own look-up of the specialisation, which `key` has settled
                compiled[0](*arguments, *values)
                return
            compiled.append(kernel[grid](*arguments, **constants, **options)[grid])

        return launch

    def _check_row(self, row: int, out: torch.Tensor | None, xi: torch.Tensor | None) -> None:
        if not 0 <= row < len(self._rows):
            raise IndexError(
                f"triton backend: row lies in [0, {len(self._rows)}), the table's; got {row}."
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

    def _checked_out(self, out: torch.Tensor) -> torch.Tensor:
        if out.dtype not in _STATES:
            raise TypeError(
                f"network output: its dtype is one of {_names(_STATES)}; got {out.dtype}. "
                'Cast it, or use backend="torch".'
            )
        if out.shape != self._wanted:
            raise ValueError(
                f"network output: its shape is {list(self._wanted)}, the sample's (times the "
                f"guidance branches); got {list(out.shape)}. Slice off what the network returns "
                "besides."
            )
        if out.device != self._device:
            raise ValueError(
                f"network output: it lies on {self._device}, with the registers; got {out.device}."
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

    def _checked_xi(self, xi: torch.Tensor) -> torch.Tensor:
        x = self._registers.x
        if xi.dtype != x.dtype:
            raise TypeError(f"triton backend: xi is {x.dtype}; got {xi.dtype}.")
        if xi.shape != x.shape:
            raise ValueError(f"triton backend: xi is {list(x.shape)}; got {list(xi.shape)}.")
        if xi.device != x.device:
            raise ValueError(f"triton backend: xi lies on {x.device}; got {xi.device}.")
        return xi.contiguous()


def launch_shape(
    batch: int, size: int, stride: int, draws: int, apart: bool, block: int
) -> tuple[tuple[int, int, int], tuple[int, int, int], dict[str, int]]:
    """How B samples of n elements are cut into programs.

    Args:
        batch, size: B and n, not 0.
        stride: Elements between samples of the network's output.
        draws: Draws of noise made in the kernel.
        apart: Whether each sample has its own row of the table, or its own scale.
        block: Elements of a tile, at most; a power of 2.

    Returns:
        The grid; the kernel's arguments (batch, size_units, out_units); and its constants in their
        order, UNIT, OUT_UNIT, ROWS and COLS filled in, the rest left at 0 for the caller.

    Raises:
        ValueError: More programs than a grid holds.
    """
    contiguous = stride == size
    if contiguous and not draws and not apart:
        batch, size = 1, batch * size  # nothing tells the samples apart
        stride = size
        cols = block
    else:
        cols = min(block, max(4, 1 << (size - 1).bit_length()))
    rows = block // cols if batch > 1 else 1
    programs = -(-batch // rows) * -(-size // cols)
    if programs > _MOST_PROGRAMS:
        raise ValueError(
            f"triton backend: a launch has at most {_MOST_PROGRAMS} programs of {block} elements; "
            f"got {batch} samples of {size} elements, {programs} programs. Split the batch."
        )
    unit = _unit(size)
    out_unit = 0 if contiguous else _unit(stride)
    numbers = (batch, size // unit, stride // (out_unit or 1))
    constants = {"UNIT": unit, "OUT_UNIT": out_unit}
    constants |= dict.fromkeys(_FACTS, 0)
    constants |= {"ROWS": rows, "COLS": cols}
    return (programs, 1, 1), numbers, constants


def layout_constants(layout: Layout) -> dict[str, int]:
    """The constants of the kernels that say where a row's groups stand."""
    return {
        "TERMS": layout.terms,
        "BRANCHES": layout.branches,
        "EXTRAS": layout.extras,
        "BRANCH_AT": layout.branch_offset,
        "EXTRA_AT": layout.extra_offset,
        "WIDTH": layout.width,
    }


def scale_shape(
    batch: int, size: int, bytes_each: int, constants: dict[str, int]
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid and constants of the scales, from the constants of the stage they are for.

    Args:
        batch, size: B and n, not 0.
        bytes_each: Of a number in the arithmetic type.
        constants: From `launch_shape`, completed.

    Raises:
        ValueError: More samples than a grid holds.
    """
    if batch > _MOST_PROGRAMS:
        raise ValueError(
            f"triton backend: a launch thresholds at most {_MOST_PROGRAMS} samples; got {batch}. "
            "Split the batch."
        )
    names = ("UNIT", "OUT_UNIT", "BRANCHES", "BRANCH_AT", "WIDTH")
    fewest = 32 * SCALE_WARPS  # an element a thread
    cols = max(fewest, min(SCALE_BLOCK[bytes_each], 1 << (size - 1).bit_length()))
    return (batch, 1, 1), {**{name: constants[name] for name in names}, "COLS": cols}


def interpreting() -> bool:
    """Whether the kernels run, or would run, in Triton's interpreter."""
    module = sys.modules.get("fastdiff.kernels.stage")
    if module is not None:
        return type(module.stage_kernel).__name__ == "InterpretedFunction"
    value = os.environ.get("TRITON_INTERPRET", "")
    return value.lower() in ("1", "true", "yes", "on", "y")  # what triton takes for true


def _unit(count: int) -> int:
    return 16 if count % 16 == 0 else 4 if count % 4 == 0 else 1


def _version(table: torch.Tensor) -> int:
    return 0 if table.is_inference() else table._version


def _thresholds(flags: NDArray[np.int_]) -> NDArray[np.bool_]:
    return ((flags & EVALUATE) != 0) & ((flags & THRESHOLD) != 0)


def _needs(rows: NDArray[np.float64], layout: Layout) -> tuple[int, bool, bool, bool]:
    """What of the kernel depends on the rows: the most draws; whether any clips; thresholds;
    pushes x."""
    flags = rows[:, layout.column("flags")].astype(int)
    draws = int(rows[:, layout.column("draws")].max(initial=0))
    pushes_x = bool((rows[:, layout.column("push_x")] >= 0).any())
    return draws, bool((flags & CLIP).any()), bool(_thresholds(flags).any()), pushes_x


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    low = tensor.data_ptr()
    return low, low + tensor.numel() * tensor.element_size()


def _check_registers(
    registers: Registers,
    table: torch.Tensor,
    layout: Layout,
    stage_index: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> None:
    x, m, history = registers.x, registers.m, registers.history
    state, shape, device = x.dtype, tuple(x.shape), x.device
    batch = shape[0]
    checks: list[tuple[str, torch.Tensor | None, torch.dtype, tuple[int, ...]]]
    checks = [("x", x, state, shape), ("e", registers.e, state, shape)]
    if history is not None:
        checks.append(("history", history, state, (history.shape[0], *shape)))
    if m is not None:
        copies = m.shape[0] // batch if batch else 0
        checks.append(("m", m, m.dtype, (copies * batch, *shape[1:])))
    if registers.bank is not None:
        shared = registers.bank.shape[1:2] == (1,)
        entry = (1, *shape[1:]) if shared else shape
        checks.append(("bank", registers.bank, state, (registers.bank.shape[0], *entry)))
    checks.append(("seeds", registers.seeds, torch.int64, (batch,)))
    checks.append(("stage_index", stage_index, torch.int64, (batch,)))
    checks.append(("row_index", row_index, torch.int64, (1,)))
    for name, tensor, dtype, wanted in checks:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"triton backend: {name} is {dtype}; got {tensor.dtype}.")
        if tensor.shape != wanted:
            raise ValueError(f"triton backend: {name} is {list(wanted)}; got {list(tensor.shape)}.")
        if tensor.device != device:
            raise ValueError(
                f"triton backend: registers lie on one device; x is on {device}, {name} on "
                f"{tensor.device}. Move {name}: {name}.to({str(device)!r})."
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"triton backend: {name} is contiguous; got strides {tensor.stride()}. "
                f"Pass {name}.contiguous()."
            )
        if tensor.data_ptr() % tensor.element_size():
            raise ValueError(
                f"triton backend: {name} is aligned to its {tensor.element_size()}-byte elements; "
                f"got address {tensor.data_ptr():#x}. Pass {name}.clone()."
            )
    if table.dtype != torch.float64:
        raise TypeError(f"triton backend: table is torch.float64; got {table.dtype}.")
    if table.shape != (table.shape[0], layout.width):
        raise ValueError(
            f"triton backend: table is [rows, {layout.width}]; got {list(table.shape)}."
        )
    if not table.is_cpu:
        raise ValueError(
            f"triton backend: the table is a CPU tensor, whose copy bind uploads; got "
            f"{table.device}. Pass table.cpu()."
        )
    named = [(name, tensor) for name, tensor, _, _ in checks if tensor is not None]
    written = ("x", "e", "history", "m")
    for i, (name, tensor) in enumerate(named):
        for other_name, other in named[:i]:
            if name not in written and other_name not in written:
                continue
            if not (tensor.numel() and other.numel()):
                continue
            (low, high), (other_low, other_high) = _span(tensor), _span(other)
            if low < other_high and other_low < high:
                raise ValueError(
                    f"triton backend: registers that are written share no memory; {other_name} and "
                    f"{name} overlap. Pass {name}.clone()."
                )


def _check_rows(
    rows: NDArray[np.float64], layout: Layout, slots: int, registers: Registers
) -> None:
    """Raises for the first row that would read or write what does not exist."""
    columns = {name: rows[:, k] for k, name in enumerate(layout.columns)}

    def refuse(bad: NDArray[np.bool_], rule: str, *names: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            got = ", ".join(f"{name} = {columns[name][row]:g}" for name in names)
            raise ValueError(f"triton backend: {rule}; row {row} has {got}.")

    def outside(name: str, low: float, high: float) -> NDArray[np.bool_]:
        value = columns[name]
        return ~((value >= low) & (value <= high) & (value == np.floor(value)))

    refuse(outside("flags", 0, ALL_FLAGS), "flags are a combination of the known bits", "flags")
    for name in ("push", "push_x"):
        refuse(outside(name, -1, slots - 1), f"history has {slots} slots", name)
    both = (columns["push"] >= 0) & (columns["push"] == columns["push_x"])
    refuse(both, "each push has a slot of its own", "push", "push_x")
    refuse(outside("draws", 0, 2), "draws fit the layout, 0 to 2", "draws")
    refuse(
        outside("n_terms", 0, layout.terms), f"n_terms fit the layout's {layout.terms}", "n_terms"
    )
    flags = columns["flags"].astype(int)
    evaluates, writes_e = (flags & EVALUATE) != 0, (flags & WRITES_E) != 0
    quantile, floor = columns["quantile"], columns["floor"]
    with np.errstate(over="ignore"):  # a floor is positive and finite in the arithmetic type
        rounded = floor if registers.x.dtype == torch.float64 else floor.astype(np.float32)
    legal = (quantile > 0) & (quantile <= 1) & (rounded > 0) & (rounded < np.inf)
    legal &= (flags & CLIP) == 0
    refuse(
        _thresholds(flags) & ~legal,
        "a threshold is a quantile in (0, 1] and a positive floor, without a clip",
        *("flags", "quantile", "floor"),
    )
    writes_x, at_e = (flags & WRITES_X) != 0, (flags & AT_E) != 0
    for k in range(layout.terms):
        read = writes_x & (columns[f"past_b_{k}"] != 0) | writes_e & (columns[f"past_g_{k}"] != 0)
        read &= k < columns["n_terms"]
        refuse(read & outside(f"slot_{k}", 0, slots - 1), f"history has {slots} slots", f"slot_{k}")
    entries = 0 if registers.bank is None else registers.bank.shape[0]
    refuse(
        outside("n_extras", 0, layout.extras),
        *(f"n_extras fit the layout's {layout.extras}", "n_extras"),
    )
    for i in range(layout.extras):
        read = writes_x & (columns[f"r_{i}"] != 0) | writes_e & (columns[f"s_{i}"] != 0)
        read &= i < columns["n_extras"]
        rule = f"the bank has {entries} entries"
        refuse(read & outside(f"entry_{i}", 0, entries - 1), rule, f"entry_{i}")
    for k in (1, 2):
        # 2^24: streams survive a table in float32
        bad = outside(f"stream_{k}", 0, 2**24) & (columns["draws"] >= k)
        refuse(bad, f"streams are integers in [0, {2**24}]", f"stream_{k}")
    reads_e = writes_x & (columns["a_e"] != 0) | writes_e & (columns["d_e"] != 0)
    reads_e |= evaluates & at_e & (columns["p"] != 0)
    if registers.e is None:
        refuse(
            reads_e | writes_e,
            "a row that reads or writes e needs Registers.e",
            *("flags", "a_e", "d_e"),
        )
    weighs_h = writes_x & (columns["b_0"] != 0) | writes_e & (columns["g_0"] != 0)
    refuse(
        ~evaluates & (weighs_h | (columns["push"] >= 0)),
        "without an evaluation there is no h to weigh or push",
        *("flags", "b_0", "g_0", "push"),
    )
