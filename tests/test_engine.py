# SPDX-License-Identifier: Apache-2.0
"""Runs, their leases and the loop: who may use what memory, for how long, and what is left."""

import contextlib
import dataclasses
import gc
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.captures import network, plan_of
from support.core import FAST, needs_core

import fastdiff as fd
from fastdiff.engine.call import Call
from fastdiff.engine.job import job_of
from fastdiff.engine.loops import Written, run_stages
from fastdiff.engine.run import Run
from fastdiff.guidance import UNGUIDED

EACH = pytest.mark.parametrize("backend", FAST)
TWO_DRAWS = fd.Plan((fd.Stage(t=1.0, b=(0.5,), c=0.3, noise=((1, 1.0), (4, 0.5))),), (1.0, 0.0))


def job(plan, backend=None, guidance=None, net=network):
    return job_of(net, plan, guidance, backend, None, False)


def spec_of(plan, shape=(2, 5), **options):
    return job(plan, **options).spec(torch.empty(shape))


def memory_of(sampler, x, calls):
    """Where the network's input lies in each of some calls."""
    seen = []

    def look(i, t, point, x0):
        seen.append(point.data_ptr())

    for _ in range(calls):
        sampler(x, callback=look)
    return set(seen)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, ValueError])
def test_a_run_in_which_a_call_failed_is_given_up(error):
    fail, x = [], torch.randn(2, 5)

    def net(x, t):
        if fail:
            raise error("mine")
        return network(x, t)

    sampler = fd.Sampler(net, plan_of(), graph=None)
    assert len(memory_of(sampler, x, 2)) == 1
    fail.append(1)
    with pytest.raises(error, match="mine"):
        sampler(x)
    fail.clear()
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of()))


def test_a_run_that_was_written_to_is_given_up():
    x, kept = torch.randn(2, 5), []

    def net(x, t):
        kept.append(x)  # so that the memory is not taken again
        return network(x.mul_(0.5) if len(kept) == 3 else x, t)

    sampler = fd.Sampler(net, plan_of("deis-3", 4), graph=None)
    with pytest.raises(Written, match="in place"):
        sampler(x)
    first = kept[0].data_ptr()
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of("deis-3", 4)))
    assert first not in {tensor.data_ptr() for tensor in kept[4:]}


@EACH
def test_times_that_a_failing_network_wrote_to_are_written_again(backend):
    careless = [1]

    def net(x, t):
        if careless:
            t.mul_(1000)
            raise KeyError("mine")
        return network(x, t)

    sampler, x = fd.Sampler(net, plan_of(), backend=backend), torch.randn(2, 5)
    with pytest.raises(KeyError, match="mine"):
        sampler(x)
    careless.clear()
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of(), backend=backend))


@pytest.mark.parametrize("move", [lambda t: t.resize_(1 << 16), lambda t: t.set_(torch.zeros(2))])
def test_times_that_a_network_moved_are_handed_out_no_more(move):
    careless, x = [1], torch.randn(2, 5)

    def net(x, t):
        if careless:
            move(t)
            raise KeyError("mine")
        return network(x, t)

    sampler = fd.Sampler(net, plan_of())
    with pytest.raises(KeyError, match="mine"):
        sampler(x)
    careless.clear()
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of()))


@EACH
def test_times_that_were_kept_and_written_to_after_a_run_are_written_again(backend):
    kept, x = [], torch.randn(2, 5)

    def net(x, t):
        kept.append(t)
        return network(x, t)

    sampler = fd.Sampler(net, plan_of(), backend=backend)
    wanted = sampler(x)
    for t in kept:
        t.zero_()
    assert torch.equal(sampler(x), wanted)


# -- runs and their specs --------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("guided", [None, 2.0, torch.tensor([2.0, 3.0])])
def test_a_run_that_loads_another_plan_is_a_fresh_run_of_it(guided, backend):
    guidance = None if guided is None else fd.CFG(guided, uncond={"y": 0.0})
    plans = [plan_of("dpmpp-2m", t_max=0.9), plan_of("deis-2", t_max=0.7)]
    jobs = [job(plan, backend, guidance) for plan in plans]
    x = torch.randn(2, 5)
    specs = [each.spec(x) for each in jobs]
    assert specs[0] == specs[1]
    assert hash(specs[0]) == hash(specs[1])
    call = Call(x, (guidance or UNGUIDED).conditions({"y": torch.ones(2)}, 2))

    def run_on(run, i):
        run.load(plans[i], jobs[i].guidance)
        run.fill(call, plans[i])
        run.begin()
        with torch.no_grad():
            run_stages(jobs[i], run, call)
        return run.registers.x.clone()

    fresh = [run_on(Run(specs[0]), i) for i in (0, 1)]
    assert not torch.equal(*fresh)
    used = Run(specs[0])
    for i in (0, 1, 1, 0, 1):
        for register in used.live():
            register.fill_(torch.nan)  # nothing is read that the run did not write
        assert torch.equal(run_on(used, i), fresh[i])


