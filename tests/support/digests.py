# SPDX-License-Identifier: Apache-2.0
"""Digests of the bits that runs give, to compare two commits on one machine.

    python tests/support/digests.py record FILE [--against OTHER] [--only TEXT]

writes a JSON object from names of cases to SHA-256 digests. With `--against` the cases that differ
from those of another file are printed, and the exit status is 1 where there are any: refused on
both sides is equal, refused on one side is not, and a case that stands in one file alone is only
counted. To record another commit, run this script with that tree on PYTHONPATH.

The networks use additions, multiplications and clamps alone, each of which rounds once whatever the
compiler or the vector width, so the digests depend on fastdiff and on nothing of PyTorch's
mathematical libraries. Everything goes through the public interface; the instruction sets and the
recorder of captures are looked up by name.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import argparse
import contextlib
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fastdiff as fd

B, SHAPE, STEPS = 3, (3, 37), 4
SEEDS = [5, 2**40 + 1, 77]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

BETAS = np.linspace(1e-4, 0.02, 100)
# name: (schedule, prediction, options of the plan)
SCHEDULES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "vp-linear": (fd.schedules.VPLinear(), "v", {"t_max": 0.9}),
    "vp-cosine": (fd.schedules.VPCosine(), "epsilon", {"t_max": 0.9}),
    "vp-discrete": (fd.schedules.VPDiscrete(betas=BETAS), "epsilon", {}),
    "edm": (fd.schedules.EDM(), "edm", {}),
    "flow": (fd.schedules.FlowMatching(), "velocity", {"t_max": 0.95}),
}
# The fields of a stage whose numbers a run reads.
FIELDS = ["t", "model_time", "c_in", "p", "q", "a_x", "a_e", "b", "c", "r", "d_x", "d_e", "g"]
FIELDS += ["c_e", "s", "noise", "clip", "threshold", "evaluate"]


class Exact(torch.nn.Module):
    """A network of operations that round once."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        w = torch.randint(-64, 64, SHAPE[1:], generator=generator)
        self.w = torch.nn.Parameter((w / 64).to(dtype))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: Any = None) -> torch.Tensor:
        out = x * 0.625 - (x * 1.5 + 0.25).clamp(-1.0, 1.0) * self.w
        out = out + (t * 0.0009765625).to(x.dtype)[:, None]
        return out if y is None else out + x * y.to(x.dtype)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/128 in [-2, 2): exact in every dtype here."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-256, 256, shape, generator=generator) / 128).to(dtype)


def digest(*values: Any) -> str:
    """SHA-256 of the bits of tensors, and of the text of anything else."""
    made = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous()
            made.update(f"{value.dtype}{tuple(value.shape)}".encode())
            made.update(value.view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(value).encode())
    return made.hexdigest()


def outcome(work: Callable[[], tuple[Any, ...]]) -> str:
    """The digest of what `work` returns, or the kind of error it was refused or failed with."""
    try:
        return digest(*work())
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return f"refused: {type(error).__name__}"
    except Exception as error:  # the other cases are still worth their comparison
        return f"failed: {type(error).__name__}: {error}"


def run(plan: Any, dtype: torch.dtype, gradient: Any = None, **options: Any) -> tuple[Any, ...]:
    """A sample, and where a gradient is asked for those in x, y and w of a fixed functional."""
    state = F64 if dtype == F64 else F32
    net = Exact(dtype)
    x, y = random(SHAPE, 1, state), random(SHAPE, 2, state)
    options = {"seed": SEEDS if plan.stochastic else None, "graph": None, **options}
    if gradient is None:
        with torch.no_grad():
            return (fd.sample(net, x, plan, cond={"y": y}, dtype=dtype, **options),)
    x.requires_grad_()
    y.requires_grad_()
    out = fd.sample(net, x, plan, cond={"y": y}, dtype=dtype, gradient=gradient, **options)
    (out * random(SHAPE, 3, state)).sum().backward()
    return out, x.grad, y.grad, net.w.grad


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    core = importlib.import_module("fastdiff._native")
    before = core.instruction_set()
    core.use_instruction_set(name)
    try:
        yield
    finally:
        core.use_instruction_set(before)


def backends() -> Iterator[tuple[str, str, Any]]:
    """(name of the case, backend, context to run in)."""
    yield "torch", "torch", contextlib.nullcontext
    with contextlib.suppress(ImportError):
        core = importlib.import_module("fastdiff._native")
        for name in core.instruction_sets():
            yield f"cpu-{name}", "cpu", lambda name=name: instruction_set(name)


