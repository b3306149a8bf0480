# SPDX-License-Identifier: Apache-2.0
"""What captures are made with: CUDA graphs, recorded on a side stream."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch

from .waits import AVAILABLE, waits

_BROKEN: list[Any] = []  # graphs that PyTorch's allocator of pinned memory may still ask


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

    def drawn(self, device: torch.device) -> Callable[[], None]:
        """What puts the device's generator of random numbers back to where it stands now."""
        ...

    def settle(self, device: torch.device) -> None:
        """Waits for what was launched on the current stream."""
        ...

    def rehearse(self, device: torch.device, body: Callable[[], None], strict: bool) -> None:
        """Runs the body beside the caller's stream. Under `strict` a synchronisation raises."""
        ...

    def record(
        self, device: torch.device, body: Callable[[], None], pool: Any
    ) -> Callable[[], None]:
        """Records the body into a graph on memory of `pool`. The result launches the graph.

        A pool in which a recording broke is not given again.
        """
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

    def drawn(self, device: torch.device) -> Callable[[], None]:
        generator = torch.cuda.default_generators[device.index or 0]
        offset = generator.get_offset()

        def rewind() -> None:
            generator.set_offset(offset)

        return rewind

    def settle(self, device: torch.device) -> None:
        torch.cuda.current_stream(device).synchronize()

    def rehearse(self, device: torch.device, body: Callable[[], None], strict: bool) -> None:
        current, side = torch.cuda.current_stream(device), self._side(device)
        side.wait_stream(current)
        with torch.cuda.device(device), torch.cuda.stream(side), contextlib.ExitStack() as scopes:
            scopes.callback(current.wait_stream, side)
            if strict and AVAILABLE:
                scopes.enter_context(waits(device.type))
            # PyTorch's own mode sees more and is the process's: it would strike other threads,
            # which may wait as they like
            if strict and threading.active_count() == 1:
                scopes.enter_context(_sync_debug_mode("error"))
            body()

    def record(
        self, device: torch.device, body: Callable[[], None], pool: Any
    ) -> Callable[[], None]:
        graph, side = torch.cuda.CUDAGraph(), self._side(device)
        # weights cast by autocast in a rehearsal lie outside the graph, and would be freed
        torch.clear_autocast_cache()
        with torch.cuda.device(device), torch.cuda.stream(side):
            node = torch.empty(1, device=device)
            # matrix libraries keep a workspace for each stream: inside the graph's own pool
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # other threads may use the device meanwhile
                with torch.cuda.graph(
                    graph, pool=pool, stream=side, capture_error_mode="thread_local"
                ):
                    try:
                        body()
                    except BaseException:
                        # PyTorch warns of an empty graph, and a warning may be an error
                        with contextlib.suppress(Exception):
                            node.zero_()
                        raise
            except BaseException:
                self._recover(device, side, graph, pool)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph.replay

    @staticmethod
    def _recover(device: torch.device, side: torch.cuda.Stream, graph: Any, pool: Any) -> None:
        """Undoes what PyTorch leaves behind where a capture breaks.

        Before 2.12 its allocators stay in the capture. That of device memory can be told to leave
        it, and to count the pool's users right. That of pinned memory cannot: it asks the graph
        which allocations are its, so that the graph is kept, and the pool is not used again. And
        generators of random numbers refuse to draw until a capture has ended well.
        """
        number = device.index or 0
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(number, pool)  # raises where PyTorch has done it
            _BROKEN.append(graph)
            torch._C._cuda_releasePool(number, pool)
        with contextlib.suppress(Exception):
            graph.reset()
        with contextlib.suppress(Exception):
            node = torch.empty(1, device=device)
            with torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"
            ):
                node.zero_()

    def pool(self, device: torch.device) -> Any:
        return torch.cuda.graph_pool_handle()

    def pool_bytes(self, device: torch.device, pool: Any) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))


@contextlib.contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    """A scope in which PyTorch has this mode."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode(mode)
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: str | int) -> None:
    """Sets the mode without PyTorch's warning, once a process, that it is a prototype.

    The filters of warnings are the process's too. They are changed for this one call, where no
    other Python thread lives, unless the network has started one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


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
