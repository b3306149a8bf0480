# SPDX-License-Identifier: Apache-2.0
"""What `fastdiff bench` measures: the jobs of its four benchmarks, from what was asked.

Whatever can be refused is refused here, before anything is timed. Launches are counted last, for a
profiler slows what comes after it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import fastdiff as fd

from .. import backends
from ..plans import Layout
from . import gradients, loops, noises, problems, stages
from .counts import count
from .machine import free_bytes
from .networks import Mlp
from .records import Record
from .rows import Case, Shape, case_of_plan, large_from, plan_of
from .runs import Gate, Job, Setting
from .stages import GRAPHED, Cell, available, copy_bandwidth, rival_name
from .text import reason, shape_text, size

# The sizes of loops where none are given.
USUAL: dict[str, tuple[Shape, ...]] = {"null": ((1, 4, 64, 64),), "mlp": ((64, 16), (1, 16))}
Dtypes = tuple[torch.dtype, torch.dtype]  # of the state, and of the network
Counting = Callable[[list[str]], list[Record]]


@dataclass(frozen=True)
class Asked:
    """What the command was asked to measure.

    Attributes:
        backends: By name; none: those that run here.
        dtypes: Of the state and of the network.
        sizes: Shapes of x, or the bytes of a register.
        terms: M.
        branches: G.
        noise: Without noise, with it, or both.
        plan: In place of one of M terms.
        networks: "null", "mlp" or "digits".
        steps: Of a loop.
    """

    backends: tuple[str, ...] = ()
    dtypes: tuple[Dtypes, ...] = ((torch.float32, torch.float32),)
    sizes: tuple[Shape | int, ...] = ()
    terms: tuple[int, ...] = (2,)
    branches: tuple[int, ...] = (1,)
    noise: tuple[bool, ...] = (False,)
    plan: fd.Plan | None = None
    networks: tuple[str, ...] = ("null",)
    steps: int = 20

    def shapes(self, dtype: torch.dtype) -> list[Shape]:
        """The shapes of x, the largest first."""
        found = [
            (1, max(1, wanted // dtype.itemsize)) if isinstance(wanted, int) else wanted
            for wanted in self.sizes
        ]
        return sorted(dict.fromkeys(found), key=math.prod, reverse=True)


def chosen(
    names: Sequence[str], device: torch.device, dtypes: Dtypes, layout: Layout | None = None
) -> tuple[str, ...]:
    """The backends that were asked for, or those that run here and serve.

    Raises:
        ValueError: There is no backend of a name.
        RuntimeError: One that was asked for does not run here.
        NotImplementedError: It does not serve the dtypes, the device or the rows.
    """
    state, network = dtypes
    if "triton" in names and device.type == "cpu":
        backends.choose("triton", state, network, device, layout)
        raise RuntimeError(
            'backend="triton": on a CPU its kernels run in an interpreter, which is for tests and '
            "not worth timing. Run it on a GPU."
        )
    if names:
        return tuple(backends.choose(n, state, network, device, layout).name for n in names)
    every = [backends.get(n) for n in available(device)]
    return tuple(b.name for b in every if b.supports(state, network, device, layout) is None)


def check_room(what: str, needed: int, device: torch.device) -> None:
    """Refuses what would not fit.

    Raises:
        ValueError: More memory is needed than is free.
    """
    free = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"--size: {what} needs about {size(needed)} of memory; got {size(free)} that are free. "
            "Take a smaller one."
        )


def counted(counting: Sequence[Counting]) -> Job:
    """The job that counts what others launched: the last, for a profiler slows what follows."""

    def count_all(lost: list[str]) -> list[Record]:
        found = []
        for each in counting:
            try:
                found += each(lost)
            except Exception as error:  # the next may well be counted
                lost.append(f"launches: {reason(error)}")
        return found

    return Job("launches", count_all)


# -- stages ----------------------------------------------------------------------------------------


def stage_cells(asked: Asked) -> list[tuple[Case, Shape]]:
    """The rows and shapes that were asked for, the largest first."""
    found = []
    for (state, network), branches in itertools.product(asked.dtypes, asked.branches):
        if asked.plan is not None:
            cases = [case_of_plan(asked.plan, branches, network, state)]
        else:
            rows = itertools.product(asked.terms, asked.noise)
            cases = [Case(m, branches, network, noise, state=state) for m, noise in rows]
        found += [(case, shape) for shape in asked.shapes(state) for case in cases]
    return sorted(found, key=lambda cell: -cell[0].register_bytes(cell[1]))


def stage_jobs(setting: Setting, asked: Asked) -> list[Job]:
    """A job for every row at every size, then one to count the launches."""
    device = setting.device
    timing: list[Job] = []
    counting: list[Counting] = []
    cells = stage_cells(asked)
    large = large_from(device.type)
    copied = functools.cache(functools.partial(copy_bandwidth, setting, large))
    for case, shape in cells:
        names = chosen(asked.backends, device, (case.state, case.network), case.layout)
        what = f"a register of {size(case.register_bytes(shape))}"
        check_room(what, stages.needed_bytes(case, shape), device)
        gate = Gate(str(case), functools.partial(stages.gate, case, device, names=names))
        title = f"{case}, {shape_text(shape)}"
        kept: list[Record] = []
        measure = functools.partial(_stage, case, shape, names, setting, copied, kept)
        timing.append(Job(title, measure, gate))
        counting.append(functools.partial(_stage_launches, case, shape, names, setting, kept))
    return [*timing, counted(counting)]


def _stage(
    case: Case,
    shape: Shape,
    names: Sequence[str],
    setting: Setting,
    copied: Callable[[], stages.Bandwidth],
    kept: list[Record],
    lost: list[str],
) -> list[Record]:
    cell = Cell(case, shape, setting.device)
    kept += stages.measure(cell, cell.makers(names), setting, copied, lost)
    return kept


@torch.no_grad()
def _stage_launches(
    case: Case,
    shape: Shape,
    names: Sequence[str],
    setting: Setting,
    kept: Sequence[Record],
    lost: list[str],
) -> list[Record]:
    """The records of a cell with what each backend launched."""
    cell, found = Cell(case, shape, setting.device), []
    for name in names:
        own = (rival_name(name), GRAPHED.format(rival_name(name)))
        lines = [r for r in kept if r["rival"] in own]
        if lines:
            run = cell.ours(name)[0]
            run()
            values = count(run, setting.device, int(name != "torch")).values()
            found += [{**line, **values} for line in lines]
    return found


# -- loops -----------------------------------------------------------------------------------------


def loop_jobs(setting: Setting, asked: Asked) -> list[Job]:
    """A job for every network, size, dtype, row and backend, then one to count the launches."""
    device = setting.device
    timing: list[Job] = []
    counting: list[Counting] = []
    check_extras("bench loop", asked.plan)
    for network, (state, dtype) in itertools.product(asked.networks, asked.dtypes):
        usual = replace(asked, sizes=asked.sizes or USUAL[network])
        for shape in usual.shapes(dtype):
            case = problems.Case(network, shape, asked.steps, dtype)
            check_policy(network, shape)
            rows = itertools.product(asked.terms, asked.noise, asked.branches)
            if asked.plan is not None:
                case = replace(case, steps=len(asked.plan.stages))
                rows = itertools.product((0,), (asked.plan.stochastic,), asked.branches)
            for terms, noise, branches in rows:
                plan = asked.plan or plan_of(terms, noise, asked.steps)
                needed = math.prod(shape) * state.itemsize * 4 * (plan.slots + 4 + 2 * branches)
                needed += branches * shape[0] * kept_bytes(network, shape, dtype)
                check_room(f"a loop of {shape_text(shape)}", needed, device)
                layout = replace(plan.layout, branches=branches)
                for name in chosen(asked.backends, device, (state, dtype), layout):
                    loop = Loop(case, plan, name, branches, terms)
                    kept: list[Record] = []
                    measure = functools.partial(_loop, loop, setting, kept)
                    timing.append(Job(str(loop), measure, seconds=1.0))
                    counting.append(functools.partial(_loop_launches, loop, setting, kept))
    return [*timing, counted(counting)]


def check_extras(who: str, plan: fd.Plan | None) -> None:
    """Refuses a plan that reads tensors of the caller's.

    Raises:
        ValueError: It has a bank.
    """
    if plan is not None and plan.extras:
        raise ValueError(
            f"{who}: a plan reads what a run makes itself; got one that reads {plan.extras} "
            "tensors of the caller's (extras=). Take another plan."
        )


def check_policy(network: str, shape: Shape) -> None:
    """Refuses a shape that is none of a policy's.

    Raises:
        ValueError: It is no [B, A], or of more actions than a policy has.
    """
    if network == "mlp" and (len(shape) != 2 or shape[1] > 2**14):
        raise ValueError(
            f"--size: the policy acts with up to 16384 numbers, BxA such as 64x16; got "
            f"{shape_text(shape)}. Give another size."
        )


def kept_bytes(network: str, shape: Shape, dtype: torch.dtype) -> int:
    """About what autograd keeps of one sample in one call of a network."""
    return dtype.itemsize * (Mlp.kept + 4 * shape[1]) if network == "mlp" else 0


@dataclass(frozen=True)
class Loop:
    """A loop to measure."""

    case: problems.Case
    plan: fd.Plan
    backend: str
    branches: int
    terms: int

    def __str__(self) -> str:
        return f"{self.case}, {self.row}, {self.backend}"

    @property
    def row(self) -> str:
        """The plan and the guidance in short."""
        own = f"M={self.terms}" if self.terms else self.plan.solver or "a plan"
        return f"{own} G={self.branches}" + ", noise" * self.plan.stochastic

    def made(self, device: torch.device) -> tuple[problems.Parts, loops.How]:
        """The parts of the loop, and how it runs."""
        parts, guidance = problems.parts_of(self.case, device, plan=self.plan), None
        if self.branches > 1:
            parts, guidance = problems.guided(parts)
        return parts, loops.How(self.backend, guidance)


@torch.no_grad()
def _loop(loop: Loop, setting: Setting, kept: list[Record], lost: list[str]) -> list[Record]:
    parts, how = loop.made(setting.device)
    wanted = loops.reference(parts, how)
    found = loops.running(parts, loops.makers(parts, how), lost)
    loops.gate(parts, found, wanted)
    times = loops.timed(found, loop.case.steps, setting)
    kept += loops.records_of(parts, times, setting, row=loop.row, backend=loop.backend)
    return kept


@torch.no_grad()
def _loop_launches(
    loop: Loop, setting: Setting, kept: Sequence[Record], lost: list[str]
) -> list[Record]:
    parts, how = loop.made(setting.device)
    ours = {loops.EAGER, loops.STAGE, loops.LOOP, loops.REPLAY}
    makers = {n: make for n, make in loops.makers(parts, how).items() if n in ours and kept}
    calls, found = 0 if loop.backend == "torch" else loop.case.steps, []
    for name, run in loops.running(parts, makers, lost).items():
        values = count(run, setting.device, calls).values()
        found += [{**line, **values} for line in kept if line["rival"] == name]
    return found


# -- noise and gradients ---------------------------------------------------------------------------


def noise_jobs(setting: Setting, asked: Asked) -> list[Job]:
    """A job for every dtype and size."""
    device, found = setting.device, []
    for state, _ in asked.dtypes:
        names = chosen(asked.backends, device, (state, state), noises.DRAWS.layout)
        gate = Gate(f"normals in {state}", functools.partial(noises.gate, names, state, device))
        for shape in asked.shapes(state):
            bytes_ = math.prod(shape) * state.itemsize
            check_room(f"normals of {size(bytes_)}", bytes_ * 2 * (3 + len(names)), device)
            measure = functools.partial(noises.measure, names, shape, state, setting)
            found.append(Job(f"noise, {shape_text(shape)}, {state}", measure, gate))
    return found


def gradient_jobs(setting: Setting, asked: Asked) -> list[Job]:
    """A job for every network, batch, dtype and backend."""
    device, found = setting.device, []
    check_extras("bench gradient", asked.plan)
    for network, (state, dtype) in itertools.product(asked.networks, asked.dtypes):
        for shape in asked.shapes(dtype):
            check_policy("mlp", shape)
            case = gradients.Case(network, shape[0], True, asked.steps, dtype, shape[1])
            if asked.plan is not None:
                case = replace(case, steps=len(asked.plan.stages))
            needed = shape[0] * case.steps * kept_bytes("mlp", shape, dtype)
            check_room(f"backpropagation through {shape_text(shape)}", needed, device)
            for name in chosen(asked.backends, device, (state, dtype)):
                measure = functools.partial(_gradient, case, name, asked, setting)
                found.append(Job(f"{case}, {name}", measure, seconds=1.0))
    return found


def _gradient(
    case: gradients.Case, name: str, asked: Asked, setting: Setting, lost: list[str]
) -> list[Record]:
    device, flow = setting.device, gradients.flow_of(case, setting.device)
    plan = asked.plan or gradients.plan_of(case, flow)
    makers = gradients.makers(flow, plan, backend=name)
    runs = gradients.running(makers, f"{case}, {name}", device, lost)
    gradients.gate(flow, runs)
    runs = {gradients.BARE: gradients.bare(flow, case.steps), **runs}
    records = gradients.time_records(case, flow, runs, setting, backend=name)
    bare = {gradients.BARE: functools.partial(gradients.bare, flow, case.steps)}
    makers = {**bare, **{n: makers[n] for n in runs if n in makers}}
    return records + gradients.memory_records(case, flow, makers, setting, lost, backend=name)
