# SPDX-License-Identifier: Apache-2.0
"""Numbers, sizes and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .machine import GIB, KIB, MIB


def number(value: float) -> str:
    """Three significant digits, without an exponent from 0.001 to 99999."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 2 - int(np.floor(np.log10(abs(value)))) if value else 0
        return f"{value:.{max(digits, 0)}f}"
    return f"{value:.1e}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is aligned as plain text as well; the first column is left-aligned."""
    cells = [list(head), *map(list, rows)]
    widths = [max(3, *(len(row[k]) for row in cells)) for k in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def microseconds(value: float) -> str:
    return number(value) if abs(value) < 1e3 else f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if value >= unit:
            return f"{number(value / unit)} {name}"
    return f"{value:.0f} B"


def shape_text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
