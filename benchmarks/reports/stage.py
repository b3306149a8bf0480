# SPDX-License-Identifier: Apache-2.0
"""Stages: the targets beside the worst cells they bind, and a table of all cells and rivals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from fastdiff.bench.machine import MIB
from fastdiff.bench.records import Record
from fastdiff.bench.rows import SHOWN, TINY, Case, all_cases, large_from, register_text
from fastdiff.bench.text import number, table

SHARE = 0.90
CUDA_HOST, ABOVE_LAUNCHER = 8.0, 5.0  # us
LAUNCHER = "triton, empty kernel"
EAGER, INDUCTOR, THEIRS = "eager torch, hoisted", "torch.compile", "diffusers DPM++2M"


def page(records: Sequence[Record], place: str) -> str:
    """The bandwidth of a copy, the targets, the rows of `SHOWN`, then all others."""
    blocks = [copies(records, place), targets(records, place)]
    for shown in (True, False):
        found = [r for r in records if (case_of(r) in SHOWN) == shown]
        blocks += [report(found)] * bool(found)
    return "\n\n".join(block for block in blocks if block)


def copies(records: Sequence[Record], place: str) -> str:
    """The bandwidth of the large copy that small cells are held against."""
    large = large_from(place)
    small = [r for r in records if 4 * math.prod(r["shape"]) < large and r["share"]]
    if not small:
        return ""
    line = max(small, key=lambda r: r["share"])  # of the most digits
    best, median = (line["bandwidth" + s] / line["share" + s] for s in ("", "_median"))
    return (
        f"Shares of registers under {large // MIB} MiB are of one large `copy_`: "
        f"{number(best)} / {number(median)} GB/s (best / median)."
    )


def report(records: Sequence[Record]) -> str:
    """A table of every cell and rival, with medians."""
    order = {case: k for k, case in enumerate(all_cases())}
    rows = []
    for r in sorted(records, key=lambda r: (order[case_of(r)], *_order(r["shape"]))):
        row = [str(case_of(r)), register_text(r["shape"]) + "*" * r["in_cache"], r["rival"]]
        row += [number(r["median"]), number(r["bandwidth_median"]) if r["moved"] else ""]
        row += [f"{r['share_median']:.2f}" if r["moved"] else ""]
        rows.append([*row, number(r["host"]) if "host" in r else ""])
    head = ["row", "a register", "rival", "us", "GB/s", "share of copy_", "host us"]
    return table(head, rows) + "\n\n\\* its sets of registers fit in the last cache."


def targets(records: Sequence[Record], device: str) -> str:
    """A table of the targets: each beside the worst cell that it binds, and whether it is met."""
    rows = []

    def add(what: str, bound: str, values: Sequence[float], good: Callable[[float], bool]) -> None:
        if not values:
            rows.append([what, bound, "", "not measured"])
            return
        worst = min(values, key=lambda v: (good(v), v if bound.startswith("at least") else -v))
        shown = f"{number(worst)} (worst of {len(values)})"
        rows.append([what, bound, shown, "met" if good(worst) else "not met"])

    large = large_from(device)
    names = ("fastdiff cpu",) if device == "cpu" else ("fastdiff cuda", "fastdiff triton")
    kinds = {"without noise": (False, False), "with noise": (True, False)}
    kinds["backward"] = (False, True)
    for name, (kind, flags) in itertools.product(names, kinds.items()):
        found = [
            r["share_median"]
            for r in records
            if r["rival"] == name
            and (r["noise"], r.get("backward", False)) == flags
            and 4 * math.prod(r["shape"]) >= large
        ]
        what = f"{name}, {kind}, {large // MIB} MiB and up: share of copy_"
        add(what, f"at least {SHARE:.2f}", found, lambda v: v >= SHARE)
    if device == "cuda":

        def hosts(rival: str) -> list[float]:
            return [
                r["host"]
                for r in records
                if r["rival"] == rival and 4 * math.prod(r["shape"]) <= MIB and "host" in r
            ]

        below = f"under {CUDA_HOST:g}"
        add("fastdiff cuda: host us a stage", below, hosts(names[0]), lambda v: v < CUDA_HOST)
        launcher = hosts(LAUNCHER)
        limit = min(launcher) + ABOVE_LAUNCHER if launcher else math.nan
        below = f"under {number(limit)}" if launcher else "launcher + 5"
        found = hosts(names[1]) if launcher else []
        add("fastdiff triton: host us a stage", below, found, lambda v: v < limit)
    return table(["target", "bound", "measured", ""], rows)


def _order(shape: Sequence[int]) -> tuple[bool, int]:
    """The key that sorts flat registers by size, and the tiny samples after them."""
    return tuple(shape) in TINY, math.prod(shape)


def case_of(line: Record) -> Case:
    network = getattr(torch, line["network"])
    return Case(
        line["outputs"], line["branches"], network, line["noise"], line.get("backward", False)
    )
