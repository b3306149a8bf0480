# SPDX-License-Identifier: Apache-2.0
"""One stage on every backend: its share of the copy bandwidth and the host's time per launch.

A cell is a kind of row (M outputs combined, G guidance branches, the network's dtype, noise or
not, forward or of the transposed plan that a backward pass runs) at a size. Its rivals take turns
on the same registers, of which there are as many sets as it takes to pass the last cache (32 at
most). On CUDA a turn is a queue of launches behind a short wait: events see the device's time alone
and the host's clock the time to enqueue alone; elsewhere a launch is a call, and both are one. A
row is timed only after the backends have agreed on it, to the bit where that is promised. Cells
come in order of importance, and results are written cell by cell: a run that is cut short leaves
the best part.

    python benchmarks/bench_stage.py --short --out benchmarks/results/stage.jsonl
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import harness
import torch
from harness import Record, Timing

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.plans import Layout, Plan, Stage, Transposed

KIB, MIB, GIB = 2**10, 2**20, 2**30
SIZES = tuple(k * KIB for k in (4, 64)) + tuple(k * MIB for k in (1, 16, 64, 256, 1024))
TINY = ((65536, 16), (4096, 64))
LARGE = 64 * MIB  # registers from here on are held to `SHARE`
SHARE = 0.90
CUDA_HOST, ABOVE_LAUNCHER = 8.0, 5.0  # us
COPY, LAUNCHER = "copy_", "triton, empty kernel"
EAGER, INDUCTOR, THEIRS = "eager torch, hoisted", "torch.compile", "diffusers DPM++2M"
P, A_X, C = -0.25, 0.5, 0.1
B_J = (0.3, -0.2, 0.1, -0.05)  # of h and of earlier outputs: sums under 1, so that x stays bounded
GUIDANCE = ((1.0,), (3.0, -2.0))
Shape = tuple[int, ...]
Calls = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Backward:
    """A transposed plan with what is read of a plan: its rows and whether they evaluate."""

    transposed: Transposed

    @property
    def layout(self) -> Layout:
        return self.transposed.layout

    @property
    def slots(self) -> int:
        return self.transposed.slots

    @property
    def stages(self) -> tuple[Any, ...]:
        """Of row 0, which makes h_bar of the last stage alone, and of the stages' rows."""
        own = (stage.evaluate for stage in reversed(self.transposed.plan.stages))
        return tuple(SimpleNamespace(evaluate=evaluate) for evaluate in (False, *own))

    def pack(self, weights: Sequence[float]) -> Any:
        return self.transposed.pack(len(weights))


@dataclass(frozen=True)
class Case:
    """A kind of row.

    Attributes:
        outputs: M, the network outputs combined, the present one included.
        branches: G.
        network: Dtype of the network's outputs and of its next input.
        noise: Whether the row draws.
        backward: Whether it is of the transposed plan: x, e and the outputs are cotangents, and the
            input that it writes is the next product's.
    """

    outputs: int = 2
    branches: int = 1
    network: torch.dtype = torch.float32
    noise: bool = False
    backward: bool = False

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,) * self.branches if self.backward else GUIDANCE[self.branches - 1]

    @property
    def copies(self) -> int:
        """Times the network's next input is written: none where the network is given x itself."""
        own = self.branches > 1 or self.network != torch.float32 or self.backward
        return self.branches if own else 0

    @property
    def row(self) -> int:
        """The first row of full order, which pushes as well if M > 1 (backward: M > 2)."""
        return self.outputs if self.backward else self.outputs - 1

    @property
    def rows(self) -> Plan | Backward:
        """What is bound."""
        return Backward(self.plan.transpose()) if self.backward else self.plan

    @property
    def values(self) -> dict[str, float]:
        """Its row by column."""
        rows = self.rows
        row = rows.pack(self.weights)[self.row].tolist()
        return dict(zip(replace(rows.layout, branches=self.branches).columns, row, strict=True))

    @functools.cached_property
    def plan(self) -> Plan:
        """Rows of rising order, then of full order to the end."""
        stages = []
        for k in range(2 * self.outputs):
            stage = Stage(t=1.0 - k / 16, p=P, a_x=A_X, b=B_J[: min(k + 1, self.outputs)])
            if self.noise:
                stage = replace(stage, c=C, noise=((k + 1, 1.0),))
            stages.append(stage)
        return Plan(stages=tuple(stages), times=(1.0, 0.0))

    def bytes(self, numel: int) -> int:
        """What its row moves, counted from the row's flags."""
        return harness.stage_bytes(
            *(self.rows, self.row, numel, torch.float32, self.network),
            weights=self.weights,
            copies=self.copies,
        )

    def __str__(self) -> str:
        dtype = str(self.network).removeprefix("torch.")
        text = f"M={self.outputs} G={self.branches} {dtype}" + ", noise" * self.noise
        return text + ", backward" * self.backward


