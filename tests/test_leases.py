# SPDX-License-Identifier: Apache-2.0
"""Leases: whose a run is, how long its memory lives, and what streams wait for in the end."""

import contextlib
import ctypes
import gc
import shutil
import subprocess
import weakref

import pytest
import torch
from support.captures import network, plan_of
from support.core import needs_core

import fastdiff as fd
from fastdiff.engine import driver, streams
from fastdiff.engine.job import job_of
from fastdiff.engine.leases import Leases
from fastdiff.engine.recordings import check_placed, one_capture
from fastdiff.engine.run import Run
from fastdiff.guidance import UNGUIDED


def spec_of(plan, shape=(2, 5)):
    return job_of(network, plan, UNGUIDED, None, None, False).spec(torch.empty(shape))


# -- leases ----------------------------------------------------------------------------------------


def test_a_run_is_lent_to_one_call_at_a_time():
    leases, spec = Leases(), spec_of(plan_of())
    first, second = leases.lend(spec), leases.lend(spec)
    assert first is not second
    leases.give_back(first)
    assert leases.lend(spec) is first
    assert leases.lend(spec) not in (first, second)


def test_few_idle_runs_are_kept_and_of_few_specs():
    leases, spec = Leases(), spec_of(plan_of())
    runs = [leases.lend(spec) for _ in range(20)]
    for run in runs:
        leases.give_back(run)
    kept = [leases.lend(spec) for _ in range(20)]
    assert 1 <= sum(run in runs for run in kept) <= 8
    others = [leases.lend(spec_of(plan_of(), (3, k))) for k in range(1, 5)]  # the specs kept
    leases.give_back(runs[0])
    assert leases.lend(spec) is not runs[0]
    for other in others:
        leases.give_back(other)
    leases.clear()
    assert all(leases.lend(other.spec) is not other for other in others)


def test_runs_of_a_recording_are_lent_inside_it_alone():
    leases, spec = Leases(), spec_of(plan_of())
    with one_capture():
        recorded = leases.lend(spec)
        leases.give_back(recorded)
        assert leases.lend(spec) is recorded
        assert leases.lend(spec) is not recorded
        leases.give_back(recorded)
        with pytest.raises(RuntimeError, match=r"one graph is recorded at a time"), one_capture():
            pass
    assert leases.lend(spec) is not recorded
    with one_capture():
        assert leases.lend(spec) is not recorded


@pytest.fixture
def made(monkeypatch):
    """Every run that is made from here on, weakly."""
    found, init = [], Run.__init__

    def noted(self, spec):
        found.append(weakref.ref(self))
        init(self, spec)

    monkeypatch.setattr(Run, "__init__", noted)
    return found


def alive(made):
    gc.collect()
    return [run for ref in made if (run := ref()) is not None]


def test_runs_go_with_the_recording_that_they_belong_to(made):
    leases, spec = Leases(), spec_of(plan_of())
    gc.disable()
    try:
        with one_capture() as recording:
            leases.give_back(leases.lend(spec))
            lent = leases.lend(spec_of(plan_of(), (3, 5)))
        assert [ref() is not None for ref in made] == [True, True]
        del recording
        leases.give_back(lent)
        del lent
        assert [ref() for ref in made] == [None, None]
    finally:
        gc.enable()


def test_shapes_that_alternate_have_their_runs_made_once_and_few_are_kept(made):
    sampler = fd.Sampler(network, plan_of(), graph=None)
    xs = [torch.randn(2, 5), torch.randn(3, 5), torch.randn(4, 5)]
    for _ in range(5):
        for x in xs:
            sampler(x)
    assert len(made) == 3
    for k in range(5, 30):
        sampler(torch.randn(k, 5))
    assert 1 < len(alive(made)) <= 4
    sampler(xs[0])
    assert len(made) == 3 + 25 + 1


@pytest.mark.parametrize(
    "move", [lambda t: t.resize_(1 << 16), lambda t: t.set_(torch.zeros(1)), "data"]
)
def test_a_run_whose_memory_was_moved_is_not_lent_again(move):
    leases, spec = Leases(), spec_of(plan_of())
    run = leases.lend(spec)
    if move == "data":
        run.registers.x.data = torch.zeros(2)
    else:
        move(run.registers.x)
    leases.give_back(run)
    assert leases.lend(spec) is not run


# -- streams ---------------------------------------------------------------------------------------


