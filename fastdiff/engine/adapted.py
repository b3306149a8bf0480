# SPDX-License-Identifier: Apache-2.0
"""`fastdiff.adaptive`: sampling with steps as long as an error allows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import grids
from .._text import shown
from ..conditioning import check, varies
from ..guidance import Guidance
from ..plans import Plan
from ..schedules import Schedule, prediction_name
from ..schedules.base import positive, real
from ..solvers.base import choice
from ..solvers.embedded import Embedded
from ..solvers.embedded_dpm import EmbeddedDPM
from ..solvers.registry import adaptive_get
from ..solvers.rows import Rows
from .adaptive import Adaptive, Tolerance
from .call import Call, check_state, check_tracking, check_untransformed
from .job import Job, job_of
from .pacing import PI, Authors, Controller, KDiffusion, Track
from .streams import capture_of

_FIRST = 0.1  # of the whole range: the first step that is tried
_PUBLISHED: dict[str, type[Authors] | type[KDiffusion]] = {
    "dpm-solver": Authors,
    "k-diffusion": KDiffusion,
}


@dataclass(frozen=True, eq=False)
class Adapted:
    """What an adaptive run gives.

    Attributes:
        x: The samples, of the shape and dtype of the x that was given, the caller's own.
        times: The times that each sample's steps were accepted at, from noise to data.
        nfe: Network evaluations of each sample; an evaluation under guidance counts one.
        refused: Steps of each sample that were tried and refused.
        solver: The embedded pair, a `fastdiff.solvers.Solver`.
        schedule, prediction: As they were given.
    """

    x: torch.Tensor
    times: tuple[tuple[float, ...], ...]
    nfe: tuple[int, ...]
    refused: tuple[int, ...]
    solver: Embedded
    schedule: Schedule
    prediction: str

    def plan(self, sample: int | None = None) -> Plan:
        """The accepted steps of a sample as a fixed plan, for graphs, gradients and other samples.

        `fastdiff.sample(network, x[b : b + 1], result.plan(b))` is `result.x[b : b + 1]` bit for
        bit on the backend that it came from, where the network's output does not depend on the
        batch that it is called on. The plan takes no evaluation for an error.

        Args:
            sample: Its place in the batch; None: all samples share their times.

        Raises:
            ValueError: There is no such sample, or the samples have times of their own.
        """
        count = len(self.times)
        if count == 0:
            raise ValueError("Adapted.plan: a plan has the times of a sample; got a run of none.")
        if sample is None:
            if len(set(self.times)) != 1:
                raise ValueError(
                    "Adapted.plan: a plan has the times of one sample; got none named, among "
                    f"{count} whose times differ. Give plan(sample), one for each, as a "
                    "fastdiff.Batcher takes them."
                )
            sample = 0
        whole = isinstance(sample, int | np.integer) and not isinstance(sample, bool)
        if not whole or not -count <= sample < count:
            raise ValueError(
                f"Adapted.plan: sample is a place in the batch, below {count}; got {sample!r}."
            )
        times = self.times[sample]
        return self.solver.plan(
            self.schedule, len(times) - 1, grid=np.array(times), prediction=self.prediction
        )


def adaptive(
    network: Any,
    x: torch.Tensor,
    schedule: Schedule,
    solver: str | Embedded = "bosh3",
    *,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float | None = None,
    max_nfe: int = 1000,
    t_max: float | None = None,
    t_min: float | None = None,
    prediction: str = "epsilon",
    cond: Any = None,
    guidance: Guidance | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    shared: bool = False,
    published: bool | str = False,
    graph: Any = "auto",
    gradient: Any = None,
    **options: Any,
) -> Adapted:
    """Samples with steps that an embedded pair of two orders chooses.

    An attempt of a step from s to t gives x_t and, of the same evaluations, what the order below
    would have given. The step is kept where E <= 1,

        E = rms((x_t - x_low) / (atol s_t + rtol max(|x_s| s_t/s_s, |x_t|))),

    s = hypot(alpha, sigma), and tried again shorter where it is not. Each sample has its own error,
    its own steps and its own end: what it becomes does not depend on the batch that it is in. The
    network is called for the samples that need it, and one number a sample and attempt comes to the
    host. Coefficients depend on the data here, so that nothing can be captured or differentiated:
    `Adapted.plan` replays the accepted times as a fixed plan, which can.

    Args:
        network: As `fastdiff.Sampler` takes it.
        x: State at t_max, [B, ...]; it is left as it is.
        schedule: A `fastdiff.schedules.Schedule`.
        solver: A name in `fastdiff.solvers.adaptive_names()`, or such a solver. "bosh3" is the
            cheapest at loose tolerances, "dopri5" below rtol = 1e-3; both start where alpha = 0,
            as FlowMatching does. "dpm-12" and "dpm-23" are DPM-Solver's.
        rtol, atol: Tolerances of a step, in units of data of standard deviation 1; one may be 0.
        h_init: Length of the first step that is tried, in the solver's own variable: lambda, or the
            angle atan(sigma/alpha) of form "v", or t of form "velocity". None: a tenth of the whole
            range, and 0.05 with `published`.
        max_nfe: Evaluations that a sample may take.
        t_max, t_min: Ends of the run in the schedule's units; None: the schedule's own. Where sigma
            is 0 at t_min the steps end at `schedule.t_floor`, and a last one is x = alpha x0; a
            network of velocities on a straight flow is followed down to t_min itself.
        prediction: What the network returns, as `fastdiff.plan` takes it.
        cond, guidance, backend, dtype: As `fastdiff.sample` takes them. A scale of the guidance is
            a number or one a sample.
        shared: True takes one step for the whole batch, as long as its worst sample allows. A batch
            then has one plan and costs the host less, and its samples depend on each other.
        published: "dpm-solver" or "k-diffusion" is that library's loop with its norm, controller
            and one step for the whole batch, for dpm-12 and dpm-23. True takes k-diffusion's where
            alpha = 1 throughout (EDM), which is its frame, and the authors' elsewhere.
        graph, gradient: None; others are refused, with what to do.
        **options: The solver's own (`fastdiff.solvers.adaptive_info(name).options`).

    Returns:
        The samples, their times and costs: an `Adapted`.

    Raises:
        ValueError: A value is wrong; the network returned NaN; or the tolerance was not met within
            max_nfe (a `ToleranceNotMet`, which is a RuntimeError too). The message names the sample
            and the time.
        TypeError: A value is of the wrong kind.
        NotImplementedError: A graph, a gradient or conditioning that changes by stage is asked for.

    Source: Lu et al., "DPM-Solver", arXiv:2206.00927, appendix C; Bogacki & Shampine (1989);
    Dormand & Prince (1980); Gustafsson (1991).
    """
    _check_refused(graph, gradient, x)
    _check_network(network, dtype)
    choice("adaptive", "shared", shared, (False, True))
    pair = adaptive_get(solver, options)
    times, jump = _ends(pair, schedule, t_max, t_min, prediction)
    tolerance = _tolerance(rtol, atol, max_nfe, pair)
    steps = np.array([*times, *([] if jump is None else [jump])])
    plan = pair.plan(schedule, len(steps) - 1, grid=steps, prediction=prediction)
    job = job_of(network, plan, guidance, backend, dtype, False)
    call = Call(x, cond)
    _check_call(call, job, functools.partial(_parameters, network))
    whole = pair.progress(schedule, times[-1]) - pair.progress(schedule, times[0])
    make = _controllers(pair, schedule, published, h_init, whole)
    groups = [[b] for b in range(call.batch)]
    if shared or published:
        groups = [list(range(call.batch))]
    tracks = [Track(group, make(), [times[0]]) for group in groups]
    with torch.no_grad():
        result = x.detach().clone(memory_format=torch.contiguous_format)
        if call.batch and x[0].numel():
            joined = job.guidance.conditions(cond, call.batch)
            run = Adaptive(job, pair, Call(x, joined), tolerance, tracks, (times[-1], jump))
            result.copy_(run.sample())
        else:
            tracks = []
    of = {b: track for track in tracks for b in track.samples}
    each = [of[b] for b in range(len(of))]
    return Adapted(
        x=result,
        times=tuple(tuple(track.times) for track in each),
        nfe=tuple(track.nfe for track in each),
        refused=tuple(track.refused for track in each),
        solver=pair,
        schedule=schedule,
        prediction=plan.prediction,
    )


# -- what was given --------------------------------------------------------------------------------


def _check_refused(graph: Any, gradient: Any, x: Any) -> None:
    """Raises where coefficients that depend on the data cannot be what is asked for."""
    replay = (
        "Replay the accepted times as a fixed plan: result = fastdiff.adaptive(...), then "
        "fastdiff.sample(network, x, result.plan(sample), ...)"
    )
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "adaptive: steps depend on the data, and a compiled graph has the same always; got "
            f"a call inside torch.compile. {replay}, which compiles."
        )
    if graph is not None and not (isinstance(graph, str) and graph == "auto"):
        raise NotImplementedError(
            "adaptive: steps depend on the data, and a captured graph has the same always; got "
            f"graph={graph!r}. {replay}, which takes graph={graph!r}."
        )
    if gradient is not None:
        raise NotImplementedError(
            "adaptive: which steps are kept has no derivative; got "
            f"gradient={gradient!r}. {replay}, which takes gradient={gradient!r}."
        )
    if isinstance(x, torch.Tensor) and capture_of(x.device) is not None:
        raise RuntimeError(
            "adaptive: every step waits for its error on the host; got a call while the current "
            f"stream is recorded into a graph. {replay}, which can be recorded."
        )


def _check_network(network: Any, dtype: Any) -> None:
    if not callable(network):
        raise TypeError(f"adaptive: network is callable as network(x, t); got {network!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"adaptive: dtype is a floating torch.dtype; got {dtype!r}.")


def _ends(
    pair: Embedded, schedule: Any, t_max: float | None, t_min: float | None, prediction: str
) -> tuple[list[float], float | None]:
    """First and last time of the steps, and the time of a jump after them."""
    if not isinstance(schedule, Schedule):
        raise TypeError(
            "adaptive: schedule is a fastdiff.schedules.Schedule; got "
            f"{type(schedule).__name__}. It takes no plan: the steps are its own."
        )
    start, stop = grids.build(schedule, 1, "uniform", t_max=t_max, t_min=t_min).tolist()
    lengths = [pair.progress(schedule, start)]
    if not math.isfinite(lengths[0]):
        raise ValueError(
            f"{pair.name}: steps are steps in lambda, which is infinite at t_max = {start:g} of "
            f"{schedule}, where alpha is 0; got that start. Take 'bosh3' or 'dopri5', whose "
            "form 'v' starts there."
        )
    rows = Rows(schedule, prediction_name(prediction), pair.variable(schedule, np.empty(0)))
    if not pair.jumps(rows, stop):
        return [start, stop], None
    floor = schedule.t_floor
    return ([start, floor] if floor < start else [start]), stop


def _tolerance(rtol: Any, atol: Any, max_nfe: Any, pair: Embedded) -> Tolerance:
    numbers = {"rtol": real("adaptive", "rtol", rtol), "atol": real("adaptive", "atol", atol)}
    for name, value in numbers.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"adaptive: {name} is finite and not negative; got {value!r}.")
    if not any(numbers.values()):
        raise ValueError(
            "adaptive: no step is without an error; got rtol = 0 and atol = 0. Give one of them."
        )
    if isinstance(max_nfe, bool) or not isinstance(max_nfe, int | np.integer):
        raise TypeError(f"adaptive: max_nfe is an integer; got {shown(max_nfe)}.")
    if max_nfe < pair.evaluations:
        raise ValueError(
            f"adaptive: a step of {pair.name} takes {pair.evaluations} evaluations; got max_nfe = "
            f"{max_nfe}. Give more."
        )
    return Tolerance(numbers["rtol"], numbers["atol"], int(max_nfe))


def _controllers(
    pair: Embedded, schedule: Schedule, published: Any, h_init: Any, whole: float
) -> Callable[[], Controller]:
    """What makes a controller of each track."""
    h = None if h_init is None else positive("adaptive", "h_init", h_init)
    if published is False:
        return lambda: PI(pair.order, _FIRST * whole if h is None else h)
    if published is True:
        ends = np.array([schedule.t_max, schedule.t_floor])
        published = "k-diffusion" if bool(np.all(schedule.alpha(ends) == 1.0)) else "dpm-solver"
    if not isinstance(published, str) or published not in _PUBLISHED:
        names = ", ".join(map(repr, _PUBLISHED))
        raise ValueError(f"adaptive: published is False, True, {names}; got {published!r}.")
    if not isinstance(pair, EmbeddedDPM):
        raise ValueError(
            f"adaptive: the published loops are those of dpm-12 and dpm-23; got published="
            f"{published!r} for {pair.name}. Leave it out."
        )
    make = _PUBLISHED[published]
    return lambda: make(pair.order, 0.05 if h is None else h)


def _check_call(call: Call, job: Job, parameters: Callable[[], Any]) -> None:
    guidance = job.guidance
    check_state(call.x)
    if call.x.is_meta:
        raise ValueError(
            "adaptive: steps depend on the data; got x on the meta device, which has none. Give "
            "x on the device of the network."
        )
    check_untransformed(call, None, parameters)
    check_tracking(call, None, guidance.conditions_given())
    check(call.cond, call.batch, device=call.x.device)
    if varies(call.cond):
        raise NotImplementedError(
            "adaptive: how many stages a run has is known at its end; got a PerStage in the "
            "conditioning. Give the conditioning of a sample as a whole."
        )
    if isinstance(getattr(guidance, "scale", None), tuple):
        raise NotImplementedError(
            "adaptive: how many stages a run has is known at its end; got a guidance with one "
            "scale a stage. Give a number, or a tensor of one a sample."
        )
    guidance.check(job.plan, call.batch)


def _parameters(network: Any) -> tuple[torch.Tensor, ...]:
    return tuple(network.parameters()) if isinstance(network, torch.nn.Module) else ()
