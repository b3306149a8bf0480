# SPDX-License-Identifier: Apache-2.0
"""k-diffusion 0.1.1's samplers without noise, restated: the lines of `sampling.py` in its letters.

The package cannot be imported for its samplers alone: it asks for wandb, kornia, clean-fid and
others. Each function takes `model(x, sigma)`, which gives the denoised x, the start, and the
sigmas; noise (s_churn, eta) is 0. On a variance preserving schedule x stands for x/alpha and sigma
for sigma/alpha. On a flow, whose sigma/alpha is infinite at t = 1, the samplers that follow
dx/dsigma run in the flow's own x and sigma, as ComfyUI runs them.

Source: Crowson et al., k-diffusion 0.1.1, k_diffusion/sampling.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastdiff.schedules import Schedule

from .fields import Field, Offered

Model = Callable[[torch.Tensor, float], torch.Tensor]


def to_d(x: torch.Tensor, sigma: float, denoised: torch.Tensor) -> torch.Tensor:
    return (x - denoised) / sigma


def sample_euler(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = x + to_d(x, sigma, model(x, sigma)) * (sigma_next - sigma)
    return x


def sample_heun(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        d, dt = to_d(x, sigma, model(x, sigma)), sigma_next - sigma
        if sigma_next == 0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            x = x + (d + to_d(x_2, sigma_next, model(x_2, sigma_next))) / 2 * dt
    return x


def sample_dpm_2(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        d = to_d(x, sigma, model(x, sigma))
        if sigma_next == 0:
            x = x + d * (sigma_next - sigma)
        else:
            sigma_mid = math.sqrt(sigma * sigma_next)
            x_2 = x + d * (sigma_mid - sigma)
            x = x + to_d(x_2, sigma_mid, model(x_2, sigma_mid)) * (sigma_next - sigma)
    return x


def sample_lms(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    ds: list[torch.Tensor] = []
    for i, sigma in enumerate(sigmas[:-1]):
        ds = [to_d(x, sigma, model(x, sigma)), *ds[:3]]
        nodes = np.array(sigmas[i::-1][: len(ds)])
        for j, d in enumerate(ds):
            basis = np.poly1d([1.0])
            for k, node in enumerate(nodes):
                if k != j:
                    basis = basis * np.poly1d([1.0, -node]) / (nodes[j] - node)
            whole = basis.integ()
            x = x + float(whole(sigmas[i + 1]) - whole(sigma)) * d
    return x


def sample_dpmpp_2s(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """`sample_dpmpp_2s_ancestral` with eta = 0."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = model(x, sigma)
        h, mid = math.log(sigma / sigma_next), math.sqrt(sigma * sigma_next)
        x_2 = (mid / sigma) * x - math.expm1(-h / 2) * denoised
        x = (sigma_next / sigma) * x - math.expm1(-h) * model(x_2, mid)
    return x


def sample_dpmpp_2m(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    old, h_last = None, 0.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised, h = model(x, sigma), math.log(sigma / sigma_next)
        ahead = denoised
        if old is not None:
            ahead = (1 + h / (2 * h_last)) * denoised - h / (2 * h_last) * old
        x = (sigma_next / sigma) * x - math.expm1(-h) * ahead
        old, h_last = denoised, h
    return x


def sample_dpmpp_2m_sde(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """With eta = 0 and solver_type="heun"; "midpoint" is then `sample_dpmpp_2m`."""
    old, h_last = None, 0.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised, h = model(x, sigma), math.log(sigma / sigma_next)
        x = sigma_next / sigma * x - math.expm1(-h) * denoised
        if old is not None:
            x = x + (math.expm1(-h) / h + 1) * (h / h_last) * (denoised - old)
        old, h_last = denoised, h
    return x


def sample_dpmpp_3m_sde(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """With eta = 0."""
    known: list[tuple[torch.Tensor, float]] = []  # denoised and the step that followed it
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised, h = model(x, sigma), math.log(sigma / sigma_next)
        x = math.exp(-h) * x - math.expm1(-h) * denoised
        phi_2 = math.expm1(-h) / h + 1
        if len(known) == 2:
            (denoised_1, h_1), (denoised_2, h_2) = known
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h - 0.5) * (d1_0 - d1_1) / (r0 + r1)
        elif known:
            x = x + phi_2 * (denoised - known[0][0]) * h / known[0][1]
        known = [(denoised, h), *known[:1]]
    return x


def sample_dpm_fast(model: Model, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Of the sigmas the first and the last: it takes len(sigmas) - 1 evaluations in between."""
    n = len(sigmas) - 1
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    ts = np.linspace(-math.log(sigmas[0]), -math.log(sigmas[-1]), len(orders) + 1).tolist()

    def eps(x: torch.Tensor, t: float) -> torch.Tensor:
        return to_d(x, math.exp(-t), model(x, math.exp(-t)))

    for order, t, t_next in zip(orders, ts[:-1], ts[1:], strict=True):
        h, e = t_next - t, eps(x, t)
        whole = x - math.exp(-t_next) * math.expm1(h) * e
        if order == 1:
            x = whole
        elif order == 2:
            s = t + h / 2
            e_1 = eps(x - math.exp(-s) * math.expm1(h / 2) * e, s)
            x = whole - math.exp(-t_next) * math.expm1(h) * (e_1 - e)
        else:
            s1, s2, r2h = t + h / 3, t + 2 * h / 3, 2 * h / 3
            e_1 = eps(x - math.exp(-s1) * math.expm1(h / 3) * e, s1)
            u2 = x - math.exp(-s2) * math.expm1(r2h) * e
            e_2 = eps(u2 - math.exp(-s2) * 2 * (math.expm1(r2h) / r2h - 1) * (e_1 - e), s2)
            x = whole - math.exp(-t_next) * 1.5 * (math.expm1(h) / h - 1) * (e_2 - e)
    return x


# name -> (the sampler, evaluations a step)
SAMPLERS = {
    "sample_euler": (sample_euler, 1),
    "sample_heun": (sample_heun, 2),
    "sample_dpm_2": (sample_dpm_2, 2),
    "sample_lms": (sample_lms, 1),
    "sample_dpm_fast": (sample_dpm_fast, 1),
    "sample_dpmpp_2s_ancestral, eta=0": (sample_dpmpp_2s, 2),
    "sample_dpmpp_2m": (sample_dpmpp_2m, 1),
    "sample_dpmpp_2m_sde, eta=0": (sample_dpmpp_2m_sde, 1),
    "sample_dpmpp_3m_sde, eta=0": (sample_dpmpp_3m_sde, 1),
}
_ON_FLOWS = ("sample_euler", "sample_heun", "sample_dpm_2", "sample_lms")


def offered(schedule: Schedule) -> Offered:
    names = _ON_FLOWS if schedule.straight == "velocity" else tuple(SAMPLERS)
    return {name: (SAMPLERS[name][1], 0) for name in names}


def final_state(name: str, field: Field, times: np.ndarray) -> torch.Tensor:
    """The state in which a sampler ends over these times."""
    sample, _ = SAMPLERS[name]
    schedule, x = field.schedule, field.flow.start
    if schedule.straight == "velocity":  # sigma is the time
        return sample(lambda x, t: x - t * field("velocity", x, t), x, times.tolist())

    def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
        t = field.time(sigma)
        return field("x0", x * float(schedule.alpha(t)), t)

    scale = schedule.alpha(times)
    return sample(model, x / float(scale[0]), field.rho(times).tolist()) * float(scale[-1])
