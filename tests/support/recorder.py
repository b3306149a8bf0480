# SPDX-License-Identifier: Apache-2.0
"""A capturer for tests on a CPU: it keeps what a body does and does it again, and counts."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections import Counter

import torch

from fastdiff.capture.waits import waits


class Recorder:
    """Records functions instead of launches, and stands in for a device's streams.

    A real capture executes nothing: while this one records, the tensors in `poison` are filled with
    NaN afterwards, so that what a recording leaves behind is never mistaken for a result. It can be
    told to fail as a device does.

    Streams are names. It refuses the waits that CUDA refuses, and keeps the others.

    Attributes:
        here: The current stream of every thread.
        side: The stream that it captures on; None: the caller's, which other threads see
            free: a device's capturer has a stream of its own for each thread.
        waits: Each wait, as (who, for whom).
        waited: Called with each wait when it is made.
        captures: Streams that somebody records, each with what tells his graph from others.
    """

    def __init__(self):
        self.recorded = self.launched = self.rehearsed = self.pools = 0
        self.here, self.side = "stream 0", None
        self.waits, self.waited = [], lambda who, whom: None
        self.captures = {}
        self._ours = {}  # the threads that record on their caller's stream, by stream
        self.settled = 0  # times that a launched replay was waited for
        self.facts = None
        self.failure = None  # raised at the end of a recording
        self.synchronises = None  # raised in a strict rehearsal
        self.bytes_each = 0
        self.watched = None  # the type of device for which a strict rehearsal may not wait
        self.poison = lambda: ()
        self.recorded_in = Counter()  # bodies by pool

    def environment(self, device):
        return self.facts

    # -- streams -----------------------------------------------------------------------------------

    @property
    def followed(self):
        """How many waits were made."""
        return len(self.waits)

    def stream(self, device):
        return self.here

    def wait(self, stream, earlier):
        if self.capture(stream) != self.capture(earlier):
            raise RuntimeError("CUDA error 905: dependency created on uncaptured work")
        self.waits.append((stream, earlier))
        self.waited(stream, earlier)

    def capture(self, stream):
        if self._ours.get(stream, threading.get_ident()) != threading.get_ident():
            return None
        return self.captures.get(stream)

    @contextlib.contextmanager
    def on(self, stream):
        """A scope whose current stream is another one."""
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    @contextlib.contextmanager
    def recording(self, stream, graph):
        """A scope in which somebody records a stream, the current one here, into a graph."""
        self.captures[stream] = graph
        try:
            with self.on(stream):
                yield
        finally:
            del self.captures[stream]

    # -- captures ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def preserved(self, device):
        state = torch.get_rng_state()
        yield lambda: torch.set_rng_state(state)

    def drawn(self, device):
        state = torch.get_rng_state()
        return lambda: torch.set_rng_state(state)

    def settle(self, device):
        self.settled += 1

    def rehearse(self, device, body, strict):
        self.rehearsed += 1
        looking = waits(self.watched) if strict and self.watched else contextlib.nullcontext()
        with self.on(self.side or self.here), looking:
            body()
        if strict and self.synchronises is not None:
            raise self.synchronises

    def record(self, device, body, pool):
        stream = self.side or self.here
        if self.side is None:
            self._ours[stream] = threading.get_ident()
        try:
            with self.recording(stream, object()):
                body()
        finally:
            self._ours.pop(stream, None)
        for tensor in self.poison():
            tensor.fill_(float("nan"))
        if self.failure is not None:
            raise self.failure
        self.recorded += 1
        self.recorded_in[pool] += 1

        def launch():
            self.launched += 1
            body()

        return launch

    def pool(self, device):
        self.pools += 1
        return self.pools

    def pool_bytes(self, device, pool):
        return self.recorded_in[pool] * self.bytes_each


def capturers():
    """The library's table of capturers by device type, or None where it has none by these names."""
    for module in ("fastdiff.capture.cuda", "fastdiff.capture", "fastdiff.graphs"):
        with contextlib.suppress(ImportError):
            table = getattr(importlib.import_module(module), "CAPTURERS", None)
            if table is not None:
                return table
    return None
