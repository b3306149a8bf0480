# SPDX-License-Identifier: Apache-2.0
"""Samplers of distilled networks end where diffusers' schedulers end, on given noise."""

import numpy as np
import pytest
import torch

import fastdiff as fd

diffusers = pytest.importorskip("diffusers")
SD, EDM = fd.schedules.VPDiscrete.scaled_linear(), fd.schedules.EDM()
THEIRS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
F64 = torch.float64


def network(x, t):
    """What any prediction may be: diffusers' schedulers ask no more of it."""
    return 0.6 * torch.tanh(x) - 0.1 * x + 1e-4 * t.to(x.dtype).reshape(-1, 1)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def fed(monkeypatch, module, xi):
    """Makes a scheduler draw `xi`, in order."""
    draws = iter(xi)
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: next(draws))


def doubled(scheduler):
    """A scheduler of Stable Diffusion's schedule with our own alphas_cumprod, in float64."""
    scheduler.alphas_cumprod = torch.from_numpy(SD.alphas_cumprod)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)
    return scheduler


def their_run(scheduler, x, **options):
    for t in scheduler.timesteps:
        out = network(x, torch.full((len(x),), float(t)))
        x = scheduler.step(out, int(t), x, return_dict=False, **options)[0]
    return x


def indices(plan):
    return [round(float(stage.model_time), 9) for stage in plan.stages]


@pytest.mark.parametrize("prediction", THEIRS)
@pytest.mark.parametrize(("steps", "original"), [(1, 50), (2, 50), (4, 50), (8, 50), (7, 30)])
def test_lcm_is_diffusers(monkeypatch, prediction, steps, original):
    scheduler = doubled(
        diffusers.LCMScheduler(
            prediction_type=THEIRS[prediction], original_inference_steps=original
        )
    )
    scheduler.set_timesteps(steps)
    grid = "auto" if original == 50 else f"lcm({original})"
    plan = fd.plan(SD, "lcm", steps, grid=grid, prediction=prediction)
    assert indices(plan) == scheduler.timesteps.tolist()
    x, xi = values(3, 5), values(steps, 3, 5, seed=1)
    fed(monkeypatch, "scheduling_lcm", xi)
    wanted = their_run(scheduler, x)
    torch.testing.assert_close(fd.sample(network, x, plan, xi=xi), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"clip_sample": True, "clip_sample_range": 0.7}, {"clip": 0.7}),
        ({"timestep_scaling": 0.01}, {"timestep_scaling": 0.01}),
    ],
)
def test_options_of_lcm_are_diffusers(monkeypatch, theirs, ours):
    scheduler = doubled(diffusers.LCMScheduler(**theirs))
    scheduler.set_timesteps(4)
    x, xi = values(3, 5), values(4, 3, 5, seed=1)
    fed(monkeypatch, "scheduling_lcm", xi)
    wanted = their_run(scheduler, x)
    got = fd.sample(network, x, fd.plan(SD, "LCMScheduler", 4, **ours), xi=xi)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    assert float((got - fd.sample(network, x, fd.plan(SD, "lcm", 4), xi=xi)).abs().max()) > 1e-3


@pytest.mark.parametrize("prediction", THEIRS)
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd_is_diffusers(monkeypatch, prediction, gamma, steps):
    scheduler = doubled(diffusers.TCDScheduler(prediction_type=THEIRS[prediction]))
    scheduler.set_timesteps(steps)
    plan = fd.plan(SD, "tcd", steps, prediction=prediction, gamma=gamma)
    assert indices(plan) == scheduler.timesteps.tolist()
    x, xi = values(3, 5), values(steps, 3, 5, seed=1)
    fed(monkeypatch, "scheduling_tcd", xi)
    wanted = their_run(scheduler, x, eta=gamma)
    torch.testing.assert_close(fd.sample(network, x, plan, xi=xi), wanted, rtol=1e-11, atol=1e-11)


def test_diffusers_tcd_neither_clips_nor_thresholds(monkeypatch):
    x, xi, found = values(3, 5), values(4, 3, 5, seed=1), []
    for options in ({}, {"clip_sample": True}, {"thresholding": True}):
        scheduler = doubled(diffusers.TCDScheduler(**options))
        scheduler.set_timesteps(4)
        fed(monkeypatch, "scheduling_tcd", xi)
        found.append(their_run(scheduler, x, eta=0.3))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    clipped = fd.sample(network, x, fd.plan(SD, "tcd", 4, clip=0.1), xi=xi)
    assert float((clipped - found[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 39])
def test_consistency_is_diffusers(monkeypatch, steps, clip):
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=clip)
    scheduler.set_timesteps(steps)
    options = {} if clip else {"clip": None}
    plan = fd.plan(EDM, "CMStochasticIterativeScheduler", steps, prediction="edm", **options)
    told = [1000.0 * stage.model_time for stage in plan.stages]
    np.testing.assert_allclose(told, scheduler.timesteps, rtol=1e-12)
    scheduler.sigmas = torch.tensor(plan.times, dtype=F64)  # theirs are float32
    x, xi = 80.0 * values(3, 5), values(steps, 3, 5, seed=1)
    fed(monkeypatch, "scheduling_consistency_models", xi)
    wanted = x
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(wanted, t), torch.full((3,), float(t) / 1000.0))
        wanted = scheduler.step(out, t, wanted, return_dict=False)[0]
    got = fd.sample(network, x, plan, xi=xi)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_lcm_on_a_flow_is_diffusers(monkeypatch):
    scheduler = diffusers.FlowMatchLCMScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.double().tolist()
    x, xi = values(3, 5), values(4, 3, 5, seed=1)
    fed(monkeypatch, "scheduling_flow_match_lcm", xi)
    wanted = x
    for t in scheduler.timesteps:
        out = network(wanted, torch.full((3,), float(t)))
        wanted = scheduler.step(out, t, wanted, return_dict=False)[0]
    schedule = fd.schedules.FlowMatching(time_scale=1000.0)
    plan = fd.plan(schedule, "FlowMatchLCMScheduler", 4, grid=sigmas, prediction="velocity")
    got = fd.sample(network, x, plan, xi=xi)
    torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=1e-5)  # theirs is float32
