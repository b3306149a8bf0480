# SPDX-License-Identifier: Apache-2.0
"""Triton: one stage in one pass over memory, on NVIDIA GPUs, compiled at its first call.

`bind` checks everything that does not change between stages, uploads the table and fixes the
launches; a stage is then one launch on the current stream, with no copy, no synchronisation and no
allocation. Where a row of the table thresholds, a launch that finds each sample's scale goes before
it; measures are a launch of their own. Triton is imported by the first `bind`. Under Triton's
interpreter (TRITON_INTERPRET=1 set before triton is imported) the same kernels run on CPU tensors,
a hundred times slower, for tests; `choose` never picks that.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util

import torch

from ...plans import Layout
from ..base import Registers
from .checks import check_registers
from .launches import STATES, interpreting, names
from .stage import TritonStage

__all__ = ["TritonBackend", "TritonStage", "interpreting"]

_OLDEST = (3, 3)  # the first with tuples of pointers as arguments


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
        if state not in STATES:
            return f"it keeps the state in {names(STATES)}; got {state}"
        if network not in STATES:
            return f"it serves networks in {names(STATES)}; got {network}"
        return None

    def bind(
        self,
        registers: Registers,
        table: torch.Tensor,
        layout: Layout,
        stage_index: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        offset: int = 0,
    ) -> TritonStage:
        """As `Backend.bind`, with what a device adds.

        Args:
            registers, table, layout, offset: See there.
            stage_index: int64 [B], beside the registers: sample b runs `row + stage_index[b]`. A
                sample whose row lies outside the table is left as it is.
            row_index: int64 [1], beside the registers, likewise, added to `row`: a captured launch
                runs the row that stands there at the replay.

        Raises:
            RuntimeError: Triton or the driver is missing.
            NotImplementedError: A dtype or device is not served.
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
        if offset < 0 or offset % 4:
            raise ValueError(
                f"triton backend: offset is a multiple of 4 and at least 0; got {offset}."
            )
        check_registers(registers, table, layout, {"stage": stage_index, "row": row_index})
        return TritonStage(registers, table, layout, stage_index, row_index, offset)
