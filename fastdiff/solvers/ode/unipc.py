# SPDX-License-Identifier: Apache-2.0
"""UniPC: a multistep predictor and a corrector that costs no evaluation of its own."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...schedules import Array, Schedule
from ..base import X0Limits, choice, enough_steps
from ..entry import Info
from ..exponential import adams, moments, transfer
from ..rows import Row, Rows
from .dpm_multistep import lowers
from .dpm_singlestep import FORMS, singlestep
from .runge_kutta import runge_kutta_step

VARIANTS = ("bh1", "bh2", "vary_coeff")


@dataclass(frozen=True)
class UniPC(X0Limits):
    """UniPC: UniP-p, an exponential Adams predictor, and UniC-p, which corrects what it predicted.

        predicted  e_{i+1} = a x_i + sum_j b_j h_{i-j}                            j = 0 .. p-1
        corrected  x_{i+1} = a x_i + c h(e_{i+1}) + sum_j c_j h_{i-j}             h = epsilon or x0

    The network is evaluated once a step, at e; what it says there corrects the state and stays in
    the history. The last step is not corrected. The corrector of a step and the predictor of the
    next are one stage.

    The weights b and c are exact for polynomials in lambda through the outputs they combine, save
    where B(h) enters: with two outputs the coefficient 1/2 stands for the solution of the order
    condition, at order 2 in the predictor and at order 1 in the corrector. There the increment of
    D = (h_j - h_i) / ((lambda_j - lambda_i)/h) is weighted by half of B = h ("bh1") or expm1(h)
    ("bh2"), and "vary_coeff" takes the exact integral. At orders 3 and 4 the three predictors are
    one, and so are the three correctors from order 2 on.

    The order is that of the predictor, and one more with the corrector, if the warm-up has it. A
    step from alpha = 0 or to sigma = 0 is of order 1. The latter is not corrected, the former by
    "bh2" alone, whose B(h) is finite there; the step after it is corrected by the exact weights of
    its two outputs.

    Args:
        order: Outputs that the predictor combines, 1 to 4; the corrector combines one more.
        variant: "bh1", "bh2" or "vary_coeff", see above.
        form: Variable that is combined, "epsilon" or "x0".
        corrector: False leaves the predictor alone, UniP.
        disable_corrector: Steps, counted from 0, that are not corrected. Under strong guidance the
            first ones sometimes are better not.
        lower_order_final: True lowers the last steps to order .. 2, 1; False lowers none, except a
            step to sigma = 0. "auto" lowers a last step whose weights amplify errors too much, as
            `DPMSolverMultistep` does; with published=True it is the authors' rule, True.
        warmup: "lower" (steps of order 1, 2, ..; no extra evaluations) or "runge-kutta" (the first
            order - 1 steps by a Runge-Kutta method of the full order, not corrected).
        published: True takes the corrector of "vary_coeff" as published, which drops the highest
            difference and weighs the new output by the wrong entry: its order is 1.
        clip, threshold: Limits of x0, as in `X0Limits`; form "x0" alone has them.

    Raises:
        ValueError: An option has a value it cannot have, or a step is named that has no corrector.

    Source: Zhao et al., "UniPC", arXiv:2302.04867, Algorithms 1 to 3 and appendix C; code
    wl-zhao/UniPC cf9de85. The mended corrector of "vary_coeff" follows from the order conditions.
    """

    order: int = 3
    variant: str = "bh2"
    form: str = "x0"
    corrector: bool = True
    disable_corrector: tuple[int, ...] = ()
    lower_order_final: bool | str = "auto"
    warmup: str = "lower"
    published: bool = False

    def __post_init__(self) -> None:
        choice(self.name, "order", self.order, (1, 2, 3, 4))
        choice(self.name, "variant", self.variant, VARIANTS)
        choice(self.name, "form", self.form, FORMS)
        choice(self.name, "corrector", self.corrector, (False, True))
        choice(self.name, "lower_order_final", self.lower_order_final, ("auto", True, False))
        choice(self.name, "warmup", self.warmup, ("lower", "runge-kutta"))
        choice(self.name, "published", self.published, (False, True))
        object.__setattr__(self, "disable_corrector", self._steps(self.disable_corrector))
        if self.disable_corrector and not self.corrector:
            raise ValueError(
                f"{self.name}: disable_corrector names steps of a corrector; got "
                f"{self.disable_corrector} with corrector=False. Leave one out."
            )
        self.check_limits(self.form)

    def _steps(self, given: Any) -> tuple[int, ...]:
        steps = tuple(given) if isinstance(given, list | tuple | range) else None
        if steps is None or not all(
            isinstance(k, int | np.integer) and not isinstance(k, bool) for k in steps
        ):
            raise TypeError(
                f"{self.name}: disable_corrector is a sequence of steps, counted from 0; got "
                f"{given!r}."
            )
        return tuple(sorted({int(k) for k in steps}))

    @property
    def name(self) -> str:
        return f"unipc-{self.order}"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.form

    def write(self, rows: Rows, times: Array) -> None:
        enough_steps(self.name, self.order, times)
        self._check_corrected(len(times) - 1)
        self.limit(rows)
        schedule, finite = rows.schedule, np.isfinite(rows.schedule.lambda_t(times))
        evaluations: list[int] = []
        state = Row()  # what makes the state at times[i] of the register x and the outputs
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            if self.warmup == "runge-kutta" and i + 1 < self.order and finite[i : i + 2].all():
                evaluations.append(self._start(rows, s, t))
                continue
            evaluations.append(rows.current)
            k = self._order(schedule, times, i, finite)
            newest = evaluations[::-1][:k]
            nodes = times[i::-1][:k]
            a = transfer(schedule, self.form, s, t)
            b = self.predict(schedule, nodes, t)
            ahead = _after(state, a, dict(zip(newest, b.tolist(), strict=True)))
            if not self._corrects(i, times, finite):
                rows.add(s, x=ahead)
                state = Row()
                continue
            rows.add(s, x=state if state.outputs else None, e=ahead)
            if len(nodes) == 1 and i > 0 and not finite[0]:  # the warm-up had its step
                c = adams(schedule, self.form, s, t, [s, t])[::-1]
            else:
                c = self.correct(schedule, nodes, t)
            state = Row(x=a, outputs=dict(zip([rows.current, *newest], c.tolist(), strict=True)))

    def _check_corrected(self, steps: int) -> None:
        for k in self.disable_corrector:
            if not 0 <= k < steps - 1:
                known = f"steps 0 to {steps - 2} of {steps} are" if steps > 1 else "no step is"
                raise ValueError(
                    f"{self.name}: {known} corrected, since the last one never is; got "
                    f"disable_corrector={self.disable_corrector} and steps = {steps}. "
                    f"Leave {k} out."
                )

    def _corrects(self, i: int, times: Array, finite: Any) -> bool:
        """Whether the state that step i leads to is corrected."""
        last = i + 2 == len(times)
        return (
            self.corrector
            and not last
            and i not in self.disable_corrector
            and bool(finite[i + 1])
            and bool(finite[i] or self.variant == "bh2")  # half of B is finite there
        )

    def _order(self, schedule: Schedule, times: Array, i: int, finite: Any) -> int:
        """Outputs that the predictor of step i combines."""
        usable = int(finite[: i + 1].sum())
        k = min(self.order, max(usable, 1)) if finite[i + 1] else 1
        left = len(times) - 1 - i
        if left >= k or self.lower_order_final is False:
            return k
        if self.lower_order_final is True or self.published:
            return left
        b = self.predict(schedule, times[i::-1][:k], times[i + 1])
        h = float(schedule.h(times[i], times[i + 1]))
        return left if lowers(self.form, h, b) else k

    def _start(self, rows: Rows, s: float, t: float) -> int:
        """Writes a step of the warm-up; returns the number of the evaluation at s."""
        needed = self.order + self.corrector
        if needed <= 3:
            return singlestep(rows, needed, s, t, "taylor")
        return runge_kutta_step(rows, "rk4", s, t)

    def _half(self, schedule: Schedule, s: float, t: float) -> float:
        """Half of B(h) with the sign and scale of the form."""
        if self.variant == "bh2":
            return 0.5 * float(moments(schedule, self.form, s, t, 1)[0])
        scale = -schedule.sigma(t) if self.form == "epsilon" else schedule.alpha(t)
        return 0.5 * float(scale * schedule.h(s, t))

    def predict(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        """Weights of the outputs at `nodes` (newest first, nodes[0] the start) in UniP."""
        s = float(nodes[0])
        if len(nodes) != 2 or self.variant == "vary_coeff":
            return adams(schedule, self.form, s, t, nodes.tolist())
        back = float(schedule.h(s, nodes[1]) / schedule.h(s, t))
        g = self._half(schedule, s, t) / back
        return np.array([moments(schedule, self.form, s, t, 1)[0] - g, g])

    def correct(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        """Weights in UniC of the output at t and of those at `nodes`, newest first."""
        s = float(nodes[0])
        if len(nodes) == 1 and self.variant != "vary_coeff":
            g = self._half(schedule, s, t)
            return np.array([g, moments(schedule, self.form, s, t, 1)[0] - g])
        if self.variant == "vary_coeff" and self.published and len(nodes) > 1:
            return self._published_corrector(schedule, nodes, t)
        c = adams(schedule, self.form, s, t, [s, t, *nodes[1:].tolist()])
        return c[[1, 0, *range(2, len(c))]]

    def _published_corrector(self, schedule: Schedule, nodes: Array, t: float) -> Array:
        """The corrector of "vary_coeff" in the authors' code.

        The weights of h f', h² f'', .. are right, but the K-th derivative is left out of the old
        differences, and the new one is multiplied by the last entry of the row before.
        """
        s = float(nodes[0])
        h = float(schedule.h(s, t))
        r = np.append(schedule.h(s, nodes[1:]) / h, 1.0)  # of the older outputs and of t
        count = len(r)
        powers = np.arange(count)
        factorials = np.array([math.factorial(k) for k in range(1, count + 1)])
        inverse = np.linalg.inv(r[:, None] ** powers / factorials)
        w = moments(schedule, self.form, s, t, count + 1)
        w = w / [math.factorial(p) * h**p for p in range(count + 1)]
        of = np.append(w[1:count] @ inverse[: count - 1, :-1], w[count] * inverse[count - 2, -1])
        of = of / r  # differences are divided by r
        return np.array([of[-1], w[0] - of.sum(), *of[:-1]])


def _after(state: Row, a: float, weights: dict[int, float]) -> Row:
    """The row a * state + sum of weighted outputs, on what `state` is made of."""
    outputs = {k: a * w for k, w in state.outputs.items()}
    for k, w in weights.items():
        outputs[k] = outputs.get(k, 0.0) + w
    return Row(x=a * state.x, outputs=outputs)


_QUIRKS = (
    "vary_coeff's corrector has order 1 as published; diffusers ends at sigma = 0 with infinities "
    "for lower_order_final=False and for predict_x0=False"
)
_ALIASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {"UniPCMultistepScheduler": {"lower_order_final": True}},  # its grid ends at sigma = 0
    3: {
        "uni_pc": {"variant": "bh1", "lower_order_final": True},
        "uni_pc_bh2": {"lower_order_final": True},
    },
}

SOLVERS = tuple(
    Info(
        f"unipc-{order}",
        UniPC,
        measured_order=order + 1,
        nfe_per_step=1,
        summary="exponential Adams predictor and corrector",
        source="Zhao et al., arXiv:2302.04867",
        fixed={"order": order},
        least_steps=order,
        quirks=_QUIRKS,
        aliases=_ALIASES.get(order, {}),
    )
    for order in (1, 2, 3, 4)
)
