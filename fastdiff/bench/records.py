# SPDX-License-Identifier: Apache-2.0
"""Results as lines of JSON: what was measured, and everything that tells the line from another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..plans import files
from .machine import VERSION, commit, cores, processor, versions
from .timing import Timing

Record = dict[str, Any]

# What was measured; all else in a record says where, and is the record's key.
MEASURED = (
    *("best", "p20", "median", "p80", "rounds", "error"),
    *("bandwidth", "bandwidth_median", "share", "share_median"),
    *("host", "host_p20", "host_p80"),
    *("launches", "registers", "spills"),
)


def record(bench: str, rival: str, measured: Timing | Mapping[str, Any], **where: Any) -> Record:
    """One result as a line of JSON holds it.

    Args:
        bench: The benchmark's stem.
        rival: Who was measured.
        measured: A timing (kept in microseconds), or values under names from `MEASURED`.
        **where: Shape, dtype, threads and whatever else tells this line from another.
    """
    head, dirty = commit()
    if isinstance(measured, Timing):
        values: dict[str, Any] = {
            name: round(value * 1e6, 4) if name != "rounds" else value
            for name, value in asdict(measured).items()
        }
        where["unit"] = "us"
    else:
        values = dict(measured)
    strange = sorted(set(values) - set(MEASURED))
    if strange:
        raise ValueError(f"record: measured values are {', '.join(MEASURED)}; got {strange}.")
    head = where.pop("commit", head)
    return {
        "bench": bench,
        "commit": head,
        "dirty": dirty,
        **versions(),
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        **where,
        "rival": rival,
        **values,
    }


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """The records of both; a new one takes the place of an old one with the same key."""
    lines: dict[str, Record] = {}
    for item in [*old, *new]:
        key = {k: v for k, v in item.items() if k not in MEASURED}
        lines[json.dumps(key, sort_keys=True)] = item
    return list(lines.values())


def write(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Adds records to a file of JSON lines; a line with the same key is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(item, allow_nan=False) + "\n" for item in merged(read(path), records))
    files.write(path, "".join(lines))


def read(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file; none where there is no such file."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def latest(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each machine, in order of the machines; of each, those of its last commit."""
    commits = {machine_of(r): r["commit"] for r in records}
    groups: dict[tuple[str, str], list[Record]] = {machine: [] for machine in commits}
    for r in records:
        if r["commit"] == commits[machine_of(r)]:
            groups[machine_of(r)].append(r)
    return list(groups.values())


def machine_of(line: Record) -> tuple[str, str]:
    return line["cpu"], line.get("gpu", "")


def where(line: Record) -> str:
    """One line that names the machine, the versions and the commit of a record."""
    names = ", ".join(f"{name} {line[name]}" for name in versions())
    if line["commit"].startswith(VERSION):
        tree = "no commit is known: the package as it is installed"
    else:
        tree = f"commit {line['commit']}" + " with uncommitted changes" * bool(line["dirty"])
    text = f"{line['cpu']}, {line['cores']} cores; {names}; {tree}."
    if "torchdiffeq" in line:
        text = f"torchdiffeq {line['torchdiffeq']}; {text}"
    if "gpu" in line:
        text = f"{line['gpu']}, driver {line['driver']}, triton {line['triton']}; {text}"
    return text
