# SPDX-License-Identifier: Apache-2.0
"""The compiled core: one stage in one pass over memory, on the CPU.

Everything that does not change between stages is checked and turned into addresses by `bind`; a
stage is then one call with five integers. Two stages on the same registers must not run at once.
"""

from __future__ import annotations

import math

import torch

from ..noise import missing as why_missing
from ..noise import native
from ..plan import Layout
from .base import Registers, RunStage

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATES = (torch.float32, torch.float64)


class CpuBackend:
    name = "cpu"

    def missing(self) -> str | None:
        if native is not None:
            return None
        return f"{why_missing}; pip install -e . builds it, with a C++ compiler"

    def supports(
        self, state: torch.dtype, network: torch.dtype, device: torch.device
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs CPU tensors; got {device}"
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
    ) -> RunStage:
        if native is None:
            raise RuntimeError(f"cpu backend: the compiled core is needed; {self.missing()}.")
        x, m, history = registers.x, registers.m, registers.history
        state, shape = x.dtype, x.shape
        if state not in _STATES or not shape:
            raise ValueError(
                f"cpu backend: x is [B, ...] in {_names(_STATES)}; got {tuple(shape)}, {state}. "
                'Use backend="torch".'
            )
        batch, size = shape[0], math.prod(shape[1:])
        checks: list[tuple[str, torch.Tensor | None, torch.dtype, tuple[int, ...]]]
        checks = [("x", x, state, shape), ("e", registers.e, state, shape)]
        slots = 0 if history is None else history.shape[0]
        checks.append(("history", history, state, (slots, *shape)))
        copies = 0
        if m is not None:
            if m.dtype not in _CODES:
                raise TypeError(f"cpu backend: m is in {_names(_CODES)}; got {m.dtype}.")
            copies = m.shape[0] // batch if batch else 1
            checks.append(("m", m, m.dtype, (copies * batch, *shape[1:])))
        checks += [(f"extras[{i}]", r, state, shape) for i, r in enumerate(registers.extras)]
        checks.append(("seeds", registers.seeds, torch.int64, (batch,)))
        checks.append(("table", table, torch.float64, (table.shape[0], layout.width)))
        checks.append(("stage_index", stage_index, torch.int64, (batch,)))
        for name, tensor, dtype, wanted in checks:
            _check(name, tensor, dtype, tuple(wanted))
        if len(registers.extras) != layout.extras:
            raise ValueError(
                f"cpu backend: the layout names {layout.extras} extra registers; "
                f"got {len(registers.extras)}."
            )
        stage = native.Stage(
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
            table=table.data_ptr(),
            rows=table.shape[0],
            width=table.shape[1],
            terms=layout.terms,
            branches=layout.branches,
            stage_index=_address(stage_index),
        )
        return _runner(stage, registers, table, layout.branches, stage_index, size)


def _runner(
    stage: object,
    registers: Registers,
    table: torch.Tensor,
    branches: int,
    stage_index: torch.Tensor | None,
    size: int,
) -> RunStage:
    """The closure that runs stages: as little Python as memory safety allows."""
    native_run = stage.run  # type: ignore[attr-defined]
    x = registers.x
    state, shape = x.dtype, x.shape
    wanted = torch.Size((branches * shape[0], *shape[1:]))
    code_of, threads = _CODES.get, torch.get_num_threads
    if x.numel() < native.parallel_from:
        threads = _one
    # `stage` holds addresses only: the closure keeps what they point to alive.
    keep = (registers, table, stage_index)

    def run(
        row: int, out: torch.Tensor | None, xi: torch.Tensor | None, _keep: object = keep
    ) -> None:
        xi_address = 0
        if xi is not None:
            _check("xi", xi, state, tuple(shape), contiguous=False)
            xi = xi.contiguous()
            xi_address = xi.data_ptr()
        if out is None:
            native_run(row, 0, 0, size, xi_address, threads())
            return
        code = code_of(out.dtype)
        if code is None or out.shape != wanted or not out.is_cpu:
            raise _wrong_output(out, wanted)
        if out.is_contiguous():
            native_run(row, out.data_ptr(), code, size, xi_address, threads())
            return
        if not out[0].is_contiguous():
            out = out.contiguous()
        native_run(row, out.data_ptr(), code, out.stride(0), xi_address, threads())

    return run


def _one() -> int:
    return 1


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _names(dtypes: object) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)  # type: ignore[attr-defined]


def _check(
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    contiguous: bool = True,
) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"cpu backend: {name} is {dtype}; got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(f"cpu backend: {name} is {list(shape)}; got {list(tensor.shape)}.")
    if not tensor.is_cpu:
        raise ValueError(f"cpu backend: {name} is a CPU tensor; got {tensor.device}.")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"cpu backend: {name} is contiguous; got strides {tensor.stride()}. "
            f"Pass {name}.contiguous()."
        )


def _wrong_output(out: torch.Tensor, wanted: torch.Size) -> Exception:
    if out.dtype not in _CODES:
        return TypeError(
            f"network output: its dtype is one of {_names(_CODES)}; got {out.dtype}. "
            'Cast it, or use backend="torch".'
        )
    if not out.is_cpu:
        return ValueError(f"network output: a CPU tensor is needed; got {out.device}.")
    return ValueError(
        f"network output: its shape is {list(wanted)}, the sample's (times the guidance branches); "
        f"got {list(out.shape)}. Slice off what the network returns besides."
    )
