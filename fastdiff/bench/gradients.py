# SPDX-License-Identifier: Apache-2.0
"""Gradients through samplers: our rivals, how they are checked, their time and their memory.

The time is that of a run and its gradient, beside what the bare network takes for as many stages (a
forward without grad, a forward with grad, a vector-Jacobian product). The memory is the peak of the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import fastdiff as fd

from .flows import Flow, vp_plan
from .gate import GateError, agree
from .memory import peak_bytes
from .networks import Mlp
from .records import Record, record
from .runs import Setting
from .text import reason
from .timing import Rival, executed, race, wait

BARE = "bare network"
DISCRETE, CAPTURED, BACKPROP = "discrete", "discrete, captured", "backprop"
TITLES = {"mlp": "MLP policy", "digits": "digits network"}

Run = Callable[[], Sequence[torch.Tensor | None]]
Makers = dict[str, Callable[[], Run]]


@dataclass(frozen=True)
class Case:
    """A network, a batch, a number of steps, and whether the parameters want a gradient too.

    Attributes:
        titles: The kinds of network that there are, and what each is called.
        kind: A key of `titles`.
        batch: B.
        theta: Whether the parameters want a gradient.
        steps: Of the run.
        dtype: Of the network, and of x.
        width: Numbers that a policy acts with.
    """

    titles: ClassVar[Mapping[str, str]] = TITLES

    kind: str
    batch: int
    theta: bool = False
    steps: int = 20
    dtype: torch.dtype = torch.float32
    width: int = 16

    def __str__(self) -> str:
        name, wanted = self.titles[self.kind], "a_x and a_theta" if self.theta else "a_x"
        dtype = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{name}, batch {self.batch}, {wanted}{dtype}"


Made = tuple[torch.nn.Module, str, tuple[int, ...], dict[str, torch.Tensor]]


def network_of(case: Case) -> Made:
    """The network of a case, what it returns, the shape of a sample, and its condition."""
    if case.kind == "digits":
        return fd.models.digits(), "v", (1, 8, 8), {"y": torch.arange(case.batch) % 10}
    cond = {"obs": torch.randn(case.batch, 32).to(case.dtype)}
    return Mlp(case.width, 32), "epsilon", (case.width,), cond


def flow_of(case: Case, device: torch.device, make: Callable[[Any], Made] = network_of) -> Flow:
    """The flow of a case.

    Args:
        case: What is asked for.
        device: Where all of it lies.
        make: Makes the network and what belongs to it, on the CPU.
    """
    torch.manual_seed(0)
    network, prediction, shape, cond = make(case)
    network = network.to(device, case.dtype).eval().requires_grad_(case.theta)
    start = fd.noise.normal((case.batch, *shape), 0, dtype=case.dtype).to(device)
    cond = {name: value.to(device) for name, value in cond.items()}
    return Flow(str(case), network, prediction, start, cond, case.theta)


# -- the rivals ------------------------------------------------------------------------------------


def by_library(flow: Flow, plan: fd.Plan, gradient: Any, **options: Any) -> Run:
    """The gradients of the leaves by a sampler.

    Args:
        flow: What is differentiated.
        plan: The run.
        gradient: As `fastdiff.Sampler` takes it.
        **options: Others of the sampler's. `network` is called in place of the flow's.
    """
    network = options.pop("network", None)
    if network is not None:
        options |= {"dtype": flow.start.dtype, "params": flow.parameters}
    options.setdefault("graph", None)
    sampler = fd.Sampler(network or flow.network, plan, gradient=gradient, **options)
    x, cond, wanted = flow.leaves()
    cotangent = flow.cotangent

    def run() -> Sequence[torch.Tensor | None]:
        return torch.autograd.grad(sampler(x, cond or None), wanted, cotangent, allow_unused=True)

    return run


def bare(flow: Flow, steps: int) -> Run:
    """A forward without grad, one with grad and its vector-Jacobian product, for every stage."""
    network, cotangent = flow.network, flow.cotangent
    x, cond, wanted = flow.leaves()
    t = torch.full((len(x),), 0.5, device=x.device)

    def run() -> Sequence[torch.Tensor | None]:
        found: Sequence[torch.Tensor | None] = ()
        for _ in range(steps):
            with torch.no_grad():
                network(x, t, **cond)
            out = network(x, t, **cond)
            found = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
        return found

    return run


def plan_of(case: Case, flow: Flow) -> fd.Plan:
    """DPM-Solver++(2M) in the steps of the case."""
    return vp_plan(flow, "dpmpp-2m", case.steps)


def makers(flow: Flow, plan: fd.Plan, **options: Any) -> Makers:
    """Functions that make our rivals, by name; `options` are the sampler's."""

    def ours(gradient: str, **more: Any) -> Callable[[], Run]:
        return lambda: by_library(flow, plan, gradient, **options, **more)

    found = {DISCRETE: ours("discrete"), BACKPROP: ours("backprop")}
    if flow.start.device.type == "cuda":
        found[CAPTURED] = ours("discrete", graph="loop")
    return found


