# SPDX-License-Identifier: Apache-2.0
"""Checks that a plan's fields share: numbers, indices and names, refused with short sentences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

MOST_SHOWN = 60  # characters of a value that an error repeats
LARGEST_INDEX = 1 << 24  # integers below it are exact in a table packed as float32


def shown(value: Any, depth: int = 0) -> str:
    """A value as an error shows it: its repr, cut short where it is long or deep."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes) and len(value) > MOST_SHOWN:
        return f"{value[: MOST_SHOWN - 20]!r}... ({len(value)} characters)"
    if isinstance(value, dict | set | frozenset):
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, list | tuple):
        if len(value) > 8 or depth > 2:
            return f"a {type(value).__name__} of {len(value)} entries"
        inner = ", ".join(shown(each, depth + 1) for each in value)
        inner += "," * (len(value) == 1 and isinstance(value, tuple))
        text = f"[{inner}]" if isinstance(value, list) else f"({inner})"
    else:
        text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)


def number(who: str, name: str, value: Any) -> float:
    """A float64; NaN and infinities pass.

    Raises:
        TypeError: The value is no number.
        ValueError: The value is an integer beyond float64.
    """
    if type(value) is not float and not is_number(value):
        raise TypeError(f"{who}: {name} is a float; got {shown(value)}.")
    try:
        # one NaN and one zero, so that equal rows pack to equal bytes
        return math.nan if value != value else float(value) + 0.0
    except OverflowError:
        raise ValueError(
            f"{who}: every number fits float64; got {name} = {shown(value)}."
        ) from None


def finite(who: str, name: str, value: Any, where: str = "") -> float:
    """A finite float64; `where` ends the error.

    Raises:
        TypeError: The value is no number.
        ValueError: The value is NaN, infinite, or an integer beyond float64.
    """
    found = number(who, name, value)
    if not math.isfinite(found):
        raise ValueError(f"{who}: every coefficient is finite; got {name} = {found}{where}.")
    return found


def floats(who: str, name: str, values: Any) -> tuple[float, ...]:
    """A sequence of float64; NaN and infinities pass."""
    plain = isinstance(values, list | tuple) and all(type(value) is float for value in values)
    known = plain or (isinstance(values, list | tuple | np.ndarray) and all(map(is_number, values)))
    if not known:
        raise TypeError(f"{who}: {name} is a sequence of floats; got {shown(values)}.")
    try:
        found = tuple(float(value) + 0.0 for value in values)
    except OverflowError:
        found = tuple(number(who, f"{name}[{i}]", value) for i, value in enumerate(values))
    return found if not any(map(math.isnan, found)) else tuple(map(_one_nan, found))


def _one_nan(value: float) -> float:
    return math.nan if math.isnan(value) else value


def index(who: str, name: str, value: Any, least: int = 0, most: int = LARGEST_INDEX - 1) -> int:
    """An integer from `least` to `most`; a float that is one passes.

    Raises:
        TypeError: The value is no number.
        ValueError: The value is none of those integers.
    """
    if not is_number(value):
        raise TypeError(f"{who}: {name} is an integer; got {shown(value)}.")
    if not least <= value <= most or value != int(value):
        raise ValueError(f"{who}: {name} is an integer from {least} to {most}; got {shown(value)}.")
    return int(value)


def label(who: str, name: str, value: Any) -> str:
    """A short text that a terminal can print.

    Raises:
        TypeError: The value is no text.
        ValueError: The text has control characters or lone surrogates, or is long.
    """
    if not isinstance(value, str):
        raise TypeError(f"{who}: {name} is a string; got {shown(value)}.")
    if not value.isprintable():
        raise ValueError(
            f"{who}: {name} is printable text, without line breaks, escapes and lone surrogates; "
            f"got {ascii(value)[:MOST_SHOWN]}."
        )
    if len(value) > 1000:
        raise ValueError(f"{who}: {name} has at most 1000 characters; got {len(value)}.")
    return value
