# SPDX-License-Identifier: Apache-2.0
"""Running a plan: a network, a table and a loop that calls one and launches the other.

Everything is decided before the loop starts. Inside it, a step on a CPU is one network call and one
call of the compiled stage: no tensor is allocated, no coefficient is looked up, nothing is copied.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch

from . import backends, noise, reference
from .backends.base import BoundStage, Registers
from .backends.torch import threshold
from .gradients import (
    AdjointDEIS,
    Discrete,
    Gradient,
    differentiable,
    gradient_of,
    parameters_of,
)
from .graphs import CAPTURERS, Captures, Entry, Graph, Stats, capturing, flatten, ordered, rebuild
from .guidance import (
    CFG,
    PerStage,
    arguments_of,
    at_stage,
    batched,
    check_batch,
    check_stages,
    varies,
)
from .plans import AT_E, WRITES_M, Layout, PackedRow, Plan, encode
from .schedules import prediction_name

Network = Callable[..., torch.Tensor]
Callback = Callable[[int, float, torch.Tensor, torch.Tensor], Any]
Seeds = int | Sequence[int] | torch.Tensor

# A captured stage has room for plans of this many history terms and rows.
_TERMS, _ROWS = 3, 64
_KINDS = 1024  # kinds of call that graph="auto" remembers

_STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class _Run:
    """Buffers and bound kernels for one shape; reused by every call that has it."""

    key: Hashable
    registers: Registers
    layout: Layout
    table: torch.Tensor  # on the CPU; rows of the stages, then that which writes the first m
    times: torch.Tensor  # [S, copies * B], what the network is told
    inputs: list[torch.Tensor]  # what the network is given at each stage
    told: list[torch.Tensor]  # times, a view a stage
    stage: BoundStage
    stride: int  # rows of the table a stage takes
    plan: Plan | None  # whose numbers stand in table and times
    guidance: CFG | None
    # where the stages are captured one by one
    clock: torch.Tensor | None = None  # int64 (stage, row), on the device
    time: torch.Tensor | None = None  # [1, copies * B]
    forward: torch.Tensor | None = None  # what a stage adds to the clock
    cond: list[torch.Tensor] = field(default_factory=list)  # the capture's own


class Sampler:
    """A network and a plan, ready to run again and again.

    Args:
        network: `network(x, t, **cond)`: x [B, ...], t [B] in the units of the schedule's
            `model_time`; returns what `plan.prediction` says, in x's shape, in any floating dtype.
            (A `cond` that is not a dict is passed as a third argument.) It must not write to x.
        plan: See `fastdiff.plan`.
        guidance: `fastdiff.CFG`, or None.
        backend: A name in `fastdiff.backends.names()`; None: the fastest that can serve.
        dtype: Of the network's input. None: that of the network's first floating parameter, or x's.
        graph: "loop", "stage", "auto", None (eager), or a `fastdiff.Graph`; CUDA tensors only.
        gradient: None: nothing is tracked, and tensors that require grad are refused. "discrete" or
            `fastdiff.Discrete`: the exact gradient of what the sampler computes, in the memory of
            one network evaluation. `fastdiff.AdjointDEIS`: that of the continuous flow.
            "backprop": autograd through the loop, for comparison. With grad mode off a run is as
            with None.
        params: Tensors (or a module) whose gradient is wanted where the network is no nn.Module.
        check: True looks for NaN and infinity in every network output and names the stage; it
            synchronises a GPU.

    The state and the history are float32 (float64 for a float64 x), whatever the network's dtype.
    A sampler is not for two threads at once; make one each (they may share the network).
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        *,
        guidance: CFG | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        graph: str | Graph | None = "auto",
        gradient: str | Gradient | None = None,
        params: Any = None,
        check: bool = False,
    ) -> None:
        if not callable(network):
            raise TypeError(f"sample: network is callable as network(x, t); got {network!r}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"sample: dtype is a floating torch.dtype; got {dtype!r}.")
        parameters_of(None, params)
        if backend is not None:
            backends.get(backend)
        self._network = network
        self._backend = backend
        self._dtype = dtype
        self._graph = graph_of(graph)
        self._gradient = gradient_of(gradient)
        self._params = params
        self._backward: OrderedDict[Hashable, Any] = OrderedDict()  # registers, bound stages
        self._adjoint: Any = None
        self._check = check
        self._run: _Run | None = None
        self._captures: dict[torch.device, Captures] = {}
        self._serving: dict[Hashable, backends.Backend] = {}  # backends, by dtypes and device
        self._met: OrderedDict[Hashable, None] = OrderedDict()  # kinds of call, for graph="auto"
        self._declined: set[Hashable] = set()
        self._streams: dict[torch.device, Any] = {}
        self._set(plan, guidance)

    @property
    def network(self) -> Network:
        """The network."""
        return self._network

    @property
    def plan(self) -> Plan:
        """The plan; see `set_plan`."""
        return self._plan

    @property
    def guidance(self) -> CFG | None:
        """The guidance. Its weights stand in the sampler's copy of the table."""
        return self._guidance

    def set_plan(self, plan: Plan, guidance: CFG | str | None = "same") -> None:
        """Samples by another plan from the next call on.

        Buffers and captured loops go on serving every plan of the same `Plan.structure` (with
        graph="stage": any plan): only their tables are overwritten, without a new capture.

        Args:
            plan: The plan.
            guidance: "same" keeps it; else as in the constructor.
        """
        self._set(plan, self._guidance if guidance == "same" else guidance)

    def _set(self, plan: Plan, guidance: Any) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(
                f"sample: plan is a fastdiff.Plan; got {type(plan).__name__}. Make one with "
                "fastdiff.plan(schedule, solver, steps)."
            )
        if guidance is not None and not isinstance(guidance, CFG):
            raise TypeError(f"sample: guidance is a fastdiff.CFG or None; got {guidance!r}.")
        check_prediction(self._network, plan)
        self._plan, self._guidance = plan, guidance
        self._plain = all(stage.evaluate for stage in plan.stages)

    def stats(self) -> Stats:
        """Counts of captures, replays and evictions, and the memory that captures hold.

        Nothing here waits for a device.
        """
        each = [captures.stats() for captures in self._captures.values()]
        return Stats(*(sum(values) for values in zip(*map(astuple, each), strict=True)))

    def release(self) -> None:
        """Gives up buffers, captures and their memory; the next call makes them anew.

        Needed where something changed that a captured graph cannot see: a tensor replaced in a
        closure or an attribute of the network that is no module.
        """
        self._run = self._adjoint = None
        self._backward.clear()
        self._met.clear()
        self._declined.clear()
        for captures in self._captures.values():
            captures.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampler:
        """A sampler of its own on a copy of the network, without captures."""
        return Sampler(
            copy.deepcopy(self._network, memo),
            self._plan,
            guidance=self._guidance,
            backend=self._backend,
            dtype=self._dtype,
            graph=self._graph,
            gradient=self._gradient,
            params=copy.deepcopy(self._params, memo),
            check=self._check,
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
        xi: torch.Tensor | Sequence[torch.Tensor] | None = None,
        extras: Sequence[torch.Tensor] = (),
        callback: Callback | None = None,
        progress: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Samples.

        Args:
            x: State at `plan.times[0]`, [B, ...], floating, any strides (`fastdiff.noise.prior`
                makes one). It is left as it is. B = 0 is legal and calls no network.
            cond: Conditioning: a (nested) dict of tensors with B entries each, passed to the
                network by keyword, or anything else it takes as a third argument. Tensors inside
                tuples and other objects are passed as they are. A `fastdiff.PerStage` holds one
                value a stage.
            seed: For plans with noise: an integer s (samples use s, s + 1, ..) or one a sample.
            xi: Noise given instead of drawn: one tensor like x for each stage.
            extras: The plan's read-only input registers, each broadcastable to x.
            callback: Called as `callback(stage, t, x, x0)` after every network evaluation, before
                its update: t the time, x the point of evaluation (live memory: read it, clone what
                you keep), x0 the network's prediction of the data there.
            progress: Shows a bar (tqdm).
            out: Where to write the result, like x; returned.

        Returns:
            The sample at `plan.times[-1]`, x's shape and dtype, the caller's own.

        Raises:
            TypeError, ValueError: Before the first network call, for the arguments; at a stage,
                named, for what the network returns. x is untouched.
            RuntimeError: The network cannot be captured: which rule it broke.
        """
        if torch.compiler.is_compiling():
            looked = progress or self._check
            given = (x, cond, seed, xi, extras, callback, looked, out, self._gradient)
            return _traced(self._network, self._plan, self._guidance, self._dtype, *given)
        self._check_arguments(x, cond, extras, out)
        if self._guidance is not None:
            self._guidance.check_samples(x.shape[0])
        if len(extras) != self._plan.extras:
            raise ValueError(
                f"sample: the plan reads {self._plan.extras} extra input registers; got "
                f"{len(extras)}. Give them as extras=(...)."
            )
        if self._gradient is not None and torch.is_grad_enabled():
            self._order(x.device)
            looked = self._check or callback is not None or progress or out is not None
            return self._differentiable(x, cond, seed, xi, extras, looked)
        self._order(x.device)
        watched = self._check or callback is not None or xi is not None or progress
        mode = self._mode(x.device, watched)
        with torch.no_grad():
            if x.shape[0] == 0:
                return x.detach().clone() if out is None else out.copy_(x)
            cond = self._conditioning(cond, x.shape[0])
            run = None if mode is None else self._graphed(mode, x, cond, seed, extras)
            if run is None:
                run = self._eager(x)
                self._fill(run, x, seed, xi, extras)
                self._first_input(run)
                steps: Iterable[int] = range(len(self._plan.stages))
                if progress:
                    steps = _bar(steps)
                if watched or not self._plain or varies(cond):
                    self._observed(run, steps, cond, xi, callback)
                else:
                    self._loop(run, steps, *arguments_of(cond))
            if out is None:
                out = torch.empty_like(x, memory_format=torch.contiguous_format)
            return out.copy_(run.registers.x[: x.shape[0]])

    def _loop(
        self,
        run: _Run,
        steps: Iterable[int],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
    ) -> None:
        """The loop where every stage evaluates."""
        network, stage, stride = self._network, run.stage.run, run.stride
        inputs, times = run.inputs, run.told
        for i in steps:
            output = network(inputs[i], times[i], *arguments, **keywords)
            try:
                stage(i * stride, output, None)
            except (TypeError, ValueError, AttributeError) as error:
                raise self._bad_output(i, output, inputs[i], error) from None

    def _observed(
        self,
        run: _Run,
        steps: Iterable[int],
        cond: Any,
        xi: Any,
        callback: Callback | None,
    ) -> None:
        """The loop with all that a run may be asked for beside speed."""
        arguments, keywords = arguments_of(cond)
        changes = varies(cond)
        for i in steps:
            if changes:
                arguments, keywords = arguments_of(at_stage(cond, i))
            stage = self._plan.stages[i]
            output = None
            if stage.evaluate:
                given = run.inputs[i]
                version = given._version if not given.is_inference() else 0
                output = self._network(given, run.told[i], *arguments, **keywords)
                if self._check:
                    self._check_values(i, output, given, version)
                if callback is not None:
                    problem = output_problem(output, given)
                    if problem:
                        raise self._bad_output(i, output, given, problem)
                    callback(i, stage.t, *self._seen(run, i, output))
            drawn = xi[i].contiguous() if xi is not None and (stage.c or stage.c_e) else None
            try:
                run.stage.run(i * run.stride, output, drawn)
            except (TypeError, ValueError, AttributeError) as error:
                raise self._bad_output(i, output, run.inputs[i], error) from None

    def _seen(self, run: _Run, i: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(point, x0 prediction) at stage i."""
        stage, registers = self._plan.stages[i], run.registers
        point = registers.e if _at_e(self._plan, i) and registers.e is not None else registers.x
        branches = output.reshape(-1, *point.shape).to(point.dtype)
        if len(branches) == 2 and self._guidance is not None:
            w_uncond, w_cond = self._guidance.weights(i, point)
            combined = w_uncond * branches[0] + w_cond * branches[1]
        else:
            combined = branches[0]
        x0 = stage.x0_p * point + stage.x0_q * combined
        if stage.clip is not None:
            x0 = x0.clamp(*stage.clip)
        if stage.threshold is not None:
            x0 = threshold(x0, *stage.threshold)
        return point, x0

    def _differentiable(
        self,
        x: torch.Tensor,
        cond: Any,
        seed: Seeds | None,
        xi: Any,
        extras: Sequence[torch.Tensor],
        looked: bool,
    ) -> torch.Tensor:
        """A run that autograd can differentiate."""
        if looked:
            raise ValueError(
                f"sample: a run with gradient={self._gradient!r} takes no callback=, progress=, "
                "check= or out=. Leave them out, or sample under torch.no_grad()."
            )
        captures = None
        if self._graph is not None and self._graph.mode != "auto":
            if self._graph.mode == "stage" or self._gradient == "backprop":
                raise NotImplementedError(
                    'sample: a gradient is captured as a loop (graph="loop"), and not through '
                    f'"backprop"; got graph={self._graph.mode!r} and gradient={self._gradient!r}. '
                    "Use graph=None."
                )
            self._mode(x.device, watched=False)
            self._check_captured(x)
            captures = self._captures_on(x.device)
        if xi is not None and any(z.requires_grad for z in xi):
            raise ValueError(
                "sample: noise given as xi= has no gradient; got a tensor that requires grad. "
                "Detach it."
            )
        if self._plan.stochastic and seed is None and xi is None:
            raise ValueError(
                f"sample: {self._plan.solver} draws noise. Give seed= (an integer, or one a "
                "sample): the backward pass may have to draw it again."
            )
        if x.shape[0] == 0:
            return x.clone()
        if self._gradient == "backprop":
            return reference.sample(
                *(self._network, x, reference.constants(self._plan), cond, self._guidance),
                *(seed, xi, extras, self._kind(x)[1], reference.normal),
            )
        assert isinstance(self._gradient, Discrete | AdjointDEIS)
        if xi is not None:
            raise NotImplementedError(
                "sample: the backward pass draws noise again from seed=; got xi=. Give seed=, or "
                'gradient="backprop".'
            )
        extras = tuple(
            r if isinstance(r, torch.Tensor) else torch.as_tensor(r, device=x.device)
            for r in extras
        )
        start = x.detach()
        seeds = None if seed is None else noise.seeds_tensor(seed, x.shape[0]).clone()

        def fill(run: _Run) -> None:
            self._fill(run, start, seeds, None, extras)

        params = parameters_of(self._network, self._params)
        combined = self._conditioning(cond, x.shape[0])
        given = (params, x, combined, extras, fill, captures)
        return differentiable(self, self._gradient, *given)

    # -- before the loop -------------------------------------------------------------------------

    def _check_arguments(
        self, x: torch.Tensor, cond: Any, extras: Sequence[Any], out: torch.Tensor | None
    ) -> None:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"sample: x is a tensor; got {type(x).__name__}.")
        if x.dtype not in _STATE_DTYPES:
            raise TypeError(
                f"sample: x is real and floating ({', '.join(map(str, _STATE_DTYPES))}); got "
                f"{x.dtype}. Convert it, e.g. x.float()."
            )
        if x.ndim == 0:
            raise ValueError("sample: x has a batch dimension, [B, ...]; got a scalar tensor.")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"sample: x is a dense tensor; got {x.layout}. Use x.to_dense().")
        if out is not None:
            _check_out(out, x)
        if self._check and not bool(torch.isfinite(x).all()):
            raise ValueError("sample: x is finite; got NaN or infinity in it.")
        check_batch(cond, x.shape[0])
        check_stages(cond, len(self._plan.stages))
        if self._gradient is not None and torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"sample: nothing can be differentiated in inference mode; got "
                f"gradient={self._gradient!r} there. Leave torch.inference_mode(), or use "
                "torch.no_grad() to sample without a gradient."
            )
        if self._gradient is None and torch.is_grad_enabled():
            tracked = ["x"] if x.requires_grad else []
            tracked += _requiring_grad(cond)
            if self._guidance is not None:
                tracked += _requiring_grad(self._guidance.uncond, "uncond")
            tracked += _requiring_grad(list(extras), "extras")
            if tracked:
                raise ValueError(
                    f"sample: gradient=None does not track, and {', '.join(tracked)} requires grad."
                    " Detach it, sample under torch.no_grad(), or choose a gradient: 'discrete', "
                    "fastdiff.AdjointDEIS() or 'backprop'."
                )

    def _eager(self, x: torch.Tensor) -> _Run:
        """Buffers and kernels for this shape, made once."""
        kind = self._kind(x)
        key = (x.shape, x.device, *kind, self._plan.structure)
        if self._run is None or self._run.key != key:
            self._run = self._build(key, kind, x.shape, x.device)
        self._load(self._run)
        return self._run

    def _kind(self, x: torch.Tensor) -> tuple[Any, ...]:
        """The dtypes and the guidance that buffers are made for."""
        guidance = self._guidance or CFG()
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        network = self._dtype or network_dtype(self._network) or x.dtype
        return state, network, guidance.branches, guidance.per_sample

    def _build(
        self,
        key: Hashable,
        kind: tuple[Any, ...],
        shape: torch.Size,
        device: torch.device,
        by_stage: bool = False,
    ) -> _Run:
        """Buffers and kernels. `by_stage`: for stages captured one by one, of any plan that fits
        into registers with some room."""
        plan, batch = self._plan, shape[0]
        state, network, branches, per_sample = kind
        layout, slots, rows = replace(plan.layout, branches=branches), plan.slots, len(plan.stages)
        uses_e = plan.uses_e
        scaled = any(stage.c_in != 1.0 for stage in plan.stages)
        if by_stage:
            layout = replace(layout, terms=max(layout.terms, _TERMS))
            slots, uses_e, scaled = max(slots, _TERMS), True, True
            rows = max(_ROWS, 1 << (rows - 1).bit_length())
        backend = backends.choose(self._backend, state, network, device, layout)
        like = functools.partial(torch.empty, dtype=state, device=device)
        with torch.inference_mode(False):  # buffers outlive the caller's mode
            state_x = like(shape)
            e = like(shape) if uses_e else None
            m = None
            if scaled or network != state or branches > 1:
                m = torch.empty((branches * batch, *shape[1:]), dtype=network, device=device)
            registers = Registers(
                x=state_x,
                e=e,
                history=like((slots, *shape)),
                m=m,
                bank=like((plan.extras, *shape)) if plan.extras else None,
                seeds=torch.empty(batch, dtype=torch.int64, device=device),
            )
            index = torch.arange(batch, device=device) if per_sample else None
            told = torch.float64 if network == torch.float64 else torch.float32
            times = torch.empty((rows, branches * batch), dtype=told, device=device)
            inputs = [
                m if m is not None else e if _at_e(plan, i) and e is not None else state_x
                for i in range(len(plan.stages))
            ]
            stride = batch if per_sample else 1
            table = torch.zeros(((rows + 1) * stride, layout.width), dtype=torch.float64)
            write_table(table, plan, self._guidance, batch, layout)
            _write_times(times, plan)
            clock = torch.zeros(2, dtype=torch.int64, device=device) if by_stage else None
            row_index = forward = None
            if clock is not None:
                row_index, forward = clock[1:], torch.tensor([1, stride], device=device)
            stage = backend.bind(registers, table, layout, index, row_index)
            time = torch.empty((1, branches * batch), dtype=told, device=device)
        return _Run(
            *(key, registers, layout, table, times, inputs, list(times), stage, stride),
            *(plan, self._guidance, clock, time, forward),
        )

    def _load(self, run: _Run) -> None:
        """Puts the numbers of the sampler's plan and guidance into a run's table and times."""
        if run.plan is self._plan and run.guidance is self._guidance:
            return
        batch = run.registers.x.shape[0]
        run.plan = None  # while the table is neither
        write_table(run.table, self._plan, self._guidance, batch, run.layout)
        run.stage.refresh(run.table)
        _write_times(run.times, self._plan)
        run.plan, run.guidance = self._plan, self._guidance

    def _fill(
        self,
        run: _Run,
        x: torch.Tensor,
        seed: Seeds | None,
        xi: Any,
        extras: Sequence[torch.Tensor],
    ) -> None:
        """Copies what this call brings into the buffers; samples past x's are zeroed."""
        plan, registers, batch = self._plan, run.registers, x.shape[0]
        if xi is not None:
            _check_xi(xi, plan, registers.x)
        elif plan.stochastic:
            if seed is None:
                raise ValueError(
                    f"sample: {plan.solver} draws noise. Give seed= (an integer, or one a sample), "
                    "or the noise itself as xi=."
                )
            if not isinstance(seed, torch.Tensor) or seed.device != registers.x.device:
                seed = noise.seeds_tensor(seed, batch)
            elif seed.dtype != torch.int64 or seed.shape != (batch,):
                noise.seeds_tensor(seed, batch)  # raises
            registers.seeds[:batch].copy_(seed, non_blocking=True)  # type: ignore[index]
        bank = () if registers.bank is None else registers.bank
        for i, (register, given) in enumerate(zip(bank, extras, strict=True)):
            try:
                register[:batch].copy_(torch.as_tensor(given).expand(x.shape))
            except (RuntimeError, TypeError):
                got = tuple(given.shape) if isinstance(given, torch.Tensor) else given
                raise ValueError(
                    f"sample: extra registers are broadcastable to x, {tuple(x.shape)}; got "
                    f"extras[{i}] = {got}."
                ) from None
        if batch < registers.x.shape[0]:
            registers.x[batch:].zero_()
        registers.x[:batch].copy_(x)

    def _first_input(self, run: _Run) -> None:
        """m of the first stage, by the row after the plan's own."""
        if run.clock is not None:
            run.clock.zero_()
        if run.registers.m is not None:
            run.stage.run(len(self._plan.stages) * run.stride, None, None)

    # -- captured --------------------------------------------------------------------------------

    def _order(self, device: torch.device) -> None:
        """Makes a run wait for the one before, whose buffers it takes, if it was on another stream.

        Called before a run touches a buffer.
        """
        self._streams[device] = ordered(device, self._streams.get(device))

    def _mode(self, device: torch.device, watched: bool) -> str | None:
        """ "loop", "stage" or None for this call."""
        graph = self._graph
        if graph is None or capturing(device):  # part of another graph: as it is
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

    def _graphed(
        self,
        mode: str,
        x: torch.Tensor,
        cond: Any,
        seed: Seeds | None,
        extras: Sequence[torch.Tensor],
    ) -> _Run | None:
        """Samples by replay; None where graph="auto" prefers to run eagerly."""
        assert self._graph is not None
        plan, kind = self._plan, self._kind(x)
        automatic, by_stage = mode == "auto", mode == "stage"
        if automatic and not self._serving_backend(x).capturable:
            return None
        self._check_captured(x)
        try:
            described, leaves = flatten(cond)
        except TypeError:
            if automatic:
                return None
            raise
        if by_stage and varies(cond):
            raise NotImplementedError(
                'sample: a captured stage is one for all stages; got a PerStage and graph="stage". '
                'Use graph="loop" or None.'
            )
        captures = self._captures_on(x.device)
        size = x.shape[0] if varies(cond) else self._graph.bucket(x.shape[0])
        shape = torch.Size((size, *x.shape[1:]))
        kinds = frozenset(stage.evaluate for stage in plan.stages)
        structure = (plan.extras, kinds, plan.structure[3:]) if by_stage else plan.structure
        key = (shape, x.device, *kind, by_stage, structure, described, captures.environment())
        if automatic and key in self._declined:
            return None
        if automatic and key not in self._met:
            self._met[key] = None
            if len(self._met) > _KINDS:
                self._met.popitem(last=False)
            return None

        def whole(run: _Run, step: Callable[[bool | None], None]) -> None:
            """One run of the buffers by its parts."""
            self._fill(run, x, seed, None, extras)
            for own, (leaf, rows) in zip(run.cond, leaves, strict=True):
                _put(own, leaf, rows, len(x), kind[2])
            if not by_stage:
                step(None)
                return
            self._first_input(run)
            for stage in plan.stages:
                step(stage.evaluate)

        entry = captures.get(key)
        if entry is not None and by_stage and not _fits(entry.run, plan):
            captures.drop(key)
            entry = None
        if entry is not None:
            self._load(entry.run)
            whole(entry.run, functools.partial(captures.launch, entry))
            return entry.run
        kept = False
        while not kept:
            run = self._build(key, kind, shape, x.device, by_stage)
            with torch.inference_mode(False):
                run.cond = [_room(leaf, rows, len(x), shape[0], kind[2]) for leaf, rows in leaves]
            held = (*vars(run.registers).values(), run.times, run.table, *run.cond)
            entry = Entry(run, bytes_of(held))
            bodies = self._bodies(run, rebuild(cond, iter(run.cond)), by_stage)
            result = functools.partial(torch.narrow, run.registers.x, 0, 0, len(x))
            made = (bodies, functools.partial(whole, run), result, entry, self._network)
            try:
                captures.capture(*made)
                kept = captures.add(key, entry)
            except (RuntimeError, ValueError) as error:
                if not automatic or not str(error).startswith("sample:"):
                    raise
                self._declined.add(key)
                warnings.warn(f"{error} Until then it runs eagerly.", RuntimeWarning, stacklevel=3)
                return None
        return run

    def _serving_backend(self, x: torch.Tensor) -> backends.Backend:
        """The backend of a run."""
        served = (*self._kind(x)[:2], x.device)
        if served not in self._serving:
            self._serving[served] = backends.choose(self._backend, *served)
        return self._serving[served]

    def _check_captured(self, x: torch.Tensor) -> None:
        """Raises where the backend of a run cannot be captured."""
        if not self._serving_backend(x).capturable:
            raise ValueError(
                "sample: a captured loop reads its table on the device; the torch backend, which "
                "serves here, keeps it on the host. fastdiff.backends.status() says what keeps the "
                "others away; or use graph=None."
            )

    def _captures_on(self, device: torch.device) -> Captures:
        """The captures of a device."""
        assert self._graph is not None
        if device not in self._captures:
            self._captures[device] = Captures(self._graph, CAPTURERS[device.type], device)
        return self._captures[device]

    def _bodies(
        self, run: _Run, cond: Any, by_stage: bool
    ) -> dict[bool | None, Callable[[], None]]:
        """What is captured: one loop (None), or a stage that evaluates and one that does not."""
        arguments, keywords = arguments_of(cond)
        if not by_stage:
            steps = range(len(self._plan.stages))

            def loop() -> None:
                self._first_input(run)
                if self._plain and not varies(cond):
                    self._loop(run, steps, arguments, keywords)
                else:
                    self._observed(run, steps, cond, None, None)

            return {None: loop}
        given, clock, time = run.registers.m, run.clock, run.time
        assert given is not None
        assert clock is not None
        assert time is not None
        forward = run.forward
        assert forward is not None

        def stage(evaluates: bool) -> None:
            output = None
            if evaluates:
                torch.index_select(run.times, 0, clock[:1], out=time)
                output = self._network(given, time[0], *arguments, **keywords)
            try:
                run.stage.run(0, output, None)
            except (TypeError, ValueError, AttributeError) as error:
                raise self._bad_output(None, output, given, error) from None
            clock.add_(forward)

        kinds = {stage.evaluate for stage in self._plan.stages}
        return {evaluates: functools.partial(stage, evaluates) for evaluates in kinds}

    def _conditioning(self, cond: Any, batch: int) -> Any:
        """The conditioning of all branches."""
        guidance = self._guidance
        if guidance is not None and guidance.branches > 1:
            for name, value in (("cond", cond), ("uncond", guidance.uncond)):
                if value is None or (isinstance(value, Mapping) and not value):
                    raise ValueError(
                        "sample: guidance compares a conditional and an unconditional output; got "
                        f"{name}={value}. Give cond={{...}} and CFG(scale, uncond={{...}})."
                    )
            cond = batched(cond, guidance.uncond, batch)
        return cond

    # -- what a network may get wrong ------------------------------------------------------------

    def _bad_output(
        self, i: int | None, output: Any, given: torch.Tensor, why: Exception | str
    ) -> Exception:
        problem = output_problem(output, given)
        if problem is None:
            if isinstance(why, Exception):
                return why
            problem = why
        kind = TypeError if not isinstance(output, torch.Tensor) else ValueError
        at = "" if i is None else f"stage {i} (t = {self._plan.stages[i].t:.6g}): "
        return kind(f"sample: {at}{problem}")

    def _check_values(self, i: int, output: Any, given: torch.Tensor, version: int) -> None:
        problem = output_problem(output, given)
        if problem is None and not bool(torch.isfinite(output).all()):
            kind = "NaN" if bool(output.isnan().any()) else "infinity"
            problem = f"the network returned {kind}."
        if problem is None and not given.is_inference() and given._version != version:
            problem = "the network wrote to its input in place. Let it work on a copy."
        if problem is not None:
            raise self._bad_output(i, output, given, problem)


