# SPDX-License-Identifier: Apache-2.0
"""Leases: a run is lent to one call at a time."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

from .recordings import Recording, ours
from .run import Run, Spec
from .streams import Use, capture_of

_IDLE = 8  # runs of one spec that are kept for calls at the same time
_SPECS = 4  # specs whose runs are kept, so that calls of a few shapes may alternate


class Leases:
    """Lends runs: each to one call at a time. Safe from several threads.

    A run that is lent inside a recording belongs to the recorded graph from then on. Inside one of
    the library's own it goes with that capture. Inside somebody else's nobody says when the graph
    ends, and the run is kept for as long as these leases live.

    Args:
        specs: Specs whose idle runs are kept; the least recently lent give their memory back.
    """

    def __init__(self, specs: int = _SPECS) -> None:
        self._specs = specs
        self._lock = threading.Lock()
        self._idle: OrderedDict[Spec, list[Run]] = OrderedDict()
        self._recordings: dict[Hashable, Recording] = {}

    def lend(self, spec: Spec) -> Run:
        """A run of this spec for the caller alone, on the current stream.

        Raises:
            RuntimeError: Somebody records a graph, and there is no run that was made before.
        """
        recording, run = ours(), None
        if recording is not None:
            run = recording.take(self, spec)
        else:
            capture = capture_of(spec.device)
            if capture is None:
                run = self._take(spec)
            else:
                recording, run = self._for_graph(capture, spec)
        if run is None:
            run = Run(spec)
        if recording is not None and run.recording is None:
            recording.hold(run)
        run.follow()
        return run

    def _take(self, spec: Spec) -> Run | None:
        """An idle run that the current stream can use: one that it used last, if there is one."""
        given_up: list[Any] = []
        with self._lock:
            idle = self._idle.setdefault(spec, [])
            self._idle.move_to_end(spec)
            while len(self._idle) > self._specs:
                given_up.append(self._idle.popitem(last=False))
            run = _nearest(idle)
            while run is not None and not run.in_place():  # a network moved its memory
                given_up.append(run)
                run = _nearest(idle)
        return run  # the lock is free when what was given up ends

    def _for_graph(self, capture: Hashable, spec: Spec) -> tuple[Recording, Run]:
        """A run for a graph that somebody records: the graph's own, or a warm one that becomes so.

        A run cannot be made there: its table is copied from the host.
        """
        with self._lock:
            recording = self._recordings.setdefault(capture, Recording())
            run = recording.take(self, spec)
            idle = self._idle.get(spec, [])
            while run is None and idle:
                run = idle.pop()
                run = run if run.in_place() else None
        if run is None:
            raise RuntimeError(
                "sample: inside a graph that you record, a run takes registers that were made "
                "before, and keeps them for that graph; got none idle of this shape and kind. "
                "Before each recording, call the sampler once outside with the same arguments; "
                "make it with graph=None, since a captured call leaves none."
            )
        return recording, run

    def give_back(self, run: Run) -> None:
        """Ends a loan. A run that is never given back goes when its borrower drops it."""
        with self._lock:
            if run.recording is not None:
                recording = run.recording()
                if recording is not None:
                    recording.give_back(self, run)
                return
            idle = self._idle.get(run.spec)
            if idle is not None and len(idle) < _IDLE:
                idle.append(run)

    @contextlib.contextmanager
    def borrowed(self, spec: Spec) -> Iterator[Run]:
        """A run for as long as the `with` lasts.

        A run in which something was raised is given up: a network may have written to its times, or
        moved its memory, before it raised.
        """
        run = self.lend(spec)
        yield run
        self.give_back(run)

    def clear(self) -> None:
        """Gives up the idle runs, except those that belong to a graph."""
        with self._lock:
            given_up = list(self._idle.values())
            self._idle.clear()
        del given_up  # the lock is free when they end


def _nearest(idle: list[Run]) -> Run | None:
    """Takes out a run that the current stream used last, or else one that it can wait for."""
    for fits in (Use.here, Use.reachable):
        for place in range(len(idle) - 1, -1, -1):
            if fits(idle[place].use):
                return idle.pop(place)
    return None
