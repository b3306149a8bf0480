# SPDX-License-Identifier: Apache-2.0
"""Where the CUDA backend runs: a GPU, or the host in its place; and what its tests bind."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.rows import raw, written

from fastdiff import _core
from fastdiff.backends import Registers
from fastdiff.backends import cuda as cuda_module
from fastdiff.plans import Layout, Plan, Stage

ROOT = Path(__file__).resolve().parents[2]
CORE, WHY_NOT = _core.cuda_core()
CUDA = torch.device("cuda", 0)
gpu = pytest.mark.gpu
# Warnings that PyTorch gives where there is a device, whatever this library does.
PYTORCHS_OWN = (
    "ignore:Synchronization debug mode is a prototype feature:UserWarning",
    "ignore:The CUDA Graph is empty:UserWarning",  # of tests that break a capture of their own
    "ignore:TensorFloat32 tensor cores for float32 matrix multiplication available:UserWarning",
    "ignore:Please use the new API settings to control TF32 behavior:UserWarning",
    r"ignore:.*torch\.jit\.script:DeprecationWarning",  # the compiler's imports
)
needs_module = pytest.mark.skipif(CORE is None, reason=str(WHY_NOT))


@pytest.fixture(scope="session")
def host_core(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """csrc/cuda/*.h and the bindings, compiled for the host; misaligned accesses trap."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    sources = [ROOT / "tests" / "cuda_on_host.cpp"]
    sources += [ROOT / "csrc" / "cuda" / "launch.cpp", ROOT / "csrc" / "bindings" / "cuda.cpp"]
    includes = [
        ROOT / "csrc",
        ROOT / "tests" / "cuda_runtime",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    flags = ["-shared", "-fPIC", "-std=c++17", "-O1", "-ffp-contract=off", "-fvisibility=hidden"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-Wall", "-Wextra"]
    if platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text():
        flags.append("-mfma")
    command = [*compiler, *flags, *(f"-I{i}" for i in includes), *map(str, sources)]
    target = _compiled_once(command, tmp_path_factory.getbasetemp())
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(target))
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compiled_once(command: list[str], folder: Path) -> Path:
    """The module that a compiler's command makes, made by one of the workers of a run for all."""
    import fcntl  # there is none on Windows, where nothing is compiled

    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    target = folder / "_cuda_on_host.so"
    with (folder / "_cuda_on_host.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = folder / "_cuda_on_host.making"
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            made.rename(target)
    return target


@pytest.fixture(params=["host", pytest.param("gpu", marks=[gpu, needs_module])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where registers lie: a GPU, or the CPU with the module that takes it for one."""
    if request.param == "gpu":
        return CUDA
    core = request.getfixturevalue("host_core")
    monkeypatch.setattr(cuda_module, "cuda_core", lambda: (core, None))
    monkeypatch.setattr(cuda_module, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda_module, "_current_stream", lambda: lambda number: 0)
    return torch.device("cpu")


@pytest.fixture
def usable() -> Iterator[None]:
    """After the test the device still computes, and nothing was reported late."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        assert float(torch.ones(4, device=CUDA).sum()) == 4.0


# -- what is bound ---------------------------------------------------------------------------------


def fields(**changes: int) -> dict[str, int]:
    """What the core is told of a bound stage with one row of no groups."""
    names = "state network e history slots m copies bank entries scalars scalar_columns seeds terms"
    names += " extras products measures stage_index offset row_index device own_table"
    own = dict.fromkeys(names.split(), 0)
    own |= {"batch": 2, "size": 4, "x": 1 << 20, "bank_batch": 1, "table": 4096, "rows": 1}
    own |= {"branches": 1, "width": Layout().width, "fault": 8192, "scale": 16384}
    return own | changes


def moved(tensor: torch.Tensor | None, device: torch.device, offset: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    store = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    return store[offset:].view(tensor.shape).copy_(tensor)


def on(device: torch.device, registers: Registers, offset: int = 0) -> Registers:
    """A copy there, `offset` elements off alignment."""
    return Registers(
        x=moved(registers.x, device, offset),
        e=moved(registers.e, device, offset),
        history=moved(registers.history, device, offset),
        m=moved(registers.m, device, offset),
        bank=moved(registers.bank, device, offset),
        seeds=moved(registers.seeds, device, 0),
    )


def assert_same(got: Registers, wanted: Registers, context: object = None) -> None:
    """Equal to the bit, NaN included."""
    for a, b in zip(written(got), written(wanted), strict=True):
        assert raw(a) == raw(b), context


ONE_STAGE = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
NOISY = Plan(
    stages=(
        Stage(t=1.0, a_x=0.9, b=(0.3,), c=0.5, noise=((3, 1.0),)),
        Stage(t=0.5, a_x=0.8, b=(0.2, 0.1), c=0.4, noise=((4, 0.6), (5, 0.8))),
    ),
    times=(1.0, 0.0),
)

needs_cpu = pytest.mark.skipif(_core.native is None, reason="the CPU core is not built")
