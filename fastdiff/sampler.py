# SPDX-License-Identifier: Apache-2.0
"""The class users hold: a network and a plan, ready to run again and again."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch

from . import backends
from .capture import Graph, Stats, graph_of
from .capture.buffers import Buffers, check_uncompiled
from .capture.loops import LoopCaptures, check_capturable
from .engine import reference
from .engine.call import (
    Call,
    Callback,
    Seeds,
    check_call,
    check_differentiable,
    check_extras,
    check_out,
    check_state,
    check_tracking,
    check_untransformed,
)
from .engine.job import Job, job_of
from .engine.leases import Leases
from .engine.loops import run_stages
from .engine.ranges import profiling, span
from .gradients import (
    AdjointDEIS,
    Discrete,
    Gradient,
    Pools,
    differentiable,
    gradient_of,
    parameters_of,
)
from .guidance import UNGUIDED, Guidance
from .plans import Plan

Network = Any


class Sampler:
    """A network and a plan, ready to run again and again.

    Args:
        network: `network(x, t, **cond)`: x [B, ...], t [B] in the units of the schedule's
            `model_time`; returns what `plan.prediction` says, in x's shape, of 16, 32 or 64 bits.
            (A `cond` that is not a dict is passed as a third argument.) It must not write to x or
            t, which are the sampler's own memory: a network that does is refused.
        plan: See `fastdiff.plan`.
        guidance: `fastdiff.CFG`, or None.
        backend: A name in `fastdiff.backends.names()`. None takes the fastest that can serve.
        dtype: Dtype of the network's input. None takes that of the network's first floating
            parameter, or x's.
        graph: "loop", "stage", "auto", None (eager), or a `fastdiff.Graph`; CUDA tensors only.
        gradient: How a run is differentiated. None tracks nothing and refuses tensors that require
            grad. "discrete" or `fastdiff.Discrete` is the exact gradient of what the sampler
            computes, in the memory of one network evaluation; `fastdiff.AdjointDEIS` is that of the
            continuous flow; "backprop" is autograd through the loop, for comparison. With grad mode
            off every choice samples without a gradient.
        params: Tensors (or a module) whose gradient is wanted where the network is no nn.Module.
        check: True looks for NaN and infinity in every network output and names the stage; it
            synchronises a GPU.
        fresh_inputs: True gives the network copies of x and t at every evaluation. Networks that
            keep their input (caching wrappers) or write to it need them.

    The state and the history are float32 (float64 for a float64 x), whatever the network's dtype.
    Several threads may call one sampler at once, and a callback or the network may call it again:
    each call has registers of its own.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        *,
        guidance: Guidance | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        graph: str | Graph | None = "auto",
        gradient: str | Gradient | None = None,
        params: Any = None,
        check: bool = False,
        fresh_inputs: bool = False,
    ) -> None:
        if not callable(network):
            raise TypeError(f"sample: network is callable as network(x, t); got {network!r}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"sample: dtype is a floating torch.dtype; got {dtype!r}.")
        parameters_of(None, params)
        if backend is not None:
            backends.get(backend)
        self._job = job_of(network, plan, guidance, backend, dtype, fresh_inputs)
        self._graph = graph_of(graph)
        self._gradient = gradient_of(gradient)
        self._params = params
        self._check = check
        self._leases = Leases()
        self._pools = Pools(self._leases)
        self._captured = LoopCaptures(self._graph)

    @property
    def network(self) -> Network:
        """The network."""
        return self._job.network

    @property
    def plan(self) -> Plan:
        """The plan; see `set_plan`."""
        return self._job.plan

    @property
    def guidance(self) -> Guidance | None:
        """The guidance. Its weights stand in the sampler's copy of the table."""
        guidance = self._job.guidance
        return None if guidance is UNGUIDED else guidance

    def set_plan(self, plan: Plan, guidance: Guidance | str | None = "same") -> None:
        """Samples by another plan from the next call on.

        Buffers and captured loops go on serving every plan of the same `Plan.structure` (with
        graph="stage": any plan): only their tables are overwritten, without a new capture. A call
        that is under way in another thread ends by the plan that it began with.

        Args:
            plan: The plan.
            guidance: "same" keeps the guidance; other values are those of the constructor.
        """
        job = self._job
        chosen = self.guidance if isinstance(guidance, str) and guidance == "same" else guidance
        self._job = job_of(job.network, plan, chosen, job.backend, job.dtype, job.fresh_inputs)

    def stats(self) -> Stats:
        """Counts of captures, replays and evictions, and the memory that captures hold.

        Nothing here waits for a device.
        """
        return self._captured.stats()

    def release(self) -> None:
        """Gives up buffers, captures and their memory; the next call makes them anew.

        Call it where something changed that a captured graph cannot see, such as a Python value
        that decides what the network does.
        """
        self._leases.clear()
        self._pools.clear()
        self._captured.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampler:
        """A sampler of its own on a copy of the network, without captures."""
        job = self._job
        return Sampler(
            copy.deepcopy(job.network, memo),
            job.plan,
            guidance=self.guidance,
            backend=job.backend,
            dtype=job.dtype,
            graph=self._graph,
            gradient=self._gradient,
            params=copy.deepcopy(self._params, memo),
            check=self._check,
            fresh_inputs=job.fresh_inputs,
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "Sampler: buffers and captured graphs belong to one process. Send plan.to_json() and "
            "the network's weights, and make a Sampler there."
        )

    def __call__(
        self,
        x: torch.Tensor,
        cond: Any = None,
        *,
        seed: Seeds | None = None,
        xi: Any = None,
        extras: Any = (),
        callback: Callback | None = None,
        progress: bool = False,
        out: torch.Tensor | None = None,
        offset: int = 0,
    ) -> torch.Tensor:
        """Samples from x.

        Args:
            x: State at `plan.times[0]`, [B, ...], floating, any strides (`fastdiff.noise.prior`
                makes one). It is left as it is. B = 0 is legal and calls no network.
            cond: Conditioning: a (nested) dict of tensors with B entries each, passed to the
                network by keyword, or anything else it takes as a third argument. Tensors inside
                lists, tuples and dataclasses are handed over whole. A `fastdiff.PerStage` holds
                one value a stage and may stand wherever a tensor may.
            seed: An integer, from which every sample's seed is made, or one a sample; see
                `fastdiff.noise`. Plans with noise need it.
            xi: Noise given instead of drawn: one tensor like x for each stage.
            extras: The tensors R_0, R_1, ... that the plan reads beside the state, each
                broadcastable to x.
            callback: Called as `callback(stage, t, x, x0)` after every network evaluation, before
                its update: t the time, x the point of evaluation (live memory: read it, clone what
                you keep), x0 the network's prediction of the data there.
            progress: True shows a bar (tqdm).
            out: A tensor like x that takes the result, and is returned.
            offset: The place of x's first element where x is a part of larger samples, a multiple
                of 4. The noise is then that part of theirs.

        Returns:
            The sample at `plan.times[-1]`, x's shape and dtype, the caller's own.

        Raises:
            TypeError, ValueError: An argument is wrong, which is found before the first network
                call; or what the network returns is, and the stage is named. x is untouched.
            RuntimeError: The network cannot be captured; the message names the rule that it broke.
        """
        job, profiled = self._job, profiling()
        call = Call(x, cond, seed, xi, extras, offset, callback, self._check, progress, profiled)
        if torch.compiler.is_compiling():
            from .engine import traced  # brings in PyTorch's compiler, which is here already then

            return traced.sample(job, call, self._gradient, out)
        if not profiled:
            return self._sampled(job, call, out)
        with span(True, "sample", job.plan.solver, len(job.plan.stages)):
            return self._sampled(job, call, out)

    def buffers(
        self,
        x: torch.Tensor,
        cond: Any = None,
        *,
        seed: Seeds | None = None,
        extras: Any = (),
        offset: int = 0,
    ) -> Buffers:
        """Memory for calls like this one, which the caller fills and reads without copies.

        `buffers.run()` samples from `buffers.x`, in place. Arguments and errors are those of a
        call; their values are copied to where they stand at first. See `fastdiff.capture.Buffers`.

        Raises:
            ValueError: The sampler has a gradient, or x has no samples.
            NotImplementedError: graph="stage", or a guidance that computes with the conditioning.
            RuntimeError: The caller is compiling, or recording a graph of his own.
        """
        check_uncompiled()
        job, call = self._job, Call(x, cond, seed, None, extras, offset, check=self._check)
        if self._gradient is not None:
            raise ValueError(
                f"sample: buffers hold a run without a gradient; got gradient={self._gradient!r}. "
                "Make them of a Sampler with gradient=None."
            )
        self._check_call(job, call)
        with torch.inference_mode(False), torch.no_grad():  # buffers outlive the caller's mode
            return Buffers(lambda: self._job, self._captured, call, self._parameters)

    def _parameters(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the network that may want a gradient."""
        return parameters_of(self._job.network, self._params)

    def _check_call(self, job: Job, call: Call, out: torch.Tensor | None = None) -> None:
        """Raises where a call is wrong, before anything is run."""
        check_state(call.x)
        check_extras(call.extras)
        if out is not None:
            check_out(out, call.x)
        check_untransformed(call, self._gradient, self._parameters)
        check_tracking(call, self._gradient, job.guidance.conditions_given())
        check_call(call, job.plan)
        job.guidance.check(job.plan, call.batch)

    def _sampled(self, job: Job, call: Call, out: torch.Tensor | None) -> torch.Tensor:
        """A call that is not compiled."""
        x, cond = call.x, call.cond
        self._check_call(job, call, out)
        if self._gradient is not None and torch.is_grad_enabled():
            return self._differentiable(job, call, out)
        mode = self._captured.mode(x.device, call.watched)
        with torch.no_grad():
            if call.batch == 0:
                return x.detach().clone() if out is None else out.copy_(x)
            joined = job.guidance.conditions(cond, call.batch)
            if joined is not cond:
                call = replace(call, cond=joined)
            if out is None:
                out = torch.empty_like(x, memory_format=torch.contiguous_format)
            if mode is not None and self._captured.sample(mode, job, call, out) is not None:
                return out
            return self._eager(job, call, out)

    def _eager(self, job: Job, call: Call, out: torch.Tensor) -> torch.Tensor:
        """Samples on a leased run."""
        spec = job.spec(call.x, call.offset, call.one_bank)
        with self._leases.borrowed(spec) as run:
            with span(call.profiled, "fill"):
                run.load(job.plan, job.guidance)
                run.fill(call, job.plan)
            run.begin()
            run_stages(job, run, call)
            with span(call.profiled, "read"):
                return out.copy_(run.registers.x)

    def _differentiable(self, job: Job, call: Call, out: torch.Tensor | None) -> torch.Tensor:
        """A run that autograd can differentiate."""
        gradient, x = self._gradient, call.x
        check_differentiable(call, gradient, job.plan, out)
        captures = None
        if self._graph is not None and self._graph.mode != "auto":
            if self._graph.mode == "stage" or gradient == "backprop":
                raise NotImplementedError(
                    'sample: a gradient is captured as a loop (graph="loop"), and not through '
                    f'"backprop"; got graph={self._graph.mode!r} and gradient={gradient!r}. '
                    "Use graph=None."
                )
            mode = self._captured.mode(x.device, watched=False)
            check_capturable(job.kind(x)[3])
            captures = None if mode is None else self._captured.on(x.device)
        if call.batch == 0:
            return x.clone()
        if gradient == "backprop":
            return reference.sample(
                *(job.network, reference.constants(job.plan), job.guidance, call),
                *(job.input_dtype(x), functools.partial(reference.normal, offset=call.offset)),
            )
        assert isinstance(gradient, Discrete | AdjointDEIS)
        if call.xi is not None:
            raise NotImplementedError(
                "sample: the backward pass draws noise again from seed=; got xi=. Give seed=, or "
                'gradient="backprop".'
            )
        return differentiable(job, gradient, call, self._pools, self._parameters(), captures)


def sample(
    network: Network,
    x: torch.Tensor,
    plan: Plan,
    *,
    cond: Any = None,
    guidance: Guidance | None = None,
    seed: Seeds | None = None,
    xi: Any = None,
    extras: Any = (),
    callback: Callback | None = None,
    progress: bool = False,
    out: torch.Tensor | None = None,
    offset: int = 0,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    graph: str | Graph | None = "auto",
    gradient: str | Gradient | None = None,
    params: Any = None,
    check: bool = False,
    fresh_inputs: bool = False,
) -> torch.Tensor:
    """Samples once, as `Sampler(network, plan, ...)(x, ...)` does, and takes its arguments.

    Example:
        >>> schedule = fd.schedules.VPLinear()
        >>> plan = fd.plan(schedule, "deis-3", steps=10)
        >>> x = fd.noise.prior(plan, (64, 1, 8, 8), seeds=0)
        >>> images = fd.sample(network, x, plan)
    """
    if torch.compiler.is_compiling():
        from .engine import traced  # see Sampler.__call__

        job = Job(network, plan, guidance or UNGUIDED, backend, dtype, fresh_inputs)
        call = Call(x, cond, seed, xi, extras, offset, callback, check, progress)
        return traced.sample(job, call, gradient, out)
    sampler = Sampler(
        network,
        plan,
        guidance=guidance,
        backend=backend,
        dtype=dtype,
        graph=graph,
        gradient=gradient,
        params=params,
        check=check,
        fresh_inputs=fresh_inputs,
    )
    return sampler(
        x,
        cond,
        seed=seed,
        xi=xi,
        extras=extras,
        callback=callback,
        progress=progress,
        out=out,
        offset=offset,
    )
