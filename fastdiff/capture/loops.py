# SPDX-License-Identifier: Apache-2.0
"""Captured sampling: which calls are captured, what is recorded of them, and their replay."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import backends
from ..conditioning import arguments_of, flatten, rebuild, varies
from ..engine.call import Call
from ..engine.job import Job
from ..engine.loops import BAD_OUTPUT, bad_output, run_stages
from ..engine.recordings import capturing, in_backward
from ..engine.run import Run, Spec
from ..plans import Layout
from .cache import Captures, Entry
from .cuda import CAPTURERS
from .options import Graph, Stats
from .refusals import CaptureRefused, CaptureTooLarge

# A captured stage has room for plans of this many history terms and rows.
_TERMS, _ROWS = 3, 64
_KINDS = 1024  # kinds of call that graph="auto" remembers


@dataclass
class _Captured:
    """A run that is captured, with its own copy of the conditioning."""

    run: Run
    cond: list[torch.Tensor]


class LoopCaptures:
    """The captured loops and stages of one sampler."""

    def __init__(self, graph: Graph | None) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self._captures: dict[torch.device, Captures] = {}
        self._met: OrderedDict[Hashable, None] = OrderedDict()  # kinds of call, for graph="auto"
        self._declined: set[Hashable] = set()

    def stats(self) -> Stats:
        """Counts of all devices."""
        each = [captures.stats() for captures in list(self._captures.values())]
        return sum(each, Stats())

    def clear(self) -> None:
        """Gives up every capture, and forgets which calls were met and refused."""
        with self._lock:
            self._met.clear()
            self._declined.clear()
        for captures in list(self._captures.values()):
            with captures.lock:
                captures.clear()

    def on(self, device: torch.device) -> Captures:
        """The captures of a device."""
        assert self._graph is not None
        with self._lock:
            if device not in self._captures:
                self._captures[device] = Captures(self._graph, CAPTURERS[device.type], device)
            return self._captures[device]

    def mode(self, device: torch.device, watched: bool) -> str | None:
        """The mode of a call: "auto", "loop" or "stage"; None where it runs eagerly.

        Raises:
            ValueError: A named mode does not serve this device or this call.
        """
        graph = self._graph
        # a run inside another graph becomes part of it; a thread that autograd calls must not wait
        # for a capture, which may be waiting for that thread
        if graph is None or capturing(device) or in_backward():
            return None
        if device.type not in CAPTURERS:
            if graph.mode == "auto":
                return None
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
            described, leaves = flatten(call.cond)
        except TypeError:
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
            spec = _with_room(spec)
            kinds = frozenset(stage.evaluate for stage in job.plan.stages)
            kept = replace(spec, layout=Layout(branches=spec.branches), rows=0, stages=0, slots=0)
        key = (kept, kinds, described, job.fresh_inputs, captures.environment())
        if automatic and not self._met_before(key):
            return None
        with captures.lock:
            return self._replay(captures, key, _Work(job, call, leaves, spec), out)

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
        self, captures: Captures, key: Hashable, work: _Work, out: torch.Tensor
    ) -> torch.Tensor | None:
        entry = captures.get(key, later=True)
        if entry is not None and not _holds(entry.run.run.spec, work.spec):
            work = replace(work, spec=_both(entry.run.run.spec, work.spec))
            captures.drop(key)
            entry = None
        while True:
            warm = entry is not None
            if entry is None:
                entry = self._captured(captures, key, work)
                if entry is None:
                    return None
            run_through = functools.partial(work.run_through, entry.run)
            with captures.turn(entry):
                if not warm or captures.replay(entry, run_through):
                    return out.copy_(entry.run.run.registers.x[: work.call.batch])
            captures.drop(key, entry)
            entry = None

    def _captured(self, captures: Captures, key: Hashable, work: _Work) -> Entry | None:
        """The entry of a first call, which it runs; None where graph="auto" declines the call."""
        assert self._graph is not None
        entry: Entry | None = None
        while entry is None:
            captured = work.build()
            made = Entry(captured, bytes_of([*captured.run.tensors(), *captured.cond]))
            x = captured.run.registers.x
            result = functools.partial(torch.narrow, x, 0, 0, work.call.batch)
            run_through = functools.partial(work.run_through, captured)
            try:
                captures.capture(work.bodies(captured), run_through, result, made, work.job.network)
                entry = made if captures.add(key, made) else None
            except (CaptureRefused, CaptureTooLarge) as error:
                if self._graph.mode != "auto":
                    raise
                with self._lock:
                    self._declined.add(key)
                warnings.warn(f"{error} Until then it runs eagerly.", RuntimeWarning, stacklevel=5)
                return None
        return entry


@dataclass(frozen=True)
class _Work:
    """One call that is captured or replayed.

    Attributes:
        job, call: What is sampled; the conditioning is that of all branches.
        leaves: The tensors of the conditioning, each with whether it has one entry a sample.
        spec: Spec of the run.
    """

    job: Job
    call: Call
    leaves: list[tuple[torch.Tensor, bool]]
    spec: Spec

    def build(self) -> _Captured:
        """A run of the capture's own."""
        run = Run(self.spec)
        run.load(self.job.plan, self.job.guidance)
        branches = self.spec.branches
        with torch.inference_mode(False):
            sizes = (self.call.batch, self.spec.batch, branches)
            cond = [_buffer(leaf, per_sample, *sizes) for leaf, per_sample in self.leaves]
        return _Captured(run, cond)

    def run_through(self, captured: _Captured, step: Callable[[Any], None]) -> None:
        """One run of the buffers by its parts: `step(None)`, or `step(evaluates)` a stage."""
        run, plan = captured.run, self.job.plan
        run.load(plan, self.job.guidance)
        run.fill(self.call, plan)
        sizes = self.call.batch, self.spec.branches
        for own, (leaf, per_sample) in zip(captured.cond, self.leaves, strict=True):
            _fill_buffer(own, leaf, per_sample, sizes)
        if not self.spec.clocked:
            step(None)
            return
        run.begin()
        for stage in plan.stages:
            step(stage.evaluate)

    def bodies(self, captured: _Captured) -> dict[Hashable, Callable[[], None]]:
        """What is captured: a loop (None), or a stage that evaluates and one that does not."""
        job, run = self.job, captured.run
        cond = rebuild(self.call.cond, iter(captured.cond))
        if not self.spec.clocked:
            inner = Call(x=run.registers.x, cond=cond)

            def loop() -> None:
                run.begin()
                run_stages(job, run, inner)

            return {None: loop}
        arguments, keywords = arguments_of(cond)
        given = run.registers.m
        assert given is not None

        def stage(evaluates: bool) -> None:
            output = None
            if evaluates:
                time = run.now()
                handed = (given.clone(), time.clone()) if job.fresh_inputs else (given, time)
                output = job.network(*handed, *arguments, **keywords)
            try:
                run.tick(output)
            except BAD_OUTPUT as error:
                raise bad_output(job, None, output, given, error) from None

        kinds = {stage.evaluate for stage in job.plan.stages}
        return {evaluates: functools.partial(stage, evaluates) for evaluates in kinds}


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


