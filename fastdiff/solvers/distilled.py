# SPDX-License-Identifier: Apache-2.0
"""Samplers of distilled networks: a step goes to the data or near it, and adds noise to come back.

Such a network is trained to return, at any time or at the times of its training, the end of a path
that an ordinary network would take many steps for. So these samplers, `progressive` aside, which is
ddim, approximate no probability flow: more steps of them converge to nothing, and the x0 of an
ordinary network, a mean over the data, makes their samples too smooth. With D the network's x0,
every row is

    x_v = alpha_v D + sigma_v (x_t - alpha_t D)/sigma_t        down, from t to v
    x_u = (alpha_u/alpha_v) x_v + sqrt(sigma_u² - (alpha_u/alpha_v)² sigma_v²) z     up, from v to u

where u is the next time of the grid; the samplers differ in v, and in what D is.
"""

from __future__ import annotations

import abc
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..schedules import Array, Schedule
from ..schedules.base import real
from .base import X0Limits, data_time, within
from .entry import Info
from .exponential import moments, transfer
from .renoise import renoise
from .rows import Row, Rows

_ORIGINAL_STEPS = 50  # of the distillations of LCM and TCD
_LEVELS = 40  # of the distillations of consistency models


@dataclass(frozen=True)
class Distilled(X0Limits):
    """A sampler of a distilled network, in x0 form, with the times of its distillation.

    The grid "auto" stands for is "lcm" on a schedule with training steps, "uniform" down to the
    data where t is a share of a finite range, and "consistency" on EDM.
    """

    @abc.abstractmethod
    def row(self, rows: Rows, times: Array, i: int) -> dict[str, Any]:
        """The arguments of `Rows.add` for the step from times[i]."""

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "x0"

    def default_grid(self, schedule: Schedule) -> tuple[str, float | None]:
        n = schedule.training_steps
        if n is not None:
            return f"lcm({min(_ORIGINAL_STEPS, n)})", data_time(schedule)
        return even_grid(schedule)

    def write(self, rows: Rows, times: Array) -> None:
        self.limit(rows)
        for i, t in enumerate(times[:-1]):
            rows.add(t, **self.row(rows, times, i))

    def write_jump(self, rows: Rows, times: Array) -> None:
        """The last step is one to the data, which is a jump to D."""
        end = data_time(rows.schedule)
        if end is None or float(rows.schedule.alpha(end)) != 1.0:
            super().write_jump(rows, times)
        else:
            self.write(rows, np.append(times[:-1], end))


def even_grid(schedule: Schedule) -> tuple[str, float | None]:
    """Times i/N of the schedule's range down to the data; on EDM those of consistency models."""
    name = "uniform" if math.isfinite(schedule.domain[1]) else f"consistency({_LEVELS})"
    return name, data_time(schedule)


def down_and_up(rows: Rows, t: float, v: float, u: float) -> dict[str, Any]:
    """A step from t down to v by a constant output, and up again to u by noise."""
    scale, noise = renoise(rows.schedule, v, u)
    a = scale * transfer(rows.schedule, "x0", t, v)
    b = scale * float(moments(rows.schedule, "x0", t, v, 1)[0])
    return {"x": Row(x=a, outputs={rows.current: b}, noise=noise)}


@dataclass(frozen=True)
class LCM(Distilled):
    """Multistep consistency sampling of a latent consistency model.

        x' = alpha' D + sigma' z,   D = c_skip x + c_out x0
        c_skip = sd²/((s i)² + sd²),   c_out = s i/sqrt((s i)² + sd²)

    i is the index of the training step. A schedule without training steps has no such index, and
    there D = x0, to which D comes within 1e-5 for i > 16. A step to sigma = 0 is x' = D, without
    noise. On FlowMatching this is the sampler of diffusers' FlowMatchLCMScheduler.

    Args:
        timestep_scaling: s, positive. Infinity stands for D = x0.
        sigma_data: sd, positive.
        clip, threshold: Limits of x0, as in `X0Limits`, before D is made.

    Source: Luo et al., "Latent Consistency Models", arXiv:2310.04378 (multistep latent
    consistency sampling); diffusers 0.42.1 LCMScheduler.
    """

    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        for name in ("timestep_scaling", "sigma_data"):
            value = real(self.name, name, getattr(self, name))
            if not (value > 0.0 and (math.isfinite(value) or name == "timestep_scaling")):
                raise ValueError(f"{self.name}: {name} is positive; got {value!r}.")
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return "lcm"

    def scalings(self, schedule: Schedule, t: float) -> tuple[float, float]:
        """(c_skip, c_out) of D at t."""
        if schedule.training_steps is None or math.isinf(self.timestep_scaling):
            return 0.0, 1.0
        scaled = self.timestep_scaling * float(schedule.model_time(t))
        root = math.hypot(scaled, self.sigma_data)
        return (self.sigma_data / root) ** 2, scaled / root

    def row(self, rows: Rows, times: Array, i: int) -> dict[str, Any]:
        c_skip, c_out = self.scalings(rows.schedule, float(times[i]))
        alpha, sigma = (float(f(times[i + 1])) for f in (rows.schedule.alpha, rows.schedule.sigma))
        return {"x": Row(x=alpha * c_skip, outputs={rows.current: alpha * c_out}, noise=sigma)}


