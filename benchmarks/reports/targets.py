# SPDX-License-Identifier: Apache-2.0
"""The targets of a GPU: each beside the figure that was measured, and whether it is met.

They are stated for an H200. Where two backends serve a cell, the better one counts: it is the one
to choose. A target is met only if every cell that it binds was measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdiff.bench.gradients import BACKPROP
from fastdiff.bench.gradients import CAPTURED as CAPTURED_GRADIENT
from fastdiff.bench.loops import CAPTURED, LOOP, WAITED
from fastdiff.bench.machine import KIB, MIB
from fastdiff.bench.records import Record, latest, where
from fastdiff.bench.rows import UNCACHED
from fastdiff.bench.stages import GRAPHED, rival_name
from fastdiff.bench.text import number, table

from .loop import THEIRS

BACKENDS = ("cuda", "triton")
OUTPUTS, BRANCHES = (1, 2, 3, 4), (1, 2)
SHARE = 0.90  # of the copy bandwidth, at least
GRAPHED_MOST, SMALL = 3.0, 64 * KIB  # us of a stage inside a graph, of registers of so many bytes
HOST_MOST, EAGER_SMALL = 8.0, MIB  # us of the host
LOOP_MOST, STAGES = 65.0, 20  # us of a null loop
RIVAL_TIMES, GRADIENT_TIMES = 10.0, 3.0
NOISE_MOST = 1.05  # of the time without noise

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"


@dataclass(frozen=True)
class Target:
    """A target and what became of it.

    Attributes:
        what: Is measured.
        bound: On it.
        measured: The figure, empty where there is none.
        verdict: "met", "not met", "not measured"; or "measured", where a figure has no bound.
    """

    what: str
    bound: str
    measured: str
    verdict: str


def page(records: Sequence[Record]) -> str:
    """A table of all targets for every GPU among the records; without one, nothing is measured."""
    blocks = []
    for found in latest([r for r in records if r.get("device") == "cuda"]):
        blocks += [where(found[0]), _table(targets(found))]
    return "\n\n".join(blocks or ["No row is of a GPU.", _table(targets([]))])


def _table(found: Iterable[Target]) -> str:
    rows = [[t.what, t.bound, t.measured, t.verdict] for t in found]
    return table(["target, on an H200", "bound", "measured", ""], rows)


def targets(records: Sequence[Record]) -> list[Target]:
    """Every target, held against the rows of one GPU."""
    stage = [r for r in records if r["bench"] == "stage" and not r.get("backward", False)]
    loop = [r for r in records if r["bench"] == "loop" and not r["compiled"]]
    gradients = [r for r in records if r["bench"] == "gradients" and r["part"] == "time"]
    found = [_share("the better backend of each cell", stage, BACKENDS)]
    found += [_share(name, stage, (name,)) for name in BACKENDS]
    return [
        *found,
        _graphed(stage),
        _host(stage),
        *_loops(loop),
        _gradient(gradients),
        _noise(stage),
    ]


def judged(
    what: str, bound: str, figures: Sequence[float], good: Callable[[float], bool], bound_cells: int
) -> Target:
    """A target over several cells: the worst figure speaks.

    Args:
        what, bound: As printed.
        figures: One a cell that was measured.
        good: Whether a figure meets it; it rises or falls with the figure.
        bound_cells: How many cells the target binds. 0: as many as there are.
    """
    if not figures:
        return Target(what, bound, "", NOT_MEASURED)
    rises = good(math.inf)
    worst = min(figures) if rises else max(figures)
    count, cells = len(figures), bound_cells or len(figures)
    shown = f"{number(worst)} (worst of {count}{f' of {cells}' * (count < cells)})"
    if not good(worst):
        return Target(what, bound, shown, NOT_MET)
    return Target(what, bound, shown, MET if count >= cells else NOT_MEASURED)


# -- stages ----------------------------------------------------------------------------------------


def _size(line: Record) -> int:
    return 4 * math.prod(line["shape"])


def _cell(line: Record) -> tuple[Any, ...]:
    row = line["outputs"], line["branches"], line["network"], line["noise"]
    return *row, tuple(line["shape"])


def _best(
    records: Sequence[Record], names: Sequence[str], key: str, better: Callable[..., float]
) -> dict[tuple[Any, ...], float]:
    """The better figure of some rivals in each cell."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for r in records:
        if r["rival"] in names and key in r:
            found.setdefault(_cell(r), []).append(r[key])
    return {cell: better(values) for cell, values in found.items()}


def _bound(records: Sequence[Record]) -> list[Record]:
    """Those of the cells that the targets of large stages bind."""
    return [r for r in records if _size(r) >= UNCACHED and r["network"] == "float32"]


