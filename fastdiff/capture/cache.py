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
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.streams import ordered
from .cuda import Capturer, one_capture
from .options import Graph, Stats
from .refusals import CaptureTooLarge, compare, compare_poisoned, refusal
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
    """

    run: Any
    bytes: int
    launches: dict[Hashable, Callable[[], None]] = field(default_factory=dict)
    weights: Weights | None = None
    writes: bool = False
    pool: Any = None


class Captures:
    """A sampler's captures, the least recently used first, in one memory pool.

    After a recording that broke, later captures have a new pool beside that of the earlier ones.

    Attributes:
        lock: Held from looking an entry up until its result is copied out, so that another thread
            replays after that.
    """

    def __init__(self, graph: Graph, capturer: Capturer, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._graph, self._capturer, self._device = graph, capturer, device
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._pool: Any = None  # of the next capture
        self._pool_bytes: dict[Any, int] = {}  # of the pools that entries lie in
        self._captures = self._replays = self._evictions = 0
        self._stream: Any = None

    def follow(self) -> None:
        """Makes the current stream wait for the call before, whichever entry served it.

        Graphs share the memory of one pool, so that no two of them may run at once.
        """
        self._stream = ordered(self._device, self._stream)

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
            later: The caller asks `stale` after its launch, and the tensors are looked at then; a
                network that writes to them is looked at here all the same.
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

    def stale(self, key: Hashable, entry: Entry) -> bool:
        """Whether what an entry's replay gives is void, because the network's tensors moved.

        To be asked after the launch, while the device works. The entry is then given up, once the
        device has done with it.
        """
        assert entry.weights is not None
        if not entry.weights.moved():
            return False
        self._capturer.wait(self._device)
        self.drop(key)
        return True

    def replay(
        self, key: Hashable, entry: Entry, run_through: Callable[[Callable[[Any], None]], None]
    ) -> bool:
        """Makes one run by an entry's graphs, with `run_through` as in `capture`.

        Returns:
            Whether it counts. Where the network's tensors moved it does not: the entry is given up,
            and the generators of random numbers stand where they stood before.
        """
        rewind = self._capturer.drawn(self._device)
        run_through(functools.partial(self.launch, entry))
        if not self.stale(key, entry):
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

    def drop(self, key: Hashable) -> None:
        """Gives up one entry, if it is there."""
        if key in self._entries:
            self._drop(key)

    def launch(self, entry: Entry, name: Hashable = None) -> None:
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

        def rehearsal(strict: bool) -> Callable[[Hashable], None]:
            return lambda name: capturer.rehearse(device, bodies[name], strict)

        done = False
        with one_capture(), capturer.preserved(device) as rewind:
            try:
                run_through(rehearsal(False))
                rewind()
                entry.weights = weights = Weights(network)
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
        if self._pool is None:
            self._pool = self._capturer.pool(self._device)
        entry.pool, self._pool = self._pool, None
        for name, body in bodies.items():
            graphs[name] = self._capturer.record(self._device, body, entry.pool)
        # PyTorch may go on recording into a pool where a recording broke: such a pool is not used
        # again, and the graphs in it keep their memory
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
        if not self._entries:
            self._pool = None