def sample(
    network: Network,
    x: torch.Tensor,
    plan: Plan,
    *,
    cond: Any = None,
    guidance: CFG | None = None,
    seed: Seeds | None = None,
    xi: torch.Tensor | Sequence[torch.Tensor] | None = None,
    extras: Sequence[torch.Tensor] = (),
    callback: Callback | None = None,
    progress: bool = False,
    out: torch.Tensor | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    graph: str | Graph | None = "auto",
    gradient: str | Gradient | None = None,
    params: Any = None,
    check: bool = False,
) -> torch.Tensor:
    """Samples once: `Sampler(network, plan, ...)(x, ...)`; arguments as there.

    Example:
        >>> schedule = fd.schedules.VPLinear()
        >>> plan = fd.plan(schedule, "deis-3", steps=10)
        >>> x = fd.noise.prior(plan, (64, 1, 8, 8), seeds=0)
        >>> images = fd.sample(network, x, plan)
    """
    if torch.compiler.is_compiling():
        given = (x, cond, seed, xi, extras, callback, progress or check, out, gradient)
        return _traced(network, plan, guidance, dtype, *given)
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
    )


def check_prediction(network: Any, plan: Plan) -> None:
    """Raises where a network says that it predicts something else than the plan was made for."""
    predicts = getattr(network, "prediction", None)
    if isinstance(predicts, str) and prediction_name(predicts) != plan.prediction:
        raise ValueError(
            f"sample: the network says that it predicts {predicts!r}, and the plan was made "
            f"for {plan.prediction!r}. Make it with prediction={predicts!r}."
        )


