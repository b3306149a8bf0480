# SPDX-License-Identifier: Apache-2.0
"""Which of several backends serves fastest on a device: a table of measured times, kept in a file.

All compiled backends give the same bits, so what stands here changes the speed of a run alone.

A cell of the table is a state's dtype, whether rows draw noise, and whether the state is small or
large (`LARGE` elements and up); it holds the seconds of a stage on every backend that was measured.
A table belongs to a class of device: its name, its compute capability, and the versions of
fastdiff, PyTorch and Triton. Tables are looked up in the user's file first (`table_path`), then
among `SHIPPED`, whose versions do not count. Without one the order of the backends' names decides.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._files import replacing
from ..plans import Plan, Stage
from .base import Backend, Registers

LARGE = 2**20  # elements: below, launching a stage takes a GPU longer than moving its bytes
NUMBERS = {"small": 2**15, "large": 2**24}  # elements of the states that are measured
STATES = {"float32": torch.float32, "float64": torch.float64}
MARGIN = 1.03  # a backend takes the place of one before it by so much; less is the machine's noise
MOST_BYTES = 2**20  # of a file of tables
_FORMAT = 1

Cell = tuple[str, bool, str]  # state, noise, "small" or "large"
Times = Mapping[str, float]  # seconds of a stage, by backend
Timer = Callable[[Callable[[], None], torch.device], float]

# Tables that come with the package, as `fastdiff doctor --measure --out` writes them. There is none
# until one has been measured on a device.
SHIPPED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class DeviceClass:
    """What a table is for.

    Attributes:
        device: The device's name.
        capability: Its compute capability, "9.0"; empty for a CPU.
        versions: Of fastdiff, PyTorch and Triton.
    """

    device: str
    capability: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Measured times for a class of device; `source` says where they come from."""

    of: DeviceClass
    cells: Mapping[Cell, Times]
    source: str

    def fastest(self, cell: Cell, names: Sequence[str]) -> str | None:
        """The backend that serves a cell fastest; None where no two of them were measured.

        Args:
            cell: What is to be served.
            names: The backends that can serve, in the order that decides within `MARGIN`.
        """
        times = self.cells.get(cell, {})
        measured = [name for name in names if name in times]
        if len(measured) < 2:
            return None
        best = min(times[name] for name in measured)
        return next(name for name in measured if times[name] <= MARGIN * best)


def cell_of(state: torch.dtype, noisy: bool, elements: int) -> Cell:
    """The cell of a state of so many elements."""
    number = str(state).removeprefix("torch.")
    return number, noisy, "large" if elements >= LARGE else "small"


def class_of(device: torch.device) -> DeviceClass:
    """The class of a device, with the versions that are installed."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        name, capability = device.type, ""
    versions = (
        ("fastdiff", _version("fastdiff-engine")),
        ("torch", str(torch.__version__)),
        ("triton", _version("triton")),
    )
    return DeviceClass(name, capability, versions)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def asked() -> str:
    """How a backend is chosen: "measure", "name", or "" where FASTDIFF_CHOOSE is not set.

    Raises:
        ValueError: It is none of them.
    """
    how = os.environ.get("FASTDIFF_CHOOSE", "")
    if how not in ("", "measure", "name"):
        raise ValueError(f'fastdiff: FASTDIFF_CHOOSE is "measure", "name" or not set; got {how!r}.')
    return how


def table_path() -> Path:
    """The file of the user's tables: in FASTDIFF_CACHE, else where the system keeps caches."""
    own = os.environ.get("FASTDIFF_CACHE")
    if own:
        return Path(own) / "backends.json"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastdiff" / "backends.json"


# -- files -----------------------------------------------------------------------------------------


