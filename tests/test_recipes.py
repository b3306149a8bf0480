# SPDX-License-Identifier: Apache-2.0
"""The recipe of docs/choosing.md gives what diffusers' schedulers give."""

import re
from pathlib import Path

import pytest
import torch

import fastdiff as fd

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DOCUMENT = Path(__file__).parents[1] / "docs" / "choosing.md"


def recipe():
    text = DOCUMENT.read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names["plan_like"]


def network(x, t):
    return torch.tanh(3.0 * x) * torch.cos(t / 90.0)[:, None]


def of_scheduler(scheduler, x):
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)).float())
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "spacing", [{}, *({f"use_{s}": True} for s in ("karras_sigmas", "exponential_sigmas"))]
)
@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("DPMSolverMultistepScheduler", "dpmpp-2m"),
        ("EulerDiscreteScheduler", "euler"),
        *(
            (f"{kind}Scheduler", f"{kind}Scheduler")
            for kind in (
                "DPMSolverSinglestep", "UniPCMultistep", "LMSDiscrete", "HeunDiscrete",
                "KDPM2Discrete",
            )
        ),
    ],
)  # fmt: skip
def test_a_plan_like_a_scheduler_gives_its_samples(kind, solver, spacing):
    scheduler = getattr(diffusers, kind)(1000, **SD, **spacing)
    scheduler.set_timesteps(20)
    schedule = fd.schedules.VPDiscrete.scaled_linear(0.00085, 0.012, 1000)
    noise = fd.noise.normal((4, 6), seeds=0)
    plan = recipe()(scheduler, schedule, solver)
    scale = 1.0
    if "Discrete" in kind:  # these scale the noise, for a state of sigma / alpha
        scale = float(scheduler.init_noise_sigma) / float(1.0 + scheduler.sigmas[0] ** 2) ** 0.5
    ours, theirs = fd.sample(network, noise * scale, plan), of_scheduler(scheduler, noise)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-5


@pytest.mark.parametrize(("clean", "end"), [(True, 0.0), (False, 1 / 1000)])
@pytest.mark.parametrize(
    ("kind", "solver", "options"),
    [
        ("DDIMScheduler", "ddim", {"clip_sample": False}),
        ("PNDMScheduler", "plms", {"skip_prk_steps": True}),
        ("PNDMScheduler", "pndm", {}),
    ],
)
def test_the_times_of_a_training_schedule_end_where_set_alpha_to_one_says(
    kind, solver, options, clean, end
):
    options = {**options, "steps_offset": 1, "set_alpha_to_one": clean}
    scheduler = getattr(diffusers, kind)(1000, **SD, **options)
    scheduler.set_timesteps(10)
    times = getattr(scheduler, "_timesteps", scheduler.timesteps)
    grid = [(t + 1) / 1000 for t in sorted({float(t) for t in times}, reverse=True)] + [end]
    schedule = fd.schedules.VPDiscrete.scaled_linear(0.00085, 0.012, 1000)
    noise = fd.noise.normal((4, 6), seeds=0)
    ours = fd.sample(network, noise, fd.plan(schedule, solver, 10, grid=grid))
    theirs = of_scheduler(scheduler, noise)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-5


def test_deis_is_that_of_its_name():
    scheduler = diffusers.DEISMultistepScheduler(1000, **SD)
    scheduler.set_timesteps(10)
    schedule = fd.schedules.VPDiscrete.scaled_linear(0.00085, 0.012, 1000)
    noise = fd.noise.normal((4, 6), seeds=0)
    plan = recipe()(scheduler, schedule, "DEISMultistepScheduler")
    ours, theirs = fd.sample(network, noise, plan), of_scheduler(scheduler, noise)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-5
