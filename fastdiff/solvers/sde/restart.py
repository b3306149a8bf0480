# SPDX-License-Identifier: Apache-2.0
"""Solvers that go back: another solver's run, renoised on the way and made again."""

from __future__ import annotations

import abc
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ... import grids
from ..._text import shown
from ...schedules import Array, Schedule
from ...schedules.base import real
from ..base import Solver, TooFewSteps
from ..entry import Info
from ..ode.ddim import DDIM
from ..ode.runge_kutta import Euler, Heun
from ..renoise import renoise
from ..rows import Row, Rows

_HEUN, _DDIM = Heun(), DDIM()  # frozen, so that all may share them


@dataclass(frozen=True)
class Returning(Solver):
    """Another solver over falling stretches of times, with a row of fresh noise between two.

        x_s = (alpha_s/alpha_t) x_t + sqrt(sigma_s² - (alpha_s/alpha_t)² sigma_t²) z

    goes up from t to s without an evaluation and keeps the marginals. The history of a multistep
    solver ends there: every stretch begins with the warm-up. A stretch of fewer steps than the
    solver combines outputs is made at the order that it has steps for; `pndm`, which has no other
    order, refuses one of two or three. The plan's times rise at those rows, and `steps` counts the
    intervals of the grid that is gone through once.

    Args:
        inner: The solver of the stretches, a `Solver`; `fastdiff.plan` takes a name as well.
        s_noise: Factor of the noise. Other values than 1 do not keep the marginals.
    """

    inner: Solver = _HEUN
    s_noise: float = field(default=1.0, kw_only=True)

    @abc.abstractmethod
    def stretches(self, schedule: Schedule, times: Array) -> list[Array]:
        """Falling times; each stretch begins above the end of the one before."""

    def check_returning(self) -> None:
        """Raises where an option has a value it cannot have."""
        if not isinstance(self.inner, Solver):
            raise TypeError(
                f"{self.name}: inner is a fastdiff.solvers.Solver, or a name where "
                f"fastdiff.plan makes it; got {shown(self.inner)}."
            )
        if isinstance(self.inner, Returning):
            raise ValueError(
                f"{self.name}: inner is a solver whose times fall; got {self.inner.name!r}. Give "
                "its own inner solver."
            )
        if getattr(self.inner, "statistics", None) is not None:
            raise ValueError(
                f"{self.name}: inner is a solver without statistics of a network, since the "
                "tensors that they make belong to one falling run; got "
                f"{self.inner.name!r}. Leave statistics out."
            )
        if not 0.0 < real(self.name, "s_noise", self.s_noise) < math.inf:
            raise ValueError(f"{self.name}: s_noise is positive; got {self.s_noise!r}.")

    def variable(self, schedule: Schedule, times: Array) -> str:
        return self.inner.variable(schedule, times)

    def default_grid(self, schedule: Schedule) -> tuple[str, float | None]:
        return self.inner.default_grid(schedule)

    def write(self, rows: Rows, times: Array) -> None:
        self._write(rows, times, jump=False)

    def write_jump(self, rows: Rows, times: Array) -> None:
        self._write(rows, times, jump=True)

    def _write(self, rows: Rows, times: Array, jump: bool) -> None:
        """Writes the stretches; the last interval of the last one may be a jump."""
        accepted: list[Array] = []
        steps, stretches = rows.steps, self.stretches(rows.schedule, times)
        total = sum(len(stretch) - 1 for stretch in stretches)
        if total > grids.MAX_STEPS:
            raise ValueError(
                f"{self.name}: a plan has at most {grids.MAX_STEPS} steps, with those made again; "
                f"got {total}. Go back less often, or by fewer steps."
            )
        for i, stretch in enumerate(stretches):
            if accepted:
                low, high = float(accepted[-1][-1]), float(stretch[0])
                scale, noise = renoise(rows.schedule, low, high)
                rows.add(low, x=Row(x=scale, noise=self.s_noise * noise), evaluate=False)
            jumps = jump and i + 1 == len(stretches)
            rows.times, rows.steps = None, len(stretch) - 1 - jumps
            try:
                _write_by(self.inner, rows, stretch, jumps)
            except TooFewSteps:
                _write_by(self._lowered(rows), rows, stretch, jumps)
            accepted.append(stretch if rows.times is None else rows.times)
        rows.times, rows.steps = np.concatenate(accepted), steps

    def _lowered(self, rows: Rows) -> Solver:
        """The inner solver at the order of a stretch's steps; of one step, what it begins with."""
        inner = self.inner
        if rows.steps == 1:
            if rows.variable == "velocity":
                return Euler()
            clip, threshold = (getattr(inner, name, None) for name in ("clip", "threshold"))
            return DDIM(form=rows.variable, clip=clip, threshold=threshold)
        if not any(f.name == "order" and f.init for f in dataclasses.fields(inner)):
            return inner
        changes: dict[str, Any] = {"order": rows.steps}
        return dataclasses.replace(inner, **changes)


