# SPDX-License-Identifier: Apache-2.0
"""When a capture is made, used again, evicted and shared: keys, bounds, buckets, graph='auto'."""

import pytest
import torch
from support.captures import MESSAGES, network, plan_of
from support.core import needs_core

import fastdiff as fd
from fastdiff import capture


@needs_core
@pytest.mark.parametrize("change", ["shape", "dtype", "cond", "environment", "guidance"])
def test_what_a_graph_depends_on_is_part_of_its_key(change, recorder):
    plan, x, cond = plan_of(), torch.randn(3, 5), {"y": torch.randn(3)}
    sampler = fd.Sampler(network, plan, graph="loop")
    sampler(x, cond)
    if change == "shape":
        x = torch.randn(3, 6)
    if change == "dtype":
        x = x.double()
    if change == "cond":
        cond = {"y": cond["y"].double()}
    if change == "environment":
        recorder.facts = "autocast"
    if change == "guidance":
        sampler.set_plan(plan, fd.CFG(2.0, uncond={"y": 0.0}))
    result = sampler(x, cond)
    assert sampler.stats().captures == 2
    assert torch.equal(result, fd.sample(network, x, plan, cond=cond, guidance=sampler.guidance))


@needs_core
def test_the_least_recently_used_goes_first(recorder):
    plan = plan_of("ddim", 2)
    sampler = fd.Sampler(network, plan, graph=fd.Graph("loop", loops=2))
    small, middle, large = (torch.randn(n, 4) for n in (1, 2, 3))
    sampler(small)
    sampler(middle)
    sampler(small)  # middle is now the older one
    sampler(large)
    assert sampler.stats() == capture.Stats(3, 4, 1, 2, sampler.stats().bytes)
    sampler(small)
    assert sampler.stats().captures == 3
    sampler(middle)
    assert sampler.stats().captures == 4


@needs_core
def test_memory_is_bounded_and_reported(recorder):
    plan = plan_of("ddim", 2)
    recorder.bytes_each = 1000
    sampler = fd.Sampler(network, plan, graph=fd.Graph("loop", bytes=20_000))
    for n in (100, 200, 300, 400, 100):
        sampler(torch.randn(n, 4))
        assert 0 < sampler.stats().bytes <= 20_000
    assert sampler.stats().evictions > 0
    with pytest.raises(ValueError, match=r"may hold 20000 bytes .* needs \d+.*graph=None"):
        sampler(torch.randn(100_000, 4))
    sampler(torch.randn(100, 4))  # usable afterwards
    sampler.release()
    assert (sampler.stats().loops, sampler.stats().bytes) == (0, 0)


@needs_core
@pytest.mark.parametrize("solver", ["deis-3", "ddpm"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_smaller_batch_is_served_by_the_next_bucket(guided, solver, recorder):
    plan = plan_of(solver)
    guidance = fd.CFG(torch.tensor([2.0, 0.5]), uncond={"y": 0.0}) if guided else None
    graph = fd.Graph("loop", buckets=(4, 8))
    sampler = fd.Sampler(network, plan, guidance=guidance, graph=graph)
    for _ in range(2):
        x, cond = torch.randn(2, 5), {"y": torch.randn(2)}
        expected = fd.sample(network, x, plan, guidance=guidance, cond=cond, seed=4)
        assert torch.equal(sampler(x, cond, seed=4), expected)
    if not guided:
        for batch in (1, 3, 4):
            x, cond = torch.randn(batch, 5), {"y": torch.randn(batch)}
            expected = fd.sample(network, x, plan, cond=cond, seed=4)
            assert torch.equal(sampler(x, cond, seed=4), expected)
    assert sampler.stats().captures == 1
    if not guided:
        sampler(torch.randn(9, 5), {"y": torch.randn(9)}, seed=0)  # above the last: its own
        assert sampler.stats().captures == 2


@needs_core
def test_auto_captures_at_the_second_call_of_a_kind(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(network, plan)
    counts = []
    for _ in range(3):
        sampler(x)
        counts.append((sampler.stats().captures, sampler.stats().replays))
    assert counts == [(0, 0), (1, 1), (1, 2)]
    sampler(torch.randn(4, 5))
    assert sampler.stats().captures == 1


@needs_core
def test_auto_runs_eagerly_what_cannot_be_captured(recorder):
    plan, x = plan_of(), torch.randn(3, 5)

    def net(x, t, token):
        return network(x, t)

    seen = []
    for options in (
        {"cond": object()},
        {"callback": lambda i, t, x, x0: seen.append(i)},
        {"progress": True},
        {"xi": [x] * len(plan.stages)},
    ):
        sampler = fd.Sampler(net if "cond" in options else network, plan)
        sampler(x, **options)
        sampler(x, **options)
        assert sampler.stats().captures == 0
    assert len(seen) == 2 * len(plan.stages)
    sampler = fd.Sampler(network, plan, backend="torch")
    sampler(x)
    sampler(x)
    assert sampler.stats().captures == 0


@needs_core
def test_auto_runs_eagerly_and_says_so_where_a_capture_fails(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    recorder.failure = RuntimeError(MESSAGES["host"][0])
    sampler = fd.Sampler(network, plan)
    expected = sampler(x)
    with pytest.warns(RuntimeWarning, match=r"neither waits for the device.*runs eagerly"):
        assert torch.equal(sampler(x), expected)
    assert torch.equal(sampler(x), expected)  # said once
    assert sampler.stats().captures == 0
    small = fd.Sampler(network, plan, graph=fd.Graph("auto", bytes=10))
    recorder.failure = None
    small(x)
    with pytest.warns(RuntimeWarning, match=r"Graph\.bytes"):
        assert torch.equal(small(x), expected)


@needs_core
def test_a_sampler_inside_a_captured_network_is_part_of_its_graph(recorder):
    inner = fd.Sampler(network, plan_of("ddim", 2), graph="loop")

    def outer(x, t):
        return inner(x) * 0.5

    x, plan = torch.randn(3, 5), plan_of()
    sampler = fd.Sampler(outer, plan, graph="loop")
    got = sampler(x)
    assert inner.stats().captures == 0
    own = fd.Sampler(network, plan_of("ddim", 2))
    assert torch.equal(got, fd.sample(lambda x, t: own(x) * 0.5, x, plan))


def test_extras_of_a_recording_lie_on_the_device(recorder):
    stages = (fd.Stage(t=1.0, b=(1.0,), r=(2.0,)),)
    sampler = fd.Sampler(network, fd.Plan(stages=stages, times=(1.0, 0.0)), graph=None)
    x = torch.randn(2, 5)
    expected = sampler(x, extras=[0.5])
    says = r"extras\[0\]= is on the device.*got 0\.5\."
    with recorder.recording("stream 0", "his"), pytest.raises(RuntimeError, match=says):
        sampler(x, extras=[0.5])
    sampler(x, extras=[torch.full_like(x, 0.5)])
    with recorder.recording("stream 0", "another"):
        assert torch.equal(sampler(x, extras=[torch.full_like(x, 0.5)]), expected)
