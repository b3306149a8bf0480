# SPDX-License-Identifier: Apache-2.0
"""Gradients through samplers: time, peak memory and error, beside backpropagation and torchdiffeq.

Four parts. `time`: forward and gradient over what the bare network takes for as many stages (a
forward without grad, a forward with grad, a vector-Jacobian product). `memory`: peak bytes of the
same at 10, 50 and 100 steps. `error`: distance to the gradient of the exact flow against network
evaluations, those of the backward pass included. `table`: the adjoint's own error, at the states of
a fine run, beside that of the sampler's own gradient. The last two are float64 and the same on
every machine. Nothing is measured before the rivals agree where they must.

    python benchmarks/bench_gradients.py --out benchmarks/results/gradients.jsonl \\
        --docs docs/gradients.md --images docs/images
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bench_loop
import bench_order
import bench_stage
import click
import harness
import numpy as np
import torch
from harness import Record, Rival
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastdiff as fd
from fastdiff.models.digits import _Block

VP = fd.schedules.VPLinear(beta_min=0.1, beta_max=20.0)
ENDS = {"t_max": 1.0, "t_min": 1e-2}
PARTS = ("time", "memory", "error", "table")
MACHINE = ("time", "memory")  # parts that say something about a machine

BARE = "bare network"
DISCRETE, SEGMENTS = "discrete", "discrete, a checkpoint every {} steps"
ADJOINT, RESOLVED = "AdjointDEIS(2)", 'AdjointDEIS(2, states="resolve")'
CAPTURED, ADJOINT_CAPTURED = "discrete, captured", "AdjointDEIS(2), captured"
BACKPROP, CHECKPOINTED = "backprop", "backprop, checkpointed by step"
MIDPOINT, DOPRI = "torchdiffeq midpoint, as many calls", "torchdiffeq dopri5, tol 1e-3"

RATIO = 1.10  # of forward and gradient over the bare network
KEPT = 0.01  # of the activations of a step, at most, stay beside its state
MEMORY_STEPS = (10, 50, 100)
BUDGETS = (10, 16, 20, 30, 40, 60, 80, 100, 200)  # evaluations; the target ends at 100
MOST = 100
TABLE_STEPS = (5, 10, 20, 50)


# -- networks and what is differentiated -----------------------------------------------------------


class Mixture(nn.Module):
    """epsilon of a Gaussian mixture whose means are parameters: mu_k (1 + z_1) + z_2 move_k.

    z is [B, 2]; at z = 0 it is `fastdiff.models.GaussianMixture`.
    """

    def __init__(self) -> None:
        super().__init__()
        wide = functools.partial(torch.tensor, dtype=torch.float64)
        self.means = nn.Parameter(wide(bench_order.MEANS))
        self.log_weights, self.variances = (
            wide(bench_order.WEIGHTS).log(),
            wide(bench_order.VARIANCES),
        )
        self.moves = fd.noise.normal(self.means.shape, 0, 7, dtype=torch.float64)

    def forward(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        told = t.detach().double().numpy()
        alpha, sigma = (torch.as_tensor(f(told)).reshape(-1, 1, 1) for f in (VP.alpha, VP.sigma))
        means = self.means * (1 + z[:, :1, None]) + self.moves * z[:, 1:, None]
        variance = alpha**2 * self.variances + sigma**2  # [B, K, D]
        offset = x[:, None] - alpha * means
        exponents = (offset**2 / variance + variance.log()).sum(2)
        share = (self.log_weights - 0.5 * exponents).softmax(1)[..., None]
        return (sigma * share * offset / variance).sum(1)


class Dit(nn.Module):
    """A transformer of the size of DiT-S/2: 256 patches of width 384, 12 blocks, 32 M parameters.

    Random weights. One linear map makes the modulation of all blocks.
    """

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, size: int = 32) -> None:
        super().__init__()
        self.size, self.depth = size // 2, depth
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(self.size**2, width))
        self.embed = nn.Sequential(bench_loop.TimeEmbedding(width), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * depth * width)
        self.blocks = nn.ModuleList(_Block(width, heads, 4, 0.0) for _ in range(depth))
        self.out = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        modulation = self.modulation(F.silu(self.embed(t)))
        modulation = modulation.view(len(x), self.depth, 6, 1, -1)
        for i, block in enumerate(self.blocks):
            h = block(h, modulation[:, i])
        h = self.out(F.layer_norm(h, h.shape[-1:])).transpose(1, 2)
        return F.pixel_shuffle(h.reshape(len(x), 16, self.size, self.size), 2)


@dataclass(frozen=True)
class Flow:
    """A network on `VP`, where to start, and the functional <cotangent, sample> to differentiate.

    Attributes:
        title: As printed.
        network: `network(x, t, **cond)`.
        prediction: What it returns.
        start: x at t = 1, [B, ...].
        cond: Conditioning by keyword; what of it is floating wants a gradient.
        theta: Whether the parameters do.
    """

    title: str
    network: Callable[..., torch.Tensor]
    prediction: str
    start: torch.Tensor
    cond: Mapping[str, torch.Tensor] = field(default_factory=dict)
    theta: bool = True

    @functools.cached_property
    def cotangent(self) -> torch.Tensor:
        drawn = fd.noise.normal(self.start.shape, 0, 1, dtype=self.start.dtype)
        return drawn.to(self.start.device)

    @property
    def parameters(self) -> list[torch.Tensor]:
        module = isinstance(self.network, nn.Module) and self.theta
        return [p for p in self.network.parameters() if p.requires_grad] if module else []

    def leaves(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        """x, the conditioning, and all that wants a gradient."""
        x = self.start.clone().requires_grad_()
        cond = {
            k: v.clone().requires_grad_() if v.is_floating_point() else v
            for k, v in self.cond.items()
        }
        return x, cond, [x, *(v for v in cond.values() if v.requires_grad), *self.parameters]

    def named(self, found: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Gradients of the leaves by name: x, z, theta (all parameters as one vector)."""
        _, cond, wanted = self.leaves()
        filled = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(wanted, found, strict=True)
        ]
        gradients = {"x": filled[0]}
        names = [k for k, v in cond.items() if v.requires_grad]
        gradients |= dict(zip(names, filled[1:], strict=False))
        if self.parameters:
            rest = filled[1 + len(names) :]
            gradients["theta"] = torch.cat([g.flatten() for g in rest])
        return gradients