def read(path: Path) -> list[Table]:
    """The tables of a file; none where there is no such file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file of tables.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return []
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        raise ValueError(f"a regular file of at most {MOST_BYTES} bytes is read")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict) or found.get("version") != _FORMAT:
        raise ValueError(f"its version is {_FORMAT}")
    try:
        return [_table_of(item, str(path)) for item in found["classes"]]
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a part is missing or of the wrong kind ({error})") from error


def _table_of(item: Any, source: str) -> Table:
    versions = tuple((str(name), str(version)) for name, version in item["versions"].items())
    of = DeviceClass(str(item["device"]), str(item["capability"]), versions)
    cells = {}
    for cell in item["cells"]:
        times = {str(name): float(us) / 1e6 for name, us in cell["microseconds"].items()}
        if not all(math.isfinite(t) and t > 0 for t in times.values()):
            raise ValueError("times are finite and above 0")
        if not isinstance(cell["noise"], bool):
            raise ValueError(f"noise is true or false; got {cell['noise']!r}")
        cells[(str(cell["state"]), cell["noise"], str(cell["size"]))] = times
    return Table(of, cells, source)


def write(path: Path, tables: Sequence[Table]) -> None:
    """Puts tables in the place of a file, and makes its folder.

    Raises:
        OSError: It cannot be written.
    """
    classes = [
        {
            "device": table.of.device,
            "capability": table.of.capability,
            "versions": dict(table.of.versions),
            "cells": [
                {
                    **dict(zip(("state", "noise", "size"), cell, strict=True)),
                    "microseconds": {name: round(t * 1e6, 4) for name, t in times.items()},
                }
                for cell, times in table.cells.items()
            ],
        }
        for table in tables
    ]
    text = json.dumps({"version": _FORMAT, "classes": classes}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


# -- the tables of this process --------------------------------------------------------------------


class Tables:
    """The tables that this process has read or measured, one for each device."""

    def __init__(self) -> None:
        self._found: dict[torch.device, Table | None] = {}
        self.lock = threading.RLock()
        self._warned: set[str] = set()

    def of(self, device: torch.device) -> Table | None:
        """The table for a device; the file is read once for each."""
        with self.lock:
            if device not in self._found:
                self._found[device] = self._looked_up(class_of(device))
            return self._found[device]

    def keep(self, device: torch.device, table: Table, path: Path | None = None) -> Path:
        """Takes a table for a device from here on, and writes it to the user's file.

        Tables of other devices in the file stay; those of the same device in other versions go.

        Args:
            device: What was measured.
            table: The times.
            path: Another file. None: `table_path()`.

        Raises:
            OSError: The file cannot be written. The table serves this process all the same.
        """
        path = path or table_path()
        with self.lock:
            self._found[device] = table
            others: list[Table] = []
            with contextlib.suppress(OSError, ValueError):  # what cannot be read is replaced
                others = [t for t in read(path) if not _same_device(t.of, table.of)]
            write(path, [*others, table])
        return path

    def _looked_up(self, of: DeviceClass) -> Table | None:
        path = table_path()
        try:
            found = [table for table in read(path) if table.of == of]
        except (OSError, ValueError) as error:
            self.warn(
                f"fastdiff: the table of measured backends {path} is not used: {error}. "
                "`fastdiff doctor --measure` writes it anew; until then names decide."
            )
            found = []
        if found:
            return found[-1]
        for table in read(SHIPPED):
            if _same_device(table.of, of):
                return Table(of, table.cells, "the package")
        return None

    def warn(self, text: str) -> None:
        """Says something once a process."""
        with self.lock:
            if text in self._warned:
                return
            self._warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def forget(self) -> None:
        """Reads files again."""
        with self.lock:
            self._found.clear()
            self._warned.clear()


TABLES = Tables()


def _same_device(a: DeviceClass, b: DeviceClass) -> bool:
    return (a.device, a.capability) == (b.device, b.capability)


# -- measuring -------------------------------------------------------------------------------------

# (t, b) of three rows, the second of which does what a multistep solver's do: it reads x, one
# output and one of the history, and writes x and a push. Weights that sum to less than 1 in size
# keep x bounded.
_ROWS = ((1.0, (0.3,)), (0.7, (0.3, -0.1)), (0.3, (0.3, -0.1)))
_LAUNCHES, _ROUNDS = 20, 7


def measured(
    device: torch.device, backends: Sequence[Backend], timer: Timer | None = None
) -> Table:
    """Times a stage of every backend in every cell that it serves.

    A cell that only one of them serves is left out, and one that does not fit in the memory.

    Args:
        device: Where.
        backends: Those that run there.
        timer: Gives the seconds of a call; None takes `seconds_of`.
    """
    timer, cells = timer or seconds_of, {}
    for state, dtype in STATES.items():
        for noisy in (False, True):
            plan = _plan(noisy)
            fit = [b for b in backends if b.supports(dtype, dtype, device, plan.layout) is None]
            if len(fit) < 2:
                continue
            for size, elements in NUMBERS.items():
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    times = _times(fit, plan, (dtype, elements), device, timer)
                    cells[(state, noisy, size)] = times
    return Table(class_of(device), cells, "measured here")


def _plan(noisy: bool) -> Plan:
    stages = [
        Stage(t, a_x=0.5, b=b, c=0.1 * noisy, noise=((k + 1, 1.0),) * noisy)
        for k, (t, b) in enumerate(_ROWS)
    ]
    return Plan(stages=tuple(stages), times=(1.0, 0.0))


def _times(
    backends: Sequence[Backend],
    plan: Plan,
    of: tuple[torch.dtype, int],
    device: torch.device,
    timer: Timer,
) -> dict[str, float]:
    dtype, elements = of
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        x, out, past = (
            torch.randn(1, elements, dtype=dtype, device=device, generator=generator)
            for _ in range(3)
        )
        seeds = torch.zeros(1, dtype=torch.int64, device=device)
        history = past[None].expand(plan.slots, -1, -1).contiguous()
        registers = Registers(x=x, history=history, seeds=seeds)
        table, layout = torch.from_numpy(plan.pack((1.0,))), plan.layout
        times = {}
        for backend in backends:
            stage = backend.bind(registers, table, layout)
            call = functools.partial(stage.run, 1, out, None)
            call()  # compiles
            times[backend.name] = timer(call, device)
    return times


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    """The seconds that a launch takes the device: the best of several replayed graphs of launches.

    In a graph, because the time that the host takes to launch is not the device's, and captured
    loops do not pay it.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            for _ in range(_LAUNCHES):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph.replay()
        taken = []
        for _ in range(_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) * 1e-3 / _LAUNCHES)
    return min(taken)


def can_measure(device: torch.device) -> bool:
    """Whether something may be launched and waited for: not while a graph is recorded."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