@contextlib.contextmanager
def recorded() -> Iterator[bool]:
    """Captures on CPU tensors by a recorder; False where this tree has no place for one."""
    from support.recorder import Recorder, capturers

    table = capturers()
    if table is None:
        yield False
        return
    before = table.get("cpu")
    table["cpu"] = Recorder()
    try:
        yield True
    finally:
        if before is None:
            del table["cpu"]
        else:
            table["cpu"] = before


def plans() -> Iterator[tuple[str, Any]]:
    """Every solver on every schedule that it takes."""
    for name, (schedule, prediction, options) in SCHEDULES.items():
        for solver in fd.solvers.names():
            with contextlib.suppress(ValueError, NotImplementedError):
                plan = fd.plan(schedule, solver, STEPS, prediction=prediction, **options)
                yield f"{name}/{solver}", plan


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Plans and options that solvers' defaults do not reach: (name, plan, options of the run)."""
    schedule = SCHEDULES["vp-linear"][0]

    def plan(solver: str, **options: Any) -> Any:
        return fd.plan(schedule, solver, STEPS, t_max=0.9, **{"prediction": "v", **options})

    def uncond() -> dict[str, Any]:
        return {"y": random(SHAPE, 4, F32)}

    scales = torch.tensor([0.5, 1.0, 3.25])
    for name in ("deis-3", "dpmpp-2s", "ddpm"):
        base = plan(name)
        stages = len(base.stages)
        yield f"cfg/{name}", base, {"guidance": fd.CFG(2.5, uncond())}
        yield f"cfg-sample/{name}", base, {"guidance": fd.CFG(scales, uncond())}
        per_stage = [1.0 + 0.5 * i for i in range(stages)]
        yield f"cfg-stage/{name}", base, {"guidance": fd.CFG(per_stage, uncond())}
    for limit in ({"clip": 1.0}, {"threshold": 0.9}):
        for name in ("ddim", "dpmpp-2m", "dpmpp-3s", "ddpm"):
            with contextlib.suppress(ValueError, TypeError):
                yield f"{next(iter(limit))}/{name}", plan(name, **limit), {}
    yield "eta/ddim", plan("ddim", eta=0.7), {}
    yield "xi/ddpm", plan("ddpm"), {"seed": None, "xi": random((STEPS, *SHAPE), 9, F32)}
    two = ((1, 0.6), (2, 0.8))
    rows = (
        fd.Stage(t=1.0, c_in=0.5, p=0.25, q=0.9, a_x=0.9, b=(0.3,), d_x=0.7, g=(0.2,), s=(0.1,)),
        fd.Stage(t=0.8, evaluate=False, d_x=0.5, d_e=0.5, c_e=0.3, noise=two),
        fd.Stage(t=0.6, c_in=1.5, a_e=0.4, b=(0.2, 0.1), r=(0.0, 0.6)),
        fd.Stage(t=0.3, a_x=0.0, b=(0.4, 0.0, -0.3), c=0.2, noise=((3, 1.0),), r=(0.3,)),
    )
    extras = (random(SHAPE, 11, F32), random(SHAPE[1:], 12, F32))
    yield "hand", fd.Plan(rows, (1.0, 0.0)), {"extras": extras}


GRADIENTS: dict[str, Any] = {
    "discrete": lambda: "discrete",
    "checkpoint": lambda: fd.Discrete(checkpoint=2),
    "adjoint": lambda: fd.AdjointDEIS(order=2),
}


def served(plans: list[Any], guidance: Any) -> tuple[Any, ...]:
    """Samples of several plans through a batcher of two places."""
    net = Exact(F32)
    batcher = fd.Batcher(
        net, plans, (2, *SHAPE[1:]), cond={"y": torch.zeros(2, *SHAPE[1:])}, guidance=guidance
    )
    waiting, running, done = list(range(2 * len(plans))), {}, {}
    while waiting or running:
        while waiting and batcher.free:
            i = waiting.pop(0)
            cond = {"y": random((1, *SHAPE[1:]), 20 + i, F32)}
            x = random(SHAPE[1:], 40 + i, F32)
            running[batcher.add(x, i % len(plans), seed=SEEDS[i % 3], cond=cond)] = i
        for place, sample in batcher.step().items():
            done[running.pop(place)] = sample
    return tuple(done[i] for i in sorted(done))


def cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, the work that gives its digest), without those that a --only leaves out."""
    for name, plan in plans():

        def rows(plan: Any = plan) -> tuple[Any, ...]:
            return (plan.times, [[getattr(s, f) for f in FIELDS] for s in plan.stages])

        yield f"rows/{name}", lambda rows=rows: outcome(rows)
        for where, backend, context in backends():
            for dtype in (F32, F64, BF16):
                label = f"{where}/{str(dtype)[6:]}/{name}"

                def forward(plan=plan, backend=backend, context=context, dtype=dtype):
                    with context():
                        return outcome(lambda: run(plan, dtype, backend=backend))

                yield f"forward/{label}", forward
                if where == "cpu-baseline":  # the other instruction sets are compared forward
                    continue
                for kind, made in GRADIENTS.items():
                    # PyTorch adds the cotangents of a bfloat16 network in an order of its own
                    if dtype == BF16 or (dtype == F64 and kind != "discrete"):
                        continue

                    def back(plan=plan, backend=backend, context=context, dtype=dtype, made=made):
                        with context():
                            return outcome(lambda: run(plan, dtype, made(), backend=backend))

                    yield f"{kind}/{label}", back
    for name, plan, options in variants():
        for where, backend, context in backends():
            for dtype in (F32, BF16):

                def varied(plan=plan, options=options, backend=backend, context=context, d=dtype):
                    with context():
                        return outcome(lambda: run(plan, d, backend=backend, **options))

                yield f"forward/{where}/{str(dtype)[6:]}/{name}", varied

            def bent(plan=plan, options=options, backend=backend, context=context):
                with context():
                    return outcome(lambda: run(plan, F32, "discrete", backend=backend, **options))

            yield f"discrete/{where}/float32/{name}", bent
    chosen = [fd.plan(SCHEDULES["vp-linear"][0], s, n, prediction="v", t_max=0.9)
              for s, n in (("ddim", 2), ("deis-3", 4), ("ddpm", 3), ("dpmpp-2s", 2))]  # fmt: skip
    for scale in (1.0, 2.5):
        guidance = fd.CFG(scale, {"y": 0.5})
        yield f"batcher/{scale}", lambda g=guidance: outcome(lambda: served(chosen, g))
    for stream in (0, 1, 2**24):
        yield (
            f"noise/{stream}",
            lambda stream=stream: digest(fd.noise.normal((3, 1031), SEEDS, stream)),
        )
    yield from captured_cases()
    yield from triton_cases()


def captured_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Replays of whole loops, single stages and gradients that a recorder captured."""
    for name, plan in plans():
        if not name.startswith(("vp-linear/", "edm/")):
            continue
        for mode, gradient in (("loop", None), ("stage", None), ("loop", "discrete")):

            def captured(plan=plan, mode=mode, gradient=gradient):
                with recorded() as can:
                    if not can:
                        return "no recorder"
                    return outcome(lambda: run(plan, F32, gradient, graph=mode))

            yield f"captured/{mode}/{gradient}/{name}", captured


def triton_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """A few runs through Triton's interpreter, which takes milliseconds a launch."""
    if fd.backends.status().get("triton") != "available":
        return
    for name, plan in plans():
        schedule, solver = name.split("/")
        if schedule == "vp-linear":
            yield (
                f"forward/triton/float32/{name}",
                lambda plan=plan: outcome(lambda: run(plan, F32, backend="triton")),
            )
        if schedule == "edm" and solver in ("deis-2", "dpmpp-2s", "heun"):
            for kind, dtype in (("discrete", F32), (None, F64), (None, BF16)):
                yield (
                    f"{kind}/triton/{dtype}/{name}",
                    lambda plan=plan, kind=kind, dtype=dtype: outcome(
                        lambda: run(plan, dtype, kind, backend="triton")
                    ),
                )
    for name, plan, options in variants():
        if name in ("cfg/deis-3", "cfg-sample/ddpm", "clip/ddim", "threshold/ddim", "hand"):
            yield (
                f"forward/triton/float32/{name}",
                lambda plan=plan, options=options: outcome(
                    lambda: run(plan, F32, backend="triton", **options)
                ),
            )


def compare(got: dict[str, str], other: dict[str, str]) -> int:
    """Prints the cases that differ; their number."""
    both = sorted(set(got) & set(other))
    different = [name for name in both if got[name] != other[name]]
    for name in different:
        print(f"{name}: {other[name][:20]} before, {got[name][:20]} here")
    only_here, only_there = len(set(got) - set(other)), len(set(other) - set(got))
    print(f"{len(both)} compared, {len(different)} differ; {only_here} here alone, ", end="")
    print(f"{only_there} there alone")
    return len(different)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, got = time.monotonic(), {}
    for name, work in cases():
        if arguments.only in name:
            got[name] = work()
    arguments.file.write_text(json.dumps(got, indent=0, sort_keys=True) + "\n")
    refused = sum(value.startswith("refused") for value in got.values())
    print(f"{len(got)} cases in {time.monotonic() - start:.0f} s, {refused} of them refused")
    if arguments.against is None:
        return 0
    return int(compare(got, json.loads(arguments.against.read_text())) > 0)


if __name__ == "__main__":
    sys.exit(main())
