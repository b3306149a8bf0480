# SPDX-License-Identifier: Apache-2.0
"""A capturer for tests on a CPU: it keeps what a body does and does it again, and counts."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter

import torch

from fastdiff.capture.waits import waits


class Recorder:
    """Records functions instead of launches.

    A real capture executes nothing: while this one records, the tensors in `poison` are filled with
    NaN afterwards, so that what a recording leaves behind is never mistaken for a result. It can be
    told to fail as a device does.
    """

    def __init__(self):
        self.recorded = self.launched = self.rehearsed = self.followed = self.pools = 0
        self.here = "stream 0"
        self.recorded_in = Counter()  # by pool
        self.facts = None
        self.failure = None  # raised at the end of a recording
        self.synchronises = None  # raised in a strict rehearsal
        self.bytes_each = 0
        self.waited = 0
        self.watched = None  # the type of device for which a strict rehearsal may not wait
        self.poison = lambda: ()

    def environment(self, device):
        return self.facts

    def stream(self, device):
        return self.here

    def follow(self, device, earlier):
        self.followed += 1

    @contextlib.contextmanager
    def preserved(self, device):
        state = torch.get_rng_state()
        yield lambda: torch.set_rng_state(state)

    def drawn(self, device):
        state = torch.get_rng_state()
        return lambda: torch.set_rng_state(state)

    def wait(self, device):
        self.waited += 1

    def rehearse(self, device, body, strict):
        self.rehearsed += 1
        with waits(self.watched) if strict and self.watched else contextlib.nullcontext():
            body()
        if strict and self.synchronises is not None:
            raise self.synchronises

    def record(self, device, body, pool):
        body()
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

    def recording(self):
        return False

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
