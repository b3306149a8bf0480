# SPDX-License-Identifier: Apache-2.0
"""Sampling loops to measure: a network, what it is given, and a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

import fastdiff as fd

from .networks import Mlp, constant

Loop = Callable[[], torch.Tensor | None]
Cond = dict[str, torch.Tensor]

TITLES = {"null": "null", "mlp": "MLP"}


def training_times(steps: int) -> list[float]:
    """The times that diffusers' schedulers step through by default, in `VPDiscrete`'s units."""
    index = np.linspace(0, 999, steps + 1).round()[::-1]
    return [*((index[:-1] + 1.0) / 1000.0).tolist(), 1e-3]


def plan_on_training_times(solver: str, steps: int, **options: Any) -> fd.Plan:
    """A plan over those times."""
    schedule = fd.schedules.VPDiscrete.scaled_linear()
    return fd.plan(schedule, solver, steps, grid=training_times(steps), **options)


@dataclass(frozen=True)
class Case:
    """A network and what it is given.

    Attributes:
        titles: The kinds that there are, and what each is called.
        kind: A key of `titles`.
        shape: Of x.
        steps: Of the loop, one stage each.
        dtype: Of the network, and of x.
        small: Narrower than the model it is named for.
    """

    titles: ClassVar[Mapping[str, str]] = TITLES

    kind: str
    shape: tuple[int, ...]
    steps: int
    dtype: torch.dtype = torch.float32
    small: bool = False

    def __str__(self) -> str:
        shape = "[" + ",".join(map(str, self.shape)) + "]"
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{'small ' * self.small}{self.titles[self.kind]} {shape}{dtype}, {self.steps} steps"


@dataclass(frozen=True)
class Parts:
    """Everything that a loop of a case starts from."""

    case: Case
    network: Callable[..., torch.Tensor]
    cond: Cond
    start: torch.Tensor
    plan: fd.Plan

    @property
    def parameters(self) -> int:
        tensors = self.network.parameters() if isinstance(self.network, nn.Module) else ()
        return sum(p.numel() for p in tensors)

    def time(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A time of the loop as the network is given it, [B]."""
        told = self.plan.stages[0].model_time
        return torch.full((len(self.start),), told, device=self.start.device).to(dtype)


Made = tuple[Callable[..., torch.Tensor], Cond]


def network_of(case: Case) -> Made:
    """The network of a case with random weights, and its condition, on the default device."""
    if case.kind == "null":
        return constant(torch.randn(case.shape).to(case.dtype)), {}
    return Mlp(case.shape[1], 32), {"obs": torch.randn(case.shape[0], 32).to(case.dtype)}


def parts_of(
    case: Case,
    device: torch.device,
    make: Callable[[Any], Made] = network_of,
    plan: fd.Plan | None = None,
) -> Parts:
    """The network with random weights, its condition, x at the first time, and the plan.

    Args:
        case: What is asked for.
        device: Where all of it lies.
        make: Makes the network and its condition.
        plan: None for DPM-Solver++(2M) in the steps of the case.
    """
    torch.manual_seed(0)
    with torch.device(device):
        network, cond = make(case)
        start = torch.randn(case.shape).to(case.dtype)
    if isinstance(network, nn.Module):
        network = network.to(device, case.dtype).eval().requires_grad_(False)
    if plan is None:
        plan = plan_on_training_times("dpmpp-2m", case.steps, lower_order_final=False)
    return Parts(case, network, cond, start, plan)


def guided(parts: Parts, scale: float = 3.0) -> tuple[Parts, fd.CFG]:
    """The same under classifier-free guidance: two branches in one call of the network."""
    network, cond, start = parts.network, parts.cond, parts.start
    if parts.case.kind == "null":
        cond = {"cond": torch.ones(len(start), device=start.device)}
        out = network(start, parts.time())
        network = constant(torch.cat([0.5 * out, out]))
    uncond = {name: torch.zeros_like(value) for name, value in cond.items()}
    return replace(parts, network=network, cond=cond), fd.CFG(scale, uncond=uncond)
