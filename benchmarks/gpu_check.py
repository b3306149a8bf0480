# SPDX-License-Identifier: Apache-2.0
"""The GPU check: builds, runs the tests marked gpu, times stages, loops and gradients, and sums up.

The phases come in the order of what they are worth: the build, the tests of the CUDA kernels, of
captures, of Triton, of gradients and the rest, the choice of a backend, then the benchmarks, large
sizes first and `torch.compile` last. Each is a process group with a limit of its own; one that
fails, hangs or breaks its CUDA context does not keep the next from running, and what a phase leaves
over goes to the benchmarks after it. All of it ends within 10 minutes (`full`) or 6 (`short`).

Whatever ends the check, what was found until then is on the disk: the log with the traceback of
every failure, printed when it happens (`gpu-check.log`), a line for every row (`stage.jsonl`,
`loop.jsonl`, `gradients.jsonl`), the measured choice (`choice.json`) and the page (`gpu-check.md`).
They go to $OUT where it is set; else to benchmarks/results and out/, of a dry run (`--cpu`) to out/
alone.

It needs a CUDA device and a Python with torch, pytest, click and pybind11, no network and no
virtual environment. Where pytest-xdist is installed the tests run in eight processes, where
diffusers is it is timed as well. Wheels of missing packages may be carried in a folder; they are
unpacked for the phases and not installed:

    python3 -m pip download --no-deps -d .whl diffusers==0.42.1 importlib_metadata
    make gpu-check WHEELS=.whl

Exit 0 only if every phase passed.

    make gpu-check                                       GPU_CHECK=short for the short one
    make gpu-check PYTHON=python3 VENV= COMMIT=...       with a Python that has torch already
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # where the tests load this script from

from phases import BUDGET, ROOT, Phase, Result, page, put, run_phases

NAME = "gpu-check"
BENCHES = ("stage", "loop", "gradients")  # the rows and the page of each are named for it
TOTAL = {"short": 345.0, "full": 570.0}  # seconds for all
WORKERS, TEST_SECONDS = 8, 40  # of the tests; how long one may take

# The tests marked gpu, by what they test: the kernels that all else stands on first. The rest is
# whatever other file names the marker.
TESTS = {
    "cuda tests": ("test_cuda*.py",),
    "capture tests": ("test_graphs*.py", "test_growth.py", "test_batcher.py"),
    "triton tests": ("test_triton*.py",),
    "gradient tests": ("test_gradients*.py",),
    "other tests": (),
}
MARKED = re.compile(r"\bgpu\b|\bHERE\b")  # how a file may name the marker
# Seconds of each phase, `full` and `short`, and of a benchmark the part that the cell may take
# which runs as its budget ends.
LIMITS = {
    "build": (160, 120),
    "cuda tests": (45, 35),
    "capture tests": (55, 30),
    "triton tests": (50, 25),
    "gradient tests": (40, 20),
    "other tests": (30, 15),
    "choice": (20, 15),
    "stage": (45, 25),
    "loop": (40, 25),
    "gradients": (25, 20),
    "compiled loop": (25, 0),
    "compiled stage": (15, 0),
    "targets": (10, 10),
}
SPARE = {"stage": 15, "loop": 15, "gradients": 15, "compiled loop": 10, "compiled stage": 10}

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


def files_of(tests: str) -> list[str]:
    """The test files of a phase, as pytest takes them."""
    folder = ROOT / "tests"
    named = {p for patterns in TESTS.values() for one in patterns for p in folder.glob(one)}
    if not TESTS[tests]:
        found = {p for p in folder.rglob("test_*.py") if MARKED.search(p.read_text("utf-8"))}
        found -= named
    else:
        found = {p for one in TESTS[tests] for p in folder.glob(one)}
    return [path.relative_to(ROOT).as_posix() for path in sorted(found)]


def tests_of(name: str, setting: str, cpu: bool) -> Phase:
    """The tests of one kind: in workers, with every failure printed when it happens."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-p", "support.at_once", "--test-seconds", str(TEST_SECONDS)]
    command += ["--continue-on-collection-errors"]  # some tests import what a GPU machine has not
    command += ["-W", "default", "--tb=short", "-rfE"]  # a warning of a library is no failure here
    files = files_of(name)
    if cpu:  # a few are collected, handed to a worker and skipped
        command, files = [*command, "-n", "1"], files[-1:]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(WORKERS), "--dist", "worksteal", "--durations=5"]
    if setting == "short":
        command += ["-m", "gpu and not slow"]
    seconds = LIMITS[name][setting == "short"]
    found = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return Phase(name, [*command, *files], seconds, environment={"PYTHONPATH": found})


def bench_of(name: str, setting: str, folders: tuple[Path, Path], *options: str) -> Phase:
    """A benchmark: `folders` are where its rows go, and where its own page does."""
    rows, pages = folders
    bench, summary = name.removeprefix("compiled "), pages / f"{name.replace(' ', '-')}.md"
    options += ("--compile", "--only", "compiled") if bench != name else ()
    command = [sys.executable, "benchmarks/run.py", bench, *options]
    command += ["--out", str(rows / f"{bench}.jsonl"), "--summary", str(summary)]
    command += ["--budget", BUDGET, f"--{setting}"]
    command += ["--rounds", "5"] if setting == "short" else []
    seconds = LIMITS[name][setting == "short"]
    return Phase(f"{name} benchmark", command, seconds, True, SPARE[name], summary)


