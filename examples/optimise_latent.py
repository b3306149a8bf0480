# SPDX-License-Identifier: Apache-2.0
"""Optimise the starting noise x_T until a classifier sees the digit that was asked for.

    python examples/optimise_latent.py                      # half a minute on one core
    python examples/optimise_latent.py --steps 20 --count 100

The digits network samples without a class, so what it draws from a noise is chance. The noise is
then the only thing that is trained: every iteration samples, asks the classifier, and takes the
gradient of the cross-entropy back through the whole run to x_T, in three ways:

- `"backprop"`: autograd through the loop, which keeps the activations of every step;
- `"discrete"`: the same numbers by the transposed plan, one network evaluation in memory at a time;
- `AdjointDEIS()`: the gradient of the continuous flow that the sampler approximates.

The example prints the seconds, the loss before and after, and how many images the classifier
recognises, beside the verdict of the nearest training image, which nothing here optimises.
`optimise-latent.png` shows the losses, how far each gradient is from autograd's by the number of
steps, and the images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from common import Example, Sheet
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

import fastdiff as fd

GRADIENTS: dict[str, Any] = {
    "backprop": "backprop",
    "discrete": "discrete",
    "AdjointDEIS": fd.AdjointDEIS(),
}
COLOURS = dict(zip(GRADIENTS, ("#000000", "#0072b2", "#d55e00"), strict=True))
STYLES = dict(zip(GRADIENTS, ("-", "--", "-."), strict=True))  # two of the curves coincide
COMPARED_AT = (5, 7, 10, 14, 20, 28, 40)


@dataclass
class Result:
    """What an optimisation gave: the loss of every iteration, the last images, and its time."""

    losses: list[float]
    images: Tensor
    seconds: float


def norms(x: Tensor) -> Tensor:
    """The norm of each sample, [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)


