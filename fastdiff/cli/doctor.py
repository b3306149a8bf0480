# SPDX-License-Identifier: Apache-2.0
"""`fastdiff doctor`: what runs on this machine, and which backend serves what there."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import click
import torch

import fastdiff as fd

from ..backends import choice
from .errors import Failure, say
from .shared import columns


@click.command()
@click.option(
    "--measure",
    is_flag=True,
    help="Time the backends of every GPU first, and keep which serves fastest. It takes seconds.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="Keep the times in this file. [default: the user's cache]",
)
def doctor(measure: bool, out: Path | None) -> None:
    """Say which backends run here, what the others need, and the versions that matter."""
    if out is not None and not measure:
        raise click.UsageError("--out keeps what is measured. Give --measure as well.")
    rows = [["backend", "here"], *map(list, fd.backends.status().items())]
    say(columns(rows))
    count = torch.cuda.device_count()
    for device in [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]:
        say("\n" + _choice(device, measure, out))
    devices = [torch.cuda.get_device_name(i) for i in range(count)]
    versions = [
        ["fastdiff", fd.__version__],
        ["torch", torch.__version__],
        ["python", platform.python_version()],
        ["platform", platform.platform()],
        ["cuda devices", ", ".join(devices) or "none"],
        ["threads", str(torch.get_num_threads())],
    ]
    versions += [
        [name, value] for name, value in sorted(os.environ.items()) if name.startswith("FASTDIFF_")
    ]
    say("\n" + columns(versions))


def _choice(device: torch.device, measure: bool, out: Path | None) -> str:
    """Which backend serves on a device, and why."""
    names = fd.backends.rivals(device)
    if len(names) < 2:
        none = " Nothing was measured." if measure else ""
        return f"{device}: {names[0] if names else 'torch'} serves. Nothing is to be chosen.{none}"
    if measure:
        try:
            fd.backends.measure(device, out)
        except OSError as error:
            raise Failure(f"--measure: the times cannot be kept ({error}).") from error
    by_name = choice.asked() == "name"
    table = None if by_name else fd.backends.table(device)
    if table is None:
        why = "FASTDIFF_CHOOSE=name" if by_name else "`fastdiff doctor --measure` times them"
        return (
            f"{device}: {names[0]} serves before {', '.join(names[1:])}, by the order of the "
            f"names. {why}."
        )
    head = f"{device}: the fastest of {', '.join(names)} serves. Times: {table.source}."
    rows = [["state", "noise", "size", *(f"{name}, us" for name in names), "serves"]]
    for cell, times in table.cells.items():
        state, noisy, size = cell
        shown = [f"{times[name] * 1e6:.2f}" if name in times else "-" for name in names]
        serving = table.fastest(cell, names) or names[0]
        rows.append([state, "yes" if noisy else "no", size, *shown, serving])
    return f"{head}\n{columns(rows)}"
