# SPDX-License-Identifier: Apache-2.0
"""Ranges: what a profiler shows of a run, its network calls and its stages."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_NOTHING = contextlib.nullcontext()


def profiling() -> bool:
    """Whether a profiler of PyTorch's is on in this process: `profile`, `emit_nvtx`, `emit_itt`."""
    return torch.autograd.profiler._is_profiler_enabled


def span(on: bool, *words: Any) -> contextlib.AbstractContextManager[Any]:
    """A range named "fastdiff: " and the words, where `on` says so."""
    if not on:
        return _NOTHING
    return torch.profiler.record_function("fastdiff: " + " ".join(map(str, words)))
