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


def literal(plan, net, x, draw=None):
    """The formulas of fastdiff.plan, one stage at a time, in tensor operations.

    Args:
        plan, net, x: The plan, network(x, t), and where to start.
        draw: Function of a stage's number, to its noise.
    """
    e, at_e, history = None, False, []
    for i, s in enumerate(plan.stages):
        point = e if at_e else x
        outputs = [0.0, *history]  # a stage without an evaluation has earlier outputs alone
        if s.evaluate:
            t = torch.full((len(x),), s.model_time, dtype=torch.float64)
            h = s.p * point + s.q * net(s.c_in * point, t)
            if s.clip:
                h = h.clamp(*s.clip)
            if s.threshold:
                quantile, floor = s.threshold
                scale = torch.quantile(h.abs().flatten(1), quantile, dim=1).clamp(min=floor)
                scale = scale.reshape(-1, *[1] * (h.ndim - 1))
                h = h.clamp(-scale, scale) / scale
            outputs = history = [h, *history]
        xi = draw(i) if s.c or s.c_e else 0.0
        rows = []
        for a, b, weights, c in ((s.a_x, s.a_e, s.b, s.c), (s.d_x, s.d_e, s.g, s.c_e)):
            value = a * x + (b * e if b else 0.0) + c * xi
            rows.append(value + sum(w * o for w, o in zip(weights, outputs, strict=False)))
        at_e = s.writes_e
        x, e = rows[0], rows[1] if at_e else e
    return x
