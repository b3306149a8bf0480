# SPDX-License-Identifier: Apache-2.0
"""Whole loops: our rivals, how they are checked, and how a step of them is timed.

The same number of calls of the network alone takes turns with the loops: what a rival takes beyond
it is the sampler's. Execution is timed, not enqueueing, in two ways on CUDA: waiting after every
loop, as one who needs the sample does, and after a queue of loops.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import fastdiff as fd

from .captured import capture, replay_alone
from .gate import agree
from .problems import Case, Loop, Parts
from .records import Record, record
from .runs import Setting
from .text import reason
from .timing import Rival, Timing, executed, race, wait

EAGER, STAGE, LOOP = "fastdiff eager", "fastdiff, stage graph", "fastdiff, loop graph"
REPLAY = "fastdiff, loop graph, its replay alone"
NETWORK, CAPTURED = "network alone", "network alone, calls in one graph"
WAITED, QUEUED = "waited", "queued"

Makers = dict[str, Callable[[], Loop]]


@dataclass(frozen=True)
class How:
    """How our loops run, beside the case.

    Attributes:
        backend: By name; None for the one that serves best.
        guidance: Of the network's branches; None for one branch.
    """

    backend: str | None = None
    guidance: fd.guidance.Guidance | None = None


def ours(parts: Parts, graph: str | None, network: Any = None, how: How = How()) -> Loop:
    """A call of `fastdiff.Sampler`, which writes to one tensor."""
    called = parts.network if network is None else network
    options: dict[str, Any] = {"backend": how.backend, "guidance": how.guidance}
    sampler = fd.Sampler(called, parts.plan, graph=graph, dtype=parts.case.dtype, **options)
    given: dict[str, Any] = {"out": torch.empty_like(parts.start)}
    if parts.plan.stochastic:
        given["seed"] = seeds_of(parts)
    return functools.partial(sampler, parts.start, parts.cond or None, **given)


def seeds_of(parts: Parts) -> torch.Tensor:
    """A seed for each sample, where a loop reads them."""
    return torch.arange(len(parts.start), device=parts.start.device)


def alone(parts: Parts, network: Any = None, branches: int = 1) -> Loop:
    """A loop of as many calls of the network, and nothing else."""
    called, cond = parts.network if network is None else network, parts.cond
    x, t = parts.start, parts.time()
    if branches > 1:
        x, t = torch.cat([x] * branches), torch.cat([t] * branches)
        cond = {name: torch.cat([value] * branches) for name, value in cond.items()}
    steps = range(len(parts.plan.stages))

    def loop() -> None:
        for _ in steps:
            called(x, t, **cond)

    return loop


def makers(parts: Parts, how: How = How()) -> Makers:
    """Functions that make our loops and the network's calls, by name; they capture where needed."""
    cuda = parts.start.device.type == "cuda"
    branches = how.guidance.branches if how.guidance is not None else 1
    found: Makers = {}
    if parts.case.kind != "null":
        found[NETWORK] = lambda: alone(parts, branches=branches)
        if cuda:
            run = alone(parts, branches=branches)
            found[CAPTURED] = lambda: functools.partial(drop, capture(run)[0], run)
    found[EAGER] = lambda: ours(parts, None, how=how)
    if cuda:
        found[STAGE] = lambda: ours(parts, "stage", how=how)
        found[LOOP] = lambda: ours(parts, "loop", how=how)
        if how == How():
            found[REPLAY] = lambda: replay_alone(parts)
    return found


def drop(run: Callable[[], Any], *keep: Any) -> None:
    """Runs, and returns nothing; what else is passed stays alive with it."""
    run()


# -- the gate --------------------------------------------------------------------------------------


def tolerance(case: Case, device: torch.device) -> float:
    """How far rivals may end from the reference.

    diffusers takes its coefficients from alphas in float32: 1e-5 over 20 steps, with a factor of
    10. Each step rounds the state, or the network's input, to the network's dtype, and cuDNN rounds
    what it convolves in float32 to TF32 (11 bits): errors that add as squares.
    """
    eps = torch.finfo(case.dtype).eps
    if device.type == "cuda" and case.kind == "conv":
        eps = 2.0**-10
    return max(1e-4, math.sqrt(case.steps) * eps)


def reference(parts: Parts, how: How = How()) -> torch.Tensor:
    """The state in which a loop on the `torch` backend ends."""
    given = (parts.network, parts.start, parts.plan)
    options: dict[str, Any] = {"guidance": how.guidance, "dtype": parts.case.dtype}
    if parts.plan.stochastic:
        options["seed"] = seeds_of(parts)
    return fd.sample(*given, cond=parts.cond or None, backend="torch", graph=None, **options)


def gate(parts: Parts, loops: Mapping[str, Loop], wanted: torch.Tensor) -> None:
    """Checks that every rival that samples ends where it should.

    Raises:
        GateError: One does not.
    """
    for name, loop in loops.items():
        for _ in range(2):  # a replay starts where the last one ended: it must not matter
            got = loop()
        if got is not None:
            who = f"{name}, {parts.case}"
            agree(who, got, wanted, tolerance(parts.case, wanted.device))


# -- timing ----------------------------------------------------------------------------------------


def running(
    parts: Parts, found: Mapping[str, Callable[[], Loop]], lost: list[str]
) -> dict[str, Loop]:
    """The loops that run here; why the others do not is added to `lost`."""
    loops: dict[str, Loop] = {}
    for name, make in found.items():
        try:
            loop = make()
            loop()  # compiles, and captures
            wait(parts.start.device)
            loops[name] = loop
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, {parts.case}: {reason(error)}")
    return loops


def timed(loops: Mapping[str, Loop], steps: int, setting: Setting) -> dict[str, dict[str, Timing]]:
    """The times of a step: waiting after every loop, and on CUDA after a queue of loops too."""
    device = setting.device
    options: dict[str, Any] = {"seconds": setting.seconds, "rounds": setting.rounds}
    options |= {"warmup": 1, "turn": 5e-3}
    rivals = [Rival(name, executed(run, 1, device), steps) for name, run in loops.items()]
    found = {WAITED: race(rivals, **options)}
    if device.type != "cuda":
        return found
    rivals = []
    for name, run in loops.items():
        count = min(64, math.ceil(1e-2 / (found[WAITED][name].median * steps)))
        if count > 1:  # one loop in a queue is one that was waited for
            rivals.append(Rival(name, executed(run, count, device), steps * count))
    found[QUEUED] = race(rivals, **options) if rivals else {}
    return found


def records_of(
    parts: Parts, timings: Mapping[str, Mapping[str, Timing]], setting: Setting, **where: Any
) -> list[Record]:
    """The times of a step as records.

    Args:
        parts: What was run.
        timings: As `timed` gives them.
        setting: How it was run.
        **where: What else tells these lines from others.
    """
    case = parts.case
    return [
        record(
            "loop",
            name,
            timing,
            network=case.kind,
            small=case.small,
            parameters=parts.parameters,
            shape=list(case.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            steps=case.steps,
            timing=kind,
            **where,
            **dict(setting.about),
        )
        for kind, found in timings.items()
        for name, timing in found.items()
    ]
