# SPDX-License-Identifier: Apache-2.0
"""Graph capture: a whole sampling loop, or one stage of it, recorded once and launched as one.

What is captured reads and writes fixed memory: the run's registers, its table of coefficients, its
times, its seeds and its copy of the conditioning. A call copies its inputs there, replays, and
copies the result out; another plan of the same structure is another table in the same place.
Everything else that the recorded kernels depend on (shapes, dtypes, autocast, the addresses of the
network's weights) is part of the key under which a capture is kept, or is looked at before each
replay, so that no replay reads stale memory.

A capture is made in four steps, each of which can refuse the network and say why: the body is run
twice as it is, the second time with every synchronisation turned into an error; then recorded; then
replayed on the same inputs and compared with what the body gave.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from .guidance import PerStage

MODES = ("auto", "loop", "stage")

# One capture at a time in a process: PyTorch's allocator routes memory for one.
_LOCK = threading.Lock()
_here = threading.local()


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    with _LOCK:
        _here.capturing = True
        try:
            yield
        finally:
            _here.capturing = False


def capturing(device: torch.device) -> bool:
    """Whether this thread is capturing, so that a run becomes part of another graph."""
    capturer = CAPTURERS.get(device.type)
    return getattr(_here, "capturing", False) or (capturer is not None and capturer.recording())


# Relative difference between a body and its replay above which the replay is another computation.
# Below it lie networks whose kernels add in no fixed order.
_SAME = 2e-2


@dataclass(frozen=True)
class Graph:
    """How a sampler captures. `graph="loop"` is `Graph("loop")`.

    Args:
        mode: "loop": the whole sampling loop is one launch. "stage": one stage is captured and
            replayed, for plans of any length. "auto": "loop" from the second call of a kind on,
            CUDA tensors given; eager elsewhere, at the first call, for which a capture would not
            pay, and, with a warning, for networks that cannot be captured.
        loops: Captures kept at once; the least recently used goes first.
        bytes: Device memory that they may hold, buffers and graphs; None: no bound.
        buckets: Batch sizes to capture for, increasing. A smaller batch is padded up to the next,
            and shares its capture; a larger one is captured at its own size. None: every batch
            size at its own.

    Raises:
        ValueError, TypeError: An argument is none of these.
    """

    mode: str = "auto"
    loops: int = 8
    bytes: int | None = None
    buckets: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"Graph: mode is one of {', '.join(map(repr, MODES))}; got {self.mode!r}."
            )
        for name, value in (("loops", self.loops), ("bytes", self.bytes)):
            if value is None and name == "bytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Graph: {name} is an integer; got {value!r}.")
            if value < 1:
                raise ValueError(f"Graph: {name} is at least 1; got {value}.")
        if self.buckets is not None:
            if not hasattr(self.buckets, "__iter__"):
                raise TypeError(f"Graph: buckets is a sequence of integers; got {self.buckets!r}.")
            buckets = tuple(self.buckets)
            if not all(isinstance(b, int) and not isinstance(b, bool) for b in buckets):
                raise TypeError(f"Graph: buckets are integers; got {self.buckets!r}.")
            if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
                raise ValueError(
                    "Graph: buckets are batch sizes of at least 1 that increase; got "
                    f"{self.buckets!r}."
                )
            object.__setattr__(self, "buckets", buckets)

    def bucket(self, batch: int) -> int:
        """The batch size that a batch is padded to."""
        return next((b for b in self.buckets or () if b >= batch), batch)


@dataclass(frozen=True)
class Stats:
    """What a sampler's captures have done and hold; see `Sampler.stats`.

    Attributes:
        captures: Captures made.
        replays: Graph launches: one a call in "loop" mode, one a stage in "stage" mode.
        evictions: Captures given up for `Graph.loops` or `Graph.bytes`, or because the network's
            weights had moved.
        loops: Captures held.
        bytes: Device memory they hold: buffers, and the pool that the graphs share.
    """

    captures: int = 0
    replays: int = 0
    evictions: int = 0
    loops: int = 0
    bytes: int = 0


# -- what is captured with ------------------------------------------------------------------------


class Capturer(Protocol):
    """Records what a function launches on one kind of device."""

    def environment(self, device: torch.device) -> Hashable:
        """What recorded kernels depend on besides their arguments: autocast, precision flags."""
        ...

    def stream(self, device: torch.device) -> Any:
        """The caller's current stream."""
        ...

    def follow(self, device: torch.device, earlier: Any) -> None:
        """Makes the current stream wait for what was launched on an earlier one."""
        ...

    def preserved(
        self, device: torch.device
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """A scope that leaves the caller's autocast cache as it was; gives `rewind()`, which puts
        the generators of random numbers back to where they stood at its beginning."""
        ...

    def rehearse(self, device: torch.device, body: Callable[[], None], strict: bool) -> None:
        """Runs the body beside the caller's stream; `strict`: a synchronisation raises."""
        ...

    def record(
        self, device: torch.device, body: Callable[[], None], pool: Any
    ) -> Callable[[], None]:
        """Records the body into a graph on memory of `pool`; the result launches it."""
        ...

    def recording(self) -> bool:
        """Whether the current stream is being recorded, by whomever."""
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

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def follow(self, device: torch.device, earlier: torch.cuda.Stream) -> None:
        torch.cuda.current_stream(device).wait_stream(earlier)

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

    def recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

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


def ordered(device: torch.device, earlier: Any) -> Any:
    """Makes the current stream wait for an earlier one (None: there was none); gives the current,
    None where a device has no streams."""
    capturer = CAPTURERS.get(device.type)
    if capturer is None:
        return None
    stream = capturer.stream(device)
    if earlier is not None and stream != earlier:
        capturer.follow(device, earlier)
    return stream


# -- conditioning ---------------------------------------------------------------------------------

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def flatten(cond: Any) -> tuple[Hashable, list[tuple[torch.Tensor, bool]]]:
    """A hashable description of the conditioning, and its tensors in order.

    Returns:
        The description, and of each tensor whether it has one entry a sample: those reached through
        dicts alone have; those inside lists and tuples are kept whole.

    Raises:
        TypeError: It holds an object whose changes a captured graph would not see.
    """
    tensors: list[tuple[torch.Tensor, bool]] = []

    def walk(value: Any, where: str, rows: bool) -> Hashable:
        if isinstance(value, torch.Tensor):
            tensors.append((value, rows))
            shape = tuple(value.shape[1:] if rows else value.shape)
            return rows, shape, value.dtype, value.device
        if isinstance(value, PerStage):  # whole: a graph reads one stage of it after another
            return PerStage, walk(value.values, where, False)
        if isinstance(value, Mapping):
            return (type(value), *((k, walk(v, f"{where}[{k!r}]", rows)) for k, v in value.items()))
        if isinstance(value, list | tuple):
            inner = (walk(v, f"{where}[{i}]", False) for i, v in enumerate(value))
            return (type(value), *inner)
        if isinstance(value, _CONSTANTS):
            return type(value), value
        raise TypeError(
            "sample: a captured graph sees tensors, numbers and strings in dicts, lists and tuples;"
            f" got {type(value).__name__} as {where}, whose changes it would miss. Pass its tensors"
            " in a dict, or use graph=None."
        )

    return walk(cond, "cond", True), tensors


def rebuild(cond: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The conditioning with its tensors replaced, in the order of `flatten`."""
    if isinstance(cond, torch.Tensor):
        return next(tensors)
    if isinstance(cond, PerStage):
        return PerStage(next(tensors))
    if isinstance(cond, Mapping):
        return {key: rebuild(value, tensors) for key, value in cond.items()}
    if isinstance(cond, list | tuple):
        inner = [rebuild(value, tensors) for value in cond]
        return type(cond)(*inner) if hasattr(cond, "_fields") else type(cond)(inner)
    return cond


# -- the network's weights ------------------------------------------------------------------------


_DEPTH = 4  # objects that are followed from a network to its tensors
_OPAQUE = (str, bytes, bool, int, float, complex, type, types.ModuleType, np.ndarray)


class Weights:
    """Where a network's tensors lie, to see before a replay that they still do.

    Followed are modules, closures, bound methods, partial applications, the globals that a function
    names, attributes of plain objects, and what lists, tuples and dicts hold. Not seen are Python
    values: a changed scale, an added hook.
    """

    def __init__(self, network: Any) -> None:
        self._held: list[tuple[Mapping[Any, Any], Any, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._places: list[tuple[torch.Tensor, int]] = []
        self._training: list[tuple[torch.nn.Module, bool]] = []
        self._seen: set[int] = set()
        self._follow(network, _DEPTH)

    def _follow(self, value: Any, depth: int) -> None:
        if isinstance(value, _OPAQUE) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._places.append((value, _address(value)))
        elif isinstance(value, torch.nn.Module):
            for module in value.modules():
                self._add_module(module)
        elif depth == 0:
            return
        elif isinstance(value, dict):
            self._add_dict(value, depth)
        elif isinstance(value, list | tuple):
            for item in value:
                self._follow(item, depth - 1)
        else:
            self._add_object(value, depth)

    def _add_module(self, module: torch.nn.Module) -> None:
        self._seen.add(id(module))
        self._training.append((module, module.training))
        for holder in (module._parameters, module._buffers, module._modules):
            self._held += [(holder, name, value) for name, value in holder.items()]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                self._places.append((tensor, _address(tensor)))

    def _add_dict(self, holder: dict[Any, Any], depth: int) -> None:
        for name, value in holder.items():
            if isinstance(value, torch.Tensor | torch.nn.Module):
                self._held.append((holder, name, value))
            self._follow(value, depth - 1)

    def _add_object(self, value: Any, depth: int) -> None:
        for name in ("__self__", "__wrapped__"):
            self._follow(getattr(value, name, None), depth - 1)
        if isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                self._follow(item, depth - 1)
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # not filled yet
                content = cell.cell_contents
                if isinstance(content, torch.Tensor | torch.nn.Module):
                    self._cells.append((cell, content))
                self._follow(content, depth - 1)
        named = getattr(getattr(value, "__code__", None), "co_names", ())
        globals_of = getattr(value, "__globals__", {})
        for name in named:
            content = globals_of.get(name)
            if isinstance(content, torch.Tensor | torch.nn.Module):
                self._held.append((globals_of, name, content))
                self._follow(content, depth - 1)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._add_dict(own, depth)

    def moved(self) -> bool:
        """Whether a tensor or a submodule was replaced, or train() or eval() called."""
        return (
            any(_address(tensor) != place for tensor, place in self._places)
            or any(module.training != mode for module, mode in self._training)
            or any(holder.get(name) is not value for holder, name, value in self._held)
            or any(cell.cell_contents is not value for cell, value in self._cells)
        )


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a lazy or fake tensor has none
        return 0


# -- captures -------------------------------------------------------------------------------------


Name = bool | str | None


@dataclass
class Entry:
    """One capture with all that it stands on.

    Attributes:
        run: The sampler's buffers and bound kernels; kept alive here.
        bytes: Of the buffers.
        launches: The graphs by name: None for a loop; for a stage, whether it evaluates; "forward"
            and "backward" for a loop with its gradient.
        weights: The network's, as they lay.
    """

    run: Any
    bytes: int
    launches: dict[Name, Callable[[], None]] = field(default_factory=dict)
    weights: Weights | None = None


class Captures:
    """A sampler's captures, the least recently used first, in one memory pool."""

    def __init__(self, graph: Graph, capturer: Capturer, device: torch.device) -> None:
        self._graph, self._capturer, self._device = graph, capturer, device
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._pool: Any = None
        self._pool_bytes = 0
        self._captures = self._replays = self._evictions = 0

    def stats(self) -> Stats:
        return Stats(
            captures=self._captures,
            replays=self._replays,
            evictions=self._evictions,
            loops=len(self._entries),
            bytes=self._bytes(),
        )

    def environment(self) -> Hashable:
        """See `Capturer.environment`."""
        return self._capturer.environment(self._device)

    def get(self, key: Hashable) -> Entry | None:
        """The entry of that key whose network still lies where it lay."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.weights is not None and entry.weights.moved():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def add(self, key: Hashable, entry: Entry) -> bool:
        """Keeps a captured entry, at the price of others.

        Returns:
            False where it was given up with all others for `Graph.bytes`: alone it may fit, so
            capture it once more.

        Raises:
            ValueError: It alone is larger than `Graph.bytes`.
        """
        self._entries[key] = entry
        alone = True
        while len(self._entries) > self._graph.loops or (self._over() and len(self._entries) > 1):
            alone = False
            self._drop(next(iter(self._entries)))
        if not self._over():
            return True
        needed = self._bytes()
        self._drop(key)  # the last: what the pool holds of the others goes with it
        if alone:
            raise ValueError(
                f"sample: captured loops may hold {self._graph.bytes} bytes (Graph.bytes), and this"
                f" one needs {needed}. Raise the bound, sample smaller batches, or use graph=None."
            )
        return False

    def drop(self, key: Hashable) -> None:
        """Gives up one entry, if it is there."""
        if key in self._entries:
            self._drop(key)

    def launch(self, entry: Entry, name: Name = None) -> None:
        """Replays on the current stream."""
        self._replays += 1
        entry.launches[name]()

    def clear(self) -> None:
        """Gives up every capture and its memory."""
        for key in list(self._entries):
            self._drop(key)

    def capture(
        self,
        bodies: Mapping[Any, Callable[[], None]],
        whole: Callable[[Callable[[Any], None]], None],
        result: Callable[[], torch.Tensor],
        entry: Entry,
        network: Any,
    ) -> None:
        """Records bodies into an entry, or refuses.

        Args:
            bodies: What to record, by its name in `Entry.launches`.
            whole: `whole(step)` fills the buffers anew and makes one whole run of them, calling
                `step(name)` for every body in order.
            result: What a run leaves.
            entry: Where the graphs go.
            network: Whose tensors they read.

        Raises:
            RuntimeError: The network cannot be captured: which rule it broke, and where.
            Exception: What the network itself raises.
        """
        capturer, device = self._capturer, self._device

        def rehearsal(strict: bool) -> Callable[[Name], None]:
            return lambda name: capturer.rehearse(device, bodies[name], strict)

        done = False
        with _capturing(), capturer.preserved(device) as rewind:
            try:
                whole(rehearsal(False))
                rewind()
                entry.weights = Weights(network)
                graphs: dict[Name, Callable[[], None]] = {}
                try:
                    whole(rehearsal(True))
                    expected = result().clone()
                    if self._pool is None:
                        self._pool = capturer.pool(device)
                    for name, body in bodies.items():
                        graphs[name] = capturer.record(device, body, self._pool)
                except RuntimeError as error:
                    refused = refusal(error)
                    if refused is error:
                        raise
                    raise refused from error
                rewind()
                entry.launches.update(graphs)
                whole(functools.partial(self.launch, entry))
                _compare(expected, result(), entry.weights)
                done = True
            finally:
                if not done:
                    rewind()
                    if not self._entries:
                        self._pool = None  # what a broken capture left in it goes with it
        self._captures += 1
        self._pool_bytes = capturer.pool_bytes(device, self._pool)

    def _bytes(self) -> int:
        return self._pool_bytes + sum(entry.bytes for entry in self._entries.values())

    def _over(self) -> bool:
        return self._graph.bytes is not None and self._bytes() > self._graph.bytes

    def _drop(self, key: Hashable) -> None:
        del self._entries[key]
        self._evictions += 1
        if not self._entries:  # the graphs' memory goes back with the last of them
            self._pool, self._pool_bytes = None, 0


def _compare(expected: torch.Tensor, got: torch.Tensor, weights: Weights) -> None:
    """Raises where a replay is another computation than the network's."""
    problem = difference(expected, got)
    if problem is None and weights.moved():
        problem = "the same, but the network has replaced tensors that it keeps"
    if problem is not None:
        raise RuntimeError(
            "sample: a captured network depends on its tensors alone; compared with the network "
            f"called on the same inputs, the replay gives {problem}. Does it count calls, branch "
            "on Python values that change, or make its buffers anew? Make these inputs (cond=), or "
            "use graph=None."
        )


def difference(expected: torch.Tensor, got: torch.Tensor) -> str | None:
    """How a replay's result differs from the one expected, or None. Waits for the device."""
    expected, got = expected.double(), got.double()
    both = torch.isfinite(expected) & torch.isfinite(got)
    if bool((torch.isfinite(expected) != torch.isfinite(got)).any()):
        return "other finite values"
    expected, got = expected[both], got[both]
    error = float((got - expected).norm())
    scale = float(expected.norm())
    if error <= _SAME * scale or error == 0.0:
        return None
    return f"a result that differs by {error / scale if scale else error:.2g} (relative)"


# What PyTorch and CUDA say, and the rule that was broken. First match.
_RULES = (
    (
        ("synchroniz", "cannot copy between cpu and cuda", "pageable", "unpinned"),
        "a captured network neither waits for the device nor copies from or to it",
        "Look for .item(), .cpu(), float(tensor), `if tensor`, print, and tensors made on the CPU "
        "(torch.tensor(...).to(device)); keep such values on the device or in buffers",
    ),
    (
        ("legacy stream", "wrong thread", "capturing stream", "isolat"),
        "a captured network launches on the current stream alone",
        "Look for streams and threads of its own, and for kernels launched without a stream",
    ),
    (
        ("operation not permitted when stream is capturing", "streamcapture", "capture"),
        "a captured network neither waits for the device nor allocates with the driver",
        "Look for .item(), pinned or unmanaged memory, and libraries that initialise at first use",
    ),
)


def refusal(error: RuntimeError) -> RuntimeError:
    """What a stranger is told of an error met in a capture; other errors as they are."""
    # where ending a capture fails too, its error stands before the one that broke it
    first: BaseException = error
    while first.__context__ is not None and not str(first).startswith("sample:"):
        first = first.__context__
    if not isinstance(first, RuntimeError):
        return error
    text = str(first).lower()
    if isinstance(first, NotImplementedError) or text.startswith("sample:"):
        return first
    for words, rule, hint in _RULES:
        if any(word in text for word in words):
            said = str(first).strip().split("\n")[0]
            return RuntimeError(
                f"sample: {rule}; got: {said}{_culprit(first)}. {hint}; or sample with graph=None."
            )
    return error


def _culprit(error: BaseException) -> str:
    """The deepest line outside PyTorch and fastdiff in an error's traceback."""
    own = (torch.__file__.rsplit("__init__", 1)[0], __file__.rsplit("graphs", 1)[0])
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f" (at {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line})"
