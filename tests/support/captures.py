# SPDX-License-Identifier: Apache-2.0
"""What tests of captured loops share: a network, plans, and what a sampler's captures hold."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd

VP = fd.schedules.VPLinear()
MODES = pytest.mark.parametrize("mode", ["loop", "stage"])

# What PyTorch and CUDA say where a capture breaks, and how the rule that was broken is told.
MESSAGES = {
    "sync": ("called a synchronizing CUDA operation", "neither waits for the device nor copies"),
    "copy": (
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor "
        "is pinned.",
        "neither waits for the device nor copies",
    ),
    "legacy": (
        "CUDA error: operation would make the legacy stream depend on a capturing blocking stream",
        "launches on the current stream alone",
    ),
    "host": (
        "CUDA error: operation not permitted when stream is capturing",
        "nor allocates with the driver",
    ),
}


def network(x, t, y=None):
    shift = 0.0 if y is None else y.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(x + shift) * (1 + 1e-3 * t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))


def plan_of(solver="deis-3", steps=6, **options):
    return fd.plan(VP, solver, steps, prediction="v", **{"t_max": 0.9, **options})


def entries_of(sampler):
    """The captures that a sampler keeps."""
    captures = sampler._captured._captures.values()
    return [entry for each in captures for entry in each._entries.values()]


def poisoned(sampler):
    """Fills what captures write with NaN, the table and the inputs excepted."""
    for entry in entries_of(sampler):
        for registers in [getattr(entry.run, "run", entry.run).registers]:
            for tensor in (registers.x, registers.e, registers.history, registers.m):
                if tensor is not None:
                    tensor.fill_(float("nan"))
