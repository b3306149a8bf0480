# SPDX-License-Identifier: Apache-2.0
"""The CUDA part of the compiled core: one stage is one kernel launch on the current stream.

Everything that does not change between stages is checked and turned into addresses by `bind`; a
stage is then one call with six integers. Rows are read on the device, from `run.table`: a captured
graph follows what is written there. Nothing waits for the device but `bind`, `refresh` and `check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..noise import cuda_core
from ..plan import Layout
from .base import Registers, RunStage

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATES = (torch.float32, torch.float64)


class CudaBackend:
    name = "cuda"

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
        self, state: torch.dtype, network: torch.dtype, device: torch.device
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs CUDA tensors; got {device}"
        if not torch.cuda.is_available():
            return f"no CUDA device can be used here; got {device}"
        if state not in _STATES:
            return f"it keeps the state in float32 or float64; got {state}"
        if network not in _CODES:
            return f"it serves networks in {_names(_CODES)}; got {network}"
        return None

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
    ) -> RunStage:
        """As in `Backend.bind`, with what a device adds.

        Args:
            registers: CUDA tensors on one device.
            table: On the CPU it is copied to the device, again after each in-place change that
                PyTorch makes to it. On the registers' device it is used where it lies.
            layout: Columns of the table.
            stage_index: On the device, and read there by each launch.
            row_index: int64 [1] on the device, likewise, added to `row`: a captured launch runs
                the row that stands there.

        Returns:
            `run(row, out, xi)`, which also has: `run.table`, the table on the device, where values
            may be replaced in place (by kernels too; a row that has become illegal then writes
            nothing); `run.refresh(table)`, which checks a table and copies it there;
            `run.check()`, which waits for the device and raises what a kernel has refused since.

        Raises:
            ValueError: A register has the wrong shape, device or layout, two overlap, or a row of
                the table would leave them.
            TypeError: A dtype is wrong.
            NotImplementedError: The layout is beyond the core, or a row thresholds.
            RuntimeError: The CUDA part is not built.
        """
        core, why = cuda_core()
        if core is None:
            raise RuntimeError(f"cuda backend: the CUDA part is needed; {why}.")
        x, m, history = registers.x, registers.m, registers.history
        state, shape, device = x.dtype, x.shape, x.device
        if device.type != _DEVICE:
            raise ValueError(
                f"cuda backend: registers are CUDA tensors; got x on {device}. Move them, or use "
                'backend="cpu".'
            )
        if state not in _STATES or not shape:
            raise ValueError(
                f"cuda backend: x is [B, ...] in {_names(_STATES)}; got {tuple(shape)}, {state}. "
                'Use backend="triton" or backend="torch".'
            )
        batch, size = shape[0], math.prod(shape[1:])
        checks: list[tuple[str, torch.Tensor | None, torch.dtype, tuple[int, ...]]]
        checks = [("x", x, state, shape), ("e", registers.e, state, shape)]
        slots = 0 if history is None else history.shape[0]
        checks.append(("history", history, state, (slots, *shape)))
        copies = 0
        if m is not None:
            if m.dtype not in _CODES:
                raise TypeError(f"cuda backend: m is in {_names(_CODES)}; got {m.dtype}.")
            copies = m.shape[0] // batch if batch else 1
            checks.append(("m", m, m.dtype, (copies * batch, *shape[1:])))
        checks += [(f"extras[{i}]", r, state, shape) for i, r in enumerate(registers.extras)]
        checks.append(("seeds", registers.seeds, torch.int64, (batch,)))
        checks.append(("stage_index", stage_index, torch.int64, (batch,)))
        checks.append(("row_index", row_index, torch.int64, (1,)))
        for name, tensor, dtype, wanted in checks:
            _check(name, tensor, dtype, tuple(wanted), device)
        table_shape = (table.shape[0], layout.width)
        _check("table", table, torch.float64, table_shape, table.device)
        if table.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"cuda backend: table lies on the CPU or on {device}; got {table.device}."
            )
        if len(registers.extras) != layout.extras:
            raise ValueError(
                f"cuda backend: the layout names {layout.extras} extra registers; "
                f"got {len(registers.extras)}."
            )
        with torch.inference_mode(False):
            on_device = table if table.is_cuda else table.to(device, copy=True)
            fault = torch.zeros(2, dtype=torch.int64, device=device)
        stage = core.Stage(
            state=_CODES[state],
            network=_CODES[state if m is None else m.dtype],
            batch=batch,
            size=size,
            x=x.data_ptr(),
            e=_address(registers.e),
            history=_address(history),
            slots=slots,
            m=_address(m),
            copies=copies,
            extras=[extra.data_ptr() for extra in registers.extras],
            seeds=_address(registers.seeds),
            table=on_device.data_ptr(),
            rows=table.shape[0],
            width=table.shape[1],
            terms=layout.terms,
            branches=layout.branches,
            stage_index=_address(stage_index),
            row_index=_address(row_index),
            fault=fault.data_ptr(),
            device=device.index or 0,
        )
        on_host = table.cpu()
        stage.check_table(on_host.data_ptr())
        keep = (registers, on_device, stage_index, row_index, fault)
        return _runner(core, stage, registers, table, on_device, fault, layout, size, keep)


def _runner(
    core: object,
    stage: object,
    registers: Registers,
    table: torch.Tensor,
    on_device: torch.Tensor,
    fault: torch.Tensor,
    layout: Layout,
    size: int,
    keep: object,
) -> RunStage:
    """The closure that runs stages: as little Python as memory safety allows."""
    native_run = stage.run  # type: ignore[attr-defined]
    x = registers.x
    state, shape, device, number = x.dtype, x.shape, x.device, x.device.index or 0
    wanted = torch.Size((layout.branches * shape[0], *shape[1:]))
    code_of, stream_of = _CODES.get, _current_stream()
    watched = table if table is not on_device and not table.is_inference() else None
    seen = 0 if watched is None else watched._version

    def refresh(new: torch.Tensor) -> None:
        _check("table", new, torch.float64, tuple(on_device.shape), new.device)
        if _capturing():
            raise RuntimeError(
                "cuda backend: a table is copied to the device before a capture or between "
                "replays; got one changed during it. Call run.refresh(table) before, or write "
                "to run.table."
            )
        on_host = new.cpu()
        stage.check_table(on_host.data_ptr())  # type: ignore[attr-defined]
        on_device.copy_(on_host)

    def check() -> None:
        status, row = fault.tolist()
        if status:
            fault.zero_()
            core.refuse(status, row, on_device.shape[0])  # type: ignore[attr-defined]

    def run(
        row: int, out: torch.Tensor | None, xi: torch.Tensor | None, _keep: object = keep
    ) -> None:
        nonlocal seen
        if watched is not None and watched._version != seen:
            refresh(watched)
            seen = watched._version
        xi_address = 0
        if xi is not None:
            _check("xi", xi, state, tuple(shape), device, contiguous=False)
            xi = xi.contiguous()
            xi_address = xi.data_ptr()
        if out is None:
            native_run(row, 0, 0, size, xi_address, stream_of(number))
            return
        code = code_of(out.dtype)
        if code is None or out.shape != wanted or out.device != device:
            raise _wrong_output(out, wanted, device)
        stride = size
        if not out.is_contiguous():
            if not out[:1].is_contiguous():
                out = out.contiguous()
            stride = out.stride(0)
        native_run(row, out.data_ptr(), code, stride, xi_address, stream_of(number))

    run.table = on_device  # type: ignore[attr-defined]
    run.refresh = refresh  # type: ignore[attr-defined]
    run.check = check  # type: ignore[attr-defined]
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


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _names(dtypes: object) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)  # type: ignore[attr-defined]


def _check(
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"cuda backend: {name} is {dtype}; got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(f"cuda backend: {name} is {list(shape)}; got {list(tensor.shape)}.")
    if tensor.device != device:
        raise ValueError(
            f"cuda backend: {name} lies on {device}; got {tensor.device}. "
            f"Pass {name}.to({str(device)!r})."
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"cuda backend: {name} is contiguous; got strides {tensor.stride()}. "
            f"Pass {name}.contiguous()."
        )


def _wrong_output(out: torch.Tensor, wanted: torch.Size, device: torch.device) -> Exception:
    if out.dtype not in _CODES:
        return TypeError(
            f"network output: its dtype is one of {_names(_CODES)}; got {out.dtype}. "
            'Cast it, or use backend="torch".'
        )
    if out.device != device:
        return ValueError(f"network output: it lies on {device}; got {out.device}.")
    return ValueError(
        f"network output: its shape is {list(wanted)}, the sample's (times the guidance branches); "
        f"got {list(out.shape)}. Slice off what the network returns besides."
    )
