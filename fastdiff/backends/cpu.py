# SPDX-License-Identifier: Apache-2.0
"""The compiled core: one stage in one pass over memory, on the CPU.

Everything that does not change between stages is checked and turned into addresses by `bind`; a
stage is then one call with six integers. Two stages on the same registers must not run at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .. import _core
from ..plans import Layout
from .base import Registers
from .compiled import CODES, address, check_tensor, refusal, stage_arguments, wrong_output

Run = Callable[[int, torch.Tensor | None, torch.Tensor | None], None]


class CpuBackend:
    name = "cpu"
    capturable = True
    counts_writes = False

    def missing(self) -> str | None:
        if _core.native is not None:
            return None
        return f"{_core.missing}; pip install -e . builds it, with a C++ compiler"

    def supports(
        self,
        state: torch.dtype,
        network: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs CPU tensors; got {device}"
        return refusal(_core.native, state, network, layout)

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        offset: int = 0,
    ) -> CpuStage:
        if _core.native is None:
            raise RuntimeError(f"cpu backend: the compiled core is needed; {self.missing()}.")
        arguments = stage_arguments("cpu", registers, table, layout, stage_index, offset)
        check_tensor("cpu", "table", table, torch.float64, tuple(table.shape), registers.x.device)
        check_tensor("cpu", "row_index", row_index, torch.int64, (1,), registers.x.device)
        stage = _core.native.Stage({"table": table.data_ptr(), **arguments})
        # `stage` holds addresses only: what they point to is kept alive.
        keep = (registers, table, stage_index)
        return CpuStage(stage, registers.x, layout.branches, table, row_index, keep)


class CpuStage:
    """A `BoundStage` of the compiled core.

    An output or noise that lies on a register that is written is read as it was before the call:
    it is copied where the two do not share memory element for element.
    """

    __slots__ = ("measure", "run", "table")
    capturable = True

    def __init__(
        self,
        stage: Any,
        x: torch.Tensor,
        branches: int,
        table: torch.Tensor,
        row_index: torch.Tensor | None,
        keep: object,
    ) -> None:
        self.table = table
        self.run: Run = _caller(stage.run, x, branches, keep)
        self.measure: Run = _caller(stage.measure, x, branches, keep)
        if row_index is not None:
            self.run = _indexed(self.run, row_index)
            self.measure = _indexed(self.measure, row_index)

    def refresh(self, table: torch.Tensor) -> None:
        shape = tuple(self.table.shape)
        check_tensor("cpu", "table", table, torch.float64, shape, table.device)
        if table is not self.table:
            self.table.copy_(table)

    def check(self) -> None:
        """Nothing is refused late."""


def _indexed(run: Run, row_index: torch.Tensor) -> Run:
    return lambda row, out, xi: run(row + int(row_index), out, xi)


def _caller(call: Callable[..., bool], x: torch.Tensor, branches: int, keep: object) -> Run:
    """The closure that makes one call of the core: as little Python as memory safety allows."""
    state, shape, device = x.dtype, x.shape, x.device
    wanted = torch.Size((branches * shape[0], *shape[1:]))
    size = math.prod(shape[1:])
    code_of, threads = CODES.get, torch.get_num_threads
    tiny = wanted.numel() == 1
    if x.numel() < _core.native.parallel_from:
        threads = _one

    def run(
        row: int, out: torch.Tensor | None, xi: torch.Tensor | None, _keep: object = keep
    ) -> None:
        xi_address = 0
        if xi is not None:
            check_tensor("cpu", "xi", xi, state, tuple(shape), device, contiguous=False)
            xi = xi.resolve_neg().contiguous()
            xi_address = xi.data_ptr()
        if out is None:
            done = call(row, 0, 0, size, xi_address, threads())
        else:
            code = code_of(out.dtype)
            if code is None or out.shape != wanted or not out.is_cpu:
                raise wrong_output(out, wanted, device)
            if out.is_contiguous() and not tiny:
                done = call(row, out.data_ptr(), code, size, xi_address, threads())
            else:
                out = out.resolve_neg()  # a lazily negated view has strides, or one element
                if not out[0].is_contiguous():
                    out = out.contiguous()
                done = call(row, out.data_ptr(), code, out.stride(0), xi_address, threads())
        if not done:  # nothing has been written
            _call_with_copies(call, row, out, xi, size)

    return run


def _call_with_copies(
    call: Callable[..., bool],
    row: int,
    out: torch.Tensor | None,
    xi: torch.Tensor | None,
    size: int,
) -> None:
    """The call of a stage whose inputs overlap its registers."""
    xi = None if xi is None else xi.clone()
    code = 0
    if out is not None:
        out, code = out.clone(memory_format=torch.contiguous_format), CODES[out.dtype]
    done = call(row, address(out), code, size, address(xi), torch.get_num_threads())
    assert done, "copies overlap nothing"


def _one() -> int:
    return 1
