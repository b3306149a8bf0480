# SPDX-License-Identifier: Apache-2.0
"""Whole sampling loops, on a network that costs nothing and on real ones with random weights.

A cell is a network and a shape. Its rivals run the same DPM-Solver++(2M) over the same times: our
loop, eager and captured, and diffusers' `scheduler.step` around the same network, eager, captured
and compiled. The same number of calls of the network alone takes turns with them: what a rival
takes beyond it is the sampler's. Execution is timed, not enqueueing, in two ways on CUDA: waiting
after every loop, as one who needs the sample does, and after a queue of loops. A cell is timed only
after its rivals have ended in the same place as the reference. Cells come in order of importance,
and results are written cell by cell: a run that is cut short leaves the best part.

    python benchmarks/bench_loop.py --short --out benchmarks/results/loop.jsonl
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_stage
import bench_step
import click
import harness
import torch
from harness import Record, Rival
from torch import nn

import fastdiff as fd
from fastdiff import backends
from fastdiff.backends import Registers

EAGER, STAGE, LOOP = "fastdiff eager", "fastdiff, stage graph", "fastdiff, loop graph"
REPLAY = "fastdiff, loop graph, its replay alone"
THEIRS, GRAPHED = "diffusers eager", "diffusers, network in a graph"
NETWORK, CAPTURED = "network alone", "network alone, calls in one graph"
COMPILED = "network alone, compiled"
THEIRS_COMPILED, OURS_COMPILED = "diffusers, network compiled", "fastdiff eager, network compiled"
AS_ONE = "network alone, calls compiled as one"
TRACED, OPERATOR = "fastdiff, whole call compiled", "stages as an operator, whole loop compiled"

# Whose time is taken off a rival's.
ALONE = dict.fromkeys((EAGER, THEIRS), NETWORK)
ALONE |= dict.fromkeys((STAGE, LOOP, REPLAY, GRAPHED), CAPTURED)
ALONE |= dict.fromkeys((OURS_COMPILED, THEIRS_COMPILED), COMPILED)
ALONE |= dict.fromkeys((TRACED, OPERATOR), AS_ONE)
WAITED, QUEUED = "waited", "queued"
STAGE_MOST, LOOP_MOST, TIMES, SHARE, SLACK = 3.0, 60.0, 10.0, 0.05, 2.0  # us, us, -, -, us a stage

Loop = Callable[[], torch.Tensor | None]
Cond = dict[str, torch.Tensor]


# -- the networks ----------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """Sines and cosines of t [B] at frequencies from 1 to 1e-4: [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.linspace(0.0, 1.0, width // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * exponents))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Mlp(nn.Module):
    """A policy: noisy action [B, actions], time and observation to epsilon, by three layers."""

    def __init__(self, actions: int, observed: int, width: int = 256) -> None:
        super().__init__()
        self.embed = TimeEmbedding(64)
        sizes = (actions + 64 + observed, width, width, width)
        hidden = [[nn.Linear(a, b), nn.Mish()] for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, actions))

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, self.embed(t), obs], dim=1))


def _convolved(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(c_in, c_out, 5, padding=2), nn.GroupNorm(8, c_out), nn.Mish())


