# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: timing rivals side by side, records, tables and a gate before them.

Rivals of one run take turns, so that whatever else the machine does falls on all of them alike; a
ratio is only ever taken between numbers of one run. A record says where it comes from (commit,
versions, machine, shape, dtype), so that it can be put beside another.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdiff as fd
from fastdiff.plans import AT_E, EVALUATE, WRITES_E, WRITES_X

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]

# What was measured; all else in a record says where, and is the record's key.
MEASURED = (
    *("best", "p20", "median", "p80", "rounds", "error"),
    *("bandwidth", "bandwidth_median", "share", "share_median"),
    *("host", "host_p20", "host_p80"),
)


class GateError(RuntimeError):
    """Rivals that should agree do not: no time is worth printing."""


# -- timing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rival:
    """One contestant.

    Attributes:
        name: As printed.
        run: The work that is timed.
        units: Units of work in one call of `run` (steps of a loop); times are divided by it.
        setup: Called before each `run`, not timed.
    """

    name: str
    run: Callable[[], Any]
    units: int = 1
    setup: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds a unit over the rounds of a run."""

    best: float
    p20: float
    median: float
    p80: float
    rounds: int


def summary(seconds: Sequence[float]) -> Timing:
    """Best, percentiles (linear interpolation between ranks) and count of some times."""
    if not len(seconds):
        raise ValueError("summary: at least one time is needed; got none.")
    p20, median, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
    return Timing(float(min(seconds)), p20, median, p80, len(seconds))


def race(
    rivals: Sequence[Rival],
    *,
    seconds: float = 1.0,
    warmup: int = 3,
    rounds: int = 5,
    turn: float = 1e-3,
) -> dict[str, Timing]:
    """Times the rivals in turns.

    Args:
        rivals: Contestants with different names.
        seconds: How long to go on, all rivals together.
        warmup: Untimed runs of each first.
        rounds: Timed rounds at least, however long they take.
        turn: A turn lasts at least about this many seconds: a quick rival runs several times in it,
            so that what the one before it left in the caches counts little. A rival with a setup
            runs once.

    Returns:
        Seconds a unit, by name, one time a turn. Who goes first changes from round to round.
    """
    if len({rival.name for rival in rivals}) < len(rivals):
        raise ValueError(f"race: names differ; got {[rival.name for rival in rivals]}.")
    clock = time.perf_counter

    def take(rival: Rival, runs: int) -> float:
        """Seconds of one turn."""
        if rival.setup is not None:
            rival.setup()
        run = rival.run
        start = clock()
        for _ in range(runs):
            run()
        return clock() - start

    runs = {rival.name: 1 for rival in rivals}
    for rival in rivals:
        once = min(take(rival, 1) for _ in range(max(warmup, 1)))
        if rival.setup is None:
            runs[rival.name] = max(1, math.ceil(turn / max(once, 1e-9)))
    taken: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    count, end = 0, clock() + seconds
    while count < rounds or clock() < end:
        for k in range(len(rivals)):
            rival = rivals[(k + count) % len(rivals)]
            repeats = runs[rival.name]
            taken[rival.name].append(take(rival, repeats) / (repeats * rival.units))
        count += 1
    return {name: summary(times) for name, times in taken.items()}


def agree(who: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """The gate: ||got - wanted|| <= tolerance ||wanted||, both finite.

    Raises:
        GateError: They differ by more.
    """
    norm = float(wanted.double().norm())
    error = float((got.double() - wanted.double()).norm()) / norm
    if not error <= tolerance:
        raise GateError(
            f"{who}: rivals agree to {tolerance:g} before they are timed; got a relative "
            f"difference of {error:.3g}. Nothing was timed."
        )


# -- bytes -----------------------------------------------------------------------------------------


def stage_registers(plan: fd.Plan, row: int, weights: Sequence[float] = (1.0,)) -> tuple[int, int]:
    """(reads, writes) of whole registers that one row of a plan costs, by its table.

    Reads: x, e, one output per guidance branch (`weights`), each earlier h that is weighed, each
    extra register. Writes: x, e and the push. The network's input m is not among them
    (`stage_bytes` adds it).
    """
    layout = replace(plan.layout, branches=len(weights))
    value = dict(zip(layout.columns, plan.pack(weights)[row].tolist(), strict=True))
    flags = int(value["flags"])
    writes_x, writes_e = bool(flags & WRITES_X), bool(flags & WRITES_E)
    evaluates, at_e = bool(flags & EVALUATE), bool(flags & AT_E)
    point = evaluates and value["p"] != 0.0
    reads_x = (writes_x and value["a_x"] != 0.0) or (writes_e and value["d_x"] != 0.0)
    reads_e = (writes_x and value["a_e"] != 0.0) or (writes_e and value["d_e"] != 0.0)
    reads = int(reads_x or (point and not at_e)) + int(reads_e or (point and at_e))
    if evaluates:
        reads += sum(value[f"k_{g}"] != 0.0 for g in range(layout.branches))
    pairs = [(f"past_b_{k}", f"past_g_{k}") for k in range(int(value["n_terms"]))]
    pairs += [(f"r_{i}", f"s_{i}") for i in range(layout.extras)]
    reads += sum((writes_x and value[b] != 0.0) or (writes_e and value[g] != 0.0) for b, g in pairs)
    return reads, int(writes_x) + int(writes_e) + int(value["push"] >= 0) + int(
        value["push_x"] >= 0
    )


def stage_bytes(
    plan: fd.Plan,
    row: int,
    numel: int,
    state: torch.dtype = torch.float32,
    network: torch.dtype | None = None,
    weights: Sequence[float] = (1.0,),
    copies: int | None = None,
) -> int:
    """Bytes that one row of a plan moves between memory and processor at best.

    Args:
        plan: The plan.
        row: Which stage.
        numel: Elements of the state.
        state: Dtype of the registers.
        network: Dtype of the network's inputs and outputs. None: the state's, and the network is
            given x or e itself. Another one: the input m is written as well, except by the last
            row.
        weights: Of the guidance branches, one output each.
        copies: How often the input m is written. None: once where the dtypes differ, else not.
    """
    reads, writes = stage_registers(plan, row, weights)
    network = state if network is None else network
    if copies is None:
        copies = int(network != state)
    outputs = plan.stages[row].evaluate * sum(w != 0.0 for w in weights)
    inputs = copies * (row + 1 < len(plan.stages))
    whole = (reads - outputs + writes) * state.itemsize
    return (whole + (outputs + inputs) * network.itemsize) * numel


# -- where a number comes from ---------------------------------------------------------------------


@functools.cache
def commit() -> tuple[str, bool]:
    """(hash of HEAD, whether the tree differs from it); ("none", True) without a commit."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    # results are what a run writes: they do not make the measured code another one
    changes = git("status", "--porcelain", "--", ":/", ":(exclude)benchmarks/results", ":!docs")
    return head or "none", head is None or changes != ""


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, torch, NumPy, fastdiff and, where it is installed, diffusers."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastdiff": fd.__version__,
    }
    try:
        found["diffusers"] = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        found["diffusers"] = "none"
    return found


