# SPDX-License-Identifier: Apache-2.0
"""Wording shared by error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(who: str, kind: str, got: object, names: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest that do.

    Args:
        who: The function or field the name was given to.
        kind: What the name names ("solver", "grid").
        got: What was given.
        names: Names that exist.

    Returns:
        The exception to raise.
    """
    known = sorted(names)
    near = difflib.get_close_matches(str(got), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return ValueError(f"{who}: unknown {kind} {got!r}. {hint}There are: {', '.join(known)}.")
