# SPDX-License-Identifier: Apache-2.0
"""A run and its backward pass as two captured graphs, on runs of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..capture import Captures, Entry, capturing
from ..conditioning import flatten, rebuild, tensors_in
from ..engine.call import Call
from ..engine.job import Job
from .backward import backward
from .named import check_versions, version_of
from .options import Discrete, Gradient
from .pools import OwnRuns, Recent
from .trace import Trace


class Captured:
    """A run and its backward pass as two graphs, on buffers of their own.

    What the forward graph keeps for the backward one lies in its memory: a second run before the
    backward pass of the first would overwrite it, and is told apart by `stamp`.

    Args:
        job, gradient, call: As in `Trace`.
        params: Tensors that the network holds.
        needs: Whether x and each named tensor wants a gradient.
        recent: See `Trace`.
    """

    def __init__(
        self,
        job: Job,
        gradient: Gradient,
        call: Call,
        params: Sequence[torch.Tensor],
        needs: Sequence[bool],
        recent: Recent,
    ) -> None:
        self.needs = needs
        self.runs = OwnRuns()
        spec = job.spec(call.x, call.offset)
        with self.runs.run(spec) as run:  # every pass of the pair is given this one
            self.run = run
        run.load(job.plan, job.guidance)
        held = tensors_in(call.cond)
        bank = () if run.registers.bank is None else run.registers.bank
        with torch.inference_mode(False):
            self.inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in held]
            extras = [
                entry.detach().requires_grad_(t.requires_grad)
                for entry, t in zip(bank, call.extras, strict=True)
            ]
            self.cotangent = torch.empty_like(run.registers.x)
        static = replace(call, cond=rebuild(call.cond, iter(self.inputs)), extras=extras)
        if call.seed is not None:
            static = replace(static, seed=run.registers.seeds)
        self.trace = Trace(job, gradient, static, params, self.runs, recent, needs[0])
        self.stamp = 0
        self.found: tuple[torch.Tensor | None, ...] = ()
        self._kept: list[torch.Tensor] = []

    def fill(self, call: Call) -> None:
        """Copies what a call brings to where the graphs read it."""
        job = self.trace.job
        with torch.no_grad():
            self.run.load(job.plan, job.guidance)
            self.run.fill(call, job.plan)
            for own, tensor in zip(self.inputs, tensors_in(call.cond), strict=True):
                own.copy_(tensor)

    def forward(self) -> None:
        """What is captured of the run."""
        draws = self.trace.draws
        self.run.begin()
        self._kept = self.trace.loop(self.run, self.run.model_times)
        draws.close()  # what follows is recorded, and cannot be looked into
        if draws.stages:
            raise NotImplementedError(
                "sample: a captured gradient cannot draw a network's random numbers again; got a "
                f"network that draws at stage {min(draws.stages)}. Use eval(), or graph=None."
            )

    def backward(self) -> None:
        """What is captured of the backward pass."""
        self.found = backward(self.trace, self.cotangent, self._kept)

    def result(self) -> torch.Tensor:
        """Everything that a run and its backward pass leave, in one vector."""
        left = [self.run.registers.x, *(g for g in self.found if g is not None)]
        return torch.cat([tensor.flatten().to(left[0].dtype) for tensor in left])

    def bytes(self) -> int:
        """Memory of the buffers."""
        own = [tensor for run in self.runs.runs for tensor in run.tensors()]
        return sum(tensor.nbytes for tensor in (*own, *self.inputs, self.cotangent))


def captured_run(
    job: Job,
    gradient: Gradient,
    call: Call,
    params: Sequence[torch.Tensor],
    recent: Recent,
    captures: Captures,
) -> torch.Tensor:
    """A differentiable run by two graphs, which are captured at the first call of their kind.

    Args:
        job, gradient, call: As in `Trace`, but for x, which may require grad.
        params: Tensors besides x, the conditioning and the extra registers that want a gradient.
        recent: See `Trace`.
        captures: Where the graphs are kept.

    Raises:
        NotImplementedError: The gradient keeps too little in a graph.
        CaptureRefused, CaptureTooLarge: See `Captures`.
    """
    if isinstance(gradient, Discrete) and (gradient.checkpoint is not None or gradient.undo):
        raise NotImplementedError(
            f"sample: a captured gradient keeps every stage's state in the graph; got {gradient}. "
            "Use graph=None, or fastdiff.Discrete(checkpoint=None)."
        )
    x, plain = call.x, replace(call, x=call.x.detach())
    named = (*params, *tensors_in(call.cond), *call.extras)
    needs = tuple(tensor.requires_grad for tensor in (x, *named))
    described, _ = flatten(call.cond, x.device)
    of_job = (job.plan.handle, id(job.guidance), job.spec(x, call.offset), job.fresh_inputs)
    of_call = (x.dtype, needs, tuple(map(id, params)), described)
    key = (gradient, *of_job, *of_call, captures.environment())
    while True:
        with captures.lock:
            entry = captures.get(key, later=True)
            while entry is None:
                captured = Captured(job, gradient, plain, params, needs, recent)
                entry = _capture(captures, captured, plain)
                if not captures.add(key, entry):
                    entry = None
        captured = entry.run
        with captures.turn(entry):
            captured.fill(plain)
            result = _Function.apply(captured, captures, entry, x, *named)
            if not captures.stale(entry):
                return result
        with captures.lock:
            captures.drop(key, entry)


def _capture(captures: Captures, captured: Captured, call: Call) -> Entry:
    entry = Entry(captured, 0, keeps=True)

    def whole(step: Callable[[Any], None]) -> None:
        captured.fill(call)
        step("forward")
        captured.cotangent.copy_(call.x)
        step("backward")

    bodies = {"forward": captured.forward, "backward": captured.backward}
    captures.capture(bodies, whole, captured.result, entry, captured.trace.job.network)
    entry.bytes += captured.bytes()
    return entry


class _Function(torch.autograd.Function):
    """A captured run as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any, captured: Captured, captures: Captures, entry: Entry, *tensors: torch.Tensor
    ) -> torch.Tensor:
        captured.stamp += 1
        ctx.stamp, ctx.captured, ctx.captures, ctx.entry = captured.stamp, captured, captures, entry
        ctx.named = tensors
        ctx.versions = list(map(version_of, tensors))
        captures.launch(entry, "forward")
        return captured.run.registers.x.to(tensors[0].dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        check_once()
        check_versions(ctx.named, ctx.versions)
        captured = ctx.captured
        if capturing(captured.run.spec.device):
            raise RuntimeError(
                "sample: a captured gradient replays a graph of its own, which cannot be part of "
                "another; got backward() inside a recording. Use graph=None there."
            )
        with ctx.captures.turn(ctx.entry):
            if ctx.stamp != captured.stamp:
                raise RuntimeError(
                    "sample: a captured run keeps the states of its last call alone; got "
                    "backward() after the sampler was called again. Call backward() first, or use "
                    "graph=None."
                )
            captured.cotangent.copy_(cotangent)
            ctx.captures.launch(ctx.entry, "backward")
            found = [
                None if g is None or not needed else g.to(tensor.dtype, copy=True)
                for g, needed, tensor in zip(captured.found, captured.needs, ctx.named, strict=True)
            ]
        return None, None, None, *found


def check_once() -> None:
    """Raises where the gradient itself is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sample: this gradient is not differentiable again; got backward(create_graph=True)"
            ' or grad(create_graph=True). Use gradient="backprop".'
        )
