# SPDX-License-Identifier: Apache-2.0
"""Random rows of the packed table and random registers, for tests of one stage on any backend."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fastdiff.backends import Registers
from fastdiff.plans import AT_E, CLIP, EVALUATE, WRITES_E, WRITES_M, WRITES_X, Layout
from fastdiff.plans.layout import PackedRow, encode

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SLOTS = 6


def neutral(layout: Layout) -> dict[str, float]:
    """The columns of a row that reads and writes nothing."""
    (row,) = encode([PackedRow()], layout)
    return dict(zip(layout.columns, row.tolist(), strict=True))


def random_row(
    rng: np.random.Generator,
    layout: Layout,
    with_e: bool,
    draws: int,
    clip: bool | None = None,
) -> np.ndarray:
    """A row with every kind of term, each coefficient 0 one time in four.

    Args:
        rng: The source of the numbers.
        layout: The columns of the row.
        with_e: Whether the row may read, write and be evaluated at e.
        draws: The number of draws in the row's noise, 0 to 2.
        clip: Whether h is clipped where the row evaluates; None clips three times in ten.

    Returns:
        The packed row, float64 [layout.width].
    """

    def coefficient() -> float:
        return 0.0 if rng.random() < 0.25 else rng.normal()

    row = neutral(layout)
    evaluates = rng.random() < 0.9
    flags = EVALUATE * evaluates + WRITES_X * (rng.random() < 0.85)
    flags += WRITES_M * (rng.random() < 0.85)
    if with_e:
        flags += AT_E * (rng.random() < 0.5) + WRITES_E * (rng.random() < 0.7)
        row.update(a_e=coefficient(), d_x=coefficient(), d_e=coefficient(), c_e=coefficient())
    row.update(a_x=coefficient(), c=coefficient(), c_in_next=rng.choice([0.0, 1.0, 0.7]))
    row["push"] = row["push_x"] = -1
    if evaluates:
        row.update(p=coefficient(), b_0=coefficient(), g_0=coefficient() * with_e)
        row.update({f"k_{g}": coefficient() for g in range(layout.branches)})
        row["push"] = rng.integers(-1, SLOTS)
        if rng.random() < 0.3 if clip is None else clip:
            flags += CLIP
            row.update(lo=-0.5, hi=0.8)
    if rng.random() < 0.3:
        row["push_x"] = rng.choice([s for s in range(SLOTS) if s != row["push"]])
    row["draws"] = draws
    for k in range(1, draws + 1):
        row.update({f"stream_{k}": rng.integers(1, 100), f"xi_{k}": coefficient()})
    if not draws:
        row["c"] = row["c_e"] = 0.0
    row["n_terms"] = rng.integers(0, layout.terms + 1)
    for k in range(layout.terms):
        row[f"slot_{k}"] = -1
        if k < row["n_terms"]:
            row[f"slot_{k}"] = (k + 2) % SLOTS
            row.update({f"past_b_{k}": coefficient(), f"past_g_{k}": coefficient() * with_e})
    row["n_extras"] = layout.extras
    for i in range(layout.extras):
        row.update({f"entry_{i}": i, f"r_{i}": coefficient(), f"s_{i}": coefficient() * with_e})
    row["flags"] = flags
    return np.array([row[name] for name in layout.columns])


def shifted(values: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, contiguous, `offset` elements after an aligned address."""
    store = torch.full((values.numel() + offset,), -7, dtype=values.dtype)
    view = store[offset:].view(values.shape)
    return view.copy_(values)


def random_registers(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    state: torch.dtype,
    layout: Layout,
    with_e: bool = False,
    m: torch.dtype | None = None,
    offset: int = 0,
) -> Registers:
    """CPU registers of random numbers, `offset` elements off alignment; m is NaN."""

    def values(*sizes: int) -> torch.Tensor:
        return shifted(torch.from_numpy(rng.normal(size=sizes)).to(state), offset)

    copies = layout.branches * shape[0]
    poison = None if m is None else torch.full((copies, *shape[1:]), torch.nan, dtype=m)
    return Registers(
        x=values(*shape),
        e=values(*shape) if with_e else None,
        history=values(SLOTS, *shape),
        m=None if poison is None else shifted(poison, offset),
        bank=values(layout.extras, *shape) if layout.extras else None,
        seeds=torch.from_numpy(rng.integers(-(2**62), 2**62, shape[0])),
    )


def random_output(
    rng: np.random.Generator, shape: tuple[int, ...], layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """Outputs of every branch, [branches * B, ...]."""
    sizes = (layout.branches * shape[0], *shape[1:])
    return torch.from_numpy(rng.normal(size=sizes)).to(dtype)


def copied(registers: Registers) -> Registers:
    """Registers with the same values, in memory of their own where a stage writes."""
    return dataclasses.replace(
        registers,
        x=registers.x.clone(),
        e=None if registers.e is None else registers.e.clone(),
        history=registers.history.clone(),
        m=None if registers.m is None else registers.m.clone(),
    )


def entries(registers: Registers) -> list[torch.Tensor]:
    """The entries of the bank, each as large as x."""
    bank = registers.bank
    return [] if bank is None else [entry.expand_as(registers.x) for entry in bank]


def written(registers: Registers) -> list[torch.Tensor]:
    """The registers that a stage may write."""
    return [t for t in (registers.x, registers.e, registers.history, registers.m) if t is not None]


def raw(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor's elements in row-major order."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def table_of(*rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows))
