# SPDX-License-Identifier: Apache-2.0
"""The gate of both benchmarks of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from problems.flows import fine_plan, gradients, mixture, truth
from reports.gradients import ADJOINT, DISCRETE, DOPRI, MIDPOINT, RESOLVED, SEGMENTS
from rivals import torchdiffeq

import fastdiff as fd
from fastdiff.bench.flows import vp_plan
from fastdiff.bench.gate import agree
from fastdiff.bench.machine import installed


def gate() -> None:
    """Checks every way to a gradient that is timed, on a problem whose gradient is known.

    Raises:
        GateError: One does not.
    """
    flow = mixture(4)
    plan = vp_plan(flow, "dpmpp-2m", 12)
    backprop = gradients(flow, plan, "backprop")
    for name, gradient in ((DISCRETE, "discrete"), (SEGMENTS.format(4), fd.Discrete(checkpoint=4))):
        found = gradients(flow, plan, gradient)
        for leaf, wanted in backprop.items():
            agree(f"{name}, of {leaf}", found[leaf], wanted, 1e-10)
    exact = truth(flow, 100)
    fine = fine_plan(flow, 100)
    # They are of second and of fifth order, and far from where rounding would show.
    theirs: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        ADJOINT: lambda: gradients(flow, fine, fd.AdjointDEIS(2)),
        RESOLVED: lambda: gradients(flow, fine, fd.AdjointDEIS(2, states="resolve")),
    }
    if installed("torchdiffeq"):
        options = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}
        theirs[DOPRI] = lambda: flow.named(torchdiffeq.gradients(flow, **options)[0])
        theirs[MIDPOINT] = lambda: flow.named(
            torchdiffeq.gradients(flow, **torchdiffeq.stepped(flow, "midpoint", 100))[0]
        )
    for name, run in theirs.items():
        for leaf, got in run().items():
            agree(f"{name}, of {leaf}", got, exact[leaf], 1e-2)
