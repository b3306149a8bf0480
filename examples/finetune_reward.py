# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the digits network for a reward of its samples, through all steps of the sampler.

    python examples/finetune_reward.py                      # half a minute on one core
    python examples/finetune_reward.py --wanted 0.15        # thin strokes instead of bold ones

The reward asks for bold strokes: it falls with the distance of an image's ink from what is wanted.
It has a best value on purpose (asked for ever more ink, the network soon paints all black), and a
classifier's log-probability of the digit stands beside it, so that the images stay readable.

The loss is a function of finished samples, so its gradient in the weights goes back through every
evaluation of the run. `gradient="discrete"` does that in the memory of one evaluation, whatever the
number of steps; autograd through the loop ("backprop") keeps the activations of all.

The example prints the peak memory of a training step by both and by the number of steps, measured,
with how far their gradients are apart; then the reward on noises that no training step saw, before
and after, the ink, and how many images are still recognised: by the classifier, which was part of
the loss, and by the nearest training image, which was not. `finetune-reward.png` shows all that and
the images; `finetune-reward.safetensors` holds the weights, for `fd.models.digits(file)`.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from common import Example, Peak, Sheet
from safetensors.torch import save_file
from torch import Tensor

import fastdiff as fd

MEASURED_AT = (5, 10, 20)
MEASURED = {"discrete": "#0072b2", "backprop": "#000000"}
READABLE = 0.5  # weight of the classifier's log-probability beside the reward


def ink(images: Tensor) -> Tensor:
    """Mean square of an image's darkness, [B]: 0 is paper, 1 is black, and pale grey hardly counts.

    The training images have 0.23, give or take 0.035.
    """
    return ((images.clamp(-1, 1) + 1) / 2).square().mean(dim=(1, 2, 3))


def reward(images: Tensor, wanted: float) -> Tensor:
    """Minus the squared distance from the wanted ink, in units of 0.07, [B]."""
    return -((ink(images) - wanted) / 0.07).square()


def measure(
    network: fd.models.DigitsDiT, solver: str, batch: int, wanted: float
) -> dict[str, list[tuple[float, Tensor]]]:
    """Peak MiB of one gradient of the reward in the weights, and that gradient, by MEASURED_AT."""
    found: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in MEASURED}
    weights = list(network.parameters())
    cond = {"y": torch.arange(batch) % network.null_class}
    for steps in MEASURED_AT:
        plan = fd.plan(network.schedule, solver, steps, prediction=network.prediction)
        x = fd.noise.prior(plan, (batch, *network.shape), seeds=0)
        for name, each in found.items():
            with Peak() as peak:
                images = fd.sample(network, x, plan, cond=cond, gradient=name)
                grads = torch.autograd.grad(-reward(images, wanted).mean(), weights)
            each.append((peak.most / 2**20, torch.cat([grad.flatten() for grad in grads])))
    return found


# -- training --------------------------------------------------------------------------------------


def finetune(
    network: fd.models.DigitsDiT,
    classifier: fd.models.DigitsClassifier,
    plan: fd.Plan,
    *,
    wanted: float,
    iterations: int,
    batch: int,
    rate: float,
    seed: int,
) -> list[float]:
    """Runs Adam on the weights; gives the mean reward of every iteration's samples."""
    sampler = fd.Sampler(network, plan, gradient="discrete")
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    random = torch.Generator().manual_seed(seed)
    rewards = []
    for i in range(iterations):
        y = torch.randint(network.null_class, (batch,), generator=random)
        x = fd.noise.prior(plan, (batch, *network.shape), seeds=seed + i * batch)
        images = sampler(x, {"y": y})
        score = reward(images, wanted).mean()
        loss = READABLE * F.cross_entropy(classifier(images), y) - score
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(score.item())
    return rewards


# -- the picture -----------------------------------------------------------------------------------


