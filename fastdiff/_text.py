# SPDX-License-Identifier: Apache-2.0
"""Wording shared by error messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

_LONGEST_INTEGER = 1024  # bits; float64 holds no larger one


def shown(value: object) -> str:
    """repr(value) for a message; an integer beyond float64 is described instead of printed."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
        return f"an integer of about {round(value.bit_length() * math.log10(2.0))} digits"
    try:
        return repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} with an integer too long to print"


def unknown(
    who: str, kind: str, got: object, names: Iterable[str], listing: str = ""
) -> ValueError:
    """The error for a name that does not exist, with the nearest that do.

    Args:
        who: The function or field the name was given to.
        kind: What the name names ("solver", "grid").
        got: What was given.
        names: Names that exist.
        listing: A sentence that says where they are listed, if they are too many for a message.

    Returns:
        The exception to raise.
    """
    known = sorted(names)
    word = got if isinstance(got, str) else shown(got)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    plain = word.lower().replace("_", "-")
    near = [plain] if plain in known else near
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    listing = listing or f"There are: {', '.join(known)}."
    return ValueError(f"{who}: unknown {kind} {shown(got)}. {hint}{listing}")
