# SPDX-License-Identifier: Apache-2.0
"""`fastdiff compare`: the error of solvers against what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import fastdiff as fd

from ..bench.plots import COLOURS
from .shared import COUNT, SEED, columns, one_thread, optional, output, progress_option
from .types import Numbers, Picture, SolverNames

_COMPARED = "ddim,deis-heun,dpmpp-2m,dpmpp-3m,deis-3"
_BUDGETS = "6,9,12,16,24,36,48"
_COLOURS = (*COLOURS, "#000000")
_TICKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)


@click.command()
@click.option(
    *("--solvers", "names"),
    default=_COMPARED,
    type=SolverNames(),
    help="Solvers that draw no noise.",
)
@click.option(
    "--nfe", "budgets", default=_BUDGETS, type=Numbers(1), help="Numbers of evaluations to spend."
)
@click.option("--grid", default="auto", metavar="NAME", help="Times of the steps.")
@click.option("--count", default=16, type=COUNT, help="Number of samples of each problem.")
@click.option("--seed", default=0, type=SEED, help="Seed of the starting noise.")
@click.option("--out", default="compare.png", type=Picture(), help="Where the plot is written.")
@progress_option
def compare(
    *,
    names: tuple[str, ...],
    budgets: tuple[int, ...],
    grid: str,
    count: int,
    seed: int,
    out: Path,
    progress: bool,
) -> None:
    """Plot the error of solvers against what they cost, on two problems.

    The problems are the shipped digits network and a Gaussian mixture, whose denoiser is known
    exactly. The error is ||x - x*|| / ||x*|| from the same starting noise, where x* is
    what dpmpp-3m reaches in 400 steps uniform in log SNR. All arithmetic is float64.

    \b
    Examples:
      fastdiff compare
      fastdiff compare --solvers ddim,heun,dpm-2,dpm-3 --nfe 6-30 --out singlestep.png
    """
    with output(out) as file, one_thread():
        plot = optional("matplotlib.figure")
        figure = plot.Figure(figsize=(10, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, problem in zip(panels, _problems(count), strict=True):
            plans = _plans(problem, names, budgets, grid)
            results = _errors(problem, plans, seed, progress)
            click.echo(f"{problem.title}: error with at most N evaluations")
            click.echo(_table_of(results, budgets) + "\n")
            _draw(panel, problem.title, results)
        panels[0].legend()
        figure.savefig(file, format="png", dpi=120)
    click.echo(f"plot: {out}")


_Errors = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class _Problem:
    """A network with what it was trained for, in float64, and the samples asked of it."""

    title: str
    network: Callable[..., torch.Tensor]
    schedule: fd.schedules.Schedule
    prediction: str
    shape: tuple[int, ...]
    cond: dict[str, torch.Tensor] | None = None

    def plan(self, solver: str, steps: int, grid: str) -> fd.Plan:
        return fd.plan(self.schedule, solver, steps, grid=grid, prediction=self.prediction)

    def solve(self, plan: fd.Plan, seed: int) -> torch.Tensor:
        x = fd.noise.prior(plan, self.shape, seeds=seed, dtype=torch.float64)
        return fd.sample(self.network, x, plan, cond=self.cond)


def _problems(count: int) -> Iterator[_Problem]:
    digits = fd.models.digits().double()
    cond = {"y": torch.arange(count) % digits.null_class}
    shape = (count, *digits.shape)
    yield _Problem("digits, 8x8", digits, digits.schedule, digits.prediction, shape, cond)
    angle = torch.arange(8) * (math.tau / 8)
    ring = fd.models.GaussianMixture(1.0, torch.stack([angle.cos(), angle.sin()], 1), 0.01)
    schedule = fd.schedules.VPLinear()
    network = ring.network(schedule, "epsilon")
    yield _Problem("ring of eight Gaussians", network, schedule, "epsilon", (count, 2))


def _plans(
    problem: _Problem, names: Sequence[str], budgets: Sequence[int], grid: str
) -> dict[str, list[fd.Plan]]:
    """Per solver, the largest plan within each budget."""
    plans: dict[str, list[fd.Plan]] = {}
    for name in names:
        least, nfe = fd.solvers.info(name).least_steps, fd.solvers.info(name).nfe_per_step
        steps = [budget // nfe for budget in budgets if budget // nfe >= least]
        plans[name] = [problem.plan(name, each, grid) for each in steps]
        if any(plan.stochastic for plan in plans[name]):
            raise ValueError(f"--solvers: {name} draws noise, so it has no one right answer.")
    return plans


def _errors(
    problem: _Problem, plans: dict[str, list[fd.Plan]], seed: int, progress: bool
) -> _Errors:
    """Per solver, (NFE, relative error) of each of its plans."""
    reference = problem.solve(problem.plan("dpmpp-3m", 400, "logsnr"), seed)
    scale = torch.linalg.vector_norm(reference)
    total = sum(len(each) for each in plans.values())
    results: _Errors = {}
    bar = optional("tqdm").tqdm(total=total, desc=problem.title, leave=False, disable=not progress)
    with bar:
        for name, each in plans.items():
            results[name] = []
            for plan in each:
                error = torch.linalg.vector_norm(problem.solve(plan, seed) - reference) / scale
                if not bool(error.isfinite()):
                    raise ValueError(
                        f"fastdiff: samples are finite numbers; {name} with {plan.steps} steps on "
                        f"{problem.title} got values that are not. Leave it out, or give it more "
                        "evaluations or another grid."
                    )
                results[name].append((plan.nfe, float(error)))
                bar.update()
    return results


def _table_of(results: _Errors, budgets: Sequence[int]) -> str:
    rows = [["solver", *(f"N={budget}" for budget in budgets)]]
    for name, points in results.items():
        best = [max((p for p in points if p[0] <= budget), default=None) for budget in budgets]
        rows.append([name, *("-" if point is None else f"{point[1]:.2e}" for point in best)])
    return columns(rows)


def _draw(panel: Any, title: str, results: _Errors) -> None:
    for i, (name, points) in enumerate(results.items()):
        nfe, error = zip(*sorted(points), strict=True) if points else ((), ())
        panel.loglog(nfe, error, "o-", label=name, color=_COLOURS[i % len(_COLOURS)], markersize=4)
    spent = [nfe for points in results.values() for nfe, _ in points]
    ticks = [n for n in _TICKS if min(spent, default=1) <= n <= max(spent, default=1)]
    panel.set_xticks([], minor=True)
    panel.set_xticks(ticks, [str(n) for n in ticks])
    panel.set(title=title, xlabel="network evaluations", ylabel="relative error")
    panel.grid(which="major", alpha=0.3)
