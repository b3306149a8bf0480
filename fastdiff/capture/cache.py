# SPDX-License-Identifier: Apache-2.0
"""A sampler's captures: how they are made, kept and given up.

What is captured reads and writes fixed memory: the run's registers, its table of coefficients, its
times, its seeds and its copy of the conditioning. A call copies its inputs there, replays, and
copies the result out; another plan of the same structure is another table in the same place.
Everything else that the recorded kernels depend on (shapes, dtypes, autocast, the addresses of the
network's weights) is part of the key under which a capture is kept, or is looked at in each call.
An entry holds the memory that its graphs read, so the weights are looked at after the launch, while
the device works: a replay that read replaced weights read their old memory, nobody else's, and what
it gave is thrown away. A network that writes to tensors of its own is looked at before the launch.

A capture is made in four steps, each of which can refuse the network and say why: the body is run
twice as it is, the second time with every synchronisation turned into an error; then recorded; then
replayed on the same inputs and compared with what the body gave.

Locks are taken in this order, and never in another:

    Captures.lock      the table of entries, and the making of one
    one_capture()      one capture at a time in the process
    Entry.lock         the buffers of one entry, from filling them until the result is copied out
    the order          which stream the replays have reached; held for a launch

Making a capture may wait for autograd's thread of a device, which serves every backward pass of the
process. What that thread runs takes the last two alone, and nobody waits for it under these.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.recordings import Recording, capturing, one_capture
from ..engine.streams import Use
from .cuda import Capturer
from .options import Graph, Stats
from .refusals import CaptureRefused, CaptureTooLarge, compare, compare_poisoned, refusal
from .weights import Weights


@dataclass
class Entry:
    """One capture with all that it stands on.

    Attributes:
        run: The buffers and bound kernels, which the entry keeps alive.
        bytes: Memory of the buffers.
        launches: The graphs by name. The name of a loop is None, that of a stage says whether it
            evaluates, and a loop with its gradient has "forward" and "backward".
        weights: Where the network's tensors lay when the graphs were recorded.
        writes: Whether the network writes to tensors that it keeps, so that a replay in vain would
            leave a trace.
        pool: The memory pool of the graphs.
        keeps: Whether a graph leaves in its memory what another of them reads after it.
        use: Where the memory was allotted, and the stream of the last replay.
        inner: What belongs to the graphs besides: runs of samplers that the network calls.
        lock: Held from filling the buffers until the result is copied out.
    """

    run: Any
    bytes: int
    launches: dict[Hashable, Callable[[], None]] = field(default_factory=dict)
    weights: Weights | None = None
    writes: bool = False
    pool: Any = None
    keeps: bool = False
    use: Use | None = None
    inner: Recording | None = None
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __del__(self) -> None:
        use: Use | None = vars(self).get("use")
        if use is not None:
            use.end(dict(vars(self)))


class Captures:
    """A sampler's captures, the least recently used first, in one memory pool.

    Graphs share that pool, so that no two of them run at once. A pair of graphs that hands tensors
    from the first to the second has a pool of its own: in a shared one, the replay of a graph that
    was recorded before would write to them.
    After a recording that broke, later captures have a new pool beside that of the earlier ones.

    Attributes:
        lock: Held from looking an entry up until it is found or made.
    """

    def __init__(self, graph: Graph, capturer: Capturer, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._graph, self._capturer, self._device = graph, capturer, device
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._pool: Any = None  # of the next capture
        self._pool_bytes: dict[Any, int] = {}  # of the pools that entries lie in
        self._captures = self._replays = self._evictions = 0
        self._order, self._replayed = threading.RLock(), Use(device)

    def follow(self) -> Any:
        """Makes the current stream wait for the replay before, whichever entry it was of."""
        with self._order:
            return self._replayed.follow()

    def turn(self, entry: Entry) -> contextlib.AbstractContextManager[None]:
        """A scope in which the caller alone fills an entry, launches it and copies the result."""
        return _Turn(self, entry)

    def stats(self) -> Stats:
        return Stats(
            captures=self._captures,
            replays=self._replays,
            evictions=self._evictions,
            loops=len(self._entries),
            bytes=self._bytes(),
        )

    def environment(self) -> Hashable:
        """What recorded kernels depend on besides their arguments; see `Capturer.environment`."""
        return self._capturer.environment(self._device)

    def get(self, key: Hashable, later: bool = False) -> Entry | None:
        """The entry of a key; None where there is none, or where its network's tensors moved.

        Args:
            key: What it was added under.
            later: The caller asks `replay`, or `stale` after its launch, and the tensors are looked
                at then; a network that writes to them is looked at here all the same.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not later or entry.writes:
            assert entry.weights is not None
            if entry.weights.moved():
                self._drop(key)
                return None
        self._entries.move_to_end(key)
        return entry

    def stale(self, entry: Entry) -> bool:
        """Whether what an entry's replay gives is void, because the network's tensors moved.

        To be asked after the launch, while the device works. The device has then done with the
        entry, which is to be dropped.
        """
        assert entry.weights is not None
        if not entry.weights.moved():
            return False
        self._capturer.settle(self._device)
        return True

    def replay(self, entry: Entry, run_through: Callable[[Callable[[Any], None]], None]) -> bool:
        """Makes one run by an entry's graphs, with `run_through` as in `capture`.

        Returns:
            Whether it counts. Where the network's tensors moved it does not: the generators of
            random numbers stand where they stood before, and the entry is to be dropped.
        """
        rewind = self._capturer.drawn(self._device)
        run_through(functools.partial(self.launch, entry))
        if not self.stale(entry):
            return True
        rewind()
        return False

    def add(self, key: Hashable, entry: Entry) -> bool:
        """Keeps a captured entry, and gives up others where the bounds ask for it.

        Returns:
            Whether the entry is kept. Where it is not, all entries were given up for `Graph.bytes`,
            and a new capture of this one may fit alone.

        Raises:
            CaptureTooLarge: The entry alone is larger than `Graph.bytes`.
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
            raise CaptureTooLarge(
                f"sample: captured loops may hold {self._graph.bytes} bytes (Graph.bytes), and this"
                f" one needs {needed}. Raise the bound, sample smaller batches, or use graph=None."
            )
        return False

    def drop(self, key: Hashable, entry: Entry | None = None) -> None:
        """Gives up one entry, if it is there; where one is given, no other in its place."""
        found = self._entries.get(key)
        if found is not None and (entry is None or entry is found):
            self._drop(key)

    def launch(self, entry: Entry, name: Hashable = None) -> None:
        """Replays on the current stream, after the replay before."""
        with self._order:
            self._replayed.follow()
            self._replays += 1
            entry.launches[name]()

    def clear(self) -> None:
        """Gives up every capture and its memory."""
        for key in list(self._entries):
            self._drop(key)

    def capture(
        self,
        bodies: Mapping[Any, Callable[[], None]],
        run_through: Callable[[Callable[[Any], None]], None],
        result: Callable[[], torch.Tensor],
        entry: Entry,
        network: Any,
    ) -> None:
        """Records bodies into an entry, or refuses.

        Args:
            bodies: What to record, by its name in `Entry.launches`.
            run_through: `run_through(step)` fills the buffers anew and makes one run of them,
                calling `step(name)` for every body in order.
            result: Gives what a run leaves.
            entry: Takes the graphs.
            network: The network whose tensors they read.

        Raises:
            CaptureRefused: The network cannot be captured; the message names the rule that it
                broke, and where.
            Exception: What the network itself raises.
        """
        capturer, device = self._capturer, self._device

        use = Use(device)  # the buffers were made here, and more is made where a body runs

        def noted(body: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                use.allotted()
                body()

            return run

        def rehearsal(strict: bool) -> Callable[[Hashable], None]:
            return lambda name: capturer.rehearse(device, noted(bodies[name]), strict)

        done = False
        with one_capture() as inner, capturer.preserved(device) as rewind:
            entry.use, entry.inner = use, inner
            try:
                run_through(rehearsal(False))
                rewind()
                entry.weights = weights = Weights(network, device)
                graphs: dict[Hashable, Callable[[], None]] = {}
                try:
                    run_through(rehearsal(True))
                    expected = result().clone()
                    entry.writes = weights.written()
                    remade = weights.remade()
                    if remade:  # in each call, as it seems: that is well unless the old are read
                        rewind()
                        with weights.poisoned(remade):
                            run_through(rehearsal(False))
                        compare_poisoned(expected, result())
                        weights.forget(remade)
                    self._record(bodies, entry, graphs)
                except RuntimeError as error:
                    refused = refusal(error)
                    if refused is error:
                        raise
                    raise refused from error
                rewind()
                entry.launches.update(graphs)
                run_through(functools.partial(self.launch, entry))
                compare(expected, result(), weights)
                done = True
            finally:
                use.used(self.follow())
                if not done:
                    rewind()
                    if not self._entries:
                        self._pool = None  # what a refused capture left in it goes with it
        self._captures += 1
        for pool in (*self._pool_bytes, entry.pool):
            self._pool_bytes[pool] = capturer.pool_bytes(device, pool)

    def _record(
        self,
        bodies: Mapping[Any, Callable[[], None]],
        entry: Entry,
        graphs: dict[Hashable, Callable[[], None]],
    ) -> None:
        """Records bodies into graphs, in the pool that the entry then lies in."""
        if entry.keeps or self._pool is None:
            entry.pool = self._capturer.pool(self._device)
        else:
            entry.pool, self._pool = self._pool, None
        for name, body in bodies.items():
            graphs[name] = self._capturer.record(self._device, body, entry.pool)
        # PyTorch may go on recording into a pool where a recording broke: such a pool is not used
        # again, and the graphs in it keep their memory
        if not entry.keeps:
            self._pool = entry.pool

    def _bytes(self) -> int:
        own = sum(entry.bytes for entry in self._entries.values())
        return own + sum(self._pool_bytes.values())

    def _over(self) -> bool:
        return self._graph.bytes is not None and self._bytes() > self._graph.bytes

    def _drop(self, key: Hashable) -> None:
        pool = self._entries.pop(key).pool
        self._evictions += 1
        if all(entry.pool != pool for entry in self._entries.values()):
            self._pool_bytes.pop(pool, None)  # a pool's memory goes back with its last graph
        if all(entry.keeps for entry in self._entries.values()):
            self._pool = None


class _Turn(contextlib.AbstractContextManager[None]):
    """See `Captures.turn`; a class, since a generator takes longer in every replay."""

    __slots__ = ("_captures", "_entry")

    def __init__(self, captures: Captures, entry: Entry) -> None:
        self._captures, self._entry = captures, entry

    def __enter__(self) -> None:
        self._entry.lock.acquire()
        try:
            self._captures.follow()
        except BaseException:
            self._entry.lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            stream = self._captures.follow()  # who comes next also waits for what was copied out
            if self._entry.use is not None:
                self._entry.use.used(stream)
        finally:
            self._entry.lock.release()


def check_outside(device: torch.device, what: str) -> None:
    """Raises where this thread is capturing.

    Args:
        device: Where.
        what: Who does what in Python, which a graph would not do again.

    Raises:
        CaptureRefused: It is; graph="auto" runs the network that does it eagerly then.
    """
    if capturing(device):
        raise CaptureRefused(
            f"{what} in Python, which no graph does when it is replayed; got a call inside a "
            "recording. Call it outside, or let the network call a fastdiff.Sampler."
        )
