# SPDX-License-Identifier: Apache-2.0
"""Microseconds a solver takes per step, beside its rivals, and its share of the copy bandwidth.

Small states: the time of a whole call of `fd.Sampler` on a network that returns a tensor made
beforehand, over its steps; everything between the call and the result counts. diffusers' time is
that of `scheduler.step` over the same loop. Large state: the time between two network calls,
which is one stage, against the time of a copy in the same run.

    python benchmarks/run.py step --compile --out benchmarks/results/step.jsonl
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import click
import torch
from command import option
from reports import step as report
from reports.step import (
    BFLOAT16,
    COPY,
    DEIS,
    FOLDED,
    HOISTED,
    IN_PLACE,
    INDUCTOR,
    NOISE,
    SHAPES,
    TWO_M,
)
from rivals import diffusers
from rivals.eager import Hoisted

import fastdiff as fd
from fastdiff.bench.gate import agree
from fastdiff.bench.networks import Feed, constant
from fastdiff.bench.problems import plan_on_training_times
from fastdiff.bench.records import Record, record
from fastdiff.bench.runs import Bench, Gate, Job, Setting
from fastdiff.bench.timing import Rival, race, summary
from fastdiff.bench.traffic import stage_bytes


def plans(steps: int) -> dict[str, fd.Plan]:
    two_m = plan_on_training_times("dpmpp-2m", steps, lower_order_final=False)
    return {
        TWO_M: two_m,
        BFLOAT16: two_m,
        DEIS: plan_on_training_times("deis-3", steps),
        NOISE: plan_on_training_times("ddim", steps, eta=1.0),
    }


# -- the gate --------------------------------------------------------------------------------------


@torch.no_grad()
def gate(steps: int, compiled: bool) -> None:
    """Checks that ours, diffusers' and the eager loops end in one place, on outputs that differ.

    Raises:
        GateError: Two of them do not.
    """
    shape = (3, 4, 5)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    outputs = [torch.randn(shape, generator=generator) for _ in range(steps)]
    theirs = diffusers.schedulers(steps)
    # diffusers' coefficients and alphas are float32, which is a relative 1e-5 over 20 steps.
    for name, solver in ((diffusers.TWO_M, "dpmpp-2m"), (diffusers.DEIS, "deis-logrho-3")):
        ours = fd.sample(
            Feed(outputs), start, plan_on_training_times(solver, steps, lower_order_final=False)
        )
        agree(name, diffusers.run_loop(theirs[name], Feed(outputs), start), ours, 1e-4)
    two_m = plans(steps)[TWO_M]
    wanted = fd.sample(Feed(outputs), start, two_m, backend="torch")
    agree("cpu backend", fd.sample(Feed(outputs), start, two_m), wanted, 1e-5)
    kinds = [{}, {"folded": True}] + [{"compiled": True}] * compiled
    for kind in kinds:
        loop = Hoisted(two_m, shape, **kind)
        agree(f"eager 2M {kind}", loop(Feed(outputs), start), wanted, 1e-5)


# -- small states ----------------------------------------------------------------------------------


def small_rivals(shape: tuple[int, ...], steps: int, compiled: bool) -> list[Rival]:
    start, output = torch.randn(shape), torch.randn(shape)
    network = constant(output)
    rivals = []
    for name, scheduler in diffusers.schedulers(steps).items():

        def run(scheduler: Any = scheduler) -> None:
            diffusers.run_loop(scheduler, network, start)

        def setup(scheduler: Any = scheduler) -> None:
            scheduler.set_timesteps(steps)

        rivals.append(Rival(name, run, steps, setup))
    ours = plans(steps)
    loops = {HOISTED: Hoisted(ours[TWO_M], shape)}
    loops[FOLDED] = Hoisted(ours[TWO_M], shape, folded=True)
    if compiled:
        loops[INDUCTOR] = Hoisted(ours[TWO_M], shape, compiled=True)
    for name, loop in loops.items():
        rivals.append(Rival(name, functools.partial(loop, network, start), steps))
    for name, its_plan in ours.items():
        narrow = name == BFLOAT16
        dtype = torch.bfloat16 if narrow else None
        fed = constant(output.bfloat16()) if narrow else network
        sampler = fd.Sampler(fed, its_plan, dtype=dtype)
        seed = 0 if its_plan.stochastic else None
        out = torch.empty(shape)

        def sample(sampler: Any = sampler, seed: Any = seed, out: Any = out) -> None:
            sampler(start, seed=seed, out=out)

        rivals.append(Rival(name, sample, steps))
    target = torch.empty(shape)
    rivals.append(Rival(COPY, lambda: [target.copy_(start) for _ in range(steps)], steps))
    rivals.append(Rival(IN_PLACE, lambda: [target.mul_(1.0) for _ in range(steps)], steps))
    return rivals


@torch.no_grad()
def small(
    shape: tuple[int, ...], setting: Setting, lost: list[str], *, steps: int, compiled: bool
) -> list[Record]:
    """Microseconds a step of every rival on one shape."""
    rivals = small_rivals(shape, steps, compiled)
    timings = race(rivals, seconds=setting.seconds, rounds=setting.rounds)
    kind = {"shape": list(shape), "dtype": "float32", "steps": steps}
    return [
        record("step", name, timing, **kind, **setting.commit) for name, timing in timings.items()
    ]


# -- a large state ---------------------------------------------------------------------------------


@torch.no_grad()
def large(mebibytes: float, setting: Setting, lost: list[str]) -> list[Record]:
    """Measures the bytes that stages of full order move per second, beside a copy's.

    Registers are `mebibytes` each, and the network's outputs and the copied tensors rotate, so that
    nothing is found in a cache. Rounds of a loop and of copies alternate.
    """
    numel = int(mebibytes * 2**20) // 4
    start = torch.randn(1, numel)
    outputs = [torch.randn(1, numel) for _ in range(3)]
    targets = [torch.empty(1, numel) for _ in range(2)]
    steps = 8
    cases = {
        TWO_M: plan_on_training_times("dpmpp-2m", steps, lower_order_final=False),
        DEIS: plan_on_training_times("deis-3", steps),
        "fastdiff ddim": plan_on_training_times("ddim", steps),
        NOISE: plan_on_training_times("ddim", steps, eta=1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (COPY, IN_PLACE, *cases)}
    moved = dict.fromkeys((COPY, IN_PLACE), 2 * numel * 4)
    samplers = {}
    for name, its_plan in cases.items():
        network = Clock(outputs)
        samplers[name] = (fd.Sampler(network, its_plan), network)
        moved[name] = stage_bytes(its_plan, steps // 2, numel)
        warm = range(2, steps)  # rows of full order, after two that warm up
        assert all(stage_bytes(its_plan, row, numel) == moved[name] for row in warm[:-1])
    for count in range(-1, setting.rounds):
        for name, (sampler, network) in samplers.items():
            for k in range(4):
                begin = time.perf_counter()
                targets[k % 2].copy_(outputs[k % 3])
                middle = time.perf_counter()
                outputs[(k + 1) % 3].mul_(1.0)
                if count >= 0:
                    seconds[COPY].append(middle - begin)
                    seconds[IN_PLACE].append(time.perf_counter() - middle)
            network.left.clear()
            network.entered.clear()
            sampler(start, seed=0 if sampler.plan.stochastic else None, out=targets[0])
            if count >= 0:
                stages = zip(network.left[:-1], network.entered[1:], strict=True)
                seconds[name] += [after - before for before, after in stages][2:]
    records = []
    copy = summary(seconds[COPY])
    for name, taken in seconds.items():
        timing = summary(taken)
        kind = {"shape": [1, numel], "dtype": "float32", "moved": moved[name]}
        records.append(record("step-large", name, timing, **kind, **setting.commit))
        for key in ("best", "median"):
            ours, copied = (moved[k] / getattr(t, key) for k, t in ((name, timing), (COPY, copy)))
            suffix = "" if key == "best" else "_median"
            records[-1]["bandwidth" + suffix] = round(ours / 1e9, 3)
            records[-1]["share" + suffix] = round(ours / copied, 4)
    return records


class Clock(Feed):
    """A network that notes when it is entered and left: between two calls lies one stage."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        super().__init__(outputs)
        self.entered: list[float] = []
        self.left: list[float] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.entered.append(time.perf_counter())
        output = super().__call__(x, t)
        self.left.append(time.perf_counter())
        return output