def gradients(flow: Flow, plan: fd.Plan, gradient: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Gradients of the functional by the library: of x, of z, of the parameters."""
    x, cond, wanted = flow.leaves()
    out = fd.sample(flow.network, x, plan, cond=cond or None, gradient=gradient, **options)
    total = (out * flow.cotangent).sum()
    return flow.named(torch.autograd.grad(total, wanted, allow_unused=True))


def mixture(batch: int = 64) -> Flow:
    start = fd.noise.normal((batch, 8), 0, 0, dtype=torch.float64)
    cond = {"z": torch.zeros(batch, 2, dtype=torch.float64)}
    return Flow("Gaussian mixture", Mixture(), "epsilon", start, cond)


def empirical(batch: int = 8) -> Flow:
    made = bench_order.empirical(batch)
    title = "Exact denoiser of the digits"
    return Flow(title, made.network, made.prediction, made.start, theta=False)


def digits(batch: int = 4) -> Flow:
    made = bench_order.digits(batch)
    network = made.network.requires_grad_()
    return Flow("Digits network", network, made.prediction, made.start, made.cond)


PROBLEMS: dict[str, Callable[[], Flow]] = {
    "mixture": mixture,
    "empirical": empirical,
    "digits": digits,
}
# Steps of the fine run: its states are exact to all digits shown, and so is its gradient.
FINE = {"mixture": 600, "empirical": 600, "digits": 600}


def plan_of(flow: Flow, solver: str, steps: int, grid: Any = "logsnr", **options: Any) -> fd.Plan:
    ends = ENDS if isinstance(grid, str) else {}
    return fd.plan(VP, solver, steps, grid=grid, prediction=flow.prediction, **ends, **options)


def fine_plan(flow: Flow, steps: int) -> fd.Plan:
    return plan_of(flow, "dpmpp-3m", steps, warmup="runge-kutta")


def truth(flow: Flow, steps: int) -> dict[str, torch.Tensor]:
    """The gradient of the exact flow: the exact gradient of a fine run."""
    return gradients(flow, fine_plan(flow, steps), fd.Discrete(checkpoint=25))


def apart(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors: of x and z the median over the samples, of theta in all."""
    errors = {}
    for name, wanted in exact.items():
        rows = (found[name] - wanted, wanted)
        if name != "theta":
            rows = tuple(r.flatten(1) for r in rows)
        difference, size = (r.norm(dim=-1) for r in rows)
        errors[name] = float((difference / size).median())
    return errors


# -- torchdiffeq -----------------------------------------------------------------------------------


def has_torchdiffeq() -> bool:
    return importlib.util.find_spec("torchdiffeq") is not None


class Exhausted(RuntimeError):
    """A solver asks for more calls than it may have."""


class InLambda(nn.Module):
    """The flow dx/dlambda = sigma^2 x - sigma eps of a network on `VP`, and its calls.

    In lambda and not in t, where torchdiffeq's adaptive solvers step past the end, to t < 0.
    """

    def __init__(self, flow: Flow, cond: Mapping[str, torch.Tensor], most: float) -> None:
        super().__init__()
        self._flow, self._cond = [flow], dict(cond)  # in a list: its parameters are not this one's
        self.calls, self._most = 0, most

    def forward(self, lam: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self._most:
            raise Exhausted(f"more than {self._most:g} calls")
        (flow,) = self._flow
        lam = lam.detach()  # the ends are fixed: their gradient is not asked for
        alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
        # (b_1 - b_0) t^2 / 4 + b_0 t / 2 = -log alpha
        slope, b = VP.beta_max - VP.beta_min, VP.beta_min
        log_alpha = -0.5 * F.softplus(-2 * lam)
        t = -4 * log_alpha / (b + torch.sqrt(b * b - 4 * slope * log_alpha))
        out = flow.network(x, t.to(x.dtype).expand(len(x)), **self._cond)
        eps = out if flow.prediction == "epsilon" else alpha * out + sigma * x
        return sigma * sigma * x - sigma * eps


def lambda_ends(flow: Flow) -> torch.Tensor:
    lam = VP.lambda_t(np.array([ENDS["t_max"], ENDS["t_min"]]))
    return torch.tensor(lam, dtype=flow.start.dtype, device=flow.start.device)


def stepped(flow: Flow, method: str, steps: int) -> dict[str, Any]:
    """Options of a solver of fixed steps; a hair longer, or rounding would add one."""
    first, last = lambda_ends(flow).tolist()
    return {"method": method, "options": {"step_size": (last - first) / steps * (1 + 1e-6)}}


def their_gradients(
    flow: Flow, most: float = math.inf, **options: Any
) -> tuple[list[torch.Tensor | None], int]:
    """Gradients of the leaves by `odeint_adjoint`, and the calls of the network.

    Raises:
        Exhausted: It would take more than `most` calls.
    """
    import torchdiffeq

    x, cond, wanted = flow.leaves()
    function = InLambda(flow, cond, most)
    ends = lambda_ends(flow)
    out = torchdiffeq.odeint_adjoint(function, x, ends, adjoint_params=tuple(wanted[1:]), **options)
    total = (out[-1] * flow.cotangent).sum()
    return list(torch.autograd.grad(total, wanted, allow_unused=True)), function.calls


def their_settings(flow: Flow) -> dict[str, list[dict[str, Any]]]:
    """What of torchdiffeq is tried, by method."""
    fixed = {
        "midpoint": (2, 3, 4, 5, 7, 10, 15, 20, 25, 50),
        "rk4": (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24),
        "euler": (5, 10, 20, 50),
    }
    adaptive = {
        "bosh3": (1e-1, 1e-2, 1e-3),
        "dopri5": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5),
    }
    found = {
        method: [stepped(flow, method, steps) for steps in counts]
        for method, counts in fixed.items()
    }
    for method, tolerances in adaptive.items():
        found[method] = [{"method": method, "rtol": tol, "atol": tol} for tol in tolerances]
    return found


# -- the gate --------------------------------------------------------------------------------------


def gate() -> None:
    """Every way to a gradient that is timed leads there, on a problem whose gradient is known.

    Raises:
        harness.GateError: One does not.
    """
    flow = mixture(4)
    plan = plan_of(flow, "dpmpp-2m", 12)
    backprop = gradients(flow, plan, "backprop")
    for name, gradient in ((DISCRETE, "discrete"), (SEGMENTS.format(4), fd.Discrete(checkpoint=4))):
        found = gradients(flow, plan, gradient)
        for leaf, wanted in backprop.items():
            harness.agree(f"{name}, of {leaf}", found[leaf], wanted, 1e-10)
    exact = truth(flow, 100)
    fine = fine_plan(flow, 100)
    # of second and of fifth order, and far from where rounding would show
    theirs: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        ADJOINT: lambda: gradients(flow, fine, fd.AdjointDEIS(2)),
        RESOLVED: lambda: gradients(flow, fine, fd.AdjointDEIS(2, states="resolve")),
    }
    if has_torchdiffeq():
        options = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}
        theirs[DOPRI] = lambda: flow.named(their_gradients(flow, **options)[0])
        theirs[MIDPOINT] = lambda: flow.named(
            their_gradients(flow, **stepped(flow, "midpoint", 100))[0]
        )
    for name, run in theirs.items():
        for leaf, got in run().items():
            harness.agree(f"{name}, of {leaf}", got, exact[leaf], 1e-2)


