# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs captured by hand, and a captured loop without the call around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..capture import CAPTURERS, Captures, Entry, Graph
from ..engine.call import Call
from ..engine.job import job_of
from ..engine.loops import run_stages
from ..engine.run import Run
from .problems import Loop, Parts


def capture(body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Captures a body as a CUDA graph; gives its launch and its result, which a launch rewrites.

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


@torch.no_grad()
def replay_alone(parts: Parts) -> Loop:
    """The captured loop without the call around it: x is copied in, and nothing else is done."""
    network, plan, start = parts.network, parts.plan, parts.start
    device, cond = start.device, parts.cond or None
    job = job_of(network, plan, None, None, None, False)
    run = Run(job.spec(start))
    run.load(plan, job.guidance)
    x = run.registers.x
    captures = Captures(Graph("loop"), CAPTURERS[device.type], device)
    entry = Entry(run, bytes=0)

    def body() -> None:
        run.begin()
        run_stages(job, run, Call(x, cond))

    def run_through(step: Callable[[None], None]) -> None:
        run.fill(Call(start, cond), plan)
        step(None)

    captures.capture({None: body}, run_through, lambda: x, entry, network)
    launch = entry.launches[None]

    def loop(keep: tuple[Captures, Entry] = (captures, entry)) -> torch.Tensor:
        x.copy_(start)  # from its own end it would grow without bound
        launch()
        return x

    return loop