def _traced(
    network: Network,
    plan: Plan,
    guidance: CFG | None,
    dtype: torch.dtype | None,
    x: torch.Tensor,
    cond: Any,
    seed: Any,
    xi: Any,
    extras: Sequence[torch.Tensor],
    callback: Callback | None,
    watched: bool,
    out: torch.Tensor | None,
    gradient: Any,
) -> torch.Tensor:
    """A run inside a compiled function; what it refuses it refuses while it is compiled."""
    from . import traced  # brings in PyTorch's compiler, which is here already then

    if callback is not None or watched:
        raise ValueError(
            "sample: inside torch.compile a run cannot be looked into; got callback=, progress= or "
            "check=. Leave them out, or sample outside the compiled function."
        )
    if seed is None and xi is None and traced.draws(plan.handle):
        raise ValueError(
            "sample: the plan draws noise. Give seed= (an integer, or one a sample), or the noise "
            "itself as xi=."
        )
    tracked = gradient is not None and torch.is_grad_enabled()
    if tracked and not (isinstance(gradient, str) and gradient == "backprop"):
        raise NotImplementedError(
            "sample: inside torch.compile a run is differentiated by the compiler; got another "
            'gradient than "backprop". Use that, or sample outside the compiled function.'
        )
    if torch.is_grad_enabled() and x.requires_grad and not tracked:
        raise ValueError(
            "sample: gradient=None does not track, and x requires grad. Detach it or sample under "
            "torch.no_grad()."
        )
    dtype = dtype or network_dtype(network) or x.dtype
    with torch.set_grad_enabled(tracked):
        result = traced.sample(network, x, plan, cond, guidance, seed, xi, extras, dtype)
    return result if out is None else out.copy_(result)