def test_a_run_is_lent_to_the_stream_that_used_it_last(recorder):
    leases, spec = Leases(), spec_of(plan_of())
    first = leases.lend(spec)
    with recorder.on("stream 1"):
        second = leases.lend(spec)
    leases.give_back(first)
    leases.give_back(second)
    assert leases.lend(spec) is first
    assert recorder.waits == []


@pytest.mark.parametrize("way", ["a new shape", "release", "an error", "the sampler goes"])
def test_memory_is_given_back_when_the_last_stream_has_passed(way, recorder, made):
    """Without a wait the allocator may hand it out while the last stream still reads it."""
    x, fail = torch.randn(2, 5), []

    def net(x, t):
        if fail:
            raise KeyError("mine")
        return network(x, t)

    sampler = fd.Sampler(net, plan_of(), graph=None)
    sampler(x)
    (run,) = alive(made)
    registers = weakref.ref(run.registers.x)
    del run
    standing = []
    recorder.waited = lambda who, whom: standing.append(registers() is not None)
    with recorder.on("stream 1"):
        sampler(x)
        assert recorder.waits == [("stream 1", "stream 0")]
        if way == "a new shape":
            for k in range(3, 8):
                sampler(torch.randn(k, 5))
        elif way == "release":
            sampler.release()
        elif way == "an error":
            fail.append(1)
            with pytest.raises(KeyError, match="mine"):
                sampler(x)
        else:
            del sampler
    gc.collect()
    assert registers() is None
    assert recorder.waits[1:] == [("stream 0", "stream 1")]
    assert standing == [True, True]


def test_memory_of_one_stream_is_given_back_without_a_wait(recorder, made):
    sampler = fd.Sampler(network, plan_of(), graph=None)
    sampler(torch.randn(2, 5))
    sampler.release()
    assert alive(made) == []
    assert recorder.waits == []


def test_a_forked_process_leaves_the_streams_of_its_parent_alone(recorder, monkeypatch):
    """CUDA cannot be asked for anything there."""
    held = [streams.Use(torch.device("cpu")) for _ in range(2)]
    with recorder.on("stream 1"):
        for use in held:
            use.follow()
    held[0].end(None)
    assert recorder.waits == [("stream 0", "stream 1")]
    monkeypatch.setattr(streams, "_forks", streams._forks)  # put back afterwards
    streams._forked()
    held[1].end(None)
    with recorder.on("stream 1"):
        own = streams.Use(torch.device("cpu"))
    own.follow()
    own.end(None)
    assert recorder.waits[1:] == [("stream 1", "stream 0")]


@pytest.mark.parametrize("recorded", ["stream 0", "stream 1", "stream 2"])
def test_memory_that_ends_while_somebody_records_is_kept_until_he_is_done(recorded, recorder, made):
    """A wait would tear one of its streams into the recording, or break it."""
    sampler, x = fd.Sampler(network, plan_of(), graph=None), torch.randn(2, 5)
    sampler(x)
    with recorder.on("stream 1"):
        sampler(x)
    (run,) = alive(made)
    registers = weakref.ref(run.registers.x)
    del run
    with recorder.recording(recorded, "his"):
        sampler.release()
        gc.collect()
        assert len(recorder.waits) == 1
        assert registers() is not None
        streams.settle()
        assert registers() is not None
    sampler(x)
    gc.collect()
    assert registers() is None
    assert ("stream 0", "stream 1") in recorder.waits


def test_a_run_whose_stream_somebody_records_is_left_alone(recorder, made):
    sampler, x = fd.Sampler(network, plan_of(), graph=None), torch.randn(2, 5)
    sampler(x)
    recorder.captures["stream 0"] = "his"
    with recorder.on("stream 1"):
        sampler(x)
    assert len(made) == 2
    assert recorder.waits == []


@needs_core
def test_a_captured_call_says_that_its_stream_is_recorded(recorder):
    sampler, x = fd.Sampler(network, plan_of(), graph="loop"), torch.randn(2, 5)
    sampler(x)
    recorder.captures["stream 0"] = "his"
    with recorder.on("stream 1"), pytest.raises(RuntimeError, match="End the recording first"):
        sampler(x)
    del recorder.captures["stream 0"]
    with recorder.on("stream 1"):
        sampler(x)


# -- inside a graph that somebody records ----------------------------------------------------------