def _write_by(solver: Solver, rows: Rows, times: Array, jumps: bool) -> None:
    if jumps:
        solver.write_jump(rows, times)
    else:
        solver.write(rows, times)


@dataclass(frozen=True)
class Restart(Returning):
    """Restart: at a time near the data, K times back up by fresh noise and down again.

    For each (t_min, t_max, K, steps), in the schedule's units: when the grid comes to its time
    nearest to t_min, x is renoised to t_max and brought down in `steps` intervals of the schedule's
    own grid, K times. The fresh noise forgets the errors made above t_max, while the steps between
    are those of an ODE. Without restarts the samples are those of the inner solver.

    The paper's code counts the times of a stretch, one more than its intervals: its CIFAR-10
    setting {"0": [3, 2, 0.06, 0.30]} on 18 main steps of Heun, 43 evaluations, is
    restarts=[(0.06, 0.30, 2, 2)] on `EDM()` with steps = 18; for ImageNet-64 at 203 evaluations it
    takes 36 steps and restarts=[(19.35, 40.79, 1, 3), (1.09, 1.92, 1, 3), (0.59, 1.09, 5, 3),
    (0.30, 0.59, 5, 3), (0.06, 0.30, 6, 5)], both with s_noise=1.003.

    Args:
        restarts: Sequence of (t_min, t_max, K, steps).
        inner, s_noise: The options of `Returning`.

    Source: Xu et al., "Restart Sampling for Improving Generative Processes", arXiv:2306.14878,
    section 3; code Newbeeer/diffusion_restart_sampling 8cbcb07 restart_sampler.
    """

    restarts: tuple[tuple[float, float, int, int], ...] = ()

    def __post_init__(self) -> None:
        self.check_returning()
        object.__setattr__(self, "restarts", self._checked())

    @property
    def name(self) -> str:
        return "restart"

    def _checked(self) -> tuple[tuple[float, float, int, int], ...]:
        given = self.restarts
        each = [tuple(r) if isinstance(r, list | tuple) else () for r in _listed(given)]
        if not isinstance(given, list | tuple) or any(len(r) != 4 for r in each):
            raise TypeError(
                f"{self.name}: restarts is a sequence of (t_min, t_max, K, steps), such as "
                f"[(0.06, 0.3, 2, 2)]; got {shown(given)}."
            )
        found = []
        for low, high, count, steps in each:
            ends = [real(self.name, n, v) for n, v in (("t_min", low), ("t_max", high))]
            if not 0.0 <= ends[0] < ends[1] < math.inf:
                raise ValueError(
                    f"{self.name}: a restart goes from t_min up to t_max, finite; got t_min = "
                    f"{low!r}, t_max = {high!r}."
                )
            whole = [_whole(self.name, n, v) for n, v in (("K", count), ("steps", steps))]
            found.append((ends[0], ends[1], whole[0], whole[1]))
        return tuple(found)

    def stretches(self, schedule: Schedule, times: Array) -> list[Array]:
        at: dict[int, list[tuple[float, int, int]]] = {}
        for low, high, count, steps in self.restarts:
            at.setdefault(self._place(times, low, high), []).append((high, count, steps))
        found, current = [], times[:1]
        for i in range(1, len(times)):
            current = np.append(current, times[i])
            for high, count, steps in at.get(i, ()):
                again = self._again(schedule, high, float(times[i]), steps)
                for _ in range(count):
                    found.append(current)
                    current = again
        return [*found, current]

    def _place(self, times: Array, low: float, high: float) -> int:
        """Number of the grid's time that is nearest to t_min."""
        i = int(np.argmin(np.abs(times - low)))
        if not (times[-1] <= low and high <= times[0] and times[i] < high):
            raise ValueError(
                f"{self.name}: a restart lies within the grid, from {times[-1]:.6g} to "
                f"{times[0]:.6g}, with a time of it below t_max; got t_min = {low:g}, t_max = "
                f"{high:g}, where the nearest time is {times[i]:.6g}."
            )
        return i

    def _again(self, schedule: Schedule, high: float, low: float, steps: int) -> Array:
        name = schedule.default_grid
        if schedule.sigma(low) == 0.0 and high <= schedule.t_floor:
            name = "uniform"
        return grids.build(schedule, steps, name, t_max=high, t_min=low)


