# SPDX-License-Identifier: Apache-2.0
"""What several commands need: the options that say which plan, files in and out, aligned text."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch

import fastdiff as fd

from .._files import NotAFile, replacing
from .errors import Failure
from .types import MOST, SolverName, SolverOption, Whole

Command = Callable[..., Any]
JSON_FILE: dict[str, Any] = {"type": click.Path(path_type=Path), "metavar": "FILE.json"}
COUNT = Whole(1, MOST)
SEED = Whole(-(2**62), 2**62)  # a seed is 64 bits wide, and sample i of a batch has SEED + i

progress_option = click.option(
    "--progress/--no-progress", default=True, help="Show a progress bar on stderr."
)


# Parameters that `plan_options` adds.
PLAN_OPTIONS = ("solver", "steps", "grid", "options")


def plan_options(command: Command) -> Command:
    """The options that say which plan, for every command that makes one."""
    grids = f"Times of the steps: auto, {', '.join(fd.grids.names())}. karras(5) sets karras's rho."
    solver = "The solver's name; `fastdiff solvers` lists them."
    options = [
        click.option("--solver", default="dpmpp-2m", type=SolverName(), help=solver),
        click.option("--steps", default=10, type=COUNT, help="Number of intervals of the grid."),
        click.option("--grid", default="auto", metavar="NAME", help=grids),
        click.option(
            *("-o", "options"),
            type=SolverOption(),
            multiple=True,
            help="An option of the solver, such as -o eta=0.5; it may be repeated.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def loaded(option: str, path: Path, unused: Sequence[str]) -> fd.Plan:
    """The plan in a file.

    Args:
        option: What the file was given to.
        path: The file.
        unused: Parameters of the command that make a plan, which a loaded one has no use for.

    Raises:
        click.UsageError: One of them was given as well.
    """
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = [n for n in unused if context.get_parameter_source(n) != default]
    if given:
        names = [p.opts[0] for p in context.command.params if p.name in given]
        raise click.UsageError(
            f"{option} takes the whole plan from a file; got {', '.join(names)} as well. "
            "Leave them out."
        )
    try:
        return fd.Plan.load(path)
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be read ({error.strerror}).") from error


@contextlib.contextmanager
def output(path: Path, option: str = "--out") -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well.

    Entering proves that `path` can be written, so the work goes inside the block.

    Args:
        path: The file.
        option: What it was given to.
    """
    check_folder(path, option)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(replacing(path))
        except NotAFile as error:
            kind = error.kind
            raise ValueError(f"{option}: a file is needed; got the {kind} {path}.") from error
        except OSError as error:
            raise ValueError(f"{option}: {path} cannot be written ({error.strerror}).") from error
        yield file


class _Tried(Exception):
    """Ends the block of a file that is not to be written yet."""


def check_writable(path: Path, option: str) -> None:
    """Refuses a file that cannot be written, and leaves what stands there."""
    with contextlib.suppress(_Tried), output(path, option):
        raise _Tried


def check_folder(path: Path, option: str) -> None:
    """Refuses a file whose folder does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"{option}: the folder {path.parent} does not exist. Make it first.")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small gain little from threads, and lose tenfold to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def optional(module: str) -> Any:
    """A module of a package that only the command line needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise Failure(
            f"fastdiff: this command needs {missing}; it is not installed. "
            'Run: pip install "fastdiff-engine[cli]"'
        ) from None


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