# -- time and memory -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network, a batch, a number of steps, and whether the parameters want a gradient too."""

    kind: str
    batch: int
    theta: bool = False
    steps: int = 20

    def __str__(self) -> str:
        name = {"digits": "digits network", "mlp": "MLP policy", "dit": "DiT-S/2-sized"}[self.kind]
        return f"{name}, batch {self.batch}, {'a_x and a_theta' if self.theta else 'a_x'}"


# Seconds that timing a case takes on an H200, its memory half as much again: guesses, not measured.
SECONDS = {"mlp": 4, "dit": 10, "digits": 8}


def cases(place: str, short: bool) -> list[Case]:
    """What is timed, the most important first."""
    if place == "cuda":
        found = [Case("mlp", 1), Case("dit", 4, theta=True)]
        return found if short else [*found, Case("dit", 4), Case("mlp", 256), Case("digits", 16)]
    found = [Case("digits", 16), Case("digits", 16, theta=True), Case("digits", 1), Case("mlp", 1)]
    return found if short else [*found, Case("digits", 64)]


def memory_cases(place: str) -> list[Case]:
    """Whose memory is measured: on the CPU a small batch, for the figure is a growth in states."""
    if place == "cuda":
        return [Case("mlp", 256), Case("dit", 4, theta=True)]
    return [Case("digits", 4), Case("digits", 4, theta=True)]


def flow_of(case: Case, device: torch.device) -> Flow:
    """A case in float32."""
    torch.manual_seed(0)
    network: Any
    cond, prediction, shape = {}, "epsilon", (1, 8, 8)
    if case.kind == "digits":
        network, prediction = fd.models.digits(), "v"
        cond = {"y": torch.arange(case.batch, device=device) % 10}
    elif case.kind == "mlp":
        network, shape = bench_loop.Mlp(16, 32), (16,)
        cond = {"obs": torch.randn(case.batch, 32).to(device)}
    else:
        network, shape = Dit(), (4, 32, 32)
    network = network.to(device).eval().requires_grad_(case.theta)
    start = fd.noise.normal((case.batch, *shape), 0).to(device)
    return Flow(str(case), network, prediction, start, cond, case.theta)


Run = Callable[[], Sequence[torch.Tensor | None]]


def bare(flow: Flow, steps: int) -> Run:
    """Per stage a forward without grad, one with grad and its vector-Jacobian product."""
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


def by_library(
    flow: Flow, plan: fd.Plan, gradient: Any, network: Any = None, graph: str | None = None
) -> Run:
    """A sampler and the gradients of the leaves by it; `network`: what it calls instead."""
    options: dict[str, Any] = {"gradient": gradient, "graph": graph}
    if network is not None:
        options |= {"dtype": flow.start.dtype, "params": flow.parameters}
    sampler = fd.Sampler(network or flow.network, plan, **options)
    x, cond, wanted = flow.leaves()
    cotangent = flow.cotangent

    def run() -> Sequence[torch.Tensor | None]:
        return torch.autograd.grad(sampler(x, cond or None), wanted, cotangent, allow_unused=True)

    return run