def draw(
    memory: dict[str, list[tuple[float, Tensor]]],
    rewards: list[float],
    rows: list[tuple[str, Tensor]],
    path: Path,
) -> None:
    """Draws memory by steps, reward by iteration, and images before and after."""
    sheet = Sheet()
    for name, each in memory.items():
        peaks = [peak for peak, _ in each]
        sheet.left.plot(MEASURED_AT, peaks, "o-", color=MEASURED[name], label=name)
        for point in zip(MEASURED_AT, peaks, strict=True):
            offset = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            sheet.left.annotate(f"{point[1]:.0f}", point, **offset)
    title = "Peak memory of a training step"
    sheet.left.set(title=title, xlabel="steps of the sampler", ylabel="MiB")
    sheet.left.set_xticks(MEASURED_AT)
    sheet.left.margins(y=0.12)
    sheet.left.set_ylim(bottom=0)
    sheet.left.legend(loc="upper left")
    sheet.right.plot(range(1, len(rewards) + 1), rewards, color=MEASURED["discrete"])
    title = "Reward of the samples"
    sheet.right.set(title=title, xlabel="iteration", ylabel="mean reward (0 is best)")
    sheet.images("Samples from the same noises, by class", rows, [str(k) for k in range(10)])
    sheet.save(path)


@click.command(cls=Example, context_settings={"show_default": True})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"))
@click.option("--wanted", type=click.FloatRange(0, 1), default=0.35, help="Ink of an image.")
@click.option("--solver", default="dpmpp-2m", help="`fastdiff solvers` lists them.")
@click.option("--steps", type=click.IntRange(1), default=10, help="Steps of the sampler.")
@click.option("--iterations", type=click.IntRange(1), default=40, help="Steps of Adam.")
@click.option(
    "--batch", type=click.IntRange(1), default=64, help="Number of samples of an iteration."
)
@click.option("--rate", type=click.FloatRange(0), default=2e-4, help="Adam's learning rate.")
@click.option(
    "--count", type=click.IntRange(20), default=200, help="Number of samples that are judged."
)
@click.option("--seed", default=0, help="Seed of classes and noises.")
def main(
    *,
    out: Path,
    wanted: float,
    solver: str,
    steps: int,
    iterations: int,
    batch: int,
    rate: float,
    count: int,
    seed: int,
) -> None:
    """Fine-tune the digits network so that its samples have the wanted ink."""
    known, names = fd.models.digits_data("train")
    torch.set_num_threads(1)  # an evaluation takes milliseconds: threads would only wait
    classifier = fd.models.digits_classifier()
    network = fd.models.digits().requires_grad_(True)  # it comes frozen

    memory = measure(network, solver, batch, wanted)
    click.echo(f"peak memory of a training step on {batch} samples, MiB")
    click.echo(f"{'steps':>5}" + "".join(f"  {name:>9}" for name in memory) + "  gradients apart")
    for steps_then, discrete, exact in zip(MEASURED_AT, *memory.values(), strict=True):
        apart = float((discrete[1] - exact[1]).norm() / exact[1].norm())
        click.echo(f"{steps_then:>5}  {discrete[0]:>9.1f}  {exact[0]:>9.1f}  {apart:>15.1e}")

    plan = fd.plan(network.schedule, solver, steps, prediction=network.prediction)
    y = torch.arange(count) % network.null_class
    unseen = fd.noise.prior(plan, (count, *network.shape), seeds=seed + iterations * batch)

    def judge(name: str) -> Tensor:
        with torch.no_grad():
            images = fd.sample(network, unseen, plan, cond={"y": y})
        score, paint = reward(images, wanted).mean(), ink(images).mean()
        seen = (classifier(images).argmax(1) == y).float().mean()
        nearest = torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)
        by_nearest = (names[nearest] == y).float().mean()
        click.echo(f"{name:<8}  {score:>7.3f}  {paint:>6.3f}  {seen:>10.1%}  {by_nearest:>13.1%}")
        return images

    click.echo(f"\n{solver}, {steps} steps, {iterations} iterations of {batch} samples")
    click.echo(
        f"{'weights':<8}  {'reward':>7}  {'ink':>6}  {'classifier':>10}  {'nearest image':>13}"
    )
    before = judge("before")
    began = time.perf_counter()
    how = {"iterations": iterations, "batch": batch, "rate": rate, "seed": seed}
    rewards = finetune(network, classifier, plan, wanted=wanted, **how)
    seconds = time.perf_counter() - began
    after = judge("after")
    click.echo(f"\ntrained in {seconds:.1f} s")

    weights = out / "finetune-reward.safetensors"
    tens = (slice(0, 10), slice(10, 20))
    rows = [(name, i[ten]) for ten in tens for name, i in (("before", before), ("after", after))]
    draw(memory, rewards, rows, out / "finetune-reward.png")
    save_file(network.state_dict(), weights)
    click.echo(f"weights: {weights}")


if __name__ == "__main__":
    main()
