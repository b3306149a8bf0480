# SPDX-License-Identifier: Apache-2.0
"""Whole loops: the targets of a GPU, and what every rival takes beyond the network's own time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from problems.loops import Case
from rivals.compiled import AS_ONE, OPERATOR, TRACED

from fastdiff.bench.loops import CAPTURED, EAGER, LOOP, NETWORK, QUEUED, REPLAY, STAGE, WAITED
from fastdiff.bench.records import Record
from fastdiff.bench.text import microseconds, number, table

THEIRS, GRAPHED = "diffusers eager", "diffusers, network in a graph"
COMPILED = "network alone, compiled"
THEIRS_COMPILED, OURS_COMPILED = "diffusers, network compiled", "fastdiff eager, network compiled"
# The rival whose time is taken off another's, by the other's name.
ALONE = dict.fromkeys((EAGER, THEIRS), NETWORK)
ALONE |= dict.fromkeys((STAGE, LOOP, REPLAY, GRAPHED), CAPTURED)
ALONE |= dict.fromkeys((OURS_COMPILED, THEIRS_COMPILED), COMPILED)
ALONE |= dict.fromkeys((TRACED, OPERATOR), AS_ONE)
STAGE_MOST, LOOP_MOST, TIMES, SHARE, SLACK = 3.0, 65.0, 10.0, 0.05, 2.0  # us, us, -, -, us a stage


def page(records: Sequence[Record], place: str) -> str:
    """The targets, then a table of every cell and rival."""
    return "\n\n".join([targets(records), report(records, place)])


def report(records: Sequence[Record], place: str) -> str:
    """A table of every cell and rival, with medians and what lies beyond the network's own time."""
    over = [beyond(records, which) for which in ("best", "median")]
    by = {_key(r): r for r in records}

    def extra(key: tuple[Any, ...]) -> str:
        return " / ".join(microseconds(found[key]) for found in over) if key in over[0] else ""

    rows = []
    for r in records:
        if r["timing"] != WAITED:
            continue
        size = f", {r['parameters'] / 1e6:.3g} M" if r["parameters"] else ""
        row = [f"{case_of(r)}{size}", r["rival"]]
        row += [
            f"{microseconds(r['median'])} ({microseconds(r['p20'])} to {microseconds(r['p80'])})",
            extra(_key(r)),
        ]
        if place == "cuda":
            key = (*_key(r)[:2], QUEUED, r["rival"])
            row += [microseconds(by[key]["median"]) if key in by else "", extra(key)]
        rows.append(row)
    own = "beyond the network: best / median"
    head = ["network, parameters", "rival", "us a step: median (p20 to p80)", own]
    return table(head + ["queued: median", own] * (place == "cuda"), rows)


def beyond(records: Sequence[Record], which: str) -> dict[tuple[Any, ...], float]:
    """What each rival takes beyond the network's own time, in us a step.

    Args:
        records: Some lines.
        which: "best" or "median", of both times.

    Returns:
        Times by key; none where the network's own was not measured, all of it where the network
        costs nothing.
    """
    by = {_key(r): r[which] for r in records}
    found = {}
    for r in records:
        own = by.get((*_key(r)[:-1], ALONE.get(r["rival"])))
        if r["network"] == "null":
            own = 0.0
        if own is not None:
            found[_key(r)] = r[which] - own
    return found


def targets(records: Sequence[Record]) -> str:
    """A table of the targets: each beside what a GPU measured, and whether it is met."""
    by = {
        (r["network"], tuple(r["shape"]), r["rival"], r["timing"]): r
        for r in records
        if r["device"] == "cuda" and not r["compiled"]
    }
    n, rows = number, []

    def us(kind: str, shape: tuple[int, ...], rival: str, timing: str) -> float | None:
        """The median of a whole loop."""
        line = by.get((kind, shape, rival, timing))
        return None if line is None else line["median"] * line["steps"]

    def add(what: str, bound: str, value: str, good: bool | None) -> None:
        verdict = "not measured" if good is None else "met" if good else "not met"
        rows.append([what, bound, value, verdict])

    null, mlp = ("null", (1, 4, 64, 64)), ("mlp", (1, 16))
    whole = us(*null, REPLAY, QUEUED)
    stage = None if whole is None else whole / 20
    bound = f"at most {STAGE_MOST:g} us"
    what = "null network [1,4,64,64]: a stage of the replay alone, queued"
    add(what, bound, "" if stage is None else f"{n(stage)} us", stage and stage <= STAGE_MOST)
    for timing in (WAITED, QUEUED):
        loop = us(*null, LOOP, timing)
        what = f"null network [1,4,64,64]: a call of 20 stages, {timing}"
        good = None if loop is None else loop <= LOOP_MOST
        add(what, f"at most {LOOP_MOST:g} us", "" if loop is None else f"{n(loop)} us", good)
    for timing in (WAITED, QUEUED):
        loop, rival = us(*mlp, LOOP, timing), us(*mlp, THEIRS, timing)
        ratio = rival / loop if loop and rival else None
        what = f"MLP [1,16], 10 stages: diffusers eager over ours, {timing}"
        good = None if ratio is None else ratio >= TIMES
        add(what, f"at least {TIMES:g}", "" if ratio is None else n(ratio), good)
    for timing in (WAITED, QUEUED):
        loop, own = us(*mlp, LOOP, timing), us(*mlp, CAPTURED, timing)
        what = f"MLP [1,16], 10 stages: ours beyond the captured network, {timing}"
        bound, value, good = f"at most {SHARE:.0%} or {SLACK:g} us a stage", "", None
        if loop and own:
            most = max(SHARE * own, 10 * SLACK)
            bound += f": {n(most)} us"
            value, good = f"{n(loop - own)} us", loop - own <= most
        add(what, bound, value, good)
    return table(["target, on an H200", "bound", "measured", ""], rows)


def case_of(line: Record) -> Case:
    dtype = getattr(torch, line["dtype"])
    return Case(line["network"], tuple(line["shape"]), line["steps"], dtype, line["small"])


def _key(line: Record) -> tuple[Any, ...]:
    return case_of(line), line["compiled"], line["timing"], line["rival"]
