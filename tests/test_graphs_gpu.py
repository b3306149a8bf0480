# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: what the recorder's tests say, and what only a device can show."""

import gc
import threading

import pytest
import torch
from support.captures import MODES, network, plan_of, poisoned
from support.nets import Net

import fastdiff as fd
from fastdiff.capture import CAPTURERS


def on_gpu(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("solver", fd.solvers.names())
def test_gpu_a_replay_equals_eager(solver, backend, mode):
    plan, x = plan_of(solver), on_gpu((3, 4, 8, 8))
    expected = fd.sample(network, x, plan, seed=3, backend=backend, graph=None)
    sampler = fd.Sampler(network, plan, graph=mode, backend=backend)
    for _ in range(3):
        assert torch.equal(sampler(x, seed=3), expected)
        poisoned(sampler)
    assert sampler.stats().captures == 1


@pytest.mark.gpu
@MODES
def test_gpu_a_new_table_needs_no_capture(mode):
    x = on_gpu((3, 16))
    sampler = fd.Sampler(network, plan_of("dpmpp-2m"), graph=mode)
    sampler(x)
    for plan in (plan_of("dpmpp-2m", t_max=0.7), plan_of("deis-2")):
        sampler.set_plan(plan)
        assert torch.equal(sampler(x), fd.sample(network, x, plan, graph=None))
    assert sampler.stats().captures == 1


@pytest.mark.gpu
@MODES
def test_gpu_a_replay_neither_allocates_nor_waits(mode):
    plan, x = plan_of("ddpm"), on_gpu((3, 16))
    sampler, out = fd.Sampler(network, plan, graph=mode), torch.empty_like(x)
    sampler(x, seed=1, out=out)
    sampler(x, seed=1, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(5):
            sampler(x, seed=seed, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_gpu_two_samplers_on_two_streams():
    x, net = on_gpu((64, 5)), Net(dropout=0.5).eval().cuda()
    plans = [plan_of("deis-3"), plan_of("ddim")]
    expected = [fd.sample(net, x, plan, graph=None) for plan in plans]
    samplers = [fd.Sampler(net, plan, graph="loop") for plan in plans]
    streams = [torch.cuda.Stream() for _ in plans]
    results = [[], []]
    for sampler in samplers:
        sampler(x)
    torch.cuda.synchronize()
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(samplers[i](x))
    torch.cuda.synchronize()
    for i in range(2):
        # the same kernels on the same inputs: to the bit but for a library's choice of algorithm
        for result in results[i]:
            torch.testing.assert_close(result, expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_a_sampler_goes_from_stream_to_stream():
    x, plan = on_gpu((1 << 20, 4)), plan_of("deis-3")
    expected = fd.sample(network, x, plan, graph=None)
    sampler = fd.Sampler(network, plan, graph="loop")
    sampler(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(6):
        with torch.cuda.stream(streams[i % 2]):
            results.append(sampler(x))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, expected)


def _item(x, t):
    return x * float(x.sum())


def _host(x, t):
    return x * torch.tensor(0.5).to(x.device)


def _branch(x, t):
    return x if x.mean() > 0 else -x


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("net", [_item, _host, _branch])
def test_gpu_networks_that_synchronise_are_refused_and_leave_the_process_usable(net, mode):
    x = on_gpu((3, 16))
    sampler = fd.Sampler(net, plan_of(), graph=mode)
    with pytest.raises(RuntimeError, match=f"in {net.__name__}.*graph=None"):
        sampler(x)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert not torch.cuda.is_current_stream_capturing()
    assert fd.Sampler(net, plan_of(), graph=None)(x).isfinite().all()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert fd.Sampler(network, plan_of(), graph=mode)(x).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("net", [_item, _host, _branch])
def test_gpu_waits_are_found_before_recording_while_other_threads_live(net, monkeypatch):
    monkeypatch.setattr(
        CAPTURERS["cuda"], "record", lambda *_: pytest.fail("recorded"), raising=False
    )
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        with pytest.raises(RuntimeError, match=f"synchronizing.*in {net.__name__}.*graph=None"):
            fd.Sampler(net, plan_of(), graph="loop")(on_gpu((3, 16)))
    finally:
        end.set()
        other.join()


@pytest.mark.gpu
def test_gpu_a_broken_recording_leaves_earlier_and_later_captures_usable():
    x = on_gpu((3, 16))
    broken = []

    def net(x, t):
        if broken and torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return network(x, t)

    sampler = fd.Sampler(net, plan_of(), graph="loop")
    for _ in range(2):
        assert torch.equal(sampler(x), fd.sample(network, x, plan_of(), graph=None))
        broken.append(1)
        with pytest.raises(RuntimeError, match="graph=None"):
            sampler(x[:2])
        broken.clear()
        for rows in (x[:2], x[:1], x):
            assert torch.equal(sampler(rows), fd.sample(network, rows, plan_of(), graph=None))
        pinned = torch.ones(4).pin_memory()  # PyTorch's allocator of pinned memory works on
        assert float(pinned.cuda().sum()) == 4.0
        sampler.release()


def _replaced(net):
    net.linear.weight = torch.nn.Parameter(net.linear.weight.detach() * 2)


def _scaled(net):
    net.scale = net.scale * 0.5


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("change", [_replaced, _scaled, lambda net: net.cpu() and net.cuda()])
def test_gpu_replaced_weights_are_never_read(change, mode):
    class Scaled(Net):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.scale = torch.full((1 << 22,), 2.0, device="cuda")

        def forward(self, x, t):
            return super().forward(x, t) * self.scale[:5]

    net, plan, x = Scaled().eval().cuda(), plan_of(), on_gpu((64, 5))
    sampler = fd.Sampler(net, plan, graph=mode)
    sampler(x)
    for captures in (2, 3):
        change(net)
        torch.cuda.empty_cache()  # what a graph reads is not given back to the driver
        torch.testing.assert_close(sampler(x), fd.sample(net, x, plan, graph=None))
        assert sampler.stats().captures == captures


@pytest.mark.gpu
def test_gpu_a_replay_of_moved_weights_leaves_the_generator_as_an_eager_run_does():
    x, net, plan = on_gpu((64, 5)), Net(dropout=0.5).cuda(), plan_of()
    sampler = fd.Sampler(net, plan, graph="loop")
    sampler(x)
    _replaced(net)
    torch.cuda.manual_seed(1)
    expected = fd.sample(net, x, plan, graph=None)
    after = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(1)
    torch.testing.assert_close(sampler(x), expected)
    assert torch.equal(torch.cuda.get_rng_state(), after)


@pytest.mark.gpu
def test_gpu_an_error_in_mid_capture_leaves_the_process_usable():
    x = on_gpu((3, 16))

    def net(x, t):
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("mine")
        return network(x, t)

    with pytest.raises(KeyError, match="mine"):
        fd.Sampler(net, plan_of(), graph="loop")(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert fd.Sampler(network, plan_of(), graph="loop")(x).isfinite().all()


@pytest.mark.gpu
def test_gpu_ten_thousand_replays_without_growth():
    x, out = on_gpu((2, 16)), on_gpu((2, 16))
    sampler = fd.Sampler(network, plan_of("ddim", 4), graph="loop")
    for _ in range(10):
        sampler(x, out=out)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(10_000):
        sampler(x, out=out)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_autocast_is_part_of_the_key_and_leaves_no_trace(dtype):
    x, net, plan = on_gpu((3, 5)), Net(dropout=0.5).eval().cuda(), plan_of()
    sampler = fd.Sampler(net, plan, graph="loop")
    plain = sampler(x)
    with torch.autocast("cuda", dtype=dtype):
        expected = fd.sample(net, x, plan, graph=None)
        for _ in range(2):
            torch.testing.assert_close(sampler(x), expected)
            torch.cuda.empty_cache()
        with torch.no_grad():
            net.linear.weight.mul_(0.5)  # the graph casts it anew
        torch.testing.assert_close(sampler(x), fd.sample(net, x, plan, graph=None))
        with torch.no_grad():
            net.linear.weight.mul_(2.0)
    assert torch.equal(sampler(x), plain)
    assert sampler.stats().captures == 2


def _synchronize(x, t):
    torch.cuda.synchronize()
    return network(x, t)


def _own_stream(x, t):
    with torch.cuda.stream(torch.cuda.Stream()):
        return x * 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("net", [_synchronize, _own_stream])
def test_gpu_a_capture_that_breaks_leaves_the_process_usable(net):
    x, stream = on_gpu((3, 16)), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="graph=None"):
        fd.Sampler(net, plan_of(), graph="loop")(x)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(4, device="cuda").isfinite().all()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    sampler = fd.Sampler(network, plan_of(), graph="loop")
    for _ in range(2):
        assert torch.equal(sampler(x), fd.sample(network, x, plan_of(), graph=None))


@pytest.mark.gpu
def test_gpu_the_newer_precision_settings_are_read():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert fd.Sampler(network, plan_of(), graph="loop")(on_gpu((3, 16))).isfinite().all()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.gpu
def test_gpu_random_networks_draw_as_an_eager_run_does():
    x, net, plan = on_gpu((64, 5)), Net(dropout=0.5).cuda(), plan_of()
    torch.cuda.manual_seed(1)
    expected = fd.sample(net, x, plan, graph=None)
    after = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(1)
    sampler = fd.Sampler(net, plan, graph="loop")
    torch.testing.assert_close(sampler(x), expected)
    assert torch.equal(torch.cuda.get_rng_state(), after)
    assert not torch.equal(sampler(x), sampler(x))


@pytest.mark.gpu
def test_gpu_a_compiled_network_is_captured():
    x, net, plan = on_gpu((3, 5)), Net(dropout=0.5).eval().cuda(), plan_of()
    compiled = torch.compile(net)
    expected = fd.sample(net, x, plan, graph=None)
    sampler = fd.Sampler(compiled, plan, graph="loop")
    for _ in range(2):
        torch.testing.assert_close(sampler(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_gpu_buckets_guidance_and_conditioning():
    plan = plan_of("dpmpp-2m")
    guidance = fd.CFG(2.0, uncond={"y": 0.0})
    graph = fd.Graph("loop", buckets=(4,))
    sampler = fd.Sampler(network, plan, guidance=guidance, graph=graph)
    for batch in (1, 3, 4, 2):
        x, cond = on_gpu((batch, 16), batch), {"y": on_gpu((batch,), batch)}
        expected = fd.sample(network, x, plan, guidance=guidance, cond=cond, graph=None)
        assert torch.equal(sampler(x, cond), expected)
    assert sampler.stats().captures == 1
    assert sampler.stats().bytes > 0


@pytest.mark.gpu
def test_gpu_eviction_gives_memory_back():
    plan = plan_of("ddim", 4)
    sampler = fd.Sampler(network, plan, graph=fd.Graph("loop", loops=1))
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for n in (1, 2, 3):
        sampler(on_gpu((n << 20, 4)))
    sampler.release()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
