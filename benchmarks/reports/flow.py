# SPDX-License-Identifier: Apache-2.0
"""Errors of flows in velocity: the best of both sides at every budget, and every solver."""

from __future__ import annotations

from collections.abc import Sequence

from problems.flows import TITLES

from fastdiff.bench.records import Record
from fastdiff.bench.text import number, table

SHOWN = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30, 40)  # budgets of the table of all solvers
Best = dict[int, tuple[float, str]]  # NFE -> least error, solver


def page(records: Sequence[Record], place: str) -> str:
    """For each problem the best of both sides, whether ours is no worse, and every solver."""
    parts = []
    for problem in dict.fromkeys(r["problem"] for r in records):
        found = [r for r in records if r["problem"] == problem]
        parts += [f"**{TITLES[problem]}**", verdict(found), bests(found), solvers(found)]
    return "\n\n".join(parts)


def best_of(records: Sequence[Record], rival: str) -> Best:
    """The least error at every budget, and whose it is."""
    found: Best = {}
    for r in records:
        if r["rival"] == rival:
            for nfe, error in r["error"].items():
                found[int(nfe)] = min((error, r["solver"]), found.get(int(nfe), (error, "~")))
    return dict(sorted(found.items()))


def verdict(records: Sequence[Record]) -> str:
    """Where our best is no worse than torchdiffeq's."""
    ours, theirs = best_of(records, "fastdiff"), best_of(records, "torchdiffeq")
    both = [n for n in theirs if n in ours]
    worse = [n for n in both if ours[n][0] > theirs[n][0]]
    if not both:
        return "torchdiffeq was not measured."
    where = f"; it is worse at {', '.join(map(str, worse))}" if worse else ""
    return (
        f"Our best is no worse than the best of torchdiffeq's methods at {len(both) - len(worse)} "
        f"of {len(both)} numbers of evaluations{where}."
    )


def bests(records: Sequence[Record]) -> str:
    """One line for each budget."""
    ours, theirs = best_of(records, "fastdiff"), best_of(records, "torchdiffeq")
    lines = []
    for nfe, (error, solver) in ours.items():
        their, method = theirs.get(nfe, (float("nan"), ""))
        compared = [number(their), method, number(their / error)] if method else ["", "", ""]
        lines.append([str(nfe), number(error), solver, *compared])
    return table(["NFE", "fastdiff", "by", "torchdiffeq", "by", "theirs / ours"], lines)


def solvers(records: Sequence[Record]) -> str:
    """One line for each solver, with the budgets of `SHOWN` that were measured."""
    measured = {int(nfe) for r in records for nfe in r["error"]}
    budgets = [nfe for nfe in SHOWN if nfe in measured] or sorted(measured)
    lines = []
    for r in records:
        cells = [r["error"].get(str(nfe)) for nfe in budgets]
        name = r["solver"] if r["rival"] == "fastdiff" else f"torchdiffeq {r['solver']}"
        lines.append([name, *("" if cell is None else number(cell) for cell in cells)])
    return table(["NFE", *map(str, budgets)], lines)
