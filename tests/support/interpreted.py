# SPDX-License-Identifier: Apache-2.0
"""Where the Triton stage is tested, and registers that move there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.backends.triton import interpreting
from fastdiff.plans import AT_E, EVALUATE, WRITES_E, WRITES_M, WRITES_X, Layout, Plan, Stage

from .rows import raw

INTERPRETED = interpreting()
HERE = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled on a GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


VERSION = tuple(int(p) for p in pytest.importorskip("triton").__version__.split(".")[:2])
FUSES = pytest.mark.skipif(
    INTERPRETED and VERSION < (3, 9), reason="Triton's interpreter fuses tl.fma from 3.9 on"
)


def takes_few(device: str) -> bool:
    """Whether a test of many shapes and rows takes fewer of them: each is a kernel to compile.

    On a GPU every kernel runs with every dtype and every feature of a row, elements moved 16 bytes
    at a time and one by one: 210 kernels for `tests/test_triton*.py`. With every case there are
    302; that features combine as they should is what the interpreter is asked.
    """
    return device == "cuda"


def moved(registers: Registers, device: str) -> Registers:
    """Copies of all registers on a device."""

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, copy=True)

    return Registers(**{name: copy(tensor) for name, tensor in vars(registers).items()})


def reads(row: np.ndarray, layout: Layout) -> dict:
    """Which registers a row reads: by name, history by slot, extras and branches by position."""
    v = dict(zip(layout.columns, row, strict=True))
    flags = int(v["flags"])
    by_x, by_e = bool(flags & WRITES_X), bool(flags & WRITES_E)

    def read(in_x: str, in_e: str) -> bool:
        return bool((by_x and v[in_x]) or (by_e and v[in_e]))

    point = bool(flags & EVALUATE) and v["p"] != 0
    m_from_x = flags & WRITES_M and v["c_in_next"] != 0 and not (by_x or by_e)
    terms = [k for k in range(int(v["n_terms"])) if read(f"past_b_{k}", f"past_g_{k}")]
    return {
        "x": read("a_x", "d_x") or (point and not flags & AT_E) or bool(m_from_x),
        "e": read("a_e", "d_e") or (point and bool(flags & AT_E)),
        "history": {int(v[f"slot_{k}"]) for k in terms},
        "bank": {int(v[f"entry_{i}"]) for i in range(layout.extras) if read(f"r_{i}", f"s_{i}")},
        "branches": {g for g in range(layout.branches) if flags & EVALUATE and v[f"k_{g}"]},
    }


def poison_unread(registers: Registers, rows: list, layout: Layout, out: torch.Tensor) -> None:
    """NaN in whatever none of the rows reads."""
    used = [reads(row, layout) for row in rows]
    if not any(u["x"] for u in used):
        registers.x.fill_(torch.nan)
    if registers.e is not None and not any(u["e"] for u in used):
        registers.e.fill_(torch.nan)
    for name, tensors in (
        ("history", registers.history),
        ("bank", () if registers.bank is None else registers.bank),
        ("branches", out.reshape(layout.branches, *registers.x.shape)),
    ):
        for i, tensor in enumerate(tensors):
            if not any(i in u[name] for u in used):
                tensor.fill_(torch.nan)


def after(name, registers, rows, layout, out, xi=None, index=None, row=0, device="cpu"):
    """The registers on the CPU after one stage of `backend` on `device`."""
    copies = moved(registers, device)
    index = None if index is None else index.to(device)
    stage = backends.get(name).bind(copies, torch.from_numpy(np.stack(rows)), layout, index)
    stage.run(row, None if out is None else out.to(device), None if xi is None else xi.to(device))
    return moved(copies, "cpu")


def same(a: Registers, b: Registers) -> bool:
    pairs = zip((a.x, a.e, a.history, a.m), (b.x, b.e, b.history, b.m), strict=True)
    return all(raw(p) == raw(q) for p, q in pairs if p is not None)


def thresholds(quantile: float, floor: float, **fields) -> Plan:
    """A plan of one stage, x' = threshold(out) unless `fields` say otherwise."""
    stage = Stage(t=1.0, **{"a_x": 0.0, "b": (1.0,), **fields}, threshold=(quantile, floor))
    return Plan(stages=(stage,), times=(1.0, 0.0), variable="x0")


def network(x, t, y=None):
    """Two products: the same bits on every device."""
    scale = 0.25 if y is None else y.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return x * scale * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def as_table(plan: Plan) -> torch.Tensor:
    return torch.tensor(plan.table)
