# SPDX-License-Identifier: Apache-2.0
"""Gradients as a device runs them: autograd has one thread for it, which all callers share.

On a CPU autograd works in the thread that calls it. Here a thread stands in for the device's own:
every backward pass is handed to it, as PyTorch hands those of CUDA tensors.
"""

import queue
import threading
from concurrent.futures import Future

import pytest
import torch
from support.captures import entries_of
from support.core import needs_core
from support.gradients import F64, net_of, plan_of

import fastdiff as fd
from fastdiff.engine.recordings import one_capture

LONG = 30.0  # seconds after which threads that wait for each other are given up


class Worker:
    """Autograd's thread of a device: what it is given it does in turn."""

    def __init__(self):
        self._given, self._grad = queue.SimpleQueue(), torch.autograd.grad
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        while (task := self._given.get()) is not None:
            future, function, arguments, named = task
            try:
                future.set_result(function(*arguments, **named))
            except BaseException as error:
                future.set_exception(error)

    def submit(self, function, *arguments, **named):
        future = Future()
        self._given.put((future, function, arguments, named))
        return future

    def grad(self, *arguments, **named):
        """torch.autograd.grad, in this thread; where it calls itself, autograd goes on there."""
        if threading.current_thread() is self.thread:
            return self._grad(*arguments, **named)
        return self.submit(self._grad, *arguments, **named).result(LONG)

    def end(self):
        self._given.put(None)


@pytest.fixture
def worker(monkeypatch):
    made = Worker()
    monkeypatch.setattr(torch.autograd, "grad", made.grad)
    yield made
    made.end()


def start(function):
    """Runs a function in a thread that a deadlock cannot keep from ending with the process."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def sample_of(rows):
    return torch.randn(rows, 5, dtype=F64, requires_grad=True)


@needs_core
def test_a_capture_that_waits_for_the_devices_thread_keeps_no_backward_pass_from_it(
    recorder, worker, monkeypatch
):
    """One thread captures and needs the device's thread, where another's backward pass stands."""
    net, first, second = net_of(), sample_of(3), sample_of(4)
    eager = fd.Sampler(net, plan_of(), gradient="discrete", graph=None)
    wanted = [torch.autograd.grad(eager(x).sum(), x)[0] for x in (first, second)]
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph="loop")
    loss = sampler(first).sum()
    capturing, queued = threading.Event(), threading.Event()

    def grad(*arguments, **named):
        if threading.current_thread() is not worker.thread and not queued.is_set():
            capturing.set()
            assert queued.wait(LONG)
        return worker.grad(*arguments, **named)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    other = start(lambda: sampler(second))
    assert capturing.wait(LONG)
    done = worker.submit(loss.backward)
    queued.set()
    out = other.result(LONG)
    done.result(LONG)
    assert torch.equal(first.grad, wanted[0])
    assert torch.equal(torch.autograd.grad(out.sum(), second)[0], wanted[1])
    assert sampler.stats().captures == 2


@needs_core
@pytest.mark.parametrize("gradient", [None, "discrete"])
def test_a_call_in_a_backward_pass_waits_for_no_capture(gradient, recorder):
    """Autograd's thread must not wait for a capture that may be waiting for it."""
    net, x, seen = net_of(), sample_of(3), []
    sampler = fd.Sampler(net, plan_of(), gradient=gradient, graph="loop")
    expected = fd.sample(net, x.detach(), plan_of())

    def hook(cotangent):
        seen.append(sampler(x.detach()))

    y = x * 2.0
    y.register_hook(hook)
    y.sum().backward()
    assert torch.equal(seen[0], expected)
    assert sampler.stats().captures == 0
    recording = []
    y = x * 2.0
    y.register_hook(lambda cotangent: recording.append(one_capture().__enter__()))
    with pytest.raises(RuntimeError, match="not recorded inside a backward pass"):
        y.sum().backward()


@needs_core
def test_hooks_are_silent_in_the_devices_thread_while_a_stage_is_differentiated(worker):
    net, x, seen = net_of(), sample_of(3), []
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph=None)
    sampler(x).sum().backward()
    expected = net.linear.weight.grad.clone()
    net.zero_grad()
    net.linear.weight.register_hook(lambda g: (seen.append(g.clone()), g.clamp(-0.1, 0.1))[1])
    sampler(x).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], expected)
    assert torch.equal(net.linear.weight.grad, expected.clamp(-0.1, 0.1))


