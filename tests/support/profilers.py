# SPDX-License-Identifier: Apache-2.0
"""PyTorch's profiler without its warning."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def profiled(**options: Any) -> torch.profiler.profile:
    """A profiler that keeps its events: PyTorch warns, once a process, where it clears them."""
    if "acc_events" in inspect.signature(torch.profiler.profile).parameters:
        options["acc_events"] = True
    return torch.profiler.profile(**options)