def graph_of(graph: Any) -> Graph | None:
    if graph is None or isinstance(graph, Graph):
        return graph
    if isinstance(graph, str):
        return Graph(graph)
    raise TypeError(
        f"sample: graph is 'auto', 'loop', 'stage', None or a fastdiff.Graph; got {graph!r}."
    )


def write_table(
    table: torch.Tensor, plan: Plan, guidance: CFG | None, batch: int, layout: Layout
) -> None:
    """The plan's rows in a table of at least its columns; after them the row of the first input.

    That row writes `m = c_in x` and nothing else; the rows after it do nothing.
    """
    rows = (guidance or CFG()).padded(batch).rows(plan, batch)
    stride = len(rows) // len(plan.stages)
    first = PackedRow(flags=WRITES_M, c_in_next=plan.stages[0].c_in)
    idle = [PackedRow()] * (len(table) - len(rows) - stride)
    table.copy_(torch.from_numpy(encode([*rows, *[first] * stride, *idle], layout)))


def _write_times(times: torch.Tensor, plan: Plan) -> None:
    """What the network is told at each stage, into [S or more, copies * B]."""
    told = torch.tensor([stage.model_time for stage in plan.stages], dtype=times.dtype)
    if times.is_cuda:
        told = told.pin_memory()
    told = told.to(times.device, non_blocking=True)
    times[: len(told)] = told[:, None]


