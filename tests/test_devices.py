# SPDX-License-Identifier: Apache-2.0
"""Several devices: a run stays on x's, and leaves the caller's current one alone.

Two devices that are not there (tests/support/devices.py) show what depends on a tensor's device.
"""

import threading

import pytest
import torch
from support.captures import network, plan_of
from support.core import needs_core
from support.devices import FIRST, KIND, SECOND, Devices, here
from support.nets import Net
from support.recorder import Recorder

import fastdiff as fd
from fastdiff import backends, capture
from fastdiff.capture import cuda
from fastdiff.engine import streams

PLAN = plan_of("ddpm", 4)


@pytest.fixture
def devices():
    with Devices() as entered:
        yield entered


class Asked(Recorder):
    """A recorder that notes the devices that it is asked about."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def note(name):
        def method(self, device, *rest):
            self.devices.add(device)
            return getattr(Recorder, name)(self, device, *rest)

        return method

    names = ("environment", "stream", "follow", "preserved", "rehearse", "record", "pool_bytes")
    for name in (*names, "pool"):
        locals()[name] = note(name)


@pytest.fixture
def asked(monkeypatch):
    """A capturer for the devices, and a reference backend that it may capture."""
    made = Asked()
    monkeypatch.setitem(capture.CAPTURERS, KIND, made)
    monkeypatch.setitem(streams.STREAMS, KIND, made)
    monkeypatch.setattr(backends.get("torch"), "capturable", True)
    return made


def on(device, *shape):
    return torch.randn(*shape).to(device)


def expected(x, y=None, seed=3, plan=PLAN, **options):
    cond = None if y is None else {"y": here(y)}
    return fd.sample(network, here(x), plan, cond=cond, seed=seed, backend="torch", **options)


# -- a run stays where x is ------------------------------------------------------------------------


@pytest.mark.parametrize("device", [FIRST, SECOND])
def test_a_run_makes_everything_on_the_device_of_x(device, devices):
    seen = set()

    def net(x, t, y):
        seen.update((x.device, t.device, y.device))
        return network(x, t, y)

    x, y = on(device, 3, 5), on(device, 3)
    sampler = fd.Sampler(net, PLAN)
    result = sampler(x, {"y": y}, seed=3)
    assert result.device == device
    assert torch.equal(here(result), expected(x, y))
    assert seen == {device}
    assert {str(d) for pair in devices.copies for d in pair} <= {"cpu", str(device)}


def test_one_sampler_serves_two_devices(devices):
    sampler = fd.Sampler(network, PLAN)
    for device in (FIRST, SECOND, FIRST):
        x = on(device, 3, 5)
        result = sampler(x, seed=3)
        assert result.device == device
        assert torch.equal(here(result), expected(x))


def test_seeds_extras_and_unconditional_values_are_brought_to_x(devices):
    row = {"p": 0.1, "q": 1.0, "a_x": 0.5, "b": (0.5,)}
    product = fd.Product("x", 0.3, 0, "x")
    rows = [fd.Stage(t=0.9, **row, products=(product,), noise=((1, 1.0),)), fd.Stage(t=0.4, **row)]
    plan = fd.Plan(rows, (0.9, 0.4, 0.1))
    x, y, extra = on(SECOND, 3, 5), on(SECOND, 3), torch.randn(5)
    seeds, null = torch.arange(3), torch.tensor([0.5])
    plain = fd.CFG(2.0, uncond={"y": null})
    wanted = expected(x, y, seeds, plan, extras=(extra,), guidance=plain)
    for place in ("cpu", FIRST, SECOND):
        guidance = fd.CFG(2.0, uncond={"y": null.to(place)})
        sampler = fd.Sampler(network, plan, guidance=guidance)
        given = {"seed": seeds.to(place), "extras": (extra.to(place),)}
        for result in (
            sampler(x, {"y": y}, **given),
            sampler.buffers(x, {"y": y}, **given).run(),
        ):
            assert result.device == SECOND
            assert torch.equal(here(result), wanted)


def test_a_batcher_lies_on_its_device(devices):
    batcher = fd.Batcher(network, [plan_of("ddim", 2)], (2, 5), device=SECOND)
    x = on(SECOND, 5)
    place = batcher.add(x)
    batcher.step()
    result = batcher.step()[place]
    assert result.device == SECOND
    assert torch.allclose(here(result), expected(x[None], plan=plan_of("ddim", 2))[0])


# -- captures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["loop", "stage"])
def test_captures_streams_and_pools_are_those_of_the_device_of_x(mode, devices, asked):
    sampler = fd.Sampler(network, PLAN, graph=mode)
    x, y = on(SECOND, 3, 5), on(SECOND, 3)
    for _ in range(2):
        assert torch.equal(here(sampler(x, {"y": y}, seed=3)), expected(x, y))
    assert asked.devices == {SECOND}
    assert sampler.stats().captures == 1
    x, y = on(FIRST, 3, 5), on(FIRST, 3)
    assert torch.equal(here(sampler(x, {"y": y}, seed=3)), expected(x, y))
    assert asked.devices == {FIRST, SECOND}
    assert (sampler.stats().captures, asked.pools) == (2, 2)


def test_a_device_without_its_number_is_the_current_one(devices, asked):
    sampler = fd.Sampler(network, PLAN, graph="loop")
    for device in (KIND, f"{KIND}:0", FIRST):
        x = torch.zeros(3, 5, device=device)
        assert torch.equal(here(sampler(x, seed=3)), expected(x))
    assert (sampler.stats().captures, sampler.stats().replays) == (1, 3)
    batcher = fd.Batcher(network, [plan_of("ddim", 2)], (2, 5), device=KIND)
    batcher.add(on(FIRST, 5))
    batcher.step()
    assert asked.devices == {FIRST}


def test_buffers_are_captured_on_their_device(devices, asked):
    sampler = fd.Sampler(network, PLAN, graph="loop")
    x, y = on(SECOND, 3, 5), on(SECOND, 3)
    buffers = sampler.buffers(x, {"y": y}, seed=3)
    held = (buffers.x, buffers.seeds, buffers.cond["y"])
    assert {tensor.device for tensor in held} == {SECOND}
    assert torch.equal(here(buffers.run()), expected(x, y))
    assert asked.devices == {SECOND}


@pytest.mark.parametrize("place", ["cpu", FIRST])
@pytest.mark.parametrize("whole", [False, True])
def test_what_lies_elsewhere_is_no_part_of_a_graph(whole, place, devices, asked):
    calls = []

    def net(x, t, y):
        calls.append(1)
        y = y[0] if whole else y
        return network(x, t, y.to(x.device).expand(3))

    x, y = on(SECOND, 3, 5), torch.randn(()) if whole else torch.randn(3)
    cond = {"y": (y.to(place),) if whole else y.to(place)}
    sampler = fd.Sampler(net, PLAN, graph="loop")
    if whole or place == "cpu":
        captured = sampler.buffers(x, cond, seed=3)
        for use in (lambda: sampler(x, cond, seed=3), captured.run):
            with pytest.raises(ValueError, match=rf"on x's device, {KIND}:1; got cond\['y'\].* on"):
                use()
        automatic = fd.Sampler(net, PLAN)
        for _ in range(3):
            result = automatic(x, cond, seed=3)
        assert torch.equal(here(result), expected(x, y.expand(3)))
        result = automatic.buffers(x, cond, seed=3).run()
        assert torch.equal(here(result), expected(x, y.expand(3)))
    else:
        with pytest.raises(ValueError, match=rf"got cond\['y'\] on {KIND}:0 and x on {KIND}:1"):
            sampler(x, cond, seed=3)
        assert calls == []
    assert asked.recorded == 0


@needs_core
def test_a_captured_gradient_reads_nothing_from_elsewhere(recorder):
    net, plan = Net(5), plan_of("ddim", 2)
    sampler = fd.Sampler(lambda x, t, y: net(x, t), plan, gradient="discrete", graph="loop")
    with pytest.raises(ValueError, match=r"on x's device, cpu; got cond\['y'\]\[0\] on meta"):
        sampler(torch.zeros(3, 5).requires_grad_(), {"y": (torch.zeros(3, device="meta"),)})


# -- what is refused -------------------------------------------------------------------------------


def never(x, t, **cond):
    raise AssertionError


@pytest.mark.parametrize("staged", [False, True])
def test_conditioning_on_another_device_is_refused_before_the_network_is_called(staged, devices):
    y = fd.PerStage(on(FIRST, 4, 3)) if staged else on(FIRST, 3)
    sampler = fd.Sampler(never, PLAN)
    for use in (sampler, sampler.buffers):
        with pytest.raises(ValueError, match=rf"cond\['a'\]\['y'\] on {KIND}:0 and x on {KIND}:1"):
            use(on(SECOND, 3, 5), {"a": {"y": y}}, seed=3)


def test_what_is_handed_whole_may_lie_where_the_network_takes_it(devices):
    def net(x, t, y):
        return network(x, t, y[0].to(x.device))

    x, y = on(SECOND, 3, 5), on(FIRST, 3)
    result = fd.sample(net, x, PLAN, cond={"y": (y,)}, seed=3)
    assert torch.equal(here(result), expected(x, y))


def test_an_output_on_another_device_is_refused_by_both_names(devices):
    def net(x, t):
        return network(x, t).to(FIRST)

    with pytest.raises(ValueError, match=rf"tensor on {KIND}:1; got {KIND}:0"):
        fd.sample(net, on(SECOND, 3, 5), PLAN, seed=3)


def test_results_and_given_noise_on_another_device_are_refused(devices):
    x = on(SECOND, 3, 5)
    with pytest.raises(ValueError, match=rf"out is like x, .* on {KIND}:1; got .* on {KIND}:0"):
        fd.sample(never, x, PLAN, seed=3, out=on(FIRST, 3, 5))
    with pytest.raises(ValueError, match=rf"xi is like the state, .* on {KIND}:1; got .*{KIND}:0"):
        fd.sample(never, x, PLAN, xi=[on(FIRST, 3, 5)] * 4)


# -- CUDA's own, as far as it can be seen without one ----------------------------------------------


def test_a_capture_rewinds_the_generator_of_its_device(monkeypatch):
    class Generator:
        def __init__(self):
            self.state = torch.zeros(4)

        def get_state(self):
            return self.state

        def set_state(self, state):
            self.state = state

    both = (Generator(), Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", both)
    begin = both[1].state
    with cuda.CudaCapturer().preserved(torch.device("cuda", 1)) as rewind:
        for generator in both:
            generator.state = torch.ones(4)
        rewind()
    assert both[1].state is begin
    assert torch.equal(both[0].state, torch.ones(4))


def test_several_threads_run_on_devices_of_their_own(devices):
    sampler, results = fd.Sampler(network, PLAN), {}

    def use(device):
        with Devices():
            x = on(device, 3, 5)
            results[device] = [(x, sampler(x, seed=3)) for _ in range(4)]

    threads = [threading.Thread(target=use, args=(device,)) for device in (FIRST, SECOND)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device, pairs in results.items():
        for x, result in pairs:
            assert result.device == device
            assert torch.equal(here(result), expected(x))
    assert len(results) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [None, "loop", "stage"])
def test_gpu_a_run_on_the_second_device_leaves_the_current_one(graph):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(3, 5)
    expected = fd.sample(network, x, PLAN, seed=3)
    sampler = fd.Sampler(network, PLAN, graph=graph)
    for _ in range(2):
        result = sampler(x.to("cuda:1"), seed=3)
        assert result.device == torch.device("cuda", 1)
        assert torch.allclose(result.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.cuda.current_device() == 0