def _with_room(spec: Spec) -> Spec:
    """A spec with some room, for stages captured one by one that serve any plan that fits."""
    layout = replace(spec.layout, terms=max(spec.layout.terms, _TERMS))
    stages = max(_ROWS, 1 << (spec.stages - 1).bit_length())
    return replace(
        spec,
        layout=layout,
        slots=max(spec.slots, _TERMS),
        has_e=True,
        has_m=True,
        stages=stages,
        rows=(stages + 1) * spec.stride,
        clocked=True,
    )


_SIZES = ("rows", "stages", "slots")


def _holds(held: Spec, needed: Spec) -> bool:
    """Whether the registers of stages captured one by one have room for another plan."""
    return held.layout.holds(needed.layout) and all(
        getattr(held, name) >= getattr(needed, name) for name in _SIZES
    )


def _both(a: Spec, b: Spec) -> Spec:
    """A spec with room for the plans of two that differ in room alone."""
    most: dict[str, Any] = {name: max(getattr(a, name), getattr(b, name)) for name in _SIZES}
    return replace(a, layout=a.layout.joined(b.layout), **most)


def _buffer(
    leaf: torch.Tensor, per_sample: bool, batch: int, size: int, branches: int
) -> torch.Tensor:
    """Memory for a tensor of the conditioning; samples past the batch hold the first one's."""
    leaf = leaf.detach()
    if per_sample and size > batch:
        each = leaf.reshape(branches, batch, *leaf.shape[1:])
        first = each[:, :1].expand(branches, size - batch, *leaf.shape[1:])
        leaf = torch.cat([each, first], dim=1).reshape(branches * size, *leaf.shape[1:])
    return leaf.clone(memory_format=torch.contiguous_format)


def _fill_buffer(
    own: torch.Tensor, leaf: torch.Tensor, per_sample: bool, sizes: tuple[int, int]
) -> None:
    """Copies a tensor of the conditioning to where a capture reads it."""
    if not per_sample:
        own.copy_(leaf)
        return
    (batch, branches), shape = sizes, own.shape[1:]
    own.view(branches, -1, *shape)[:, :batch].copy_(leaf.reshape(branches, batch, *shape))


def bytes_of(held: Iterable[Any]) -> int:
    """Memory of tensors."""
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