@functools.cache
def processor() -> str:
    """The CPU's model, with family and model number where its name alone says little."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^([a-z ]+?)\s*: (.*)$", text, re.MULTILINE))
    name = found.get("model name", platform.machine()).strip()
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found.get('model', '?')})"
    return name


@functools.cache
def driver() -> str:
    """NVIDIA's driver, as nvidia-smi says it; "unknown" without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines else "unknown"


def cores() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def write(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Adds records to a file of JSON lines; a line with the same key is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[str, str] = {}
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for item in [*map(json.loads, old), *records]:
        key = {k: v for k, v in item.items() if k not in MEASURED}
        lines[json.dumps(key, sort_keys=True)] = json.dumps(item, allow_nan=False)
    path.write_text("".join(line + "\n" for line in lines.values()), encoding="utf-8")


# -- for people ------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, without an exponent from 0.001 to 99999."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 2 - int(np.floor(np.log10(abs(value)))) if value else 0
        return f"{value:.{max(digits, 0)}f}"
    return f"{value:.1e}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is aligned as plain text as well; the first column is left-aligned."""
    cells = [list(head), *map(list, rows)]
    widths = [max(3, *(len(row[k]) for row in cells)) for k in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def where() -> str:
    """One line that names the machine, the versions and the commit."""
    head, dirty = commit()
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    tree = f"commit {head}" + (" with uncommitted changes" if dirty else "")
    return f"{processor()}, {cores()} cores; {names}; {tree}."


def replace_section(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Puts text between `<!-- name:begin -->` and `<!-- name:end -->` of a document.

    Raises:
        ValueError: The document has no such pair of lines.
    """
    path = Path(path)
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"replace_section: {path} needs the lines {begin} and {end}. Add them.")
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