CHOSEN = (
    Case(),
    Case(noise=True),
    Case(backward=True),
    Case(network=torch.bfloat16),
    Case(3, 2, torch.bfloat16, True),
    Case(3, 2, backward=True),
)
SHOWN = CHOSEN[:3]  # on the page at every size


def all_cases() -> tuple[Case, ...]:
    """The chosen ones, then the rest of the product; of backward rows those in float32."""
    dtypes = (torch.float32, torch.bfloat16)
    product = itertools.product(range(1, 5), (1, 2), dtypes, (False, True))
    found = [*CHOSEN, *itertools.starmap(Case, product)]
    found += [Case(m, g, backward=True) for m, g in itertools.product(range(1, 5), (1, 2))]
    return tuple(dict.fromkeys(found))


def cells(short: bool, largest: int) -> list[tuple[Case, Shape]]:
    """What to measure, the most important first.

    Args:
        short: The chosen cases at 4 KiB, 1 MiB and 64 MiB alone.
        largest: Bytes of a register, at most.
    """
    sizes = [s for s in SIZES if s <= largest]
    shapes: list[Shape] = [(1, s // 4) for s in sizes]
    first: list[Shape] = [(1, s // 4) for s in (4 * KIB, 64 * MIB, MIB) if s <= largest]
    found = list(itertools.product(CHOSEN, first))
    if not short:
        tiny: list[Shape] = [s for s in TINY if 4 * math.prod(s) <= largest]
        found += itertools.product(CHOSEN, [*shapes[::-1], *tiny])
        found += itertools.product(all_cases(), [s for s in first if s != (1, KIB)])
        found += itertools.product(all_cases(), tiny)
    return list(dict.fromkeys(found))


# -- registers -------------------------------------------------------------------------------------


def registers_of(case: Case, shape: Shape, device: torch.device) -> tuple[Registers, torch.Tensor]:
    """Filled registers for a case, and an output of its network."""
    generator = torch.Generator(device).manual_seed(0)

    def normals(*leading: int) -> torch.Tensor:
        return torch.randn((*leading, *shape), generator=generator, device=device)

    out = normals(case.branches).to(case.network).flatten(0, 1)
    m = torch.zeros_like(out) if case.copies else None
    slots = case.rows.slots if case.backward else case.outputs - 1
    history = normals(slots) if slots else None
    seeds = torch.arange(shape[0], device=device) if case.noise else None
    x = normals(1)[0]
    e = normals(1)[0] if case.backward else None
    return Registers(x=x, e=e, history=history, m=m, seeds=seeds), out


def bind(name: str, case: Case, registers: Registers) -> Any:
    """A backend's stage for a case, on these registers."""
    rows = case.rows
    table = torch.from_numpy(rows.pack(case.weights))
    layout = replace(rows.layout, branches=case.branches)
    return backends.get(name).bind(registers, table, layout).run


def cache_bytes(device: torch.device) -> int:
    """Of the last cache; a guess where the system does not say."""
    if device.type == "cuda":
        known = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        return int(known) or 64 * MIB
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(text.strip().removesuffix("K")) * KIB
    except (OSError, ValueError):
        return 32 * MIB


def free_bytes(device: torch.device) -> int:
    """Memory to be had, about."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) * KIB
    except (OSError, ValueError, IndexError):
        return 4 * GIB


def available(device: torch.device) -> list[str]:
    """Backends that run on the device; Triton's interpreter is none."""
    names = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}[device.type]
    return [name for name in names if backends.get(name).missing() is None]


# -- the rivals ------------------------------------------------------------------------------------


class Eager:
    """The row as one would write it in eager torch: floats made beforehand, no new tensors.

    The history keeps h / p, which makes h with its first output one `torch.add`.

    Args:
        case: The row.
        registers: x, history and m are those of the stage; h has a tensor of its own.
        out: The network's output.
        compiled: The same update through `torch.compile`, with coefficients in a tensor.
    """

    def __init__(
        self, case: Case, registers: Registers, out: torch.Tensor, *, compiled: Any = None
    ) -> None:
        x = registers.x
        self.x, self.h, self.m = x, torch.zeros_like(x), registers.m
        # newest first, as in the case's row, whose slots were filled in order
        self.past = [] if registers.history is None else list(registers.history)[::-1]
        self.outputs = list(out.view(case.branches, *x.shape))
        self.inputs = [] if self.m is None else list(self.m.view(case.branches, *x.shape))
        self.z = torch.zeros_like(x) if case.noise and compiled is None else None
        self.w = [w / P for w in case.weights]
        self.b = [b * P for b in B_J[: case.outputs]]
        if compiled is not None:
            row = torch.tensor([P, A_X, C, *case.weights, *B_J[: case.outputs]], device=x.device)
            # tensors of their own: views of one that are written cost the compiled code copies
            past, inputs = ([t.clone() for t in ts] for ts in (self.past, self.inputs))
            self.arguments = (x, self.h, past, self.outputs, inputs, row)
            self.compiled = compiled

    def __call__(self) -> None:
        x, h = self.x, self.h
        torch.add(x, self.outputs[0], alpha=self.w[0], out=h)
        for w, out in zip(self.w[1:], self.outputs[1:], strict=True):
            h.add_(out, alpha=w)
        x.mul_(A_X).add_(h, alpha=self.b[0])
        for b, past in zip(self.b[1:], self.past, strict=True):
            x.add_(past, alpha=b)
        if self.z is not None:
            x.add_(self.z.normal_(), alpha=C)
        for m in self.inputs:
            m.copy_(x)

    def run_compiled(self) -> None:
        self.compiled(*self.arguments)


def _update(noise: bool, x: Any, h: Any, past: Any, outputs: Any, inputs: Any, row: Any) -> None:
    p, a, c, *rest = row.unbind()
    weights, b = rest[: len(outputs)], rest[len(outputs) :]
    new = p * x
    for w, out in zip(weights, outputs, strict=True):
        new = new + w * out.to(x.dtype)  # a weight of no dimension does not widen it
    total = a * x + b[0] * new
    for weight, register in zip(b[1:], past, strict=True):
        total = total + weight * register
    if noise:
        total = total + c * torch.randn_like(x)
    if past:
        past[-1].copy_(new)
    x.copy_(total)
    for m in inputs:
        m.copy_(total)


class EagerBackward:
    """A row of the transposed plan as `Eager` writes one; arguments as there.

        v = p e + sum of the outputs,   x' = a x + b v,   e' = d x + g v + sum g_j past_j,   m = e'

    and where the row pushes, x goes to the history.
    """

    def __init__(
        self, case: Case, registers: Registers, out: torch.Tensor, *, compiled: Any = None
    ) -> None:
        assert registers.e is not None
        assert registers.m is not None
        value, x = case.values, registers.x
        self.x, self.e, self.h = x, registers.e, torch.zeros_like(x)
        self.outputs = list(out.view(case.branches, *x.shape))
        self.inputs = list(registers.m.view(case.branches, *x.shape))
        past = [] if registers.history is None else list(registers.history)
        terms = range(int(value["n_terms"]))
        self.past = [past[int(value[f"slot_{k}"])] for k in terms]
        self.g_past = [value[f"past_g_{k}"] for k in terms]
        self.pushed = past[int(value["push_x"])] if value["push_x"] >= 0 else None
        self.p, self.a, self.b, self.d, self.g = (
            value[name] for name in ("p", "a_x", "b_0", "d_x", "g_0")
        )
        if compiled is not None:
            numbers = [self.p, self.a, self.b, self.d, self.g, *self.g_past]
            row = torch.tensor(numbers, dtype=torch.float32, device=x.device)
            # tensors of their own, as in `Eager`; what is pushed to may be one that is read
            own = {id(t): t.clone() for t in past}
            read = [own[id(t)] for t in self.past]
            pushed = None if self.pushed is None else own[id(self.pushed)]
            inputs = [t.clone() for t in self.inputs]
            self.arguments = (x, self.e, read, pushed, self.outputs, inputs, row)
            self.compiled = compiled

    def __call__(self) -> None:
        x, e, v = self.x, self.e, self.h
        torch.add(self.outputs[0], e, alpha=self.p, out=v)
        for out in self.outputs[1:]:
            v.add_(out)
        torch.mul(x, self.d, out=e)
        e.add_(v, alpha=self.g)
        for g, past in zip(self.g_past, self.past, strict=True):
            e.add_(past, alpha=g)
        if self.pushed is not None:
            self.pushed.copy_(x)
        x.mul_(self.a).add_(v, alpha=self.b)
        for m in self.inputs:
            m.copy_(e)

    def run_compiled(self) -> None:
        self.compiled(*self.arguments)


def _update_backward(
    x: Any, e: Any, past: Any, pushed: Any, outputs: Any, inputs: Any, row: Any
) -> None:
    p, a, b, d, g, *g_past = row.unbind()
    v = p * e
    for out in outputs:
        v = v + out
    total = d * x + g * v
    for weight, register in zip(g_past, past, strict=True):
        total = total + weight * register
    new = a * x + b * v
    if pushed is not None:
        pushed.copy_(x)
    x.copy_(new)
    e.copy_(total)
    for m in inputs:
        m.copy_(total)


def eager_of(case: Case) -> type[Eager] | type[EagerBackward]:
    return EagerBackward if case.backward else Eager


def update_of(case: Case) -> Callable[..., None]:
    return _update_backward if case.backward else functools.partial(_update, case.noise)


def compiled_update(case: Case) -> Any:
    """Its update under `torch.compile`, on its own: what was compiled before is forgotten."""
    torch._dynamo.reset()
    return torch.compile(update_of(case), dynamic=False)


def empty_kernel(device: torch.device) -> Calls:
    """A Triton kernel that does nothing, called as Triton's users do: the launcher's own time."""
    import triton

    @triton.jit
    def nothing(a, b, c, d, e, f, g, h, i, j):
        return

    x = torch.zeros(4, device=device)
    return [lambda: nothing[(1,)](x, x, x, x, x, x, 16, 16, 16, 16, num_warps=4)]


def their_step(x: torch.Tensor) -> Callable[[], Any]:
    """One step of diffusers' DPM++2M, then the next of its loop of 20."""
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(lower_order_final=False)
    scheduler.set_timesteps(20)
    out = torch.zeros_like(x)
    times, state = list(scheduler.timesteps), {"k": 0}

    def step() -> None:
        k = state["k"]
        if k == len(times):
            scheduler.set_timesteps(20)
            k = 0
        scheduler.step(out, times[k], x, return_dict=False)
        state["k"] = k + 1

    return step


# -- the gate --------------------------------------------------------------------------------------


def gate(case: Case, device: torch.device, shape: Shape = (3, 1040)) -> None:
    """Every backend walks all rows of a case to the same registers as the compiled core does.

    Raises:
        harness.GateError: A compiled backend differs by a bit, or torch by more than its rounding.
    """
    names = [n for n in ("cpu", *available(device)) if backends.get(n).missing() is None]
    made, output = registers_of(case, shape, torch.device("cpu"))
    wanted: torch.Tensor | None = None
    for name in dict.fromkeys(names):
        place = torch.device("cpu") if name == "cpu" else device
        registers = _moved(made, place)
        run, out = bind(name, case, registers), output.to(place)
        for row, stage in enumerate(case.rows.stages):
            run(row, out if stage.evaluate else None, None)
        if hasattr(run, "check"):
            run.check()
        ends = [registers.x, *(() if registers.e is None else (registers.e,))]
        ends += [] if registers.history is None else list(registers.history)
        ends += [] if registers.m is None else list(registers.m.view(-1, *shape))
        got = torch.stack([end.float().cpu() for end in ends])
        if wanted is None:
            wanted = got
        elif name == "torch":  # with m, up to a step of bfloat16
            narrow = case.network == torch.bfloat16
            harness.agree(f"{name}, {case}", got, wanted, 4e-3 if narrow else 2e-6)
        elif not torch.equal(got, wanted):
            raise harness.GateError(
                f"{name}, {case}: compiled backends agree to the bit; got "
                f"{int((got != wanted).sum())} of {got.numel()} elements that differ from "
                f"{names[0]}'s. Nothing was timed."
            )


def _moved(registers: Registers, device: torch.device) -> Registers:
    tensors = {
        name: value.to(device, copy=True)
        for name in ("x", "e", "history", "m", "seeds")
        if (value := getattr(registers, name)) is not None
    }
    return Registers(**tensors)


# -- timing ----------------------------------------------------------------------------------------


def take_turns(
    rivals: dict[str, Calls], device: torch.device, rounds: int, seconds: float
) -> dict[str, tuple[Timing, Timing]]:
    """Seconds a launch, (of the device, of the host), by name.

    Args:
        rivals: For each the same launch on every set of registers, taken in turns too.
        device: Where they run. On the CPU both times are the same.
        rounds: Turns of each, at least.
        seconds: How long to go on, all together.
    """
    turn = _cuda_turn if device.type == "cuda" else _cpu_turn
    launches, host = {}, {}
    for name, calls in rivals.items():
        turn(calls, len(calls), 1e-4)
        once, _ = turn(calls, 2, 1e-4)
        once, host[name] = turn(calls, 2, 1e-4)
        aim = 1e-2 if device.type == "cuda" else 1e-3
        launches[name] = max(2, min(64, math.ceil(aim / max(once, 1e-9))))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    names, end = list(rivals), time.perf_counter() + seconds
    for count in itertools.count():
        if count >= rounds and time.perf_counter() >= end:
            break
        for k in range(len(names)):
            name = names[(k + count) % len(names)]
            taken[name].append(turn(rivals[name], launches[name], host[name]))
            host[name] = taken[name][-1][1]
    return {
        name: (harness.summary([t for t, _ in pairs]), harness.summary([t for _, t in pairs]))
        for name, pairs in taken.items()
    }


def _cpu_turn(calls: Calls, launches: int, host: float) -> tuple[float, float]:
    sequence = [calls[k % len(calls)] for k in range(launches)]
    start = time.perf_counter()
    for call in sequence:
        call()
    taken = (time.perf_counter() - start) / launches
    return taken, taken


def _cuda_turn(calls: Calls, launches: int, host: float) -> tuple[float, float]:
    """Queues the launches while the device waits, about as long as the last queue took to fill."""
    sequence = [calls[k % len(calls)] for k in range(launches)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(host * launches * 1.5 + 5e-5, 5e-2) * 2e9))  # cycles, near 2 GHz
    begin.record()
    start = time.perf_counter()
    for call in sequence:
        call()
    enqueued = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / launches, enqueued / launches


# -- a cell ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all cells of a run share; `copy` is the bandwidth of a large copy, bytes a second."""

    device: torch.device
    rounds: int
    seconds: float
    compiled: bool
    copy: tuple[float, float] = (math.nan, math.nan)
    where: tuple[tuple[str, Any], ...] = ()


def copy_bandwidth(setting: Setting, numel: int) -> tuple[float, float]:
    """(best, median) bytes a second of `copy_` between tensors of `numel` float32, in rotation."""
    device = setting.device
    count = max(2, min(32, math.ceil(3 * cache_bytes(device) / (4 * numel))))
    tensors = [torch.randn(numel, device=device) for _ in range(count)]
    calls = [
        functools.partial(tensors[k].copy_, tensors[(k + count // 2) % count]) for k in range(count)
    ]
    timing, _ = take_turns({COPY: calls}, device, setting.rounds, setting.seconds)[COPY]
    return 8 * numel / timing.best, 8 * numel / timing.median


def measure(case: Case, shape: Shape, setting: Setting, lost: list[str]) -> list[Record]:
    """All rivals of one cell; one that raises is left out, and why is added to `lost`.

    Raises:
        MemoryError: Its registers would not fit in half of the memory that is free.
    """
    device, numel = setting.device, math.prod(shape)
    moved, cache = case.bytes(numel), cache_bytes(device)
    small = 4 * numel <= MIB
    footprint = (
        4 * numel * (case.outputs + 3 + case.noise + case.backward) + 2 * case.branches * numel * 4
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what other cells have left, which the driver counts as taken
    if 2 * footprint > free_bytes(device):
        raise MemoryError(f"needs {2 * footprint / GIB:.1f} GiB of free memory")
    sets = max(1, min(32, math.ceil(3 * cache / moved)))
    made = [registers_of(case, shape, device) for _ in range(sets)]
    write = eager_of(case)
    eager = [write(case, registers, out) for registers, out in made]
    runs: list[Any] = []

    def ours(name: str) -> Calls:
        bound = [bind(name, case, registers) for registers, _ in made]
        runs.extend(bound)
        pairs = zip(bound, made, strict=True)
        return [functools.partial(run, case.row, out, None) for run, (_, out) in pairs]

    def inductor() -> Calls:
        update = compiled_update(case)
        loops = [write(case, registers, out, compiled=update) for registers, out in made]
        return [loop.run_compiled for loop in loops]

    makers: dict[str, Callable[[], Calls]] = {
        COPY: lambda: [functools.partial(e.h.copy_, e.x) for e in eager],
        EAGER: lambda: eager,
    }
    for name in available(device):
        if name == "torch" and (not small or (device.type == "cuda" and case.noise)):
            continue  # the reference: it is for checks, and its noise is made of many kernels
        makers[f"fastdiff {name}"] = functools.partial(ours, name)
    if setting.compiled and case in CHOSEN:
        makers[INDUCTOR] = inductor
    if small and case == Case() and importlib.util.find_spec("diffusers") is not None:
        makers[THEIRS] = lambda: [their_step(made[0][0].x)]
    if small and device.type == "cuda" and "triton" in available(device):
        makers[LAUNCHER] = lambda: empty_kernel(device)
    rivals: dict[str, Calls] = {}
    for name, make in makers.items():
        try:
            calls = make()
            for call in calls:
                call()  # compiles, and touches every set
            rivals[name] = calls
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, {case}, {_register(shape)}: {_first_line(error)}")
    if COPY not in rivals:
        raise RuntimeError(lost.pop())
    timings = take_turns(rivals, device, setting.rounds, setting.seconds)
    for run in runs:
        if hasattr(run, "check"):
            run.check()
    large = 4 * numel >= LARGE
    copied = {
        key: 8 * numel / getattr(timings[COPY][0], key) if large else setting.copy[k]
        for k, key in enumerate(("best", "median"))
    }
    records = []
    for name, (timing, host) in timings.items():
        by_rival = {COPY: 8 * numel, LAUNCHER: 0}.get(name, moved)
        line = harness.record(
            *("stage", name, timing),
            shape=list(shape),
            dtype="float32",
            network=str(case.network).removeprefix("torch."),
            outputs=case.outputs,
            branches=case.branches,
            noise=case.noise,
            backward=case.backward,
            moved=by_rival,
            in_cache=sets * moved < 2 * cache,
            **dict(setting.where),
        )
        for key, suffix in (("best", ""), ("median", "_median")):
            bandwidth = by_rival / getattr(timing, key)
            line["bandwidth" + suffix] = round(bandwidth / 1e9, 3)
            line["share" + suffix] = round(bandwidth / copied[key], 4)
        if device.type == "cuda":
            host_times = {"host": host.median, "host_p20": host.p20, "host_p80": host.p80}
            line.update({k: round(v * 1e6, 4) for k, v in host_times.items()})
        records.append(line)
    return records


# -- reports ---------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _register(shape: Sequence[int]) -> str:
    size = 4 * math.prod(shape)
    if tuple(shape) in TINY:
        return "[" + ",".join(map(str, shape)) + "]"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size} B"


def _place(shape: Sequence[int]) -> tuple[bool, int]:
    """Flat registers by size, then the tiny samples."""
    return tuple(shape) in TINY, math.prod(shape)


def _case_of(line: Record) -> Case:
    network = getattr(torch, line["network"])
    return Case(line["outputs"], line["branches"], network, line["noise"], line["backward"])


def report(records: Sequence[Record]) -> str:
    """A table of every cell and rival: medians."""
    n = harness.number
    order = {case: k for k, case in enumerate(all_cases())}
    rows = []
    for r in sorted(records, key=lambda r: (order[_case_of(r)], *_place(r["shape"]))):
        row = [str(_case_of(r)), _register(r["shape"]) + "*" * r["in_cache"], r["rival"]]
        row += [n(r["median"]), n(r["bandwidth_median"]) if r["moved"] else ""]
        row += [f"{r['share_median']:.2f}" if r["moved"] else ""]
        rows.append([*row, n(r["host"]) if "host" in r else ""])
    head = ["row", "a register", "rival", "us", "GB/s", "share of copy_", "host us"]
    return harness.table(head, rows) + "\n\n\\* its sets of registers fit in the last cache."


def targets(records: Sequence[Record], device: str) -> str:
    """Every target beside the worst cell that it binds: met, not met or not measured."""
    rows = []

    def add(what: str, bound: str, values: Sequence[float], good: Callable[[float], bool]) -> None:
        if not values:
            rows.append([what, bound, "", "not measured"])
            return
        worst = min(values, key=lambda v: (good(v), v if bound.startswith("at least") else -v))
        shown = f"{harness.number(worst)} (worst of {len(values)})"
        rows.append([what, bound, shown, "met" if good(worst) else "not met"])

    names = ("fastdiff cpu",) if device == "cpu" else ("fastdiff cuda", "fastdiff triton")
    kinds = {"without noise": (False, False), "with noise": (True, False)}
    kinds["backward"] = (False, True)
    for name, (kind, flags) in itertools.product(names, kinds.items()):
        found = [
            r["share_median"]
            for r in records
            if r["rival"] == name
            and (r["noise"], r["backward"]) == flags
            and 4 * math.prod(r["shape"]) >= LARGE
        ]
        what = f"{name}, {kind}, 64 MiB and up: share of copy_"
        add(what, f"at least {SHARE:.2f}", found, lambda v: v >= SHARE)
    if device == "cuda":

        def hosts(rival: str) -> list[float]:
            return [
                r["host"]
                for r in records
                if r["rival"] == rival and 4 * math.prod(r["shape"]) <= MIB and "host" in r
            ]

        below = f"under {CUDA_HOST:g}"
        add("fastdiff cuda: host us a stage", below, hosts(names[0]), lambda v: v < CUDA_HOST)
        launcher = hosts(LAUNCHER)
        limit = min(launcher) + ABOVE_LAUNCHER if launcher else math.nan
        below = f"under {harness.number(limit)}" if launcher else "launcher + 5"
        found = hosts(names[1]) if launcher else []
        add("fastdiff triton: host us a stage", below, found, lambda v: v < limit)
    return harness.table(["target", "bound", "measured", ""], rows)


def machine(device: torch.device) -> dict[str, Any]:
    """What a record says of the device beside what all records say."""
    found: dict[str, Any] = {"device": device.type}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["driver"] = harness.driver()
        found["cuda"] = torch.version.cuda
        try:
            found["triton"] = __import__("triton").__version__
        except ImportError:
            found["triton"] = "none"
    return found


@click.command(context_settings={"show_default": True})
@click.option("--device", "place", default="auto", type=click.Choice(("auto", "cpu", "cuda")))
@click.option(
    *("--short/--full", "short"),
    default=None,
    help="Six rows at three sizes, or all. Full on CUDA, short elsewhere.",
)
@click.option("--largest", type=float, help="MiB a register, at most; 1024 on CUDA, 64 elsewhere.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile as well.")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Of the CPU.")
@click.option("--rounds", default=7, type=click.IntRange(min=1), help="Turns of each, at least.")
@click.option("--seconds", default=0.1, help="For each cell.")
@click.option("--budget", default=math.inf, help="Seconds after which no cell begins.")
@click.option("--commit", help="Of the code, where there is no git to ask.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines.")
@click.option("--summary", type=click.Path(dir_okay=False, path_type=Path), help="Markdown.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(
    place: str,
    short: bool | None,
    largest: float | None,
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
    """One stage on every backend: share of the copy bandwidth, and host time per launch."""
    began = time.perf_counter()
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: PyTorch finds no CUDA device here.")
    device = torch.device(place, 0) if place == "cuda" else torch.device(place)
    most = int((largest or (1024 if place == "cuda" else 64)) * MIB)
    todo = cells(place == "cpu" if short is None else short, most)
    if not todo:
        raise click.ClickException("--largest: registers are 4 KiB and up (0.00390625 MiB).")
    torch.manual_seed(0)
    about = machine(device)
    if commit:
        about["commit"] = commit
    parts, notes, records = [harness.where()], [], []
    if place == "cuda":
        parts[0] = f"{about['gpu']}, driver {about['driver']}, triton {about['triton']}; {parts[0]}"
    missing = [n for n in ("cuda", "triton", "cpu") if backends.get(n).missing() is not None]
    if place == "cuda":
        notes += [f"`{n}` does not run here: {backends.get(n).missing()}." for n in missing]
    elif "cpu" in missing:
        notes.append(f"`cpu` does not run here: {backends.get('cpu').missing()}.")
    if importlib.util.find_spec("diffusers") is None:
        notes.append("diffusers is not installed: its step is left out.")
    before = torch.get_num_threads()
    refused: set[Case] = set()
    gated: set[Case] = set()
    lost: list[str] = []
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            setting = Setting(device, rounds, seconds, compiled, where=tuple(about.items()))
            numel = min(most, 256 * MIB) // 4
            setting = replace(setting, copy=copy_bandwidth(setting, numel))
            speed = " / ".join(harness.number(b / 1e9) for b in setting.copy)
            notes.append(f"`copy_` of {_register((numel,))}: {speed} GB/s (best / median).")
            for done, (case, shape) in enumerate(todo):
                if time.perf_counter() - began > budget:
                    notes.append(f"The budget of {budget:g} s left out {len(todo) - done} cells.")
                    break
                if case not in gated | refused:
                    try:
                        gate(case, device)
                        gated.add(case)
                    except Exception as error:  # says so, and goes on to the next row
                        refused.add(case)
                        notes.append(f"Gate: {case}: {_first_line(error)}")
                if case in refused:
                    continue
                try:
                    found = measure(case, shape, setting, lost)
                except (MemoryError, torch.cuda.OutOfMemoryError) as error:
                    why = _first_line(error)
                    notes.append(f"{case} at {_register(shape)} is left out: {why}.")
                    continue
                except RuntimeError as error:
                    lost.append(f"{case}, {_register(shape)}: {_first_line(error)}")
                    continue
                records += found
                if out is not None:
                    harness.write(out, found)
                print(f"{case}, {_register(shape)}", file=sys.stderr, flush=True)
                if summary is not None:
                    _write(summary, _page(parts, notes, records, place))
    finally:
        torch.set_num_threads(before)
    notes += [f"Failed: {line}" for line in lost]
    page = _page(parts, notes, records, place)
    click.echo(page)
    others = [r for r in records if _case_of(r) not in SHOWN]
    if others:
        click.echo("\n" + report(others))
    if summary is not None:
        _write(summary, page)
    if docs is not None:
        harness.replace_section(docs, "stage", page)
    if refused or lost:
        raise click.ClickException(
            f"{len(refused)} rows did not pass the gate and {len(lost)} rivals failed; see above."
        )


def _page(parts: Sequence[str], notes: Sequence[str], records: Sequence[Record], place: str) -> str:
    """The machine, the notes, the targets, and the rows of `SHOWN` at every size."""
    shown = [r for r in records if _case_of(r) in SHOWN]
    blocks = [*parts, "\n".join(f"- {n}" for n in notes), targets(records, place), report(shown)]
    return "\n\n".join(blocks)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
