# SPDX-License-Identifier: Apache-2.0
"""The continuous adjoint: backward stages on nodes of its own, at states of the forward run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import keeping
from .flow import adjoint_of
from .options import AdjointDEIS
from .published import published
from .states import Flow, Recorded, Resolved, States
from .sweep import Sweep
from .trace import Input


def continuous(sweep: Sweep, gradient: AdjointDEIS, kept: Sequence[torch.Tensor]) -> None:
    """The adjoint on its own grid.

    Args:
        sweep: The pass.
        gradient: The adjoint.
        kept: States of the forward run: those of `keeping.States`, or its end alone.
    """
    trace = sweep.trace
    plan = trace.plan
    adjoint = adjoint_of(gradient, plan, trace.recent)
    flow = Flow(trace, adjoint.schedule, adjoint.own)
    states: States
    if gradient.states == "resolve":
        states = Resolved(flow, kept[0], gradient.order)  # x; an e may stand after it
    else:
        states = Recorded(adjoint.schedule, keeping.States(plan).times, kept)
    if gradient.published:
        published(sweep, flow, gradient.order, states)
        return
    times = flow.own.times
    sweep.run(
        flow.own.transpose(),
        [flow.told(t) for t in times[:-1]],
        lambda i: Input(flow.given(times[i], states.at(times[i]))),
        states.observe,
    )
