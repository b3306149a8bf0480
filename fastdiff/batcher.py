# SPDX-License-Identifier: Apache-2.0
"""Continuous batching at the level of stages: each sample of a batch at its own stage of its plan.

A server's requests begin at different times and want different numbers of steps. A `Batcher` has B
places; a request takes one, every `step` calls the network once for all places and moves each by
one stage of its own plan, and a sample that is done leaves its place to the next request. Which row
of the table a place runs is a number on the device: one captured stage serves every mixture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import backends, noise
from .backends.base import Registers
from .graphs import CAPTURERS, Captures, Entry, Graph, Stats, flatten, ordered, rebuild
from .guidance import CFG, arguments_of, batched, check_batch, varies
from .plans import PackedRow, Plan, encode
from .sampler import (
    Network,
    Seeds,
    bytes_of,
    check_prediction,
    graph_of,
    network_dtype,
    output_problem,
    write_table,
)


class Batcher:
    """B places that samples of different plans share, one network call a step.

    Args:
        network: As `Sampler` has it. It is called on all B places, whoever is in them: what it
            returns for one must not depend on the others.
        plans: The plans that requests choose from, of one prediction and without extra registers.
        shape: [B, ...], of the whole batch.
        cond: Conditioning as `Sampler.__call__` takes it, with B entries a tensor: an example that
            says the structure and fills the places that are empty.
        guidance: `fastdiff.CFG` with a number for its scale, or None.
        dtype: Of the state, float32 or float64.
        device: Where the registers lie.
        backend: As in `Sampler`.
        graph: "auto" and "stage" capture the stage (CUDA); None runs it eagerly.

    A request's sample does not depend on the requests around it: it is `fastdiff.sample`'s of the
    same x, plan and seed, as far as the network's arithmetic does not depend on its batch.
    """

    def __init__(
        self,
        network: Network,
        plans: Sequence[Plan],
        shape: Sequence[int],
        *,
        cond: Any = None,
        guidance: CFG | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        graph: str | Graph | None = "auto",
    ) -> None:
        if not callable(network):
            raise TypeError(f"Batcher: network is callable as network(x, t); got {network!r}.")
        plans = (plans,) if isinstance(plans, Plan) else tuple(plans)
        if not plans or not all(isinstance(plan, Plan) for plan in plans):
            raise TypeError(f"Batcher: plans are fastdiff.Plan, at least one; got {plans!r}.")
        for plan in plans:
            if plan.prediction != plans[0].prediction or plan.extras:
                raise ValueError(
                    "Batcher: plans have one prediction and no extra registers; got "
                    f"{plan.prediction!r} beside {plans[0].prediction!r}, {plan.extras} extras."
                )
        check_prediction(network, plans[0])
        if guidance is not None and (
            not isinstance(guidance, CFG) or not isinstance(guidance.scale, float)
        ):
            raise ValueError(
                "Batcher: guidance is a fastdiff.CFG with a number for its scale, or None; got "
                f"{guidance!r}."
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Batcher: dtype is torch.float32 or torch.float64; got {dtype}.")
        shape = torch.Size(shape)
        if len(shape) == 0 or min(shape) < 1:
            raise ValueError(f"Batcher: shape is [B, ...], all at least 1; got {tuple(shape)}.")
        device = torch.empty(0, device=device).device
        self._graph = graph_of(graph)
        network_type = network_dtype(network) or dtype
        serving = backends.choose(backend, dtype, network_type, device)
        if self._graph is not None and self._graph.mode == "auto":
            captured = device.type in CAPTURERS and serving.name != "torch"
            self._graph = self._graph if captured else None
        if self._graph is not None and self._graph.mode == "loop":
            raise ValueError('Batcher: one stage is captured; graph is "stage", "auto" or None.')
        if self._graph is not None and device.type not in CAPTURERS:
            raise ValueError(
                f"Batcher: graphs are captured on {', '.join(CAPTURERS)}; got device {device}. "
                "Use graph=None."
            )
        self._network, self._plans, self._guidance = network, plans, guidance
        check_batch(cond, shape[0])
        self._build(shape, dtype, network_type, device, serving)
        self._cond = self._combined(cond)
        if varies(self._cond):
            raise NotImplementedError(
                "Batcher: places stand at different stages; got a PerStage. Give the conditioning "
                "of a sample as a whole."
            )
        self._described, leaves = self._flat(self._cond)
        with torch.inference_mode(False):
            self._own = [leaf.detach().clone() for leaf, _ in leaves]
        self._rows = [rows for _, rows in leaves]
        self._stream: Any = None
        self._left = [0] * shape[0]  # stages that each place still has to run; 0: empty
        self._captures: Captures | None = None
        if self._graph is not None:
            self._captures = Captures(self._graph, CAPTURERS[device.type], device)

    def _build(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        network: torch.dtype,
        device: torch.device,
        serving: backends.Backend,
    ) -> None:
        plans, batch = self._plans, shape[0]
        branches = 1 if self._guidance is None else self._guidance.branches
        if self._graph is not None and not serving.capturable:
            raise ValueError(
                "Batcher: a captured stage reads its table on the device; the torch backend keeps "
                "it on the host. Use graph=None."
            )
        layout = replace(
            plans[0].layout, terms=max(plan.layout.terms for plan in plans), branches=branches
        )
        slots = max(plan.slots for plan in plans)
        with torch.inference_mode(False):
            like = functools.partial(torch.zeros, dtype=dtype, device=device)
            registers = Registers(
                x=like(shape),
                e=like(shape) if any(plan.uses_e for plan in plans) else None,
                history=like((slots, *shape)),
                m=torch.zeros((branches * batch, *shape[1:]), dtype=network, device=device),
                seeds=torch.zeros(batch, dtype=torch.int64, device=device),
            )
            tables, times, following, self._first = [], [0.0], [0], []
            # row 0 does nothing, and is where a place without a sample stands
            tables.append(torch.from_numpy(encode([PackedRow()], layout)))
            for plan in plans:
                stages, begin = len(plan.stages), len(times)
                table = torch.zeros((stages + 1, layout.width), dtype=torch.float64)
                write_table(table, plan, self._guidance, batch, layout)
                tables.append(table[:stages])
                times += [stage.model_time for stage in plan.stages]
                following += [*range(begin + 1, begin + stages), 0]
                self._first.append(begin)
            told = torch.float64 if network == torch.float64 else torch.float32
            self._times = torch.tensor(times, dtype=told, device=device)
            self._following = torch.tensor(following, device=device)
            self._stage_index = torch.zeros(batch, dtype=torch.int64, device=device)
            self._next = torch.zeros_like(self._stage_index)
            self._t = torch.zeros((branches, batch), dtype=told, device=device)
            self._registers, self._branches = registers, branches
            self._run = serving.bind(registers, torch.cat(tables), layout, self._stage_index).run

    # -- requests --------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Places without a sample."""
        return self._left.count(0)

    def add(
        self, x: torch.Tensor, plan: int = 0, *, seed: Seeds | None = None, cond: Any = None
    ) -> int:
        """Takes a place for one sample.

        Args:
            x: State at the plan's first time, of the shape without B.
            plan: Which of the plans, by its index.
            seed: An integer, for plans with noise.
            cond: Conditioning of this sample, each tensor with one entry [1, ...]; the structure of
                the example that the batcher was made with.

        Returns:
            The place, by which `step` names the sample when it is done.

        Raises:
            ValueError, TypeError: An argument is none of these; nothing is changed.
            RuntimeError: All places are taken.
        """
        registers = self._registers
        if not isinstance(x, torch.Tensor) or x.shape != registers.x.shape[1:]:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(
                f"Batcher: x is one sample, {tuple(registers.x.shape[1:])}; got {got}."
            )
        if not isinstance(plan, int) or isinstance(plan, bool) or not 0 <= plan < len(self._plans):
            raise ValueError(f"Batcher: plan is an index below {len(self._plans)}; got {plan!r}.")
        chosen = self._plans[plan]
        if chosen.stochastic and seed is None:
            raise ValueError(f"Batcher: {chosen.solver} draws noise. Give seed=.")
        if 0 not in self._left:
            raise RuntimeError(
                f"Batcher: all {len(self._left)} places are taken. Call step() until one is free."
            )
        seeds = None if seed is None else noise.seeds_tensor(seed, 1)
        check_batch(cond, 1)
        described, leaves = self._flat(self._combined(cond, 1))
        shared = zip(self._own, leaves, strict=False)
        if described != self._described or not all(
            rows or own is leaf or torch.equal(own, leaf) for own, (leaf, rows) in shared
        ):
            raise ValueError(
                "Batcher: a sample's conditioning has the structure, dtypes and numbers of the "
                f"example, and the same tensors inside tuples and lists; got {cond!r}."
            )
        place = self._left.index(0)
        self._order()
        with torch.no_grad():
            registers.x[place].copy_(x)
            m = registers.m
            assert m is not None
            m.view(self._branches, -1, *m.shape[1:])[:, place] = registers.x[place].mul(
                chosen.stages[0].c_in
            )
            if seeds is not None and registers.seeds is not None:
                registers.seeds[place : place + 1].copy_(seeds, non_blocking=True)
            for own, (leaf, _), rows in zip(self._own, leaves, self._rows, strict=True):
                if rows:
                    shape = own.shape[1:]
                    own.view(self._branches, -1, *shape)[:, place] = leaf.view(-1, *shape)
            self._stage_index[place] = self._first[plan]
        self._left[place] = len(chosen.stages)
        return place

    def step(self) -> dict[int, torch.Tensor]:
        """Moves every sample by one stage.

        Returns:
            The samples that are done, by their places, which are free again.

        Raises:
            RuntimeError: There is no sample, or the network cannot be captured.
        """
        if not any(self._left):
            raise RuntimeError("Batcher: there is no sample to move. Call add() first.")
        self._order()
        with torch.no_grad():
            if self._captures is None:
                self._advance(self._cond_of())
            else:
                self._replay(self._captures)
            done = [place for place, left in enumerate(self._left) if left == 1]
            samples = {place: self._registers.x[place].clone() for place in done}
        self._left = [max(left - 1, 0) for left in self._left]
        return samples

    def stats(self) -> Stats:
        """As `Sampler.stats`."""
        return Stats() if self._captures is None else self._captures.stats()

    # -- one stage -------------------------------------------------------------------------------

    def _order(self) -> None:
        """Makes what follows wait for the call before, if it was on another stream."""
        self._stream = ordered(self._registers.x.device, self._stream)

    @staticmethod
    def _flat(cond: Any) -> Any:
        try:
            return flatten(cond)
        except TypeError:
            raise TypeError(
                "Batcher: conditioning is tensors, numbers and strings in dicts, lists and tuples, "
                f"so that places can share one call; got {cond!r}."
            ) from None

    def _combined(self, cond: Any, batch: int | None = None) -> Any:
        if self._branches == 1 or self._guidance is None:
            return cond
        return batched(cond, self._guidance.uncond, batch or len(self._registers.x))

    def _cond_of(self) -> Any:
        return rebuild(self._cond, iter(self._own))

    def _advance(self, cond: Any) -> None:
        torch.index_select(self._times, 0, self._stage_index, out=self._t[0])
        for branch in range(1, self._branches):
            self._t[branch].copy_(self._t[0])
        arguments, keywords = arguments_of(cond)
        given = self._registers.m
        assert given is not None
        output = self._network(given, self._t.view(-1), *arguments, **keywords)
        try:
            self._run(0, output, None)
        except (TypeError, ValueError, AttributeError) as error:
            problem = output_problem(output, given)
            if problem is None:
                raise
            raise type(error)(f"Batcher: {problem}") from None
        torch.index_select(self._following, 0, self._stage_index, out=self._next)
        self._stage_index.copy_(self._next)

    def _replay(self, captures: Captures) -> None:
        key = captures.environment()
        entry = captures.get(key)
        if entry is not None:
            captures.launch(entry)
            return
        r = self._registers
        live = [r.x, r.e, r.history, r.m, self._stage_index]
        kept = [(t, t.clone()) for t in live if t is not None]

        def restore() -> None:
            for tensor, value in kept:
                tensor.copy_(value)

        def whole(step: Callable[[Any], None]) -> None:
            restore()
            step(None)

        body = functools.partial(self._advance, self._cond_of())
        try:
            done = False
            while not done:
                entry = Entry(self, bytes_of(live))
                captures.capture({None: body}, whole, lambda: r.x, entry, self._network)
                done = captures.add(key, entry)
        except BaseException:
            restore()  # no sample has moved
            raise
