# SPDX-License-Identifier: Apache-2.0
"""What the plots of all benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Colours that colour-blind readers tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def curve(found: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """The points of a curve, from left to right."""
    return sorted(found), [found[n] for n in sorted(found)]


def new_figure(size: tuple[float, float]) -> Any:
    """A figure of so many inches that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def save(figure: Any, path: Path) -> None:
    """Writes a PNG that depends on nothing but the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
