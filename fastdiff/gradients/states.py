# SPDX-License-Identifier: Apache-2.0
"""States of the flow at the nodes of its adjoint: recorded in the forward run, or solved again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..guidance import combine
from ..plans import Plan
from ..schedules import Array, Schedule
from ..solvers.exponential import adams, lagrange, transfer
from .trace import Trace, evaluated, written_backward


@dataclass(frozen=True, eq=False)
class Flow:
    """What the network is asked along the flow of a run.

    Attributes:
        trace: The run.
        schedule: Of the flow.
        own: The plan on the adjoint's nodes.
    """

    trace: Trace
    schedule: Schedule
    own: Plan

    def told(self, t: float) -> torch.Tensor:
        """What the network is told at t."""
        like, prediction = self.trace.times[0], self.trace.plan.prediction
        return torch.full_like(like, float(self.schedule.model_time(t, prediction)))

    def given(self, t: float, x: torch.Tensor) -> torch.Tensor:
        """What the network is given at state x and time t."""
        job = self.trace.job
        dtype, branches = job.input_dtype(self.trace.call.x), job.guidance.branches
        c_in = float(self.schedule.c_in(t, self.trace.plan.prediction))
        given = (x if c_in == 1.0 else c_in * x).to(dtype)
        return given if branches == 1 else torch.cat([given] * branches)

    def evaluate(self, t: float, x: torch.Tensor) -> torch.Tensor:
        """The network's output at state x and time t."""
        trace = self.trace
        given = self.given(t, x)
        if trace.job.fresh_inputs:
            given = given.clone()
        with torch.no_grad(), trace.autocast():
            asked = (given, self.told(t), trace.call.cond)
            return evaluated(trace.job, asked, written_backward)


class States(Protocol):
    """States by their time, asked for from the data end on."""

    def at(self, t: float) -> torch.Tensor:
        """The state at t."""
        ...

    def observe(self, i: int, out: torch.Tensor) -> None:
        """Takes the network's output at the node that `at` was asked for last."""
        ...


class Recorded:
    """States between those of the forward run.

    x/hypot(alpha, sigma) is interpolated through four of them in the angle atan2(sigma, alpha),
    which is bounded where lambda is not and in which the flow moves evenly. Error of fourth order.

    Args:
        schedule: Of the flow.
        times: Of the states, decreasing, each once.
        states: The states.
    """

    def __init__(
        self, schedule: Schedule, times: Sequence[float], states: Sequence[torch.Tensor]
    ) -> None:
        self._schedule, self._times, self._states = schedule, np.array(times), states

    def at(self, t: float) -> torch.Tensor:
        """See `States.at`."""
        times = self._times
        close = np.abs(times - t) <= 1e-12 * np.abs(times).max()
        if close.any():
            return self._states[int(close.argmax())]
        after = int((times > t).sum())  # the first recorded time past t
        begin = min(max(after - 2, 0), max(len(times) - 4, 0))
        nodes = times[begin : begin + 4]
        angles, sizes = self._polar(nodes)
        angle, size = self._polar(np.array([t]))
        weights = lagrange(angles, angle)[:, 0] * size[0] / sizes
        total = torch.zeros_like(self._states[0])
        for weight, state in zip(weights, self._states[begin : begin + 4], strict=True):
            total.add_(state, alpha=float(weight))
        return total

    def _polar(self, times: Array) -> tuple[Array, Array]:
        alpha, sigma = self._schedule.alpha(times), self._schedule.sigma(times)
        return np.arctan2(sigma, alpha), np.hypot(alpha, sigma)

    def observe(self, i: int, out: torch.Tensor) -> None:
        """Takes nothing: the states are there."""


class Resolved:
    """States by the same exponential integrator, run back from the sample along with the adjoint.

    x_n = transfer x_{n+1} + sum_j B_j h_{n+1+j}: the h of each node comes with its VJP, and that of
    the data end takes one evaluation more.

    Args:
        flow: The flow.
        sample: The end of the forward run.
        order: Of the integrator.
    """

    def __init__(self, flow: Flow, sample: torch.Tensor, order: int) -> None:
        self._flow, self._order = flow, order
        self._n, self._x = len(flow.own.times) - 1, sample
        self._h: list[torch.Tensor] = []  # of nodes n, n + 1, ..
        self._seen = self._n + 1  # the node of the newest

    def _keep(self, out: torch.Tensor) -> None:
        flow = self._flow
        p, q = flow.schedule.conversion(
            flow.own.prediction, flow.own.variable, flow.own.times[self._n]
        )
        outputs = out.to(self._x.dtype).reshape(-1, *self._x.shape)
        combined = combine(flow.trace.weights(0), list(outputs))
        self._h = [q * combined + p * self._x, *self._h][: self._order]
        self._seen = self._n

    def at(self, t: float) -> torch.Tensor:
        """See `States.at`."""
        schedule, own = self._flow.schedule, self._flow.own
        times = own.times
        while times[self._n] != t:
            n = self._n
            if self._seen != n:  # no product was taken there: the data end
                self._keep(self._flow.evaluate(times[n], self._x))
            nodes = times[n : n + len(self._h)]
            weights = adams(schedule, own.variable, times[n], times[n - 1], nodes)
            scale = transfer(schedule, own.variable, times[n], times[n - 1])
            self._x = self._x * scale
            for weight, h in zip(weights, self._h, strict=True):
                self._x.add_(h, alpha=float(weight))
            self._n -= 1
        return self._x

    def observe(self, i: int, out: torch.Tensor) -> None:
        """See `States.observe`."""
        self._keep(out)
