# SPDX-License-Identifier: Apache-2.0
"""iPNDM: weights of a uniform grid under DDIM's transfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...schedules import Array, Schedule
from ..entry import Info
from ..exponential import moments
from .multistep import EpsilonMultistep, fixed_options

# Adams-Bashforth weights on a uniform grid, newest first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class IPNDM(EpsilonMultistep):
    """iPNDM: Adams-Bashforth weights of a uniform grid under DDIM's exact transfer.

    Combining two or more outputs it converges at order 2, unless the grid is uniform in rho, for
    which the weights are made. order = 1 is DDIM. Ends at sigma = 0 are legal.

    Args:
        order, lower_order_final, warmup: The options of `DEIS`.

    Source: Zhang & Chen, arXiv:2204.13902, appendix H.2, after Liu et al., "PNDM",
    arXiv:2202.09778; code qsh-zh/deis a30709f and zju-pi/diff-sampler 68d5ce4.
    """

    order: int = 4

    def __post_init__(self) -> None:
        self.check_multistep()

    @property
    def name(self) -> str:
        return f"ipndm-{self.order}"

    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        total = moments(schedule, "epsilon", float(nodes[0]), t, 1)[0]
        return total * np.array(ADAMS_BASHFORTH[len(nodes) - 1])


SOLVERS = tuple(
    Info(
        f"ipndm-{order}",
        IPNDM,
        measured_order=min(order, 2),
        nfe_per_step=1,
        summary="uniform-grid Adams-Bashforth weights",
        source="Zhang & Chen, arXiv:2204.13902",
        fixed=fixed_options(order, lower_order_final=False, warmup="lower"),
        least_steps=order,
        # diffusers' has a schedule of its own; ComfyUI takes x' = x0 for a step to sigma = 0
        aliases={"IPNDMScheduler": {}, "ipndm": {"lower_order_final": "zero"}}
        if order == 4
        else {},
        same="ddim" if order == 1 else "",
        quirks="diffusers' IPNDMScheduler starts at alpha = 0, where its first step takes x0 = 0 "
        "whatever the network says"
        if order == 4
        else "",
    )
    for order in (1, 2, 3, 4)
)
