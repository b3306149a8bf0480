# SPDX-License-Identifier: Apache-2.0
"""diffusers: its schedulers on our times, and loops of `scheduler.step`.

The package is imported where it is used: without it everything else still runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fastdiff as fd
from fastdiff.bench.flows import VP, Flow
from fastdiff.bench.problems import Loop, Parts

TWO_M, TWO_M_SDE = "diffusers DPM++2M", "diffusers DPM++2M-SDE"
DEIS = "diffusers DEIS order 3"

SINGLESTEP = {"dpm-2": 2, "dpm-3": 3, "dpmpp-2s": 2, "dpmpp-3s": 3}
MULTISTEP = {"dpm-2m": 2, "dpm-3m": 3, "dpmpp-2m": 2, "dpmpp-3m": 3}
LOGRHO = {"deis-logrho-1": 1, "deis-logrho-2": 2, "deis-logrho-3": 3}
SOLVERS = ("ddim", "heun", *SINGLESTEP, *MULTISTEP, *LOGRHO)
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def schedulers(steps: int) -> dict[str, Any]:
    """diffusers' schedulers, on the schedule of Stable Diffusion, with their times set."""
    import diffusers

    betas = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "lower_order_final": False,
    }
    multistep = {**betas, "solver_order": 2, "final_sigmas_type": "sigma_min"}
    made: dict[str, Any] = {
        TWO_M: diffusers.DPMSolverMultistepScheduler(**multistep),
        TWO_M_SDE: diffusers.DPMSolverMultistepScheduler(
            **multistep, algorithm_type="sde-dpmsolver++"
        ),
        DEIS: diffusers.DEISMultistepScheduler(**betas, solver_order=3),
    }
    for scheduler in made.values():
        scheduler.set_timesteps(steps)
    return made


def run_loop(scheduler: Any, network: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


def loop_around(parts: Parts, network: Any = None) -> Loop:
    """diffusers' DPM++2M around a network; what `set_timesteps` makes is made beforehand."""
    scheduler = schedulers(parts.case.steps)[TWO_M]
    scheduler.set_timesteps(parts.case.steps, device=parts.start.device)
    called, cond = parts.network if network is None else network, parts.cond
    start, batch = parts.start, len(parts.start)

    def loop() -> torch.Tensor:
        # the scheduler goes back to its first step, without the price of set_timesteps
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        scheduler.lower_order_nums = 0
        scheduler.model_outputs = [None] * scheduler.config.solver_order
        x = start
        for t in scheduler.timesteps:
            out = called(x, t.expand(batch), **cond)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return loop


def one_step(x: torch.Tensor) -> Callable[[], Any]:
    """A step of diffusers' DPM++2M; each call takes the next one of a loop of 20."""
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(lower_order_final=False)
    scheduler.set_timesteps(20)
    out = torch.zeros_like(x)
    times, state = list(scheduler.timesteps), {"k": 0}

    def step() -> None:
        k = state["k"]
        if k == len(times):
            scheduler.set_timesteps(20)
            k = 0
        scheduler.step(out, times[k], x, return_dict=False)
        state["k"] = k + 1

    return step


def nodes(plan: fd.Plan) -> np.ndarray:
    """The times of all evaluations of a plan, and its last time."""
    return np.array([*(stage.t for stage in plan.stages), plan.times[-1]])


def scheduler_of(name: str, plan: fd.Plan, **their_options: Any) -> Any:
    """diffusers' scheduler of this name with its defaults, told to step through a plan's nodes.

    Its sigmas (sigma_t/alpha_t) are put in after `set_timesteps`, in float64. Its own use of a
    singlestep solver takes the inner nodes from the time grid; here they are ours.
    """
    import diffusers

    points = nodes(plan)
    count = len(points) - 1
    made: Any
    common = {"prediction_type": _PREDICTIONS[plan.prediction], **their_options}
    last = {"final_sigmas_type": "sigma_min"}
    if name == "ddim":
        made = diffusers.DDIMScheduler(
            num_train_timesteps=count,
            trained_betas=[0.5] * count,
            clip_sample=False,
            set_alpha_to_one=False,
            **common,
        )
        alpha_squared = torch.from_numpy(VP.alpha(points) ** 2)
        made.alphas_cumprod = alpha_squared[:-1].flip(0)
        made.final_alpha_cumprod = alpha_squared[-1]
        made.set_timesteps(count)
        return made
    if name == "heun":
        made = diffusers.HeunDiscreteScheduler(**common)
        made.set_timesteps(len(plan.times) - 1)
        rho = torch.from_numpy(VP.rho(np.array(plan.times)))
        made.sigmas = torch.cat([rho[:1], rho[1:].repeat_interleave(2)])[: count + 1]
        made.timesteps = torch.arange(count)
        made.set_begin_index(0)
        return made
    if name in LOGRHO:
        made = diffusers.DEISMultistepScheduler(solver_order=LOGRHO[name], **common)
    else:
        algorithm = "dpmsolver++" if name.startswith("dpmpp") else "dpmsolver"
        options = {**common, **last, "algorithm_type": algorithm}
        if name in MULTISTEP:
            order = MULTISTEP[name]
            made = diffusers.DPMSolverMultistepScheduler(solver_order=order, **options)
        else:
            order = SINGLESTEP[name]
            options["lower_order_final"] = False
            made = diffusers.DPMSolverSinglestepScheduler(solver_order=order, **options)
    made.set_timesteps(count)
    made.sigmas = torch.from_numpy(VP.rho(points))
    made.timesteps = torch.arange(count)
    made.set_begin_index(0)
    if name in SINGLESTEP:
        made.order_list = made.get_order_list(count)
    return made


def final_state(name: str, plan: fd.Plan, flow: Flow, **their_options: Any) -> torch.Tensor:
    """The state in which diffusers' solver ends over a plan's nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers calls some of its own options deprecated
        made = scheduler_of(name, plan, **their_options)
        points = nodes(plan)
        if name == "heun":  # it evaluates at the ends of each step; ours names the same times
            points = np.repeat(np.array(plan.times), 2)[1:]
        x = flow.start
        variance_exploding = name == "heun"  # its state is x/alpha
        if variance_exploding:
            x = x / float(VP.alpha(points[0]))
        for k, t in enumerate(made.timesteps):
            alpha = float(VP.alpha(points[k])) if variance_exploding else 1.0
            told = torch.full((len(x),), float(points[k]), dtype=torch.float64)
            output = flow.network((x * alpha).double(), told, **flow.cond)
            x = made.step(output, t, x, return_dict=False)[0]
        return x * float(VP.alpha(points[-1])) if variance_exploding else x