def test_a_sampler_that_was_warmed_up_on_a_side_stream_is_recorded(recorder, made):
    """As PyTorch's documentation says: run on a side stream, and record on a third one."""
    sampler, x = fd.Sampler(network, plan_of(), graph="auto"), torch.randn(2, 5)
    with recorder.on("side"):
        expected = sampler(x)
    with recorder.recording("stream 1", "his"):
        assert torch.equal(sampler(x), expected)
        assert torch.equal(sampler(x), expected)
    assert len(made) == 1  # the warm one, whose table is where the graph reads it
    assert recorder.waits == []  # each would be error 905
    assert sampler.stats().captures == 0


def test_a_run_that_somebody_recorded_is_his(recorder, made):
    sampler, x = fd.Sampler(network, plan_of(), graph=None), torch.randn(2, 5)
    sampler(x)
    with recorder.recording("stream 1", "first"):
        sampler(x)
    sampler.release()
    for k in range(3, 9):
        sampler(torch.randn(k, 5))
    assert made[0]() in alive(made)
    sampler(x)
    with recorder.recording("stream 1", "second"):  # on the same stream, and another graph
        sampler(x)
    owners = [run.recording() for run in alive(made) if run.recording is not None]
    assert len(owners) == len(set(map(id, owners))) == 2
    assert recorder.waits == []


def test_seeds_of_a_recording_lie_on_the_device(recorder):
    sampler, x = fd.Sampler(network, plan_of("ddpm"), graph=None), torch.randn(2, 5)
    seeds = torch.tensor([4, 5])
    expected = sampler(x, seed=seeds)
    says = r"int64 tensor on the device.*got 4\."
    with recorder.recording("stream 0", "his"), pytest.raises(RuntimeError, match=says):
        sampler(x, seed=4)
    assert torch.equal(sampler(x, seed=4), expected)
    with recorder.recording("stream 0", "his"):
        assert torch.equal(sampler(x, seed=seeds), expected)
        check_placed(torch.device("cpu"), "seed", seeds)
        with pytest.raises(RuntimeError, match=r"on the device.*got a tensor on meta\."):
            check_placed(
                torch.device("cpu"), "seed", seeds.to("meta")
            )  # who is elsewhere is copied
    check_placed(torch.device("cpu"), "seed", seeds.to("meta"))


@pytest.mark.parametrize("change", ["cold", "twice", "plan"])
def test_what_a_recording_cannot_make_is_refused(change, recorder):
    """A table is copied from the host, which a graph would repeat out of memory that is gone."""
    sampler, x = fd.Sampler(network, plan_of(), graph=None), torch.randn(2, 5)
    says = "got none idle of this shape and kind. Before each recording"
    if change != "cold":
        sampler(x)
    if change == "twice":
        with recorder.recording("stream 0", "first"):
            sampler(x)
    if change == "plan":
        sampler.set_plan(plan_of("deis-3", t_max=0.7))
        says = "got other coefficients"
    with recorder.recording("stream 0", "his"), pytest.raises(RuntimeError, match=says):
        sampler(x)
    sampler(x)
    with recorder.recording("stream 0", "third"):
        sampler(x)


@needs_core
def test_a_captured_call_is_no_warm_up(recorder):
    sampler, x = fd.Sampler(network, plan_of(), graph="loop"), torch.randn(2, 5)
    sampler(x)
    says = "make it with graph=None, since a captured call leaves none"
    with recorder.recording("stream 1", "his"), pytest.raises(RuntimeError, match=says):
        sampler(x)
    sampler(x)
    assert sampler.stats().captures == 1


def test_streams_of_one_recording_wait_for_each_other(recorder, made):
    sampler, x = fd.Sampler(network, plan_of(), graph=None), torch.randn(2, 5)
    sampler(x)
    recorder.captures["stream 2"] = "his"
    with recorder.recording("stream 1", "his"):
        sampler(x)
        with recorder.on("stream 2"):
            sampler(x)
    assert len(made) == 1
    assert recorder.waits == [("stream 2", "stream 1")]


@pytest.mark.parametrize("gradient", ["discrete", fd.AdjointDEIS(2)])
def test_a_gradient_is_recorded_on_the_runs_of_its_warm_up(gradient, recorder, made):
    sampler = fd.Sampler(network, plan_of(), gradient=gradient)
    x = torch.randn(2, 5, requires_grad=True)

    def found():
        return torch.autograd.grad(sampler(x).sum(), x)[0]

    with recorder.on("side"):
        expected, count = found(), len(made)
    with recorder.recording("stream 1", "his"):
        assert torch.equal(found(), expected)
    assert len(made) == count
    assert recorder.waits == []


