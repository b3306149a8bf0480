# SPDX-License-Identifier: Apache-2.0
"""The CUDA part of the compiled core: one stage is one kernel launch on the current stream.

Where rows threshold it is two: the first finds each sample's scale.
Everything that does not change between stages is checked and turned into addresses by `bind`; a
stage is then one call with six integers. Rows are read on the device, from `run.table`: a captured
graph follows what is written there. Nothing waits for the device but `bind`, `refresh` and `check`.
"""

from __future__ import annotations

import functools
import math
import os
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
            return (
                f"the CUDA part is built and cannot launch ({problem}), none of its kernels, for "
                f"{_capabilities(core)}; update NVIDIA's driver, {_MEANWHILE}"
            )
        reasons = (lacking(core, number) for number in range(torch.cuda.device_count()))
        first = next(reasons, None)
        return first if first is not None and all(reasons) else None

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
        core = cuda_core()[0]
        if core is not None and core.problem() is None:
            number = torch.cuda.current_device() if device.index is None else device.index
            reason = lacking(core, number, core.problem(number))
            if reason is not None and self.missing() is None:
                return reason  # of this device; `missing` speaks for all
        return refusal(core, state, network, layout)

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
            RuntimeError: The CUDA part is not built, or has no kernels for the device.
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
        number = device.index or 0
        problem = core.problem(number) if device.type == "cuda" else None
        if problem is not None:
            raise RuntimeError(f"cuda backend: {lacking(core, number, problem)}.")
        check_tensor("cuda", "row_index", row_index, torch.int64, (1,), device)
        if table.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"cuda backend: table lies on the CPU or on {device}; got {table.device}."
            )
        arguments = stage_arguments("cuda", registers, table, layout, stage_index, offset)
        with torch.inference_mode(False):
            on_device = table if table.is_cuda else table.to(device, copy=True)
            fault = torch.zeros(2, dtype=torch.int64, device=device)
            scale = torch.empty(registers.x.shape[:1], dtype=registers.x.dtype, device=device)
        arguments["table"] = on_device.data_ptr()
        arguments["row_index"] = address(row_index)
        arguments["fault"], arguments["scale"] = fault.data_ptr(), scale.data_ptr()
        arguments["device"] = number
        arguments["own_table"] = table is not on_device and launches_early()
        stage = core.Stage(arguments)
        on_host = table.cpu()
        stage.check_table(on_host.data_ptr())
        rows = _Rows(core, stage, table, on_device, fault)
        keep = (registers, stage_index, row_index, scale)
        return CudaStage(rows, registers.x, layout.branches, keep)


class CudaStage:
    """A `BoundStage` on a CUDA device."""

    __slots__ = ("_rows", "check", "measure", "refresh", "run")
    capturable = True

    def __init__(self, rows: _Rows, x: torch.Tensor, branches: int, keep: object) -> None:
        self._rows = rows
        self.refresh, self.check = rows.refresh, rows.check
        self.run = _caller(rows.stage.run, rows, x, branches, keep)
        self.measure = _caller(rows.stage.measure, rows, x, branches, keep)

    @property
    def table(self) -> torch.Tensor:
        """The table on the device.

        Values may be replaced there in place, by kernels too; a row that has become illegal then
        writes nothing. From the first time that it is asked for, launches and captures read their
        row when all that stands ahead in the stream has ended, since any of it may write there.
        """
        self._rows.stage.share_table()
        return self._rows.table


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
        """Checks a table and copies it to the device.

        The copy is a transfer from the host, no kernel: a launch behind it begins when it has
        ended, even one that may begin before a kernel ahead of it has (`own_table`).
        """
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
_MEANWHILE = 'or use backend="triton" or backend="torch"'


@functools.cache
def launches_early() -> bool:
    """Whether a launch may resolve its row before the kernel ahead of it has ended.

    Raises:
        ValueError: FASTDIFF_PDL is neither 0 nor 1.
    """
    value = os.environ.get("FASTDIFF_PDL", "")
    if value not in ("", "0", "1"):
        raise ValueError(f'fastdiff: FASTDIFF_PDL is "0", "1" or not set; got {value!r}.')
    return value != "0"


def _capabilities(core: Any) -> str:
    """The compute capabilities that the CUDA part is built for, as a list in words."""
    named = [f"{arch.rstrip('af')[:-1]}.{arch.rstrip('af')[-1]}" for arch in core.archs.split("_")]
    return f"compute capability {', '.join(named)} and newer than {named[-1]}"


def lacking(core: Any, number: int, problem: str | None = None) -> str | None:
    """Why the CUDA part has no kernels for a device, or None.

    Args:
        core: The CUDA part.
        number: The device's. It is not touched: its compute capability is known without.
        problem: What the CUDA runtime has said of the kernels there.
    """
    major, minor = torch.cuda.get_device_capability(number)
    if problem is None and _runs(core.archs.split("_"), major, minor):
        return None
    said = "" if problem is None else f" ({problem})"
    return (
        f"the CUDA part has no kernels for cuda:{number}, {torch.cuda.get_device_name(number)}, of "
        f"compute capability {major}.{minor}{said}; it is built for {_capabilities(core)}: build "
        f"it with FASTDIFF_CUDA_ARCHS={major}{minor}, {_MEANWHILE}"
    )


def _runs(archs: list[str], major: int, minor: int) -> bool:
    """Whether machine code for one of the architectures, or PTX of the last, runs on a device."""
    own = 10 * major + minor
    same = any(own == int(arch.rstrip("af")) for arch in archs)
    plain = [int(arch) for arch in archs if arch.isdigit()]
    alike = any(n // 10 == major and n <= own for n in plain)
    return same or alike or (archs[-1].isdigit() and own >= plain[-1])


def _current_stream() -> Callable[[int], int]:
    """The function from a device's number to the address of PyTorch's current stream there."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is not None:
        return raw
    return lambda number: torch.cuda.current_stream(number).cuda_stream


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
