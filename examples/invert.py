# SPDX-License-Identifier: Apache-2.0
"""Encode real digits to the noise they come from, and back: a plan run in reverse.

    python examples/invert.py                               # half a minute on one core
    python examples/invert.py --solvers ddim,deis-3 --steps 10,20

A deterministic sampler is a map from noise to images, so an image has a noise that the sampler
turns into it. A plan says what to solve for. Its row n, read off `plan.stages`, is

    x_{n+1} = a_n x_n + sum_j b_{n,j} h_{n-j},        h_n = p_n x_n + q_n out_n,

with out_n = network(x_n, t_n): linear but for the network. In reverse x_{n+1} is known, and the
network would have to be asked at x_n, which is not. Two ways out:

- *explicit*: ask it at x_{n+1}, the cleaner end of the step, instead, and solve the row for x_n.
  The rows are DDIM's, which read no history, whatever solver decodes. A step takes one evaluation,
  and the error of the round trip is of first order in the step.
- *fixed point*: guess all states (explicitly), ask the network at all of them in one call, and
  solve the rows, which with those outputs are a linear system in x_0 ... x_{N-1}; repeat until
  nothing moves. A multistep solver's history is no difficulty, because the h_{n-j} belong to the
  same system. Where it converges, the round trip is exact at any number of steps. It does if the
  steps are short enough: at 5 steps of dpmpp-2m it does not.

The example prints, by solver and steps: the error of the round trip, ||decoded - digit|| /
||digit||; what encoding cost, in evaluations; the standard deviation of the noise found, which
should be near 1, since that is what the sampler starts from (coarse ddim needs more to arrive at a
real digit); and how far the last sweep of the fixed point moved the states, which says whether it
was found. `invert.png` shows the errors, how far each sweep of the fixed point moves the states,
the noises and the round trips.

All arithmetic is float64. A digit is encoded as a state of the plan's last time, alpha x0 + sigma
epsilon with sigma = 0.01, less than an eye sees. Without that epsilon, pixels that are paper in
every training image would have no noise to go back to, and the codes would be too small: 0.73 in
place of 1.

Sources: Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502, section 4.3 (the
explicit way); Pan et al., "Effective Real Image Editing with Accelerated Iterative Diffusion
Inversion", arXiv:2309.04907 (fixed points, of one step at a time).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from common import COLOURS, Example, Sheet
from torch import Tensor

import fastdiff as fd

TOLERANCE = 1e-10  # of a sweep: ||states - states before|| / ||states||


@dataclass
class Result:
    """Digits encoded and decoded in both ways by one plan."""

    plan: fd.Plan
    moves: list[float]  # of every sweep
    noises: dict[str, Tensor]
    decoded: dict[str, Tensor]
    errors: dict[str, float]
    evaluations: dict[str, int]


def explicit(network: fd.models.DigitsDiT, x: Tensor, y: Tensor, plan: fd.Plan) -> Tensor:
    """States at the plan's times, [N + 1, B, ...]: DDIM backwards with out_n taken at x_{n+1}."""
    ddim = fd.plan(
        network.schedule, "ddim", plan.steps, grid=plan.times, prediction=network.prediction
    )
    states = [x]
    for row in reversed(ddim.stages):
        out = network(x, torch.full((len(x),), row.model_time, dtype=x.dtype), y)
        # x' = a x + b (p x + q out), solved for x
        x = (x - row.b[0] * row.q * out) / (row.a_x + row.b[0] * row.p)
        states.append(x)
    return torch.stack(states[::-1])


def fixed_point(
    network: fd.models.DigitsDiT, states: Tensor, y: Tensor, plan: fd.Plan, sweeps: int
) -> tuple[Tensor, list[float]]:
    """The noise whose run ends in states[-1], from a guess of all states; and each sweep's move."""
    count, batch = len(plan.stages), len(y)
    # row n as equation n:  sum_m left[n, m] x_m = sum_m right[n, m] out_m
    left = torch.zeros(count, count + 1, dtype=states.dtype)
    right = torch.zeros(count, count, dtype=states.dtype)
    for n, row in enumerate(plan.stages):
        left[n, n + 1] = 1.0
        left[n, n] = -row.a_x
        for j, b in enumerate(row.b):
            left[n, n - j] -= b * plan.stages[n - j].p
            right[n, n - j] = b * plan.stages[n - j].q

    times = torch.tensor([row.model_time for row in plan.stages], dtype=states.dtype)
    times, labels = times.repeat_interleave(batch), y.repeat(count)
    known = left[:, count:] @ states[-1:].flatten(1)
    unknown, moves = states[:-1].flatten(1), []  # [N, B * 64]
    for _ in range(sweeps):
        out = network(unknown.reshape(count * batch, *states.shape[2:]), times, labels)
        solved = torch.linalg.solve(left[:, :count], right @ out.reshape(count, -1) - known)
        moves.append(float((solved - unknown).norm() / solved.norm()))
        unknown = solved
        if moves[-1] < TOLERANCE:
            break
    return unknown[0].reshape(states[0].shape), moves