def _fits(run: _Run, plan: Plan) -> bool:
    """Whether a plan fits into the registers of stages captured one by one."""
    history = run.registers.history
    slots = 0 if history is None else len(history)
    return (
        plan.layout.terms <= run.layout.terms
        and plan.slots <= slots
        and len(plan.stages) <= len(run.times)
    )


def _room(leaf: torch.Tensor, rows: bool, batch: int, size: int, branches: int) -> torch.Tensor:
    """Memory for a tensor of the conditioning; samples past the batch hold the first one's."""
    leaf = leaf.detach()
    if rows and size > batch:
        each = leaf.reshape(branches, batch, *leaf.shape[1:])
        first = each[:, :1].expand(branches, size - batch, *leaf.shape[1:])
        leaf = torch.cat([each, first], dim=1).reshape(branches * size, *leaf.shape[1:])
    return leaf.clone(memory_format=torch.contiguous_format)


def _put(own: torch.Tensor, leaf: torch.Tensor, rows: bool, batch: int, branches: int) -> None:
    """Copies a tensor of the conditioning to where a capture reads it."""
    if not rows:
        own.copy_(leaf)
        return
    shape = own.shape[1:]
    own.view(branches, -1, *shape)[:, :batch].copy_(leaf.reshape(branches, batch, *shape))


