# SPDX-License-Identifier: Apache-2.0
"""The compiled core: one stage in one pass over memory, on the CPU.

Everything that does not change between stages is checked and turned into addresses by `bind`; a
stage is then one call with five integers. Two stages on the same registers must not run at once.
"""

from __future__ import annotations

import torch

from ..noise import missing as why_missing
from ..noise import native
from ..plans import Layout
from .base import Registers, RunStage
from .compiled import CODES, check_tensor, refusal, stage_arguments, wrong_output


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
        return refusal(state, network)

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
    ) -> RunStage:
        if native is None:
            raise RuntimeError(f"cpu backend: the compiled core is needed; {self.missing()}.")
        arguments = stage_arguments("cpu", registers, table, layout, stage_index)
        check_tensor("cpu", "table", table, torch.float64, tuple(table.shape), registers.x.device)
        check_tensor("cpu", "row_index", row_index, torch.int64, (1,), registers.x.device)
        stage = native.Stage(table=table.data_ptr(), **arguments)
        size = arguments["size"]
        run = _runner(stage, registers, table, layout.branches, stage_index, size)
        if row_index is None:
            return run
        return lambda row, out, xi: run(row + int(row_index), out, xi)


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
    code_of, threads = CODES.get, torch.get_num_threads
    if x.numel() < native.parallel_from:
        threads = _one
    # `stage` holds addresses only: the closure keeps what they point to alive.
    keep = (registers, table, stage_index)

    def run(
        row: int, out: torch.Tensor | None, xi: torch.Tensor | None, _keep: object = keep
    ) -> None:
        xi_address = 0
        if xi is not None:
            check_tensor("cpu", "xi", xi, state, tuple(shape), x.device, contiguous=False)
            xi = xi.contiguous()
            xi_address = xi.data_ptr()
        if out is None:
            native_run(row, 0, 0, size, xi_address, threads())
            return
        code = code_of(out.dtype)
        if code is None or out.shape != wanted or not out.is_cpu:
            raise wrong_output(out, wanted, x.device)
        if out.is_contiguous():
            native_run(row, out.data_ptr(), code, size, xi_address, threads())
            return
        if not out[0].is_contiguous():
            out = out.contiguous()
        native_run(row, out.data_ptr(), code, out.stride(0), xi_address, threads())

    return run


def _one() -> int:
    return 1
