# SPDX-License-Identifier: Apache-2.0
"""The one list of solvers that every law runs over, and plans followed by hand."""

import dataclasses
import inspect
import itertools
import math
from typing import Any

import numpy as np

import fastdiff as fd

VP = fd.schedules.VPLinear()
# name -> (schedule, what its networks usually return)
SCHEDULES = {
    "vp-linear": (VP, "epsilon"),
    "vp-cosine": (fd.schedules.VPCosine(), "v"),
    "sd": (fd.schedules.VPDiscrete.scaled_linear(), "epsilon"),
    "edm": (fd.schedules.EDM(), "edm"),
    "ve": (fd.schedules.EDM(sigma_min=0.01, sigma_max=50.0), "score"),
    "flow": (fd.schedules.FlowMatching(), "velocity"),
    "custom": (
        fd.schedules.Custom(
            alpha=lambda t: np.cos(0.5 * np.pi * t),
            sigma=lambda t: np.sin(0.5 * np.pi * t),
            grid_range=(0.02, 0.98),
        ),
        "x0",
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A registered solver with options, if any."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def info(self):
        return fd.solvers.info(self.name)

    @property
    def stochastic(self):
        return fd.plan(VP, self.name, 6, **dict(self.options)).stochastic

    def plan(self, schedule, steps, **arguments):
        return fd.plan(schedule, self.name, steps, **dict(self.options), **arguments)

    def inside(self, schedule, steps=6, **arguments):
        """A plan that starts inside the schedule, where every solver can."""
        start = {"t_max": 0.99} if isinstance(schedule, fd.schedules.FlowMatching) else {}
        return self.plan(schedule, steps, **start, **arguments)

    def __str__(self):
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options)])


def _cases():
    for name in fd.solvers.names():
        yield Case(name)
        if "eta" in fd.solvers.info(name).options:
            yield from (Case(name, (("eta", eta),)) for eta in (0.3, 1.0))


CASES = tuple(_cases())
# What a distilled network returns is more than an x0: options that make it one.
PLAIN_X0 = {"timestep_scaling": math.inf, "eps": 0.0}


def with_x0(case):
    """The case for a network that returns an x0, without the scalings of a distilled one."""
    plain = {name: value for name, value in PLAIN_X0.items() if name in case.info.options}
    return Case(case.name, (*case.options, *plain.items()))


DETERMINISTIC = tuple(case for case in CASES if not case.stochastic)
STOCHASTIC = tuple(case for case in CASES if case.stochastic)


def follow(plan, start, network):
    """The plan's own arithmetic in float64, on registers that are vectors.

    Args:
        plan: Of any solver.
        start: Coordinates of x at plan.times[0]; further coordinates are the draws, by stream.
        network: Function (stage, point) of the coordinates of the point, to those of the output.

    Returns:
        Coordinates of every accepted state.
    """
    streams = 1 + max((s for stage in plan.stages for s, _ in stage.noise), default=0)
    x = np.concatenate([start, np.zeros(streams)])
    e, at_e, states, history = np.zeros_like(x), False, [], []
    for stage in plan.stages:
        xi = np.zeros_like(x)
        for stream, weight in stage.noise:
            xi[len(start) + stream] += weight
        outputs = history
        if stage.evaluate:
            point = e if at_e else x
            h = stage.p * point + stage.q * network(stage, point)
            outputs = history = [h, *history]
        else:
            outputs = [np.zeros_like(x), *history]
        x_next = stage.a_x * x + stage.a_e * e + stage.c * xi
        x_next = x_next + sum(b * o for b, o in zip(stage.b, outputs, strict=False))
        if stage.writes_e:
            e_next = stage.d_x * x + stage.d_e * e + stage.c_e * xi
            e = e_next + sum(g * o for g, o in zip(stage.g, outputs, strict=False))
        at_e, x = stage.writes_e, x_next
        if stage.writes_x:
            states.append(x)
    return states


def perfect(schedule, prediction):
    """A network that knows x0, and the noise of the point it is given.

    Coordinates are (x0, eps, draws ..): the network's noise is the point's own, without its x0.
    """

    noise = np.empty(0)

    def network(stage, point):
        nonlocal noise
        u, w = schedule.components(prediction, stage.t)
        if schedule.sigma(stage.t):  # at the data the noise is that of the point before
            noise = point / schedule.sigma(stage.t)
            noise[0] = 0.0
        out = w * noise
        out[0] += u
        return out

    return network


def is_straight(plan):
    """Whether what the rows combine stays the same along the flow of one x0 and one noise.

    Where it does not (the velocity of a curved schedule), no finite sum of its values is exact.
    """
    within = np.linspace(plan.times[0], plan.times[-1], 50)
    return max(map(np.ptp, plan.schedule.components(plan.variable, within))) < 1e-12


def redefined(made):
    """Names of what a class of the library defines although a base defines it already."""
    ours = [c for c in made.__mro__ if c.__module__.startswith("fastdiff.")]
    found = set()
    for below, above in itertools.combinations(ours, 2):
        for name, value in vars(above).items():
            concrete = inspect.isfunction(value) or isinstance(value, property | classmethod)
            final = concrete and not getattr(value, "__isabstractmethod__", False)
            if final and not name.startswith("__") and name in vars(below):
                found.add(name)
    return found
