# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: one command for each, one for all of them, and one that writes the documents.

    python benchmarks/run.py stage --short
    python benchmarks/run.py all
    python benchmarks/run.py report       # benchmarks/results/*.jsonl to docs/results/
    python benchmarks/run.py targets stage.jsonl loop.jsonl gradients.jsonl

Each prints a page in Markdown, and adds its results to a file of JSON lines where `--out` names
one. No time is printed unless the rivals have agreed before. Exit 1 where a gate stayed shut or
something failed.
"""

from __future__ import annotations

from pathlib import Path

import bench_adjoint
import bench_flow
import bench_gradients
import bench_loop
import bench_order
import bench_stage
import bench_step
import click
from command import command_of
from reports import targets
from reports.pages import write_pages

from fastdiff.bench.records import read

ROOT = Path(__file__).resolve().parent.parent


# A benchmark joins by its line here.
BENCHES = (
    bench_stage.BENCH,
    bench_step.BENCH,
    bench_loop.BENCH,
    bench_gradients.BENCH,
    bench_adjoint.BENCH,
    bench_order.BENCH,
    bench_flow.BENCH,
)


@click.group(help=(__doc__ or "").partition("\n")[0])
def main() -> None:
    pass


for bench in BENCHES:
    main.add_command(command_of(bench))


@main.command("all")
@click.pass_context
def all_benches(context: click.Context) -> None:
    """Run every benchmark with its defaults."""
    failed = []
    for bench in BENCHES:
        click.echo(f"\n# {bench.name}\n")
        try:
            context.invoke(main.commands[bench.name])
        except click.ClickException as error:
            failed.append(error.format_message())
    if failed:
        raise click.ClickException("\n".join(failed))


@main.command()
def report() -> None:
    """Write the tables and plots of docs/ from benchmarks/results/."""
    for path in write_pages(ROOT / "benchmarks" / "results", ROOT / "docs"):
        click.echo(path.relative_to(ROOT))


@main.command("targets")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def show_targets(files: tuple[Path, ...]) -> None:
    """Print the targets of a GPU beside the results in FILES; a missing file holds none."""
    lines = []
    for path in files:
        try:
            lines += [dict(line) for line in read(path)]
        except (OSError, TypeError, ValueError) as error:
            raise click.ClickException(
                f"targets: {path} holds results, a line of JSON each; got something else ({error})."
            ) from error
    click.echo(targets.page(lines))


if __name__ == "__main__":
    main()
