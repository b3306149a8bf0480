# SPDX-License-Identifier: Apache-2.0
"""Phases of a long check: commands with limits, run in turn, and a page that is never behind.

A check may be killed at any moment. What a phase prints goes straight to the log on the disk, the
page is written anew whenever a phase ends or its own page changes, and a phase dies with the
process that began it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = 2.0  # seconds between looks at what a running phase has written
BUDGET = "{budget}"  # in a command: the seconds that it may plan with
FAILED = "FAILED "  # how a line begins that names a test that failed
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Phase:
    """A command with a limit.

    Attributes:
        name: As printed.
        command: The program and its arguments.
        seconds: How long it may take.
        grows: Whether it is given a share of the time that others have left over.
        spare: The part of the limit that is kept back from `BUDGET`, for what is under way when
            the budget ends.
        page: A file in Markdown that the phase writes, shown on the page of the check.
        shows: Whether what it prints is shown there.
        environment: Variables of this phase alone.
    """

    name: str
    command: Sequence[str]
    seconds: float
    grows: bool = False
    spare: float = 0.0
    page: Path | None = None
    shows: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a phase ended: `how` is "passed", "failed (exit 3)" or "stopped after 60 s"."""

    phase: Phase
    how: str
    seconds: float
    text: str

    @property
    def passed(self) -> bool:
        return self.how == "passed"

    @property
    def last(self) -> str:
        """The last line that is not empty."""
        lines = (line.strip() for line in reversed(self.text.split("\n")))
        return next(filter(None, lines), "")

    @property
    def failures(self) -> list[str]:
        """The tests that failed, each once."""
        lines = (line for line in self.text.split("\n") if line.startswith(FAILED))
        return list(dict.fromkeys(line.split()[1] for line in lines if len(line.split()) > 1))


def run_phase(
    phase: Phase,
    log: Path,
    environment: Mapping[str, str],
    limit: float | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Result:
    """Runs a phase with its output added to `log`; at its limit its whole process group ends."""
    start, limit = time.monotonic(), phase.seconds if limit is None else limit
    command = [part.replace(BUDGET, f"{max(limit - phase.spare, 1):.0f}") for part in phase.command]
    with log.open("ab") as file:
        file.write(f"\n== {phase.name}: {' '.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, **phase.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_die_with_the_parent,
            )
        except OSError as error:
            return Result(phase, f"failed ({error})", 0.0, "")
        how = "broken off"
        try:
            how = _awaited(process, start + limit, tick) or f"stopped after {limit:.3g} s"
        finally:
            _end(process)
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    return Result(phase, how, time.monotonic() - start, text)


def _awaited(process: subprocess.Popen[bytes], end: float, tick: Callable[[], None]) -> str | None:
    """How a process ended, or None where it has not by then."""
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(min(left, TICK))
            return "passed" if code == 0 else f"failed (exit {code})"
        tick()
    return None


def _die_with_the_parent() -> None:
    """A killed check must not leave the device to a phase that nobody waits for."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it started in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_phases(
    phases: Sequence[Phase],
    log: Path,
    environment: Mapping[str, str],
    total: float,
    written: Callable[[Sequence[Result]], None] = lambda results: None,
) -> list[Result]:
    """Runs every phase, whatever the ones before came to, and prints how each ended.

    Args:
        phases: The most important first.
        log: What they print is added to it.
        environment: Theirs.
        total: Seconds for all. Phases that grow share what is left over by the phases before, and
            no phase runs past it.
        written: Called with the results so far, after each phase and while one runs.
    """
    end, results = time.monotonic() + total, list[Result]()
    for k, phase in enumerate(phases):
        limit = limit_of(phases[k:], end - time.monotonic())
        if limit <= 0:
            results.append(Result(phase, "left out: the time is up", 0.0, ""))
            written(results)
            continue
        print(f"{phase.name} (at most {limit:.0f} s)", flush=True)
        result = run_phase(phase, log, environment, limit, lambda: written(results))
        results.append(result)
        written(results)
        print(f"{phase.name}: {result.how}, {result.seconds:.0f} s: {result.last}", flush=True)
        for name in result.failures:
            print(f"  {name}", flush=True)
    return results


def limit_of(phases: Sequence[Phase], left: float) -> float:
    """The limit of the first of the phases that are to come, when so many seconds are left."""
    first, over = phases[0], left - sum(p.seconds for p in phases)
    if not first.grows or over <= 0:
        return min(first.seconds, left)
    return first.seconds + over * first.seconds / sum(p.seconds for p in phases if p.grows)


def page(title: str, about: str, phases: Sequence[Phase], results: Sequence[Result]) -> str:
    """One page of Markdown: the phases, the tests that failed, and the page of each phase."""
    rows = [
        f"| {r.phase.name} | {r.how} | {r.seconds:.0f} s | `{r.last[:120].replace('|', '/')}` |"
        for r in results
    ]
    rows += [f"| {phase.name} | not ended | | |" for phase in phases[len(results) :]]
    text = f"# {title}\n\n{about}.\n\n| phase | | time | last line |\n|---|---|---|---|\n"
    text += "\n".join(rows) + "\n"
    failures = [name for result in results for name in result.failures]
    if failures:
        text += "\n## Tests that failed\n\n" + "".join(f"- `{name}`\n" for name in failures)
    for result in results:
        if result.phase.shows:
            text += f"\n## {result.phase.name.capitalize()}\n\n{result.text.strip()}\n"
    for phase in phases:
        if phase.page is not None:
            exists = phase.page.exists()
            measured = phase.page.read_text(encoding="utf-8") if exists else "Nothing yet.\n"
            text += f"\n## {phase.name.capitalize()}\n\n{measured}"
    return text


def put(path: Path, text: str) -> None:
    """Puts a text in a file's place in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)
