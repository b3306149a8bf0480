# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver-v3 with statistics of the digits network, beside solvers that need none.

The statistics are estimated on the training images with their classes (a few minutes on one core;
they are kept, and an estimate that was stopped goes on). The error is the root mean square distance
to the exact flow at t_min = 1e-3, for samples of all ten classes, in float64.

    python benchmarks/tune_digits.py --statistics out/digits.npz
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

import fastdiff as fd

V3: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dpm-v3-2", {}),
    ("dpm-v3-2", {"c_pseudo": True}),
    ("dpm-v3-3", {}),
    ("dpm-v3-3", {"c_pseudo": True}),
    ("dpm-v3-3", {"p_pseudo": True, "c_pseudo": True}),
    ("dpm-v3-3", {"c_pseudo": True, "published": True}),
)
SOLVERS = "dpmpp-3m,dpmpp-2m,deis-3,ipndm-3,unipc-2,unipc-3,dpm-v3-2,dpm-v3-3"


@click.command()
@click.option("--statistics", type=click.Path(path_type=Path), required=True)
@click.option("--samples", default=256, show_default=True)
@click.option("--intervals", default=120, show_default=True)
@click.option("--probes", default=1, show_default=True)
@click.option("--count", default=40, show_default=True, help="Samples that the error is over.")
@click.option("--reference", default=150, show_default=True, help="Steps of the exact flow.")
@click.option("--nfe", default="5,6,7,8,9,10", show_default=True)
@click.option("--grids", default="logsnr,uniform", show_default=True)
@click.option("--solvers", default=SOLVERS, show_default=True)
def main(
    statistics: Path,
    samples: int,
    intervals: int,
    probes: int,
    count: int,
    reference: int,
    **named: str,
) -> None:
    """Prints a table of errors for each grid; solvers with "S" have the statistics."""
    network = fd.models.digits()
    schedule = network.schedule
    images, classes = fd.models.digits_data("train")
    found = fd.tune.ems(
        network,
        schedule,
        data=images,
        cond={"y": classes},
        prediction=network.prediction,
        samples=samples,
        intervals=intervals,
        probes=probes,
        save=statistics,
        progress=lambda done, total: click.echo(f"statistics: {done} of {total}", err=True),
    )
    wide = network.double()
    x = fd.noise.normal((count, *network.shape), seeds=0, dtype=torch.float64)
    cond = {"y": torch.arange(count) % 10}

    def run(name: str, steps: int, grid: str, **options: Any) -> torch.Tensor:
        prediction = network.prediction
        plan = fd.plan(schedule, name, steps, grid=grid, prediction=prediction, **options)
        extras = found.extras(plan, x) if "statistics" in options else ()
        return fd.sample(wide, x, plan, cond=cond, extras=extras)

    exact = run("deis-rk4", reference, "logsnr")
    steps = [int(n) for n in named["nfe"].split(",")]
    plain: list[tuple[str, dict[str, Any]]] = [(n, {}) for n in named["solvers"].split(",")]
    tuned = [(name, {**options, "statistics": found}) for name, options in V3]
    for grid in named["grids"].split(","):
        click.echo(f"\n| {grid} | " + " | ".join(f"{n} NFE" for n in steps) + " |")
        click.echo("|---" * (len(steps) + 1) + "|")
        for name, options in (*plain, *tuned):
            said = [name, *("S" if k == "statistics" else f"{k}={v}" for k, v in options.items())]
            cells = [f"`{name}`" + (f" {', '.join(said[1:])}" if said[1:] else "")]
            for n in steps:
                error = (run(name, n, grid, **options) - exact).square().mean().sqrt()
                cells.append(f"{float(error):.4f}")
            click.echo("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
