# SPDX-License-Identifier: Apache-2.0
"""Time grids: the strictly decreasing float64 times t_0 > t_1 > ... > t_N of a sampling run.

A grid is a function (schedule, steps, t_max, t_min) -> times [steps + 1]. It is chosen by name
("karras"), by a name with its parameter ("karras(5)", "power(3)", "shift(3)"), or given as an
explicit array. Grids that are uniform in some function of lambda cannot reach sigma = 0: asked to
end there, they take steps - 1 intervals to the schedule's smallest noise level and one to 0.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._text import shown, unknown
from .schedules import Array, Schedule
from .schedules.base import real

__all__ = ["build", "names"]

Grid = Callable[..., Array]

MAX_STEPS = 1_000_000  # a table of so many rows is still made in minutes


def uniform(schedule: Schedule, steps: int, t_max: float, t_min: float) -> Array:
    """Times uniform in t."""
    return np.linspace(t_max, t_min, steps + 1)


def power(schedule: Schedule, steps: int, t_max: float, t_min: float, kappa: float = 2.0) -> Array:
    """Times uniform in t^(1/kappa): dense near the data for kappa > 1.

    Source: Zhang & Chen, "DEIS", arXiv:2204.13902, section 4.
    """
    _parameter("power", "kappa", kappa)
    return np.linspace(t_max ** (1.0 / kappa), t_min ** (1.0 / kappa), steps + 1) ** kappa


def quadratic(schedule: Schedule, steps: int, t_max: float, t_min: float) -> Array:
    """Times uniform in sqrt(t): power(2)."""
    return power(schedule, steps, t_max, t_min, 2.0)


def logsnr(schedule: Schedule, steps: int, t_max: float, t_min: float) -> Array:
    """Times uniform in lambda.

    Source: Lu et al., "DPM-Solver", arXiv:2206.00927, section 3.3.
    """

    def levels(lam_max: float, lam_min: float, count: int) -> Array:
        return np.linspace(lam_max, lam_min, count + 1)

    return _in_lambda("logsnr", schedule, steps, t_max, t_min, levels)


def karras(schedule: Schedule, steps: int, t_max: float, t_min: float, rho: float = 7.0) -> Array:
    """Times uniform in (sigma/alpha)^(1/rho).

    Source: Karras et al., "Elucidating the Design Space", arXiv:2206.00364, eq. 5.
    """
    _parameter("karras", "rho", rho)

    def levels(lam_0: float, lam_1: float, count: int) -> Array:
        root = np.linspace(math.exp(-lam_0 / rho), math.exp(-lam_1 / rho), count + 1)
        return -rho * np.log(root)

    return _in_lambda("karras", schedule, steps, t_max, t_min, levels)


def exponential(schedule: Schedule, steps: int, t_max: float, t_min: float) -> Array:
    """Times uniform in log(sigma/alpha): k-diffusion's name for "logsnr"."""
    return logsnr(schedule, steps, t_max, t_min)


def shift(schedule: Schedule, steps: int, t_max: float, t_min: float, shift: float = 3.0) -> Array:
    """Times t = shift s / (1 + (shift - 1) s) of a uniform s: the resolution shift, applied once.

    The shift covers the grid from t_max to t_min. The two ends are not shifted a second time: s
    runs between their preimages.

    Source: Esser et al., "Scaling Rectified Flow Transformers", arXiv:2403.03206, eq. 23.
    """
    _parameter("shift", "shift", shift)
    if schedule.domain != (0.0, 1.0):
        raise ValueError(
            f"grid: 'shift' maps times in [0, 1] to [0, 1]; {schedule} has "
            f"[{schedule.domain[0]:g}, {schedule.domain[1]:g}]. Use 'karras' or 'logsnr'."
        )
    s_max, s_min = (t / (shift - (shift - 1.0) * t) for t in (t_max, t_min))
    s = np.linspace(s_max, s_min, steps + 1)
    return shift * s / (1.0 + (shift - 1.0) * s)