def bytes_of(held: Iterable[Any]) -> int:
    """Memory of tensors, alone or in tuples."""
    each = (t for h in held for t in (h if isinstance(h, tuple) else (h,)))
    return sum(t.numel() * t.element_size() for t in each if isinstance(t, torch.Tensor))


def _at_e(plan: Plan, i: int) -> bool:
    return bool(int(plan.table[i, 0]) & AT_E)


def network_dtype(network: Any) -> torch.dtype | None:
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return next((p.dtype for p in parameters if p.dtype.is_floating_point), None)


def _requiring_grad(cond: Any, where: str = "cond") -> list[str]:
    if isinstance(cond, Mapping):
        return [w for k, v in cond.items() for w in _requiring_grad(v, f"{where}[{k!r}]")]
    if isinstance(cond, PerStage):
        return _requiring_grad(cond.values, where)
    if isinstance(cond, list | tuple):
        return [w for i, v in enumerate(cond) for w in _requiring_grad(v, f"{where}[{i}]")]
    return [where] if isinstance(cond, torch.Tensor) and cond.requires_grad else []


def output_problem(output: Any, given: torch.Tensor) -> str | None:
    """What is wrong with a network's output, or None."""
    if not isinstance(output, torch.Tensor):
        hint = ""
        if isinstance(output, tuple | list):
            hint = " Take the tensor out of it: network=lambda *a, **k: net(*a, **k)[0]."
        elif hasattr(output, "sample"):
            hint = " Wrap it: network=lambda *a, **k: net(*a, **k).sample."
        return f"the network returns a tensor; got {type(output).__name__}.{hint}"
    if output.shape != given.shape:
        return (
            f"the network returns its input's shape, {tuple(given.shape)}; got "
            f"{tuple(output.shape)}. (Networks that also predict a variance: keep the first half "
            "of the channels.)"
        )
    if not output.dtype.is_floating_point:
        return f"the network returns a real floating dtype; got {output.dtype}."
    if output.device != given.device:
        return f"the network returns a tensor on {given.device}; got {output.device}."
    return None


