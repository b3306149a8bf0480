# SPDX-License-Identifier: Apache-2.0
"""How the tests of broken rules look at an outcome: a sentence, the right result, or neither."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

REFUSALS = (ValueError, TypeError, RuntimeError)  # NotImplementedError is a RuntimeError


def refused(match: str):
    """A context in which a call is refused in words that match, in any case."""
    return pytest.raises(REFUSALS, match=f"(?i){match}")


def right_or_refused(call, wanted: torch.Tensor, match: str) -> None:
    """Whether `call` gives what is wanted, or is refused in words that match."""
    try:
        got = call()
    except REFUSALS as error:
        message = str(error)
    else:
        torch.testing.assert_close(got, wanted)
        return
    assert re.search(match, message, re.IGNORECASE), message


def alone(code: str, timeout: float = 60.0) -> str:
    """What a program prints in a process of its own, which must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout
