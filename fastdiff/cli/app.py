# SPDX-License-Identifier: Apache-2.0
"""The group of all commands."""

from __future__ import annotations

import click

import fastdiff as fd

from .bench import bench
from .compare import compare
from .doctor import doctor
from .errors import Commands
from .plan import plan
from .sample import sample
from .solvers import solvers


@click.group(
    name="fastdiff",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(fd.__version__, prog_name="fastdiff", message="%(prog)s %(version)s")
def commands() -> None:
    """Training-free samplers for diffusion and flow models.

    \b
    Examples:
      fastdiff sample --solver dpmpp-2m --steps 10 --out digits.png
      fastdiff compare --solvers ddim,dpmpp-2m,deis-3 --out compare.png
      fastdiff plan --schedule flow --solver euler --steps 4
      fastdiff solvers
      fastdiff doctor
      fastdiff bench stage
    """


for command in (sample, compare, plan, solvers, doctor, bench):
    commands.add_command(command)
