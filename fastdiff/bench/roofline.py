# SPDX-License-Identifier: Apache-2.0
"""The roofline of a memory-bound kernel: bytes a second against the bytes that a launch moves.

Two lines bound what can be reached: the bandwidth of a copy, and what a launch takes however little
it does. A stage does so little arithmetic that no third one matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

from .plots import COLOURS, new_figure
from .records import Record


def points(records: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """For every rival (bytes moved, GB/s by the median), from few bytes to many."""
    found: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        if r.get("moved"):
            pair = (float(r["moved"]), float(r["bandwidth_median"]))
            found.setdefault(r["rival"], []).append(pair)
    return {name: sorted(pairs) for name, pairs in found.items()}


def roof(records: Sequence[Record]) -> tuple[float, float]:
    """GB/s of the copy that shares are of, and the least us of a launch.

    Where there are no shares, the fastest rival stands for the copy.

    Raises:
        ValueError: Nothing was measured.
    """
    moving = [r for r in records if r.get("moved")]
    if not moving:
        raise ValueError("--plot: a roofline needs a time that was measured; got none.")
    held = [r["bandwidth_median"] / r["share_median"] for r in moving if r.get("share_median")]
    peak = max(held or [r["bandwidth_median"] for r in moving])
    return float(peak), min(float(r["median"]) for r in moving)


def draw(records: Sequence[Record], title: str, file: BinaryIO) -> None:
    """Writes the picture as a PNG; raises what `roof` does."""
    bandwidth, least = roof(records)
    found = points(records)
    figure: Any = new_figure((8.0, 5.0))
    panel = figure.subplots()
    sizes = [moved for pairs in found.values() for moved, _ in pairs]
    few, many = min(sizes) / 2, max(sizes) * 2
    knee = bandwidth * 1e3 * least  # bytes: GB/s times us
    corners = sorted({few, min(max(knee, few), many), many})
    heights = [min(bandwidth, moved / least / 1e3) for moved in corners]
    panel.plot(corners, heights, "--", color="#555555", label="roof: the copy, and the least time")
    for k, (name, pairs) in enumerate(found.items()):
        moved, reached = zip(*pairs, strict=True)
        colour = COLOURS[k % len(COLOURS)]
        panel.plot(moved, reached, "o", color=colour, label=name, markersize=5)
    panel.set(xscale="log", yscale="log", title=title)
    panel.set(xlabel="bytes that a launch moves", ylabel="GB/s (median)")
    panel.grid(which="major", alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
