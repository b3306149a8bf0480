# SPDX-License-Identifier: Apache-2.0
"""What registers, table and indices must be for a stage to be bound to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...plans import Layout
from ..base import Registers

_Check = tuple[str, torch.Tensor | None, torch.dtype, tuple[int, ...]]

WRITTEN = ("x", "e", "history", "m", "scalars")


def check_registers(
    registers: Registers,
    table: torch.Tensor,
    layout: Layout,
    indices: Mapping[str, torch.Tensor | None],
) -> None:
    """Raises unless all have the dtype, shape, device, strides and memory that the kernels take.

    Args:
        registers, table, layout: See `Backend.bind`.
        indices: Its stage_index as "stage" and its row_index as "row".

    Raises:
        TypeError, ValueError: One has not.
    """
    checks = _wanted(registers, indices)
    for check in checks:
        _check_one(*check, registers.x.device)
    _check_table(table, layout)
    named = [(name, tensor) for name, tensor, _, _ in checks if tensor is not None]
    for i, (name, tensor) in enumerate(named):
        for other_name, other in named[:i]:
            if (name in WRITTEN or other_name in WRITTEN) and _overlap(tensor, other):
                raise ValueError(
                    f"triton backend: registers that are written share no memory; {other_name} and "
                    f"{name} overlap. Pass {name}.clone()."
                )


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a contiguous tensor's first byte to behind its last."""
    low = tensor.data_ptr()
    return low, low + tensor.numel() * tensor.element_size()


def arithmetic(state: torch.dtype) -> torch.dtype:
    """What a state of this dtype is computed in."""
    return torch.float64 if state == torch.float64 else torch.float32


def _wanted(registers: Registers, indices: Mapping[str, torch.Tensor | None]) -> list[_Check]:
    x, m, history = registers.x, registers.m, registers.history
    bank, scalars = registers.bank, registers.scalars
    state, shape = x.dtype, tuple(x.shape)
    batch = shape[0]
    checks: list[_Check] = [("x", x, state, shape), ("e", registers.e, state, shape)]
    if history is not None:
        checks.append(("history", history, state, (history.shape[0], *shape)))
    if m is not None:
        copies = m.shape[0] // batch if batch else 0
        checks.append(("m", m, m.dtype, (copies * batch, *shape[1:])))
    if bank is not None:
        entry = (1, *shape[1:]) if bank.shape[1:2] == (1,) else shape
        checks.append(("bank", bank, state, (bank.shape[0], *entry)))
    if scalars is not None:
        columns = scalars.shape[-1] if scalars.ndim else 0
        checks.append(("scalars", scalars, arithmetic(state), (batch, columns)))
    checks.append(("seeds", registers.seeds, torch.int64, (batch,)))
    checks.append(("stage_index", indices["stage"], torch.int64, (batch,)))
    checks.append(("row_index", indices["row"], torch.int64, (1,)))
    return checks


def _check_one(
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    wanted: tuple[int, ...],
    device: torch.device,
) -> None:
    if tensor is None:
        return
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


def _check_table(table: torch.Tensor, layout: Layout) -> None:
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


def _overlap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if not (tensor.numel() and other.numel()):
        return False
    (low, high), (other_low, other_high) = span(tensor), span(other)
    return low < other_high and other_low < high