def test_a_network_that_returns_its_parameter_has_that_parameters_gradient():
    """The output is a leaf then, with the hooks that the product must not fire."""
    weight, seen = torch.randn(3, 5, dtype=F64, requires_grad=True), []
    sampler = fd.Sampler(lambda x, t: weight, plan_of(), gradient="discrete", params=[weight])
    sampler(sample_of(3)).sum().backward()
    expected = weight.grad.clone()
    weight.grad = None
    weight.register_hook(lambda g: seen.append(g.clone()))
    sampler(sample_of(3)).sum().backward()
    assert torch.equal(weight.grad, expected)
    assert len(seen) == 1


@needs_core
def test_a_pair_of_graphs_shares_its_memory_with_no_other(recorder):
    """What the forward graph leaves for the backward one, the replay of a graph that was recorded
    before in the same pool would write over."""
    recorder.bytes_each = 1 << 20
    sampler = fd.Sampler(net_of(), plan_of(), gradient="discrete", graph="loop")
    with torch.no_grad():
        sampler(sample_of(3))
        sampler(sample_of(4))
    plain = sampler.stats().bytes
    for rows in (3, 4):
        sampler(sample_of(rows)).sum().backward()
    assert sorted(recorder.recorded_in.values()) == [2, 2, 2]
    assert plain > 2 << 20
    assert sampler.stats().bytes > plain + (4 << 20)


@needs_core
def test_a_backward_pass_that_replays_is_no_part_of_another_graph(recorder):
    sampler = fd.Sampler(net_of(), plan_of(), gradient="discrete", graph="loop")
    loss = sampler(sample_of(3)).sum()
    with recorder.recording("stream 1", "his"), pytest.raises(RuntimeError, match="graph=None"):
        loss.backward()


@needs_core
@pytest.mark.parametrize("end", ["evicted", "released"])
def test_a_capture_lives_until_its_backward_pass_is_over(end, recorder):
    """The result keeps it; its memory then waits for the stream of that pass."""
    net, x = net_of(), sample_of(3)
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph=fd.Graph("loop", loops=1))
    recorder.side = "side"
    expected = torch.autograd.grad(sampler(x).sum(), x)[0]
    loss = sampler(x).sum()
    if end == "evicted":
        sampler(sample_of(4))
    else:
        sampler.release()
    with recorder.on("stream 1"):
        before = len(recorder.waits)
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
        del loss
        after = recorder.waits[before:]
    assert after[0] == ("stream 1", "stream 0")
    assert {("stream 0", "stream 1"), ("side", "stream 1")} <= set(after[1:])


@needs_core
@pytest.mark.parametrize("graph", [None, "loop"])
def test_seeds_on_a_device_stay_there(graph, recorder, monkeypatch):
    """To copy them to the host would wait for the device."""
    copies, copy = [], torch.Tensor.cpu

    def counted(tensor, *arguments, **named):
        if tensor.dtype == torch.int64:
            copies.append(tensor)
        return copy(tensor, *arguments, **named)

    net, x = net_of(), sample_of(3)
    seeds = torch.tensor([3, 1, 2])
    sampler = fd.Sampler(net, plan_of("ddpm"), gradient="discrete", graph=graph)
    expected = torch.autograd.grad(sampler(x, seed=seeds.tolist()).sum(), x)[0]
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    loss = sampler(x, seed=seeds).sum()
    assert copies == []
    seeds.zero_()  # the backward pass has the seeds of the run
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@needs_core
def test_entries_know_where_their_memory_was_allotted(recorder):
    recorder.side = "side"
    sampler = fd.Sampler(net_of(), plan_of(), graph="loop")
    x = torch.randn(3, 5, dtype=F64)
    sampler(x)
    with recorder.on("stream 1"):
        sampler(x)
    before = len(recorder.waits)
    assert len(entries_of(sampler)) == 1
    sampler.release()
    assert set(recorder.waits[before:]) == {("stream 0", "stream 1"), ("side", "stream 1")}
