# SPDX-License-Identifier: Apache-2.0
"""Buffers: the memory of one run, which its caller fills and reads in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..conditioning import flatten
from ..engine.call import Call, check_call, check_untransformed
from ..engine.job import Job
from ..engine.loops import Written, run_stages
from ..engine.ranges import profiling, span
from ..engine.recordings import capturing
from ..engine.run import Run, Spec
from .cache import Captures, Entry
from .held import HeldConditioning
from .loops import LoopCaptures, capturable, check_capturable


class Buffers:
    """The memory of one run: the caller fills it, runs it, and reads the sample there.

    `Sampler.buffers` makes them. A run copies nothing in and nothing out. Where loops are captured
    it is one graph launch, from the first run on; elsewhere it is the eager loop on this memory.

    The memory is the caller's as long as he holds this object: neither `Sampler.release` nor the
    bounds of `Graph` take it away, and a graph that has to be captured anew is captured over the
    same memory. The graphs have a memory pool of their own, and go with this object.

    Args:
        job: Gives what is sampled from now on.
        captures: The captures of the sampler, which count those made here.
        call: An example, whose values stand in the buffers at first.
        parameters: Gives the network's parameters, where they have to be looked at.
    """

    def __init__(
        self,
        job: Callable[[], Job],
        captures: LoopCaptures,
        call: Call,
        parameters: Callable[[], Any],
    ) -> None:
        now = job()
        _check_unrecorded(call.x.device)
        if call.batch == 0:
            raise ValueError("sample: buffers hold one sample at least; got x with B = 0.")
        if captures.mode(call.x.device, call.watched) == "stage":
            raise NotImplementedError(
                'sample: buffers are run by a whole loop; got graph="stage". Use graph="loop" or '
                "None."
            )
        self._job, self._loops, self._parameters = job, captures, parameters
        self._check_values, self._offset, self._one_bank = call.check, call.offset, call.one_bank
        self._like, self._batch = call.x.new_empty((0, *call.x.shape[1:])), call.batch
        self._busy = threading.Lock()
        self._given_up, self._name = False, object()
        self._run = Run(self._spec(now))
        self._held = HeldConditioning(now.guidance, call.cond, call.batch)
        self._run.beside += self._held.tensors
        self._run.load(now.plan, now.guidance)
        self._run.fill(call, now.plan)
        bank = self._run.registers.bank
        self._extras = () if bank is None else tuple(bank[i] for i in range(len(bank)))
        self._mine = [
            *(self.x, self.seeds, *self._extras),
            *(*self._held.tensors, *self._held.views),
        ]
        self._places = _places(self._mine)
        self._uncapturable = _uncapturable(self._held.cond, call.x.device)
        self._spent: int | None = None  # the version of x as a run left it
        self._fits: Spec | None = None  # the spec that was last found to be this run's
        self._captures: Captures | None = None

    # -- the memory ------------------------------------------------------------------------------

    @property
    def x(self) -> torch.Tensor:
        """The state, [B, ...], float32 or float64: the start before a run, the sample after it."""
        return self._run.registers.x

    @property
    def seeds(self) -> torch.Tensor:
        """One seed a sample as int64 bit patterns, [B]; see `fastdiff.noise.seeds_tensor`."""
        seeds = self._run.registers.seeds
        assert seeds is not None
        return seeds

    @property
    def cond(self) -> Any:
        """The conditioning of the samples, in the structure that it was given in."""
        return self._held.given

    @property
    def extras(self) -> tuple[torch.Tensor, ...]:
        """The plan's extra tensors, each [B, ...]; [1, ...] where no sample has one of its own."""
        return self._extras

    # -- a run -----------------------------------------------------------------------------------

    def run(self, *, filled: bool = False) -> torch.Tensor:
        """Samples from x, in place.

        Args:
            filled: False refuses to start where nothing was written to x since the last run, whose
                sample stands there. PyTorch's version counter shows what was written: not what
                another library's kernel, a graph's replay or `.data` wrote. True says that x is as
                it is wanted.

        Returns:
            x, which is live memory: the next run starts from it.

        Raises:
            TypeError, ValueError: As of `Sampler.__call__`. What a run has begun to do to x stays
                where the network raises.
            RuntimeError: The buffers are in use, were moved, or were given up; or the network
                cannot be captured.
        """
        check_uncompiled()
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "sample: buffers serve one run at a time; got another one, from another thread or "
                "inside the first. Make buffers for each: sampler.buffers(...)."
            )
        try:
            job, profiled = self._job(), profiling()
            self._check(job, filled)
            with torch.no_grad(), span(profiled, "sample", job.plan.solver, len(job.plan.stages)):
                self._run.follow()
                self._fit(job)
                self._sample(job, profiled)
        finally:
            self._busy.release()
        return self.x

    def _sample(self, job: Job, profiled: bool) -> None:
        call = Call(
            x=self.x,
            cond=self._held.cond,
            offset=self._offset,
            check=self._check_values,
            profiled=profiled,
        )
        try:
            if not self._launched(job, call):
                try:
                    self._held.share()
                    self._run.begin()
                    run_stages(job, self._run, call)
                finally:
                    self._spent = self.x._version
        except Written:
            self._given_up = True
            raise
        finally:
            for tensor in self._mine:  # a network may have differentiated by it
                if tensor.requires_grad and tensor.is_leaf:
                    tensor.requires_grad_(False)

    def __reduce__(self) -> Any:
        raise TypeError(
            "Buffers: memory and captured graphs belong to one owner in one process. Make others: "
            "sampler.buffers(...)."
        )

    def _spec(self, job: Job) -> Spec:
        return job.spec(self._like, self._offset, self._one_bank, self._batch)

    def _check(self, job: Job, filled: bool) -> None:
        """Raises where a run would not be what its caller takes it for."""
        _check_unrecorded(self.x.device)
        if self._given_up:
            raise RuntimeError(
                "sample: these buffers were given up, since the network wrote to its input, which "
                "is their memory. Make new ones: sampler.buffers(...)."
            )
        moved = _places(self._mine) != self._places
        if moved or not self._run.in_place() or self._held.replaced():
            raise RuntimeError(
                "sample: buffers stay where they lie; got one that was replaced, moved or given "
                "another shape. Write into it, as by buffers.x.copy_(...); make new ones for other "
                "shapes."
            )
        if any(tensor.requires_grad for tensor in self._mine):
            raise ValueError(
                "sample: buffers carry no gradient; got one that requires grad, as it does after a "
                "tensor that requires grad was copied into it. Make new ones, and write to them "
                "under torch.no_grad()."
            )
        if not filled and self._spent == self.x._version:
            raise ValueError(
                "sample: a run starts from x, where the last one left its sample; got another run, "
                "and nothing was written to x. Fill buffers.x. Where PyTorch could not see that it "
                "was filled, or to go on from the sample, say so: run(filled=True)."
            )
        call = Call(self.x, self._held.cond, extras=self._extras)
        check_untransformed(call, None, self._parameters)

    def _fit(self, job: Job) -> None:
        """Makes the memory that of the sampler's present plan and guidance.

        Raises:
            ValueError: They need other registers.
        """
        spec = self._spec(job)
        if spec is not self._fits or self._check_values:
            if spec != self._run.spec:
                raise ValueError(
                    "sample: buffers serve plans of one structure, guidance of as many branches "
                    f"and one dtype of the network; got {job.plan.solver}, for which something of "
                    "it differs. Make new ones: sampler.buffers(...)."
                )
            extras, check = self._extras, self._check_values
            call = Call(self.x, self.cond, extras=extras, offset=self._offset, check=check)
            check_call(call, job.plan)
            job.guidance.check(job.plan, self._batch)
            self._fits = spec
        self._held.refresh(job.guidance)
        self._run.load(job.plan, job.guidance)

    def _launched(self, job: Job, call: Call) -> bool:
        """Whether the run was made by replay; False where it is to be made eagerly."""
        mode = self._loops.mode(self.x.device, call.watched)
        backend = self._run.spec.backend
        if mode is None or (mode == "auto" and not capturable(backend)):
            return False
        check_capturable(backend)
        if self._uncapturable is not None:
            if mode == "auto":
                return False
            raise self._uncapturable
        if self._captures is None:
            self._captures = self._loops.apart(self, self.x.device)
        work, captures = _Loop(job, self._run, self._held, call), self._captures
        form = (self._held.form, job.plan.structure, job.fresh_inputs, captures.environment())
        with captures.lock:
            try:
                made = self._loops.replay(captures, (self._name, *form), work)
            except BaseException:
                work.restore()
                raise
        if not made:
            work.restore()
            return False
        self._spent = self.x._version
        return True


