# SPDX-License-Identifier: Apache-2.0
"""The tables of `fastdiff bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .gradients import BARE
from .loops import CAPTURED, EAGER, LOOP, NETWORK, QUEUED, REPLAY, STAGE, WAITED
from .records import Record
from .text import microseconds, number, shape_text, size, table

ALONE = {EAGER: NETWORK, STAGE: CAPTURED, LOOP: CAPTURED, REPLAY: CAPTURED}
Column = tuple[str, Callable[[Record], str]]


def spread(line: Record) -> str:
    """The median, and the 20th and 80th percentile."""
    low, high = microseconds(line["p20"]), microseconds(line["p80"])
    return f"{microseconds(line['median'])} ({low} to {high})"


def written(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """A table of records; columns in which nothing stands are left out."""
    cells = [[cell(r) for _, cell in columns] for r in records]
    kept = [k for k in range(len(columns)) if k < 2 or any(row[k] for row in cells)]
    return table([columns[k][0] for k in kept], [[row[k] for k in kept] for row in cells])


def told(key: str) -> Column:
    """A column of whole numbers that only some lines have."""
    return key, lambda r: str(r[key]) if key in r else ""


LAUNCHES = (told("launches"), told("registers"), told("spills"))
TIME: Column = ("us: median (p20 to p80)", spread)
HOST: Column = ("host us", lambda r: number(r["host"]) if "host" in r else "")


def stage(records: Sequence[Record], place: str) -> str:
    """Rows, sizes and rivals, with what they move and launch."""

    def row(r: Record) -> str:
        dtypes = r["network"] if r["dtype"] in ("float32", r["network"]) else ""
        text = f"M={r['outputs']} G={r['branches']} {dtypes or r['dtype'] + '/' + r['network']}"
        return text + ", noise" * r["noise"] + (f", {r['plan']}" if "plan" in r else "")

    columns: list[Column] = [
        ("row", row),
        ("registers of x", lambda r: shape_text(r["shape"]) + "*" * r["in_cache"]),
        ("rival", lambda r: r["rival"]),
        TIME,
        ("moved", lambda r: size(r["moved"])),
        ("GB/s", lambda r: number(r["bandwidth_median"])),
        ("share of copy_", lambda r: f"{r['share_median']:.2f}"),
        *(HOST, *LAUNCHES),
    ]
    note = "\n\n\\* its sets of registers fit in the last cache."
    return written(records, columns) + note * any(r["in_cache"] for r in records)


def loop(records: Sequence[Record], place: str) -> str:
    """Networks, plans and rivals, with what each takes beyond the network's own time."""

    def key(r: Record, rival: str, timing: str) -> tuple[Any, ...]:
        where = (r["network"], tuple(r["shape"]), r["dtype"], r["row"], r["backend"], r["steps"])
        return (*where, rival, timing)

    by = {key(r, r["rival"], r["timing"]): r for r in records}

    def beyond(r: Record) -> str:
        if r["network"] == "null":
            return microseconds(r["median"])
        own = by.get(key(r, ALONE.get(r["rival"], ""), WAITED))
        return microseconds(r["median"] - own["median"]) if own else ""

    def queued(r: Record) -> str:
        line = by.get(key(r, r["rival"], QUEUED))
        return microseconds(line["median"]) if line else ""

    columns: list[Column] = [
        ("network", lambda r: f"{r['network']} {shape_text(r['shape'])} {r['dtype']}"),
        ("plan", lambda r: f"{r['row']}, {r['steps']} steps"),
        ("backend", lambda r: r["backend"] if r["rival"].startswith("fastdiff") else ""),
        ("rival", lambda r: r["rival"]),
        ("us a step: median (p20 to p80)", spread),
        ("beyond the network", beyond),
        ("queued: median", queued),
        ("launches a loop", lambda r: str(r["launches"]) if "launches" in r else ""),
        *LAUNCHES[1:],
    ]
    return written([r for r in records if r["timing"] == WAITED], columns)


def noise(records: Sequence[Record], place: str) -> str:
    """Normals and bytes a second, beside torch's."""
    columns: list[Column] = [
        ("normals", lambda r: f"{shape_text(r['shape'])} {r['dtype']}"),
        ("rival", lambda r: r["rival"]),
        TIME,
        ("moved", lambda r: size(r["moved"])),
        ("GB/s", lambda r: number(r["bandwidth_median"])),
        ("10^9 normals/s", lambda r: number(_normals(r) / r["median"] / 1e3)),
        HOST,
    ]
    return written(records, columns)


def _normals(r: Record) -> int:
    """How many normals were drawn."""
    count = 1
    for length in r["shape"]:
        count *= length
    return count


def gradient(records: Sequence[Record], place: str) -> str:
    """The time of a run and its gradient, and the peak of its memory."""

    def key(r: Record, rival: str) -> tuple[Any, ...]:
        return r["network"], tuple(r["shape"]), r["dtype"], r["steps"], r["backend"], rival

    peaks = {key(r, r["rival"]): r["best"] for r in records if r["part"] == "memory"}
    times = [r for r in records if r["part"] == "time"]
    own = {key(r, BARE): r["median"] for r in times if r["rival"] == BARE}

    def over(r: Record) -> str:
        bare = own.get(key(r, BARE))
        return f"{r['median'] / bare:.2f}" if bare else ""

    def peak(r: Record) -> str:
        found = peaks.get(key(r, r["rival"]))
        return size(found) if found is not None else ""

    columns: list[Column] = [
        ("network", lambda r: f"{r['network']} {shape_text(r['shape'])} {r['dtype']}"),
        ("rival", lambda r: r["rival"]),
        ("backend", lambda r: r["backend"]),
        ("us a stage: median (p20 to p80)", spread),
        ("over the bare network", over),
        ("peak memory", peak),
    ]
    return written(times, columns)