def linspace(schedule: Schedule, steps: int, t_max: float, t_min: float) -> Array:
    """Times of the indices round(linspace(0, N - 1, steps)), then t_min.

    The evaluation times of diffusers 0.42.1 DDIMScheduler with timestep_spacing="linspace".
    """
    n = _training_steps("linspace", schedule, steps)
    return _of_indices(n, np.round(np.linspace(0, n - 1, steps))[::-1], t_min)


def leading(
    schedule: Schedule, steps: int, t_max: float, t_min: float, offset: float = 0.0
) -> Array:
    """Times of the indices i (N // steps) + offset, then t_min.

    The evaluation times of diffusers 0.42.1 DDIMScheduler and EulerDiscreteScheduler with
    timestep_spacing="leading"; Stable Diffusion's `steps_offset` is `offset = 1`. The multistep
    schedulers there divide by steps + 1: take their times explicitly (docs/choosing.md).
    """
    n = _training_steps("leading", schedule, steps)
    return _of_indices(n, np.arange(steps)[::-1] * (n // steps) + offset, t_min)


def trailing(schedule: Schedule, steps: int, t_max: float, t_min: float) -> Array:
    """Times of the indices round(N - i N/steps) - 1, then t_min: diffusers' "trailing".

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    arXiv:2305.08891, section 3.3.
    """
    n = _training_steps("trailing", schedule, steps)
    return _of_indices(n, np.round(n - np.arange(steps) * (n / steps)) - 1, t_min)


def lcm(
    schedule: Schedule, steps: int, t_max: float, t_min: float, original: float = 50.0
) -> Array:
    """Times of even picks from the `original` training steps of a distillation, then t_min.

    The evaluation times of diffusers 0.42.1 LCMScheduler and TCDScheduler (`original` is their
    `original_inference_steps`). Source: Luo et al., "Latent Consistency Models", arXiv:2310.04378.
    """
    n = _training_steps("lcm", schedule, steps)
    count = _whole("lcm", "original", original, steps, n)
    picks = np.floor(np.linspace(0, count, steps, endpoint=False))
    return _of_indices(n, (count - picks) * (n // count) - 1, t_min)


def consistency(
    schedule: Schedule, steps: int, t_max: float, t_min: float, levels: float = 40.0
) -> Array:
    """Times of every (levels // steps)-th of `levels` karras times, then t_min.

    The evaluation times of diffusers 0.42.1 CMStochasticIterativeScheduler (`levels` is its
    `num_train_timesteps`). Source: Song et al., "Consistency Models", arXiv:2303.01469.
    """
    count = _whole("consistency", "levels", levels, steps, MAX_STEPS)
    known = karras(schedule, max(count - 1, 1), t_max, max(t_min, schedule.t_floor))
    return np.append(known[:: count // steps][:steps], t_min)


_GRIDS: dict[str, Grid] = {
    grid.__name__: grid
    for grid in (
        uniform,
        quadratic,
        power,
        logsnr,
        karras,
        exponential,
        shift,
        linspace,
        leading,
        trailing,
        lcm,
        consistency,
    )
}
_SPACINGS = ("linspace", "leading", "trailing", "lcm")


def names() -> tuple[str, ...]:
    """The names of the grids.

    "power", "karras", "shift", "leading", "lcm" and "consistency" take a parameter in brackets.
    """
    return tuple(_GRIDS)


def build(
    schedule: Schedule,
    steps: int,
    grid: str | ArrayLike = "auto",
    *,
    t_max: float | None = None,
    t_min: float | None = None,
) -> Array:
    """The times of a sampling run.

    Args:
        schedule: Gives the default ends and the map between t and lambda.
        steps: Intervals of the grid, 1 to `MAX_STEPS`.
        grid: A name ("auto": the schedule's own), a name with a parameter, or steps + 1 explicit
            times.
        t_max, t_min: Ends in the schedule's units; None: the schedule's own. diffusers' spacings
            choose their first time themselves and end at t = 0 (sigma = 0) unless t_min says
            otherwise.

    Returns:
        float64 [steps + 1], strictly decreasing.

    Raises:
        ValueError: The name is unknown, or the times are not finite, not strictly decreasing or
            outside the schedule's domain.
        TypeError: steps is not an integer.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"grid: steps is an integer; got {steps!r}.")
    if steps < 1:
        raise ValueError(f"grid: steps is at least 1; got {shown(steps)}.")
    if steps > MAX_STEPS:
        raise ValueError(f"grid: steps is at most {MAX_STEPS}; got {shown(steps)}.")
    if not isinstance(grid, str):
        if t_max is not None or t_min is not None:
            raise ValueError(
                "grid: an explicit array has its own ends; got t_max or t_min as well. Drop them."
            )
        return check(schedule, _explicit(grid, steps))
    name, options = _parse(schedule.default_grid if grid == "auto" else grid)
    spacing = name in _SPACINGS
    if spacing and t_max is not None:
        raise ValueError(
            f"grid: {name!r} takes its first time from the training steps; got t_max = {t_max}. "
            "Drop it or give explicit times."
        )
    start = _end("t_max", t_max, schedule.t_max, schedule)
    stop = _end("t_min", t_min, 0.0 if spacing else schedule.t_min, schedule)
    if not (spacing or stop < start):
        raise ValueError(f"grid: t_min < t_max is needed; got t_min = {stop}, t_max = {start}.")
    times = _GRIDS[name](schedule, int(steps), start, stop, **options)
    if not spacing:
        times[0], times[-1] = start, stop  # to the last bit, whatever the map in between
    return check(schedule, times)


def check(schedule: Schedule, times: Array) -> Array:
    """The times themselves if they are a sampling grid of this schedule.

    A sampling grid runs from noise to data. Times that go up belong to plans that add noise on the
    way (the solvers "restart" and "recurrence") or encode data.

    Raises:
        ValueError: A time is not finite, not below the one before, or outside the schedule's
            domain.
    """
    if not np.all(np.isfinite(times)):
        bad = int(np.argmin(np.isfinite(times)))
        raise ValueError(f"grid: times are finite; got times[{bad}] = {times[bad]}.")
    falls = np.diff(times) < 0
    if not np.all(falls):
        i = int(np.argmin(falls))
        how = "repeats" if times[i] == times[i + 1] else "grows"
        advice = "Are there too many steps for it?"
        if np.all(np.diff(times) > 0):
            advice = "Is it reversed? A plan that encodes data is made of rows (fastdiff.Plan)."
        elif how == "grows":
            advice = "A row that draws noise goes up again: take 'restart' or 'recurrence'."
        raise ValueError(
            "grid: times strictly decrease from noise to data; from step "
            f"{i} to {i + 1} the time {how} ({times[i]:.6g} -> {times[i + 1]:.6g}). {advice}"
        )
    lo, hi = schedule.domain
    if times[0] > hi or times[-1] < lo:
        raise ValueError(
            f"grid: times lie in [{lo:g}, {hi:g}] for {schedule}; got {times[0]:.6g} to "
            f"{times[-1]:.6g}."
        )
    return times


def as_times(grid: Any) -> Array:
    """Explicit times, from a sequence, array or tensor, as float64 [n].

    Raises:
        TypeError: The grid is not a sequence of numbers.
        ValueError: A number is an integer beyond float64.
    """
    if hasattr(grid, "detach"):  # a tensor, on any device
        grid = grid.detach().cpu().numpy()
    try:
        text = np.array(grid).dtype.kind in "SU"  # numpy would read numbers out of it
        times = np.empty(()) if text else np.array(grid, dtype=np.float64)
    except OverflowError:
        raise ValueError(
            "grid: times are finite; got an integer that float64 cannot hold."
        ) from None
    except (TypeError, ValueError):
        times = np.empty(())
    if times.ndim == 0:
        raise TypeError(f"grid: a name or a sequence of times is needed; got {shown(grid)}.")
    return times


def _explicit(grid: Any, steps: int) -> Array:
    times = as_times(grid)
    if times.ndim != 1 or len(times) != steps + 1:
        raise ValueError(
            f"grid: explicit times have length steps + 1 = {steps + 1}; got shape {times.shape}."
        )
    return times


def _parse(text: str) -> tuple[str, dict[str, float]]:
    match = re.fullmatch(r"\s*([a-z]+)\s*(?:\(\s*([^()]*?)\s*\))?\s*", text)
    if match is None or match[1] not in _GRIDS:
        raise unknown("grid", "grid", text, [*_GRIDS, "auto"])
    name, value = match[1], match[2]
    if value is None or value == "":
        return name, {}
    parameters = list(inspect.signature(_GRIDS[name]).parameters)[4:]
    if not parameters:
        raise ValueError(f"grid: {name!r} takes no parameter; got {text!r}.")
    value = re.sub(rf"^{parameters[0]}\s*=\s*", "", value)
    try:
        return name, {parameters[0]: float(value)}
    except ValueError:
        raise ValueError(
            f"grid: {name}'s parameter {parameters[0]} is a number; got {text!r}."
        ) from None


def _end(name: str, value: float | None, default: float, schedule: Schedule) -> float:
    if value is None:
        return float(default)
    lo, hi = schedule.domain
    number = real("grid", name, value)
    if not lo <= number <= hi or not math.isfinite(number):
        raise ValueError(f"grid: {name} lies in [{lo:g}, {hi:g}] for {schedule}; got {value!r}.")
    return number


def _parameter(grid: str, name: str, value: float) -> None:
    if not 1e-2 <= value <= 1e3:
        raise ValueError(f"grid: {grid}'s {name} lies in [0.01, 1000]; got {value!r}.")


def _whole(grid: str, name: str, value: float, least: int, most: int) -> int:
    if not (least <= value <= most and value == int(value)):
        raise ValueError(
            f"grid: {grid}'s {name} lies between steps = {least} and {most}, whole; got {value:g}. "
            f"Take fewer steps, or give grid='{grid}({least})' or more."
        )
    return int(value)


def _in_lambda(
    name: str,
    schedule: Schedule,
    steps: int,
    t_max: float,
    t_min: float,
    levels: Callable[[float, float, int], Array],
) -> Array:
    """Times at `levels` of lambda, with a last step to sigma = 0 where the grid ends there."""
    first = float(schedule.lambda_t(t_max))
    if first == -math.inf:
        raise ValueError(
            f"grid: {name!r} needs alpha > 0 at its start; {schedule} has alpha = 0 at t_max = "
            f"{t_max:g}. Take grid='uniform' or 'quadratic', which start there."
        )
    to_zero = float(schedule.lambda_t(t_min)) == math.inf
    floor = schedule.t_floor if to_zero else t_min
    if to_zero and not floor < t_max:
        raise ValueError(
            f"grid: {name!r} reaches sigma = 0 from t = {floor:g}, which must lie below t_max; "
            f"got t_max = {t_max:g}."
        )
    count = steps - to_zero
    if count == 0:
        return np.array([t_max, t_min])
    times = schedule.t_of_lambda(levels(first, float(schedule.lambda_t(floor)), count))
    times[0], times[-1] = t_max, floor
    return np.append(times, t_min) if to_zero else times


def _training_steps(name: str, schedule: Schedule, steps: int) -> int:
    n = schedule.training_steps
    if n is None:
        raise ValueError(
            f"grid: {name!r} is a spacing of training steps and needs a VPDiscrete schedule; got "
            f"{schedule}. Use 'uniform', 'logsnr' or 'karras'."
        )
    if steps > n:
        raise ValueError(
            f"grid: {name!r} takes at most as many steps as the schedule has training steps "
            f"({n}); got {steps}."
        )
    return n


def _of_indices(n: int, indices: NDArray[Any], t_min: float) -> Array:
    return np.append((indices + 1.0) / n, t_min)
