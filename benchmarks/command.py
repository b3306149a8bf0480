# SPDX-License-Identifier: Apache-2.0
"""The command of a benchmark: the options that all have, and its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from fastdiff.bench.machine import machine
from fastdiff.bench.runs import Bench, Job, Run, Setting

FILE = click.Path(dir_okay=False, path_type=Path)


def names(allowed: Any) -> click.Choice[str]:
    return click.Choice(tuple(allowed))


def option(*declarations: str, **settings: Any) -> click.Option:
    """An option of one benchmark, for `Bench.options`."""
    return click.Option(declarations, show_default=True, **settings)


def whole_numbers(context: Any, parameter: Any, value: str) -> tuple[int, ...]:
    """A callback: "5,10" is (5, 10)."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"whole numbers such as 5,10 are needed; got {value!r}.") from None


def device_of(place: str) -> torch.device:
    """The device that `--device` names."""
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: PyTorch finds no CUDA device here.")
    return torch.device(place, 0) if place == "cuda" else torch.device(place)


def common(bench: Bench) -> list[click.Option]:
    """The options that every benchmark has."""
    at_least_1 = click.IntRange(min=1)
    return [
        option(
            "--device",
            default="auto",
            type=names(("auto", "cpu", "cuda")),
            help="Where to run; auto takes a GPU where there is one.",
        ),
        option(
            "--short/--full",
            default=None,
            help="Fewer jobs, or all. Without either: full on CUDA, short elsewhere.",
        ),
        option("--threads", default=bench.threads, type=at_least_1, help="Threads of the CPU."),
        option(
            "--rounds", default=bench.rounds, type=at_least_1, help="Turns of each rival, at least."
        ),
        option("--seconds", default=bench.seconds, help="How long the rivals of a job take turns."),
        option(
            "--budget",
            default=math.inf,
            type=float,
            help="Seconds; jobs likely to outlast them are left out.",
        ),
        option("--only", default="", help="Run the jobs alone whose name has this text: compiled."),
        option("--commit", help="The commit of the code, where there is no git to ask."),
        option("--out", type=FILE, help="Add the results to this file of JSON lines."),
        option("--summary", type=FILE, help="Write the page to this file after every job."),
    ]


def command_of(bench: Bench) -> click.Command:
    """The command that runs a benchmark and prints its page."""

    def run(
        *,
        device: str,
        short: bool | None,
        threads: int | None,
        rounds: int,
        seconds: float,
        budget: float,
        only: str,
        commit: str | None,
        out: Path | None,
        summary: Path | None,
        **options: Any,
    ) -> None:
        place = device_of(device)
        about = machine(place) | ({"commit": commit} if commit else {})
        brief = place.type == "cpu" if short is None else short
        setting = Setting(place, brief, rounds, seconds, tuple(about.items()))
        jobs = bench.jobs(setting, **options)
        made = Run(bench, setting, out, summary, notes=bench.notes(setting))
        made.go([_threaded(job, threads) for job in jobs if only in job.name], budget)
        click.echo(made.page())
        if made.refused or made.lost:
            raise click.ClickException(
                f"{bench.name}: {made.refused} gates stayed shut and {len(made.lost)} rivals or "
                "jobs failed; see above."
            )

    return click.Command(
        bench.name, callback=run, params=[*common(bench), *bench.options], help=bench.about
    )


def _threaded(job: Job, threads: int | None) -> Job:
    return job if job.threads is not None else replace(job, threads=threads)
