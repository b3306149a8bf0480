# SPDX-License-Identifier: Apache-2.0
"""`fastdiff solvers`: what there is to choose from."""

from __future__ import annotations

import click

import fastdiff as fd

from .shared import columns


@click.command()
def solvers() -> None:
    """List the solvers: name, measured order, evaluations a step, what each is, and its source.

    After them stand those that choose their own steps, for `fastdiff.adaptive`.
    """
    head = ["name", "order", "NFE/step", "what", "source"]
    click.echo(columns([head, *(_row(fd.solvers.info(name)) for name in fd.solvers.names())]))
    click.echo("\nWith steps of their own choice (fastdiff.adaptive):")
    adaptive = fd.solvers.adaptive_names()
    click.echo(columns([head, *(_row(fd.solvers.adaptive_info(name)) for name in adaptive)]))


def _row(info: fd.solvers.Info) -> list[str]:
    order = "-" if info.measured_order is None else f"{info.measured_order:g}"
    more = f" {'-' if info.nfe_extra < 0 else '+'} {abs(info.nfe_extra):g}"
    nfe = f"{info.nfe_per_step:g}" + (more if info.nfe_extra else "")
    return [info.name, order, nfe, info.summary, info.source]