class Drawing(torch.nn.Module):
    """A network that draws, one way or another."""

    def __init__(self, way):
        super().__init__()
        self.way, self.scale = way, torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        if self.way == "dropout":
            return torch.nn.functional.dropout(x * self.scale, 0.5)
        if self.way == "noise":
            return x * self.scale + torch.randn_like(x)
        q = (x * self.scale)[None, None]
        dropout = 0.5 if self.way == "attention with dropout" else 0.0
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=dropout)[0, 0]


@pytest.mark.parametrize("way", ["dropout", "noise", "attention with dropout", "attention"])
def test_a_network_that_draws_has_no_gradient_inside_somebodys_graph(way, recorder, monkeypatch):
    """The numbers cannot be drawn again there: PyTorch shows no generator to who records."""
    sampler, x = fd.Sampler(Drawing(way), plan_of(), gradient="discrete"), torch.randn(2, 5)
    sampler(x).sum().backward()
    monkeypatch.setattr(torch, "get_rng_state", None)
    with recorder.recording("stream 0", "his"):
        if way == "attention":
            sampler(x).sum().backward()
            return
        with pytest.raises(NotImplementedError, match=r"random numbers again.*at stage 0.*eval"):
            sampler(x)


# -- which recording it is -------------------------------------------------------------------------


def driver_that(status, number, failed=0):
    """A driver's cuStreamGetCaptureInfo_v2."""

    def info(stream, where_status, where_number, graph, dependencies, count):
        assert (graph, dependencies, count) == (None, None, None)
        ctypes.c_int.from_address(where_status).value = status
        ctypes.c_uint64.from_address(where_number).value = number + stream
        return failed

    return info


def test_the_driver_tells_captures_apart(monkeypatch):
    monkeypatch.setattr(driver, "_info", lambda: driver_that(1, 2**40))
    assert driver.capture_id(5) == driver.capture_id(5) == 2**40 + 5
    assert driver.capture_id(6) != driver.capture_id(5)


@pytest.mark.parametrize("info", [None, driver_that(2, 7), driver_that(1, 7, failed=906)])
def test_where_the_driver_cannot_tell_no_two_captures_are_one(info, monkeypatch):
    monkeypatch.setattr(driver, "_info", lambda: info)
    assert driver.capture_id(5) != driver.capture_id(5)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_driver_is_called_as_its_header_says(tmp_path, monkeypatch):
    """The declaration is that of cuda.h, the CUDA 11.3 to 13 form with six parameters."""
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(
        """
        #include <stddef.h>
        #include <stdint.h>
        int cuStreamGetCaptureInfo_v2(void *stream, int *status, uint64_t *id, void **graph,
                                      const void ***dependencies, size_t *count) {
            if (graph || dependencies || count) return 1;
            *status = 1;
            *id = (uint64_t)stream + 1;
            return 0;
        }
        """
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / name)))
    driver._info.cache_clear()
    try:
        assert driver.capture_id(2**47) == 2**47 + 1
    finally:
        driver._info.cache_clear()


class Stream:
    """A stream of PyTorch's, of a device that is not here."""

    def __init__(self, address):
        self.cuda_stream = address

    def wait_stream(self, earlier):
        earlier.followers = [self]


def test_cuda_streams_are_asked_as_pytorch_names_them(monkeypatch):
    there, current, recorded = [Stream(0), Stream(16)], [0], []
    made = []
    fake = {
        "current_device": lambda: 0,
        "current_stream": lambda index: (made.append(index), there[current[0]])[1],
        "is_current_stream_capturing": lambda: current[0] in recorded,
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    raw = lambda index: there[current[0]].cuda_stream  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw, raising=False)

    @contextlib.contextmanager
    def on(stream):
        before, current[0] = current[0], there.index(stream)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(driver, "_info", lambda: driver_that(1, 100))
    cuda = streams.CudaStreams()
    for _ in range(3):
        for device in (torch.device("cuda"), torch.device("cuda", 0)):
            assert cuda.stream(device) is there[0]
    assert made == [0]
    assert [cuda.capture(stream) for stream in there] == [None, None]
    recorded.append(1)
    assert [cuda.capture(stream) for stream in there] == [None, 116]
    with on(there[1]):
        assert cuda.stream(torch.device("cuda")) is there[1]
        assert [cuda.capture(stream) for stream in there] == [None, 116]
    cuda.wait(there[0], there[1])
    assert there[1].followers == [there[0]]
