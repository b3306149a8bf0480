# SPDX-License-Identifier: Apache-2.0
"""Streams: a launch on memory that is used again waits for the launches before it."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Streams(Protocol):
    """The streams of one kind of device."""

    def stream(self, device: torch.device) -> Any:
        """The caller's current stream."""
        ...

    def follow(self, device: torch.device, earlier: Any) -> None:
        """Makes the current stream wait for what was launched on an earlier one."""
        ...

    def recording(self) -> bool:
        """Whether anybody is recording the current stream into a graph."""
        ...


class CudaStreams:
    """PyTorch's CUDA streams."""

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def follow(self, device: torch.device, earlier: torch.cuda.Stream) -> None:
        torch.cuda.current_stream(device).wait_stream(earlier)

    def recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


# By the type of device. Where there are none, everything happens in the order of the calls.
STREAMS: dict[str, Streams] = {"cuda": CudaStreams()}


def ordered(device: torch.device, earlier: Any) -> Any:
    """Makes the current stream wait for an earlier one (None: there was none).

    Returns:
        The current stream; None where a device has no streams.
    """
    streams = STREAMS.get(device.type)
    if streams is None:
        return None
    stream = streams.stream(device)
    # inside a recording a wait would join a stream that is not recorded
    if earlier is not None and stream != earlier and not streams.recording():
        streams.follow(device, earlier)
    return stream


def recording(device: torch.device) -> bool:
    """Whether the current stream of a device is being recorded into a graph."""
    streams = STREAMS.get(device.type)
    return streams is not None and streams.recording()
