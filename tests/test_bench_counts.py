# SPDX-License-Identifier: Apache-2.0
"""What `fastdiff bench` says of launches and kernels, with stand-ins for the device."""

import contextlib
import sys
import types

import pytest
import torch
from click.testing import CliRunner

from fastdiff.bench import captured, counts, records
from fastdiff.cli.app import commands

CPU = torch.device("cpu")


def test_operations_are_counted_without_views():
    x = torch.ones(4, 4)
    assert counts.count(lambda: (x.t() + x.view(16).view(4, 4)).mul_(2.0), CPU, 3).launches == 2 + 3
    assert counts.Count(None).values() == {}


def test_a_profiler_that_counts_launches_warns_of_nothing(monkeypatch):
    """As PyTorch does, once a process, where events are not kept."""
    monkeypatch.setattr(torch.profiler.profiler, "_WARNINGS_SHOWN", set(), raising=False)
    monkeypatch.setattr(
        counts, "ProfilerActivity", types.SimpleNamespace(CUDA=torch.profiler.ProfilerActivity.CPU)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert counts.profiled(lambda: torch.ones(3).add_(1)) == []  # no kernels of a device


def test_kernels_of_the_cuda_part_are_found_by_what_a_profiler_calls_them(monkeypatch):
    table = [
        ("stage_shared float32 float32", 40, 0, 0, 256, 4),
        ("stage_shared float32 bfloat16", 63, 16, 0, 256, 4),
        ("stage_samples grown float64 float16", 90, 0, 0, 256, 2),
    ]
    asked = []
    core = types.SimpleNamespace(kernels=lambda index: asked.append(index) or table)
    monkeypatch.setattr(counts._core, "cuda_core", lambda: (core, None))
    where = "void fastdiff::cuda::(anonymous namespace)::"
    launched = [
        f"{where}stage_shared<fastdiff::Row<float>, fastdiff::Bfloat16>(fastdiff::cuda::Launch)",
        "void at::native::elementwise_kernel<128, 4, float>(int)",
        f"{where}stage_shared<fastdiff::Row<float>, fastdiff::Bfloat16>(fastdiff::cuda::Launch)",
    ]
    (kernel,) = counts.cuda_kernels(launched, 3)
    assert asked == [3]
    assert counts.Count(2, (kernel,)).values() == {"launches": 2, "registers": 63, "spills": 16}
    grown = f"{where}stage_samples<fastdiff::GrownRow<double>, fastdiff::Float16>(Launch)"
    assert [k.registers for k in counts.cuda_kernels([grown])] == [90]
    for missing in (types.SimpleNamespace(kernels=lambda index: None), None):
        monkeypatch.setattr(counts._core, "cuda_core", lambda missing=missing: (missing, "no"))
        assert counts.cuda_kernels(launched) == []


def test_kernels_of_triton_are_those_that_were_launched(monkeypatch):
    class Hooks(list):
        add = list.append

    def compiled(name, function, registers):
        metadata = types.SimpleNamespace(name=name)
        return types.SimpleNamespace(
            metadata=metadata, function=function, n_regs=registers, n_spills=1
        )

    hooks = Hooks()
    knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(launch_enter_hook=hooks))
    monkeypatch.setitem(sys.modules, "triton.knobs", knobs)
    with counts.triton_launches() as handles:
        hooks[0](types.SimpleNamespace(get=lambda: {"name": "stage_kernel", "function": 7}))
    assert (hooks, handles) == ([], [7])
    kernels = {"a": compiled("stage_kernel", 7, 40), "b": compiled("stage_kernel", 8, 90)}
    function = types.SimpleNamespace(device_caches={0: (kernels, {}, None)})
    module = types.SimpleNamespace(stage_kernel=function, other=3)
    monkeypatch.setitem(sys.modules, "fastdiff.kernels.made_up", module)
    assert counts.triton_kernels(handles) == [counts.Kernel("stage_kernel", 40, 1)]


def test_a_captured_body_is_warmed_up_and_replayed(monkeypatch):
    ran = []

    class Graph:
        def replay(self):
            ran.append("replay")

    def no_context(*arguments):
        return contextlib.nullcontext()

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": no_context,
        "graph": no_context,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    launch, out = captured.capture(lambda: ran.append("body") or len(ran))
    launch()
    assert ran == ["body"] * 4 + ["replay"]
    assert out == 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["stage", "loop", "noise", "gradient"])
def test_on_a_device_every_benchmark_runs_and_kernels_are_told(name, tmp_path):
    path = tmp_path / "r.jsonl"
    size = "64x16" if name == "gradient" else "4KiB"
    given = ["bench", name, "--device", "cuda", "--size", size, "--rounds", "2", "--seconds", "0"]
    done = CliRunner().invoke(commands, [*given, "--json", str(path)])
    assert done.exit_code == 0, done.output
    found = records.read(path)
    assert {r["device"] for r in found} == {"cuda"}
    if name != "stage":
        return
    compiled = [r for r in found if r["rival"] in ("fastdiff cuda", "fastdiff triton")]
    assert compiled
    for r in compiled:
        assert (r["launches"], r["spills"]) == (1, 0), r
        assert 16 <= r["registers"] <= 255
        assert f"{r['rival']}, in a graph" in {line["rival"] for line in found}
