# SPDX-License-Identifier: Apache-2.0
"""The explicit forms of the AdjointDEIS paper, for comparison.

From the data end on, with the Jacobian at the cleaner end:

    s_s a(s) = s_t a(t) + w_1 V_t + w_2 (V_t - V_r)/(lambda_t - lambda_r),  V = s^2 (dN/dx)^T a

and the same for conditioning and parameters with V = s (dN/dz)^T a, each product credited to the
node that it was taken at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..plans import EVALUATE, WRITES_M, WRITES_X, Layout, PackedRow, Plan
from ..schedules import Array, Schedule
from ..solvers.exponential import phi
from .pools import Table
from .states import Flow, States
from .sweep import Sweep


@dataclass(frozen=True)
class _Weights:
    """Weights of the steps, from the data end on.

    Attributes:
        times: Of the nodes.
        scale: s at the nodes.
        w_1, g: Of V_t, and of the difference; one a step.
    """

    times: Array
    scale: Array
    w_1: Array
    g: Array


def published(sweep: Sweep, flow: Flow, order: int, states: States) -> None:
    """The pass of one of the paper's forms.

    Args:
        sweep: The pass.
        flow: The flow, with the nodes.
        order: 1 or 2.
        states: At the nodes.
    """
    trace, x = sweep.trace, sweep.x_bar
    assert x is not None
    stochastic = trace.plan.stochastic
    weights = _weights(flow.schedule, flow.own, order, stochastic)
    branches = trace.job.guidance.branches
    table = trace.recent.get(
        *(flow.own, ("published", order, branches, stochastic)),
        lambda: _table(flow, weights, branches),
    )
    count, times = len(weights.w_1), weights.times
    with trace.runs.backward_run(table, table.spec(x, trace.job.backend)) as run:
        registers = run.registers
        m = registers.m
        assert m is not None
        registers.x.copy_(x)
        run.row(0, None)
        for n in range(count):
            t = float(times[n])

            def cotangent(out: torch.Tensor, m: torch.Tensor = m) -> torch.Tensor:
                states.observe(0, out)
                return sweep.weighed(m, 0)

            later = weights.g[n + 1] if n + 1 < count else 0.0
            weight = float((weights.w_1[n] + weights.g[n] - later) * weights.scale[n])
            given = flow.given(t, states.at(t))
            run.row(n + 1, sweep.vjp(-1, given, flow.told(t), cotangent, True, weight))
        sweep.finish(registers)


def _weights(schedule: Schedule, own: Plan, order: int, stochastic: bool) -> _Weights:
    times = np.array(own.times)[::-1]
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    lam = schedule.lambda_t(times)
    form = own.variable
    scale = alpha if form == "epsilon" else sigma
    if stochastic:
        scale = sigma**2 / alpha
    count = len(times) - 1
    w_1, g = np.zeros(count), np.zeros(count)
    for n in range(count):
        h = float(lam[n + 1] - lam[n])
        if stochastic:
            w_1[n] = np.exp(2.0 * lam[n + 1]) * np.expm1(-2.0 * h)
            w_2 = -2.0 * np.exp(2.0 * lam[n + 1]) * h * h * phi(2, -2.0 * h)
        elif form == "epsilon":
            w_1[n] = sigma[n + 1] / alpha[n + 1] * np.expm1(h)
            w_2 = 0.5 * h * w_1[n]
        else:
            w_1[n] = alpha[n + 1] / sigma[n + 1] * np.expm1(-h)
            w_2 = -alpha[n + 1] / sigma[n + 1] * h * h * phi(2, -h)
        if order == 2 and n > 0:
            g[n] = w_2 / (lam[n] - lam[n - 1])
    return _Weights(times, scale, w_1, g)


def _table(flow: Flow, weights: _Weights, branches: int) -> Table:
    schedule, prediction, form = flow.schedule, flow.trace.plan.prediction, flow.own.variable
    times, scale, w_1, g = weights.times, weights.scale, weights.w_1, weights.g
    p_q = [schedule.conversion(prediction, form, float(t)) for t in times]
    c_in = [float(schedule.c_in(float(t), prediction)) for t in times]
    rows = [PackedRow(flags=WRITES_M, c_in_next=p_q[0][1], k=(0.0,) * branches)]
    for n in range(len(w_1)):
        row = PackedRow(
            flags=EVALUATE + WRITES_X + WRITES_M,
            push=0,
            p=p_q[n][0],
            a_x=scale[n] / scale[n + 1],
            b_0=(w_1[n] + g[n]) * scale[n] ** 2 / scale[n + 1],
            k=(c_in[n],) * branches,
            c_in_next=p_q[n + 1][1],
        )
        if g[n]:
            row.terms = ((0, -g[n] * scale[n - 1] ** 2 / scale[n + 1], 0.0),)
        rows.append(row)
    return Table(tuple(rows), Layout(1, branches), 1)
