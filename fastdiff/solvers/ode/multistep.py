# SPDX-License-Identifier: Apache-2.0
"""The base of multistep solvers on epsilon: the transfer, the warm-up and the last steps."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...schedules import Array, Schedule
from ..base import Solver, choice, enough_steps
from ..exponential import transfer
from ..rows import Row, Rows
from .runge_kutta import runge_kutta_step

_STARTERS = {1: "euler", 2: "heun", 3: "kutta3", 4: "rk4"}


@dataclass(frozen=True)
class EpsilonMultistep(Solver):
    """Multistep on epsilon: the transfer alpha'/alpha and a rule for the weights.

    A subclass gives `order` as a field and the rule.

    Args:
        lower_order_final: True lowers the last steps to order .. 2, 1. "zero" lowers a step to
            sigma = 0 alone, to x' = x0.
        warmup: "lower" or "runge-kutta"; see `DEIS`.
    """

    lower_order_final: bool | str = field(default=False, kw_only=True)
    warmup: str = field(default="lower", kw_only=True)

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """Outputs combined by a full step."""

    @abc.abstractmethod
    def weights(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        """Weights of the outputs at `nodes` (newest first, nodes[0] = start of the step) [k]."""

    def check_multistep(self) -> None:
        """Raises where an option has a value it cannot have."""
        choice(self.name, "order", self.order, (1, 2, 3, 4))
        choice(self.name, "lower_order_final", self.lower_order_final, (False, True, "zero"))
        choice(self.name, "warmup", self.warmup, ("lower", "runge-kutta"))

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "epsilon"

    def write(self, rows: Rows, times: Array) -> None:
        enough_steps(self.name, self.order, times)
        steps = len(times) - 1
        evaluations: list[int] = []  # at each accepted time
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            if self.warmup == "runge-kutta" and i + 1 < self.order:
                evaluations.append(runge_kutta_step(rows, _STARTERS[self.order], s, t))
                continue
            k = min(self.order, i + 1)
            if self.lower_order_final is True:
                k = min(k, steps - i)
            elif self.lower_order_final == "zero" and float(rows.schedule.sigma(t)) == 0.0:
                k = 1
            evaluations.append(rows.current)
            newest = slice(-1, -k - 1, -1)
            b = self.weights(rows.schedule, times[: i + 1][newest], t)
            a = transfer(rows.schedule, "epsilon", s, t)
            outputs = dict(zip(evaluations[newest], b.tolist(), strict=True))
            rows.add(s, x=Row(x=a, outputs=outputs))


def fixed_options(order: int, **dead: Any) -> Mapping[str, Any]:
    """The options that a name of this order fixes; at order 1 the options `dead` change nothing."""
    return {"order": order, **(dead if order == 1 else {})}
