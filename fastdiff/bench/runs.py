# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is, and how one is run: job by job, gated, within a budget, written as it goes.

Jobs come in order of importance, and results are written after each of them, so a run that is cut
short leaves the best part. A job whose gate is shut is not measured. A job that raises does not
keep the next from running.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .gate import GateError
from .records import Record, merged, record, where, write
from .text import reason

if TYPE_CHECKING:
    import click

NAMED = 5  # jobs that a note about the budget names


@dataclass(frozen=True)
class Setting:
    """What all jobs of a run share.

    Attributes:
        device: Where they run.
        short: Whether the short list of jobs is asked for.
        rounds: Turns of each rival, at least.
        seconds: How long a race goes on.
        about: What every record says of the machine.
    """

    device: torch.device
    short: bool = True
    rounds: int = 5
    seconds: float = 1.0
    about: tuple[tuple[str, Any], ...] = ()

    @property
    def commit(self) -> dict[str, Any]:
        """The commit alone, where it was given by hand: for numbers that name no device."""
        return {key: value for key, value in self.about if key == "commit"}


@dataclass(frozen=True)
class Gate:
    """A check before a measurement; jobs with one key share it, and it runs once.

    Attributes:
        key: What it checks, as printed.
        check: Raises `GateError` where rivals disagree.
    """

    key: Hashable
    check: Callable[[], None] = field(compare=False)


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        name: As printed.
        measure: Gives the records; adds to the list it is given why a rival was lost. It may
            raise `GateError` itself.
        gate: What must pass first.
        seconds: A guess of how long it takes, to keep to a budget. 0: too short to matter.
        threads: The CPU's threads. None: those of the run.
    """

    name: str
    measure: Callable[[list[str]], list[Record]]
    gate: Gate | None = None
    seconds: float = 0.0
    threads: int | None = None


def no_notes(setting: Setting) -> list[str]:
    return []


@dataclass(frozen=True)
class Bench:
    """A benchmark: a list of jobs and a report on their records.

    Attributes:
        name: Of the command, and of the record's file unless `file` says otherwise.
        about: One line for the command's help.
        jobs: Called with the setting and the options by name.
        report: Records and "cpu" or "cuda" to Markdown.
        options: The command's own, beside those that all have.
        notes: What is to be said before the tables.
        rounds: Default of `--rounds`.
        seconds: Default of `--seconds`.
        threads: Default of `--threads`. None: what PyTorch chooses.
    """

    name: str
    about: str
    jobs: Callable[..., list[Job]]
    report: Callable[[Sequence[Record], str], str]
    options: Sequence[click.Option] = ()
    notes: Callable[[Setting], list[str]] = no_notes
    rounds: int = 5
    seconds: float = 1.0
    threads: int | None = 1


@dataclass
class Run:
    """A run of a bench, under way or done.

    Attributes:
        bench: What is run.
        setting: How.
        out: JSON lines are added to this file. None: to none.
        summary: The page is written to this file after every job. None: to none.
        records: What was measured.
        notes: What is said before the tables.
        lost: Rivals and jobs that raised, and why.
        refused: How many gates stayed shut.
    """

    bench: Bench
    setting: Setting
    out: Path | None = None
    summary: Path | None = None
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0

    def page(self) -> str:
        """Where it ran, the notes and the report, in Markdown."""
        about = dict(self.setting.about)
        first = self.records[0] if self.records else record(self.bench.name, "", {}, **about)
        notes = [*self.notes, *(f"Failed: {line}" for line in dict.fromkeys(self.lost))]
        blocks = [where(first), "\n".join(f"- {note}" for note in notes)]
        blocks.append(self.bench.report(self.records, self.setting.device.type))
        return "\n\n".join(block for block in blocks if block)

    def keep(self, found: list[Record]) -> None:
        self.records = merged(self.records, found)
        if self.out is not None and found:
            write(self.out, found)
        self.write_summary()

    def write_summary(self) -> None:
        if self.summary is not None:
            self.summary.parent.mkdir(parents=True, exist_ok=True)
            self.summary.write_text(self.page() + "\n", encoding="utf-8")

    def go(self, jobs: Sequence[Job], budget: float = math.inf) -> None:
        """Measures every job that its gate and the budget let through.

        Args:
            jobs: What to measure, the most important first.
            budget: Seconds; jobs likely to outlast them are left out.
        """
        began = time.perf_counter()
        torch.manual_seed(0)
        gates: dict[Gate, bool] = {}
        left: list[str] = []
        for job in jobs:
            if time.perf_counter() - began + job.seconds > budget:
                left.append(job.name)
                continue
            with _threads(job.threads):
                if self._passes(job.gate, gates):
                    self._measure(job)
            if job.seconds:
                _collect(self.setting.device)
        if left:
            named = "; ".join(left[:NAMED])
            more = f"; and {len(left) - NAMED} more" if len(left) > NAMED else ""
            self.notes.append(f"The budget of {budget:g} s left out {named}{more}.")
        self.write_summary()

    def _passes(self, gate: Gate | None, gates: dict[Gate, bool]) -> bool:
        if gate is None:
            return True
        if gate not in gates:
            try:
                gate.check()
                gates[gate] = True
            except Exception as error:  # rivals that cannot be checked are not timed either
                gates[gate] = False
                self._refuse(error, f"{gate.key}: ")
        return gates[gate]

    def _refuse(self, error: BaseException, what: str = "") -> None:
        self.refused += 1
        self.notes.append(f"Gate: {what}{reason(error)}")

    def _measure(self, job: Job) -> None:
        try:
            found = job.measure(self.lost)
        except GateError as error:
            self._refuse(error)
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            self.notes.append(f"{job.name} is left out: {reason(error)}.")
        except Exception as error:  # the next job may well run
            self.lost.append(f"{job.name}: {reason(error)}")
        else:
            self.keep(found)
            print(job.name, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _collect(device: torch.device) -> None:
    """Frees the networks and graphs of a job."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
