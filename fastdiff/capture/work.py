# SPDX-License-Identifier: Apache-2.0
"""What is captured of a call: the memory, what is recorded over it, and how a call fills it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ..conditioning import arguments_of, rebuild
from ..engine.call import Call
from ..engine.job import Job
from ..engine.loops import BAD_OUTPUT, bad_output, run_stages
from ..engine.ranges import span
from ..engine.run import Run, Spec
from .cache import Entry

# A captured stage has room for plans of this many history terms and rows.
_TERMS, _ROWS = 3, 64


class Work(Protocol):
    """One call that is captured or replayed."""

    @property
    def job(self) -> Job:
        """What is sampled."""
        ...

    def build(self) -> Entry:
        """An entry without graphs, on the memory that they are to be captured over."""
        ...

    def run_through(self, entry: Entry, step: Callable[[Any], None]) -> None:
        """One run of the memory by its parts: `step(None)`, or `step(evaluates)` a stage."""
        ...

    def bodies(self, entry: Entry) -> dict[Hashable, Callable[[], None]]:
        """What is captured: a loop (None), or a stage that evaluates and one that does not."""
        ...

    def result(self, entry: Entry) -> torch.Tensor:
        """Where a run leaves the sample."""
        ...


@dataclass
class Captured:
    """A run that is captured, with its own copy of the conditioning."""

    run: Run
    cond: list[torch.Tensor]


@dataclass(frozen=True)
class CopiedCall:
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

    def build(self) -> Entry:
        run = Run(self.spec)
        run.load(self.job.plan, self.job.guidance)
        branches = self.spec.branches
        with torch.inference_mode(False):
            sizes = (self.call.batch, self.spec.batch, branches)
            cond = [_buffer(leaf, per_sample, *sizes) for leaf, per_sample in self.leaves]
        return Entry(Captured(run, cond), bytes_of([*run.tensors(), *cond]))

    def run_through(self, entry: Entry, step: Callable[[Any], None]) -> None:
        captured, plan, profiled = entry.run, self.job.plan, self.call.profiled
        run = captured.run
        with span(profiled, "fill"):
            run.load(plan, self.job.guidance)
            run.fill(self.call, plan)
            sizes = self.call.batch, self.spec.branches
            for own, (leaf, per_sample) in zip(captured.cond, self.leaves, strict=True):
                _fill_buffer(own, leaf, per_sample, sizes)
        if not self.spec.clocked:
            with span(profiled, "replay"):
                step(None)
            return
        run.begin()
        for i, stage in enumerate(plan.stages):
            with span(profiled, "stage", i):
                step(stage.evaluate)

    def result(self, entry: Entry) -> torch.Tensor:
        return entry.run.run.registers.x[: self.call.batch]

    def bodies(self, entry: Entry) -> dict[Hashable, Callable[[], None]]:
        captured = entry.run
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


def with_room(spec: Spec) -> Spec:
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


def holds(held: Spec, needed: Spec) -> bool:
    """Whether the registers of stages captured one by one have room for another plan."""
    return held is needed or (
        held.layout.holds(needed.layout)
        and all(getattr(held, name) >= getattr(needed, name) for name in _SIZES)
    )


def both(a: Spec, b: Spec) -> Spec:
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
