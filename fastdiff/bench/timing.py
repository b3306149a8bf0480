# SPDX-License-Identifier: Apache-2.0
"""Timing rivals side by side.

Rivals of one run take turns, so that whatever else the machine does falls on all of them alike. A
ratio is only ever taken between numbers of one run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Calls = Sequence[Callable[[], Any]]


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
    """Seconds a unit of work takes, over the rounds of a run."""

    best: float
    p20: float
    median: float
    p80: float
    rounds: int


def summary(seconds: Sequence[float]) -> Timing:
    """The best, the percentiles (linear between ranks) and the number of some times."""
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
        """The seconds that one turn takes."""
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


def wait(device: torch.device) -> None:
    """Waits until a CUDA device has done what was enqueued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def executed(run: Callable[[], Any], count: int, device: torch.device) -> Callable[[], None]:
    """A turn of `count` runs that ends when they have run, not when they are enqueued."""

    def call() -> None:
        for _ in range(count):
            run()
        wait(device)

    return call


def take_turns(
    rivals: dict[str, Calls],
    device: torch.device,
    rounds: int,
    seconds: float,
    units: Mapping[str, int] | None = None,
) -> dict[str, tuple[Timing, Timing]]:
    """Times rivals in turns, each as a queue of launches.

    Args:
        rivals: For each the same launch on every set of registers, taken in turns too.
        device: Where they run.
        rounds: Turns of each, at least.
        seconds: How long to go on, all together.
        units: Units of work in one launch of a rival, where it is not 1; times are divided by it.

    Returns:
        For each the seconds of a unit, and the host's seconds to enqueue one.
    """
    units = {} if units is None else units
    turn = _cuda_turn if device.type == "cuda" else _cpu_turn
    launches, host = {}, {}
    for name, calls in rivals.items():
        turn(calls, len(calls), 1e-4)
        once, _ = turn(calls, 2, 1e-4)
        once, host[name] = turn(calls, 2, 1e-4)
        aim = 1e-2 if device.type == "cuda" else 1e-3
        launches[name] = max(2, min(64, math.ceil(aim / max(once, 1e-9))))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    names, end = list(rivals), time.perf_counter() + seconds
    for count in itertools.count():
        if count >= rounds and time.perf_counter() >= end:
            break
        for k in range(len(names)):
            name = names[(k + count) % len(names)]
            took, enqueued = turn(rivals[name], launches[name], host[name])
            host[name], unit = enqueued, units.get(name, 1)
            taken[name].append((took / unit, enqueued / unit))
    return {
        name: (summary([t for t, _ in pairs]), summary([t for _, t in pairs]))
        for name, pairs in taken.items()
    }


def _cpu_turn(calls: Calls, launches: int, host: float) -> tuple[float, float]:
    sequence = [calls[k % len(calls)] for k in range(launches)]
    start = time.perf_counter()
    for call in sequence:
        call()
    taken = (time.perf_counter() - start) / launches
    return taken, taken


def _cuda_turn(calls: Calls, launches: int, host: float) -> tuple[float, float]:
    """Queues the launches while the device waits, about as long as the last queue took to fill."""
    sequence = [calls[k % len(calls)] for k in range(launches)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(host * launches * 1.5 + 5e-5, 5e-2) * 2e9))  # cycles, near 2 GHz
    begin.record()
    start = time.perf_counter()
    for call in sequence:
        call()
    enqueued = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / launches, enqueued / launches
