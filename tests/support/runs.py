# SPDX-License-Identifier: Apache-2.0
"""What tests of samplers share: a network, and a run of it."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd

from .core import BACKENDS

VP = fd.schedules.VPLinear()
EACH = pytest.mark.parametrize("backend", BACKENDS)


def network(x, t, **cond):
    """A smooth stand-in for a network, different for every sample and time."""
    shift = cond["y"].reshape(-1, *[1] * (x.ndim - 1)) if "y" in cond else 0.0
    return torch.tanh(x + shift) * (1 + t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))


def run(net=network, x=None, plan=None, **options):
    x = torch.randn(2, 4) if x is None else x
    return fd.sample(net, x, plan or fd.plan(VP, "deis-2", 3), **options)
