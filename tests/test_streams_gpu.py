# SPDX-License-Identifier: Apache-2.0
"""Streams and memory on a device: graphs that somebody records, and memory that others still read.

tests/test_leases.py and tests/test_gradients_devices.py say the same of a stand-in on a CPU.
"""

import threading

import pytest
import torch
from support.captures import network, plan_of
from support.gradients import net_of

import fastdiff as fd
from fastdiff.engine import driver

pytestmark = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
CYCLES = 200_000_000  # about 0.1 s of a kernel that does nothing


def on_gpu(*shape):
    return torch.randn(*shape).cuda()


def recorded(call):
    """A graph of a call and its result, recorded as PyTorch's documentation says."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@BACKENDS
@pytest.mark.parametrize("graph", [None, "auto"])
def test_gpu_a_sampler_is_part_of_somebodys_graph(graph, backend):
    sampler = fd.Sampler(network, plan_of(), graph=graph, backend=backend)
    x = on_gpu(3, 16)
    his, result = recorded(lambda: sampler(x))
    for k in range(4, 12):  # new shapes, whose runs take the place of the old
        sampler(on_gpu(k, 16))
    sampler.release()
    garbage = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]
    for _ in range(3):
        x.copy_(on_gpu(3, 16))
        his.replay()
        expected = fd.sample(network, x, plan_of(), backend=backend, graph=None)
        torch.testing.assert_close(result, expected)
    assert len(garbage) == 64


@BACKENDS
def test_gpu_two_graphs_of_one_sampler_run_at_once(backend):
    sampler = fd.Sampler(network, plan_of(), graph=None, backend=backend)
    xs = [on_gpu(64, 1024), on_gpu(64, 1024)]
    made = [recorded(lambda x=x: sampler(x)) for x in xs]
    expected = [fd.sample(network, x, plan_of(), backend=backend, graph=None) for x in xs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for stream, (his, _) in zip(streams, made, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                his.replay()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for (_, result), wanted in zip(made, expected, strict=True):
            torch.testing.assert_close(result, wanted)


@BACKENDS
def test_gpu_a_cold_sampler_is_refused_and_leaves_the_process_usable(backend):
    sampler, x = fd.Sampler(network, plan_of(), graph=None, backend=backend), on_gpu(3, 16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.mul(2.0)  # a graph with nothing in it gives a warning
        with pytest.raises(RuntimeError, match="call the sampler once outside"):
            sampler(x)
    torch.cuda.synchronize()
    assert sampler(x).isfinite().all()


def test_gpu_the_driver_tells_captures_apart():
    found = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            current = torch.cuda.current_stream().cuda_stream
            found.append([driver.capture_id(current) for _ in range(2)])
            torch.ones(1, device="cuda")
    assert all(isinstance(number, int) for each in found for number in each)
    assert found[0][0] == found[0][1]
    assert found[1][0] == found[1][1]
    assert found[0][0] != found[1][0]


@BACKENDS
@pytest.mark.parametrize("graph", [None, "loop"])
def test_gpu_memory_that_a_stream_still_uses_is_handed_to_nobody(graph, backend):
    """The first stream, on which it was allotted, would take it at once."""

    def slow(x, t):
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda._sleep(CYCLES // 20)
        return network(x, t)

    plan, x = plan_of(), on_gpu(64, 1024)
    expected = fd.sample(network, x, plan, backend=backend, graph=None)
    sampler, other = fd.Sampler(slow, plan, graph=graph, backend=backend), torch.cuda.Stream()
    sampler(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(CYCLES)
        got = sampler(x)
        sampler.release()
    garbage = [torch.full((64, 1024), float("nan"), device="cuda") for _ in range(64)]
    other.synchronize()
    torch.testing.assert_close(got, expected)
    assert len(garbage) == 64


def test_gpu_hooks_see_the_gradient_of_the_run_once():
    net, x, seen = net_of().cuda(), on_gpu(3, 5).double().requires_grad_(), []
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph=None)
    sampler(x).sum().backward()
    expected = net.linear.weight.grad.clone()
    net.zero_grad()
    net.linear.weight.register_hook(lambda g: seen.append(g.clone()))
    sampler(x).sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_gpu_a_capture_and_a_backward_pass_of_two_threads_end():
    """Both need autograd's thread of the device.

    Of parameters that want a gradient PyTorch keeps one node for all threads, on the stream of the
    first, which a capture cannot wait for; see docs/graphs.md.
    """
    net, wrong = net_of().cuda().requires_grad_(False), []
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph="loop")
    eager = fd.Sampler(net, plan_of(), gradient="discrete", graph=None)
    torch.autograd.grad(sampler(x := on_gpu(3, 5).double().requires_grad_()).sum(), x)

    def work(rows):
        for k in range(4):
            with torch.cuda.stream(torch.cuda.Stream()):
                x = torch.randn(rows + k, 5, device="cuda", dtype=torch.float64).requires_grad_()
                got = torch.autograd.grad(sampler(x).sum(), x)[0]
                wanted = torch.autograd.grad(eager(x).sum(), x)[0]
                if not torch.allclose(got, wanted):
                    wrong.append(rows + k)

    threads = [threading.Thread(target=work, args=(10 * k,), daemon=True) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120.0)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@BACKENDS
def test_gpu_a_gradient_is_part_of_somebodys_graph(backend):
    net, x = net_of().cuda(), on_gpu(3, 5).double().requires_grad_()
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", backend=backend)
    his, result = recorded(lambda: torch.autograd.grad(sampler(x).sum(), x)[0])
    for _ in range(3):
        with torch.no_grad():
            x.copy_(on_gpu(3, 5))
        his.replay()
        torch.testing.assert_close(result, torch.autograd.grad(sampler(x).sum(), x)[0])


@BACKENDS
def test_gpu_a_captured_loop_between_a_run_and_its_backward_pass_spoils_nothing(backend):
    net = net_of().cuda()
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph="loop", backend=backend)
    eager = fd.Sampler(net, plan_of(), gradient="discrete", graph=None, backend=backend)
    other = on_gpu(64, 5).double()
    with torch.no_grad():
        sampler(other)
    x = on_gpu(64, 5).double().requires_grad_()
    loss = sampler(x).sum()
    with torch.no_grad():
        sampler(other)  # a graph that was recorded before
    got = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(eager(x).sum(), x)[0])