def round_trip(
    network: fd.models.DigitsDiT, x: Tensor, y: Tensor, plan: fd.Plan, sweeps: int
) -> Result:
    """Encodes in both ways by one plan, and decodes by the sampler."""
    states = explicit(network, x, y, plan)
    exact, moves = fixed_point(network, states, y, plan, sweeps)
    noises = {"explicit": states[0], "fixed point": exact}
    decoded = {k: fd.sample(network, z, plan, cond={"y": y}) for k, z in noises.items()}
    errors = {k: float((back - x).norm() / x.norm()) for k, back in decoded.items()}
    evaluations = {"explicit": plan.nfe, "fixed point": plan.nfe * (1 + len(moves))}
    return Result(plan, moves, noises, decoded, errors, evaluations)


# -- the picture -----------------------------------------------------------------------------------


def draw(results: list[Result], x: Tensor, y: Tensor, path: Path) -> None:
    """Draws errors by steps, moves by sweep, and the images of one plan."""
    sheet = Sheet(height=9.4, below=1.45)
    solvers = list(dict.fromkeys(result.plan.solver for result in results))
    for solver, colour in zip(solvers, itertools.cycle(COLOURS), strict=False):
        each = [result for result in results if result.plan.solver == solver]
        steps = [result.plan.steps for result in each]
        for way, line in (("explicit", "o:"), ("fixed point", "o-")):
            errors = [result.errors[way] for result in each]
            label = f"{solver}, {way}"
            sheet.left.loglog(steps, errors, line, color=colour, label=label, markersize=4)
    sheet.left.set_xticks([], minor=True)
    sheet.left.set_xticks(steps, [str(n) for n in steps])
    sheet.left.set(title="Round trip", xlabel="steps of the plan", ylabel="relative error")
    for result, colour in zip(each, itertools.cycle(COLOURS), strict=False):
        sweeps, label = range(1, len(result.moves) + 1), f"{result.plan.steps} steps"
        sheet.right.semilogy(sweeps, result.moves, color=colour, label=label)
    title = f"Fixed point of {solvers[-1]}'s rows"
    sheet.right.set(title=title, xlabel="sweep", ylabel="states move by (relative)")
    for panel in (sheet.left, sheet.right):
        panel.legend(fontsize="small")
    # of the plans that the fixed point inverts, the one that the explicit way inverts worst
    found = [result for result in results if result.errors["fixed point"] < 1e-3] or results
    shown = max(found, key=lambda result: result.errors["explicit"])
    rows = [("digit", x)]
    for way in shown.noises:
        error = 10 * (shown.decoded[way] - x).abs() - 1  # white where there is none
        rows += [(f"{way}: noise", shown.noises[way] / 2), ("decoded", shown.decoded[way])]
        rows += [("|error| × 10", error)]
    title = f"Encoded and decoded by {shown.plan.solver} in {shown.plan.steps} steps"
    sheet.images(title, rows, [str(int(k)) for k in y[:10]])
    sheet.save(path)


@click.command(cls=Example, context_settings={"show_default": True})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"))
@click.option("--solvers", default="ddim,deis-2,dpmpp-2m", help="Solvers of one evaluation a step.")
@click.option("--steps", "budgets", default="5,10,20,40", help="Numbers of steps.")
@click.option(
    "--sweeps", type=click.IntRange(1), default=40, help="Sweeps of the fixed point, at most."
)
@click.option("--count", type=click.IntRange(1, 250), default=10, help="Held-out digits to encode.")
@click.option("--seed", default=0, help="Seed of the noise at the plan's last time.")
@torch.no_grad()
def main(out: Path, solvers: str, budgets: str, sweeps: int, count: int, seed: int) -> None:
    """Encode real digits to noise and decode them again, by several plans and in two ways."""
    torch.set_num_threads(1)  # an evaluation takes milliseconds: threads would only wait
    network = fd.models.digits().double()
    images, labels = fd.models.digits_data("held-out")
    # one of each class in turn
    order = torch.stack([(labels == k).nonzero()[:25, 0] for k in range(10)], 1).flatten()[:count]
    x0, y = images[order].double(), labels[order]

    plans = []
    for solver in solvers.split(","):
        for steps in map(int, budgets.split(",")):
            plan = fd.plan(network.schedule, solver, steps, prediction=network.prediction)
            if plan.uses_e or plan.stochastic:
                raise click.BadParameter(
                    f"a row reads the last state and network outputs, and no noise; got {solver}, "
                    "whose rows read more. Take a multistep solver, such as deis-2.",
                    param_hint="--solvers",
                )
            plans.append(plan)
    end = plans[0].times[-1]
    epsilon = fd.noise.normal(x0.shape, seed, 0, dtype=x0.dtype)
    x = float(network.schedule.alpha(end)) * x0 + float(network.schedule.sigma(end)) * epsilon

    columns = f"{'error':>8}  {'evaluations':>11}  {'std':>5}"
    click.echo(f"{'':<17}  {'explicit':<28}  fixed point")
    click.echo(f"{'solver':<10}  {'steps':>5}  {columns}  {columns}  {'last move':>9}")
    results = []
    for plan in plans:
        result = round_trip(network, x, y, plan, sweeps)
        results.append(result)
        line = f"{plan.solver:<10}  {plan.steps:>5}"
        for way, noise in result.noises.items():
            error, evaluations = result.errors[way], result.evaluations[way]
            line += f"  {error:>8.1e}  {evaluations:>11}  {float(noise.std()):>5.2f}"
        click.echo(f"{line}  {result.moves[-1]:>9.1e}")

    draw(results, x, y, out / "invert.png")


if __name__ == "__main__":
    main()