def _check_out(out: Any, x: torch.Tensor) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"sample: out is a tensor like x; got {type(out).__name__}.")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"sample: out is like x, {tuple(x.shape)} {x.dtype} on {x.device}; got "
            f"{tuple(out.shape)} {out.dtype} on {out.device}."
        )
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("sample: out has memory for every element; got an expanded tensor.")


def _check_xi(xi: Any, plan: Plan, x: torch.Tensor) -> None:
    if not isinstance(xi, torch.Tensor | list | tuple):
        raise TypeError(f"sample: xi is a tensor, or a list of one a stage; got {xi!r}.")
    if len(xi) != len(plan.stages):
        raise ValueError(f"sample: xi has one entry a stage, {len(plan.stages)}; got {len(xi)}.")
    for i, z in enumerate(xi):
        if not isinstance(z, torch.Tensor):
            raise TypeError(f"sample: xi holds tensors; got {type(z).__name__} as xi[{i}].")
        if z.shape != x.shape or z.dtype != x.dtype or z.device != x.device:
            raise ValueError(
                f"sample: xi is like the state, {tuple(x.shape)} {x.dtype} on {x.device}; got "
                f"xi[{i}] of {tuple(z.shape)} {z.dtype} on {z.device}."
            )


def _bar(steps: Iterable[int]) -> Iterable[int]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise RuntimeError(
            'sample: progress=True needs tqdm. Install it: pip install "fastdiff-engine[cli]".'
        ) from None
    return tqdm(steps, desc="sampling", unit="stage")