def running(
    found: Mapping[str, Callable[[], Run]], what: str, device: torch.device, lost: list[str]
) -> dict[str, Run]:
    """The rivals that run here, each run once; why the others do not is added to `lost`."""
    runs = {}
    for name, make in found.items():
        try:
            run = make()
            run()
            wait(device)
            runs[name] = run
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, {what}: {reason(error)}")
    return runs


# -- the gate --------------------------------------------------------------------------------------


def always(name: str) -> bool:
    return True


def gate(flow: Flow, runs: Mapping[str, Run], exact: Callable[[str], bool] = always) -> None:
    """Checks that exact gradients are backpropagation's, to rounding, and all others finite.

    Args:
        flow: What is differentiated.
        runs: The rivals, `BACKPROP` among them.
        exact: Whether the rival of a name differentiates what backpropagation does.

    Raises:
        GateError: One is not.
    """
    if BACKPROP not in runs:
        raise GateError(f"{flow.title}: {BACKPROP} did not run: there is nothing to agree.")
    wanted = flow.named(runs[BACKPROP]())
    tolerance = 1e-9 if flow.start.dtype == torch.float64 else 2e-3
    for name, run in runs.items():
        for leaf, got in flow.named(run()).items():
            if exact(name):
                agree(f"{name}, of {leaf}, {flow.title}", got, wanted[leaf], tolerance)
            elif not bool(got.isfinite().all()):
                raise GateError(f"{name}, of {leaf}, {flow.title}: got values not finite.")


# -- measuring -------------------------------------------------------------------------------------


def where_of(case: Case, flow: Flow) -> dict[str, Any]:
    """What tells the records of a case from others."""
    shape, dtype = list(flow.start.shape), str(flow.start.dtype).removeprefix("torch.")
    what = {"network": case.kind, "theta": case.theta, "steps": case.steps}
    return {**what, "shape": shape, "dtype": dtype}


def time_records(
    case: Case, flow: Flow, runs: Mapping[str, Run], setting: Setting, **where: Any
) -> list[Record]:
    """Microseconds a stage of every rival."""
    device = setting.device
    rivals = [Rival(name, executed(run, 1, device), case.steps) for name, run in runs.items()]
    timings = race(rivals, seconds=setting.seconds, warmup=1, rounds=setting.rounds)
    where |= {"part": "time", **where_of(case, flow), **dict(setting.about)}
    return [record("gradients", name, timing, **where) for name, timing in timings.items()]


def memory_records(
    case: Case, flow: Flow, found: Makers, setting: Setting, lost: list[str], **where: Any
) -> list[Record]:
    """Peak bytes of every rival, of which those that raise are added to `lost`.

    On CUDA they include the capture.
    """
    records = []
    where |= {"part": "memory", "unit": "bytes", **where_of(case, flow), **dict(setting.about)}
    for name, make in found.items():
        try:
            peak = peak_bytes(make, setting.device)
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"memory of {name}, {case}: {reason(error)}")
            continue
        records.append(record("gradients", name, {"best": peak}, **where))
    return records