@dataclass(frozen=True)
class TCD(Distilled):
    """Strategic stochastic sampling of a trajectory consistency model.

        v = (1 - gamma) t',   x_v = alpha_v x0 + sigma_v epsilon
        x' = (alpha'/alpha_v) x_v + sqrt(sigma'² - (alpha'/alpha_v)² sigma_v²) z

    gamma = 0 is ddim and gamma = 1 is multistep consistency sampling. On a schedule with training
    steps t' is the index, and v is rounded down to an index where t' is one: the index 0, which
    stands for the data there, keeps its small sigma. The grid "auto" ends at that index, as
    published, and at the data on other schedules.

    Args:
        gamma: Share of the way back to the noise that is fresh, in [0, 1]; diffusers calls it eta.
        clip, threshold: Limits of x0, as in `X0Limits`.

    Source: Zheng et al., "Trajectory Consistency Distillation", arXiv:2402.19159 (strategic
    stochastic sampling); diffusers 0.42.1 TCDScheduler.
    """

    gamma: float = 0.3

    def __post_init__(self) -> None:
        within(self.name, "gamma", self.gamma, 0.0, 1.0)
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return "tcd"

    def default_grid(self, schedule: Schedule) -> tuple[str, float | None]:
        name, end = super().default_grid(schedule)
        return name, schedule.t_floor if schedule.training_steps else end

    def row(self, rows: Rows, times: Array, i: int) -> dict[str, Any]:
        t, u = float(times[i]), float(times[i + 1])
        return down_and_up(rows, t, self._nearer(rows.schedule, u), u)

    def _nearer(self, schedule: Schedule, u: float) -> float:
        """The time v to which a step goes down before it comes up to u."""
        n, lo = schedule.training_steps, float(schedule.domain[0])
        if n is None:
            return min(lo + (1.0 - self.gamma) * (u - lo), u)
        index = u * n - 1.0
        if index <= 0.0:
            return u
        v = (1.0 - self.gamma) * index
        if abs(index - round(index)) < 1e-6:
            v = math.floor(v + 1e-6)
        return min((v + 1.0) / n, u)


@dataclass(frozen=True)
class NStepStochastic(Distilled):
    """The N-step stochastic sampler of distilled guided networks.

    Every step goes down over two intervals of the grid by ddim, and up again over one by fresh
    noise; the last step goes down over its own interval alone. On the grid of times i/N, which is
    "auto" wherever t is a share of a finite range, that is a step of 2/N and noise of 1/N.

    Args:
        clip, threshold: Limits of x0, as in `X0Limits`.

    Source: Meng et al., "On Distillation of Guided Diffusion Models", arXiv:2210.03142 (N-step
    stochastic sampling).
    """

    def __post_init__(self) -> None:
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return "nstep-stochastic"

    def default_grid(self, schedule: Schedule) -> tuple[str, float | None]:
        return even_grid(schedule)

    def row(self, rows: Rows, times: Array, i: int) -> dict[str, Any]:
        two = min(i + 2, len(times) - 1)
        return down_and_up(rows, *(float(times[j]) for j in (i, two, i + 1)))