def test_specs_differ_where_memory_or_kernels_do():
    base = spec_of(plan_of("deis-2"))
    assert base == spec_of(plan_of("dpmpp-2m"))
    others = [
        spec_of(plan_of("deis-2", 7)),
        spec_of(plan_of("deis-3")),
        spec_of(plan_of("dpm-2", 3)),
        spec_of(plan_of("ddpm")),
        spec_of(plan_of("dpmpp-2m", clip=(-1, 1))),
        spec_of(plan_of("deis-2"), (3, 5)),
        spec_of(plan_of("deis-2"), guidance=fd.CFG(2.0)),
        spec_of(plan_of("deis-2"), guidance=fd.CFG(torch.ones(2))),
        job(plan_of("deis-2")).spec(torch.empty(2, 5), offset=4),
        job(plan_of("deis-2")).spec(torch.empty(2, 5, dtype=torch.float64)),
        dataclasses.replace(base, backend="another"),
    ]
    assert len({base, *others}) == 1 + len(others)


# -- inputs of a network's own ---------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("solver", ["deis-3", "dpm-2", "ddpm"])
def test_fresh_inputs_may_be_kept_and_written_to(solver, backend):
    plan, x, kept = plan_of(solver), torch.randn(2, 5), []

    def net(x, t):
        kept.append((x, x.clone(), t, t.clone()))
        return network(x, t)

    def writing(x, t):
        out = network(x, t)
        x.zero_()
        t.zero_()
        return out

    wanted = fd.sample(network, x, plan, seed=1, backend=backend)
    options = {"backend": backend, "fresh_inputs": True}
    assert torch.equal(fd.sample(net, x, plan, seed=1, **options), wanted)
    assert all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in kept)
    assert torch.equal(fd.sample(writing, x, plan, seed=1, **options), wanted)


@needs_core
@pytest.mark.parametrize("mode", ["loop", "stage"])
def test_fresh_inputs_are_captured(mode, recorder):
    def writing(x, t):
        out = network(x, t)
        x.zero_()
        t.zero_()
        return out

    plan, x = plan_of(), torch.randn(2, 5)
    sampler = fd.Sampler(writing, plan, graph=mode, fresh_inputs=True)
    for _ in range(2):
        assert torch.equal(sampler(x), fd.sample(network, x, plan, graph=None))


# -- calls at once, and one inside another ---------------------------------------------------------


def test_a_call_ends_by_the_plan_that_it_began_with():
    plans = [plan_of("dpmpp-2m", 8, t_max=0.9), plan_of("deis-2", 8, t_max=0.6), plan_of("heun", 3)]
    xs = [torch.randn(2, 5) for _ in range(8)]
    wanted = [[fd.sample(network, x, plan) for plan in plans] for x in xs]

    def slow(x, t):
        threading.Event().wait(0.0002)
        return network(x, t)

    sampler, done = fd.Sampler(slow, plans[0]), threading.Event()

    def change():
        i = 0
        while not done.is_set():
            sampler.set_plan(plans[(i := i + 1) % len(plans)])
            threading.Event().wait(0.0005)

    def work(i):
        return [sampler(xs[i]) for _ in range(12)]

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(8)))
    finally:
        done.set()
        changing.join()
    which = [
        [next((k for k, w in enumerate(wanted[i]) if torch.equal(got, w)), None) for got in each]
        for i, each in enumerate(results)
    ]
    assert None not in [k for each in which for k in each]
    assert len({k for each in which for k in each}) > 1  # plans did change in between


def test_a_plan_may_be_set_from_inside_a_call():
    plans, x = [plan_of("deis-3"), plan_of("ddim", 9)], torch.randn(2, 5)

    def net(x, t):
        sampler.set_plan(plans[1])
        return network(x, t)

    sampler = fd.Sampler(net, plans[0])
    assert torch.equal(sampler(x), fd.sample(network, x, plans[0]))
    assert torch.equal(sampler(x), fd.sample(network, x, plans[1]))


@pytest.mark.parametrize("place", ["network", "callback"])
def test_a_sampler_may_be_called_inside_itself_with_another_plan_and_shape(place):
    plans = [plan_of("deis-3", 5), plan_of("dpm-2", 3)]
    x, inner = torch.randn(2, 5), torch.randn(3, 4, 2)
    wanted = [fd.sample(network, v, p) for v, p in zip((x, inner), plans, strict=True)]
    depth, nested = [], []

    def again(*_):
        if depth:
            return
        depth.append(1)
        sampler.set_plan(plans[1])
        nested.append(sampler(inner))
        sampler.release()
        sampler.set_plan(plans[0])
        depth.clear()

    def net(x, t):
        if place == "network":
            again()
        return network(x, t)

    sampler = fd.Sampler(net, plans[0])
    got = sampler(x, callback=again if place == "callback" else None)
    assert torch.equal(got, wanted[0])
    assert len(nested) == len(plans[0].stages)
    assert all(torch.equal(each, wanted[1]) for each in nested)


