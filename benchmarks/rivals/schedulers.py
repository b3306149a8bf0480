# SPDX-License-Identifier: Apache-2.0
"""diffusers' schedulers over given times, beside those that `rivals.diffusers` pairs with ours.

Each is built with its defaults and told its sigmas in float64. UniPC's and DPM-Solver++'s last step
goes where the times end (`final_sigmas_type="sigma_min"` off a flow). PNDM runs as Stable Diffusion
1.5 runs it, `skip_prk_steps=True`, and takes one evaluation beside those of its steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdiff.schedules import Schedule

from .fields import Field, Offered

# name -> (scheduler, options, evaluations beside those of the steps)
SAMPLERS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{
        f"UniPC {order} {kind}": (
            "UniPCMultistepScheduler",
            {"solver_order": order, "solver_type": kind},
            0,
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    },
    **{
        f"DPM++ {order}M": ("DPMSolverMultistepScheduler", {"solver_order": order}, 0)
        for order in (1, 2, 3)
    },
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}, 0),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}, 0),
    "LMS": ("LMSDiscreteScheduler", {}, 0),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, 1),
    "iPNDM": ("IPNDMScheduler", {}, 0),
}
# the DPM-Solvers are paired with ours by `rivals.diffusers`
_OFF_FLOWS = (*(n for n in SAMPLERS if n.startswith("UniPC")), "LMS", "PNDM", "iPNDM")
_ON_FLOWS = tuple(n for n in SAMPLERS if n not in ("LMS", "PNDM", "iPNDM"))


def offered(schedule: Schedule) -> Offered:
    names = _ON_FLOWS if schedule.straight == "velocity" else _OFF_FLOWS
    return {name: (2 if name == "Heun" else 1, SAMPLERS[name][2]) for name in names}


def final_state(name: str, field: Field, times: np.ndarray) -> torch.Tensor:
    """The state in which a scheduler ends over these times."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # diffusers calls some of its own options deprecated
        if name == "PNDM":
            return _pndm(field, times)
        if name == "iPNDM":
            return _ipndm(field, times)
        return _by_sigmas(name, field, times)


def _made(name: str, **options: Any) -> Any:
    import diffusers

    kind, own, _ = SAMPLERS[name]
    return getattr(diffusers, kind)(**own, **options)


def _follow(
    made: Any, variable: str, field: Field, x: torch.Tensor, evaluated: Sequence[float]
) -> torch.Tensor:
    """A run whose network is asked for a variable at the times that are evaluated."""
    with torch.no_grad():
        for step, t in zip(made.timesteps, evaluated, strict=True):
            x = made.step(field(variable, x, t), step, x, return_dict=False)[0]
    return x


def _by_sigmas(name: str, field: Field, times: np.ndarray) -> torch.Tensor:
    """Schedulers that read all they need of the schedule from their sigmas."""
    count, start = len(times) - 1, field.flow.start
    if field.schedule.straight == "velocity":  # sigma is the time
        if name in ("Euler", "Heun"):
            made = _made(name)
        else:
            made = _made(name, use_flow_sigmas=True, prediction_type="flow_prediction")
        made.set_timesteps(count)
        sigmas, evaluated = times, times[:-1]
        if name == "Heun":
            sigmas = np.append(times[0], np.repeat(times[1:], 2))
            evaluated = np.repeat(times, 2)[1:-2]
        made.sigmas = torch.from_numpy(sigmas)
        made.timesteps = 1000.0 * torch.from_numpy(evaluated)
        made.set_begin_index(0)
        return _follow(made, "velocity", field, start, evaluated.tolist())
    rho, alpha = field.rho(times), field.schedule.alpha(times)
    options = {} if name == "LMS" else {"final_sigmas_type": "sigma_min"}
    made = _made(name, prediction_type="epsilon", **options)
    made.set_timesteps(count)
    made.timesteps = torch.arange(count)
    made.set_begin_index(0)
    if name != "LMS":
        made.sigmas = torch.from_numpy(rho)
        return _follow(made, "epsilon", field, start, times[:-1].tolist())
    made.sigmas, x = rho, start / float(alpha[0])  # its state is x/alpha
    with torch.no_grad():
        for k, (t, scale) in enumerate(zip(times[:-1].tolist(), alpha.tolist(), strict=False)):
            x = made.step(field("epsilon", x * scale, t), k, x, return_dict=False)[0]
    return x * float(alpha[-1])


def _pndm(field: Field, times: np.ndarray) -> torch.Tensor:
    """A training schedule of its own that has these times alone."""
    count = len(times) - 1
    made = _made("PNDM", num_train_timesteps=count, trained_betas=[0.5] * count)
    squares = torch.from_numpy(field.schedule.alpha(times) ** 2)
    made.alphas_cumprod, made.final_alpha_cumprod = squares[:-1].flip(0), squares[-1]
    made.set_timesteps(count)
    evaluated = [float(times[count - 1 - int(step)]) for step in made.timesteps]
    return _follow(made, "epsilon", field, field.flow.start, evaluated)


def _ipndm(field: Field, times: np.ndarray) -> torch.Tensor:
    """Its network returns v; `alphas` and `betas` are alpha and sigma."""
    made = _made("iPNDM")
    made.set_timesteps(len(times) - 1)
    made.alphas = torch.from_numpy(field.schedule.alpha(times))
    made.betas = torch.from_numpy(field.schedule.sigma(times))
    made.timesteps = torch.arange(len(times) - 1)
    made.set_begin_index(0)
    return _follow(made, "v", field, field.flow.start, times[:-1].tolist())
