# SPDX-License-Identifier: Apache-2.0
"""What of the library can run on this machine."""

from __future__ import annotations

import pytest

import fastdiff as fd
from fastdiff import _core

native = _core.native
needs_core = pytest.mark.skipif(native is None, reason="the compiled core is not built")
INSTRUCTION_SETS = native.instruction_sets() if native is not None else []
BACKENDS = [name for name, state in fd.backends.status().items() if state == "available"]
FAST = [name for name in BACKENDS if name != "triton"]  # the interpreter is slow
