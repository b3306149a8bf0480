# SPDX-License-Identifier: Apache-2.0
"""What the backends of the compiled core share: registers checked and turned into addresses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..noise import checked_offset
from ..plans import Layout
from .base import Registers

# The core's Dtype, csrc/table.h.
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
STATES = (torch.float32, torch.float64)


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def refusal(
    core: Any, state: torch.dtype, network: torch.dtype, layout: Layout | None
) -> str | None:
    """Why the core, None where it is missing, cannot serve these dtypes or rows; else None."""
    if state not in STATES:
        return f"it keeps the state in float32 or float64; got {state}"
    if network not in CODES:
        return f"it serves networks in {dtype_names(CODES)}; got {network}"
    if core is not None and layout is not None:
        for group, most in core.most.items():
            if getattr(layout, group) > most:
                return f"a row has up to {most} {group}; got {getattr(layout, group)}"
    return None


def check_tensor(
    who: str,
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Raises a TypeError or ValueError unless the tensor is None or as described."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{who} backend: {name} is {dtype}; got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(f"{who} backend: {name} is {list(shape)}; got {list(tensor.shape)}.")
    if tensor.device != device:
        raise ValueError(
            f"{who} backend: {name} lies on {device}; got {tensor.device}. "
            f"Pass {name}.to({str(device)!r})."
        )
    if contiguous and tensor.is_neg():
        raise ValueError(
            f"{who} backend: {name} holds its own signs; got a lazily negated view. "
            f"Pass {name}.resolve_neg()."
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{who} backend: {name} is contiguous; got strides {tensor.stride()}. "
            f"Pass {name}.contiguous()."
        )


def stage_arguments(
    who: str,
    registers: Registers,
    table: torch.Tensor,
    layout: Layout,
    stage_index: torch.Tensor | None,
    offset: int,
) -> dict[str, Any]:
    """The fields of the core's `Stage`, but for the table's address.

    Raises:
        TypeError, ValueError: Registers, table and layout contradict each other or the contract in
            `base.py`.
    """
    x, m, history = registers.x, registers.m, registers.history
    state, shape, device = x.dtype, x.shape, x.device
    if state not in STATES or not shape:
        raise ValueError(
            f"{who} backend: x is [B, ...] in {dtype_names(STATES)}; got {tuple(shape)}, {state}. "
            'Use backend="torch" or, on a GPU, backend="triton".'
        )
    batch, slots = shape[0], 0 if history is None else history.shape[0]
    checks: list[tuple[str, torch.Tensor | None, torch.dtype, tuple[int, ...]]]
    checks = [("x", x, state, shape), ("e", registers.e, state, shape)]
    checks.append(("history", history, state, (slots, *shape)))
    copies = 0
    if m is not None:
        if m.dtype not in CODES:
            raise TypeError(f"{who} backend: m is in {dtype_names(CODES)}; got {m.dtype}.")
        copies = m.shape[0] // batch if batch else 1
        checks.append(("m", m, m.dtype, (copies * batch, *shape[1:])))
    bank, scalars = registers.bank, registers.scalars
    entries, in_bank = (0, 1) if bank is None else (bank.shape[0], 1)
    if bank is not None and bank.ndim > 1 and bank.shape[1] != 1:
        in_bank = batch
    checks.append(("bank", bank, state, (entries, in_bank, *shape[1:])))
    columns = 0 if scalars is None else scalars.shape[-1]
    checks.append(("scalars", scalars, state, (batch, columns)))
    checks.append(("seeds", registers.seeds, torch.int64, (batch,)))
    checks.append(("stage_index", stage_index, torch.int64, (batch,)))
    for name, tensor, dtype, wanted in checks:
        check_tensor(who, name, tensor, dtype, tuple(wanted), device)
    check_tensor(who, "table", table, torch.float64, (table.shape[0], layout.width), table.device)
    return {
        "state": CODES[state],
        "network": CODES[state if m is None else m.dtype],
        "batch": batch,
        "size": math.prod(shape[1:]),
        "x": x.data_ptr(),
        "e": address(registers.e),
        "history": address(history),
        "slots": slots,
        "m": address(m),
        "copies": copies,
        "bank": address(bank),
        "entries": entries,
        "bank_batch": in_bank,
        "scalars": address(scalars),
        "scalar_columns": columns,
        "seeds": address(registers.seeds),
        "rows": table.shape[0],
        "width": table.shape[1],
        "terms": layout.terms,
        "branches": layout.branches,
        "extras": layout.extras,
        "products": layout.products,
        "measures": layout.measures,
        "offset": checked_offset(f"{who} backend", offset),
        "stage_index": address(stage_index),
    }


def upload(there: torch.Tensor, here: torch.Tensor) -> None:
    """Copies from the host without waiting for the device, in the order of the current stream."""
    if there.is_cuda:
        # a copy: what the caller does to his own afterwards is not seen
        here = torch.empty(here.shape, dtype=there.dtype, pin_memory=True).copy_(here)
    there.copy_(here, non_blocking=True)


def wrong_output(out: torch.Tensor, wanted: torch.Size, device: torch.device) -> Exception:
    """The error for a network output that a stage cannot read."""
    if out.dtype not in CODES:
        return TypeError(
            f"network output: its dtype is one of {dtype_names(CODES)}; got {out.dtype}. "
            'Cast it, or use backend="torch".'
        )
    if out.device != device:
        return ValueError(f"network output: it lies on {device}; got {out.device}.")
    return ValueError(
        f"network output: its shape is {list(wanted)}, the sample's (times the guidance branches); "
        f"got {list(out.shape)}. Slice off what the network returns besides."
    )
