# SPDX-License-Identifier: Apache-2.0
"""`fastdiff sample`: pictures of digits from the network that is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch

import fastdiff as fd

from .errors import say
from .shared import (
    COUNT,
    JSON_FILE,
    PLAN_OPTIONS,
    SEED,
    loaded,
    one_thread,
    optional,
    output,
    plan_options,
    progress_option,
)
from .types import Numbers, Picture, Real

_GUIDANCE = Real(-1e4, 1e4)
_PLAN = "A plan that `fastdiff plan --out` saved, in place of the options above."


@click.command()
@plan_options
@click.option("--plan", "plan_file", help=_PLAN, **JSON_FILE)
@click.option("--guidance", default=1.0, type=_GUIDANCE, help="Guidance scale; 1 guides nothing.")
@click.option("--classes", default="0-9", type=Numbers(0), help="The digits to draw, in turn.")
@click.option("--count", default=80, type=COUNT, help="Number of pictures.")
@click.option("--seed", default=0, type=SEED, help="Picture i has the seed SEED + i.")
@click.option("--backend", default="auto", metavar="NAME", help="`fastdiff doctor` lists them.")
@click.option("--out", default="digits.png", type=Picture(), help="Where the sheet is written.")
@progress_option
def sample(
    *,
    solver: str,
    steps: int,
    grid: str,
    options: Sequence[tuple[str, Any]],
    plan_file: Path | None,
    guidance: float,
    classes: tuple[int, ...],
    count: int,
    seed: int,
    backend: str,
    out: Path,
    progress: bool,
) -> None:
    """Draw handwritten digits with the network that is shipped, and write them as one picture.

    \b
    Examples:
      fastdiff sample --solver deis-3 --steps 8
      fastdiff sample --classes 3,5 --guidance 3 --out threes-and-fives.png
      fastdiff sample --solver ddim -o eta=1 --steps 50 --seed 7
    """
    network = fd.models.digits()
    if max(classes) >= network.null_class:
        raise click.BadParameter(
            f"the network knows the classes 0-{network.null_class - 1}; got {max(classes)}.",
            param_hint="'--classes'",
        )
    if plan_file is not None:
        plan = _plan_for(network, plan_file)
    else:
        asked: dict[str, Any] = {"grid": grid, "prediction": network.prediction, **dict(options)}
        plan = fd.plan(network.schedule, solver, steps, **asked)
    with output(out) as file, one_thread():
        labels = torch.tensor([classes[i % len(classes)] for i in range(count)])
        none = torch.full_like(labels, network.null_class)
        images = fd.sample(
            network,
            fd.noise.prior(plan, (count, *network.shape), seeds=seed),
            plan,
            cond={"y": labels},
            guidance=fd.CFG(guidance, uncond={"y": none}),
            seed=seed,
            backend=None if backend == "auto" else backend,
            progress=progress,
        )
        bad = int((~images.isfinite().flatten(1).all(1)).sum())
        if bad:
            raise ValueError(
                f"fastdiff: samples are finite numbers; got {bad} of {count} pictures with values "
                f"that are not, at guidance {guidance:g} and {plan.steps} steps. Lower the "
                "guidance, or take more steps or another solver."
            )
        across = len(classes) * max(1, round(count**0.5 / len(classes)))
        _write_sheet(file, images[:, 0], min(across, count))
    say(f"{out}: {count} pictures, {plan.solver}, {plan.nfe} evaluations")


def _plan_for(network: fd.models.DigitsDiT, path: Path) -> fd.Plan:
    """The plan in a file, which must be one for the network."""
    plan = loaded("--plan", path, PLAN_OPTIONS)
    same_schedule = plan.schedule == network.schedule
    if not (same_schedule and plan.prediction == network.prediction):
        raise ValueError(
            f"--plan: the digits network needs prediction {network.prediction!r} on "
            f"{network.schedule}; got {plan.prediction!r} on {plan.schedule}. Make one: fastdiff "
            f"plan --schedule vp-linear --prediction {network.prediction} --out {path}"
        )
    return plan


def _write_sheet(file: BinaryIO, images: torch.Tensor, across: int, zoom: int = 5) -> None:
    """Images [B, H, W] in [-1, 1], ink = +1, as dark ink on one white sheet, row by row."""
    pillow = optional("PIL.Image")
    ink = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    ink = ink.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    count, height, width = ink.shape
    rows = -(-count // across)
    sheet = torch.zeros(rows * across, height + zoom, width + zoom, dtype=torch.uint8)
    sheet[:count, zoom:, zoom:] = ink
    sheet = sheet.view(rows, across, *sheet.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
    page = torch.zeros(sheet.shape[0] + zoom, sheet.shape[1] + zoom, dtype=torch.uint8)
    page[: sheet.shape[0], : sheet.shape[1]] = sheet
    pillow.fromarray(255 - page.numpy()).save(file, format="PNG")
