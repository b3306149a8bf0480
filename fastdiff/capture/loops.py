# SPDX-License-Identifier: Apache-2.0
"""Captured sampling: which calls are captured, what is recorded of them, and their replay."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch

from .. import backends
from ..conditioning import flatten, varies
from ..engine.call import Call
from ..engine.job import Job
from ..engine.ranges import span
from ..engine.recordings import capturing, in_backward
from ..plans import Layout
from .cache import Captures, Entry
from .cuda import CAPTURERS
from .options import Graph, Stats
from .refusals import CaptureRefused, CaptureTooLarge
from .work import CopiedCall, Work, both, holds, with_room

_KINDS = 1024  # kinds of call that graph="auto" remembers


class LoopCaptures:
    """The captured loops and stages of one sampler."""

    def __init__(self, graph: Graph | None) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self._captures: dict[torch.device, Captures] = {}
        self._met: OrderedDict[Hashable, None] = OrderedDict()  # kinds of call, for graph="auto"
        self._declined: set[Hashable] = set()
        # captures over memory of their callers, and what those that are gone have done
        self._apart: weakref.WeakSet[Captures] = weakref.WeakSet()
        self._gone: list[Stats] = [Stats()]

    def _all(self) -> list[Captures]:
        with self._lock:
            return [*self._captures.values(), *self._apart]

    def stats(self) -> Stats:
        """Counts of all devices."""
        return sum([captures.stats() for captures in self._all()], sum(self._gone, Stats()))

    def clear(self) -> None:
        """Gives up every capture, and forgets which calls were met and refused."""
        with self._lock:
            self._met.clear()
            self._declined.clear()
        for captures in self._all():
            with captures.lock:
                captures.clear()

    def on(self, device: torch.device) -> Captures:
        """The captures of a device."""
        assert self._graph is not None
        with self._lock:
            if device not in self._captures:
                self._captures[device] = Captures(self._graph, CAPTURERS[device.type], device)
            return self._captures[device]

    def apart(self, owner: object, device: torch.device) -> Captures:
        """Captures over memory of an owner, in a pool of their own; they are given up with it."""
        assert self._graph is not None
        made = Captures(self._graph, CAPTURERS[device.type], device)
        with self._lock:
            self._apart.add(made)
            while len(self._gone) > 1:
                self._gone.append(self._gone.pop(0) + self._gone.pop(0))
        weakref.finalize(owner, _give_up, made, self._gone).atexit = False
        return made

    def mode(self, device: torch.device, watched: bool) -> str | None:
        """The mode of a call: "auto", "loop" or "stage"; None where it runs eagerly.

        Raises:
            ValueError: A named mode does not serve this device or this call.
        """
        graph, known = self._graph, device.type in CAPTURERS
        if graph is None or (graph.mode == "auto" and not known):
            return None
        # a run inside another graph becomes part of it; a thread that autograd calls must not wait
        # for a capture, which may be waiting for that thread
        if capturing(device) or in_backward():
            return None
        if not known:
            raise ValueError(
                f"sample: graphs are captured on {', '.join(CAPTURERS)}; got x on {device} and "
                f"graph={graph.mode!r}. Move x and the network there, or use graph=None."
            )
        if watched:
            if graph.mode == "auto":
                return None
            raise ValueError(
                "sample: a captured loop has no stages to look into; got callback=, xi=, progress= "
                f"or check= with graph={graph.mode!r}. Use graph=None."
            )
        return graph.mode

    def sample(self, mode: str, job: Job, call: Call, out: torch.Tensor) -> torch.Tensor | None:
        """Samples by replay.

        Args:
            mode: The mode that `mode` gave.
            job: What is sampled.
            call: The call; its conditioning is that of all branches.
            out: Takes the result.

        Returns:
            `out`; None where graph="auto" runs this call eagerly.

        Raises:
            CaptureRefused, CaptureTooLarge: The mode is a named one and cannot serve the call.
        """
        assert self._graph is not None
        automatic, by_stage = mode == "auto", mode == "stage"
        kind = job.kind(call.x)
        if automatic and not capturable(kind[3]):
            return None
        check_capturable(kind[3])
        try:
            described, leaves = flatten(call.cond, call.x.device)
        except (TypeError, ValueError):
            if automatic:
                return None
            raise
        if by_stage and varies(call.cond):
            raise NotImplementedError(
                'sample: a captured stage is one for all stages; got a PerStage and graph="stage". '
                'Use graph="loop" or None.'
            )
        size = call.batch if varies(call.cond) else self._graph.bucket(call.batch)
        spec = job.spec(call.x, call.offset, batch=size)
        captures = self.on(call.x.device)
        kinds: Any = job.plan.structure
        kept = spec
        if by_stage:
            spec = with_room(spec)
            kinds = frozenset(stage.evaluate for stage in job.plan.stages)
            kept = replace(spec, layout=Layout(branches=spec.branches), rows=0, stages=0, slots=0)
        key = (kept, kinds, described, job.fresh_inputs, captures.environment())
        if automatic and not self._met_before(key):
            return None
        with captures.lock:
            return self._replay(captures, key, CopiedCall(job, call, leaves, spec), out)

    def _met_before(self, key: Hashable) -> bool:
        """Whether a kind of call was met before, and was not declined."""
        with self._lock:
            if key in self._declined:
                return False
            if key in self._met:
                return True
            self._met[key] = None
            if len(self._met) > _KINDS:
                self._met.popitem(last=False)
            return False

    def _replay(
        self, captures: Captures, key: Hashable, work: CopiedCall, out: torch.Tensor
    ) -> torch.Tensor | None:
        entry = captures.get(key, later=True)
        if entry is not None and not holds(entry.run.run.spec, work.spec):
            work = replace(work, spec=both(entry.run.run.spec, work.spec))
            captures.drop(key)
            entry = None
        while True:
            warm = entry is not None
            if entry is None:
                entry = self._captured(captures, key, work)
                if entry is None:
                    return None
            run_through = functools.partial(work.run_through, entry)
            with captures.turn(entry):
                if not warm or captures.replay(entry, run_through):
                    with span(work.call.profiled, "read"):
                        return out.copy_(work.result(entry))
            captures.drop(key, entry)
            entry = None

    def replay(self, captures: Captures, key: Hashable, work: Work) -> bool:
        """One run of captured memory; False where graph="auto" runs it eagerly.

        Raises:
            CaptureRefused, CaptureTooLarge: As of `sample`.
        """
        if key in self._declined:
            return False
        entry = captures.get(key)  # weights are looked at first: the launch writes over its start
        if entry is None:
            return self._captured(captures, key, work) is not None
        with captures.turn(entry):
            work.run_through(entry, functools.partial(captures.launch, entry))
        return True

    def _captured(self, captures: Captures, key: Hashable, work: Work) -> Entry | None:
        """The entry of a first call, which it runs; None where graph="auto" declines the call."""
        assert self._graph is not None
        entry: Entry | None = None
        while entry is None:
            made = work.build()
            result = functools.partial(work.result, made)
            run_through = functools.partial(work.run_through, made)
            try:
                captures.capture(work.bodies(made), run_through, result, made, work.job.network)
                entry = made if captures.add(key, made) else None
            except (CaptureRefused, CaptureTooLarge) as error:
                if self._graph.mode != "auto":
                    raise
                with self._lock:
                    self._declined.add(key)
                said = f"{error} Until then it runs eagerly."
                warnings.warn(said, RuntimeWarning, stacklevel=6)  # at the caller's line
                return None
        return entry


def capturable(backend: str) -> bool:
    """Whether a backend's stages read their rows on the device."""
    return backends.get(backend).capturable


def check_capturable(backend: str) -> None:
    """Raises where the backend of a run cannot be captured."""
    if not capturable(backend):
        raise ValueError(
            "sample: a captured loop reads its table on the device; the torch backend, which "
            "serves here, keeps it on the host. fastdiff.backends.status() says what keeps the "
            "others away; or use graph=None."
        )


def _give_up(captures: Captures, gone: list[Stats]) -> None:
    """Ends captures whose owner is gone, and keeps what they have done."""
    with captures.lock:
        captures.clear()
        gone.append(captures.stats())
