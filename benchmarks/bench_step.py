# SPDX-License-Identifier: Apache-2.0
"""Microseconds a solver takes per step, beside its rivals, and its share of the copy bandwidth.

Small states: the time of a whole call of `fd.Sampler` on a network that returns a tensor made
beforehand, over its steps; everything between the call and the result counts. diffusers' time is
that of `scheduler.step` over the same loop. Large state: the time between two network calls,
which is one stage, against the time of a copy in the same run.

    python benchmarks/bench_step.py --out benchmarks/results/step.jsonl --docs docs/performance.md
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import torch
from harness import Record, Rival

import fastdiff as fd

SHAPES = ((64, 16), (1, 4, 64, 64), (1, 16, 128, 128))
TWO_M, DEIS, NOISE = "fastdiff dpmpp-2m", "fastdiff deis-3", "fastdiff ddim, eta = 1"
BFLOAT16 = "fastdiff dpmpp-2m, bfloat16 network"
THEIR_2M, THEIR_SDE = "diffusers DPM++2M", "diffusers DPM++2M-SDE"
THEIR_DEIS = "diffusers DEIS order 3"
HOISTED, FOLDED, INDUCTOR = "eager 2M, hoisted", "eager 2M, hoisted, 4 kernels", "inductor 2M"
COPY, IN_PLACE = "copy_", "mul_, in place"


@dataclass(frozen=True)
class Target:
    """Ours takes at most 1/`times` of `rival` at `shapes`."""

    ours: str
    rival: str
    times: float
    shapes: tuple[tuple[int, ...], ...]


TARGETS = (
    Target(TWO_M, THEIR_2M, 30.0, SHAPES[:2]),
    Target(DEIS, THEIR_DEIS, 150.0, SHAPES[:2]),
    Target(TWO_M, THEIR_2M, 9.0, SHAPES[2:]),
    Target(TWO_M, HOISTED, 3.0, SHAPES[2:]),
    Target(TWO_M, FOLDED, 3.0, SHAPES[2:]),
    Target(NOISE, THEIR_SDE, 6.0, SHAPES[2:]),
)
COPY_SHARE = 0.9


# -- the rivals ------------------------------------------------------------------------------------


class Feed:
    """A network that costs nothing: it returns tensors made beforehand, in turn."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self.outputs = outputs
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


def _constant(output: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda x, t: output


def schedulers(steps: int) -> dict[str, Any]:
    """diffusers' schedulers, on the schedule of Stable Diffusion, with their times set."""
    import diffusers

    betas = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "lower_order_final": False,
    }
    multistep = {**betas, "solver_order": 2, "final_sigmas_type": "sigma_min"}
    made: dict[str, Any] = {
        THEIR_2M: diffusers.DPMSolverMultistepScheduler(**multistep),
        THEIR_SDE: diffusers.DPMSolverMultistepScheduler(
            **multistep, algorithm_type="sde-dpmsolver++"
        ),
        THEIR_DEIS: diffusers.DEISMultistepScheduler(**betas, solver_order=3),
    }
    for scheduler in made.values():
        scheduler.set_timesteps(steps)
    return made


def grid(steps: int) -> list[float]:
    """The times that the schedulers step through, in `VPDiscrete`'s units."""
    index = np.linspace(0, 999, steps + 1).round()[::-1]
    return [*((index[:-1] + 1.0) / 1000.0).tolist(), 1e-3]


def plan(solver: str, steps: int, **options: Any) -> fd.Plan:
    """Our plan over the schedulers' times."""
    schedule = fd.schedules.VPDiscrete.scaled_linear()
    return fd.plan(schedule, solver, steps, grid=grid(steps), **options)


def plans(steps: int) -> dict[str, fd.Plan]:
    two_m = plan("dpmpp-2m", steps, lower_order_final=False)
    return {
        TWO_M: two_m,
        BFLOAT16: two_m,
        DEIS: plan("deis-3", steps),
        NOISE: plan("ddim", steps, eta=1.0),
    }


