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
from typing import Any

import torch

from . import conditioning
from .capture import CAPTURERS, Captures, Entry, Graph, Stats, graph_of
from .capture.cache import check_outside
from .capture.loops import capturable, check_capturable
from .capture.work import bytes_of
from .conditioning import arguments_of, flatten, rebuild, varies
from .engine.call import Seeds, seeds_on
from .engine.job import Job
from .engine.loops import BAD_OUTPUT, Written, output_problem, watch
from .engine.places import places_spec
from .engine.run import Run, spec_of
from .guidance import CFG, UNGUIDED, guided_rows
from .plans import PackedRow, Plan

Network = Any


class Batcher:
    """B places that samples of different plans share, one network call a step.

    Args:
        network: A network, as `Sampler` takes it. It is called on all B places, whoever is in them,
            so what it returns for one place must not depend on the others.
        plans: The plans that requests choose from, of one prediction and without extra registers.
        shape: Shape of the whole batch, [B, ...].
        cond: An example of the conditioning, as `Sampler.__call__` takes it, with B entries a
            tensor. It says the structure, and fills the places that are empty.
        guidance: `fastdiff.CFG` with a number for its scale, or None.
        dtype: Dtype of the state, float32 or float64.
        device: Where the registers lie.
        backend: A backend's name, as `Sampler` takes it.
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
        plans = (plans,) if isinstance(plans, Plan) else plans
        if not isinstance(plans, Sequence):
            raise TypeError(f"Batcher: plans are fastdiff.Plan, at least one; got {plans!r}.")
        plans = tuple(plans)
        check_request(network, plans, guidance, dtype)
        if not (isinstance(shape, Sequence) and all(isinstance(n, int) for n in shape)):
            raise TypeError(f"Batcher: shape is [B, ...], a sequence of integers; got {shape!r}.")
        shape = torch.Size(shape)
        if len(shape) == 0 or min(shape) < 1:
            raise ValueError(f"Batcher: shape is [B, ...], all at least 1; got {tuple(shape)}.")
        self._plans = plans
        self._job = Job(network, plans[0], guidance or UNGUIDED, backend)
        self._graph = graph_of(graph)
        like = torch.empty((0, *shape[1:]), dtype=dtype, device=device)
        self._run = self._place(shape, like)
        conditioning.check(cond, shape[0])
        self._cond = self._job.guidance.conditions(cond, shape[0])
        if varies(self._cond):
            raise NotImplementedError(
                "Batcher: places stand at different stages; got a PerStage. Give the conditioning "
                "of a sample as a whole."
            )
        self._described, leaves = described(self._cond)
        with torch.inference_mode(False):
            self._held = [leaf.detach().clone() for leaf, _ in leaves]
        self._per_sample = [per_sample for _, per_sample in leaves]
        self._left = [0] * shape[0]  # stages that each place still has to run; 0: empty
        self._torn = False  # whether a step was broken off, so that places may be half moved
        self._captures = self._captures_on(like)

    def _captures_on(self, like: torch.Tensor) -> Captures | None:
        device, backend = like.device, self._job.kind(like)[3]
        if self._graph is not None and self._graph.mode == "auto":
            captured = device.type in CAPTURERS and capturable(backend)
            self._graph = self._graph if captured else None
        if self._graph is None:
            return None
        if self._graph.mode == "loop":
            raise ValueError('Batcher: one stage is captured; graph is "stage", "auto" or None.')
        if device.type not in CAPTURERS:
            raise ValueError(
                f"Batcher: graphs are captured on {', '.join(CAPTURERS)}; got device {device}. "
                "Use graph=None."
            )
        check_capturable(backend)
        return Captures(self._graph, CAPTURERS[device.type], device)

    def _place(self, shape: torch.Size, like: torch.Tensor) -> Run:
        """The run of all places. Row 0 does nothing: a place without a sample stands there."""
        guidance, kind = self._job.guidance, self._job.kind(like)
        specs = [spec_of(plan, guidance, shape, kind) for plan in self._plans]
        rows, times, following = [PackedRow(k=(0.0,) * guidance.branches)], [0.0], [0]
        self._first = []
        for plan in self._plans:
            begin = len(rows)
            rows += guided_rows(guidance, plan, shape[0])
            times += [stage.model_time for stage in plan.stages]
            following += [*range(begin + 1, begin + len(plan.stages)), 0]
            self._first.append(begin)
        run = Run(places_spec(specs, rows))
        run.write(rows)
        run.write_times(times)
        for register in run.live():
            register.zero_()
        assert run.registers.m is not None
        run.registers.m.zero_()
        device = run.spec.device
        with torch.inference_mode(False):
            self._following = torch.tensor(following, device=device)
            self._next = torch.zeros(shape[0], dtype=torch.int64, device=device)
            self._t = torch.zeros(
                (guidance.branches, shape[0]), dtype=run.times.dtype, device=device
            )
            # the times of one branch, where a place finds its own by its row
            self._times = run.times[:, 0].clone()
        return run

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
            ValueError, TypeError: An argument is not what it has to be; nothing is changed then.
            RuntimeError: All places are taken.
        """
        registers = self._run.registers
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
        self._check_numbers(x)
        seeds = None if seed is None else seeds_on(self._run.spec.device, seed, 1)
        conditioning.check(cond, 1)
        description, leaves = described(self._job.guidance.conditions(cond, 1))
        pairs = zip(self._held, leaves, strict=False)
        if description != self._described or not all(
            per_sample or held is leaf or torch.equal(held, leaf)
            for held, (leaf, per_sample) in pairs
        ):
            raise ValueError(
                "Batcher: a sample's conditioning has the structure, dtypes and numbers of the "
                f"example, and the same tensors inside tuples and lists; got {cond!r}."
            )
        check_outside(self._run.spec.device, "Batcher: add() counts places")
        place = self._left.index(0)
        self._run.follow()
        with torch.no_grad():
            self._seat(place, x, chosen, seeds)
            branches = self._job.guidance.branches
            for held, (leaf, _), per_sample in zip(
                self._held, leaves, self._per_sample, strict=True
            ):
                if per_sample:
                    shape = held.shape[1:]
                    held.view(branches, -1, *shape)[:, place] = leaf.view(-1, *shape)
            assert self._run.index is not None
            self._run.index[place] = self._first[plan]
        self._left[place] = len(chosen.stages)
        return place

    def _check_numbers(self, x: torch.Tensor) -> None:
        if not x.dtype.is_floating_point:
            raise TypeError(
                f"Batcher: x is real and floating; got {x.dtype}. Convert it, e.g. x.float()."
            )
        if x.device.type == "cpu" and not bool(torch.isfinite(x).all()):
            raise ValueError("Batcher: x is finite; got NaN or infinity in it.")

    def _seat(self, place: int, x: torch.Tensor, plan: Plan, seeds: torch.Tensor | None) -> None:
        """Puts a sample's state, first input and seed into a place."""
        registers, branches = self._run.registers, self._job.guidance.branches
        m = registers.m
        assert m is not None
        registers.x[place].copy_(x)
        first = registers.x[place].mul(plan.stages[0].c_in)
        m.view(branches, -1, *m.shape[1:])[:, place] = first.to(m.dtype)
        if seeds is not None and registers.seeds is not None:
            registers.seeds[place : place + 1].copy_(seeds, non_blocking=True)

    def step(self) -> dict[int, torch.Tensor]:
        """Moves every sample by one stage.

        Returns:
            The samples that are done, by their places, which are free again.

        Raises:
            RuntimeError: There is no sample, the network cannot be captured, or a step before was
                broken off after it had changed something.
        """
        if self._torn:
            raise RuntimeError(
                "Batcher: a step was broken off half way (the network wrote to its input, or was "
                "interrupted), and its samples are lost; got another step. Make a new Batcher."
            )
        if not any(self._left):
            raise RuntimeError("Batcher: there is no sample to move. Call add() first.")
        check_outside(self._run.spec.device, "Batcher: step() counts places")
        self._run.follow()
        self._torn = True
        with torch.no_grad():
            if self._captures is None:
                self._move()
            else:
                self._replay(self._captures)
            done = [place for place, left in enumerate(self._left) if left == 1]
            samples = {place: self._run.registers.x[place].clone() for place in done}
        self._left = [max(left - 1, 0) for left in self._left]
        self._torn = False
        return samples

    def stats(self) -> Stats:
        """Counts of captures, replays and evictions, and the memory held; see `Sampler.stats`."""
        return Stats() if self._captures is None else self._captures.stats()

    def __reduce__(self) -> Any:
        raise TypeError(
            "Batcher: registers and captured stages belong to one batcher in one process. Make "
            "another one of the same network and plans."
        )

    # -- one stage -------------------------------------------------------------------------------

    def _cond_of(self) -> Any:
        return rebuild(self._cond, iter(self._held))

    def _move(self) -> None:
        """Moves every sample eagerly; those that a network wrote to are given up."""
        try:
            self._advance(self._cond_of())
        except Written as error:
            assert self._run.index is not None
            self._run.index.zero_()
            self._left = [0] * len(self._left)
            self._torn = False
            given = self._run.registers.m
            assert given is not None
            given.grad = None
            raise Written(f"{error} The samples are given up: add them again.") from None

    def _advance(self, cond: Any) -> None:
        run, index = self._run, self._run.index
        assert index is not None
        torch.index_select(self._times, 0, index, out=self._t[0])
        for branch in self._t[1:]:
            branch.copy_(self._t[0])
        arguments, keywords = arguments_of(cond)
        given, time = run.registers.m, self._t.view(-1)
        assert given is not None
        before = watch(given)
        try:
            output = self._job.network(given, time, *arguments, **keywords)
        except BaseException:
            self._torn = watch(given) != before
            raise
        if watch(given) != before or given.grad is not None:
            raise Written(
                "Batcher: the network wrote to its input in place, or left a gradient in it, which "
                "is the batcher's own memory. Let it work on a copy (x = x.clone())."
            )
        try:
            run.row(0, output, measured=run.spec.scalars > 0)
        except BAD_OUTPUT as error:
            problem = output_problem(output, given)
            if problem is None:
                raise
            self._torn = False  # a stage that refuses an output has written nothing
            raise type(error)(f"Batcher: {problem}") from None
        torch.index_select(self._following, 0, index, out=self._next)
        index.copy_(self._next)

    def _replay(self, captures: Captures) -> None:
        key = captures.environment()
        entry = captures.get(key)
        if entry is not None:
            with captures.turn(entry):
                captures.launch(entry)
            return
        run = self._run
        held = [t for t in (*run.live(), run.registers.m, run.index) if t is not None]
        kept = [(t, t.clone()) for t in held]

        def restore() -> None:
            for tensor, value in kept:
                tensor.copy_(value)

        def run_through(step: Callable[[Any], None]) -> None:
            restore()
            step(None)

        body = functools.partial(self._advance, self._cond_of())
        try:
            done = False
            while not done:
                entry = Entry(self, bytes_of(held))
                bodies = {None: body}
                captures.capture(
                    bodies, run_through, lambda: run.registers.x, entry, self._job.network
                )
                done = captures.add(key, entry)
        except BaseException:
            restore()  # no sample has moved
            self._torn = False
            raise


