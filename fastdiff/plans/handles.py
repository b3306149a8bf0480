# SPDX-License-Identifier: Apache-2.0
"""Names of living objects, for code that can keep a string and no object.

A function that torch.compile traces may keep a string as a constant and look the object up when it
is compiled. An entry lives as long as its object; handles are never given twice in a process.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

_living: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_serial = itertools.count()


def register(thing: Any) -> str:
    """A new handle for an object that can be referred to weakly."""
    handle = f"{type(thing).__name__} {next(_serial)}"
    _living[handle] = thing
    return handle


def living(handle: str) -> Any:
    """The object that a handle was given to.

    Raises:
        KeyError: The object is gone.
    """
    return _living[handle]