@dataclass(frozen=True)
class Consistency(Distilled):
    """Onestep and multistep sampling of a consistency model.

        x' = (alpha'/alpha_eps) f + sqrt(sigma'² - (alpha'/alpha_eps)² sigma_eps²) z

    f is the state at the time eps that the network maps x to; x_0 = f(x_T) with one step. A step to
    eps or below it is x' = f. A network with prediction "edm" is the raw F of

        f = c_skip x + c_out F,   s the noise level of x
        c_skip = sd²/((s - eps)² + sd²),   c_out = (s - eps) sd/sqrt(s² + sd²)

    which meets the boundary condition f = x at s = eps. With any other prediction f is the
    network's x0.

    Args:
        eps: The time at which paths end; None: the schedule's smallest noise level on EDM, the data
            elsewhere.
        clip, threshold: Limits of f, as in `X0Limits`. openai/consistency_models clips to [-1, 1].

    Source: Song et al., "Consistency Models", arXiv:2303.01469, Algorithm 1 and appendix C;
    diffusers 0.42.1 CMStochasticIterativeScheduler.
    """

    eps: float | None = None

    def __post_init__(self) -> None:
        if self.eps is not None and not 0.0 <= real(self.name, "eps", self.eps) < math.inf:
            raise ValueError(f"{self.name}: eps is a time of at least 0; got {self.eps!r}.")
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return "consistency"

    def default_grid(self, schedule: Schedule) -> tuple[str, float | None]:
        name, end = super().default_grid(schedule)
        return name, schedule.t_floor if schedule.traits.sigma_data is not None else end

    def row(self, rows: Rows, times: Array, i: int) -> dict[str, Any]:
        eps, t, u = self._end(rows.schedule), float(times[i]), float(times[i + 1])
        if i == 0 and not t > eps:
            raise ValueError(
                f"{self.name}: the grid starts above eps = {eps:g}, where paths end; got t_max = "
                f"{t:g}. Give a smaller eps, or a larger t_max."
            )
        scale, noise = renoise(rows.schedule, eps, u) if u > eps else (1.0, 0.0)
        row = Row(x=0.0, outputs={rows.current: scale}, noise=noise)
        return {"x": row, **self._boundary(rows, t)}

    def _end(self, schedule: Schedule) -> float:
        if self.eps is not None:
            return float(self.eps)
        own = schedule.traits.sigma_data is not None
        return schedule.t_floor if own else float(schedule.domain[0])

    def _boundary(self, rows: Rows, t: float) -> dict[str, float]:
        """The conversion of F to f, in place of the schedule's own."""
        if rows.prediction != "edm":
            return {}
        schedule = rows.schedule
        sd = schedule.traits.sigma_data
        assert sd is not None
        s, eps = float(schedule.sigma(t)), self._end(schedule)
        p, q = sd**2 / ((s - eps) ** 2 + sd**2), (s - eps) * sd / math.hypot(s, sd)
        return {"p": p, "q": q, "x0_p": p, "x0_q": q}


@dataclass(frozen=True)
class Progressive(X0Limits):
    """Deterministic sampling of a progressively distilled network: ddim on the network's own times.

        x' = alpha' x0 + sigma' (x - alpha x0)/sigma

    The rows are those of ddim in x0 form, which is defined where alpha = 0. What is its own is the
    grid "auto" stands for, on which the network of N steps was trained: t = 1, (N - 1)/N, .., 0.

    Args:
        clip, threshold: Limits of x0, as in `X0Limits`.

    Source: Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
    arXiv:2202.00512 (whose networks predict "x0" or "v").
    """

    def __post_init__(self) -> None:
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return "progressive"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "x0"

    def default_grid(self, schedule: Schedule) -> tuple[str, float | None]:
        finite = math.isfinite(schedule.domain[1])
        return even_grid(schedule) if finite else (schedule.default_grid, None)

    def write(self, rows: Rows, times: Array) -> None:
        self.limit(rows)
        for s, t in itertools.pairwise(times):
            a = transfer(rows.schedule, "x0", s, t)
            b = float(moments(rows.schedule, "x0", s, t, 1)[0])
            rows.add(s, x=Row(x=a, outputs={rows.current: b}))


SOLVERS = (
    Info(
        "lcm",
        LCM,
        measured_order=None,
        nfe_per_step=1,
        summary="multistep consistency sampling of a latent consistency model",
        source="Luo et al., arXiv:2310.04378",
        stochastic=True,
        aliases={"LCMScheduler": {}, "FlowMatchLCMScheduler": {}, "sample_lcm": {}},
        quirks="ComfyUI's sample_lcm has D = x0, since its model has the scalings: "
        "timestep_scaling=inf.",
    ),
    Info(
        "tcd",
        TCD,
        measured_order=None,
        nfe_per_step=1,
        summary="trajectory consistency: gamma from ddim to consistency sampling",
        source="Zheng et al., arXiv:2402.19159",
        stochastic=True,
        aliases={"TCDScheduler": {}},
        quirks="diffusers' TCDScheduler has options to clip and threshold, and its step never "
        "reads them; it ends at training index 0, whose noise it leaves.",
    ),
    Info(
        "nstep-stochastic",
        NStepStochastic,
        measured_order=None,
        nfe_per_step=1,
        summary="two intervals down, one up by noise, for distilled guided networks",
        source="Meng et al., arXiv:2210.03142",
        stochastic=True,
    ),
    Info(
        "consistency",
        Consistency,
        measured_order=None,
        nfe_per_step=1,
        summary="onestep and multistep sampling of a consistency model",
        source="Song et al., arXiv:2303.01469",
        stochastic=True,
        aliases={"CMStochasticIterativeScheduler": {"clip": 1.0}},
    ),
    Info(
        "progressive",
        Progressive,
        measured_order=1,
        nfe_per_step=1,
        summary="ddim in x0 form on the times of a progressively distilled network",
        source="Salimans & Ho, arXiv:2202.00512",
        same="ddim",
    ),
)
