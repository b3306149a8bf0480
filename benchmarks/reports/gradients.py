# SPDX-License-Identifier: Apache-2.0
"""Gradients: the targets, time over the bare network's, and memory by steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fastdiff.bench import gradients
from fastdiff.bench.gradients import BACKPROP, BARE, DISCRETE
from fastdiff.bench.records import Record
from fastdiff.bench.text import microseconds, number, table
from fastdiff.bench.text import size as size_text

SEGMENTS = "discrete, a checkpoint every {} steps"
ADJOINT, RESOLVED = "AdjointDEIS(2)", 'AdjointDEIS(2, states="resolve")'
ADJOINT_CAPTURED = "AdjointDEIS(2), captured"
CHECKPOINTED = "backprop, checkpointed by step"
MIDPOINT, DOPRI = "torchdiffeq midpoint, as many calls", "torchdiffeq dopri5, tol 1e-3"
RATIO = 1.10  # at most, of the time of forward and gradient over the bare network's
KEPT = 0.01  # at most so much of the activations of a step stays beside its state


@dataclass(frozen=True)
class Case(gradients.Case):
    """A network, a batch, a number of steps, and whether the parameters want a gradient too."""

    titles: ClassVar[Mapping[str, str]] = {**gradients.TITLES, "dit": "DiT-S/2-sized"}


def page(records: Sequence[Record], place: str) -> str:
    """The targets of time and memory, then a table of each that was measured."""
    records = [r for r in records if r["part"] in ("time", "memory")]
    blocks, parts = [targets(records)], {r["part"] for r in records}
    blocks += [report_time(records)] * ("time" in parts)
    blocks += [report_memory(records)] * ("memory" in parts)
    return "\n\n".join(blocks)


def case_of(line: Record) -> Case:
    return Case(line["network"], line["shape"][0], line["theta"], line["steps"])


def ratios(records: Sequence[Record], which: str) -> dict[tuple[Case, str], float]:
    """The time of each rival over that of the bare network."""
    own = {case_of(r): r[which] for r in records if r["rival"] == BARE and r["part"] == "time"}
    return {
        (case_of(r), r["rival"]): r[which] / own[case_of(r)]
        for r in records
        if r["part"] == "time" and case_of(r) in own
    }


def report_time(records: Sequence[Record]) -> str:
    best, median = ratios(records, "best"), ratios(records, "median")
    n, rows = microseconds, []
    for r in records:
        if r["part"] == "time":
            key = (case_of(r), r["rival"])
            spread = f"{n(r['median'])} ({n(r['p20'])} to {n(r['p80'])})"
            rows.append([str(key[0]), r["rival"], spread, f"{best[key]:.3f} / {median[key]:.3f}"])
    own = "over the bare network: best / median"
    return table(["network", "rival", "us a stage: median (p20 to p80)", own], rows)


def peaks(records: Sequence[Record]) -> dict[tuple[Case, str], dict[int, int]]:
    """Peak bytes by steps. Cases are given 0 steps, and rivals lose their segment's length."""
    found: dict[tuple[Case, str], dict[int, int]] = {}
    for r in records:
        if r["part"] == "memory":
            rival = r["rival"]
            if rival.startswith(SEGMENTS.partition("{")[0]):
                rival = SEGMENTS.format("sqrt(N)")
            by = found.setdefault((replace(case_of(r), steps=0), rival), {})
            by[r["steps"]] = r["best"]
    return found


def growth_of(by: Mapping[int, int]) -> float:
    """The bytes that a step adds."""
    few, many = min(by), max(by)
    return (by[many] - by[few]) / max(many - few, 1)


def state_of(records: Sequence[Record], case: Case) -> int:
    """The bytes of x, as they are allocated."""
    for r in records:
        if r["part"] == "memory" and replace(case_of(r), steps=0) == case:
            size = 4 * math.prod(r["shape"])
            return -(-size // 512) * 512 if r["device"] == "cuda" else size
    raise LookupError(case)


def report_memory(records: Sequence[Record]) -> str:
    found = peaks(records)
    counts = sorted({steps for by in found.values() for steps in by})
    rows = []
    for (case, rival), by in found.items():
        cells = [size_text(by[steps]) if steps in by else "" for steps in counts]
        growth = growth_of(by) / state_of(records, case)
        rows.append(
            [str(case), rival, *cells, f"{growth:.2f}" if abs(growth) < 100 else f"{growth:.0f}"]
        )
    head = ["network", "rival", *(f"{steps} steps" for steps in counts), "states a step"]
    return table(head, rows)


def targets(records: Sequence[Record]) -> str:
    """A table of the targets: each beside what was measured, and whether it is met."""
    rows = []

    def add(what: str, bound: str, value: str, good: bool | None) -> None:
        verdict = "not measured" if good is None else "met" if good else "not met"
        rows.append([what, bound, value, verdict])

    best, median = ratios(records, "best"), ratios(records, "median")
    cuda = any(r["device"] == "cuda" for r in records)
    for case in (Case("digits", 16), Case("digits", 16, True)):
        key = (case, DISCRETE)
        what, bound = f"discrete, {case}, on the CPU", f"at most {RATIO:.2f} of the bare network"
        if key in median and not cuda:
            shown = f"{best[key]:.3f} / {median[key]:.3f}"
            add(what, bound, shown, median[key] <= RATIO)
        else:
            add(what, bound, "", None)
    for case in dict.fromkeys(key[0] for key in median):
        ours, rival = median.get((case, DISCRETE)), median.get((case, CHECKPOINTED))
        if ours and rival:
            bound = "at most checkpointed backprop"
            add(f"discrete, {case}", bound, f"{ours / rival:.3f} of it", ours <= rival)
    found = peaks(records)
    for (case, rival), by in found.items():
        whole = found.get((case, BACKPROP), {})
        if rival == DISCRETE and len(by) > 1 and len(whole) > 1:
            state = state_of(records, case)
            kept = (growth_of(by) - state) / (growth_of(whole) - state)
            what = f"memory of discrete, {case}: growth beyond the states, over backprop's"
            add(what, f"at most {KEPT:g}", number(max(kept, 0.0)), kept <= KEPT)
    return table(["target", "bound", "measured", ""], rows)
