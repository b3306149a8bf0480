# SPDX-License-Identifier: Apache-2.0
"""What captures are made with: CUDA graphs, recorded on a side stream."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch


class Capturer(Protocol):
    """Records what a function launches on one kind of device."""

    def environment(self, device: torch.device) -> Hashable:
        """What recorded kernels depend on besides their arguments: autocast, precision flags."""
        ...

    def preserved(
        self, device: torch.device
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """A scope that leaves the caller's autocast cache as it was. Entering it gives `rewind()`,
        which puts the generators of random numbers back to where they stood at its beginning."""
        ...

    def rehearse(self, device: torch.device, body: Callable[[], None], strict: bool) -> None:
        """Runs the body beside the caller's stream. Under `strict` a synchronisation raises."""
        ...

    def record(
        self, device: torch.device, body: Callable[[], None], pool: Any
    ) -> Callable[[], None]:
        """Records the body into a graph on memory of `pool`. The result launches the graph."""
        ...

    def pool(self, device: torch.device) -> Any:
        """A new memory pool for graphs that never run at once."""
        ...

    def pool_bytes(self, device: torch.device, pool: Any) -> int:
        """Device memory that a pool holds. Does not wait for the device."""
        ...


class CudaCapturer:
    """CUDA graphs. All work of one device is captured on one side stream a thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def environment(self, device: torch.device) -> Hashable:
        autocast = torch.is_autocast_enabled("cuda")
        return (
            torch.get_autocast_dtype("cuda") if autocast else None,
            torch.are_deterministic_algorithms_enabled(),
            *_precisions(),
        )

    @contextlib.contextmanager
    def preserved(self, device: torch.device) -> Iterator[Callable[[], None]]:
        generator = torch.cuda.default_generators[device.index or 0]
        cuda_state, cpu_state = generator.get_state(), torch.get_rng_state()

        def rewind() -> None:
            generator.set_state(cuda_state)
            torch.set_rng_state(cpu_state)

        # weights cast by autocast outside a capture may be freed before it is replayed, and those
        # cast inside one belong to it
        torch.clear_autocast_cache()
        try:
            yield rewind
        finally:
            torch.clear_autocast_cache()

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        streams = self._local.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        return streams[device]

    def rehearse(self, device: torch.device, body: Callable[[], None], strict: bool) -> None:
        current, side = torch.cuda.current_stream(device), self._side(device)
        side.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.device(device), torch.cuda.stream(side):
            try:
                # the mode is the process's: it would strike other threads, which may wait as they
                # like; a capture that breaks then tells less of why
                if strict and threading.active_count() == 1:
                    torch.cuda.set_sync_debug_mode("error")
                body()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                current.wait_stream(side)

    def record(
        self, device: torch.device, body: Callable[[], None], pool: Any
    ) -> Callable[[], None]:
        graph, side = torch.cuda.CUDAGraph(), self._side(device)
        # weights cast by autocast in a rehearsal lie outside the graph, and would be freed
        torch.clear_autocast_cache()
        with torch.cuda.device(device), torch.cuda.stream(side):
            # matrix libraries keep a workspace for each stream: inside the graph's own pool
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # other threads may use the device meanwhile
                with torch.cuda.graph(
                    graph, pool=pool, stream=side, capture_error_mode="thread_local"
                ):
                    body()
            except BaseException:
                self._recover(device, side, pool)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph.replay

    @staticmethod
    def _recover(device: torch.device, side: torch.cuda.Stream, pool: Any) -> None:
        """Undoes what PyTorch leaves behind where a capture breaks: before 2.12 its allocator stays
        in the capture, and its generators refuse to draw until a capture has ended well."""
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the graph is empty
            with torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"
            ):
                pass

    def pool(self, device: torch.device) -> Any:
        return torch.cuda.graph_pool_handle()

    def pool_bytes(self, device: torch.device, pool: Any) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))


def _precisions() -> tuple[Hashable, ...]:
    """PyTorch's settings of matrix products and convolutions, by its newer names where it has them
    (the older getters raise where the newer were set)."""
    backends = torch.backends
    places = (backends, backends.cuda.matmul, backends.cudnn, getattr(backends.cudnn, "conv", None))
    newer = tuple(getattr(place, "fp32_precision", None) for place in places)
    if any(value is not None for value in newer):
        return newer
    return torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32


# By the type of device. Where there is none, nothing can be captured.
CAPTURERS: dict[str, Capturer] = {"cuda": CudaCapturer()}
