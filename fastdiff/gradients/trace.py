# SPDX-License-Identifier: Apache-2.0
"""A differentiable run: the forward loop, and what its backward pass keeps or makes anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import noise
from ..conditioning import arguments_of, at_stage, tensors_in, varies
from ..engine.call import Call
from ..engine.job import Job, state_dtype
from ..engine.loops import BAD_OUTPUT, Written, bad_output, left_gradient, watch, written
from ..engine.run import Run
from ..guidance.base import Weight
from ..plans import Plan
from .draws import Draws
from .keeping import Inputs, Keeper, keeper_of
from .named import check_named, version_of
from .options import Discrete, Gradient
from .pools import Lender, Recent


@dataclass
class Input:
    """What the network is given at a stage, and the evaluation point where h is limited there."""

    given: torch.Tensor
    point: torch.Tensor | None = None


class Trace:
    """One differentiable call, carried whole: it holds nothing that another call changes.

    Attributes:
        job, gradient: What is run, and how it is differentiated.
        call: What was given: x detached, seeds copied, the conditioning that of all branches.
        params: Tensors besides x, the conditioning and the extra registers that want a gradient.
        named: Tensors that may get a gradient beside x: `params`, tensors of the conditioning,
            extra registers, in this order.
        runs: Lends the registers of every pass.
        recent: Adjoint plans and tables that were worked out before.
        needs: Whether x wants a gradient.
        versions: Of the named tensors when the run began.
        times: What the network is told, one tensor a stage.
        draws: What the network draws.
        autocast: Makes a scope with the autocast of the forward run.
    """

    def __init__(
        self,
        job: Job,
        gradient: Gradient,
        call: Call,
        params: Sequence[torch.Tensor],
        runs: Lender,
        recent: Recent,
        needs: bool,
    ) -> None:
        self.job, self.gradient, self.call = job, gradient, call
        self.params, self.runs, self.recent = tuple(params), runs, recent
        self.named = (*params, *tensors_in(call.cond), *call.extras)
        self.needs = needs
        self.versions = tuple(map(version_of, self.named))
        self.times: Sequence[torch.Tensor] = ()
        self.draws = Draws(call.x.device, watches=isinstance(gradient, Discrete))
        self.autocast = _autocast_of(call.x.device.type)
        self._weights: dict[int, tuple[Weight, ...]] = {}

    @property
    def plan(self) -> Plan:
        """The plan that is differentiated."""
        return self.job.plan

    def weights(self, i: int) -> tuple[Weight, ...]:
        """Weights of the branches at a stage, shaped to multiply samples, made once."""
        found = self._weights.get(i)
        if found is None:
            x = self.call.x
            like = x.new_empty((), dtype=state_dtype(x))
            found = self.job.guidance.combined_weights(i, like.expand(x.shape))
            self._weights[i] = found
        return found

    def entry(self, k: int, like: torch.Tensor) -> torch.Tensor:
        """An entry of the bank, in the dtype and the shape of a state."""
        extra: torch.Tensor = self.call.extras[k]
        return extra.detach().to(like).expand(like.shape)

    def noise(self, i: int) -> torch.Tensor:
        """The noise that stage i drew."""
        call = self.call
        x, shape = call.x, tuple(call.x.shape)
        total = torch.zeros(shape, dtype=state_dtype(x), device=x.device)
        like: dict[str, Any] = {"dtype": total.dtype, "device": x.device}
        if call.offset:
            like["offset"] = call.offset
        for stream, weight in self.plan.stages[i].noise:
            drawn = noise.normal(shape, call.seed, stream, **like)
            total.add_(drawn, alpha=weight)
        return total

    # -- forward ---------------------------------------------------------------------------------

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The sample, and the tensors to keep: the times first."""
        job, call = self.job, self.call
        with self.runs.run(job.spec(call.x, call.offset)) as run:
            run.load(job.plan, job.guidance)
            told = run.times[: len(job.plan.stages)].clone()
            run.fill(call, job.plan)
            run.begin()
            kept = self.loop(run, list(told))
            return run.registers.x.to(call.x.dtype, copy=True), [told, *kept]

    def loop(self, run: Run, times: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs all stages; what to keep.

        Args:
            run: Filled, and at its beginning.
            times: What the network is told at each stage, here and in the backward pass.
        """
        self.times = times
        keeper = keeper_of(self.gradient, self.plan)
        self._loop(run, range(len(self.plan.stages)), keeper, first=True)
        return keeper.kept(run)

    def segment(self, begin: int, end: int, live: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the network is given at stages begin to end, run once more.

        Args:
            begin, end: The stages.
            live: What stands in the registers before the first of them; see `Run.live`.
        """
        job, call, keeper = self.job, self.call, Inputs()
        with self.runs.run(job.spec(call.x, call.offset)) as run, self.autocast():
            run.load(job.plan, job.guidance)
            run.fill(call, job.plan)
            run.restore(live, begin, job.plan)
            self._loop(run, range(begin, end), keeper, first=False)
        return keeper.found

    def _loop(self, run: Run, steps: Iterable[int], keeper: Keeper, first: bool) -> None:
        """Runs stages. `first`: they run for the first time, and are not made anew."""
        job, cond, changes = self.job, self.call.cond, varies(self.call.cond)
        unseen = first
        scope = self.draws.noted if first else self.draws.repeated
        for i in steps:
            stage, out = job.plan.stages[i], None
            keeper.before(i, run, stage)
            if stage.evaluate:
                # networks that differentiate by their own input track it themselves
                given = run.inputs[i].detach()
                if job.fresh_inputs:
                    given = given.clone()
                now = at_stage(cond, i) if changes else cond
                with scope(i), torch.set_grad_enabled(unseen):
                    error = functools.partial(written, job, "network", i)
                    out = evaluated(job, (given, self.times[i], now), error)
                if isinstance(out, torch.Tensor):
                    if unseen:
                        check_named(out, (given, *self.named))
                    out = out.detach()
                unseen = False
            try:
                run.advance(i, out)
            except BAD_OUTPUT as error:
                raise bad_output(job, i, out, run.inputs[i], error) from None

    # -- backward --------------------------------------------------------------------------------

    def inputs(self, kept: Sequence[torch.Tensor]) -> Callable[[int], Input]:
        """What the network was given at each stage, asked for from the last stage to the first.

        Args:
            kept: What `loop` gave for a `Discrete` that is not undone.
        """
        assert isinstance(self.gradient, Discrete)
        stages, segment = self.plan.stages, self.gradient.checkpoint
        count = [0]
        for stage in stages:
            limited = stage.clip is not None or stage.threshold is not None
            count.append(count[-1] + stage.evaluate * (1 + limited))
        made: dict[int, list[torch.Tensor]] = {}

        def given(i: int) -> Input:
            if segment is None:
                found = list(kept[count[i] : count[i + 1]])
            else:
                begin = i // segment * segment
                if begin not in made:
                    made.clear()
                    each = len(kept) // -(-len(stages) // segment)  # registers of a checkpoint
                    live = kept[begin // segment * each :][:each]
                    made[begin] = self.segment(begin, min(begin + segment, len(stages)), live)
                offset = count[begin]
                found = made[begin][count[i] - offset : count[i + 1] - offset]
            return Input(found[0], found[1] if len(found) > 1 else None)

        return given


def evaluated(
    job: Job, arguments: tuple[torch.Tensor, torch.Tensor, Any], error: Callable[[], Exception]
) -> Any:
    """The network's output.

    Args:
        job: Whose network it is.
        arguments: x, t and the conditioning as it stands at this stage.
        error: Makes what is raised where the network wrote to x or t.
    """
    given, time, cond = arguments
    positional, keywords = arguments_of(cond)
    if job.fresh_inputs:
        return job.network(given, time.clone(), *positional, **keywords)
    before = watch(given), watch(time)
    out = job.network(given, time, *positional, **keywords)
    if (watch(given), watch(time)) != before:
        raise error()
    if time.grad is not None:  # the backward pass is told in the same memory
        raise left_gradient()
    return out


def written_backward() -> Written:
    """The error for a network that wrote to its input in the backward pass."""
    return Written(
        "sample: the network wrote to its input in place in the backward pass, whose memory that "
        "is. Let it work on a copy (x = x.clone()); a network is given memory of its own with "
        "Sampler(..., fresh_inputs=True)."
    )


def _autocast_of(device: str) -> Callable[[], Any]:
    """Makes scopes with the autocast that is in force now."""
    enabled, cached = torch.is_autocast_enabled(device), torch.is_autocast_cache_enabled()
    kind = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=kind, enabled=enabled, cache_enabled=cached)
