# SPDX-License-Identifier: Apache-2.0
"""Streams: memory that is used on several of them, one after another, and given back in the end.

Two rules of CUDA stand behind this module. A stream that is being recorded into a graph may wait
for streams of the same recording alone, and nobody else may wait for it. And PyTorch's allocator
hands freed memory to the stream that it was allotted on, at once: a kernel that another stream has
still in flight would read what somebody else has written there.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Hashable
from typing import Any, Protocol

import torch

from .driver import capture_id


class Streams(Protocol):
    """The streams of one kind of device."""

    def stream(self, device: torch.device) -> Any:
        """The caller's current stream."""
        ...

    def wait(self, stream: Any, earlier: Any) -> None:
        """Makes a stream wait for what was launched on another one."""
        ...

    def capture(self, stream: Any) -> Hashable | None:
        """Which graph a stream is being recorded into, whoever does it; None: none."""
        ...


class CudaStreams:
    """PyTorch's CUDA streams. Each is looked up by its address: making the object takes longer."""

    def __init__(self) -> None:
        self._met: dict[tuple[int, int], torch.cuda.Stream] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        index = torch.cuda.current_device() if device.index is None else device.index
        key = index, torch._C._cuda_getCurrentRawStream(index)
        found = self._met.get(key)
        if found is None:
            found = self._met[key] = torch.cuda.current_stream(index)
        return found

    def wait(self, stream: torch.cuda.Stream, earlier: torch.cuda.Stream) -> None:
        stream.wait_stream(earlier)

    def capture(self, stream: torch.cuda.Stream) -> Hashable | None:
        if stream == self.stream(torch.device("cuda")):
            recorded = torch.cuda.is_current_stream_capturing()
        else:
            with torch.cuda.stream(stream):
                recorded = torch.cuda.is_current_stream_capturing()
        return capture_id(stream.cuda_stream) if recorded else None


# By the type of device. Where there are none, everything happens in the order of the calls.
STREAMS: dict[str, Streams] = {"cuda": CudaStreams()}


def capture_of(device: torch.device) -> Hashable | None:
    """Which graph the current stream of a device is being recorded into; None: none."""
    streams = STREAMS.get(device.type)
    return None if streams is None else streams.capture(streams.stream(device))


class Use:
    """Where some memory was allotted, and where it was used last.

    The memory has one user at a time, which `follow`s the one before. At the end of its life the
    streams that it was allotted on wait for the last user, so that whoever is handed it next comes
    after him.

    Args:
        device: Where the memory lies. The current stream there is where it is allotted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = STREAMS.get(device.type)
        self._homes: list[Any] = []
        self._last: Any = None
        self._process = _forks
        self.allotted()

    def allotted(self) -> None:
        """Notes that the current stream is one that some of the memory is allotted on."""
        if self._streams is not None:
            stream = self._streams.stream(self._device)
            if stream not in self._homes:
                self._homes.append(stream)

    def here(self) -> bool:
        """Whether the current stream is the one of the user before."""
        streams = self._streams
        return streams is None or self._last == streams.stream(self._device)

    def reachable(self) -> bool:
        """Whether the current stream can come after the user before: see `follow`."""
        streams, last = self._streams, self._last
        if streams is None or last is None:
            return True
        stream = streams.stream(self._device)
        capture = streams.capture(stream)
        return stream == last or capture is not None or streams.capture(last) is None

    def follow(self) -> Any:
        """Makes the current stream the user, after the one before.

        A stream that is being recorded does not wait for one that is not: CUDA has no such wait,
        and who records orders the work before, as `torch.cuda.graph` does by synchronising.

        Returns:
            The current stream; None where a device has no streams.

        Raises:
            RuntimeError: The one before is on another stream that somebody is recording.
        """
        streams, last = self._streams, self._last
        if streams is None:
            return None
        stream = streams.stream(self._device)
        if last is not None and stream != last:
            capture, before = streams.capture(stream), streams.capture(last)
            if capture == before:
                streams.wait(stream, last)
            elif capture is None:
                raise RuntimeError(
                    "sample: a call waits for the one before on its memory, whose stream must not "
                    "be in the middle of a recording; got a call on another stream while that one "
                    "is recorded into a graph. End the recording first, or use a sampler of its "
                    "own in each thread."
                )
        self._last = stream
        if _waiting:
            settle()
        return stream

    def used(self, stream: Any) -> None:
        """Notes a user that came after the one before by other means."""
        self._last = stream

    def end(self, held: Any) -> None:
        """Ends the life of the memory, from a finalizer.

        Args:
            held: What stands on the memory. It is kept where a stream cannot wait as yet because
                somebody is recording, until a later call finds that it can.
        """
        if self._streams is None or self._last is None or sys.is_finalizing():
            return
        if self._process != _forks:  # the memory is the parent's, and its device out of reach
            return
        homes = [home for home in self._homes if home != self._last]
        if homes:
            grave = (self._streams, self._device, homes, self._last, held)
            if not _settled(grave):
                _waiting.append(grave)


_Grave = tuple[Streams, torch.device, list[Any], Any, Any]
# What ended while a stream of it was recorded. A finalizer may run at any line of any thread, so
# that this is a queue without a lock.
_waiting: deque[_Grave] = deque()


_forks = 0  # that lie between the first process and this one


def _forked() -> None:
    global _forks
    _forks += 1
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def settle() -> None:
    """Gives back what ended during recordings that are over."""
    for _ in range(len(_waiting)):
        try:
            grave = _waiting.popleft()
        except IndexError:  # another thread took it
            return
        if not _settled(grave):
            _waiting.append(grave)


def _settled(grave: _Grave) -> bool:
    """Lets the memory's own streams wait for its last user, unless one of them is recorded."""
    streams, device, homes, last, _ = grave
    touched = [streams.stream(device), last, *homes]
    if any(streams.capture(stream) is not None for stream in touched):
        return False
    for home in homes:
        streams.wait(home, last)
    return True
