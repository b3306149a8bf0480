# SPDX-License-Identifier: Apache-2.0
"""The results pages of the documents, made of the recorded results and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fastdiff.plans import files

from .records import Record, latest, read, where

Report = Callable[[Sequence[Record], str], str]


def section(records: Sequence[Record], report: Report) -> str:
    """A report for every machine that the records come from."""
    parts = []
    for found in latest(records):
        place = found[0].get("device", "cpu")
        parts += [where(found[0]), report(found, place)]
    return "\n\n".join(parts)


def results_page(
    folder: Path, title: str, guide: str, parts: Sequence[tuple[str, str, Report]]
) -> str:
    """A page of Markdown.

    Args:
        folder: Where the records are.
        title: Of the page.
        guide: The sentence under it, which leads to what the numbers mean.
        parts: For each section its title, the stem of the records' file, and the report.
    """
    blocks = [f"# {title}", guide]
    for heading, stem, report in parts:
        records = read(folder / f"{stem}.jsonl")
        body = section(records, report) if records else "Nothing is recorded."
        blocks += [f"## {heading}", body]
    return "\n\n".join(blocks) + "\n"


def write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text)
