# SPDX-License-Identifier: Apache-2.0
"""Train the digits network of `fd.models.digits()` and its classifier, on one CPU core.

    python examples/train_digits.py --out out/                  # everything, about eight minutes
    python examples/train_digits.py --out out/ --minutes 2      # stop early ...
    python examples/train_digits.py --out out/ --resume         # ... and go on, to the same bits
    python examples/train_digits.py --out out/ --evaluate       # measure them, draw samples
    python examples/train_digits.py --evaluate --shipped        # measure the package's weights

The folder then holds `digits.safetensors` (averaged weights), `classifier.safetensors`, `loss.png`,
`checkpoint.pt`, from which --resume continues, and, after --evaluate, `samples.png`.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from common import Example, save, show
from matplotlib.figure import Figure
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from tqdm import tqdm

import fastdiff as fd
from fastdiff._files import replacing
from fastdiff.models import DigitsClassifier, DigitsDiT, digits, digits_classifier, digits_data

T_MIN = 1e-3
WARMUP = 200
EMA_DECAY = 0.999
CONDITION_DROPOUT = 0.12
CLASSIFIER_STEPS = 1320
CLASSIFIER_BATCH = 64


@dataclass
class Run:
    """All that a training run must remember to go on as if it had never stopped."""

    settings: dict[str, Any]
    network: DigitsDiT
    average: DigitsDiT
    optimizer: torch.optim.Optimizer
    random: torch.Generator
    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def start(cls, settings: dict[str, Any]) -> Run:
        torch.manual_seed(settings["seed"])
        network = DigitsDiT(dropout=settings["dropout"])
        average = copy.deepcopy(network).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings["lr"], betas=(0.9, 0.99), weight_decay=0.01
        )
        random = torch.Generator().manual_seed(settings["seed"])
        return cls(settings, network, average, optimizer, random)

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader finds the old one or the new one, never a part."""
        state = {
            "settings": self.settings,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "global_random": torch.get_rng_state(),  # dropout draws from it
            "step": self.step,
            "losses": self.losses,
            "held_out": self.held_out,
        }
        with replacing(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint written with the same settings."""
        state = torch.load(path, weights_only=True)
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise click.UsageError(
                    f"--resume: the checkpoint was made with --{name} {state['settings'][name]}; "
                    f"got {value}. Give the same value, or another --out to start afresh."
                )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["global_random"])
        self.step, self.losses, self.held_out = state["step"], state["losses"], state["held_out"]


def save_weights(path: Path, module: nn.Module, settings: dict[str, Any]) -> None:
    """Write the parameters, with the settings that made them as the file's metadata."""
    parameters = {name: value.contiguous() for name, value in module.state_dict().items()}
    with replacing(path) as file:
        file.write(to_bytes(parameters, {"training": json.dumps(settings, sort_keys=True)}))


def v_loss(network: DigitsDiT, x0: Tensor, y: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
    """Mean of |v_hat - v|², v = alpha eps - sigma x0: an x0 error weighted by 1 + alpha²/sigma²."""
    times = t.double().numpy()
    alpha, sigma = (
        torch.from_numpy(scale).float().view(-1, 1, 1, 1)
        for scale in (network.schedule.alpha(times), network.schedule.sigma(times))
    )
    v = alpha * epsilon - sigma * x0
    return F.mse_loss(network(alpha * x0 + sigma * epsilon, t, y), v)


def spread_times(batch: int, offset: Tensor) -> Tensor:
    """Times that cover (T_MIN, 1] evenly, one in each of `batch` strata: less noise in the loss."""
    return T_MIN + (1 - T_MIN) * (torch.arange(batch) + offset) / batch


@torch.no_grad()
def held_out_loss(network: DigitsDiT, images: Tensor, labels: Tensor) -> float:
    """The loss on images that no training step sees, on fixed times and noises; only reported."""
    random = torch.Generator().manual_seed(12345)
    repeats = 4
    images, labels = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    order = torch.randperm(len(images), generator=random)
    t = spread_times(len(images), torch.rand(len(images), generator=random))[order]
    epsilon = torch.randn(images.shape, generator=random)
    return v_loss(network, images, labels, t, epsilon).item()


def train(run: Run, out: Path, minutes: float | None) -> bool:
    """Train until the last step (True) or until the time is up (False)."""
    images, labels = digits_data("train")
    held_images, held_labels = digits_data("held-out")
    steps, batch, lr = (run.settings[name] for name in ("steps", "batch", "lr"))
    checkpoint_every = max(1, min(500, steps // 4))
    began = time.monotonic()
    run.network.train()
    with tqdm(total=steps, initial=run.step, desc="network", unit="step") as bar:
        while run.step < steps:
            chosen = torch.randint(len(images), (batch,), generator=run.random)
            y = labels[chosen]
            dropped = torch.rand(batch, generator=run.random) < CONDITION_DROPOUT
            y = torch.where(dropped, run.network.null_class, y)
            t = spread_times(batch, torch.rand(batch, generator=run.random))
            epsilon = torch.randn((batch, 1, 8, 8), generator=run.random)
            loss = v_loss(run.network, images[chosen], y, t, epsilon)

            warm = min(1.0, (run.step + 1) / WARMUP)
            run.optimizer.param_groups[0]["lr"] = (
                lr * warm * 0.5 * (1 + math.cos(math.pi * run.step / steps))
            )
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
            run.optimizer.step()
            decay = min(EMA_DECAY, (1 + run.step) / (10 + run.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(run.average.parameters()), list(run.network.parameters()), 1 - decay
                )
            run.step += 1
            run.losses.append(loss.item())
            bar.update()
            if run.step % 20 == 0:
                bar.set_postfix(loss=f"{np.mean(run.losses[-200:]):.4f}", refresh=False)
            if run.step % checkpoint_every == 0 or run.step == steps:
                held = held_out_loss(run.average, held_images, held_labels)
                run.held_out.append((run.step, held))
                run.save(out / "checkpoint.pt")
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
    run.save(out / "checkpoint.pt")
    return run.step == steps


def train_classifier(seed: int, steps: int) -> DigitsClassifier:
    """A classifier of the training split, with random shifts of up to half a pixel."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    images, labels = digits_data("train")
    model = DigitsClassifier()
    batch = CLASSIFIER_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier", unit="step"):
        chosen = torch.randint(len(images), (batch,), generator=random)
        affine = torch.eye(2, 3).repeat(batch, 1, 1)
        affine[:, :, 2] = (torch.rand((batch, 2), generator=random) - 0.5) / 4  # of half a width
        grid = F.affine_grid(affine, [batch, 1, 8, 8], align_corners=False)
        # shifted as ink (0 outside the image), then back to [-1, 1]
        moved = F.grid_sample(images[chosen] + 1, grid, align_corners=False) - 1
        loss = F.cross_entropy(model(moved), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval().requires_grad_(False)


def draw_losses(run: Run, path: Path) -> None:
    """The smoothed training loss and the held-out loss over the steps."""
    figure: Any = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    window = max(1, min(100, len(run.losses) // 10))
    smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
    axes.plot(np.arange(window, len(run.losses) + 1), smooth, label="training")
    if run.held_out:
        axes.plot(*zip(*run.held_out, strict=True), ".-", label="held out, averaged weights")
    axes.set(xlabel="step", ylabel="loss (v)", yscale="log")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save(figure, path, dpi=100)


def draw_samples(rows: dict[str, Tensor], path: Path) -> None:
    """One row of ten images, class 0 to 9, for each named tensor [10, 1, 8, 8]."""
    figure: Any = Figure(figsize=(5, 0.44 * len(rows) + 0.2), layout="constrained")
    clamped = [(name, images.clamp(-1, 1)) for name, images in rows.items()]
    show(figure.subplots(), clamped, [str(k) for k in range(10)])
    save(figure, path, dpi=100)


def evaluate(network: DigitsDiT, classifier: DigitsClassifier, path: Path) -> None:
    """Print how many samples the classifier recognises; draw the first ten of each setting."""
    held_images, held_labels = digits_data("held-out")
    train_images = digits_data("train")[0]

    def nearest(images: Tensor) -> float:
        return torch.cdist(images.flatten(1), train_images.flatten(1)).amin(1).mean().item()

    def accuracy(images: Tensor, labels: Tensor) -> float:
        return (classifier(images).argmax(1) == labels).float().mean().item()

    rows = {}
    y = torch.arange(10).repeat(100)
    none = torch.full_like(y, network.null_class)
    click.echo("| NFE | guidance | recognised | mean distance to the nearest training image |")
    click.echo("|---|---|---|---|")
    for steps in (5, 10, 20):
        plan = fd.plan(network.schedule, "dpmpp-2m", steps, prediction=network.prediction)
        for scale in (1.0, 2.0):
            noise = fd.noise.prior(plan, (len(y), *network.shape), seeds=0)
            guidance = None if scale == 1.0 else fd.CFG(scale, uncond={"y": none})
            images = fd.sample(network, noise, plan, cond={"y": y}, guidance=guidance)
            click.echo(
                f"| {steps} | {scale:g} | {accuracy(images, y):.1%} | {nearest(images):.2f} |"
            )
            rows[f"{steps} NFE, guidance {scale:g}"] = images[:10]
    recognised, distance = accuracy(held_images, held_labels), nearest(held_images)
    click.echo(f"| held-out images | | {recognised:.1%} | {distance:.2f} |")
    examples = torch.stack([held_images[held_labels == k][0] for k in range(10)])
    draw_samples({"held-out images": examples, **rows}, path)


@click.command(cls=Example, context_settings={"show_default": True})
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out"),
    help="Folder for the weights, the pictures and the checkpoint.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=9000,
    help="Optimiser steps; the learning rate falls to zero at the last.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    help="Stop the network's training after so many minutes; go on later with --resume.",
)
@click.option("--batch", type=click.IntRange(1), default=128)
@click.option("--lr", type=click.FloatRange(0), default=2e-3, help="Peak learning rate.")
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    help="Dropout rate in the network's blocks.",
)
@click.option("--seed", type=int, default=0, help="Fixes every random number of the run.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in --out.")
@click.option(
    "--classifier/--no-classifier",
    default=True,
    help="Train the classifier too (half a minute).",
)
@click.option(
    "--evaluate",
    "evaluate_only",
    is_flag=True,
    help="Train nothing: measure the weights in --out and draw samples.",
)
@click.option("--shipped", is_flag=True, help="With --evaluate: measure the package's weights.")
def main(
    *,
    out: Path,
    steps: int,
    minutes: float | None,
    batch: int,
    lr: float,
    dropout: float,
    seed: int,
    threads: int,
    resume: bool,
    classifier: bool,
    evaluate_only: bool,
    shipped: bool,
) -> None:
    """Train the class-conditional digits network and its classifier, on the CPU."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if evaluate_only:
        paths = [None if shipped else out / name for name in ("digits", "classifier")]
        paths = [path and path.with_suffix(".safetensors") for path in paths]
        evaluate(digits(paths[0]), digits_classifier(paths[1]), out / "samples.png")
        return
    checkpoint = out / "checkpoint.pt"
    if resume and not checkpoint.is_file():
        raise click.UsageError(
            f"--resume: --out holds a checkpoint; got {out} without one. Leave out --resume."
        )
    if classifier:  # before the network: its dropout and this share one generator
        model = train_classifier(seed, min(CLASSIFIER_STEPS, steps))
        images, labels = digits_data("held-out")
        right = (model(images).argmax(1) == labels).float().mean().item()
        save_weights(out / "classifier.safetensors", model, {"seed": seed})
        click.echo(f"classifier: {right:.2%} of {len(images)} held-out images recognised")
    settings = {"steps": steps, "batch": batch, "lr": lr, "dropout": dropout, "seed": seed}
    run = Run.start(settings)
    if resume:
        run.load(checkpoint)
    finished = train(run, out, minutes)
    save_weights(out / "digits.safetensors", run.average, settings)
    draw_losses(run, out / "loss.png")
    click.echo(
        f"network: {run.step} of {steps} steps; in {out}. "
        + ("Measure it with --evaluate." if finished else "Go on with --resume.")
    )


if __name__ == "__main__":
    main()
