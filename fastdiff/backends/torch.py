# SPDX-License-Identifier: Apache-2.0
"""The reference: one stage in plain PyTorch, at any floating dtype, on any device.

Terms are added in table order, as the compiled backends do; each product and sum rounds on its
own here, where they fuse them, so results agree to rounding and not to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import noise
from ..plans import AT_E, CLIP, EVALUATE, THRESHOLD, WRITES_E, WRITES_M, WRITES_X, Layout
from .base import Registers, RunStage


class TorchBackend:
    name = "torch"

    def missing(self) -> str | None:
        return None

    def supports(
        self, state: torch.dtype, network: torch.dtype, device: torch.device
    ) -> str | None:
        return None

    def bind(
        self,
        registers: Registers,
        table: Tensor,
        layout: Layout,
        stage_index: Tensor | None = None,
        row_index: Tensor | None = None,
    ) -> RunStage:
        columns = layout.columns

        wanted = torch.Size((layout.branches * registers.x.shape[0], *registers.x.shape[1:]))

        def run(row: int, out: Tensor | None, xi: Tensor | None) -> None:
            if out is not None:
                legal = out.shape == wanted and out.dtype.is_floating_point
                if not legal or out.device != registers.x.device:
                    raise ValueError(
                        f"torch backend: the network output is floating, {tuple(wanted)} on "
                        f"{registers.x.device}; got {out.dtype}, {tuple(out.shape)} on "
                        f"{out.device}."
                    )
            if row_index is not None:
                row += int(row_index)
            if stage_index is None:
                values = dict(zip(columns, table[row].tolist(), strict=True))
                stage(registers, values, layout, slice(None), out, xi)
            else:
                for b, offset in enumerate(stage_index.tolist()):
                    values = dict(zip(columns, table[row + offset].tolist(), strict=True))
                    stage(registers, values, layout, slice(b, b + 1), out, xi)

        return run


def threshold(h: Tensor, quantile: float, floor: float) -> Tensor:
    """Dynamic thresholding of x0 predictions: h clipped to [-s, s] and divided by s, per sample.

        s = max(quantile of the sample's |h|, floor)

    The quantile is torch.quantile's "linear" one in float64, at position quantile (n - 1) of the n
    magnitudes, for samples of any size. Where it is NaN, s is the floor; a NaN in h stays.

    Args:
        h: [B, ...], floating. Without elements it is returned as it is.
        quantile, floor: As in `fastdiff.Stage`.
    """
    if h.numel() == 0:
        return h
    ordered = h.abs().reshape(len(h), -1).sort(dim=1).values
    position = quantile * (ordered.shape[1] - 1)
    rank = math.floor(position)
    low, high = ordered[:, rank].double(), ordered[:, math.ceil(position)].double()
    s = low + (position - rank) * (high - low)
    s = torch.where(s > floor, s, floor).to(h.dtype).reshape(-1, *[1] * (h.ndim - 1))
    return h.clamp(-s, s) / s


def stage(
    registers: Registers,
    row: dict[str, float],
    layout: Layout,
    samples: slice,
    out: Tensor | None,
    xi: Tensor | None,
) -> None:
    """Runs one row on some samples; the formulas are those of `fastdiff.plan`."""
    flags, whole = int(row["flags"]), registers.x
    x = whole[samples]
    e = registers.e[samples] if registers.e is not None else x
    point = e if flags & AT_E else x

    def combine(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(x)
        for weight, term in zip(weights, terms, strict=True):
            if weight != 0.0:  # a coefficient of 0 never reads its register
                total = total + weight * term
        return total

    h = drawn = x  # where they do not exist their weights are 0
    if flags & EVALUATE:
        if out is None:
            raise TypeError("torch backend: this row needs the network's output; got None.")
        outputs = out.reshape(layout.branches, *whole.shape)[:, samples].to(x.dtype)
        k = [row[f"k_{g}"] for g in range(layout.branches)]
        h = combine([*k, row["p"]], [*outputs, point])
        if flags & CLIP:
            h = h.clamp(row["lo"], row["hi"])
        if flags & THRESHOLD:
            h = threshold(h, row["quantile"], row["floor"])
    if xi is not None:
        drawn = xi[samples]
    elif row["draws"]:
        assert registers.seeds is not None
        draws = range(1, int(row["draws"]) + 1)
        normals = [
            noise.normal(
                x.shape,
                registers.seeds[samples],
                int(row[f"stream_{k}"]),
                dtype=x.dtype,
                device=x.device,
            )
            for k in draws
        ]
        drawn = combine([row[f"xi_{k}"] for k in draws], normals)

    terms = range(int(row["n_terms"]))
    history = whole.new_empty(0) if registers.history is None else registers.history
    past = [history[int(row[f"slot_{k}"])][samples] for k in terms]
    entries = [int(row[f"entry_{i}"]) for i in range(int(row["n_extras"]))]
    extras = [registers.bank[entry][samples] for entry in entries]  # type: ignore[index]

    def update(
        x_weight: str, e_weight: str, h_weight: str, past_weight: str, c: str, r: str
    ) -> Tensor:
        weights = [row[x_weight], row[e_weight], row[h_weight]]
        weights += [row[f"{past_weight}_{k}"] for k in terms]
        weights += [row[c], *(row[f"{r}_{i}"] for i in range(len(extras)))]
        return combine(weights, [x, e, h, *past, drawn, *extras])

    x_next = update("a_x", "a_e", "b_0", "past_b", "c", "r") if flags & WRITES_X else x
    e_next = update("d_x", "d_e", "g_0", "past_g", "c_e", "s") if flags & WRITES_E else e
    if row["push"] >= 0:
        history[int(row["push"])][samples] = h
    if row["push_x"] >= 0:
        history[int(row["push_x"])][samples] = x
    if flags & WRITES_E:
        e.copy_(e_next)
    if flags & WRITES_X:
        x.copy_(x_next)
    if registers.m is not None and flags & WRITES_M:
        m = torch.zeros_like(x)
        if row["c_in_next"] != 0.0:
            m = row["c_in_next"] * (e if flags & WRITES_E else x)
        copies = registers.m.shape[0] // max(whole.shape[0], 1)
        registers.m.reshape(copies, *whole.shape)[:, samples] = m.to(registers.m.dtype)
