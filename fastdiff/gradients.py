# SPDX-License-Identifier: Apache-2.0
"""Gradients of samples: with respect to the start, the conditioning and the network's parameters.

All of them hold the activations of one network evaluation at a time. `Discrete` differentiates the
numbers that the sampler computed: the plan transposed (`fastdiff.transpose`), one evaluation and
one vector-Jacobian product a stage. `AdjointDEIS` solves the continuous adjoint equations of the
probability-flow ODE on a grid of its own, by the transposed rows of an exponential integrator: the
same backward stages, at states of the forward run. Both run on the backend of the forward run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from . import backends
from .backends.base import Registers
from .backends.torch import threshold as threshold_of
from .graphs import Captures, Entry, flatten, rebuild
from .guidance import CFG, PerStage, arguments_of, at_stage, varies
from .plans import (
    AT_E,
    EVALUATE,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    PackedRow,
    Plan,
    Transposed,
    alternates,
    encode,
)
from .schedules import Array, Schedule
from .solvers.base import Rows
from .solvers.dpm import DPMSolverMultistep
from .solvers.exponential import adams, lagrange, phi, transfer

THRESHOLDS = ("exact", "straight-through")
_BOUND = 4  # backward tables that a sampler keeps bound


@dataclass(frozen=True)
class Discrete:
    """The exact gradient of what the sampler computed. `gradient="discrete"` is `Discrete()`.

    Args:
        checkpoint: None keeps what the network was given at every stage (N states); k keeps the
            registers at every k-th stage and makes the stages between anew, segment by segment, for
            one more network evaluation a stage: N/k + k states, least at k = sqrt(N).
        undo: Keep the end of the run alone and undo its stages one by one beside the backward pass:
            no state is stored, at no further evaluation. For plans that can be undone: the solver
            "rex-1". The states, and so the gradient, carry the rounding errors of going back.
        threshold: Gradient of dynamic thresholding: "exact", the quantile's own dependence
            included, or "straight-through", as if x0 were left alone. A clip has the gradient that
            autograd gives it: none where it acts.

    Agrees with backpropagation through the loop to rounding (float64: 1e-10 relative).
    """

    checkpoint: int | None = None
    undo: bool = False
    threshold: str = "exact"

    def __post_init__(self) -> None:
        k = self.checkpoint
        if not isinstance(self.undo, bool) or (self.undo and k is not None):
            raise ValueError(
                "Discrete: undo is True or False, and needs no checkpoint; got "
                f"undo={self.undo!r}, checkpoint={k!r}."
            )
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise ValueError(f"Discrete: checkpoint is None or an integer from 1 on; got {k!r}.")
        if self.threshold not in THRESHOLDS:
            raise ValueError(
                f"Discrete: threshold is 'exact' or 'straight-through'; got {self.threshold!r}."
            )


@dataclass(frozen=True)
class AdjointDEIS:
    """The gradient of the probability flow itself, by exponential integrators.

    With N the network's epsilon or x0, s = alpha or sigma and m = sigma/alpha or alpha/sigma, the
    flow is d(x/s)/dm = N, and its adjoint b = s a_x obeys db/dm = -s (dN/dx)^T b. The default rows
    are those of the exponential Adams method of this order, transposed: the Jacobian of a step is
    taken at its noisier end. They are of order `order` for a_x at the start, for a_z and for
    a_theta, given states of that order (order 3: with the Runge-Kutta warm-up, else 2
    asymptotically), and for the plan's own grid and rows they are `Discrete`'s.

    For a stochastic plan the adjoint is that of its SDE along the noise that was drawn (the
    network's term doubled), in x0 form on the plan's own times; strong order 1 whatever `order`.

    Args:
        order: 1, 2 or 3. Below about 12 steps 2 is the safer choice.
        form: What N is: "epsilon" or "x0" (needed where alpha = 0 at the start, and the default
            for stochastic plans); None: "epsilon" where it is defined.
        steps: Intervals of the adjoint's own grid; None: as many as the plan's.
        grid: Its name or times; None: "logsnr" where lambda is finite at both ends, else the
            plan's times.
        states: "recorded" keeps the states of the forward run and interpolates between them (four
            points, in the angle atan2(sigma, alpha)); "resolve" keeps the sample alone and solves
            the flow back from it along with the adjoint, for one more evaluation.
        published: The explicit forms of the paper (AdjointDEIS-1, -2M), whose Jacobian is taken at
            the cleaner end: for comparison. They lose their accuracy at few steps.
        schedule: The plan's; None: the one that the plan was made for in this process.

    Source: Blasingame & Liu, "AdjointDEIS", arXiv:2405.15020: equations (2.14), (2.15) and
    Algorithm 1 for `published`; the rest is derived in docs/gradients.md.
    """

    order: int = 2
    form: str | None = None
    steps: int | None = None
    grid: Any = None
    states: str = "recorded"
    published: bool = False
    schedule: Schedule | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        def check(name: str, allowed: Sequence[Any]) -> None:
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                shown = ", ".join(map(repr, allowed))
                raise ValueError(f"AdjointDEIS: {name} is one of {shown}; got {value!r}.")

        check("order", (1, 2, 3))
        check("form", (None, "epsilon", "x0"))
        check("states", ("recorded", "resolve"))
        check("published", (False, True))
        if self.published and self.order == 3:
            raise ValueError("AdjointDEIS: the published forms are of order 1 and 2; got order=3.")
        if self.grid is not None and not isinstance(self.grid, str):
            object.__setattr__(self, "grid", tuple(float(t) for t in self.grid))
        steps = self.steps
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"AdjointDEIS: steps is None or an integer from 1 on; got {steps!r}.")


Gradient = Discrete | AdjointDEIS


def gradient_of(gradient: Any) -> Gradient | str | None:
    """What `gradient=` means.

    Raises:
        ValueError, TypeError: It is none of the choices.
    """
    if gradient is None or isinstance(gradient, Discrete | AdjointDEIS) or gradient == "backprop":
        return gradient
    if gradient == "discrete":
        return Discrete()
    kind = ValueError if isinstance(gradient, str) else TypeError
    raise kind(
        "sample: gradient is None, 'discrete', 'backprop', fastdiff.Discrete(...) or "
        f"fastdiff.AdjointDEIS(...); got {gradient!r}."
    )


# -- a run and its backward pass -------------------------------------------------------------------


@dataclass
class Trace:
    """A differentiable run: what it reads, and what its backward pass needs besides saved tensors.

    Attributes:
        sampler: Whose network, plan and guidance these are; its buffers serve one run at a time.
        network, plan, guidance, cond: Of the run; the conditioning is that of all branches.
        named: Tensors that may get a gradient beside x: parameters, tensors of the conditioning,
            extra registers, in this order; `extras` of them are registers.
        start: x, detached.
        needs: Whether x does.
    """

    sampler: Any
    network: Callable[..., torch.Tensor]
    plan: Plan
    guidance: CFG | None
    gradient: Gradient
    cond: Any
    named: tuple[torch.Tensor, ...]
    extras: int
    start: torch.Tensor
    fill: Callable[[Any], None]  # copies the inputs of the run into its buffers
    needs: bool = True
    versions: tuple[int, ...] = ()
    times: list[torch.Tensor] = field(default_factory=list)  # told to the network, a stage each
    random: dict[int, Any] = field(default_factory=dict)  # generators before a stage that draws
    watches: bool = True  # whether a stage is seen to draw
    autocast: Callable[[], Any] = contextlib.nullcontext
    scale: torch.Tensor | None = None  # of the guidance, a sample each, shaped to multiply x

    def __post_init__(self) -> None:
        device = self.start.device.type
        enabled, cached = torch.is_autocast_enabled(device), torch.is_autocast_cache_enabled()
        kind = torch.get_autocast_dtype(device)
        self.autocast = lambda: torch.autocast(
            device, dtype=kind, enabled=enabled, cache_enabled=cached
        )
        if self.guidance is not None and isinstance(self.guidance.scale, torch.Tensor):
            state = torch.float64 if self.start.dtype == torch.float64 else torch.float32
            scale = self.guidance.scale.to(self.start.device, state)
            self.scale = scale.reshape(-1, *[1] * (self.start.ndim - 1))

    def weights(self, i: int) -> tuple[Any, Any]:
        """(uncond, cond) weights of the guidance at a stage."""
        assert self.guidance is not None
        if self.scale is not None:
            return 1.0 - self.scale, self.scale
        return self.guidance.weights(i, self.start)

    # -- forward ---------------------------------------------------------------------------------

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The sample, and the tensors to keep."""
        self.versions = tuple(map(_version, self.named))
        run = self.sampler._eager(self.start)
        self.times = [time.clone() for time in run.told[: len(self.plan.stages)]]
        self.fill(run)
        self.sampler._first_input(run)
        kept = self.loop(run)
        return run.registers.x.to(self.start.dtype, copy=True), kept

    def loop(self, run: Any) -> list[torch.Tensor]:
        """Runs all stages; what to keep."""
        kept: list[torch.Tensor] = []
        self._loop(run, range(len(self.plan.stages)), kept, first=True)
        if isinstance(self.gradient, AdjointDEIS):
            if self.gradient.states == "resolve":
                kept.clear()
            kept.append(run.registers.x.clone())
        elif self.gradient.undo:
            kept = [run.registers.x.clone(), run.registers.e.clone()]
        return kept

    def _loop(self, run: Any, steps: Iterable[int], kept: list[torch.Tensor], first: bool) -> None:
        """Runs stages and keeps what the gradient asks for. `first`: not a segment made anew."""
        arguments, keywords = arguments_of(self.cond)
        changes = varies(self.cond)
        gradient, registers = self.gradient, run.registers
        segment = gradient.checkpoint if isinstance(gradient, Discrete) else None
        unseen = first
        for i in steps:
            stage, out = self.plan.stages[i], None
            point = registers.e if _at_e(self.plan, i) else registers.x
            if isinstance(gradient, AdjointDEIS):
                if stage.evaluate and stage.t in self.plan.times:
                    kept.append(point.clone())
            elif first and segment is not None and i % segment == 0:
                live = (registers.x, registers.e, registers.history)
                kept += [tensor.clone() for tensor in live if tensor is not None]
            if stage.evaluate:
                given = run.inputs[i]
                whole = isinstance(gradient, Discrete) and not gradient.undo
                if whole and not (first and segment is not None):
                    kept.append(given.clone())
                    if stage.clip is not None or stage.threshold is not None:
                        kept.append(point.clone())
                if changes:
                    arguments, keywords = arguments_of(at_stage(self.cond, i))
                # networks that differentiate by their own input track it themselves
                given = given.detach()
                version = _version(given)
                with self._as_drawn(i, first), torch.set_grad_enabled(unseen):
                    out = self.network(given, self.times[i], *arguments, **keywords)
                if _version(given) != version:
                    raise self.sampler._bad_output(
                        i, out, given, "the network wrote to its input in place. Clone it first."
                    )
                if unseen and isinstance(out, torch.Tensor):
                    _check_named(out, (given, *self.named))
                if isinstance(out, torch.Tensor):
                    out = out.detach()
                unseen = False
            try:
                run.stage.run(i * run.stride, out, None)
            except (TypeError, ValueError, AttributeError) as error:
                raise self.sampler._bad_output(i, out, run.inputs[i], error) from None

    @contextlib.contextmanager
    def _as_drawn(self, i: int, first: bool) -> Iterator[None]:
        """Notes the generators of a stage that draws from them, or puts them back as they were."""
        device = self.start.device
        if not self.watches or not (first or self.random):
            yield
            return
        before = _generators(device)
        if first:
            yield
            after = _generators(device)
            drawn = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            if drawn and isinstance(self.gradient, Discrete):
                self.random[i] = before
            return
        try:
            if i in self.random:
                _set_generators(device, self.random[i])
            yield
        finally:
            if i in self.random:
                _set_generators(device, before)

    # -- backward --------------------------------------------------------------------------------

    def backward(
        self, cotangent: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the named tensors."""
        state = torch.float64 if cotangent.dtype == torch.float64 else torch.float32
        sweep = _Sweep(self, cotangent.to(state).contiguous())
        if isinstance(self.gradient, AdjointDEIS):
            _continuous(sweep, self.gradient, kept)
        elif self.gradient.undo:
            undone = _Undone(sweep, kept[0], kept[1])
            sweep.run(self.plan.transpose(), self.times, undone.at, undone.see)
        else:
            sweep.run(self.plan.transpose(), self.times, self._recorded(kept))
        x_bar = sweep.x_bar.to(cotangent.dtype, copy=True) if self.needs else None
        return x_bar, *sweep.gradients()

    def _recorded(self, kept: Sequence[torch.Tensor]) -> Callable[[int], _Input]:
        """What the network was given at each stage, asked for from the last stage to the first."""
        assert isinstance(self.gradient, Discrete)
        stages = self.plan.stages
        count = [0]
        for stage in stages:
            limited = stage.clip is not None or stage.threshold is not None
            count.append(count[-1] + stage.evaluate * (1 + limited))
        segment = self.gradient.checkpoint
        made: dict[int, list[torch.Tensor]] = {}

        def given(i: int) -> _Input:
            if segment is None:
                found = list(kept[count[i] : count[i + 1]])
            else:
                begin = i // segment * segment
                if begin not in made:
                    made.clear()
                    made[begin] = self._segment(begin, min(begin + segment, len(stages)), kept)
                offset = count[begin]
                found = made[begin][count[i] - offset : count[i + 1] - offset]
            return _Input(found[0], found[1] if len(found) > 1 else None)

        return given

    def _segment(self, begin: int, end: int, kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The loop from a checkpoint on, once more."""
        assert isinstance(self.gradient, Discrete)
        assert self.gradient.checkpoint is not None
        plan, guidance = self.sampler._plan, self.sampler._guidance
        self.sampler._plan, self.sampler._guidance = self.plan, self.guidance
        try:
            run = self.sampler._eager(self.start)
        finally:
            self.sampler._plan, self.sampler._guidance = plan, guidance
        self.fill(run)
        live = [
            t for t in (run.registers.x, run.registers.e, run.registers.history) if t is not None
        ]
        at = begin // self.gradient.checkpoint * len(live)
        for register, value in zip(live, kept[at : at + len(live)], strict=True):
            register.copy_(value)
        found: list[torch.Tensor] = []
        stage = self.plan.stages[begin]
        if run.registers.m is not None and stage.evaluate:
            point = run.registers.e if _at_e(self.plan, begin) else run.registers.x
            copies = run.registers.m.reshape(-1, *point.shape)
            copies.copy_(point * stage.c_in)
        with self.autocast():
            self._loop(run, range(begin, end), found, first=False)
        return found


@dataclass
class _Input:
    """What the network is given at a stage, and the evaluation point where h is limited there."""

    given: torch.Tensor
    point: torch.Tensor | None = None


class _Sweep:
    """Backward stages: cotangents of x, and sums of those of the named tensors."""

    def __init__(self, trace: Trace, cotangent: torch.Tensor) -> None:
        self.trace, self.x_bar = trace, cotangent
        self.totals: list[torch.Tensor | None] = [None] * len(trace.named)
        held = tensors_in(trace.cond)
        registers = len(trace.named) - trace.extras
        self._registers = range(registers, len(trace.named))
        # a tensor that stands twice gets its whole gradient once
        firsts = {id(trace.named[i]): i for i in reversed(range(registers))}
        self._network_inputs = sorted(i for i in firsts.values() if trace.named[i].requires_grad)
        # each tensor that the conditioning holds is a leaf of its own in a backward stage
        self._own: dict[int, torch.Tensor] = {}
        parameters = {id(t) for t in trace.named[: registers - len(held)]}

        def own(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad or id(tensor) in parameters:
                return tensor
            return self._own.setdefault(id(tensor), tensor.detach().requires_grad_())

        self.cond = rebuild(trace.cond, iter([own(t) for t in held]))
        self._staged = {id(t.values) for t in _staged(trace.cond)}

    def gradients(self) -> list[torch.Tensor | None]:
        """Of the named tensors, in their dtypes."""
        return [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(self.totals, self.trace.named, strict=True)
        ]

    def add(self, i: int, gradient: torch.Tensor | None, weight: float = 1.0) -> None:
        """Adds to the gradient of a named tensor, in float32 at least."""
        if gradient is None:
            return
        total = self.totals[i]
        if total is None:  # a copy: autograd may have given the cotangent itself
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self.totals[i] = gradient.to(wide).mul(weight)
        else:
            total.add_(gradient, alpha=weight)

    def vjp(
        self,
        i: int,
        given: torch.Tensor,
        time: torch.Tensor,
        cotangent: Callable[[torch.Tensor], torch.Tensor],
        needs_x: bool,
        weight: float = 1.0,
    ) -> torch.Tensor | None:
        """One evaluation and its vector-Jacobian product; `cotangent(output)` gives the vector."""
        trace = self.trace
        slices: dict[int, torch.Tensor] = {}
        cond = self.cond
        if self._staged:
            cond, slices = self._at(i)
        arguments, keywords = arguments_of(cond)
        leaf = given.detach().requires_grad_(needs_x)
        version = leaf._version
        with trace._as_drawn(i, first=False), trace.autocast(), torch.enable_grad():
            out = trace.network(leaf, time, *arguments, **keywords)
        if leaf._version != version:
            raise RuntimeError("sample: the network wrote to its input in place. Clone it first.")
        vector = cotangent(out.detach())
        own = {**self._own, **slices}
        named = [own.get(id(trace.named[k]), trace.named[k]) for k in self._network_inputs]
        inputs = ([leaf] if needs_x else []) + named
        if not inputs or not out.requires_grad:
            return torch.zeros_like(given) if needs_x else None
        with torch.no_grad(), _without_hooks(named):
            found = torch.autograd.grad(out, inputs, vector.to(out.dtype), allow_unused=True)
        for k, gradient in zip(self._network_inputs, found[int(needs_x) :], strict=True):
            if id(trace.named[k]) in slices and gradient is not None:
                if self.totals[k] is None:
                    self.totals[k] = torch.zeros_like(trace.named[k])
                self.totals[k][i].add_(gradient, alpha=weight)  # type: ignore[index]
            else:
                self.add(k, gradient, weight)
        if not needs_x:
            return None
        return torch.zeros_like(given) if found[0] is None else found[0]

    def _at(self, i: int) -> tuple[Any, dict[int, torch.Tensor]]:
        """The conditioning at stage i, and a leaf for each tensor with one entry a stage."""
        slices: dict[int, torch.Tensor] = {}
        for staged in _staged(self.trace.cond):
            value = staged.values[i].detach().requires_grad_(staged.values.requires_grad)
            slices[id(staged.values)] = value

        def take(now: Any, whole: Any) -> Any:
            if isinstance(whole, Mapping):
                return {key: take(now[key], value) for key, value in whole.items()}
            return slices[id(whole.values)] if isinstance(whole, PerStage) else now

        return take(at_stage(self.cond, i), self.trace.cond), slices

    def weighed(self, m: torch.Tensor, i: int) -> torch.Tensor:
        """The cotangents of the branches: w_g of each, in place."""
        guidance = self.trace.guidance
        if guidance is not None and guidance.branches > 1:
            uncond, cond = m.view(2, -1, *m.shape[1:])
            for branch, w in zip((uncond, cond), self.trace.weights(i), strict=True):
                branch.mul_(w)
        return m

    def run(
        self,
        transposed: Transposed,
        times: Sequence[torch.Tensor],
        given_at: Callable[[int], _Input],
        see: Callable[[int, torch.Tensor], None] = lambda i, out: None,
    ) -> None:
        """All backward stages of a plan; `see` is told of every network output."""
        plan = transposed.plan

        def table(branches: int) -> tuple[torch.Tensor, Layout]:
            layout = replace(transposed.layout, branches=branches)
            return torch.from_numpy(transposed.pack(branches)), layout

        registers, run = self.bound(plan.handle, table, transposed.slots)
        assert registers.m is not None
        run(0, None, None)
        earliest = next(i for i, stage in enumerate(plan.stages) if stage.evaluate)
        for row, i in enumerate(reversed(range(len(plan.stages))), start=1):
            stage, m_bar = plan.stages[i], None
            self._owe(transposed.extras[i], registers)
            needs_x = self.trace.needs or i > earliest
            if stage.evaluate:
                found = given_at(i)

                def cotangent(out: torch.Tensor, i: int = i, found: _Input = found) -> torch.Tensor:
                    assert registers.m is not None
                    see(i, out)
                    self._limit(i, out, found.point, registers)
                    return self.weighed(registers.m, i)

                m_bar = self.vjp(i, found.given, times[i], cotangent, needs_x)
            if not needs_x and not self._registers:
                return
            if m_bar is None and stage.evaluate:
                m_bar = torch.zeros_like(registers.m)
            run(row, m_bar, None)

    def bound(
        self, name: str, table: Callable[[int], tuple[torch.Tensor, Layout]], slots: int
    ) -> tuple[Registers, Any]:
        """Registers that hold the cotangent, and the backward stage on them.

        They are the sampler's own, as a forward run's are, and serve one pass at a time.

        Args:
            name: Of the table; plans have handles.
            table: The rows for G branches, with their layout.
            slots: Of the history.
        """
        x, guidance, sampler = self.x_bar, self.trace.guidance, self.trace.sampler
        branches = 1 if guidance is None else guidance.branches
        key = (name, x.shape, x.dtype, x.device, branches)
        found = sampler._backward.get(key)
        if found is None:
            with torch.inference_mode(False):
                registers = Registers(
                    x=torch.empty_like(x),
                    e=torch.empty_like(x),
                    history=x.new_empty((slots, *x.shape)),
                    m=x.new_empty((branches * x.shape[0], *x.shape[1:])),
                )
                serving = backends.choose(sampler._backend, x.dtype, x.dtype, x.device)
                found = registers, serving.bind(registers, *table(branches)).run
            sampler._backward[key] = found
            while len(sampler._backward) > _BOUND:
                sampler._backward.popitem(last=False)
        registers, run = found
        registers.x.copy_(x)
        self.x_bar = registers.x
        return registers, run

    def _owe(self, owed: Sequence[tuple[int, float, int | None]], registers: Registers) -> None:
        """What a stage owes to the read-only registers."""
        for register, weight, slot in owed:
            k = self._registers[register]
            if self.trace.named[k].requires_grad:
                assert registers.history is not None
                self.add(k, registers.x if slot is None else registers.history[slot], weight)

    def _limit(
        self, i: int, out: torch.Tensor, point: torch.Tensor | None, registers: Registers
    ) -> None:
        """Takes h_bar back through the clip or the threshold of h, in e and in m."""
        if point is None:
            return
        stage = self.trace.plan.stages[i]
        assert registers.e is not None
        assert registers.m is not None
        if stage.threshold is not None and _straight(self.trace.gradient):
            return
        outputs = out.to(point.dtype).view(-1, *point.shape)
        guidance = self.trace.guidance
        combined = outputs[0]
        if guidance is not None and guidance.branches > 1:
            w_uncond, w_cond = self.trace.weights(i)
            combined = w_uncond * outputs[0] + w_cond * outputs[1]
        with torch.enable_grad():
            h = (stage.q * combined + stage.p * point).requires_grad_()
            limited = h.clamp(*stage.clip) if stage.clip is not None else h
            if stage.threshold is not None:
                limited = threshold_of(h, *stage.threshold)
        (h_bar,) = torch.autograd.grad(limited, h, registers.e)
        registers.e.copy_(h_bar)
        registers.m.view(-1, *point.shape).copy_(h_bar * stage.q)


@contextlib.contextmanager
def _without_hooks(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Hooks see the gradient of the run once, and not the part of each stage."""
    hooks = [tensor._backward_hooks for tensor in tensors]
    for tensor, own in zip(tensors, hooks, strict=True):
        if own:
            tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, own in zip(tensors, hooks, strict=True):
            if own:
                tensor._backward_hooks = own


class _Undone:
    """States of a run that is undone stage by stage, by rows of the same instruction."""

    def __init__(self, sweep: _Sweep, x: torch.Tensor, e: torch.Tensor) -> None:
        self._trace = trace = sweep.trace
        branches = 1 if trace.guidance is None else trace.guidance.branches
        layout, rows = Layout(0, branches), []
        for i, stage in enumerate(trace.plan.stages):
            row = PackedRow(p=stage.p, k=(stage.q,) * branches)
            if _at_e(trace.plan, i):  # it moved x
                row.flags = EVALUATE + AT_E + WRITES_X
                row.a_x, row.a_e = 1.0 / stage.a_x, -stage.a_e / stage.a_x
                row.b_0 = -sum(stage.b) / stage.a_x
            elif i > 0:
                row.flags = EVALUATE + WRITES_E
                row.d_e, row.d_x = 1.0 / stage.d_e, -stage.d_x / stage.d_e
                row.g_0 = -sum(stage.g) / stage.d_e
            rows.append(row)
        table = torch.from_numpy(encode(rows, layout))
        self._registers = Registers(x=x.clone(), e=e.clone())
        serving = backends.choose(trace.sampler._backend, x.dtype, x.dtype, x.device)
        self._run = serving.bind(self._registers, table, layout).run
        self._dtype = trace.sampler._kind(trace.start)[1]

    def at(self, i: int) -> _Input:
        """What the network was given at stage i."""
        registers, plan = self._registers, self._trace.plan
        point = registers.e if _at_e(plan, i) else registers.x
        assert point is not None
        given = (point * plan.stages[i].c_in).to(self._dtype)
        guidance = self._trace.guidance
        copies = 1 if guidance is None else guidance.branches
        return _Input(given if copies == 1 else torch.cat([given] * copies))

    def see(self, i: int, out: torch.Tensor) -> None:
        """Undoes stage i with its output."""
        if self._trace.guidance is not None and self._trace.guidance.branches > 1:
            out = out.to(self._registers.x.dtype, copy=True)
            uncond, cond = out.view(2, -1, *out.shape[1:])
            for branch, w in zip((uncond, cond), self._trace.weights(i), strict=True):
                branch.mul_(w)
        if i > 0:  # before the first there is nothing to know
            self._run(i, out, None)


def _straight(gradient: Gradient) -> bool:
    return isinstance(gradient, Discrete) and gradient.threshold == "straight-through"


class _Function(torch.autograd.Function):
    """A run as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, x: torch.Tensor, *named: torch.Tensor) -> torch.Tensor:
        result, kept = trace.forward()
        trace.needs = ctx.needs_input_grad[1]
        ctx.save_for_backward(*kept)
        ctx.trace = trace
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        _check_once()
        _check_versions(ctx.trace.named, ctx.trace.versions)
        ctx.trace.sampler._order(cotangent.device)
        return None, *ctx.trace.backward(cotangent, ctx.saved_tensors)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _check_once() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sample: this gradient is not differentiable again; got backward(create_graph=True)"
            ' or grad(create_graph=True). Use gradient="backprop".'
        )


def _check_versions(named: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    for tensor, version in zip(named, versions, strict=True):
        if _version(tensor) != version:
            raise RuntimeError(
                "sample: a tensor that the gradient needs was changed in place between the run "
                f"and backward(): one of shape {tuple(tensor.shape)} is at version "
                f"{tensor._version}; expected {version}. Call backward() before the step."
            )


class _Captured:
    """A run and its backward pass as two graphs, on buffers of their own.

    What the forward graph keeps for the backward one lies in its memory: a second run before the
    backward pass of the first would overwrite it, and is told apart by `stamp`.
    """

    def __init__(
        self, trace: Trace, run: Any, inputs: Sequence[torch.Tensor], needs: Sequence[bool]
    ) -> None:
        self.trace, self.run, self.inputs = trace, run, inputs
        self.needs = needs  # of x and the named tensors
        self.cotangent = torch.empty_like(run.registers.x)
        self.stamp = 0
        self.kept: list[torch.Tensor] = []
        self.found: tuple[torch.Tensor | None, ...] = ()
        self.held: list[Any] = []  # what the graphs' addresses belong to

    def forward(self) -> None:
        """What is captured of the run."""
        trace, first = self.trace, not self.held
        trace.watches = first
        trace.sampler._first_input(self.run)
        self.kept = trace.loop(self.run)
        if trace.random:
            raise NotImplementedError(
                "sample: a captured gradient cannot draw a network's random numbers again; got a "
                f"network that draws at stage {min(trace.random)}. Use eval(), or graph=None."
            )

    def backward(self) -> None:
        """What is captured of the backward pass."""
        self.found = self.trace.backward(self.cotangent, self.kept)
        self.held = [*self.trace.sampler._backward.values()]

    def result(self) -> torch.Tensor:
        """Everything that a run and its backward pass leave, in one vector."""
        left = [self.run.registers.x, *(g for g in self.found if g is not None)]
        return torch.cat([tensor.flatten().to(left[0].dtype) for tensor in left])


class _CapturedFunction(torch.autograd.Function):
    """A captured run as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any, captured: _Captured, captures: Captures, entry: Entry, *tensors: torch.Tensor
    ) -> torch.Tensor:
        captured.stamp += 1
        ctx.stamp, ctx.captured, ctx.captures, ctx.entry = captured.stamp, captured, captures, entry
        ctx.named = tensors
        ctx.versions = list(map(_version, tensors))
        captures.launch(entry, "forward")
        return captured.run.registers.x.to(tensors[0].dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        _check_once()
        _check_versions(ctx.named, ctx.versions)
        captured = ctx.captured
        if ctx.stamp != captured.stamp:
            raise RuntimeError(
                "sample: a captured run keeps the states of its last call alone; got backward() "
                "after the sampler was called again. Call backward() first, or use graph=None."
            )
        captured.trace.sampler._order(cotangent.device)
        captured.cotangent.copy_(cotangent)
        ctx.captures.launch(ctx.entry, "backward")
        found = [
            None if g is None or not needed else g.to(tensor.dtype, copy=True)
            for g, needed, tensor in zip(captured.found, captured.needs, ctx.named, strict=True)
        ]
        return None, None, None, *found


def differentiable(
    sampler: Any,
    gradient: Gradient,
    params: Sequence[torch.Tensor],
    x: torch.Tensor,
    cond: Any,
    extras: Sequence[torch.Tensor],
    fill: Callable[[Any], None],
    captures: Captures | None = None,
) -> torch.Tensor:
    """A run whose result autograd can differentiate.

    Args:
        sampler: Its network, plan and guidance are used, and its buffers.
        gradient: How.
        params: Tensors besides x, the conditioning and the extra registers that want a gradient.
        x, extras: As in `Sampler.__call__`.
        cond: Conditioning of all branches.
        fill: Copies the inputs into the buffers of a run.
        captures: Where the two graphs of a captured run are kept; None: run eagerly.

    Raises:
        ValueError: No tensor requires grad; or the gradient cannot pass what the plan does.
        RuntimeError: The network cannot be captured.
    """
    plan, guidance = sampler._plan, sampler._guidance
    if isinstance(gradient, AdjointDEIS):
        if varies(cond):
            gradient = _on_the_plans_times(gradient, plan)
        check_continuous(gradient, sampler)
    held = tensors_in(cond)
    named = (*params, *held, *extras)
    needs = tuple(tensor.requires_grad for tensor in (x, *named))
    if not any(needs):
        raise ValueError(
            f"sample: gradient={gradient!r} differentiates with respect to tensors that require "
            "grad; got none in x, cond, extras and the parameters. Call x.requires_grad_(), name "
            "tensors in params=, or use gradient=None."
        )
    given = (sampler, sampler._network, plan, guidance, gradient)
    if isinstance(gradient, Discrete) and gradient.undo and not alternates(plan):
        raise ValueError(
            "Discrete: undo=True needs a plan whose every stage moves one of x and e from the "
            f'other, such as "rex-1"; got {plan.solver}. Use that, or checkpoint=.'
        )
    if captures is None:
        trace = Trace(*given, cond, named, len(extras), x.detach(), fill)
        return _Function.apply(trace, x, *named)

    if isinstance(gradient, Discrete) and (gradient.checkpoint is not None or gradient.undo):
        raise NotImplementedError(
            f"sample: a captured gradient keeps every stage's state in the graph; got {gradient}. "
            "Use graph=None, or fastdiff.Discrete(checkpoint=None)."
        )
    described, _ = flatten(cond)
    ids = tuple(map(id, params))
    made_for = (gradient, plan.handle, id(guidance), x.shape, x.dtype, needs, ids, described)
    key = (*made_for, captures.environment())
    entry = captures.get(key)
    kept = entry is not None
    while not kept:
        run = sampler._build(key, sampler._kind(x), x.shape, x.device)
        with torch.inference_mode(False):
            own = [t.detach().clone().requires_grad_(t.requires_grad) for t in held]
            registers = [
                register.requires_grad_(False).detach().requires_grad_(t.requires_grad)
                for register, t in zip(
                    () if run.registers.bank is None else run.registers.bank, extras, strict=True
                )
            ]
        static = rebuild(cond, iter(own))
        trace = Trace(*given, static, (*params, *own, *registers), len(extras), x.detach(), fill)
        trace.times, trace.needs = list(run.told), needs[0]
        captured = _Captured(trace, run, own, needs)
        entry = Entry(captured, 0)

        def whole(step: Callable[[Any], None], captured: _Captured = captured) -> None:
            _refill(captured, held, fill)
            step("forward")
            captured.cotangent.copy_(x.detach())
            step("backward")

        bodies = {"forward": captured.forward, "backward": captured.backward}
        captures.capture(bodies, whole, captured.result, entry, sampler._network)
        made = (*vars(run.registers).values(), run.times, run.table, *own, captured.cotangent)
        entry.bytes = sum(t.nbytes for m in made for t in _flat(m))
        kept = captures.add(key, entry)
    assert entry is not None
    _refill(entry.run, held, fill)
    return _CapturedFunction.apply(entry.run, captures, entry, x, *named)


def _refill(captured: _Captured, held: Sequence[torch.Tensor], fill: Callable[[Any], None]) -> None:
    """Copies the inputs of a call to where the graphs read them."""
    with torch.no_grad():
        fill(captured.run)
        for own, tensor in zip(captured.inputs, held, strict=True):
            own.copy_(tensor)


def _flat(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [tensor for tensor in values if isinstance(tensor, torch.Tensor)]


# -- the continuous adjoint ------------------------------------------------------------------------


def check_continuous(gradient: AdjointDEIS, sampler: Any) -> None:
    """Raises where the continuous adjoint of a sampler's plan has no meaning or no limit."""
    plan, guidance = sampler._plan, sampler._guidance
    who = "AdjointDEIS"
    if any(stage.clip is not None or stage.threshold is not None for stage in plan.stages):
        raise ValueError(
            f"{who}: the flow has no clip and no threshold, so its gradient cannot pass those of "
            'the plan. Use gradient="discrete".'
        )
    if plan.extras:
        raise NotImplementedError(
            f'{who}: extra input registers are not part of the flow. Use gradient="discrete".'
        )
    schedule = schedule_of(gradient, plan)
    if guidance is not None and isinstance(guidance.scale, tuple):
        raise NotImplementedError(
            f"{who}: guidance by one scale a stage has no value between stages; use a number or a "
            'tensor of one a sample, or gradient="discrete".'
        )
    ends = (plan.times[0], plan.times[-1])
    finite = bool(np.isfinite(schedule.lambda_t(np.array(ends))).all())
    if plan.stochastic:
        if gradient.states == "resolve" or gradient.form == "epsilon":
            raise NotImplementedError(
                f"{who}: along drawn noise the adjoint takes recorded states and x0 form; got "
                f"states={gradient.states!r}, form={gradient.form!r}. Leave them out."
            )
        if gradient.steps is not None or gradient.grid is not None:
            raise NotImplementedError(
                f"{who}: a path of noise cannot be interpolated, so the adjoint of a stochastic "
                "plan stands on the plan's own times. Leave steps and grid out."
            )
        _check_reverse_sde(schedule, plan)
    if not finite and (gradient.published or gradient.states == "resolve"):
        what = "published=True" if gradient.published else 'states="resolve"'
        raise ValueError(
            f"{who}: {what} needs alpha > 0 at the start and sigma > 0 at the end; got times "
            f"{ends[0]:g} to {ends[1]:g} of {schedule}. Make the plan with t_max and t_min inside, "
            "or leave it out."
        )
    _own_plan(sampler, gradient, schedule, plan)


def _on_the_plans_times(gradient: AdjointDEIS, plan: Plan) -> AdjointDEIS:
    """The adjoint on the plan's own times, where a conditioning has one value a stage.

    Raises:
        NotImplementedError: It stands on others, or a stage of the plan stands between its times.
    """
    same = gradient.steps in (None, plan.steps) and gradient.grid in (None, plan.times)
    if not same or gradient.published or [s.t for s in plan.stages] != [*plan.times[:-1]]:
        raise NotImplementedError(
            "AdjointDEIS: a PerStage has values at the stages alone, so the adjoint stands on the "
            f"plan's own times, with one stage a step; got {gradient}. Leave steps, grid and "
            'published out, or use gradient="discrete".'
        )
    return gradient if plan.stochastic else replace(gradient, grid=plan.times)


def schedule_of(gradient: AdjointDEIS, plan: Plan) -> Schedule:
    """The schedule of a plan.

    Raises:
        ValueError: It is not known: the plan was loaded or made by hand.
    """
    schedule = gradient.schedule or plan.made_for
    if not isinstance(schedule, Schedule):
        raise ValueError(
            "AdjointDEIS: the flow needs the plan's schedule, which a plan that was loaded or made "
            f"by hand does not carry; got {schedule!r}. Give AdjointDEIS(schedule=...)."
        )
    return schedule


def _check_reverse_sde(schedule: Schedule, plan: Plan) -> None:
    """Raises unless the plan's noise is that of the reverse SDE with tau = 1."""
    for i, stage in enumerate(plan.stages):
        if not stage.c or len(plan.stages) != plan.steps:
            continue
        s, t = plan.times[i], plan.times[i + 1]
        h = float(schedule.lambda_t(t) - schedule.lambda_t(s))
        wanted = float(schedule.sigma(t)) * np.sqrt(-np.expm1(-2.0 * h))
        if abs(stage.c - wanted) <= 1e-6 * wanted:
            continue
        raise NotImplementedError(
            f"AdjointDEIS: the adjoint of a stochastic plan is that of the reverse SDE (tau = 1, "
            f"such as ddim with eta=1); {plan.solver} draws {stage.c:.6g} at t = {s:g} where that "
            f'draws {wanted:.6g}. Use gradient="discrete".'
        )
    if len(plan.stages) != plan.steps:
        raise NotImplementedError(
            "AdjointDEIS: the adjoint of a stochastic plan needs one stage a step; got "
            f'{len(plan.stages)} stages in {plan.steps} steps. Use gradient="discrete".'
        )


def _nodes(gradient: AdjointDEIS, schedule: Schedule, plan: Plan) -> Plan:
    """The plan on the adjoint's grid whose transposed rows are the adjoint's."""
    times = np.array(plan.times)
    finite = bool(np.isfinite(schedule.lambda_t(times[[0, -1]])).all())
    form = gradient.form or ("epsilon" if float(schedule.alpha(times[0])) > 0.0 else "x0")
    if plan.stochastic:
        return _reverse_sde(schedule, plan, gradient.order)
    steps = gradient.steps or plan.steps
    grid = gradient.grid
    if grid is None:
        grid = "logsnr" if finite else times
        if not finite and steps != plan.steps:
            raise ValueError(
                "AdjointDEIS: lambda is infinite at an end of the plan, where only its own times "
                f"are known to serve; got steps={steps}, and the plan has {plan.steps}. Give grid=."
            )
    ends = {"t_max": plan.times[0], "t_min": plan.times[-1]} if isinstance(grid, str) else {}
    solver = DPMSolverMultistep(order=min(gradient.order, steps), form=form, solver_type="taylor")
    return solver.plan(schedule, steps, grid=grid, prediction=plan.prediction, **ends)


def _reverse_sde(schedule: Schedule, plan: Plan, order: int) -> Plan:
    """Rows of the exponential Adams method of the reverse SDE in x0 form, without their noise.

    x_t = (sigma_t/sigma_s) e^{-h} x_s + sum_j B_j x0_j,   B from
    J_p = 2 alpha_t p! h^{p+1} phi_{p+1}(-2h)
    """
    rows = Rows(schedule, plan.prediction, "x0")
    times = np.array(plan.times)
    lam = schedule.lambda_t(times)
    for i in range(len(times) - 1):
        s, t = times[i], times[i + 1]
        h, alpha, sigma = float(lam[i + 1] - lam[i]), float(schedule.alpha(t)), schedule.sigma
        k = min(order, max(int(np.isfinite(lam[: i + 1]).sum()), 1)) if np.isfinite(h) else 1
        if np.isfinite(h):
            j = [
                2.0 * alpha * math.factorial(p) * h ** (p + 1) * phi(p + 1, -2.0 * h)
                for p in range(k)
            ]
            a = float(sigma(t) / sigma(s)) * np.exp(-h)
        else:
            j, a = [alpha], 0.0
        u = lam[i::-1][:k] - lam[i] if k > 1 else np.zeros(1)
        b = np.linalg.solve(np.vander(u, increasing=True).T, np.array(j))
        rows.add(float(s), x=(a, dict(zip(range(i, i - k, -1), b.tolist(), strict=True))))
    return Plan(
        stages=tuple(rows.stages),
        times=plan.times,
        prediction=plan.prediction,
        variable="x0",
    )


def _continuous(sweep: _Sweep, gradient: AdjointDEIS, kept: Sequence[torch.Tensor]) -> None:
    """The adjoint on its own grid."""
    plan = sweep.trace.plan
    schedule = schedule_of(gradient, plan)
    own = _own_plan(sweep.trace.sampler, gradient, schedule, plan)
    states: _Recorded | _Resolved
    if gradient.states == "resolve":
        states = _Resolved(sweep, schedule, own, kept[-1], gradient.order)
    else:
        recorded = [s.t for s in plan.stages if s.evaluate and s.t in plan.times]
        states = _Recorded(schedule, [*recorded, plan.times[-1]], kept)
    if gradient.published:
        _published(sweep, schedule, gradient.order, own, states)
        return
    told = [_told(sweep, schedule, t) for t in own.times[:-1]]
    sweep.run(
        own.transpose(),
        told,
        lambda i: _Input(_given(sweep, schedule, own.times[i], states.at(own.times[i]))),
        states.see,
    )


def _own_plan(sampler: Any, gradient: AdjointDEIS, schedule: Schedule, plan: Plan) -> Plan:
    """The adjoint's plan, made once for a sampler's plan and gradient."""
    held = sampler._adjoint
    if held is None or held[0] != gradient or held[1] is not plan:
        held = sampler._adjoint = (gradient, plan, _nodes(gradient, schedule, plan))
    return held[2]


def _told(sweep: _Sweep, schedule: Schedule, t: float) -> torch.Tensor:
    """What the network is told at t."""
    like = sweep.trace.times[0]
    return torch.full_like(like, float(schedule.model_time(t, sweep.trace.plan.prediction)))


def _given(sweep: _Sweep, schedule: Schedule, t: float, x: torch.Tensor) -> torch.Tensor:
    """What the network is given at state x and time t."""
    trace = sweep.trace
    dtype, branches = trace.sampler._kind(x)[1:3]
    c_in = float(schedule.c_in(t, trace.plan.prediction))
    given = (x if c_in == 1.0 else c_in * x).to(dtype)
    return given if branches == 1 else torch.cat([given] * branches)


class _Recorded:
    """States between those of the forward run.

    x/hypot(alpha, sigma) is interpolated through four of them in the angle atan2(sigma, alpha),
    which is bounded where lambda is not and in which the flow moves evenly. Error of fourth order.
    """

    def __init__(
        self, schedule: Schedule, times: Sequence[float], states: Sequence[torch.Tensor]
    ) -> None:
        self._schedule, self._times, self._states = schedule, np.array(times), states

    def at(self, t: float) -> torch.Tensor:
        times = self._times
        close = np.abs(times - t) <= 1e-12 * np.abs(times).max()
        if close.any():
            return self._states[int(close.argmax())]
        after = int((times > t).sum())  # the first recorded time past t
        begin = min(max(after - 2, 0), max(len(times) - 4, 0))
        nodes = times[begin : begin + 4]
        angles, sizes = self._polar(nodes)
        angle, size = self._polar(np.array([t]))
        weights = lagrange(angles, angle)[:, 0] * size[0] / sizes
        total = torch.zeros_like(self._states[0])
        for weight, state in zip(weights, self._states[begin : begin + 4], strict=True):
            total.add_(state, alpha=float(weight))
        return total

    def _polar(self, times: Array) -> tuple[Array, Array]:
        alpha, sigma = self._schedule.alpha(times), self._schedule.sigma(times)
        return np.arctan2(sigma, alpha), np.hypot(alpha, sigma)

    def see(self, i: int, out: torch.Tensor) -> None:
        """Told of every network output."""


class _Resolved:
    """States by the same exponential integrator, run back from the sample along with the adjoint.

    x_n = transfer x_{n+1} + sum_j B_j h_{n+1+j}: the h of each node comes with its VJP, that of the
    data end takes one evaluation more.
    """

    def __init__(
        self, sweep: _Sweep, schedule: Schedule, own: Plan, sample: torch.Tensor, order: int
    ) -> None:
        self._sweep, self._schedule, self._own, self._order = sweep, schedule, own, order
        self._n, self._x = len(own.times) - 1, sample
        self._h: list[torch.Tensor] = []  # of nodes n, n + 1, ..
        self._seen = self._n + 1  # the node of the newest

    def _keep(self, out: torch.Tensor) -> None:
        p, q = self._schedule.conversion(
            self._own.prediction, self._own.variable, self._own.times[self._n]
        )
        outputs = out.to(self._x.dtype).reshape(-1, *self._x.shape)
        combined, guidance = outputs[0], self._sweep.trace.guidance
        if guidance is not None and guidance.branches > 1:
            w_uncond, w_cond = self._sweep.trace.weights(0)
            combined = w_uncond * outputs[0] + w_cond * outputs[1]
        self._h = [q * combined + p * self._x, *self._h][: self._order]
        self._seen = self._n

    def _evaluate(self) -> None:
        """The output at a node where no vector-Jacobian product is taken: the data end."""
        trace, t = self._sweep.trace, self._own.times[self._n]
        arguments, keywords = arguments_of(trace.cond)
        given = _given(self._sweep, self._schedule, t, self._x)
        told = _told(self._sweep, self._schedule, t)
        with torch.no_grad(), trace.autocast():
            self._keep(trace.network(given, told, *arguments, **keywords))

    def at(self, t: float) -> torch.Tensor:
        times = self._own.times
        while times[self._n] != t:
            n = self._n
            if self._seen != n:
                self._evaluate()
            nodes = times[n : n + len(self._h)]
            weights = adams(self._schedule, self._own.variable, times[n], times[n - 1], nodes)
            scale = transfer(self._schedule, self._own.variable, times[n], times[n - 1])
            self._x = self._x * scale
            for weight, h in zip(weights, self._h, strict=True):
                self._x.add_(h, alpha=float(weight))
            self._n -= 1
        return self._x

    def see(self, i: int, out: torch.Tensor) -> None:
        """Told of every network output, of the node that `at` was asked for last."""
        self._keep(out)


def _published(
    sweep: _Sweep,
    schedule: Schedule,
    order: int,
    own: Plan,
    states: _Recorded | _Resolved,
) -> None:
    """The paper's explicit forms, from the data end on, with the Jacobian at the cleaner end.

        s_s a(s) = s_t a(t) + w_1 V_t + w_2 (V_t - V_r)/(lambda_t - lambda_r),  V = s^2 (dN/dx)^T a

    and the same for conditioning and parameters with V = s (dN/dz)^T a, each product credited to
    the node that it was taken at.
    """
    plan = sweep.trace.plan
    times = np.array(own.times)[::-1]
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    lam = schedule.lambda_t(times)
    form, stochastic = own.variable, plan.stochastic
    scale = alpha if form == "epsilon" else sigma
    if stochastic:
        scale = sigma**2 / alpha
    count = len(times) - 1
    w_1, g = np.zeros(count), np.zeros(count)
    for n in range(count):
        h = float(lam[n + 1] - lam[n])
        if stochastic:
            w_1[n] = np.exp(2.0 * lam[n + 1]) * np.expm1(-2.0 * h)
            w_2 = -2.0 * np.exp(2.0 * lam[n + 1]) * h * h * phi(2, -2.0 * h)
        elif form == "epsilon":
            w_1[n] = sigma[n + 1] / alpha[n + 1] * np.expm1(h)
            w_2 = 0.5 * h * w_1[n]
        else:
            w_1[n] = alpha[n + 1] / sigma[n + 1] * np.expm1(-h)
            w_2 = -alpha[n + 1] / sigma[n + 1] * h * h * phi(2, -h)
        if order == 2 and n > 0:
            g[n] = w_2 / (lam[n] - lam[n - 1])
    p_q = [schedule.conversion(plan.prediction, form, float(t)) for t in times]

    def rows(branches: int) -> tuple[torch.Tensor, Layout]:
        layout = Layout(1, branches)
        c_in = [float(schedule.c_in(float(t), plan.prediction)) for t in times]
        made = [PackedRow(flags=WRITES_M, c_in_next=p_q[0][1])]
        for n in range(count):
            row = PackedRow(
                flags=EVALUATE + WRITES_X + WRITES_M,
                push=0,
                p=p_q[n][0],
                a_x=scale[n] / scale[n + 1],
                b_0=(w_1[n] + g[n]) * scale[n] ** 2 / scale[n + 1],
                k=(c_in[n],) * branches,
                c_in_next=p_q[n + 1][1],
            )
            if g[n]:
                row.terms = ((0, -g[n] * scale[n - 1] ** 2 / scale[n + 1], 0.0),)
            made.append(row)
        return torch.from_numpy(encode(made, layout)), layout

    registers, run = sweep.bound(f"published {order} {own.handle}", rows, 1)
    m = registers.m
    assert m is not None
    run(0, None, None)
    for n in range(count):
        t = float(times[n])

        def cotangent(out: torch.Tensor) -> torch.Tensor:
            states.see(0, out)
            return sweep.weighed(m, 0)

        later = g[n + 1] if n + 1 < count else 0.0
        weight = float((w_1[n] + g[n] - later) * scale[n])
        given = _given(sweep, schedule, t, states.at(t))
        run(n + 1, sweep.vjp(-1, given, _told(sweep, schedule, t), cotangent, True, weight), None)


# -- what a run names ------------------------------------------------------------------------------


def tensors_in(cond: Any) -> list[torch.Tensor]:
    """The tensors of a conditioning, in the order in which `rebuild` asks for them."""
    if isinstance(cond, torch.Tensor):
        return [cond]
    if isinstance(cond, PerStage):
        return [cond.values]
    if isinstance(cond, Mapping):
        return [tensor for value in cond.values() for tensor in tensors_in(value)]
    if isinstance(cond, list | tuple):
        return [tensor for value in cond for tensor in tensors_in(value)]
    return []


def parameters_of(network: Any, params: Any) -> tuple[torch.Tensor, ...]:
    """Tensors that want a gradient: the module's parameters and those given.

    Raises:
        TypeError: `params` is no module and no iterable of tensors.
    """
    named: list[torch.Tensor] = []
    for source in (network, params):
        if isinstance(source, torch.nn.Module):
            named += source.parameters()
        elif source is params and params is not None:
            given = list(params) if isinstance(params, Iterable) else [params]
            if isinstance(params, torch.Tensor) or not all(
                isinstance(tensor, torch.Tensor) for tensor in given
            ):
                raise TypeError(
                    "sample: params is a module or an iterable of tensors; got "
                    f"{type(params).__name__}. For a dict give params=d.values()."
                )
            named += given
    unique = {id(tensor): tensor for tensor in named if tensor.requires_grad}
    return tuple(unique.values())


def _staged(cond: Any) -> list[PerStage]:
    """The entries of a conditioning that have one value a stage."""
    if isinstance(cond, Mapping):
        return [staged for value in cond.values() for staged in _staged(value)]
    return [cond] if isinstance(cond, PerStage) else []


def _check_named(out: torch.Tensor, named: Sequence[torch.Tensor]) -> None:
    """Raises where an output requires grad through a tensor that is not named."""
    leaves = {id(tensor) for tensor in named}
    inner = {(tensor.grad_fn, tensor.output_nr) for tensor in named if tensor.grad_fn is not None}
    waiting, met = [(out.grad_fn, out.output_nr)], set()
    while waiting:
        edge = waiting.pop()
        node = edge[0]
        if node is None or edge in inner or node in met:
            continue
        met.add(node)
        tensor = getattr(node, "variable", None)
        if tensor is not None and id(tensor) not in leaves:
            raise ValueError(
                "sample: the network's output requires grad through a tensor that nobody named, of "
                f"shape {tuple(tensor.shape)}, {tensor.dtype}; its gradient would be lost. Name it "
                "in params= (params=net.parameters()), pass an nn.Module as the network, or detach "
                "it (net.requires_grad_(False))."
            )
        waiting += node.next_functions


def _at_e(plan: Plan, i: int) -> bool:
    return bool(int(plan.table[i, 0]) & AT_E)


def _generators(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the generators that a network on this device may draw from."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _set_generators(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
