# SPDX-License-Identifier: Apache-2.0
"""`fastdiff solvers`: what there is to choose from."""

from __future__ import annotations

import click

import fastdiff as fd

from .shared import columns


@click.command()
def solvers() -> None:
    """List the solvers: name, measured order, evaluations a step, what each is, and its source."""
    rows = [["name", "order", "NFE/step", "what", "source"]]
    for name in fd.solvers.names():
        info = fd.solvers.info(name)
        order = "-" if info.measured_order is None else f"{info.measured_order:g}"
        more = f" {'-' if info.nfe_extra < 0 else '+'} {abs(info.nfe_extra):g}"
        nfe = f"{info.nfe_per_step:g}" + (more if info.nfe_extra else "")
        rows.append([name, order, nfe, info.summary, info.source])
    click.echo(columns(rows))
