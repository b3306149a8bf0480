# SPDX-License-Identifier: Apache-2.0
"""The GPU check: builds, runs the tests marked gpu, times stages, loops and gradients, and sums up.

Each phase is a process with a time limit of its own; a phase that fails or hangs does not keep the
next from running. The check needs a CUDA device and a Python with torch, pytest, click and
pybind11. It needs no network and no virtual environment. Where diffusers is installed it is timed
as well, and where pytest-xdist is, the tests run in eight processes. Exit 0 only if every phase
passed.

    make gpu-check                                       GPU_CHECK=short for the short one
    make gpu-check PYTHON=python3 VENV=                  with a Python that has torch already
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAME = "gpu-check"
BENCHES = ("stage", "loop", "gradients")  # the rows and the page of each are named for it

# It runs in a process of its own, so that this one never holds the device.
PROBE = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "gpu": None}
if torch.cuda.is_available():
    found["gpu"] = torch.cuda.get_device_name(0)
    found["arch"] = "".join(map(str, torch.cuda.get_device_capability(0)))
    found["cuda"] = torch.version.cuda
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Phase:
    """A command with a limit of so many seconds."""

    name: str
    command: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class Result:
    """How a phase ended: `how` is "passed", "failed (exit 3)" or "stopped after 60 s"."""

    phase: Phase
    how: str
    seconds: float
    last: str

    @property
    def passed(self) -> bool:
        return self.how == "passed"


def run_phase(phase: Phase, log: Path, environment: Mapping[str, str]) -> Result:
    """Runs a phase with its output added to `log`; at its limit its whole process group ends."""
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n== {phase.name}: {' '.join(phase.command)}\n".encode())
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                phase.command,
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Result(phase, f"failed ({error})", 0.0, "")
        try:
            code = process.wait(phase.seconds)
            how = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            how = f"stopped after {phase.seconds:g} s"
            _end(process)
        except BaseException:
            _end(process)
            raise
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Result(phase, how, time.monotonic() - start, last)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that nobody waited for, with all that it started in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_phases(phases: Sequence[Phase], log: Path, environment: Mapping[str, str]) -> list[Result]:
    """Runs every phase, whatever the ones before came to, and prints how each ended."""
    results = []
    for phase in phases:
        print(f"{NAME}: {phase.name} (at most {phase.seconds:g} s)", flush=True)
        results.append(run_phase(phase, log, environment))
        print(f"{NAME}: {phase.name}: {results[-1].how}, {results[-1].seconds:.0f} s", flush=True)
    return results


def phases_of(setting: str, folder: Path, cpu: bool, commit: str | None) -> list[Phase]:
    """The build, the tests and the benchmarks, under 9 minutes together (`full`) or 6 (`short`)."""
    python, full = sys.executable, setting == "full"
    build = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    build += ["--no-build-isolation", "--no-deps", "-e", "."]
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    tests += ["--continue-on-collection-errors"]  # some tests import what a GPU machine has not
    tests += ["-W", "default", "--tb=short", "-rfE"]  # a warning of a library is no failure here
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", "8"]  # most of their time goes to compiling kernels
    tests += ["--durations=5"] if full else ["-m", "gpu and not slow"]
    # Each benchmark has a limit, and a part of it for the cell that runs as its budget ends.
    limits = {"stage": (38, 18), "loop": (36, 15), "gradients": (36, 15)}
    if full:
        limits = {"stage": (85, 25), "loop": (100, 20), "gradients": (52, 20)}
    benches = {}
    for name, (limit, last) in limits.items():
        bench = [python, "benchmarks/run.py", name, "--device", "cpu" if cpu else "cuda"]
        bench += ["--out", str(folder / f"{name}.jsonl"), "--summary", str(folder / f"{name}.md")]
        bench += ["--budget", str(limit - last), "--full" if full else "--short"]
        bench += [] if full else ["--rounds", "5"]
        benches[name] = bench + (["--commit", commit] if commit else [])
    if full and not cpu:
        benches["stage"] += ["--compile"]
    if not full or cpu:
        benches["loop"] += ["--no-compile"]
    if cpu:  # the plumbing alone: the core is imported, tests are collected and skipped
        build = [python, "-c", "import fastdiff, fastdiff._native"]
        benches["stage"] += ["--largest", "1", "--seconds", "0", "--rounds", "1"]
        benches["loop"] += ["--case", "null", "--case", "mlp", "--seconds", "0", "--rounds", "1"]
        benches["gradients"] += ["--part", "time", "--part", "memory", "--steps", "2"]
        benches["gradients"] += ["--memory-steps", "2,3", "--seconds", "0", "--rounds", "1"]
    return [
        Phase("build", build, 150),
        Phase("tests", tests, 150 if full else 58),
        *(Phase(f"{name} benchmark", benches[name], limits[name][0]) for name in BENCHES),
    ]


def summary(
    found: Mapping[str, Any], setting: str, results: Sequence[Result], parts: Sequence[Path]
) -> str:
    """One page of Markdown: the phases, then the page of each benchmark."""
    rows = [
        f"| {r.phase.name} | {r.how} | {r.seconds:.0f} s | `{r.last[:120].replace('|', '/')}` |"
        for r in results
    ]
    about = ", ".join(f"{key} {value}" for key, value in found.items())
    text = (
        f"# GPU check, {setting}\n\n{about}.\n\n| phase | | time | last line |\n|---|---|---|---|\n"
    )
    text += "\n".join(rows) + "\n"
    for part in parts:
        measured = part.read_text(encoding="utf-8") if part.exists() else "It measured nothing.\n"
        text += f"\n## The {part.stem} benchmark\n\n{measured}"
    return text


def probe() -> dict[str, Any]:
    """The device and the versions; exits with a sentence where there is no torch."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        sys.exit(f"{NAME}: PyTorch should find its devices within 120 s; it did not.")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        sys.exit(
            f"{NAME}: a Python with torch is needed; {sys.executable} says: {why}. Name one that "
            "has it: make gpu-check PYTHON=python3 VENV="
        )
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__)
    parser.add_argument("--setting", choices=("short", "full"), default="full")
    parser.add_argument("--commit", help="the commit of the code, where there is no git to ask")
    parser.add_argument("--cpu", action="store_true", help="a dry run of the plumbing, on the CPU")
    chosen = parser.parse_args(arguments)
    found = probe()
    if found["gpu"] is None and not chosen.cpu:
        print(
            f"{NAME}: a CUDA device is needed; PyTorch {found['torch']} finds none. Run it where "
            "there is one, with a CUDA build of PyTorch: make gpu-check PYTHON=python3 VENV=",
            file=sys.stderr,
        )
        return 2
    elsewhere = os.environ.get("OUT")
    folder = Path(elsewhere) if elsewhere else ROOT / "benchmarks" / "results"
    log_folder = folder if elsewhere else ROOT / "out"
    for made in (folder, log_folder):
        made.mkdir(parents=True, exist_ok=True)
    log, parts = log_folder / f"{NAME}.log", [folder / f"{name}.md" for name in BENCHES]
    for old in (log, *parts):
        old.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    if "arch" in found:  # a build for this device alone takes a third of the time
        environment.setdefault("FASTDIFF_CUDA_ARCHS", found["arch"])
        if shutil.which("nvcc"):
            environment.setdefault("FASTDIFF_CUDA", "1")
    results = run_phases(
        phases_of(chosen.setting, folder, chosen.cpu, chosen.commit), log, environment
    )
    page = folder / f"{NAME}-cpu.md" if chosen.cpu else folder / f"{NAME}.md"
    text = summary(found, chosen.setting, results, parts)
    for part in parts:
        part.unlink(missing_ok=True)
    page.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{NAME}: {page}; every word of the phases: {log}")
    failed = [r.phase.name for r in results if not r.passed]
    if failed:
        print(f"{NAME}: not passed: {', '.join(failed)}.", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