def phases_of(
    setting: str, folders: tuple[Path, Path], cpu: bool = False, commit: str | None = None
) -> list[Phase]:
    """All phases, the most important first.

    Args:
        setting: "full" or "short".
        folders: Where rows go, and where the pages of the benchmarks do.
        cpu: Whether only the plumbing is tried, on the CPU.
        commit: Of the code, where git cannot be asked.
    """
    python, short = sys.executable, setting == "short"
    build = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    build += ["--no-build-isolation", "--no-deps", "-e", "."]
    choice = [python, "-m", "fastdiff.cli", "doctor", "--measure", "--out"]
    choice += [str((folders[1] if cpu else folders[0]) / "choice.json")]
    about = ["--device", "cpu" if cpu else "cuda", *(["--commit", commit] if commit else [])]
    stage = [*about]
    loop = [*about, "--no-compile"]
    gradients = [*about]
    if cpu:  # nothing is built, and the smallest cells are timed
        build = [python, "-m", "pip", "--version"]
        quick = ["--seconds", "0", "--rounds", "1"]
        stage += ["--largest", "0.01", "--only", "M=2 G=1 float32", *quick]
        loop += ["--case", "mlp", *quick]
        gradients += ["--only", "no job at all"]
    found = [Phase("build", build, LIMITS["build"][short])]
    names = [name for name in TESTS if files_of(name)]
    found += [tests_of(name, setting, cpu) for name in (names[:1] if cpu else names)]
    found.append(Phase("choice", choice, LIMITS["choice"][short], shows=True))
    found.append(bench_of("stage", setting, folders, *stage))
    found.append(bench_of("loop", setting, folders, *loop))
    found.append(bench_of("gradients", setting, folders, *gradients))
    if not short and not cpu:  # a kernel takes the compiler seconds
        found.append(bench_of("compiled loop", setting, folders, *about))
        found.append(bench_of("compiled stage", setting, folders, *about))
    rows = [str(folders[0] / f"{name}.jsonl") for name in BENCHES]
    targets = [python, "benchmarks/run.py", "targets", *rows]
    found.append(Phase("targets", targets, LIMITS["targets"][short], shows=True))
    if cpu:  # on a busy machine
        found = [replace(phase, seconds=5 * phase.seconds) for phase in found]
    return found


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


def unpacked(wheels: Path, folder: Path) -> str:
    """The value of PYTHONPATH under which the wheels of a folder are found."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        sys.exit(f"{NAME}: --wheels is a folder with wheels in it; got {wheels}, which has none.")
    for wheel in found:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def environment_of(found: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the phases."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    if "arch" in found:  # a build for this device alone takes a third of the time
        environment.setdefault("FASTDIFF_CUDA_ARCHS", found["arch"])
        if shutil.which("nvcc"):
            environment.setdefault("FASTDIFF_CUDA", "1")
    return environment


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=NAME, description=about)
    parser.add_argument("--setting", choices=tuple(TOTAL), default="full")
    parser.add_argument("--commit", help="the commit of the code, where there is no git to ask")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of missing packages")
    parser.add_argument("--cpu", action="store_true", help="a dry run of the plumbing, on the CPU")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    found = probe()
    if found["gpu"] is None and not chosen.cpu:
        print(
            f"{NAME}: a CUDA device is needed; PyTorch {found['torch']} finds none. Run it where "
            "there is one, with a CUDA build of PyTorch: make gpu-check PYTHON=python3 VENV=",
            file=sys.stderr,
        )
        return 2
    elsewhere = os.environ.get("OUT")
    log_folder = Path(elsewhere) if elsewhere else ROOT / "out"
    # rows of a dry run are no results
    folder = log_folder if elsewhere or chosen.cpu else ROOT / "benchmarks" / "results"
    pages = ROOT / "out" / NAME
    shutil.rmtree(pages, ignore_errors=True)
    for made in (folder, log_folder, pages):
        made.mkdir(parents=True, exist_ok=True)
    log = log_folder / f"{NAME}.log"
    log.unlink(missing_ok=True)
    environment = environment_of(found)
    if chosen.wheels is not None:
        os.environ["PYTHONPATH"] = unpacked(chosen.wheels, pages / "wheels")
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    phases = phases_of(chosen.setting, (folder, pages), chosen.cpu, chosen.commit)
    where = folder / f"{NAME}{'-cpu' * chosen.cpu}.md"
    title = ", ".join(f"{key} {value}" for key, value in found.items())

    def write(results: Sequence[Result]) -> None:
        put(where, page(f"GPU check, {chosen.setting}", title, phases, results))

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)  # by way of what ends the phase

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    write([])
    left = TOTAL[chosen.setting] * (5 if chosen.cpu else 1) - (time.monotonic() - began)
    results = run_phases(phases, log, environment, left, write)
    print(f"\n{where.read_text(encoding='utf-8')}\n{NAME}: {where}; every word: {log}")
    failed = [r.phase.name for r in results if not r.passed]
    if failed:
        print(f"{NAME}: not passed: {', '.join(failed)}.", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
