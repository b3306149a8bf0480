# SPDX-License-Identifier: Apache-2.0
"""Recordings: who is recording a graph, and the runs that belong to it.

A graph knows the addresses of what it reads and writes. A run that a recording has used therefore
belongs to that graph alone: the graph may be replayed at any time, on any stream, and another call
or another graph on the same registers would race with it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from .streams import capture_of

# One capture at a time in a process: PyTorch's allocator routes memory for one.
_LOCK = threading.Lock()
_here = threading.local()


class Recording:
    """The runs of one graph, which live as long as this does.

    Inside the graph they are used again: what is recorded on one stream happens in its order, and
    streams of one recording may wait for each other.
    """

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._idle: list[tuple[Any, Any]] = []

    def take(self, owner: object, spec: Any) -> Any:
        """An idle run of this graph, of the same owner and spec; None: there is none."""
        for place, (whose, run) in enumerate(self._idle):
            if whose is owner and run.spec == spec:
                del self._idle[place]
                return run
        return None

    def hold(self, run: Any) -> None:
        """Makes a run one of this graph's."""
        run.recording = weakref.ref(self)  # which holds the run: no cycle, so that both go at once
        self._held.append(run)

    def give_back(self, owner: object, run: Any) -> None:
        """Makes a run of this graph idle."""
        self._idle.append((owner, run))


@contextlib.contextmanager
def one_capture() -> Iterator[Recording]:
    """A scope in which this thread alone of the process captures.

    Raises:
        RuntimeError: This thread is capturing, or autograd calls it in a backward pass: the thread
            that captures may be waiting for that pass.
    """
    if ours() is not None:
        raise RuntimeError(
            "sample: one graph is recorded at a time; got a second recording inside the first. "
            "Make the captures of what a network calls before it is captured itself."
        )
    if in_backward():
        raise RuntimeError(
            "sample: a graph is not recorded inside a backward pass, whose thread others may wait "
            "for; got a first call of its kind there. Call once outside, or use graph=None."
        )
    with _LOCK:
        _here.recording = made = Recording()
        try:
            yield made
        finally:
            _here.recording = None


def ours() -> Recording | None:
    """What this thread is capturing, rehearsals included; None: nothing."""
    found: Recording | None = getattr(_here, "recording", None)
    return found


def capturing(device: torch.device) -> bool:
    """Whether this thread is capturing, so that a run becomes part of another graph."""
    return ours() is not None or capture_of(device) is not None


def in_backward() -> bool:
    """Whether autograd calls this thread in a backward pass."""
    task: int = torch._C._current_graph_task_id()
    return task != -1


def _others(device: torch.device) -> bool:
    """Whether somebody records the current stream. What the library captures, CUDA looks through
    itself, and `fastdiff.capture.refusals` says what it found."""
    return ours() is None and capture_of(device) is not None


def check_coefficients(device: torch.device) -> None:
    """Raises where coefficients would be copied to a device while somebody records a graph."""
    if _others(device):
        raise RuntimeError(
            "sample: inside a graph that you record, a run goes by the plan, the guidance and the "
            "gradient that it had before; got other coefficients. Call the sampler once outside "
            "with these before the recording."
        )


def check_placed(device: torch.device, name: str, given: Any) -> None:
    """Raises where seeds or extras would be copied to a device while somebody records a graph."""
    placed = isinstance(given, torch.Tensor)
    if placed and given.device == device:
        return
    if _others(device):
        got = f"a tensor on {given.device}" if placed else repr(given)
        kind = "an int64 tensor on the device, one a sample," if name == "seed" else "on the device"
        raise RuntimeError(
            f"sample: inside a graph that you record, {name}= is {kind} where every replay reads "
            f"it; got {got}. Make it before the recording."
        )
