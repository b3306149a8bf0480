# SPDX-License-Identifier: Apache-2.0
"""How a run is differentiated: the choices behind `gradient=`, and the tensors of `params=`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..grids import as_times
from ..schedules import Schedule

THRESHOLDS = ("exact", "straight-through")


@dataclass(frozen=True)
class Discrete:
    """The exact gradient of what the sampler computed. `gradient="discrete"` is `Discrete()`.

    It agrees with backpropagation through the loop to rounding (float64: 1e-10 relative).

    Args:
        checkpoint: None keeps what the network was given at every stage (N states). An integer k
            keeps the registers at every k-th stage and runs the stages between once more, segment
            by segment: N/k + k states, least at k = sqrt(N), for one more network evaluation a
            stage.
        undo: True keeps the end of the run alone and undoes its stages one by one beside the
            backward pass: no state is stored, at no further evaluation. It serves plans that can be
            undone (the solver "rex-1"). The states, and so the gradient, carry the rounding errors
            of going back.
        threshold: The gradient of dynamic thresholding. "exact" includes how the quantile itself
            depends on x0; "straight-through" passes as if x0 were left alone. A clip has the
            gradient that autograd gives it: none where it acts.
    """

    checkpoint: int | None = None
    undo: bool = False
    threshold: str = "exact"

    def __post_init__(self) -> None:
        k = self.checkpoint
        if not isinstance(self.undo, bool) or (self.undo and k is not None):
            raise ValueError(
                "Discrete: undo is True or False, and needs no checkpoint; got "
                f"undo={self.undo!r}, checkpoint={k!r}."
            )
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise ValueError(f"Discrete: checkpoint is None or an integer from 1 on; got {k!r}.")
        if self.threshold not in THRESHOLDS:
            raise ValueError(
                f"Discrete: threshold is 'exact' or 'straight-through'; got {self.threshold!r}."
            )


@dataclass(frozen=True)
class AdjointDEIS:
    """The gradient of the probability flow itself, by exponential integrators.

    With N the network's epsilon or x0, s = alpha or sigma and m = sigma/alpha or alpha/sigma, the
    flow is d(x/s)/dm = N, and its adjoint b = s a_x obeys db/dm = -s (dN/dx)^T b. The default rows
    are those of the exponential Adams method of this order, transposed: the Jacobian of a step is
    taken at its noisier end. They are of order `order` for a_x at the start, for a_z and for
    a_theta, given states of that order (order 3: with the Runge-Kutta warm-up, else 2
    asymptotically), and for the plan's own grid and rows they are `Discrete`'s.

    For a stochastic plan the adjoint is that of its SDE along the noise that was drawn (the
    network's term doubled), in x0 form on the plan's own times. Its strong order is 1 whatever
    `order` is.

    States are found by their time, so the times of the plan have to decrease throughout.

    Args:
        order: 1, 2 or 3. Below about 12 steps 2 is the safer choice.
        form: What N is: "epsilon", or "x0" (needed where alpha = 0 at the start, and the default
            for stochastic plans). None stands for "epsilon" where it is defined.
        steps: Intervals of the adjoint's own grid; None: as many as the plan's.
        grid: Its name or times. None stands for "logsnr" where lambda is finite at both ends, and
            for the plan's times elsewhere.
        states: "recorded" keeps the states of the forward run and interpolates between them (four
            points, in the angle atan2(sigma, alpha)). "resolve" keeps the sample alone and solves
            the flow back from it along with the adjoint, for one more evaluation.
        published: True takes the explicit forms of the paper (AdjointDEIS-1, -2M), whose Jacobian
            is taken at the cleaner end, for comparison. They lose their accuracy at few steps.
        schedule: The plan's schedule; None: the one that the plan knows. One that contradicts the
            plan is refused.

    Source: Blasingame & Liu, "AdjointDEIS", arXiv:2405.15020: equations (2.14), (2.15) and
    Algorithm 1 for `published`; the rest is derived in docs/adjoint.md.
    """

    order: int = 2
    form: str | None = None
    steps: int | None = None
    grid: Any = None
    states: str = "recorded"
    published: bool = False
    schedule: Schedule | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        def check(name: str, allowed: Sequence[Any]) -> None:
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                shown = ", ".join(map(repr, allowed))
                raise ValueError(f"AdjointDEIS: {name} is one of {shown}; got {value!r}.")

        check("order", (1, 2, 3))
        check("form", (None, "epsilon", "x0"))
        check("states", ("recorded", "resolve"))
        check("published", (False, True))
        if self.published and self.order == 3:
            raise ValueError("AdjointDEIS: the published forms are of order 1 and 2; got order=3.")
        if self.grid is not None and not isinstance(self.grid, str):
            object.__setattr__(self, "grid", tuple(as_times(self.grid).tolist()))
        steps = self.steps
        if steps is not None and (
            not isinstance(steps, int) or isinstance(steps, bool) or steps < 1
        ):
            raise ValueError(f"AdjointDEIS: steps is None or an integer from 1 on; got {steps!r}.")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise TypeError(
                "AdjointDEIS: schedule is one of fastdiff.schedules, or None; got "
                f"{self.schedule!r}."
            )


Gradient = Discrete | AdjointDEIS


def gradient_of(gradient: Any) -> Gradient | str | None:
    """What `gradient=` means.

    Raises:
        ValueError, TypeError: It is none of the choices.
    """
    if gradient is None or isinstance(gradient, Discrete | AdjointDEIS) or gradient == "backprop":
        return gradient
    if gradient == "discrete":
        return Discrete()
    kind = ValueError if isinstance(gradient, str) else TypeError
    raise kind(
        "sample: gradient is None, 'discrete', 'backprop', fastdiff.Discrete(...) or "
        f"fastdiff.AdjointDEIS(...); got {gradient!r}."
    )


def parameters_of(network: Any, params: Any) -> tuple[torch.Tensor, ...]:
    """Tensors that want a gradient: the module's parameters and those given.

    Raises:
        TypeError: `params` is no module and no iterable of tensors.
    """
    named: list[torch.Tensor] = []
    for source in (network, params):
        if isinstance(source, torch.nn.Module):
            named += source.parameters()
        elif source is params and params is not None:
            given = list(params) if isinstance(params, Iterable) else [params]
            if isinstance(params, torch.Tensor) or not all(
                isinstance(tensor, torch.Tensor) for tensor in given
            ):
                raise TypeError(
                    "sample: params is a module or an iterable of tensors; got "
                    f"{type(params).__name__}. For a dict give params=d.values()."
                )
            named += given
    unique = {id(tensor): tensor for tensor in named if tensor.requires_grad}
    return tuple(unique.values())