@dataclass(frozen=True)
class Recurrence(Returning):
    """Cycles: every stretch of `length` steps is made `repeats` times, with noise in between.

    length = 1 is self-recurrence: every step, except the last, is taken, undone by fresh noise and
    taken again. length = j is RePaint's schedule of jumps: counted back from the step before the
    last, at every j-th time x is renoised j intervals up and brought down again, repeats - 1 times.
    The last step, to the data, is made once.

    Args:
        length: Intervals that a cycle goes back, at least 1; as many as there are steps and more
            make no cycle.
        repeats: How often each stretch is made, at least 1.
        inner, s_noise: The options of `Returning`.

    Source: Lugmayr et al., "RePaint", arXiv:2201.09865, Algorithm 1 (jump_length, jump_n_sample);
    Yu et al., "FreeDoM", arXiv:2303.09833 (time travel); Bansal et al., "Universal Guidance for
    Diffusion Models", arXiv:2302.07121 (self-recurrence).
    """

    inner: Solver = _DDIM
    length: int = 1
    repeats: int = 2

    def __post_init__(self) -> None:
        self.check_returning()
        for name in ("length", "repeats"):
            object.__setattr__(self, name, _whole(self.name, name, getattr(self, name)))

    @property
    def name(self) -> str:
        return "recurrence"

    def stretches(self, schedule: Schedule, times: Array) -> list[Array]:
        steps, found, start = len(times) - 1, [], 0
        for i in range(1, steps):
            if (steps - 1 - i) % self.length or i < self.length:
                continue
            for _ in range(self.repeats - 1):
                found.append(times[start : i + 1])
                start = i - self.length
        return [*found, times[start:]]


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else []


def _whole(who: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{who}: {name} is an integer; got {shown(value)}.")
    if not 1 <= value <= grids.MAX_STEPS:
        raise ValueError(f"{who}: {name} lies between 1 and {grids.MAX_STEPS}; got {shown(value)}.")
    return int(value)


SOLVERS = (
    Info(
        "restart",
        Restart,
        measured_order=2,
        nfe_per_step=2,
        summary="another solver, renoised and brought down again in given intervals",
        source="Xu et al., arXiv:2306.14878",
        same="heun",
        quirks="Of several restarts whose t_min is nearest to one time of the grid, the authors' "
        "code keeps the last; here all are made, in order.",
    ),
    Info(
        "recurrence",
        Recurrence,
        measured_order=1,
        nfe_per_step=2,
        nfe_extra=-1,
        summary="another solver, every step or stretch undone by noise and made again",
        source="Lugmayr et al., arXiv:2201.09865",
        stochastic=True,
    ),
)