def their_loop(
    scheduler: Any, network: Callable[..., torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


class Hoisted:
    """DPM++2M as one would write it in eager torch: floats made beforehand, no new tensors.

    Args:
        plan: Rows of dpmpp-2m, from which the coefficients come.
        folded: Four kernels a step instead of five: the history keeps h/p, so that making it is
            one `torch.add`.
        compiled: The step goes through `torch.compile`, with its coefficients in a tensor.
    """

    def __init__(
        self, plan: fd.Plan, shape: Sequence[int], *, folded: bool = False, compiled: bool = False
    ) -> None:
        self.x, self.h, self.past = (torch.zeros(tuple(shape)) for _ in range(3))
        self.rows = []
        last_p = 1.0
        for stage in plan.stages:
            b_0, b_1 = (*stage.b, 0.0)[:2]
            p, q = stage.p, stage.q
            row = (1.0, q / p, stage.a_x, b_0 * p, b_1 * last_p) if folded else ()
            self.rows.append(row or (p, q, stage.a_x, b_0, b_1))
            last_p = p
        self.step = self._folded if folded else self._plain
        if compiled:
            self.rows = [torch.tensor(row) for row in self.rows]  # type: ignore[misc]
            self.step = torch.compile(_fused)

    def __call__(self, network: Callable[..., torch.Tensor], start: torch.Tensor) -> torch.Tensor:
        x, h, past, step = self.x, self.h, self.past, self.step
        x.copy_(start)
        for row in self.rows:
            step(x, network(x, x), h, past, row)
            h, past = past, h
        return x

    @staticmethod
    def _plain(x: torch.Tensor, out: torch.Tensor, h: Any, past: Any, row: Any) -> None:
        p, q, a, b_0, b_1 = row
        torch.mul(x, p, out=h)
        h.add_(out, alpha=q)
        x.mul_(a).add_(h, alpha=b_0).add_(past, alpha=b_1)

    @staticmethod
    def _folded(x: torch.Tensor, out: torch.Tensor, h: Any, past: Any, row: Any) -> None:
        _, q, a, b_0, b_1 = row
        torch.add(x, out, alpha=q, out=h)
        x.mul_(a).add_(h, alpha=b_0).add_(past, alpha=b_1)


def _fused(x: torch.Tensor, out: torch.Tensor, h: Any, past: Any, row: Any) -> None:
    p, q, a, b_0, b_1 = row.unbind()
    new = p * x + q * out
    h.copy_(new)
    x.copy_(a * x + b_0 * new + b_1 * past)


# -- the gate --------------------------------------------------------------------------------------


def gate(steps: int, compiled: bool) -> None:
    """Ours, diffusers' and the eager loops end in the same place, on outputs that differ.

    Raises:
        harness.GateError: Two of them do not.
    """
    shape = (3, 4, 5)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    outputs = [torch.randn(shape, generator=generator) for _ in range(steps)]
    theirs = schedulers(steps)
    # Coefficients in float32 and alphas_cumprod in float32: a relative 1e-5 over 20 steps.
    for name, solver in ((THEIR_2M, "dpmpp-2m"), (THEIR_DEIS, "deis-logrho-3")):
        ours = fd.sample(Feed(outputs), start, plan(solver, steps, lower_order_final=False))
        harness.agree(name, their_loop(theirs[name], Feed(outputs), start), ours, 1e-4)
    two_m = plans(steps)[TWO_M]
    wanted = fd.sample(Feed(outputs), start, two_m, backend="torch")
    harness.agree("cpu backend", fd.sample(Feed(outputs), start, two_m), wanted, 1e-5)
    kinds = [{}, {"folded": True}] + [{"compiled": True}] * compiled
    for kind in kinds:
        loop = Hoisted(two_m, shape, **kind)
        harness.agree(f"eager 2M {kind}", loop(Feed(outputs), start), wanted, 1e-5)


# -- small states ----------------------------------------------------------------------------------


def small_rivals(shape: tuple[int, ...], steps: int, compiled: bool) -> list[Rival]:
    start, output = torch.randn(shape), torch.randn(shape)
    network = _constant(output)
    rivals = []
    for name, scheduler in schedulers(steps).items():

        def run(scheduler: Any = scheduler) -> None:
            their_loop(scheduler, network, start)

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
        fed = _constant(output.bfloat16()) if narrow else network
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


def small(
    shapes: Sequence[tuple[int, ...]], steps: int, seconds: float, rounds: int, compiled: bool
) -> list[Record]:
    records = []
    for shape in shapes:
        timings = harness.race(small_rivals(shape, steps, compiled), seconds=seconds, rounds=rounds)
        for name, timing in timings.items():
            kind = {"shape": list(shape), "dtype": "float32", "steps": steps}
            records.append(harness.record("step", name, timing, **kind))
    return records


# -- a large state ---------------------------------------------------------------------------------


def large(mebibytes: float, rounds: int) -> list[Record]:
    """Bytes moved per second by stages of full order, beside a copy's.

    Registers are `mebibytes` each, and the network's outputs and the copied tensors rotate, so that
    nothing is found in a cache. Rounds of a loop and of copies alternate.
    """
    numel = int(mebibytes * 2**20) // 4
    start = torch.randn(1, numel)
    outputs = [torch.randn(1, numel) for _ in range(3)]
    targets = [torch.empty(1, numel) for _ in range(2)]
    steps = 8
    cases = {
        TWO_M: plan("dpmpp-2m", steps, lower_order_final=False),
        DEIS: plan("deis-3", steps),
        "fastdiff ddim": plan("ddim", steps),
        NOISE: plan("ddim", steps, eta=1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (COPY, IN_PLACE, *cases)}
    moved = dict.fromkeys((COPY, IN_PLACE), 2 * numel * 4)
    samplers = {}
    for name, its_plan in cases.items():
        network = _Clock(outputs)
        samplers[name] = (fd.Sampler(network, its_plan), network)
        moved[name] = harness.stage_bytes(its_plan, steps // 2, numel)
        warm = range(2, steps)  # rows of full order, after two that warm up
        assert all(harness.stage_bytes(its_plan, row, numel) == moved[name] for row in warm[:-1])
    for count in range(-1, rounds):
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
    copy = harness.summary(seconds[COPY])
    for name, taken in seconds.items():
        timing = harness.summary(taken)
        kind = {"shape": [1, numel], "dtype": "float32", "moved": moved[name]}
        records.append(harness.record("step-large", name, timing, **kind))
        for key in ("best", "median"):
            ours, copied = (moved[k] / getattr(t, key) for k, t in ((name, timing), (COPY, copy)))
            suffix = "" if key == "best" else "_median"
            records[-1]["bandwidth" + suffix] = round(ours / 1e9, 3)
            records[-1]["share" + suffix] = round(ours / copied, 4)
    return records


class _Clock(Feed):
    """Notes when it is entered and left: between two calls lies one stage."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        super().__init__(outputs)
        self.entered: list[float] = []
        self.left: list[float] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.entered.append(time.perf_counter())
        output = super().__call__(x, t)
        self.left.append(time.perf_counter())
        return output


# -- reports ---------------------------------------------------------------------------------------


def _shape(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def small_report(records: Sequence[Record]) -> str:
    """Times by shape, `best / median (p20 to p80)`, then every target beside its ratio."""
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in records))
    by = {(r["rival"], tuple(r["shape"])): r for r in records}
    names = list(dict.fromkeys(r["rival"] for r in records))
    n = harness.number

    def cell(name: str, shape: tuple[int, ...]) -> str:
        r = by[name, shape]
        return f"{n(r['best'])} / {n(r['median'])} ({n(r['p20'])} to {n(r['p80'])})"

    rows = [[name, *(cell(name, shape) for shape in shapes)] for name in names]
    head = ["us a step: best / median (p20 to p80)", *map(_shape, shapes)]
    lines = [harness.table(head, rows), ""]
    rows = []
    for target in TARGETS:
        for shape in target.shapes:
            if (target.ours, shape) not in by:
                continue
            ours, rival = by[target.ours, shape], by[target.rival, shape]
            ratios = [rival[k] / ours[k] for k in ("best", "median")]
            row = [f"{target.ours} against {target.rival}", _shape(shape)]
            row += [f"1/{n(r)}" for r in ratios]
            rows.append([*row, f"1/{target.times:.0f}", _verdict(ratios, target.times)])
    head = ["time of ours over the rival's", "shape", "best", "median", "target", ""]
    if rows:
        lines.append(harness.table(head, rows))
    return "\n".join(lines)


def large_report(records: Sequence[Record]) -> str:
    """Bandwidths and their share of the copy's, best of best and median of median."""
    rows = []
    for r in records:
        shares = [r["share"], r["share_median"]]
        verdict = _verdict(shares, COPY_SHARE) if r["rival"].startswith("fastdiff") else ""
        registers = f"{r['moved'] / 4 / r['shape'][1]:.0f}"
        row = [r["rival"], str(r["threads"]), registers]
        row += [f"{harness.number(r[k] / 1e3)}" for k in ("best", "median")]
        row += [harness.number(r["bandwidth"]), " / ".join(f"{share:.2f}" for share in shares)]
        rows.append([*row, verdict])
    head = ["a stage", "threads", "registers moved", "best, ms", "median, ms", "GB/s, best"]
    return harness.table([*head, "share of copy_, best / median", f"target {COPY_SHARE}"], rows)


def _verdict(values: Sequence[float], target: float) -> str:
    reached = [value >= target for value in values]
    return "met" if all(reached) else "met by one of the two" if any(reached) else "not met"


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", multiple=True, help="Such as 1,4,64,64; again for more.")
@click.option("--steps", default=20, type=click.IntRange(min=4), help="Of the loop.")
@click.option("--seconds", default=6.0, help="For each shape and number of threads.")
@click.option("--rounds", default=20, type=click.IntRange(min=1), help="At least.")
@click.option("--threads", multiple=True, type=int, default=(1,), help="For small states.")
@click.option("--compile", "compiled", is_flag=True, help="Inductor as well (needs a compiler).")
@click.option("--large", "mebibytes", default=64.0, help="MiB a register; 0: leave it out.")
@click.option("--large-threads", multiple=True, type=int, default=(1, 2))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(
    shapes: tuple[str, ...],
    steps: int,
    seconds: float,
    rounds: int,
    threads: tuple[int, ...],
    compiled: bool,
    mebibytes: float,
    large_threads: tuple[int, ...],
    out: Path | None,
    docs: Path | None,
) -> None:
    """Solver time a step, beside diffusers, eager torch and inductor; share of a copy's speed."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    records: list[Record] = []
    chosen = [tuple(map(int, shape.split(","))) for shape in shapes] or list(SHAPES)
    parts = [harness.where()]
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            gate(steps, compiled)
            for count in threads:
                torch.set_num_threads(count)
                found = small(chosen, steps, seconds, rounds, compiled)
                records += found
                title = f"{count} thread{'s' * (count > 1)}, float32, {steps} steps"
                parts += [f"**Small states, {title}**", small_report(found)]
            found = []
            for count in large_threads if mebibytes else ():
                torch.set_num_threads(count)
                found += large(mebibytes, rounds)
            if found:
                records += found
                parts += [f"**Registers of {mebibytes:g} MiB, float32**", large_report(found)]
    finally:
        torch.set_num_threads(before)
    text = "\n\n".join(parts)
    click.echo(text)
    if out is not None:
        harness.write(out, records)
    if docs is not None:
        harness.replace_section(docs, "step", text)


if __name__ == "__main__":
    main()