def check_request(network: Any, plans: tuple[Any, ...], guidance: Any, dtype: torch.dtype) -> None:
    """Raises unless these plans can share places."""
    if not callable(network):
        raise TypeError(f"Batcher: network is callable as network(x, t); got {network!r}.")
    if not plans or not all(isinstance(plan, Plan) for plan in plans):
        raise TypeError(f"Batcher: plans are fastdiff.Plan, at least one; got {plans!r}.")
    for plan in plans:
        if plan.prediction != plans[0].prediction or plan.extras:
            raise ValueError(
                "Batcher: plans have one prediction and no extra registers; got "
                f"{plan.prediction!r} beside {plans[0].prediction!r}, {plan.extras} extras."
            )
    if guidance is not None and (
        not isinstance(guidance, CFG) or not isinstance(guidance.scale, float)
    ):
        raise ValueError(
            "Batcher: guidance is a fastdiff.CFG with a number for its scale, or None; got "
            f"{guidance!r}."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Batcher: dtype is torch.float32 or torch.float64; got {dtype}.")


def described(cond: Any) -> Any:
    """The description and the tensors of a conditioning; see `conditioning.flatten`.

    Raises:
        TypeError: The conditioning holds what places cannot share.
    """
    try:
        return flatten(cond)
    except TypeError:
        raise TypeError(
            "Batcher: conditioning is tensors, numbers and strings in dicts, lists and tuples, "
            f"so that places can share one call; got {cond!r}."
        ) from None
