# SPDX-License-Identifier: Apache-2.0
"""How the commands fail and print: one line on stderr, and nothing that steers the terminal.

Exit codes: 0 the work is done, 1 the work failed, 2 the command was wrong.
"""

from __future__ import annotations

from typing import IO, Any

import click


def printable(text: str) -> str:
    """The text with every character that is not shown, line feeds apart, as an escape in ASCII.

    Names and titles come out of plan files, and may hold sequences that steer a terminal.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else ascii(c)[1:-1]  # ascii("\x1b") is "'\\x1b'"
        for c in text
    )


def say(text: str) -> None:
    """Prints text that may come from a file."""
    click.echo(printable(text))


class Failure(click.ClickException):
    """An error of the work itself."""

    def show(self, file: IO[Any] | None = None) -> None:
        line = printable(" ".join(self.format_message().split()))
        click.echo(f"error: {line}", file=file, err=file is None)


class WrongCommand(Failure):
    """An error of the command line."""

    exit_code = 2


class Commands(click.Group):
    """A group whose errors are one line each."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except click.UsageError as error:
            raise _wrong(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _wrong(error) from error
        except (BrokenPipeError, click.exceptions.Exit, click.Abort):
            raise
        except MemoryError:
            raise Failure("fastdiff: there is too little memory for this much work.") from None
        except (
            ArithmeticError,
            ValueError,
            TypeError,
            OSError,
            RuntimeError,
            ImportError,
        ) as error:
            # what the library raises on purpose
            raise Failure(str(error) or type(error).__name__) from error


def _wrong(error: click.UsageError) -> click.ClickException:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    command = error.ctx.command_path if error.ctx is not None else "fastdiff"
    return WrongCommand(f"{error.format_message()} See: {command} --help")