def check_uncompiled() -> None:
    """Raises where torch.compile is at work: it leaves its graph, and what follows is eager."""
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{_ALONE}; got torch.compile around them. {_ADVICE}")


def _check_unrecorded(device: torch.device) -> None:
    if capturing(device):
        raise RuntimeError(f"{_ALONE}; got a graph that is being recorded. {_ADVICE}")


_ALONE = "sample: buffers are made and run by themselves"
_ADVICE = "Call the sampler itself there: it becomes part of what is around it."


def _places(tensors: Sequence[torch.Tensor]) -> list[tuple[int, torch.Size]]:
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]


def _uncapturable(cond: Any, device: torch.device) -> Exception | None:
    """Why a conditioning cannot be that of a captured loop, or None."""
    try:
        flatten(cond, device)
    except (TypeError, ValueError) as error:
        return error
    return None


@dataclass
class _Loop:
    """A loop that is captured over buffers; see `fastdiff.capture.work.Work`."""

    job: Job
    run: Run
    held: HeldConditioning
    call: Call
    start: torch.Tensor | None = None  # x as it was before a capture

    def build(self) -> Entry:
        if self.start is None:  # a capture may be made a second time, alone
            self.start = self.run.registers.x.clone()
        return Entry(self.run, 0)

    def run_through(self, entry: Entry, step: Callable[[Any], None]) -> None:
        self.restore()
        with span(self.call.profiled, "replay"):
            step(None)

    def bodies(self, entry: Entry) -> dict[Hashable, Callable[[], None]]:
        job, run, held = self.job, self.run, self.held
        inner = Call(x=run.registers.x, cond=held.cond)

        def loop() -> None:
            held.share()
            run.begin()
            run_stages(job, run, inner)

        return {None: loop}

    def result(self, entry: Entry) -> torch.Tensor:
        return self.run.registers.x

    def restore(self) -> None:
        """Puts x back to where it was before a capture, where one was begun."""
        if self.start is not None:
            self.run.registers.x.copy_(self.start)
