# SPDX-License-Identifier: Apache-2.0
"""How a sampler captures, and what its captures have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

MODES = ("auto", "loop", "stage")


@dataclass(frozen=True)
class Graph:
    """How a sampler captures. `graph="loop"` is `Graph("loop")`.

    Args:
        mode: "loop": the whole sampling loop is one launch. "stage": one stage is captured and
            replayed, for plans of any length. "auto": a call on CUDA tensors is captured as "loop"
            when its kind is met for the second time; a first call, for which a capture would not
            pay, runs eagerly, and so do calls on other devices and, with a warning, networks that
            cannot be captured.
        loops: Captures kept at once; the least recently used goes first.
        bytes: Device memory that the captures may hold, buffers and graphs; None: no bound.
        buckets: Batch sizes to capture for, increasing. A smaller batch is padded up to the next,
            and shares its capture; a larger one is captured at its own size. None: every batch
            size at its own.

    Raises:
        ValueError, TypeError: An argument is not what it has to be.
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

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def graph_of(graph: Any) -> Graph | None:
    """The bounds and the mode that a sampler's `graph=` stands for; None: no captures."""
    if graph is None or isinstance(graph, Graph):
        return graph
    if isinstance(graph, str):
        return Graph(graph)
    raise TypeError(
        f"sample: graph is 'auto', 'loop', 'stage', None or a fastdiff.Graph; got {graph!r}."
    )
