# SPDX-License-Identifier: Apache-2.0
"""What a run's result does not depend on, whose it is, and what a run costs."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from support.core import FAST, needs_core
from support.runs import EACH, VP, network

import fastdiff as fd


@EACH
def test_a_sample_does_not_depend_on_its_batch(backend):
    plan = fd.plan(VP, "ddpm", 5, prediction="v")
    x = torch.randn(6, 33)
    together = fd.sample(network, x, plan, backend=backend, seed=range(10, 16))
    for b in range(6):
        alone = fd.sample(network, x[b : b + 1], plan, backend=backend, seed=10 + b)
        assert torch.equal(alone[0], together[b])


def test_a_sample_does_not_depend_on_the_threads():
    plan = fd.plan(VP, "ddpm", 3, prediction="v")
    x = torch.randn(2, 200_001)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(fd.sample(lambda x, t: 0.5 * x, x, plan, seed=0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@EACH
def test_strides_do_not_matter(backend):
    plan = fd.plan(VP, "ddpm", 4, prediction="v")
    x = torch.randn(2, 6, 5, 4).permute(0, 3, 1, 2)
    assert not x.is_contiguous()

    def strided(x, t):
        return network(x, t).transpose(2, 3).contiguous().transpose(2, 3)

    plain = fd.sample(network, x.contiguous(), plan, backend=backend, seed=0)
    assert torch.equal(fd.sample(network, x, plan, backend=backend, seed=0), plain)
    assert torch.equal(fd.sample(strided, x, plan, backend=backend, seed=0), plain)


@EACH
def test_a_network_may_return_its_own_input(backend):
    plan = fd.plan(VP, "deis-3", 5)
    x = torch.randn(3, 40)
    copied = fd.sample(lambda x, t: x.clone(), x, plan, backend=backend)
    assert torch.equal(fd.sample(lambda x, t: x, x, plan, backend=backend), copied)


def test_inputs_are_left_as_they_are_and_results_are_the_callers():
    plan = fd.plan(VP, "deis-3", 5)
    x = torch.randn(3, 40)
    before, table = x.clone(), plan.table.copy()
    sampler = fd.Sampler(network, plan)
    first = sampler(x)
    kept = first.clone()
    sampler(torch.randn(3, 40))
    assert torch.equal(x, before)
    assert torch.equal(first, kept)
    np.testing.assert_array_equal(plan.table, table)


def test_out_is_filled_and_returned():
    plan = fd.plan(VP, "deis-3", 5)
    x = torch.randn(3, 40)
    out = torch.full_like(x, torch.nan)
    assert fd.sample(network, x, plan, out=out) is out
    assert torch.equal(out, fd.sample(network, x, plan))


def test_sampler_serves_one_shape_after_another():
    sampler = fd.Sampler(network, fd.plan(VP, "deis-3", 5))
    for shape, dtype in (
        ((3, 40), torch.float32),
        ((1, 7), torch.float64),
        ((3, 40), torch.float32),
    ):
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(sampler(x), fd.sample(network, x, sampler.plan))


def test_inference_mode_and_no_grad_in_any_order():
    sampler = fd.Sampler(network, fd.plan(VP, "deis-3", 5))
    x = torch.randn(3, 40)
    with torch.inference_mode():
        inside = sampler(x)
    outside = sampler(x)
    with torch.no_grad():
        again = sampler(x)
    assert torch.equal(inside, outside)
    assert torch.equal(outside, again)
    outside.add_(1.0)  # an ordinary tensor


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1,), (3,), (2, 1, 1, 1)])
@EACH
def test_odd_shapes(shape, backend):
    plan = fd.plan(VP, "ddpm", 3)
    x = torch.randn(shape)
    out = fd.sample(lambda x, t: 0.5 * x, x, plan, backend=backend, seed=0)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def test_an_empty_batch_calls_no_network():
    def never(x, t):
        raise AssertionError

    assert fd.sample(never, torch.empty(0, 3), fd.plan(VP, "ddim", 3)).shape == (0, 3)


# -- cost ------------------------------------------------------------------------------------------


@needs_core
def test_the_loop_allocates_no_tensor():
    x = torch.randn(4, 3, 16, 16)
    out = torch.randn(4, 3, 16, 16)
    result = torch.empty_like(x)
    counts = []
    for steps in (10, 50):
        plan = fd.plan(VP, "ddim", steps, eta=1.0)
        sampler = fd.Sampler(lambda x, t: out, plan, backend="cpu")
        sampler(x, seed=0, out=result)
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            sampler(x, seed=0, out=result)
        events = [e for e in profile.events() if not e.name.startswith("fastdiff: ")]
        counts.append((len(events), sum(e.self_cpu_memory_usage > 0 for e in events)))
    assert counts[0] == counts[1]  # operations and allocations do not depend on the steps


@needs_core
def test_memory_does_not_grow_with_calls():
    x, out = torch.randn(4, 256), torch.randn(4, 256)
    sampler = fd.Sampler(lambda x, t: out, fd.plan(VP, "deis-3", 20))
    result = torch.empty_like(x)
    for _ in range(3):
        sampler(x, out=result)
    gc.collect()
    tracemalloc.start()
    try:
        sampler(x, out=result)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            sampler(x, out=result)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2000  # bytes, over 1000 steps


# -- the default device ----------------------------------------------------------------------------

ROW = fd.Stage(t=1.0, b=(1.0,), r=(0.5,))
CASES = {
    "plain": {"plan": fd.plan(VP, "deis-3", 4)},
    "noise": {"plan": fd.plan(VP, "ddpm", 4), "seed": 3},
    "seeds": {"plan": fd.plan(VP, "ddpm", 4), "seed": [3, 9]},
    "extras": {"plan": fd.Plan((ROW,), (1.0, 0.0)), "extras": (2.0,)},
    "threshold": {"plan": fd.plan(VP, "dpmpp-2m", 4, threshold=(0.9, 0.2)), "check": True},
    "guided": {
        "plan": fd.plan(VP, "ddim", 2),
        "cond": {"y": torch.ones(2)},
        "guidance": fd.CFG(torch.tensor([2.0, 3.0]), uncond={"y": 0}),
    },
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES)
def test_the_default_device_does_not_matter(case, backend):
    """On "meta" whatever is made without naming its device would hold no numbers."""
    x = torch.randn(2, 5)
    wanted = fd.sample(network, x, backend=backend, **CASES[case])
    with torch.device("meta"):
        got = fd.sample(network, x, backend=backend, **CASES[case])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("gradient", ["discrete", "backprop", fd.AdjointDEIS(2)])
def test_the_default_device_does_not_matter_to_gradients(gradient):
    plan = fd.plan(VP, "deis-3" if isinstance(gradient, fd.AdjointDEIS) else "ddpm", 4, t_max=0.9)

    def slope(x):
        out = fd.sample(network, x, plan, seed=3, gradient=gradient)
        return torch.autograd.grad(out.sum(), x)[0]

    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    wanted = slope(x)
    with torch.device("meta"):
        assert torch.equal(slope(x), wanted)


def test_the_default_device_does_not_matter_to_noise_and_batchers():
    plan, x = fd.plan(VP, "ddpm", 4), torch.randn(5)

    def made():
        batcher = fd.Batcher(network, [plan], (2, 5))
        place, done = batcher.add(x, seed=3), {}
        while place not in done:
            done = batcher.step()
        return fd.noise.prior(plan, (2, 5), seeds=1), done[place]

    wanted = made()
    with torch.device("meta"):
        got = made()
    assert all(map(torch.equal, got, wanted))
