# SPDX-License-Identifier: Apache-2.0
"""The compiled parts of the library: loaded here, and refused where they do not fit this code.

An editable tree keeps an old core until it is rebuilt. So a core carries its ABI, a number raised
with its signatures, and the names of the columns and codes of a packed row, which are compared with
those of `plans/layout.py`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .plans import layout

# The compiled core's, in csrc/table.h.
ABI = 7

_GROUPS = ("HEAD", "TERM", "BRANCH", "EXTRA", "PRODUCT", "MEASURE", "INTO", "OF", "REDUCTIONS")


def unfit(core: Any) -> str | None:
    """What of a compiled module does not fit this code, or None."""
    if core.abi != ABI:
        return f"ABI {core.abi}, {ABI} is needed"
    wanted: dict[str, Any] = {name: getattr(layout, name) for name in _GROUPS}
    wanted |= {name: getattr(layout, name) for name in core.flags}
    own = {**core.columns, **core.flags}
    differing = sorted(name for name in {*wanted, *own} if own.get(name) != wanted.get(name))
    if core.most["products"] != layout.MAX_PRODUCTS:
        differing.append("MAX_PRODUCTS")
    return f"another {differing[0]} than fastdiff.plans.layout's" if differing else None


native: Any = None
missing: str | None = None
try:
    native = importlib.import_module("fastdiff._native")
except ImportError as error:
    missing = f"the compiled core cannot be imported ({error})"
else:
    _reason = unfit(native)
    if _reason is not None:
        raise ImportError(
            f"fastdiff: the compiled core fits this code; got {_reason}. "
            "Rebuild it: pip install -e ."
        )


@functools.cache
def cuda_core() -> tuple[Any, str | None]:
    """The CUDA part of the compiled core, loaded when first asked for; or None and the reason."""
    how = "with nvcc on PATH, FASTDIFF_CUDA=1 pip install -e . builds it"
    try:
        core = importlib.import_module("fastdiff._cuda")
    except ModuleNotFoundError:
        return None, f"the CUDA part is not built; {how}"
    except ImportError as error:
        return None, f"the CUDA part cannot be imported ({error}); {how}"
    reason = unfit(core)
    if reason is not None:
        return None, f"the CUDA part has {reason}; {how}"
    return core, None
