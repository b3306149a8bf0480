# SPDX-License-Identifier: Apache-2.0
"""Gradients that tests of them share: plans, functionals, and a flow whose gradient is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff import backends

from .nets import Net

VP = fd.schedules.VPLinear()
F64 = torch.float64
BACKENDS = [name for name, state in backends.status().items() if state == "available"]
FAST = [name for name in BACKENDS if name != "triton"]
EACH = pytest.mark.parametrize("backend", FAST)


def net_of(**options):
    """A float64 network with a parameter that its output does not depend on."""
    torch.manual_seed(0)
    return Net(idle=True, **options).double()


def plan_of(solver="dpmpp-2m", steps=6, **options):
    return fd.plan(VP, solver, steps, prediction="v", **{"t_max": 0.9, **options})


def gradients(net, plan, gradient, *, batch=3, n=5, dtype=F64, cond=True, **options):
    """The sample, then gradients of a fixed functional: x, y, parameters that have one."""
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(batch, n, generator=generator, dtype=F64) for _ in range(2))
    y = torch.randn(batch, generator=generator, dtype=F64)
    x, y = (v.to(dtype).requires_grad_() for v in (x, y))
    if isinstance(net, nn.Module):
        net.zero_grad()
    out = fd.sample(
        net, x, plan, cond={"y": y} if cond else None, gradient=gradient, seed=5, **options
    )
    (out * weights.to(dtype)).sum().backward()
    found = [out.detach(), x.grad, y.grad]
    if isinstance(net, nn.Module):
        found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [v for v in found if v is not None]


def apart(a, b):
    """The largest relative difference between two lists of tensors."""
    assert len(a) == len(b)
    return max(float((p - q).norm() / q.norm()) for p, q in zip(a, b, strict=True))


class Mixture(nn.Module):
    """epsilon of a Gaussian mixture whose means are parameters and stretch with z."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mu = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=F64))

    def forward(self, x, t, z):
        alpha, sigma = (torch.as_tensor(f(t.numpy()))[:, None] for f in (VP.alpha, VP.sigma))
        mu = self.mu * (1 + 0.3 * z)[:, None, None]
        variance = alpha**2 * 0.1 + sigma**2
        d = x[:, None] - alpha[..., None] * mu
        w = torch.softmax(-d.square().sum(-1) / (2 * variance), -1)
        return sigma * (w[..., None] * d).sum(1) / variance


ENDS = {"t_max": 0.95, "t_min": 0.02}


def flow_gradients(plan, gradient, network=None):
    """a_x, a_z, a_theta of a fixed functional of 16 samples."""
    network = network or Mixture()
    generator = torch.Generator().manual_seed(3)
    x, weights = (torch.randn(16, 2, generator=generator, dtype=F64) for _ in range(2))
    x.requires_grad_()
    z = torch.zeros(16, dtype=F64, requires_grad=True)
    out = fd.sample(network, x, plan, cond={"z": z}, gradient=gradient, seed=3)
    return torch.autograd.grad((out * weights).sum(), (x, z, network.mu))


def fine_plan():
    """A plan fine enough to be the exact flow."""
    return fd.plan(VP, "dpmpp-3m", 600, grid="logsnr", warmup="runge-kutta", **ENDS)


def orders(errors):
    return [np.log2(a / b) for a, b in itertools.pairwise(errors)]
