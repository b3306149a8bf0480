# SPDX-License-Identifier: Apache-2.0
"""Sampling loops to measure, with the networks that rivals run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastdiff.bench import problems
from fastdiff.bench.problems import Made, Parts

from .networks import ConvPolicy, dit, unet

TITLES = {**problems.TITLES, "conv": "1-D U-Net", "dit": "DiT-S/2", "unet": "SD U-Net"}
BORROWED = ("dit", "unet")  # diffusers' networks


@dataclass(frozen=True)
class Case(problems.Case):
    """A network and what it is given."""

    titles: ClassVar[Mapping[str, str]] = TITLES


def network_of(case: Case) -> Made:
    """The network of a case with random weights, and its condition, on the default device."""
    batch = case.shape[0]
    if case.kind == "conv":
        widths = (64, 128, 256) if case.small else (512, 1024, 2048)
        return ConvPolicy(case.shape[2], 132, widths), {"obs": torch.randn(batch, 132)}
    if case.kind == "dit":
        return dit(), {"cond": torch.arange(batch)}
    if case.kind == "unet":
        context = torch.randn(batch, 77, 32 if case.small else 768)
        return unet(case.small), {"cond": context.to(case.dtype)}
    return problems.network_of(case)


def parts_of(case: Case, device: torch.device) -> Parts:
    """The network with random weights, its condition, x at the first time, and the plan."""
    return problems.parts_of(case, device, network_of)