def recomputed(network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The network under `torch.utils.checkpoint`: its activations are made again."""

    def call(x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(network, x, t, **options, **cond)

    return call


def makers(case: Case, flow: Flow, with_theirs: bool) -> dict[str, Callable[[], Run]]:
    """What makes each rival of a case."""
    plan = plan_of(flow, "dpmpp-2m", case.steps)
    segment = max(1, round(math.sqrt(case.steps)))
    ours = functools.partial(by_library, flow, plan)
    found: dict[str, Callable[[], Run]] = {
        DISCRETE: lambda: ours("discrete"),
        SEGMENTS.format(segment): lambda: ours(fd.Discrete(checkpoint=segment)),
        ADJOINT: lambda: ours(fd.AdjointDEIS(2)),
        RESOLVED: lambda: ours(fd.AdjointDEIS(2, states="resolve")),
        BACKPROP: lambda: ours("backprop"),
        CHECKPOINTED: lambda: ours("backprop", recomputed(flow.network)),
    }
    if flow.start.device.type == "cuda":
        found[CAPTURED] = lambda: ours("discrete", graph="loop")
        found[ADJOINT_CAPTURED] = lambda: ours(fd.AdjointDEIS(2), graph="loop")
    if with_theirs:
        half = stepped(flow, "midpoint", max(1, case.steps // 2))
        loose = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}
        found[MIDPOINT] = lambda: lambda: their_gradients(flow, **half)[0]
        if not case.theta:  # the parameters enter its error norm: ten times the calls
            found[DOPRI] = lambda: lambda: their_gradients(flow, **loose)[0]
    return found


EXACT = (DISCRETE, SEGMENTS, CAPTURED, CHECKPOINTED)  # they differentiate what backprop does


def is_exact(name: str) -> bool:
    return any(name.startswith(exact.partition("{")[0]) for exact in EXACT)


def gate_case(flow: Flow, runs: Mapping[str, Run]) -> None:
    """All exact gradients are backpropagation's, in float32; all others are finite.

    Raises:
        harness.GateError: One is not.
    """
    if BACKPROP not in runs:
        raise harness.GateError(f"{flow.title}: {BACKPROP} did not run: there is nothing to agree.")
    wanted = flow.named(runs[BACKPROP]())
    for name, run in runs.items():
        for leaf, got in flow.named(run()).items():
            if is_exact(name):
                harness.agree(f"{name}, of {leaf}, {flow.title}", got, wanted[leaf], 2e-3)
            elif not bool(got.isfinite().all()):
                raise harness.GateError(f"{name}, of {leaf}, {flow.title}: got values not finite.")


def made(case: Case, flow: Flow, with_theirs: bool, lost: list[str]) -> dict[str, Run]:
    """The rivals that run here, each run once; why the others do not is added to `lost`."""
    runs = {}
    for name, make in makers(case, flow, with_theirs).items():
        try:
            run = make()
            run()
            _wait(flow.start.device)
            runs[name] = run
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, {case}: {_reason(error)}")
    return runs


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _waited(run: Run, device: torch.device) -> Callable[[], None]:
    def call() -> None:
        run()
        _wait(device)

    return call


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share."""

    device: torch.device
    rounds: int
    seconds: float
    theirs: bool
    where: tuple[tuple[str, Any], ...] = ()


def _record(part: str, rival: str, measured: Any, setting: Setting, **where: Any) -> Record:
    version = importlib.metadata.version("torchdiffeq") if has_torchdiffeq() else "none"
    about = dict(setting.where)
    return harness.record(
        "gradients", rival, measured, part=part, torchdiffeq=version, **where, **about
    )


def measure_time(case: Case, setting: Setting, lost: list[str]) -> list[Record]:
    """Microseconds a stage of every rival of a case.

    Raises:
        harness.GateError: Their gradients differ.
    """
    flow, device = flow_of(case, setting.device), setting.device
    runs = made(case, flow, setting.theirs, lost)
    gate_case(flow, runs)
    runs = {BARE: bare(flow, case.steps), **runs}
    rivals = [Rival(name, _waited(run, device), case.steps) for name, run in runs.items()]
    timings = harness.race(rivals, seconds=setting.seconds, warmup=1, rounds=setting.rounds)
    return [
        _record("time", name, timing, setting, **_where(case, flow))
        for name, timing in timings.items()
    ]


def _where(case: Case, flow: Flow) -> dict[str, Any]:
    shape, dtype = list(flow.start.shape), str(flow.start.dtype).removeprefix("torch.")
    what = {"network": case.kind, "theta": case.theta, "steps": case.steps}
    return {**what, "shape": shape, "dtype": dtype}


class Peak(TorchDispatchMode):
    """Bytes of living tensors made since it was entered, and their most.

    What an operation allocates for itself and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def peak_bytes(make: Callable[[], Run], device: torch.device) -> int:
    """The most bytes that a run holds beside what there was before it was made."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        make()()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Peak() as peak:
        make()()
    return peak.most


def measure_memory(
    case: Case, setting: Setting, lost: list[str], counts: Sequence[int] = MEMORY_STEPS
) -> list[Record]:
    """Peak bytes of every rival of a case, by steps; on CUDA with those of the capture."""
    flow, records = flow_of(case, setting.device), []
    if setting.device.type == "cuda":  # libraries allocate at first calls
        made(replace(case, steps=min(counts)), flow, setting.theirs, lost=[])
    for steps in counts:
        here = replace(case, steps=steps)
        chosen = {BARE: functools.partial(bare, flow, steps)}
        chosen |= makers(here, flow, setting.theirs)
        chosen.pop(DOPRI, None)  # its steps are its own
        for name, make in chosen.items():
            try:
                peak = peak_bytes(make, setting.device)
            except Exception as error:  # as above
                lost.append(f"memory of {name}, {here}: {_reason(error)}")
                continue
            where = {**_where(here, flow), "unit": "bytes"}
            records.append(_record("memory", name, {"best": peak}, setting, **where))
    return records


# -- error against evaluations ---------------------------------------------------------------------

OURS: dict[str, tuple[str, Any]] = {
    "discrete, ddim": ("ddim", "discrete"),
    "discrete, dpmpp-2m": ("dpmpp-2m", "discrete"),
    "discrete, dpmpp-3m": ("dpmpp-3m", "discrete"),
    "discrete, deis-logrho-3": ("deis-logrho-3", "discrete"),
    "AdjointDEIS(1), dpmpp-3m": ("dpmpp-3m", fd.AdjointDEIS(1)),
    "AdjointDEIS(2), dpmpp-3m": ("dpmpp-3m", fd.AdjointDEIS(2)),
    "AdjointDEIS(3), dpmpp-3m": ("dpmpp-3m", fd.AdjointDEIS(3)),
}
THEIRS = "torchdiffeq"
OUR_BEST, THEIR_BEST = "best of ours", "best of torchdiffeq"
HELD = ("AdjointDEIS(3), dpmpp-3m", OUR_BEST)  # what the target binds

Points = dict[str, dict[int, float]]  # rival -> evaluations -> error


class Counted:
    """A network that counts its calls."""

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        self.network, self.calls = network, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.calls += 1
        return self.network(*arguments, **keywords)


def measure_error(flow: Flow, fine: int, budgets: Sequence[int], with_theirs: bool) -> Points:
    """The error of a_x by evaluations, forward and backward together, as counted."""
    if isinstance(flow.network, nn.Module):
        flow.network.requires_grad_(False)
    exact = truth(flow, fine)
    found: Points = {}

    def note(rival: str, calls: int, gradient: torch.Tensor) -> None:
        error = apart({"x": gradient}, {"x": exact["x"]})["x"]
        if math.isfinite(error):
            found.setdefault(rival, {})[calls] = float(f"{error:.4g}")

    cond = {k: v for k, v in flow.cond.items() if not v.is_floating_point()}
    network = flow.network
    if isinstance(network, Mixture):
        network = functools.partial(network, z=flow.cond["z"])
    for name, (solver, gradient) in OURS.items():
        for budget in budgets:
            counted = Counted(network)
            ours = replace(flow, network=counted, cond=cond)
            got = gradients(ours, plan_of(flow, solver, budget // 2), gradient)
            note(name, counted.calls, got["x"])
    if not with_theirs:
        return found
    theirs = replace(flow, network=network, cond=cond)
    for method, settings in their_settings(flow).items():
        for options in settings:
            # AssertionError: its step underflows, or the state is not finite
            with contextlib.suppress(Exhausted, AssertionError):
                got, calls = their_gradients(theirs, max(budgets), **options)
                note(f"torchdiffeq {method}", calls, got[0])
    return found


def best_of(points: Points, name: str, budgets: Sequence[int]) -> dict[int, float]:
    """The error at each budget; of a group the least within the budget, where there is one."""
    if name in OURS:
        return {b: points[name][b] for b in budgets if b in points.get(name, {})}
    group = {OUR_BEST: tuple(OURS), THEIR_BEST: (THEIRS,)}.get(name, (name,))
    pairs = [p for rival, by in points.items() if rival.startswith(group) for p in by.items()]
    found = {}
    for budget in budgets:
        within = [error for calls, error in pairs if calls <= budget]
        if within:
            found[budget] = min(within)
    return found


def factors(points: Points, ours: str, budgets: Sequence[int]) -> dict[int, float]:
    """torchdiffeq's least error within a budget over ours at it."""
    theirs, own = best_of(points, THEIR_BEST, budgets), best_of(points, ours, budgets)
    return {b: theirs[b] / own[b] for b in budgets if b in theirs and b in own}


# -- the adjoint's own error -----------------------------------------------------------------------


def _adjoint(order: int, form: str, published: bool = False) -> Callable[[int, str], Any]:
    def gradient(steps: int, grid: str) -> fd.AdjointDEIS:
        return fd.AdjointDEIS(order, form, steps=steps, grid=grid, published=published)

    return gradient


# Ends of lambda at alpha(1) are finite here: every form has its limit.
AT_EXACT_STATES: dict[str, Callable[[int, str], Any]] = {
    "AdjointDEIS-1 of the paper, epsilon": _adjoint(1, "epsilon", True),
    "AdjointDEIS-2M of the paper, epsilon": _adjoint(2, "epsilon", True),
    "AdjointDEIS-1 of the paper, x0": _adjoint(1, "x0", True),
    "AdjointDEIS-2M of the paper, x0": _adjoint(2, "x0", True),
    "order 1 (far end)": _adjoint(1, "epsilon"),
    "order 2, epsilon": _adjoint(2, "epsilon"),
    "order 2, x0": _adjoint(2, "x0"),
    "order 3, epsilon": _adjoint(3, "epsilon"),
    "order 3, x0": _adjoint(3, "x0"),
}
SAMPLERS = ("ddim", "dpmpp-2m", "dpmpp-3m", "deis-logrho-3")
ALONG_NOISE: dict[str, Any] = {
    "discrete (ddim, eta = 1)": "discrete",
    "AdjointDEIS-1 of the paper": fd.AdjointDEIS(1, published=True),
    "AdjointDEIS-2M of the paper": fd.AdjointDEIS(2, published=True),
    "order 1 (far end)": fd.AdjointDEIS(1),
    "order 2": fd.AdjointDEIS(2),
    "order 3": fd.AdjointDEIS(3),
}

Cell = tuple[str, str, str]  # problem, grid, leaf
Table = dict[Cell, Points]


def measure_table(
    name: str, flow: Flow, fine: int, counts: Sequence[int], grids: Sequence[str]
) -> Table:
    """Relative errors of every leaf, by method and steps: the adjoint's at exact states."""
    exact, plan = truth(flow, fine), fine_plan(flow, fine)
    table: Table = {}

    def note(grid: str, rival: str, steps: int, found: Mapping[str, torch.Tensor]) -> None:
        for leaf, error in apart(found, exact).items():
            by = table.setdefault((name, grid, leaf), {}).setdefault(rival, {})
            by[steps] = float(f"{error:.4g}")

    for grid in grids:
        for solver in SAMPLERS:
            for steps in counts:
                own = plan_of(flow, solver, steps, grid)
                note(grid, f"discrete, {solver}", steps, gradients(flow, own, "discrete"))
        for rival, make in AT_EXACT_STATES.items():
            for steps in counts:
                note(grid, rival, steps, gradients(flow, plan, make(steps, grid)))
    return table


def path_of(
    flow: Flow, plan: fd.Plan, substeps: int, seed: int
) -> tuple[fd.Plan, list[torch.Tensor]]:
    """A finer plan of the reverse SDE and noise for it that comes to what a coarse one draws.

    Each of the coarse plan's steps is divided into `substeps` equal ones in lambda. Their noises
    are drawn given their sum: with w_i the weight of the i-th in the plan's c xi,

        z_i = u_i - w_i (sum_j w_j u_j - c xi) / sum_j w_j^2,      u_i standard normal
    """
    times = np.array(plan.times)
    lam = VP.lambda_t(times)
    points = [np.linspace(a, b, substeps, endpoint=False) for a, b in itertools.pairwise(lam)]
    inner = VP.t_of_lambda(np.concatenate([*points, lam[-1:]]))
    inner[::substeps] = times
    fine = plan_of(flow, "ddim", len(inner) - 1, inner, eta=1.0)
    scale = VP.sigma(inner) ** 2 / VP.alpha(inner)  # by which the reverse SDE carries noise on
    generator, shape = torch.Generator().manual_seed(1), flow.start.shape
    xi: list[torch.Tensor] = []
    for n, stage in enumerate(plan.stages):
        span = range(n * substeps, (n + 1) * substeps)
        weights = [scale[span.stop] / scale[i + 1] * fine.stages[i].c for i in span]
        free = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in span]
        ((stream, weight),) = stage.noise
        wanted = stage.c * weight * fd.noise.normal(shape, seed, stream, dtype=torch.float64)
        excess = sum(w * u for w, u in zip(weights, free, strict=True)) - wanted
        share = excess / sum(w * w for w in weights)
        xi += [u - w * share for w, u in zip(weights, free, strict=True)]
    return fine, xi


def measure_noise(flow: Flow, counts: Sequence[int], stages: int) -> Table:
    """Relative errors along drawn noise, on the plan's own times and at its own states."""
    table: Table = {}
    for steps in counts:
        plan = plan_of(flow, "ddim", steps, eta=1.0)
        fine, xi = path_of(flow, plan, max(2, stages // steps), seed=0)
        exact = gradients(flow, fine, "backprop", xi=xi)
        for rival, gradient in ALONG_NOISE.items():
            found = gradients(flow, plan, gradient, seed=0)
            for leaf, error in apart(found, exact).items():
                by = table.setdefault(("sde", "logsnr", leaf), {}).setdefault(rival, {})
                by[steps] = float(f"{error:.4g}")
    return table


# -- reports ---------------------------------------------------------------------------------------


def _case_of(line: Record) -> Case:
    return Case(line["network"], line["shape"][0], line["theta"], line["steps"])


def ratios(records: Sequence[Record], which: str) -> dict[tuple[Case, str], float]:
    """Each rival's time over the bare network's."""
    own = {_case_of(r): r[which] for r in records if r["rival"] == BARE and r["part"] == "time"}
    return {
        (_case_of(r), r["rival"]): r[which] / own[_case_of(r)]
        for r in records
        if r["part"] == "time" and _case_of(r) in own
    }


def report_time(records: Sequence[Record]) -> str:
    best, median = ratios(records, "best"), ratios(records, "median")
    n, rows = bench_loop._us, []
    for r in records:
        if r["part"] == "time":
            key = (_case_of(r), r["rival"])
            spread = f"{n(r['median'])} ({n(r['p20'])} to {n(r['p80'])})"
            rows.append([str(key[0]), r["rival"], spread, f"{best[key]:.3f} / {median[key]:.3f}"])
    own = "over the bare network: best / median"
    return harness.table(["network", "rival", "us a stage: median (p20 to p80)", own], rows)


def _bytes(value: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{harness.number(value / unit)} {name}"
    return f"{value:.0f} B"


def peaks(records: Sequence[Record]) -> dict[tuple[Case, str], dict[int, int]]:
    """Peak bytes by steps; cases as of 0 steps, rivals without their segment's length."""
    found: dict[tuple[Case, str], dict[int, int]] = {}
    for r in records:
        if r["part"] == "memory":
            rival = r["rival"]
            if rival.startswith(SEGMENTS.partition("{")[0]):
                rival = SEGMENTS.format("sqrt(N)")
            by = found.setdefault((replace(_case_of(r), steps=0), rival), {})
            by[r["steps"]] = r["best"]
    return found


def _growth(by: Mapping[int, int]) -> float:
    """Bytes a step."""
    few, many = min(by), max(by)
    return (by[many] - by[few]) / max(many - few, 1)


def _state(records: Sequence[Record], case: Case) -> int:
    """Bytes of x, as they are allocated."""
    for r in records:
        if r["part"] == "memory" and replace(_case_of(r), steps=0) == case:
            size = 4 * math.prod(r["shape"])
            return -(-size // 512) * 512 if r["device"] == "cuda" else size
    raise LookupError(case)


def report_memory(records: Sequence[Record]) -> str:
    found = peaks(records)
    counts = sorted({steps for by in found.values() for steps in by})
    rows = []
    for (case, rival), by in found.items():
        cells = [_bytes(by[steps]) if steps in by else "" for steps in counts]
        growth = _growth(by) / _state(records, case)
        rows.append(
            [str(case), rival, *cells, f"{growth:.2f}" if abs(growth) < 100 else f"{growth:.0f}"]
        )
    head = ["network", "rival", *(f"{steps} steps" for steps in counts), "states a step"]
    return harness.table(head, rows)


def report_error(errors: Mapping[str, Points], budgets: Sequence[int]) -> str:
    """Ours at each budget beside torchdiffeq's best within it, and the factors."""
    parts, n = [ABOUT_ERROR], harness.number
    for problem, points in errors.items():
        rows = []
        for name in [*(name for name in OURS if name in points), OUR_BEST]:
            errors_of, factor = best_of(points, name, budgets), factors(points, name, budgets)
            shown = {b: n(error) for b, error in errors_of.items()}
            shown |= {b: f"{shown[b]} ({n(ratio)})" for b, ratio in factor.items()}
            rows.append([name, *(shown.get(b, "") for b in budgets)])
        for name in (THEIR_BEST, *(name for name in points if name.startswith(THEIRS))):
            best = best_of(points, name, budgets)
            rows.append([name, *(n(best[b]) if b in best else "" for b in budgets)])
        if not any(name.startswith(THEIRS) for name in points):
            rows = [row for row in rows if row[0] != THEIR_BEST]
        head = ["network evaluations", *map(str, budgets)]
        parts += [f"**{TITLES[problem]}**", harness.table(head, rows)]
    return "\n\n".join(parts)


ABOUT_ERROR = (
    "Error of a_x against the gradient of the exact flow: the median over the samples of each "
    "one's relative error. Evaluations are those of the forward and of the backward pass, as "
    "counted. In brackets the factor: the least error of any method and setting of torchdiffeq's "
    "adjoint within as many evaluations, over ours."
)
ABOUT_TABLE = (
    "Relative errors: of a_x and a_z the median over the samples of each one's own, of a_theta "
    "(all parameters, summed over the batch) in all. An error of 1 is that of no gradient at all; "
    "the least of a column is bold where it is below a half. AdjointDEIS stands at the states of a "
    "fine run, so that its own error shows; discrete gradients are those of samplers of as many "
    "steps. Along drawn noise all stand at the states of the run itself, and the truth is the "
    "gradient of the reverse SDE along a path with the same noise."
)
TITLES = {
    "mixture": "Gaussian mixture",
    "empirical": "Exact denoiser of the digits",
    "digits": "Digits network",
    "sde": "Gaussian mixture, reverse SDE",
}
LEAVES = {"x": "a_x", "z": "a_z", "theta": "a_theta"}


def report_table(table: Table, counts: Sequence[int]) -> str:
    """A table for each problem and grid."""
    parts = [ABOUT_TABLE] if table else []
    for problem, grid in dict.fromkeys(key[:2] for key in table):
        leaves = [leaf for leaf in LEAVES if (problem, grid, leaf) in table]
        columns = [(leaf, steps) for leaf in leaves for steps in counts]
        by = {leaf: table[problem, grid, leaf] for leaf in leaves}
        least = {
            (leaf, steps): min(e[steps] for e in by[leaf].values() if steps in e)
            for leaf, steps in columns
        }
        rows = []
        for rival in by[leaves[0]]:
            cells = []
            for leaf, steps in columns:
                error = by[leaf][rival][steps]
                shown = harness.number(error)
                bold = error == least[leaf, steps] and error < 0.5
                cells.append(f"**{shown}**" if bold else shown)
            rows.append([rival, *cells])
        head = ["steps", *(f"{LEAVES[leaf]}, {steps}" for leaf, steps in columns)]
        parts += [f"**{TITLES[problem]}, grid `{grid}`**", harness.table(head, rows)]
    return "\n\n".join(parts)


def targets(records: Sequence[Record], errors: Mapping[str, Points], budgets: Sequence[int]) -> str:
    """Every target beside what was measured: met, not met or not measured."""
    rows = []

    def add(what: str, bound: str, value: str, good: bool | None) -> None:
        verdict = "not measured" if good is None else "met" if good else "not met"
        rows.append([what, bound, value, verdict])

    best, median = ratios(records, "best"), ratios(records, "median")
    cuda = any(r["device"] == "cuda" for r in records)
    for case in (Case("digits", 16), Case("digits", 16, True)):
        key = (case, DISCRETE)
        what, bound = f"discrete, {case}, on the CPU", f"at most {RATIO:.2f} of the bare network"
        if key in median and not cuda:
            shown = f"{best[key]:.3f} / {median[key]:.3f}"
            add(what, bound, shown, median[key] <= RATIO)
        else:
            add(what, bound, "", None)
    for case in dict.fromkeys(key[0] for key in median):
        ours, rival = median.get((case, DISCRETE)), median.get((case, CHECKPOINTED))
        if ours and rival:
            bound = "at most checkpointed backprop"
            add(f"discrete, {case}", bound, f"{ours / rival:.3f} of it", ours <= rival)
    found = peaks(records)
    for (case, rival), by in found.items():
        whole = found.get((case, BACKPROP), {})
        if rival == DISCRETE and len(by) > 1 and len(whole) > 1:
            state = _state(records, case)
            kept = (_growth(by) - state) / (_growth(whole) - state)
            what = f"memory of discrete, {case}: growth beyond the states, over backprop's"
            add(what, f"at most {KEPT:g}", harness.number(max(kept, 0.0)), kept <= KEPT)
    for (problem, points), name in itertools.product(errors.items(), HELD):
        factor = factors(points, name, [b for b in budgets if b <= MOST])
        what = f"{TITLES[problem]}: error of torchdiffeq's best over that of {name}"
        bound = f"above 1 from {min(budgets)} to {MOST} evaluations"
        if not factor:
            add(what, bound, "", None)
            continue
        low, high = (harness.number(f(factor.values())) for f in (min, max))
        under = [str(b) for b, ratio in factor.items() if ratio <= 1]
        shown = f"{low} to {high}" + (f"; not at {', '.join(under)}" if under else "")
        add(what, bound, shown, not under)
    return harness.table(["target", "bound", "measured", ""], rows)


# Colours that colour-blind readers tell apart (Okabe and Ito).
_COLOURS = {
    "discrete, dpmpp-2m": "#999999",
    "discrete, deis-logrho-3": "#56b4e9",
    "AdjointDEIS(1), dpmpp-3m": "#e69f00",
    "AdjointDEIS(2), dpmpp-3m": "#009e73",
    "AdjointDEIS(3), dpmpp-3m": "#0072b2",
}
_THEIRS = {"midpoint": "o", "rk4": "s", "bosh3": "^", "dopri5": "D"}


def draw(errors: Mapping[str, Points], budgets: Sequence[int], path: Path) -> None:
    """Above the errors against evaluations, below torchdiffeq's best over ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3.9 * len(errors), 5.2)
    figure, axes = pyplot.subplots(
        *(2, len(errors)),
        figsize=size,
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(2.0, 1.0),
    )
    for column, (problem, points) in zip(axes.T, errors.items(), strict=True):
        above, below = column
        for name, colour in _COLOURS.items():
            if name not in points:
                continue
            style = {"color": colour, "lw": 1.4, "marker": ".", "ms": 5}
            above.plot(*_line(points[name]), label=name, **style)
            if factor := factors(points, name, budgets):
                below.plot(*_line(factor), **style)
        for method, marker in _THEIRS.items():
            name = f"torchdiffeq {method}"
            if name in points:
                style = {"color": "#d55e00", "lw": 0.8, "ls": "--", "marker": marker, "ms": 3}
                above.plot(*_line(points[name]), label=name, **style)
        below.axhline(1.0, color="0.3", lw=0.8)
        below.axhspan(1e-4, 1.0, color="#d55e00", alpha=0.08)
        above.set(xscale="log", yscale="log", ylim=(1e-6, 3))
        below.set(xscale="log", yscale="log", ylim=(2e-2, 2e2))
        shown = [b for b in (10, 20, 40, 100, 200) if b in budgets]
        below.set_xticks(shown, [str(b) for b in shown])
        for panel in column:
            panel.minorticks_off()
            panel.set_xlim(min(budgets) * 0.9, max(budgets) * 1.1)
            panel.grid(alpha=0.25, lw=0.5)
            panel.tick_params(labelsize=8)
        above.set_title(TITLES[problem], fontsize=10)
        below.set_xlabel("network evaluations, forward and backward", fontsize=9)
    axes[0, 0].set_ylabel("relative error of a_x, median", fontsize=9)
    axes[1, 0].set_ylabel("torchdiffeq's best\nover ours", fontsize=9)
    axes[0, 0].legend(fontsize=6.5, frameon=False, handlelength=2.0, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _line(found: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return sorted(found), [found[n] for n in sorted(found)]


# -- the command -----------------------------------------------------------------------------------


def lines(errors: Mapping[str, Points], table: Table, setting: Setting) -> list[Record]:
    """Errors as records: one for each problem and rival, by evaluations or by steps."""
    found = []
    cells = {(problem, "logsnr", "x"): points for problem, points in errors.items()}
    for part, grouped in (("error", cells), ("table", table)):
        for (problem, grid, leaf), points in grouped.items():
            for rival, by in points.items():
                kept = {str(k): by[k] for k in sorted(by)}
                where = {"problem": problem, "grid": grid, "of": LEAVES[leaf], "dtype": "float64"}
                found.append(_record(part, rival, {"error": kept}, setting, **where))
    return found


def _names(allowed: Iterable[str]) -> click.Choice[str]:
    return click.Choice(tuple(allowed))


@click.command(context_settings={"show_default": True})
@click.option("--part", "parts", multiple=True, type=_names(PARTS), help="Of all.")
@click.option("--device", "place", default="auto", type=_names(("auto", "cpu", "cuda")))
@click.option(
    *("--short/--full", "short"),
    default=None,
    help="Two cases of time (on the CPU four), or all. Full on CUDA, short elsewhere.",
)
@click.option("--problem", "problems", multiple=True, type=_names(PROBLEMS), help="Of all.")
@click.option("--fine", type=click.IntRange(min=10), help="Steps of the exact flow.")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Of the CPU.")
@click.option("--rounds", default=5, type=click.IntRange(min=1), help="Turns of each, at least.")
@click.option("--seconds", default=1.0, help="For each case of time.")
@click.option("--steps", default=20, type=click.IntRange(min=2), help="Of the timed runs.")
@click.option("--memory-steps", default=",".join(map(str, MEMORY_STEPS)))
@click.option("--evaluations", default=",".join(map(str, BUDGETS)), help="Of the errors.")
@click.option("--table-steps", default=",".join(map(str, TABLE_STEPS)))
@click.option("--torchdiffeq/--no-torchdiffeq", "theirs", default=True)
@click.option("--budget", default=math.inf, help="Seconds; cases likely to outlast them are left.")
@click.option("--commit", help="Of the code, where there is no git to ask.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines.")
@click.option("--summary", type=click.Path(dir_okay=False, path_type=Path), help="Markdown.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--images", type=click.Path(file_okay=False, path_type=Path), help="PNG plot.")
def main(
    parts: tuple[str, ...],
    place: str,
    short: bool | None,
    problems: tuple[str, ...],
    fine: int | None,
    threads: int,
    rounds: int,
    seconds: float,
    steps: int,
    memory_steps: str,
    evaluations: str,
    table_steps: str,
    theirs: bool,
    budget: float,
    commit: str | None,
    out: Path | None,
    summary: Path | None,
    docs: Path | None,
    images: Path | None,
) -> None:
    """Gradients through samplers: time, memory and error, beside backprop and torchdiffeq."""
    began = time.perf_counter()
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: PyTorch finds no CUDA device here.")
    device = torch.device(place, 0) if place == "cuda" else torch.device(place)
    brief = place == "cpu" if short is None else short
    chosen = parts or (MACHINE if place == "cuda" else PARTS)
    problems = problems or tuple(PROBLEMS)
    counts, budgets, table_counts = (
        [int(n) for n in text.split(",")] for text in (memory_steps, evaluations, table_steps)
    )
    about = bench_stage.machine(device)
    if commit:
        about["commit"] = commit
    head, notes, lost = harness.where(), [], []
    if has_torchdiffeq():
        head = f"torchdiffeq {importlib.metadata.version('torchdiffeq')}; {head}"
    if place == "cuda":
        head = f"{about['gpu']}, driver {about['driver']}, triton {about['triton']}; {head}"
    if theirs and not has_torchdiffeq():
        theirs = False
        notes.append("torchdiffeq is not installed: its rows are left out.")
    setting = Setting(device, rounds, seconds, theirs, tuple(about.items()))
    records: list[Record] = []
    errors: dict[str, Points] = {}
    table: Table = {}
    refused = 0

    def failed() -> list[str]:
        return [f"Failed: {line}" for line in dict.fromkeys(lost)]

    def pages() -> dict[str, str]:
        blocks = [targets(records, errors, budgets)]
        blocks += ["\n".join(f"- {note}" for note in [*notes, *failed()])]
        if "time" in chosen:
            blocks.append(report_time(records))
        if "memory" in chosen:
            blocks.append(report_memory(records))
        if "error" in chosen:
            blocks.append(report_error(errors, budgets))
        return {
            "gradients": "\n\n".join(block for block in (head, *blocks) if block),
            "adjoint": report_table(table, table_counts),
        }

    def write_summary() -> None:
        if summary is not None:
            summary.parent.mkdir(parents=True, exist_ok=True)
            summary.write_text("\n\n".join(p for p in pages().values() if p) + "\n")

    def keep(found: Sequence[Record]) -> None:
        if out is not None:
            harness.write(out, found)

    def said(what: str) -> None:
        print(f"{what}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        write_summary()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        gate()
        todo = [("memory", case) for case in memory_cases(place)]
        todo[:0] = [("time", replace(case, steps=steps)) for case in cases(place, brief)]
        for part, case in (job for job in todo if job[0] in chosen):
            needs = SECONDS[case.kind] * (1.5 if part == "memory" else 1.0)
            if time.perf_counter() - began + needs > budget:
                notes.append(f"The budget of {budget:g} s left out {part}, {case}.")
                continue
            try:
                if part == "time":
                    found = measure_time(case, setting, lost)
                else:
                    found = measure_memory(case, setting, lost, counts)
            except harness.GateError as error:
                refused += 1
                notes.append(f"Gate: {error}")
                continue
            finally:
                gc.collect()
                if place == "cuda":
                    with contextlib.suppress(RuntimeError):
                        torch.cuda.empty_cache()
            records += found
            keep(found)
            said(f"{part}, {case}")
        for name in problems:
            steps_of = fine or FINE[name]
            if "error" in chosen:
                flow = PROBLEMS[name]()
                errors[name] = measure_error(flow, steps_of, budgets, theirs)
                said(f"error, {TITLES[name]}")
            if "table" in chosen:
                grids = ("logsnr", "uniform") if name == "mixture" else ("logsnr",)
                table |= measure_table(name, PROBLEMS[name](), steps_of, table_counts, grids)
                said(f"table, {TITLES[name]}")
        if "table" in chosen and "mixture" in problems:
            table |= measure_noise(mixture(), table_counts, fine or 1000)
            said("table, along noise")
        keep(lines(errors, table, setting))
    finally:
        torch.set_num_threads(before)
    write_summary()
    page = pages()
    click.echo("\n\n".join(text for text in page.values() if text))
    if images is not None and errors:
        draw(errors, budgets, images / "gradients.png")
    if docs is not None:
        if {"time", "memory", "error"} <= set(chosen):
            harness.replace_section(docs, "gradients", page["gradients"])
        if "table" in chosen:
            harness.replace_section(docs, "adjoint", page["adjoint"])
    if refused or lost:
        raise click.ClickException(
            f"{refused} cases did not pass the gate and {len(lost)} rivals failed; see above."
        )


if __name__ == "__main__":
    main()
