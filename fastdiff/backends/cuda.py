# SPDX-License-Identifier: Apache-2.0
"""The CUDA part of the compiled core: one stage is one kernel launch on the current stream.

Where rows threshold it is two: the first finds each sample's scale.
Everything that does not change between stages is checked and turned into addresses by `bind`; a
stage is then one call with six integers. Rows are read on the device, from `run.table`: a captured
graph follows what is written there. Nothing waits for the device but `bind`, `refresh` and `check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .._core import cuda_core
from ..plans import Layout
from .base import Registers
from .compiled import (
    CODES,
    address,
    check_tensor,
    refusal,
    stage_arguments,
    upload,
    wrong_output,
)


class CudaBackend:
    name = "cuda"
    capturable = True
    counts_writes = False

    def missing(self) -> str | None:
        core, why = cuda_core()
        if core is None:
            return why
        if not torch.cuda.is_available():
            if torch.version.cuda is None:
                return "this PyTorch is built without CUDA; install a build with it"
            return "PyTorch finds no CUDA device; nvidia-smi says what the driver sees"
        problem = core.problem()
        if problem is not None:
            return f"the CUDA part is built and cannot launch ({problem}); update NVIDIA's driver"
        return None

    def supports(
        self,
        state: torch.dtype,
        network: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs CUDA tensors; got {device}"
        if not torch.cuda.is_available():
            return f"no CUDA device can be used here; got {device}"
        return refusal(cuda_core()[0], state, network, layout)

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        offset: int = 0,
    ) -> CudaStage:
        """As in `Backend.bind`, with what a device adds.

        Args:
            registers: CUDA tensors on one device.
            table: On the CPU it is copied to the device, again after each in-place change that
                PyTorch makes to it. On the registers' device it is used where it lies.
            layout: Columns of the table.
            stage_index: On the device, and read there by each launch.
            row_index: int64 [1] on the device, likewise, added to `row`: a captured launch runs
                the row that stands there.
            offset: See `Backend.bind`.

        Where a row of the table thresholds, every stage launches the kernel that finds the scales
        too; where one blends, multiplies by the bank or scales, every stage launches the kernel
        that can. Whether one does is known from the table as it was bound or refreshed: a stage
        that was launched, or captured, while none did refuses a row that has become such a one
        since.

        Raises:
            ValueError: A register has the wrong shape, device or layout, two overlap, or a row of
                the table would leave them.
            TypeError: A dtype is wrong.
            NotImplementedError: The layout is beyond the core, or a row thresholds samples of 2^32
                elements or more.
            RuntimeError: The CUDA part is not built.
        """
        core, why = cuda_core()
        if core is None:
            raise RuntimeError(f"cuda backend: the CUDA part is needed; {why}.")
        device = registers.x.device
        if device.type != _DEVICE:
            raise ValueError(
                f"cuda backend: registers are CUDA tensors; got x on {device}. Move them, or use "
                'backend="cpu".'
            )
        arguments = stage_arguments("cuda", registers, table, layout, stage_index, offset)
        check_tensor("cuda", "row_index", row_index, torch.int64, (1,), device)
        if table.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"cuda backend: table lies on the CPU or on {device}; got {table.device}."
            )
        with torch.inference_mode(False):
            on_device = table if table.is_cuda else table.to(device, copy=True)
            fault = torch.zeros(2, dtype=torch.int64, device=device)
            scale = torch.empty(registers.x.shape[:1], dtype=registers.x.dtype, device=device)
        arguments["table"] = on_device.data_ptr()
        arguments["row_index"] = address(row_index)
        arguments["fault"], arguments["scale"] = fault.data_ptr(), scale.data_ptr()
        arguments["device"] = device.index or 0
        stage = core.Stage(arguments)
        on_host = table.cpu()
        stage.check_table(on_host.data_ptr())
        rows = _Rows(core, stage, table, on_device, fault)
        keep = (registers, stage_index, row_index, scale)
        return CudaStage(rows, registers.x, layout.branches, keep)


class CudaStage:
    """A `BoundStage` on a CUDA device.

    Attributes:
        table: The table on the device. Values may be replaced there in place, by kernels too; a row
            that has become illegal then writes nothing.
    """

    __slots__ = ("check", "measure", "refresh", "run", "table")
    capturable = True

    def __init__(self, rows: _Rows, x: torch.Tensor, branches: int, keep: object) -> None:
        self.table = rows.table
        self.refresh, self.check = rows.refresh, rows.check
        self.run = _caller(rows.stage.run, rows, x, branches, keep)
        self.measure = _caller(rows.stage.measure, rows, x, branches, keep)


class _Rows:
    """The table of a bound stage, here and on the device."""

    __slots__ = ("core", "fault", "seen", "stage", "table", "watched")

    def __init__(
        self,
        core: Any,
        stage: Any,
        given: torch.Tensor,
        on_device: torch.Tensor,
        fault: torch.Tensor,
    ) -> None:
        self.core, self.stage, self.table, self.fault = core, stage, on_device, fault
        watched = given is not on_device and not given.is_inference()
        self.watched = given if watched else None
        self.seen = given._version if watched else 0

    def refresh(self, table: torch.Tensor) -> None:
        """Checks a table and copies it to the device."""
        check_tensor("cuda", "table", table, torch.float64, tuple(self.table.shape), table.device)
        if _capturing():
            raise RuntimeError(
                "cuda backend: a table is copied to the device before a capture or between "
                "replays; got one changed during it. Call run.refresh(table) before, or write "
                "to run.table."
            )
        on_host = table.cpu()
        self.stage.check_table(on_host.data_ptr())
        upload(self.table, on_host)
        if self.watched is not None and table is self.watched:
            self.seen = table._version

    def check(self) -> None:
        """Waits for the device and raises what a kernel has refused since."""
        status, row = self.fault.tolist()
        if status:
            self.fault.zero_()
            self.core.refuse(status, row, self.table.shape[0])


def _caller(
    call: Callable[..., None], rows: _Rows, x: torch.Tensor, branches: int, keep: object
) -> Callable[[int, torch.Tensor | None, torch.Tensor | None], None]:
    """The closure that makes one launch: as little Python as memory safety allows."""
    state, shape, device, number = x.dtype, x.shape, x.device, x.device.index or 0
    wanted = torch.Size((branches * shape[0], *shape[1:]))
    size = math.prod(shape[1:])
    code_of, stream_of = CODES.get, _current_stream()
    watched, tiny = rows.watched, wanted.numel() == 1

    def run(
        row: int, out: torch.Tensor | None, xi: torch.Tensor | None, _keep: object = keep
    ) -> None:
        if watched is not None and watched._version != rows.seen:
            rows.refresh(watched)
        xi_address = 0
        if xi is not None:
            check_tensor("cuda", "xi", xi, state, tuple(shape), device, contiguous=False)
            xi = xi.resolve_neg().contiguous()
            xi_address = xi.data_ptr()
        if out is None:
            call(row, 0, 0, size, xi_address, stream_of(number))
            return
        code = code_of(out.dtype)
        if code is None or out.shape != wanted or out.device != device:
            raise wrong_output(out, wanted, device)
        stride = size
        if tiny or not out.is_contiguous():
            out = out.resolve_neg()  # a lazily negated view has strides, or one element
            if not out[:1].is_contiguous():
                out = out.contiguous()
            stride = out.stride(0)
        call(row, out.data_ptr(), code, stride, xi_address, stream_of(number))

    return run


_DEVICE = "cuda"


def _current_stream() -> Callable[[int], int]:
    """The function from a device's number to the address of PyTorch's current stream there."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is not None:
        return raw
    return lambda number: torch.cuda.current_stream(number).cuda_stream


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
