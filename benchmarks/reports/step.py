# SPDX-License-Identifier: Apache-2.0
"""Microseconds a step by shape, the targets, and bandwidths of a large state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rivals.diffusers import DEIS as THEIR_DEIS
from rivals.diffusers import TWO_M as THEIR_2M
from rivals.diffusers import TWO_M_SDE as THEIR_SDE

from fastdiff.bench.machine import MIB
from fastdiff.bench.records import Record
from fastdiff.bench.text import number, shape_text, table

SHAPES = ((64, 16), (1, 4, 64, 64), (1, 16, 128, 128))
TWO_M, DEIS, NOISE = "fastdiff dpmpp-2m", "fastdiff deis-3", "fastdiff ddim, eta = 1"
BFLOAT16 = "fastdiff dpmpp-2m, bfloat16 network"
HOISTED, FOLDED, INDUCTOR = "eager 2M, hoisted", "eager 2M, hoisted, 4 kernels", "inductor 2M"
COPY, IN_PLACE = "copy_", "mul_, in place"


@dataclass(frozen=True)
class Target:
    """A target: `ours` takes at most 1/`times` of the time of `rival` at `shapes`."""

    ours: str
    rival: str
    times: float
    shapes: tuple[tuple[int, ...], ...]


TARGETS = (
    Target(TWO_M, THEIR_2M, 30.0, SHAPES[:2]),
    Target(DEIS, THEIR_DEIS, 150.0, SHAPES[:2]),
    Target(TWO_M, THEIR_2M, 9.0, SHAPES[2:]),
    Target(TWO_M, HOISTED, 3.0, SHAPES[2:]),
    Target(TWO_M, FOLDED, 3.0, SHAPES[2:]),
    Target(NOISE, THEIR_SDE, 6.0, SHAPES[2:]),
)
COPY_SHARE = 0.9


def page(records: Sequence[Record], place: str) -> str:
    """Small states by the number of threads, then the large state."""
    parts = []
    few = [r for r in records if r["bench"] == "step"]
    for threads, steps in dict.fromkeys((r["threads"], r["steps"]) for r in few):
        found = [r for r in few if (r["threads"], r["steps"]) == (threads, steps)]
        title = f"{threads} thread{'s' * (threads > 1)}, float32, {steps} steps"
        parts += [f"**Small states, {title}**", small(found)]
    many = [r for r in records if r["bench"] == "step-large"]
    for numel in dict.fromkeys(r["shape"][1] for r in many):
        found = [r for r in many if r["shape"][1] == numel]
        parts += [f"**Registers of {4 * numel / MIB:g} MiB, float32**", large(found)]
    return "\n\n".join(parts)


def small(records: Sequence[Record]) -> str:
    """Times by shape, `best / median (p20 to p80)`, then every target beside its ratio."""
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in records))
    by = {(r["rival"], tuple(r["shape"])): r for r in records}
    names = list(dict.fromkeys(r["rival"] for r in records))
    n = number

    def cell(name: str, shape: tuple[int, ...]) -> str:
        r = by[name, shape]
        return f"{n(r['best'])} / {n(r['median'])} ({n(r['p20'])} to {n(r['p80'])})"

    rows = [[name, *(cell(name, shape) for shape in shapes)] for name in names]
    head = ["us a step: best / median (p20 to p80)", *map(shape_text, shapes)]
    lines = [table(head, rows), ""]
    rows = []
    for target in TARGETS:
        for shape in target.shapes:
            if (target.ours, shape) not in by:
                continue
            ours, rival = by[target.ours, shape], by[target.rival, shape]
            ratios = [rival[k] / ours[k] for k in ("best", "median")]
            row = [f"{target.ours} against {target.rival}", shape_text(shape)]
            row += [f"1/{n(r)}" for r in ratios]
            rows.append([*row, f"1/{target.times:.0f}", _verdict(ratios, target.times)])
    head = ["time of ours over the rival's", "shape", "best", "median", "target", ""]
    if rows:
        lines.append(table(head, rows))
    return "\n".join(lines)


def large(records: Sequence[Record]) -> str:
    """A table of bandwidths, with their share of the copy's: best of best, median of median."""
    rows = []
    for r in records:
        shares = [r["share"], r["share_median"]]
        verdict = _verdict(shares, COPY_SHARE) if r["rival"].startswith("fastdiff") else ""
        registers = f"{r['moved'] / 4 / r['shape'][1]:.0f}"
        row = [r["rival"], str(r["threads"]), registers]
        row += [f"{number(r[k] / 1e3)}" for k in ("best", "median")]
        row += [number(r["bandwidth"]), " / ".join(f"{share:.2f}" for share in shares)]
        rows.append([*row, verdict])
    head = ["a stage", "threads", "registers moved", "best, ms", "median, ms", "GB/s, best"]
    return table([*head, "share of copy_, best / median", f"target {COPY_SHARE}"], rows)


def _verdict(values: Sequence[float], target: float) -> str:
    reached = [value >= target for value in values]
    return "met" if all(reached) else "met by one of the two" if any(reached) else "not met"
