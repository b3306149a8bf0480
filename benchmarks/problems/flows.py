# SPDX-License-Identifier: Apache-2.0
"""Probability flows from fixed starts, with what is differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import fastdiff as fd
from fastdiff.bench.flows import VP, Flow, vp_plan

from .velocity import trained

# Three components in eight dimensions, variances between 0.04 and 0.25.
WEIGHTS = (0.5, 0.3, 0.2)
MEANS = (
    (1.0, -0.5, 0.3, 0.8, -1.2, 0.4, 0.9, -0.7),
    (-0.9, 0.6, -1.1, 0.2, 0.7, -0.3, -0.4, 1.3),
    (0.2, 1.4, 0.5, -1.0, 0.1, -1.3, 0.6, 0.0),
)
VARIANCES = (
    (0.04, 0.09, 0.05, 0.16, 0.07, 0.10, 0.06, 0.12),
    (0.10, 0.05, 0.08, 0.06, 0.20, 0.04, 0.11, 0.09),
    (0.07, 0.12, 0.25, 0.05, 0.06, 0.08, 0.04, 0.15),
)

TITLES = {
    "mixture": "Gaussian mixture",
    "empirical": "Exact denoiser of the digits",
    "digits": "Digits network",
    "sde": "Gaussian mixture, reverse SDE",
    "flow": "Flow network",
    "flow-mixture": "Gaussian mixture's flow",
}


class Mixture(nn.Module):
    """epsilon of a Gaussian mixture whose means are parameters: mu_k (1 + z_1) + z_2 move_k.

    z is [B, 2]; at z = 0 it is `fastdiff.models.GaussianMixture`.
    """

    def __init__(self) -> None:
        super().__init__()
        wide = functools.partial(torch.tensor, dtype=torch.float64)
        self.means = nn.Parameter(wide(MEANS))
        self.log_weights, self.variances = (
            wide(WEIGHTS).log(),
            wide(VARIANCES),
        )
        self.moves = fd.noise.normal(self.means.shape, 0, 7, dtype=torch.float64)

    def forward(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        told = t.detach().double().numpy()
        alpha, sigma = (torch.as_tensor(f(told)).reshape(-1, 1, 1) for f in (VP.alpha, VP.sigma))
        means = self.means * (1 + z[:, :1, None]) + self.moves * z[:, 1:, None]
        variance = alpha**2 * self.variances + sigma**2  # [B, K, D]
        offset = x[:, None] - alpha * means
        exponents = (offset**2 / variance + variance.log()).sum(2)
        share = (self.log_weights - 0.5 * exponents).softmax(1)[..., None]
        return (sigma * share * offset / variance).sum(1)


def untrained(name: str) -> Flow:
    """A problem in a larger batch, whose network has nothing to train."""
    if name == "mixture":
        network = fd.models.GaussianMixture(WEIGHTS, MEANS, VARIANCES).network(VP)
        start = fd.noise.normal((64, 8), 0, 0, dtype=torch.float64)
        return Flow(TITLES[name], network, "epsilon", start, theta=False)
    if name == "flow":
        return flow_network()
    return empirical(16) if name == "empirical" else digits(10, theta=False)


def flow_network(batch: int = 256) -> Flow:
    """A velocity network in the plane, trained by flow matching: t runs from 1 to 0."""
    schedule, network = fd.schedules.FlowMatching(), trained().double()
    start = fd.noise.normal((batch, 2), 0, 0, dtype=torch.float64)
    return Flow(TITLES["flow"], network, "velocity", start, theta=False, schedule=schedule)


def flow_mixture(batch: int = 64) -> Flow:
    """The exact velocity of the Gaussian mixture: t runs from 1 to 0."""
    schedule = fd.schedules.FlowMatching()
    network = fd.models.GaussianMixture(WEIGHTS, MEANS, VARIANCES).network(schedule, "velocity")
    start = fd.noise.normal((batch, 8), 0, 0, dtype=torch.float64)
    return Flow(TITLES["flow-mixture"], network, "velocity", start, theta=False, schedule=schedule)


def mixture(batch: int = 64) -> Flow:
    start = fd.noise.normal((batch, 8), 0, 0, dtype=torch.float64)
    cond = {"z": torch.zeros(batch, 2, dtype=torch.float64)}
    return Flow(TITLES["mixture"], Mixture(), "epsilon", start, cond)


def empirical(batch: int = 8) -> Flow:
    images, _ = fd.models.digits_data("train")
    model = fd.models.EmpiricalDenoiser(images.double())
    start = fd.noise.normal((batch, *images.shape[1:]), 0, 0, dtype=torch.float64)
    return Flow(TITLES["empirical"], model.network(VP), "epsilon", start, theta=False)


def digits(batch: int = 4, theta: bool = True) -> Flow:
    network = fd.models.digits().double().requires_grad_(theta)
    start = fd.noise.normal((batch, *network.shape), 0, 0, dtype=torch.float64)
    cond = {"y": torch.arange(batch) % 10}
    return Flow(TITLES["digits"], network, network.prediction, start, cond, theta)


PROBLEMS: dict[str, Callable[[], Flow]] = {
    "mixture": mixture,
    "empirical": empirical,
    "digits": digits,
}

FLOWS: dict[str, Callable[[], Flow]] = {"flow": flow_network, "flow-mixture": flow_mixture}


def gradients(flow: Flow, plan: fd.Plan, gradient: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The library's gradients of the functional, with respect to x, z and the parameters."""
    x, cond, wanted = flow.leaves()
    out = fd.sample(flow.network, x, plan, cond=cond or None, gradient=gradient, **options)
    total = (out * flow.cotangent).sum()
    return flow.named(torch.autograd.grad(total, wanted, allow_unused=True))


def fine_plan(flow: Flow, steps: int) -> fd.Plan:
    return vp_plan(flow, "dpmpp-3m", steps, warmup="runge-kutta")


def truth(flow: Flow, steps: int) -> dict[str, torch.Tensor]:
    """The gradient of the exact flow: the exact gradient of a fine run."""
    return gradients(flow, fine_plan(flow, steps), fd.Discrete(checkpoint=25))


def apart(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors: for x and z the median over the samples, for theta one number."""
    errors = {}
    for name, wanted in exact.items():
        rows = (found[name] - wanted, wanted)
        if name != "theta":
            rows = tuple(r.flatten(1) for r in rows)
        difference, size = (r.norm(dim=-1) for r in rows)
        errors[name] = float((difference / size).median())
    return errors