@pytest.fixture
def interruptible():
    """A process started in the background may ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_sampler_works_after_it_was_interrupted_anywhere(interruptible):
    plan, x = plan_of("deis-3", 30), torch.randn(2, 5)
    wanted, calls = fd.sample(network, x, plan), []

    def net(x, t):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return network(x, t)

    sampler = fd.Sampler(net, plan)
    for _ in range(3):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            sampler(x)
        assert len(calls) == 7
        calls[:] = [1] * 7
        assert torch.equal(sampler(x), wanted)


# -- out=, offset=, extras= ------------------------------------------------------------------------


@EACH
def test_the_result_may_be_written_over_what_was_given(backend):
    plan, y = plan_of("ddpm"), torch.randn(2)
    memory = torch.randn(3, 5)
    x = memory[:2].clone()
    wanted = fd.sample(network, x, plan, seed=1, cond={"y": y}, backend=backend)
    options = {"seed": 1, "cond": {"y": y}, "backend": backend}
    assert fd.sample(network, x, plan, out=x, **options) is x
    assert torch.equal(x, wanted)
    out = memory[1:]
    assert fd.sample(network, memory[:2], plan, out=out, **options) is out
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("gradient", [None, "discrete", fd.Discrete(checkpoint=2), "backprop"])
@pytest.mark.parametrize("plan", [plan_of("ddpm"), TWO_DRAWS], ids=["ddpm", "two draws"])
def test_a_part_of_a_sample_draws_its_part_of_the_noise(plan, gradient):
    x = torch.randn(2, 16, dtype=torch.float64)
    whole = fd.sample(network, x, plan, seed=3)
    part = x[:, 8:].clone().requires_grad_(gradient is not None)
    got = fd.sample(network, part, plan, seed=3, offset=8, gradient=gradient)
    assert not torch.equal(fd.sample(network, part.detach(), plan, seed=3), whole[:, 8:])
    torch.testing.assert_close(got.detach(), whole[:, 8:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [True, 2, -4, 4.0, "a", None, 2**62, 10**300])
def test_an_offset_that_is_no_place_is_refused(offset):
    with pytest.raises(ValueError, match=r"offset is the place .*a multiple of 4"):
        fd.sample(network, torch.randn(2, 8), plan_of("ddpm"), seed=1, offset=offset)


def test_a_part_of_a_sample_has_no_threshold():
    plan = plan_of("dpmpp-2m", threshold=(0.9, 0.2))
    with pytest.raises(ValueError, match="over a whole sample; got a part of one, offset=4"):
        fd.sample(network, torch.randn(2, 8), plan, offset=4)


@pytest.mark.parametrize("extra", [1j, torch.ones(5, dtype=torch.complex64)])
def test_complex_extras_are_refused(extra):
    plan = fd.Plan((fd.Stage(t=1.0, b=(1.0,), r=(0.5,)),), (1.0, 0.0))
    for gradient in (None, "backprop"):
        with pytest.raises(TypeError, match=r"real; got a complex extras\[0\]"):
            fd.sample(network, torch.randn(2, 5), plan, extras=(extra,), gradient=gradient)


@EACH
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_given_noise_is_the_drawn_under_guidance_too(dtype, batch, backend):
    plan, x = plan_of("ddpm"), torch.randn(batch, 5).to(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    xi = [fd.noise.normal(x.shape, 7, s.noise[0][0], dtype=state) for s in plan.stages]
    for scale in (2.0, torch.full((batch,), 2.0), [2.0] * len(plan.stages)):
        guidance = fd.CFG(scale, uncond={"y": 0.0})
        options = {"cond": {"y": torch.ones(batch)}, "guidance": guidance, "backend": backend}
        drawn = fd.sample(network, x, plan, seed=7, **options)
        given = fd.sample(network, x, plan, xi=xi, **options)
        torch.testing.assert_close(given, drawn)


# -- cost ------------------------------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("guided", [False, True])
def test_the_plain_loop_makes_no_tensor(guided):
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            calls.append(str(function))
            return function(*arguments, **(keywords or {}))

    x, calls, counts = torch.randn(2, 5), [], []
    outputs = torch.randn(4 if guided else 2, 5)
    result = torch.empty_like(x)
    guidance = fd.CFG(2.0, uncond={"y": 0.0}) if guided else None
    cond = {"y": torch.ones(2)} if guided else None
    for steps in (5, 50):
        plan = plan_of("deis-3", steps)
        sampler = fd.Sampler(lambda x, t, **c: outputs, plan, guidance=guidance, graph=None)
        sampler(x, cond, out=result)
        calls.clear()
        with Counting():
            sampler(x, cond, out=result)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_a_sampler_leaves_no_run_behind():
    others = weakref.WeakSet(each for each in gc.get_objects() if type(each) is Run)

    def runs():
        gc.collect()
        return sum(type(each) is Run and each not in others for each in gc.get_objects())

    sampler = fd.Sampler(network, plan_of(), graph=None)
    for n in range(1, 6):
        sampler(torch.randn(n, 5))
        with contextlib.suppress(ValueError):
            sampler(torch.randn(n, 5), callback=lambda i, t, x, x0: x.add_(1.0))
    assert runs() <= 4  # idle ones, of the shapes that were met last
    sampler.release()
    assert runs() == 0