def _share(who: str, records: Sequence[Record], names: Sequence[str]) -> Target:
    rivals = [rival_name(name) for name in names]
    best = _best(_bound(records), rivals, "share_median", max)
    # the kinds that were seen at 256 MiB; larger ones are held to the same bound
    cells = {cell[:4] for cell in best if 4 * math.prod(cell[4]) == UNCACHED}
    every = set(itertools.product(OUTPUTS, BRANCHES, ("float32",), (False, True)))
    figures = [share for cell, share in best.items() if cell[:4] in every]
    what = f"a stage from 256 MiB on, M = 1 to 4, G = 1, 2, noise or not: share of copy, {who}"
    missing = len(every - cells)
    bound = f"at least {SHARE:.2f}"
    return judged(what, bound, figures, lambda v: v >= SHARE, len(figures) + missing)


def _graphed(records: Sequence[Record]) -> Target:
    names = [GRAPHED.format(rival_name(name)) for name in BACKENDS]
    small = [r for r in records if _size(r) <= SMALL]
    figures = list(_best(small, names, "median", min).values())
    bound = f"at most {GRAPHED_MOST:g} us"
    what = f"a stage inside a graph, registers up to {SMALL // KIB} KiB"
    return judged(what, bound, figures, lambda v: v <= GRAPHED_MOST, 0)


def _host(records: Sequence[Record]) -> Target:
    small = [r for r in records if _size(r) <= EAGER_SMALL]
    figures = list(_best(small, [rival_name(name) for name in BACKENDS], "host", min).values())
    bound = f"at most {HOST_MOST:g} us"
    what = "an eager stage: the host's time, registers up to 1 MiB"
    return judged(what, bound, figures, lambda v: v <= HOST_MOST, 0)


def _noise(records: Sequence[Record]) -> Target:
    best = _best(_bound(records), [rival_name(name) for name in BACKENDS], "median", min)
    at = {cell: t for cell, t in best.items() if 4 * math.prod(cell[4]) == UNCACHED}
    figures = []
    for (outputs, branches, network, noise, shape), time in at.items():
        without = at.get((outputs, branches, network, False, shape))
        if noise and without:
            figures.append(time / without)
    what, bound = "a stage at 256 MiB: with noise over without", f"at most {NOISE_MOST:.2f}"
    cells = len(OUTPUTS) * len(BRANCHES)
    return judged(what, bound, figures, lambda v: v <= NOISE_MOST, cells)


# -- loops and gradients ---------------------------------------------------------------------------


def _loops(records: Sequence[Record]) -> list[Target]:
    by = {
        (r["network"], tuple(r["shape"]), r["rival"]): r for r in records if r["timing"] == WAITED
    }

    def us(kind: str, shape: tuple[int, ...], rival: str) -> list[float]:
        """The median of a whole loop."""
        line = by.get((kind, shape, rival))
        return [] if line is None else [line["median"] * line["steps"]]

    whole = us("null", (1, 4, 64, 64), LOOP)
    what, most = (
        f"a call of a null loop of {STAGES} stages, waited: us",
        f"at most {LOOP_MOST:g} us",
    )
    found = [judged(what, most, whole, lambda v: v <= LOOP_MOST, 1)]
    steps = by.get(("mlp", (64, 16), LOOP), {}).get("steps", 0)
    ours, own = us("mlp", (64, 16), LOOP), us("mlp", (64, 16), CAPTURED)
    what = "[64,16] policies, a captured loop: us a stage, and of it beyond the captured network"
    shown = ""
    if ours and own:
        shown = f"{number(ours[0] / steps)}, {number((ours[0] - own[0]) / steps)}"
    why = "none: it decides whether a kernel of the whole loop is worth writing"
    found.append(Target(what, why, shown, "measured" if shown else NOT_MEASURED))
    pairs = zip(us("mlp", (1, 16), THEIRS), us("mlp", (1, 16), LOOP), strict=False)
    times = [theirs / own for theirs, own in pairs]
    what, least = "MLP policy, batch 1: diffusers' loop over ours", f"at least {RIVAL_TIMES:g}"
    return [*found, judged(what, least, times, lambda v: v >= RIVAL_TIMES, 1)]


def _gradient(records: Sequence[Record]) -> Target:
    by = {
        r["rival"]: r["median"]
        for r in records
        if r["network"] == "mlp" and r["shape"][0] == 1 and not r["theta"]
    }
    figures = (
        [by[BACKPROP] / by[CAPTURED_GRADIENT]] if {BACKPROP, CAPTURED_GRADIENT} <= set(by) else []
    )
    what = "MLP policy, batch 1: eager backprop over the captured gradient"
    bound = f"at least {GRADIENT_TIMES:g}"
    return judged(what, bound, figures, lambda v: v >= GRADIENT_TIMES, 1)
