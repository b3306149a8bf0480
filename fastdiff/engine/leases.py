# SPDX-License-Identifier: Apache-2.0
"""Leases: a run is lent to one call at a time."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from .run import Run, Spec

_IDLE = 8  # runs of one spec that are kept for calls at the same time


class Leases:
    """Lends runs: each to one call at a time. Safe from several threads.

    Runs lent inside somebody's recording belong to the recorded graph from then on, and are lent
    inside recordings alone.

    Args:
        specs: Specs whose idle runs are kept; the least recently lent give their memory back.
    """

    def __init__(self, specs: int = 1) -> None:
        self._specs = specs
        self._lock = threading.Lock()
        self._idle: OrderedDict[Spec, list[Run]] = OrderedDict()
        self._recorded: dict[Spec, list[Run]] = {}

    def lend(self, spec: Spec, recorded: bool = False) -> Run:
        """A run of this spec for the caller alone, on the current stream.

        Args:
            spec: What the run is for.
            recorded: Whether the caller is being recorded into a graph that is not the library's.
        """
        with self._lock:
            if recorded:
                idle = self._recorded.setdefault(spec, [])
            else:
                idle = self._idle.setdefault(spec, [])
                self._idle.move_to_end(spec)
                while len(self._idle) > self._specs:
                    self._idle.popitem(last=False)
            run = idle.pop() if idle else None
            while run is not None and not run.in_place():  # a network moved its memory
                run = idle.pop() if idle else None
        if run is None:
            run = Run(spec)
        run.follow()
        return run

    def give_back(self, run: Run, recorded: bool = False) -> None:
        """Ends a loan. A run that is never given back goes when its borrower drops it."""
        with self._lock:
            held: Mapping[Spec, list[Run]] = self._recorded if recorded else self._idle
            idle = held.get(run.spec)
            if idle is not None and (recorded or len(idle) < _IDLE):
                idle.append(run)

    @contextlib.contextmanager
    def borrowed(self, spec: Spec, recorded: bool = False) -> Iterator[Run]:
        """A run for as long as the `with` lasts.

        A run in which something was raised is given up: a network may have written to its times, or
        moved its memory, before it raised.
        """
        run = self.lend(spec, recorded)
        yield run
        self.give_back(run, recorded)

    def clear(self) -> None:
        """Gives up the idle runs, except those that belong to somebody's graph."""
        with self._lock:
            self._idle.clear()