class Residual(nn.Module):
    """Two convolutions; the condition scales and shifts what lies between them."""

    def __init__(self, c_in: int, c_out: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = _convolved(c_in, c_out), _convolved(c_out, c_out)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * c_out))
        self.skip = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class ConvPolicy(nn.Module):
    """The conditional 1-D U-Net of diffusion policies, in the form of LeRobot's.

    Noisy actions [B, horizon, actions] are convolved over the horizon, which halves from level to
    level; time and observation condition every block.

    Source: Chi et al., "Diffusion Policy", arXiv:2303.04137, section 3.1.
    """

    def __init__(self, actions: int, observed: int, widths: Sequence[int]) -> None:
        super().__init__()
        embed, condition = 128, 128 + observed
        self.time = nn.Sequential(
            *(TimeEmbedding(embed), nn.Linear(embed, 4 * embed), nn.Mish()),
            nn.Linear(4 * embed, embed),
        )
        pairs = list(itertools.pairwise((actions, *widths)))

        def two(c_in: int, c_out: int) -> nn.ModuleList:
            return nn.ModuleList(
                [Residual(c_in, c_out, condition), Residual(c_out, c_out, condition)]
            )

        self.down = nn.ModuleList(two(*pair) for pair in pairs)
        self.shrink = nn.ModuleList(nn.Conv1d(w, w, 3, 2, 1) for w in widths[:-1])
        self.middle = two(widths[-1], widths[-1])
        self.up = nn.ModuleList(two(2 * c_out, c_in) for c_in, c_out in pairs[:0:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose1d(w, w, 4, 2, 1) for w in widths[-2::-1])
        width = widths[0]
        self.last = nn.Sequential(_convolved(width, width), nn.Conv1d(width, actions, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        condition = torch.cat([self.time(t), obs], dim=1)
        h, kept = x.transpose(1, 2), []
        for k, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, condition)
            kept.append(h)
            if k < len(self.shrink):
                h = self.shrink[k](h)
        for block in self.middle:
            h = block(h, condition)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            h = torch.cat([h, kept.pop()], dim=1)
            for block in blocks:
                h = block(h, condition)
            h = grow(h)
        return self.last(h).transpose(1, 2)


class FromDiffusers(nn.Module):
    """A model of diffusers' as network(x, t, cond)."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.model(x, timestep=t, **{self.name: cond}, return_dict=False)[0]


def _dit() -> nn.Module:
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_layers=12,
        num_attention_heads=6,
        attention_head_dim=64,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        sample_size=32,
    )
    return FromDiffusers(model, "class_labels")


def _unet(small: bool) -> nn.Module:
    import diffusers

    if small:
        model = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            sample_size=32,
        )
    else:  # what it does not say is as in Stable Diffusion 1.5's config
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    return FromDiffusers(model, "encoder_hidden_states")


def _constant(output: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda x, t: output


# -- cells -----------------------------------------------------------------------------------------

TITLES = {"null": "null", "mlp": "MLP", "conv": "1-D U-Net", "dit": "DiT-S/2", "unet": "SD U-Net"}
BORROWED = ("dit", "unet")  # diffusers' networks
# Guesses, not measured: seconds that a cell takes on an H200, and the compiler more.
SECONDS = {"null": 5, "mlp": 6, "conv": 8, "dit": 15, "unet": 40}
COMPILER_SECONDS = {"null": 0, "mlp": 25, "conv": 45, "dit": 45, "unet": 150}


@dataclass(frozen=True)
class Case:
    """A network and what it is given.

    Attributes:
        kind: A key of `TITLES`.
        shape: Of x.
        steps: Of the loop, one stage each.
        dtype: Of the network, and of x.
        small: Narrower than the model it is named for.
    """

    kind: str
    shape: tuple[int, ...]
    steps: int
    dtype: torch.dtype = torch.float32
    small: bool = False

    def __str__(self) -> str:
        shape = "[" + ",".join(map(str, self.shape)) + "]"
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{'small ' * self.small}{TITLES[self.kind]} {shape}{dtype}, {self.steps} steps"


@dataclass(frozen=True)
class Cell:
    """A case and which of its rivals take turns: those that compile are a group of their own."""

    case: Case
    compiled: bool = False

    @property
    def seconds(self) -> float:
        """About, to keep to a budget."""
        kind = self.case.kind
        whole = SECONDS[kind] + self.compiled * COMPILER_SECONDS[kind]
        return whole / 2 if self.case.small else whole


def cells(place: str, short: bool, compiled: bool, kinds: Sequence[str] = ()) -> list[Cell]:
    """What to measure, the most important first.

    Args:
        place: "cpu" or "cuda".
        short: Fewer shapes, and small networks; on the CPU they are small always.
        compiled: The compiled rivals as well.
        kinds: Keys of `TITLES`; none: all.
    """
    small = short or place == "cpu"
    dtype = torch.float16 if place == "cuda" else torch.float32
    latent = (1, 4, 32, 32) if small else (1, 4, 64, 64)
    first, *more = (Case("mlp", (batch, 16), 10) for batch in (1, 256, 16))
    conv = Case("conv", (1, 16, 14), 10, small=small)
    cases = [
        *(Case("null", (1, 4, 64, 64), 20), first, conv),
        *(Case("dit", (1, 4, 32, 32), 20, dtype), Case("unet", latent, 20, dtype, small)),
    ]
    compiles = [first]
    if not short:
        cases += [*more, replace(conv, shape=(1, 16, 2))]
        compiles = [c for c in cases if c.kind != "null" and (place == "cuda" or c.kind == "mlp")]
    found = [Cell(case) for case in cases]
    found += [Cell(case, True) for case in compiles if compiled]
    return [cell for cell in found if not kinds or cell.case.kind in kinds]


@dataclass(frozen=True)
class Parts:
    """A case made: everything that a loop starts from."""

    case: Case
    network: Callable[..., torch.Tensor]
    cond: Cond
    start: torch.Tensor
    plan: fd.Plan

    @property
    def parameters(self) -> int:
        tensors = self.network.parameters() if isinstance(self.network, nn.Module) else ()
        return sum(p.numel() for p in tensors)

    def time(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One time of the loop, as the network is given it: [B]."""
        told = self.plan.stages[0].model_time
        return torch.full((len(self.start),), told, device=self.start.device).to(dtype)


def parts_of(case: Case, device: torch.device) -> Parts:
    """The network with random weights, its condition, x at the first time, and the plan."""
    torch.manual_seed(0)
    batch, cond = case.shape[0], {}
    with torch.device(device):
        if case.kind == "null":
            network: Any = _constant(torch.randn(case.shape))
        elif case.kind == "mlp":
            network, cond = Mlp(case.shape[1], 32), {"obs": torch.randn(batch, 32)}
        elif case.kind == "conv":
            widths = (64, 128, 256) if case.small else (512, 1024, 2048)
            network = ConvPolicy(case.shape[2], 132, widths)
            cond = {"obs": torch.randn(batch, 132)}
        elif case.kind == "dit":
            network, cond = _dit(), {"cond": torch.arange(batch)}
        else:
            network = _unet(case.small)
            cond = {"cond": torch.randn(batch, 77, 32 if case.small else 768).to(case.dtype)}
        start = torch.randn(case.shape).to(case.dtype)
    if isinstance(network, nn.Module):
        network = network.to(device, case.dtype).eval().requires_grad_(False)
    plan = bench_step.plan("dpmpp-2m", case.steps, lower_order_final=False)
    return Parts(case, network, cond, start, plan)


# -- the rivals ------------------------------------------------------------------------------------


def ours(parts: Parts, graph: str | None, network: Any = None) -> Loop:
    called = parts.network if network is None else network
    sampler = fd.Sampler(called, parts.plan, graph=graph)
    out = torch.empty_like(parts.start)
    return functools.partial(sampler, parts.start, parts.cond or None, out=out)


def replay_alone(parts: Parts) -> Loop:
    """The captured loop without the call around it: x is copied in, and nothing else is done."""
    sampler, start = fd.Sampler(parts.network, parts.plan, graph="loop"), parts.start
    sampler(start, parts.cond or None)
    (captures,) = sampler._captures.values()
    (entry,) = captures._entries.values()
    x, launch = entry.run.registers.x, entry.launches[None]

    def loop(keep: fd.Sampler = sampler) -> torch.Tensor:
        x.copy_(start)  # from its own end it would grow without bound
        launch()
        return x

    return loop


def _drop(run: Callable[[], Any], *keep: Any) -> None:
    """Runs and returns nothing; what is passed along stays alive."""
    run()


def theirs(parts: Parts, network: Any = None) -> Loop:
    """diffusers' DPM++2M around a network; what `set_timesteps` makes is made beforehand."""
    scheduler = bench_step.schedulers(parts.case.steps)[bench_step.THEIR_2M]
    scheduler.set_timesteps(parts.case.steps, device=parts.start.device)
    called, cond = parts.network if network is None else network, parts.cond
    start, batch = parts.start, len(parts.start)

    def loop() -> torch.Tensor:
        # to its first step again, without the price of set_timesteps
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        scheduler.lower_order_nums = 0
        scheduler.model_outputs = [None] * scheduler.config.solver_order
        x = start
        for t in scheduler.timesteps:
            out = called(x, t.expand(batch), **cond)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return loop


def alone(parts: Parts, network: Any = None) -> Loop:
    """As many calls of the network as a loop makes."""
    called, cond = parts.network if network is None else network, parts.cond
    x, t = parts.start, parts.time()
    steps = range(parts.case.steps)

    def loop() -> None:
        for _ in steps:
            called(x, t, **cond)

    return loop


def capture(body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a body: what launches it, and what the body returned, which it rewrites.

    Libraries choose and allocate at first calls: the body runs three times on a side stream first.
    Workspaces of matrix libraries lie in the graph that first needed them; they are given up before
    and after, so that no graph uses another's, which may be gone.
    """
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph):
        out = body()
    torch._C._cuda_clearCublasWorkspaces()
    return graph.replay, out


class Graphed:
    """A network in a CUDA graph, as one captures one by hand: inputs are copied to fixed memory.

    The condition is the one captured, in its place: it is not copied.
    """

    def __init__(self, parts: Parts) -> None:
        self.x, self.t = parts.start.clone(), parts.time(torch.int64)
        network, cond = parts.network, parts.cond
        self.launch, self.out = capture(lambda: network(self.x, self.t, **cond))

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        self.launch()
        return self.out


def compiled_network(parts: Parts) -> Callable[..., torch.Tensor]:
    """The network under torch.compile, for CUDA with its own graphs."""
    compiled = torch.compile(parts.network, mode="reduce-overhead", dynamic=False)
    if parts.start.device.type != "cuda":
        return compiled

    def network(x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last output is not needed any more
        return compiled(x, t, **cond)

    return network


# -- a whole loop in one compiled function ---------------------------------------------------------

_bound: list[tuple[Any, torch.Tensor, torch.Tensor]] = []  # stage, x and history of each loop


def _run_stage(
    loop: int, row: int, x: torch.Tensor, history: torch.Tensor, out: torch.Tensor
) -> None:
    """The operator: one stage of the compiled core, on the registers that it was bound to.

    The compiler may hand over copies of them; those are copied in and back, as they would have
    to be.
    """
    run, *own = _bound[loop]
    moved = [
        (mine, given)
        for mine, given in zip(own, (x, history), strict=True)
        if mine.data_ptr() != given.data_ptr()
    ]
    for mine, given in moved:
        mine.copy_(given)
    run(row, out, None)
    for mine, given in moved:
        given.copy_(mine)


@functools.cache
def _library() -> torch.library.Library:
    """`torch.ops.fastdiff_bench.stage`, which writes to its x and history."""
    library = torch.library.Library("fastdiff_bench", "DEF")
    library.define(
        "stage(int loop, int row, Tensor(a!) x, Tensor(b!) history, Tensor out) -> ()",
    )
    library.impl("stage", _run_stage, "CPU")
    library.impl("stage", lambda loop, row, x, history, out: None, "Meta")
    return library


def compiled_loops(parts: Parts) -> dict[str, Callable[[], Loop]]:
    """Whole loops as one compiled function each, on the CPU."""
    network, plan, start, cond = parts.network, parts.plan, parts.start, parts.cond
    batch, times = len(start), [stage.model_time for stage in plan.stages]

    def compiled(function: Callable[..., Any], x: torch.Tensor = start) -> Loop:
        run = torch.compile(function, mode="reduce-overhead", dynamic=False, fullgraph=True)
        return functools.partial(run, x, cond)

    def traced() -> Loop:
        return compiled(lambda x, cond: fd.sample(network, x, plan, cond=cond))

    def calls(x: torch.Tensor, cond: Cond) -> torch.Tensor:
        for t in times:  # one on the other's output, or the compiler would make them one
            x = network(x, torch.full((batch,), t), **cond)
        return x

    def operator() -> Loop:
        _library()
        registers = Registers(
            x=torch.empty_like(start), history=start.new_empty((plan.slots, *start.shape))
        )
        x, history, loop = registers.x, registers.history, len(_bound)
        assert history is not None
        table = torch.from_numpy(plan.pack((1.0,)))
        run = backends.get("cpu").bind(registers, table, plan.layout).run
        _bound.append((run, x, history))

        def stages(x: torch.Tensor, cond: Cond) -> None:
            for row, t in enumerate(times):
                out = network(x, torch.full((batch,), t), **cond)
                torch.ops.fastdiff_bench.stage(loop, row, x, history, out)

        run_stages = compiled(stages, x)

        def sample() -> torch.Tensor:
            x.copy_(start)  # outside: the compiler would move x to memory of its own
            run_stages()
            return x

        return sample

    def as_one() -> Loop:
        return functools.partial(_drop, compiled(calls))

    return {AS_ONE: as_one, TRACED: traced, OPERATOR: operator}


def makers(cell: Cell, parts: Parts, with_diffusers: bool) -> dict[str, Callable[[], Loop]]:
    """What makes each rival of a cell, compiles or captures it included."""
    case, cuda = cell.case, parts.start.device.type == "cuda"
    found: dict[str, Callable[[], Loop]] = {}
    if cell.compiled:
        torch._dynamo.reset()
        network = compiled_network(parts)
        found[COMPILED] = lambda: alone(parts, network)
        if with_diffusers:
            found[THEIRS_COMPILED] = lambda: theirs(parts, network)
        found[OURS_COMPILED] = lambda: ours(parts, None, network)
        if not cuda and case.kind == "mlp":
            found |= compiled_loops(parts)
        return found
    if case.kind != "null":
        found[NETWORK] = lambda: alone(parts)
        if cuda:
            run = alone(parts)
            found[CAPTURED] = lambda: functools.partial(_drop, capture(run)[0], run)
    found[EAGER] = lambda: ours(parts, None)
    if cuda:
        found[STAGE] = lambda: ours(parts, "stage")
        found[LOOP] = lambda: ours(parts, "loop")
        found[REPLAY] = lambda: replay_alone(parts)
    if with_diffusers:
        found[THEIRS] = lambda: theirs(parts)
        if cuda and case.kind != "null":
            found[GRAPHED] = lambda: theirs(parts, Graphed(parts))
    return found


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


def reference(parts: Parts) -> torch.Tensor:
    """Where a loop ends, by the `torch` backend."""
    given = (parts.network, parts.start, parts.plan)
    return fd.sample(*given, cond=parts.cond or None, backend="torch", graph=None)


def gate(parts: Parts, loops: Mapping[str, Loop], wanted: torch.Tensor) -> None:
    """Every rival that samples ends where it should.

    Raises:
        harness.GateError: One does not.
    """
    for name, loop in loops.items():
        for _ in range(2):  # a replay starts where the last one ended: it must not matter
            got = loop()
        if got is not None:
            who = f"{name}, {parts.case}"
            harness.agree(who, got, wanted, tolerance(parts.case, wanted.device))


# -- a cell ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all cells of a run share."""

    device: torch.device
    rounds: int
    seconds: float
    diffusers: bool
    where: tuple[tuple[str, Any], ...] = ()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loops_in_a_turn(loop: Loop, count: int, device: torch.device) -> Callable[[], None]:
    """Some loops and the end of the last of them: their execution, not their enqueueing."""

    def run() -> None:
        for _ in range(count):
            loop()
        _wait(device)

    return run


def measure(cell: Cell, setting: Setting, lost: list[str]) -> list[Record]:
    """All rivals of one cell; one that raises is left out, and why is added to `lost`.

    Raises:
        harness.GateError: Rivals end in different places.
    """
    case, device = cell.case, setting.device
    parts = parts_of(case, device)
    wanted = reference(parts)
    loops: dict[str, Loop] = {}
    for name, make in makers(cell, parts, setting.diffusers).items():
        try:
            loop = make()
            loop()  # compiles, and captures
            _wait(device)
            loops[name] = loop
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, {case}: {_reason(error)}")
    gate(parts, loops, wanted)
    timings = {}
    options = {"seconds": setting.seconds, "warmup": 1, "rounds": setting.rounds, "turn": 5e-3}
    rivals = [Rival(n, loops_in_a_turn(run, 1, device), case.steps) for n, run in loops.items()]
    timings[WAITED] = harness.race(rivals, **options)
    if device.type == "cuda":
        rivals = []
        for name, run in loops.items():
            once = timings[WAITED][name].median * case.steps
            count = min(64, math.ceil(1e-2 / once))
            if count > 1:  # one loop in a queue is one that was waited for
                run = loops_in_a_turn(run, count, device)
                rivals.append(Rival(name, run, case.steps * count))
        timings[QUEUED] = harness.race(rivals, **options) if rivals else {}
    state = torch.float32
    return [
        harness.record(
            *("loop", name, timing),
            network=case.kind,
            small=case.small,
            parameters=parts.parameters,
            shape=list(case.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            steps=case.steps,
            compiled=cell.compiled,
            timing=kind,
            backend=backends.choose(None, state, case.dtype, device).name,
            **dict(setting.where),
        )
        for kind, found in timings.items()
        for name, timing in found.items()
    ]


# -- reports ---------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _case_of(line: Record) -> Case:
    dtype = getattr(torch, line["dtype"])
    return Case(line["network"], tuple(line["shape"]), line["steps"], dtype, line["small"])


def _key(line: Record) -> tuple[Any, ...]:
    return _case_of(line), line["compiled"], line["timing"], line["rival"]


def beyond(records: Sequence[Record], which: str) -> dict[tuple[Any, ...], float]:
    """What each rival takes beyond the network's own time, us a step.

    Args:
        records: Some lines.
        which: "best" or "median", of both times.

    Returns:
        Times by key; none where the network's own was not measured, all of it where the network
        costs nothing.
    """
    by = {_key(r): r[which] for r in records}
    found = {}
    for r in records:
        own = by.get((*_key(r)[:-1], ALONE.get(r["rival"])))
        if r["network"] == "null":
            own = 0.0
        if own is not None:
            found[_key(r)] = r[which] - own
    return found


def _us(value: float) -> str:
    return harness.number(value) if abs(value) < 1e3 else f"{value:.0f}"


def report(records: Sequence[Record], place: str) -> str:
    """A table of every cell and rival: medians, and what lies beyond the network's own."""
    over = [beyond(records, which) for which in ("best", "median")]
    by = {_key(r): r for r in records}

    def extra(key: tuple[Any, ...]) -> str:
        return " / ".join(_us(found[key]) for found in over) if key in over[0] else ""

    rows = []
    for r in records:
        if r["timing"] != WAITED:
            continue
        size = f", {r['parameters'] / 1e6:.3g} M" if r["parameters"] else ""
        row = [f"{_case_of(r)}{size}", r["rival"]]
        row += [f"{_us(r['median'])} ({_us(r['p20'])} to {_us(r['p80'])})", extra(_key(r))]
        if place == "cuda":
            key = (*_key(r)[:2], QUEUED, r["rival"])
            row += [_us(by[key]["median"]) if key in by else "", extra(key)]
        rows.append(row)
    own = "beyond the network: best / median"
    head = ["network, parameters", "rival", "us a step: median (p20 to p80)", own]
    return harness.table(head + ["queued: median", own] * (place == "cuda"), rows)


def targets(records: Sequence[Record]) -> str:
    """Every target beside what a GPU measured: met, not met or not measured."""
    by = {
        (r["network"], tuple(r["shape"]), r["rival"], r["timing"]): r
        for r in records
        if r["device"] == "cuda" and not r["compiled"]
    }
    n, rows = harness.number, []

    def us(kind: str, shape: tuple[int, ...], rival: str, timing: str) -> float | None:
        """Of a whole loop."""
        line = by.get((kind, shape, rival, timing))
        return None if line is None else line["median"] * line["steps"]

    def add(what: str, bound: str, value: str, good: bool | None) -> None:
        verdict = "not measured" if good is None else "met" if good else "not met"
        rows.append([what, bound, value, verdict])

    null, mlp = ("null", (1, 4, 64, 64)), ("mlp", (1, 16))
    whole = us(*null, REPLAY, QUEUED)
    stage = None if whole is None else whole / 20
    bound = f"at most {STAGE_MOST:g} us"
    what = "null network [1,4,64,64]: a stage of the replay alone, queued"
    add(what, bound, "" if stage is None else f"{n(stage)} us", stage and stage <= STAGE_MOST)
    for timing in (WAITED, QUEUED):
        loop = us(*null, LOOP, timing)
        what = f"null network [1,4,64,64]: a call of 20 stages, {timing}"
        good = None if loop is None else loop <= LOOP_MOST
        add(what, f"at most {LOOP_MOST:g} us", "" if loop is None else f"{n(loop)} us", good)
    for timing in (WAITED, QUEUED):
        loop, rival = us(*mlp, LOOP, timing), us(*mlp, THEIRS, timing)
        ratio = rival / loop if loop and rival else None
        what = f"MLP [1,16], 10 stages: diffusers eager over ours, {timing}"
        good = None if ratio is None else ratio >= TIMES
        add(what, f"at least {TIMES:g}", "" if ratio is None else n(ratio), good)
    for timing in (WAITED, QUEUED):
        loop, own = us(*mlp, LOOP, timing), us(*mlp, CAPTURED, timing)
        what = f"MLP [1,16], 10 stages: ours beyond the captured network, {timing}"
        bound, value, good = f"at most {SHARE:.0%} or {SLACK:g} us a stage", "", None
        if loop and own:
            most = max(SHARE * own, 10 * SLACK)
            bound += f": {n(most)} us"
            value, good = f"{n(loop - own)} us", loop - own <= most
        add(what, bound, value, good)
    return harness.table(["target, on an H200", "bound", "measured", ""], rows)


@click.command(context_settings={"show_default": True})
@click.option("--device", "place", default="auto", type=click.Choice(("auto", "cpu", "cuda")))
@click.option(
    *("--short/--full", "short"),
    default=None,
    help="Fewer shapes and small networks, or all. Full on CUDA, short elsewhere.",
)
@click.option("--case", "kinds", multiple=True, type=click.Choice(tuple(TITLES)), help="Of all.")
@click.option("--compile/--no-compile", "compiled", default=True, help="torch.compile as well.")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Of the CPU.")
@click.option("--rounds", default=5, type=click.IntRange(min=1), help="Turns of each, at least.")
@click.option("--seconds", default=0.5, help="For each cell and way of timing.")
@click.option("--budget", default=math.inf, help="Seconds; cells likely to outlast them are left.")
@click.option("--commit", help="Of the code, where there is no git to ask.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines.")
@click.option("--summary", type=click.Path(dir_okay=False, path_type=Path), help="Markdown.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(
    place: str,
    short: bool | None,
    kinds: tuple[str, ...],
    compiled: bool,
    threads: int,
    rounds: int,
    seconds: float,
    budget: float,
    commit: str | None,
    out: Path | None,
    summary: Path | None,
    docs: Path | None,
) -> None:
    """Whole sampling loops beside diffusers', and beside the network alone."""
    began = time.perf_counter()
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: PyTorch finds no CUDA device here.")
    device = torch.device(place, 0) if place == "cuda" else torch.device(place)
    todo = cells(place, place == "cpu" if short is None else short, compiled, kinds)
    about = bench_stage.machine(device)
    if commit:
        about["commit"] = commit
    head, notes = harness.where(), []
    if place == "cuda":
        head = f"{about['gpu']}, driver {about['driver']}, triton {about['triton']}; {head}"
    with_diffusers = importlib.util.find_spec("diffusers") is not None
    if not with_diffusers:
        left = [str(cell.case) for cell in todo if cell.case.kind in BORROWED]
        todo = [cell for cell in todo if cell.case.kind not in BORROWED]
        notes.append(
            "diffusers is not installed: left out are its loops"
            + (f", and its networks: {'; '.join(dict.fromkeys(left))}." if left else ".")
        )
    setting = Setting(device, rounds, seconds, with_diffusers, tuple(about.items()))
    records: list[Record] = []
    lost: list[str] = []
    refused = 0

    def page() -> str:
        blocks = [head, "\n".join(f"- {note}" for note in notes), targets(records)]
        return "\n\n".join(block for block in (*blocks, report(records, place)) if block)

    def write_summary() -> None:
        if summary is not None:
            summary.parent.mkdir(parents=True, exist_ok=True)
            summary.write_text(page() + "\n", encoding="utf-8")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            for cell in todo:
                what = f"{cell.case}{', compiled' * cell.compiled}"
                if time.perf_counter() - began + cell.seconds > budget:
                    notes.append(f"The budget of {budget:g} s left out {what}.")
                    continue
                try:
                    found = measure(cell, setting, lost)
                except Exception as error:  # says so, and goes on to the next cell
                    refused += isinstance(error, harness.GateError)
                    if not isinstance(error, harness.GateError):
                        lost.append(f"{what}: {_reason(error)}")
                    else:
                        notes.append(f"Gate: {_reason(error)}")
                    continue
                finally:
                    gc.collect()  # networks and graphs of this cell
                    if place == "cuda":
                        with contextlib.suppress(RuntimeError):
                            torch.cuda.empty_cache()
                records += found
                if out is not None:
                    harness.write(out, found)
                print(what, file=sys.stderr, flush=True)
                write_summary()
    finally:
        torch.set_num_threads(before)
    notes += [f"Failed: {line}" for line in lost]
    write_summary()
    click.echo(page())
    if docs is not None:
        harness.replace_section(docs, "loop", page())
    if refused or lost:
        raise click.ClickException(
            f"{refused} cells did not pass the gate and {len(lost)} rivals or cells failed; see "
            "above."
        )


if __name__ == "__main__":
    main()