def shape_of(context: Any, parameter: Any, values: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """A callback: "1,4,64,64" is (1, 4, 64, 64)."""
    try:
        return tuple(tuple(map(int, value.split(","))) for value in values)
    except ValueError:
        raise click.BadParameter(f"shapes such as 1,4,64,64; got {', '.join(values)}.") from None


def jobs(
    setting: Setting,
    *,
    shapes: Sequence[tuple[int, ...]],
    steps: int,
    compiled: bool,
    mebibytes: float,
    large_threads: Sequence[int],
) -> list[Job]:
    """A job for every shape, then one for every number of threads on the large state."""
    checked = Gate("rivals", functools.partial(gate, steps, compiled))
    options: dict[str, Any] = {"steps": steps, "compiled": compiled}
    found = [
        Job(f"small state {list(s)}", functools.partial(small, s, setting, **options), checked)
        for s in shapes or SHAPES
    ]
    for count in large_threads if mebibytes else ():
        measure = functools.partial(large, mebibytes, setting)
        name = f"registers of {mebibytes:g} MiB, {count} threads"
        found.append(Job(name, measure, checked, threads=count))
    return found


BENCH = Bench(
    "step",
    "Solver time a step, beside diffusers, eager PyTorch and inductor; share of a copy's speed.",
    jobs,
    report.page,
    options=(
        option(
            *("--shape", "shapes"),
            multiple=True,
            callback=shape_of,
            help="Such as 1,4,64,64; it may be repeated.",
        ),
        option("--steps", default=20, type=click.IntRange(min=4), help="Steps of the loop."),
        option("--compile", "compiled", is_flag=True, help="Time inductor too."),
        option("--large", "mebibytes", default=64.0, help="MiB a register; 0 leaves it out."),
        option("--large-threads", multiple=True, type=int, default=(1, 2)),
    ),
    rounds=20,
    seconds=6.0,
)
