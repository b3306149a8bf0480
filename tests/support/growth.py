# SPDX-License-Identifier: Apache-2.0
"""Samplers of the catalogue that need more than sums, each written as a table."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import torch

import fastdiff as fd
from fastdiff.solvers import Row, Rows


def clipped_ddim(
    schedule: fd.schedules.Schedule,
    times: Any,
    *,
    eta: float = 0.0,
    prediction: str = "epsilon",
    **limit: Any,
) -> fd.Plan:
    """diffusers' DDIM with `clip_sample` or `thresholding`: a limited x0 beside the raw epsilon.

        h = limit(y), y = x0;   x' = alpha' h + d (x - alpha y) / sigma + s z
        d² = sigma'² - s²,      s = eta sigma'/sigma sqrt(1 - alpha²/alpha'²)

    Args:
        schedule: The schedule.
        times: Decreasing, from the first evaluation to the end.
        eta: Share of fresh noise.
        prediction: What the network returns.
        **limit: `clip=` or `threshold=` as `fastdiff.Stage` has it.
    """
    rows = Rows(schedule, prediction, "x0", len(times) - 1)
    for t, after in itertools.pairwise(float(t) for t in times):
        (alpha, sigma), (alpha_next, sigma_next) = (
            (float(schedule.alpha(at)), float(schedule.sigma(at))) for at in (t, after)
        )
        s = eta * sigma_next / sigma * math.sqrt(1.0 - alpha**2 / alpha_next**2)
        d = math.sqrt(max(sigma_next**2 - s**2, 0.0)) / sigma
        x = Row(x=d, outputs={rows.current: alpha_next}, noise=s)
        rows.add(t, x=x, b_raw=-d * alpha, **limit)
    return fd.Plan(
        tuple(rows.stages), tuple(times), "ddim, clipped", prediction, "x0", schedule=schedule
    )


def inpainted(plan: fd.Plan, mask: int = 0, known: int = 1, noise: int = 2) -> fd.Plan:
    """The plan with x' -> (1 - M) x' + M (alpha' known + sigma' noise) after each step.

    Args:
        plan: One stage a step, evaluated at x.
        mask, known, noise: Entries of the bank.
    """
    made = []
    for stage, t in zip(plan.stages, plan.times[1:], strict=True):
        alpha, sigma = float(plan.schedule.alpha(t)), float(plan.schedule.sigma(t))
        blend = (
            fd.Product("x", -1.0, mask, "new"),
            fd.Product("x", alpha, mask, "bank", known),
            fd.Product("x", sigma, mask, "bank", noise),
        )
        made.append(dataclasses.replace(stage, products=(*stage.products, *blend)))
    return dataclasses.replace(plan, stages=tuple(made), solver=f"{plan.solver}, inpainted")


def corrected(
    schedule: fd.schedules.Schedule, times: Any, *, snr: float, prediction: str = "epsilon"
) -> fd.Plan:
    """DDIM steps in score form, each followed by a Langevin step at its end.

        x <- x + delta g + sqrt(2 delta) z,   delta = 2 alpha² (snr ||z|| / ||g||)²

    Source: Song et al., arXiv:2011.13456, algorithm 5, whose alpha is 1 - beta: here alpha² of the
    schedule.
    """
    rows = Rows(schedule, prediction, "score", len(times) - 1)
    score, z = fd.Reduction("norm", ("y",)), fd.Reduction("norm", ("xi",))
    for t, after in itertools.pairwise(float(t) for t in times):
        (alpha, sigma), (alpha_next, sigma_next) = (
            (float(schedule.alpha(at)), float(schedule.sigma(at))) for at in (t, after)
        )
        a = alpha_next / alpha
        rows.add(t, x=Row(x=a, outputs={rows.current: a * sigma**2 - sigma_next * sigma}))
        size = math.sqrt(2.0) * alpha_next * snr  # of sqrt(delta), but for the norms
        rows.add(
            after,
            x=Row(outputs={rows.current: 1.0}, noise=1.0),
            measures=(
                fd.Measure(0, z, score, power=2.0, weight=size**2),
                fd.Measure(1, z, score, weight=math.sqrt(2.0) * size),
            ),
            scalars={"b_0": 0, "c": 1},
        )
    return fd.Plan(
        tuple(rows.stages), tuple(times), "ddim, corrected", prediction, "score", schedule=schedule
    )


def rescaled(plan: fd.Plan, phi: float) -> fd.Plan:
    """The plan with each guided output scaled towards the conditional one's standard deviation.

        out <- (1 - phi + phi std(cond) / std(out)) out

    Args:
        plan: Its h is the network's output.
        phi: Share of the rescaled output.

    Source: Lin et al., arXiv:2305.08891, section 3.4.
    """
    ratio = fd.Measure(
        0, fd.Reduction("std", ("out", 1)), fd.Reduction("std", ("y",)), 1.0, phi, 1.0 - phi
    )
    own = {"measures": (ratio,), "scalars": {"w_0": 0, "w_1": 0}}
    stages = tuple(dataclasses.replace(stage, **own) for stage in plan.stages)
    return dataclasses.replace(plan, stages=stages)


# -- the same, step by step ------------------------------------------------------------------------


def inpainting_loop(network: Any, x: torch.Tensor, plan: fd.Plan, bank: Any) -> torch.Tensor:
    """`inpainted(plan)`, blended after each step of the plan."""
    (mask, known, noise), past = bank, []
    for stage, t in zip(plan.stages, plan.times[1:], strict=True):
        out = network(x, torch.full((len(x),), stage.model_time, dtype=x.dtype))
        past.insert(0, stage.p * x + stage.q * out)
        x = stage.a_x * x + sum(b * h for b, h in zip(stage.b, past, strict=False))
        there = float(plan.schedule.alpha(t)) * known + float(plan.schedule.sigma(t)) * noise
        x = (1 - mask) * x + mask * there
    return x


def langevin_loop(
    network: Any, x: torch.Tensor, schedule: Any, times: Any, snr: float, draw: Any
) -> torch.Tensor:
    """`corrected`, with a network of epsilon; `draw(i)` is the noise of step i."""

    def epsilon(x: torch.Tensor, t: float) -> torch.Tensor:
        told = float(schedule.model_time(t))
        return network(x, torch.full((len(x),), told, dtype=x.dtype))

    def norm(v: torch.Tensor) -> torch.Tensor:
        return v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))

    for i, (t, after) in enumerate(itertools.pairwise(float(t) for t in times)):
        alpha, sigma, alpha_next, sigma_next = (
            float(f(at)) for at in (t, after) for f in (schedule.alpha, schedule.sigma)
        )
        eps = epsilon(x, t)
        x = alpha_next * (x - sigma * eps) / alpha + sigma_next * eps
        score, z = -epsilon(x, after) / sigma_next, draw(i)
        delta = 2 * alpha_next**2 * (snr * norm(z) / norm(score)) ** 2
        x = x + delta * score + (2 * delta).sqrt() * z
    return x


def grid_of(steps: int, t_max: float = 0.9, t_min: float = 0.05) -> tuple[float, ...]:
    """Uniform times."""
    return tuple(np.linspace(t_max, t_min, steps + 1).tolist())
