# SPDX-License-Identifier: Apache-2.0
"""Sampling loops to measure: a network, what it is given, and a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastdiff as fd

from .networks import ConvPolicy, Mlp, constant, dit, unet
from .plans import plan_on_training_times

Loop = Callable[[], torch.Tensor | None]
Cond = dict[str, torch.Tensor]

TITLES = {"null": "null", "mlp": "MLP", "conv": "1-D U-Net", "dit": "DiT-S/2", "unet": "SD U-Net"}
BORROWED = ("dit", "unet")  # diffusers' networks


@dataclass(frozen=True)
class Case:
    """A network and what it is given.

    Attributes:
        kind: A key of `TITLES`.
        shape: Of x.
        steps: Of the loop, one stage each.
        dtype: Of the network, and of x.
        small: Narrower than the model it is named for.
    """

    kind: str
    shape: tuple[int, ...]
    steps: int
    dtype: torch.dtype = torch.float32
    small: bool = False

    def __str__(self) -> str:
        shape = "[" + ",".join(map(str, self.shape)) + "]"
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{'small ' * self.small}{TITLES[self.kind]} {shape}{dtype}, {self.steps} steps"


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


def parts_of(case: Case, device: torch.device) -> Parts:
    """The network with random weights, its condition, x at the first time, and the plan."""
    torch.manual_seed(0)
    batch, cond = case.shape[0], {}
    with torch.device(device):
        if case.kind == "null":
            network: Any = constant(torch.randn(case.shape))
        elif case.kind == "mlp":
            network, cond = Mlp(case.shape[1], 32), {"obs": torch.randn(batch, 32)}
        elif case.kind == "conv":
            widths = (64, 128, 256) if case.small else (512, 1024, 2048)
            network = ConvPolicy(case.shape[2], 132, widths)
            cond = {"obs": torch.randn(batch, 132)}
        elif case.kind == "dit":
            network, cond = dit(), {"cond": torch.arange(batch)}
        else:
            network = unet(case.small)
            cond = {"cond": torch.randn(batch, 77, 32 if case.small else 768).to(case.dtype)}
        start = torch.randn(case.shape).to(case.dtype)
    if isinstance(network, nn.Module):
        network = network.to(device, case.dtype).eval().requires_grad_(False)
    plan = plan_on_training_times("dpmpp-2m", case.steps, lower_order_final=False)
    return Parts(case, network, cond, start, plan)
