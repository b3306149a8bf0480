# SPDX-License-Identifier: Apache-2.0
"""Rows of weights, by which a solver writes the stages of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..plans import Stage
from ..schedules import Array, Schedule

Weights = Mapping[int, float]


@dataclass(frozen=True)
class Row:
    """The weights of one result of a stage, x' or e'. The default leaves x as it is.

    Args:
        x: Weight of the state x.
        e: Weight of e, the point at which the last stage asked for an evaluation.
        outputs: {evaluation: weight}; evaluations are counted from 0 in order of `Rows.add`.
        noise: Weight of the stage's noise, the same normals in x' and e'.
        extras: {index: weight} of the read-only tensors given as `extras=` when sampling.
    """

    x: float = 1.0
    e: float = 0.0
    outputs: Weights = field(default_factory=dict)
    noise: float = 0.0
    extras: Weights = field(default_factory=dict)


_NOTHING = Row(x=0.0)
_UNMOVED = Row()


@dataclass
class Rows:
    """Collects the stages of a plan, with evaluations named by their number.

    A solver thinks of "the output of evaluation k"; a stage counts backwards from itself. `add`
    does the translation, fills in what follows from the schedule (conversion, c_in, the network's
    time), and gives every noise a stream of its own.

    Args:
        schedule, prediction: The plan's schedule, and what its network returns.
        variable: The variable that the solver combines; outputs are converted to it.
        steps: Steps that the caller of `fastdiff.plan` asked for.
        clip: (lo, hi) for every evaluation, or None.
        threshold: (quantile, floor) for every evaluation, or None.

    Attributes:
        stages: The stages added so far.
        times: Times of the accepted states, where they are not those handed to the solver.
    """

    schedule: Schedule
    prediction: str
    variable: str
    steps: int = 0
    clip: tuple[float, float] | None = None
    threshold: tuple[float, float] | None = None
    stages: list[Stage] = field(default_factory=list)
    times: Array | None = None
    evaluations: int = 0
    streams: int = 0

    @property
    def current(self) -> int:
        """Number of the evaluation that the next `add` makes."""
        return self.evaluations

    def draw(self) -> int:
        """A stream of noise that no stage reads yet.

        Stages that name the same stream in `draws` read the same normals.
        """
        self.streams += 1
        return self.streams

    def add(
        self,
        t: float,
        *,
        x: Row | None = None,
        e: Row | None = None,
        draws: Weights | None = None,
        evaluate: bool = True,
        **fields: Any,
    ) -> int:
        """Evaluates the network at t, then updates.

        Args:
            t: Time of the evaluation; the point is e where the last `add` gave an e, else x.
            x: Weights of x'; None leaves x as it is.
            e: Weights of e', the point of the next evaluation; None: the next is at x'.
            draws: {stream: weight} of at most two streams from `draw`, whose weighted sum is the
                stage's noise. None: one fresh stream of weight 1 where a row weighs noise.
            evaluate: False for an update without a network call; only earlier outputs exist.
            **fields: Further fields of `fastdiff.Stage`, as they stand there.

        Returns:
            The number of this evaluation. Without a network call it is the number of the next one.

        Raises:
            ValueError: A row weighs an evaluation that has not been made.
            TypeError: x or e is no `Row`.
        """
        for name, row in (("x", x), ("e", e)):
            if row is not None and not isinstance(row, Row):
                raise TypeError(
                    f"Rows.add: {name} is a fastdiff.solvers.Row of weights; got {row!r}. Give "
                    f"{name}=Row(x=..., outputs={{evaluation: weight}})."
                )
        k = self.current
        x, e = x or _UNMOVED, e or _NOTHING
        noisy = bool(x.noise or e.noise)
        if draws is None:
            draws = {self.draw(): 1.0} if noisy else {}
        called = self._call(float(t)) if evaluate else {"evaluate": False}
        stage = {
            "t": float(t),
            "a_x": x.x,
            "a_e": x.e,
            "b": _backwards(k, x.outputs, evaluate),
            "c": x.noise,
            "r": _in_order(x.extras),
            "d_x": e.x,
            "d_e": e.e,
            "g": _backwards(k, e.outputs, evaluate),
            "c_e": e.noise,
            "s": _in_order(e.extras),
            "noise": tuple(draws.items()),
        }
        self.stages.append(Stage(**{**stage, **called, **fields}))
        self.evaluations += evaluate
        return k

    def _call(self, t: float) -> dict[str, Any]:
        """The fields of a network call at t and of the conversion of its output."""
        schedule = self.schedule
        p, q = schedule.conversion(self.prediction, self.variable, t)
        x0_p, x0_q = self._to_x0(t)
        return {
            "model_time": float(schedule.model_time(t, self.prediction)),
            "c_in": float(schedule.c_in(t, self.prediction)),
            "p": p,
            "q": q,
            "x0_p": x0_p,
            "x0_q": x0_q,
            "clip": self.clip,
            "threshold": self.threshold,
        }

    def _to_x0(self, t: float) -> tuple[float, float]:
        if float(self.schedule.alpha(t)) == 0.0 and self.prediction == "epsilon":
            return np.nan, np.nan
        return self.schedule.conversion(self.prediction, "x0", t)


def _backwards(k: int, weights: Weights, evaluate: bool) -> tuple[float, ...]:
    """The weights by age: entry j weighs the output of evaluation k - j."""
    newest = k if evaluate else k - 1
    for j in weights:
        if not 0 <= j <= newest:
            raise ValueError(
                f"Rows.add: a row weighs outputs of evaluations 0 to {newest}, which are made; got "
                f"{j}. `Rows.current` is the number of the next evaluation."
            )
    values = [0.0] * (1 + max((k - j for j in weights), default=-1))
    for j, weight in weights.items():
        values[k - j] = float(weight)
    return tuple(values)


def _in_order(weights: Weights) -> tuple[float, ...]:
    if any(index < 0 for index in weights):
        raise ValueError(f"Rows.add: extras are counted from 0; got {dict(weights)}.")
    return tuple(float(weights.get(i, 0.0)) for i in range(1 + max(weights, default=-1)))
