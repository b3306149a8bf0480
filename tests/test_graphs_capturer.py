# SPDX-License-Identifier: Apache-2.0
"""What CUDA captures are made with: by the books of PyTorch's graphs, pools and modes."""

import gc
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from support.fake_cuda import FakeCuda

from fastdiff.capture import cuda

ROOT = Path(__file__).resolve().parents[1]
HERE = torch.device("cpu")  # what is launched in these tests


@pytest.fixture(params=["before 2.12", "2.12"])
def fake(request, monkeypatch):
    monkeypatch.setattr(cuda, "_BROKEN", [])
    return FakeCuda(monkeypatch, ends_pools=request.param == "2.12")


@pytest.fixture
def alone(monkeypatch):
    """No other Python thread lives, whatever runs the tests."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


def breaking(fake):
    """A body that does what a capture does not permit."""

    def body():
        fake.launch()
        fake.broken = True
        raise RuntimeError("operation not permitted when stream is capturing")

    return body


def test_an_error_before_the_first_launch_is_not_replaced_by_a_warning(fake):
    def body():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        cuda.CudaCapturer().record(HERE, body, fake.new_pool())


def test_an_empty_capture_that_did_not_break_is_pytorchs_to_warn_of(fake):
    with pytest.warns(UserWarning, match="The CUDA Graph is empty"):
        cuda.CudaCapturer().record(HERE, lambda: None, fake.new_pool())


def test_after_a_broken_recording_another_pool_works(fake):
    capturer, first, second = cuda.CudaCapturer(), fake.new_pool(), fake.new_pool()
    with pytest.raises(RuntimeError, match="previous error") as raised:
        capturer.record(HERE, breaking(fake), first)
    assert "not permitted" in str(raised.value.__context__)
    assert fake.device_pools == set()
    capturer.record(HERE, fake.launch, second)
    if fake.host_pools:  # why the first pool is not used again
        with pytest.raises(RuntimeError, match="already recording"):
            capturer.record(HERE, fake.launch, first)
    assert fake.ends_pools == (not fake.host_pools)


def test_a_broken_recording_leaves_its_pool_to_the_graphs_that_lie_in_it(fake):
    capturer, pool = cuda.CudaCapturer(), fake.new_pool()
    kept = capturer.record(HERE, fake.launch, pool)
    with pytest.raises(RuntimeError, match="previous error"):
        capturer.record(HERE, breaking(fake), pool)
    gc.collect()
    if not fake.ends_pools:  # PyTorch 2.12 counts by itself
        assert fake.users[pool] == 1
    del kept
    gc.collect()
    if not fake.ends_pools:
        assert fake.users[pool] == 0


def test_a_graph_that_pinned_memory_may_ask_for_is_kept(fake, monkeypatch):
    made, graph = [], torch.cuda.CUDAGraph

    def make():
        new = graph()
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    with pytest.raises(RuntimeError, match="previous error"):
        cuda.CudaCapturer().record(HERE, breaking(fake), fake.new_pool())
    gc.collect()
    assert (made[0]() is None) == fake.ends_pools
    assert all(ref() is None for ref in made[1:])


def test_the_mode_that_finds_waits_gives_no_warning_and_is_put_back(fake, alone):
    capturer, seen = cuda.CudaCapturer(), []

    def body():
        seen.append(fake.mode)
        warnings.warn("the network's own", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="own") as caught:
        capturer.rehearse(HERE, body, strict=True)
    assert [str(warning.message) for warning in caught] == ["the network's own"]
    assert (seen, fake.mode) == ([2], 0)


@pytest.mark.parametrize("strict", [False, True])
def test_the_mode_is_not_touched_where_other_threads_live(strict, fake, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 3)
    cuda.CudaCapturer().rehearse(HERE, fake.launch, strict)
    assert fake.modes == []


def test_an_ordinary_rehearsal_does_not_touch_the_mode(fake, alone):
    cuda.CudaCapturer().rehearse(HERE, fake.launch, strict=False)
    assert fake.modes == []


@pytest.mark.skipif(not cuda.AVAILABLE, reason="this PyTorch's modes break higher-order operators")
def test_waits_are_found_while_other_threads_live(fake, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 3)
    capturer = cuda.CudaCapturer()

    def body():
        torch.ones(()).item()

    capturer.rehearse(HERE, body, strict=False)
    with pytest.raises(RuntimeError, match=r"synchronizing operation, aten\._local_scalar_dense"):
        capturer.rehearse(HERE, body, strict=True)


def test_what_a_replay_draws_can_be_undone(fake):
    capturer, generator = cuda.CudaCapturer(), fake.generators[0]
    generator.offset = 12
    rewind = capturer.drawn(HERE)
    generator.offset = 40
    rewind()
    assert generator.offset == 12
    capturer.settle(HERE)
    assert fake.current.waited == 1


WARNS = """
import warnings
import pytest

NAMED = {named}

@pytest.mark.gpu
@pytest.mark.parametrize("says", NAMED)
def test_a_named_one_passes(says):
    warnings.warn(says[0], says[1])

@pytest.mark.gpu
def test_another_fails():
    warnings.warn("mine", UserWarning)

@pytest.mark.parametrize("says", NAMED)
def test_one_of_no_gpu_fails(says):
    warnings.warn(says[0], says[1])
"""
NAMED = """[
    ("Synchronization debug mode is a prototype feature and does not yet", UserWarning),
    ("The CUDA Graph is empty. This usually means that the graph was", UserWarning),
    ("TensorFloat32 tensor cores for float32 matrix multiplication available but", UserWarning),
    ("Please use the new API settings to control TF32 behavior, such as", UserWarning),
    ("`torch.jit.script_method` is deprecated. Please switch", DeprecationWarning),
]"""


@pytest.mark.slow
def test_gpu_tests_let_pytorchs_own_warnings_through_and_no_other(tmp_path):
    (tmp_path / "a_device.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    (tmp_path / "test_warns.py").write_text(WARNS.format(named=NAMED))
    command = [sys.executable, "-m", "pytest", "-p", "a_device", "-p", "conftest", "-q", "-rA"]
    command += ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), str(tmp_path / "test_warns.py")]
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "6 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    failed = re.findall(r"FAILED \S*::(test_\w+)", done.stdout)
    assert set(failed) == {"test_another_fails", "test_one_of_no_gpu_fails"}
