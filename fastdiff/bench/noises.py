# SPDX-License-Identifier: Apache-2.0
"""Normals: `fastdiff.noise.normal` and a stage that does nothing but draw, beside torch's.

What is timed writes its normals to memory and reads nothing. `normal_` fills a tensor in place;
`fastdiff.noise.normal` makes a new one; the stage, whose row is x' = 1 xi, writes x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import fastdiff as fd

from .. import backends, noise
from ..backends import BoundStage, Registers
from ..plans import Plan, Stage
from .gate import GateError, agree
from .machine import GIB, cache_bytes, free_bytes
from .records import Record, record
from .rows import Shape
from .runs import Setting
from .stages import ROUNDING, rival_name
from .text import reason
from .timing import Calls, take_turns

TORCH, LIBRARY = "torch normal_", "fastdiff.noise.normal"
REFERENCE_MOST = 2**22  # the reference makes many tensors of a draw: past this it is left out
DRAWS = Plan(
    stages=(Stage(t=1.0, a_x=0.0, c=1.0, noise=((1, 1.0),), evaluate=False),), times=(1.0, 0.0)
)


def stage_of(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[BoundStage, torch.Tensor]:
    """A stage that draws, bound to its x and to seeds 0, 1, ..."""
    x = torch.empty(shape, dtype=dtype, device=device)
    seeds = torch.arange(shape[0], device=device)
    table = torch.from_numpy(DRAWS.pack((1.0,)))
    layout = replace(DRAWS.layout, branches=1)
    return backends.get(name).bind(Registers(x=x, seeds=seeds), table, layout), x


@torch.no_grad()
def gate(
    names: Sequence[str], dtype: torch.dtype, device: torch.device, shape: Shape = (3, 1043)
) -> None:
    """Checks that all draw the normals that the readable reference makes.

    Raises:
        GateError: Compiled code differs by a bit, or the torch backend by more than its rounding.
    """
    reference = noise.reference(torch.arange(shape[0]).numpy(), math.prod(shape[1:]), 1, 0)
    wanted = torch.from_numpy(reference).reshape(shape).to(dtype)
    drawn = {LIBRARY: fd.noise.normal(shape, 0, 1, dtype=dtype, device=device).cpu()}
    for name in names:
        bound, x = stage_of(name, shape, dtype, device)
        bound.run(0, None, None)
        bound.check()
        drawn[rival_name(name)] = x.cpu()
    for who, got in drawn.items():
        if who == rival_name("torch"):
            agree(f"{who}, noise", got, wanted, ROUNDING[dtype])
        elif not torch.equal(got, wanted):
            raise GateError(
                f"{who}, noise: all draw the same bits; got {int((got != wanted).sum())} of "
                f"{got.numel()} normals that differ from the reference's. Nothing was timed."
            )


def makers(
    names: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Calls]]:
    """Functions that make the launches of each rival.

    Raises:
        MemoryError: Their tensors would not fit in half of the memory that is free.
    """
    numel = math.prod(shape)
    size = numel * dtype.itemsize
    sets = max(1, min(8, math.ceil(3 * cache_bytes(device) / size)))
    needed = 2 * size * (2 + sets * (1 + len(names)))
    if needed > free_bytes(device):
        raise MemoryError(f"needs {needed / GIB:.1f} GiB of free memory")
    tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in range(sets)]
    seeds = torch.arange(shape[0], device=device)  # where they are read: nothing is copied
    drawn = functools.partial(fd.noise.normal, shape, seeds, 1, dtype=dtype, device=device)
    found: dict[str, Callable[[], Calls]] = {
        TORCH: lambda: [tensor.normal_ for tensor in tensors],
        LIBRARY: lambda: [drawn],
    }

    def stages(name: str) -> Calls:
        bound = [stage_of(name, shape, dtype, device)[0] for _ in range(sets)]
        return [functools.partial(each.run, 0, None, None) for each in bound]

    for name in names:
        if name != "torch" or numel <= REFERENCE_MOST:
            found[rival_name(name)] = functools.partial(stages, name)
    return found


@torch.no_grad()
def measure(
    names: Sequence[str], shape: Shape, dtype: torch.dtype, setting: Setting, lost: list[str]
) -> list[Record]:
    """All rivals at one shape; one that raises is left out, and why is added to `lost`."""
    device, rivals = setting.device, {}
    for name, make in makers(names, shape, dtype, device).items():
        try:
            calls = make()
            for call in calls:
                call()
            rivals[name] = calls
        except Exception as error:  # one that cannot run must not take the others along
            lost.append(f"{name}, noise: {reason(error)}")
    moved, records = math.prod(shape) * dtype.itemsize, []
    for name, (timing, host) in take_turns(rivals, device, setting.rounds, setting.seconds).items():
        line = record(
            "noise",
            name,
            timing,
            shape=list(shape),
            dtype=str(dtype).removeprefix("torch."),
            moved=moved,
            **dict(setting.about),
        )
        line["bandwidth"] = round(moved / timing.best / 1e9, 3)
        line["bandwidth_median"] = round(moved / timing.median / 1e9, 3)
        if device.type == "cuda":
            line["host"] = round(host.median * 1e6, 4)
        records.append(line)
    return records
