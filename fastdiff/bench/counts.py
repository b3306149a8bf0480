# SPDX-License-Identifier: Apache-2.0
"""What a piece of work launches, and what a compiler says of the kernels.

Counting goes through a profiler, which slows what runs under it: it comes after all timing.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _core

# Of the network's output, by its type in C++.
DTYPES = {"float": "float32", "double": "float64", "Bfloat16": "bfloat16", "Float16": "float16"}
NOT_KERNELS = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Kernel:
    """What a compiler says of a kernel.

    Attributes:
        name: As it is launched.
        registers: Of a thread.
        spills: Bytes of local memory of a thread, for Triton the registers it spilled.
    """

    name: str
    registers: int
    spills: int


@dataclass(frozen=True)
class Count:
    """What a run launched.

    Attributes:
        launches: Kernels on CUDA; on the CPU operations of PyTorch and calls of the compiled core.
            None where no profiler told.
        kernels: Those of them that a compiler tells something about.
    """

    launches: int | None
    kernels: tuple[Kernel, ...] = ()

    def values(self) -> dict[str, int]:
        """The values of a record."""
        found = {} if self.launches is None else {"launches": self.launches}
        if self.kernels:
            found["registers"] = max(kernel.registers for kernel in self.kernels)
            found["spills"] = max(kernel.spills for kernel in self.kernels)
        return found


def count(run: Callable[[], Any], device: torch.device, calls: int = 0) -> Count:
    """Counts what a run launches; it runs three times.

    Args:
        run: The work. It has run before, so that nothing compiles in it.
        device: Where it runs.
        calls: Calls of the compiled core in it, which PyTorch does not see on the CPU.
    """
    if device.type != "cuda":
        with Operations() as seen:
            run()
        return Count(seen.count + calls)
    names = profiled(run)
    with triton_launches() as handles:
        run()
        torch.cuda.synchronize(device)
    kernels = [*cuda_kernels(names, device.index or 0), *triton_kernels(handles)]
    return Count(len(names) or None, tuple(dict.fromkeys(kernels)))


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations, without views and without empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        name = str(function)
        makes_nothing = "empty" in name or name.startswith("aten.detach")
        self.count += not (function.is_view or makes_nothing)
        return function(*arguments, **(keywords or {}))


def profiled(run: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a run launched, in their order; none where none were seen."""
    options: dict[str, Any] = {"activities": [ProfilerActivity.CUDA]}
    if "acc_events" in inspect.signature(profile).parameters:
        options["acc_events"] = True  # without it PyTorch warns of a second cycle, which is not run
    with profile(**options) as seen:
        run()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type.name == "CUDA"]
    return [e.name for e in events if not e.name.startswith(NOT_KERNELS)]


def cuda_kernels(names: Iterable[str], index: int = 0) -> list[Kernel]:
    """What the CUDA part says of those of its kernels that were launched.

    Args:
        names: Of kernels, as a profiler spells them.
        index: The device's number.
    """
    core, _ = _core.cuda_core()
    tell = getattr(core, "kernels", None)
    rows = tell(index) if tell is not None else None
    known = {row[0]: Kernel(row[0], row[1], row[2]) for row in rows or ()}
    spelled = (core_name(name) for name in dict.fromkeys(names))
    return [known[name] for name in spelled if name in known]


def core_name(name: str) -> str | None:
    """The CUDA part's name of one of its kernels, from the one in C++; None of any other kernel.

    A `stage_shared<GrownRow<float>, Bfloat16>` is a "stage_shared grown float32 bfloat16".
    """
    found = re.search(r"fastdiff::cuda::.*?(\w+)<(.*)>\(", name)
    if found is None:
        return None
    family, arguments = found.groups()
    first, last = arguments.partition(",")[0], arguments.rpartition(",")[2].strip()
    state = "float64" if "double" in first else "float32"
    out = DTYPES.get(last.rpartition("::")[2], "")
    return f"{family}{' grown' * ('GrownRow' in first)} {state} {out}"


@contextlib.contextmanager
def triton_launches() -> Iterator[list[Any]]:
    """The handles of the functions that Triton launches inside the block, as they come."""
    handles: list[Any] = []
    knobs = sys.modules.get("triton.knobs")
    hooks = getattr(getattr(knobs, "runtime", None), "launch_enter_hook", None)
    if hooks is None or not hasattr(
        hooks, "add"
    ):  # no Triton here, or one whose hooks are of another kind
        yield handles
        return

    def note(metadata: Any) -> None:
        handles.append(metadata.get().get("function"))

    hooks.add(note)
    try:
        yield handles
    finally:
        hooks.remove(note)


def triton_kernels(handles: Iterable[Any]) -> list[Kernel]:
    """What Triton says of the functions that were launched."""
    wanted, found = set(handles), []
    for name, module in list(sys.modules.items()):
        if not name.startswith("fastdiff.kernels"):
            continue
        for thing in vars(module).values():
            for kernel in _compiled(thing):
                if getattr(kernel, "function", None) in wanted:
                    found.append(Kernel(kernel.metadata.name, kernel.n_regs, kernel.n_spills))
    return list(dict.fromkeys(found))


def _compiled(thing: Any) -> Iterator[Any]:
    """What a function of Triton is compiled to, for all devices."""
    caches = getattr(thing, "device_caches", None)
    for entry in caches.values() if isinstance(caches, dict) else ():
        kernels = entry[0] if isinstance(entry, tuple) else entry
        yield from kernels.values()


def instructions(device: torch.device) -> str | None:
    """The instruction set that the compiled core runs on the CPU; None elsewhere."""
    if device.type != "cpu" or _core.native is None:
        return None
    return str(_core.native.instruction_set())