def optimise(
    network: fd.models.DigitsDiT,
    classifier: fd.models.DigitsClassifier,
    plan: fd.Plan,
    noise: Tensor,
    wanted: Tensor,
    *,
    gradient: Any,
    iterations: int,
    rate: float,
) -> Result:
    """Runs Adam on x_T. `gradient` is the one argument by which the three runs differ."""
    began = time.perf_counter()
    sampler = fd.Sampler(network, plan, gradient=gradient)
    x = noise.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    losses = []
    for _ in range(iterations):
        loss = F.cross_entropy(classifier(sampler(x)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # Gaussian noise lies close to a sphere: stay on it
            x *= norms(noise) / norms(x)
        losses.append(loss.item())
    with torch.no_grad():  # without grad mode the same sampler only samples
        images = sampler(x)
        losses.append(F.cross_entropy(classifier(images), wanted).item())
    return Result(losses, images, time.perf_counter() - began)


def distances(
    network: fd.models.DigitsDiT,
    classifier: fd.models.DigitsClassifier,
    solver: str,
    noise: Tensor,
    wanted: Tensor,
) -> dict[str, list[float]]:
    """||g - g'|| / ||g'|| of the first gradient g in x_T, where g' is autograd's, by steps."""
    apart: dict[str, list[float]] = {name: [] for name in GRADIENTS if name != "backprop"}
    for steps in COMPARED_AT:
        plan = fd.plan(network.schedule, solver, steps, prediction=network.prediction)
        found = {}
        for name, gradient in GRADIENTS.items():
            x = noise.clone().requires_grad_()
            images = fd.sample(network, x, plan, gradient=gradient)
            (found[name],) = torch.autograd.grad(F.cross_entropy(classifier(images), wanted), x)
        exact = found.pop("backprop")
        for name, each in found.items():
            apart[name].append(float((each - exact).norm() / exact.norm()))
    return apart


def draw(
    results: dict[str, Result], apart: dict[str, list[float]], start: Tensor, path: Path
) -> None:
    """Draws the losses, the gradients' distances, and the first ten images of every run."""
    sheet = Sheet()
    for name, result in results.items():
        style = {"color": COLOURS[name], "label": name, "lw": 1.8}
        sheet.left.semilogy(result.losses, STYLES[name], **style)
    sheet.left.set(title="Loss of the samples", xlabel="iteration", ylabel="cross-entropy")
    sheet.left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sheet.left.yaxis.set_major_formatter("{x:g}")
    sheet.left.yaxis.set_minor_formatter(NullFormatter())
    for name, each in apart.items():
        style = {"color": COLOURS[name], "label": name, "markersize": 4}
        sheet.right.loglog(COMPARED_AT, each, "o" + STYLES[name], **style)
    title = "First gradient: distance from autograd's"
    sheet.right.set(title=title, xlabel="steps of the sampler", ylabel="relative difference")
    sheet.right.set_xticks([], minor=True)
    sheet.right.set_xticks(COMPARED_AT, [str(steps) for steps in COMPARED_AT])
    for panel in (sheet.left, sheet.right):
        panel.legend()
    rows = [("before", start), *((name, result.images) for name, result in results.items())]
    wanted = [str(k) for k in range(min(10, len(start)))]
    sheet.images("Samples from the noise, by the digit that was wanted", rows, wanted)
    sheet.save(path)


@click.command(cls=Example, context_settings={"show_default": True})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"))
@click.option("--solver", default="dpmpp-2m", help="`fastdiff solvers` lists them.")
@click.option("--steps", type=click.IntRange(1), default=10, help="Steps of the sampler.")
@click.option(
    "--count",
    type=click.IntRange(1),
    default=30,
    help="Number of noises; the k-th wants the digit k mod 10.",
)
@click.option("--iterations", type=click.IntRange(1), default=40, help="Steps of Adam.")
@click.option("--rate", type=click.FloatRange(0), default=0.1, help="Adam's learning rate.")
@click.option("--seed", default=0, help="Noise k has the seed SEED + k.")
def main(
    out: Path, solver: str, steps: int, count: int, iterations: int, rate: float, seed: int
) -> None:
    """Optimise the starting noise so that a classifier sees the wanted digits."""
    known, names = fd.models.digits_data("train")
    torch.set_num_threads(1)  # an evaluation takes milliseconds: threads would only wait
    network, classifier = fd.models.digits(), fd.models.digits_classifier()  # weights are frozen
    plan = fd.plan(network.schedule, solver, steps, prediction=network.prediction)
    noise = fd.noise.prior(plan, (count, *network.shape), seeds=seed)
    wanted = torch.arange(count) % 10
    start = fd.sample(network, noise, plan)

    def verdicts(images: Tensor) -> str:
        seen = (classifier(images).argmax(1) == wanted).sum()
        nearest = torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)
        by_nearest = (names[nearest] == wanted).sum()
        return f"{f'{seen} of {count}':>14}  {f'{by_nearest} of {count}':>15}"

    click.echo(f"{solver}, {steps} steps, {iterations} iterations, {count} noises")
    click.echo(
        f"{'gradient':<12}  {'seconds':>8}  {'loss before':>12}  {'loss after':>11}  "
        f"{'classifier':>14}  {'nearest image':>15}"
    )
    first = F.cross_entropy(classifier(start), wanted).item()
    click.echo(f"{'(none)':<12}  {'-':>8}  {first:>12.4f}  {'-':>11}  {verdicts(start)}")
    results = {}
    for name, gradient in GRADIENTS.items():
        result = results[name] = optimise(
            *(network, classifier, plan, noise, wanted),
            gradient=gradient,
            iterations=iterations,
            rate=rate,
        )
        click.echo(
            f"{name:<12}  {result.seconds:>8.1f}  {result.losses[0]:>12.4f}  "
            f"{result.losses[-1]:>11.4f}  {verdicts(result.images)}"
        )

    apart = distances(network, classifier, solver, noise, wanted)
    click.echo("\nfirst gradient, relative difference from autograd's")
    click.echo(f"{'steps':<12}" + "".join(f"  {n:>8}" for n in COMPARED_AT))
    for name, each in apart.items():
        click.echo(f"{name:<12}" + "".join(f"  {value:>8.1e}" for value in each))

    draw(results, apart, start, out / "optimise-latent.png")


if __name__ == "__main__":
    main()
