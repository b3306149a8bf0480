# SPDX-License-Identifier: Apache-2.0
"""torch.compile of the network alone, and of whole loops as one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import fastdiff as fd
from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.bench.problems import Cond, Loop, Parts

AS_ONE = "network alone, calls compiled as one"
TRACED = "fastdiff, whole call compiled"
OPERATOR = "stages as an operator, whole loop compiled"


def compiled_network(parts: Parts) -> Callable[..., torch.Tensor]:
    """The network under torch.compile, for CUDA with its own graphs."""
    compiled = torch.compile(parts.network, mode="reduce-overhead", dynamic=False)
    if parts.start.device.type != "cuda":
        return compiled

    def network(x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last output is not needed any more
        return compiled(x, t, **cond)

    return network


_bound: list[tuple[Any, torch.Tensor, torch.Tensor]] = []  # stage, x and history of each loop


def _run_stage(
    loop: int, row: int, x: torch.Tensor, history: torch.Tensor, out: torch.Tensor
) -> None:
    """Runs one stage of the compiled core, on the registers that it was bound to.

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
        for (
            t
        ) in times:  # each reads the output of the one before, or the compiler would make them one
            x = network(x, torch.full((batch,), t), **cond)
        return x

    def operator() -> Loop:
        _library()
        registers = Registers(
            x=torch.empty_like(start), history=start.new_empty((plan.slots, *start.shape))
        )
        x, history, loop = registers.x, registers.history, len(_bound)
        assert history is not None
        run = (
            backends.get("cpu")
            .bind(registers, torch.from_numpy(plan.pack((1.0,))), plan.layout)
            .run
        )
        _bound.append((run, x, history))

        def stages(x: torch.Tensor, cond: Cond) -> None:
            for row, t in enumerate(times):
                out = network(x, torch.full((batch,), t), **cond)
                torch.ops.fastdiff_bench.stage(loop, row, x, history, out)

        run_stages = compiled(stages, x)

        def sample() -> torch.Tensor:
            x.copy_(start)  # inside, the compiler would move x to memory of its own
            run_stages()
            return x

        return sample

    def as_one() -> Loop:
        return functools.partial(drop, compiled(calls))

    return {AS_ONE: as_one, TRACED: traced, OPERATOR: operator}


def drop(run: Callable[[], Any], *keep: Any) -> None:
    """Runs, and returns nothing; what else is passed stays alive with it."""
    run()
