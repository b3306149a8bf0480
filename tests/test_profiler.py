# SPDX-License-Identifier: Apache-2.0
"""What a profiler shows of a run, and that nothing is recorded where none is on."""

import contextlib
from functools import partial

import pytest
import torch
from support.captures import network, plan_of
from support.core import BACKENDS, needs_core
from torch.autograd import profiler

import fastdiff as fd
from fastdiff.engine import loops, ranges

X = torch.zeros(3, 5)


def ranges_of(call):
    """The names of a call's ranges in order, each with the name of the range that it stands in."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        call()
    ours = [e for e in profile.events() if e.name.startswith("fastdiff: ")]
    ours.sort(key=lambda e: e.time_range.start)
    names = [e.name.removeprefix("fastdiff: ") for e in ours]
    outer = []
    for event in ours:
        around = event.cpu_parent
        while around is not None and around not in ours:
            around = around.cpu_parent
        outer.append(None if around is None else around.name.removeprefix("fastdiff: "))
    return list(zip(names, outer, strict=True))


def stages(n, around):
    return [(f"{what} {i}", around) for i in range(n) for what in ("network", "stage")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_eager_run_shows_its_network_calls_and_stages(backend):
    sampler = fd.Sampler(network, plan_of("deis-3", 3), backend=backend)
    around = "sample deis-3 3"
    found = ranges_of(lambda: sampler(X))
    assert found == [(around, None), ("fill", around), *stages(3, around), ("read", around)]
    assert torch.equal(sampler(X), fd.sample(network, X, sampler.plan, backend=backend))


def test_what_the_network_does_stands_in_its_range():
    def net(x, t):
        with torch.profiler.record_function("inside"):
            return network(x, t)

    sampler = fd.Sampler(net, plan_of("ddim", 2))
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        sampler(X)
    inside = [e for e in profile.events() if e.name == "inside"]
    assert [e.cpu_parent.name for e in inside] == ["fastdiff: network 0", "fastdiff: network 1"]


def test_stages_without_an_evaluation_show_no_network():
    rows = [
        fd.Stage(t=0.9, p=0.1, q=1.0, a_x=0.5, b=(0.5,)),
        fd.Stage(t=0.5, evaluate=False, a_x=0.7),
    ]
    sampler = fd.Sampler(network, fd.Plan(rows, (0.9, 0.1)))
    names = [name for name, _ in ranges_of(lambda: sampler(X))]
    assert names == ["sample custom 2", "fill", "network 0", "stage 0", "stage 1", "read"]


@needs_core
def test_a_captured_loop_shows_what_is_around_its_launch(recorder):
    sampler = fd.Sampler(network, plan_of("ddim", 2), graph="loop")
    sampler(X)
    around = "sample ddim 2"
    found = ranges_of(lambda: sampler(X))
    assert found == [(around, None), *((name, around) for name in ("fill", "replay", "read"))]
    buffers = sampler.buffers(X)
    buffers.run()
    found = ranges_of(lambda: buffers.run(filled=True))
    assert found == [(around, None), ("replay", around)]


@needs_core
def test_captured_stages_show_each_launch(recorder):
    sampler = fd.Sampler(network, plan_of("ddim", 2), graph="stage")
    sampler(X)
    names = [name for name, _ in ranges_of(lambda: sampler(X))]
    assert names == ["sample ddim 2", "fill", "stage 0", "stage 1", "read"]


@needs_core
def test_a_graph_captured_under_a_profiler_is_that_of_any_run(recorder):
    sampler = fd.Sampler(network, plan_of("ddim", 2), graph="loop")
    names = [name for name, _ in ranges_of(lambda: sampler(X))]
    assert not any(name.startswith(("network", "stage")) for name in names)


def test_buffers_run_eagerly_show_the_same():
    buffers = fd.Sampler(network, plan_of("ddim", 2)).buffers(X)
    around = "sample ddim 2"
    assert ranges_of(buffers.run) == [(around, None), *stages(2, around)]


def test_a_run_with_a_gradient_shows_itself():
    sampler = fd.Sampler(network, plan_of("ddim", 2), gradient="discrete")
    names = [name for name, _ in ranges_of(lambda: sampler(X.clone().requires_grad_()))]
    assert names[0] == "sample ddim 2"


def test_an_error_ends_the_ranges():
    fails = [True]

    def net(x, t):
        if fails[0]:
            raise KeyError("broken")
        return network(x, t)

    sampler = fd.Sampler(net, plan_of("ddim", 2))

    def both():
        with pytest.raises(KeyError):
            sampler(X)
        fails[0] = False
        sampler(X)

    found = ranges_of(both)
    assert [around for name, around in found if name.startswith("sample")] == [None, None]


def test_nothing_is_recorded_where_no_profiler_is_on(monkeypatch):
    made = []

    def record(name):
        made.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.profiler, "record_function", record)
    sampler = fd.Sampler(network, plan_of("ddim", 2), backend="torch")
    sampler(X)
    buffers = sampler.buffers(X)
    buffers.run()
    assert made == []
    monkeypatch.setattr(profiler, "_is_profiler_enabled", True)
    sampler(X)
    assert made[:2] == ["fastdiff: sample ddim 2", "fastdiff: fill"]


@needs_core
def test_without_a_profiler_the_plain_loop_runs(monkeypatch):
    watched = []
    observed = loops._observed
    monkeypatch.setattr(loops, "_observed", lambda *a: watched.append(1) or observed(*a))
    sampler = fd.Sampler(network, plan_of("ddim", 2), backend="cpu")
    sampler(X)
    assert watched == []
    ranges_of(lambda: sampler(X))
    assert watched == [1]
    sampler(X)
    assert watched == [1]


@pytest.mark.parametrize("scope", ["profile", "emit_itt"])
def test_every_profiler_of_pytorch_is_seen(scope):
    assert not ranges.profiling()
    kinds = {
        "profile": partial(torch.profiler.profile, acc_events=True),
        "emit_itt": profiler.emit_itt,
    }
    if scope == "emit_itt" and not torch.profiler.itt.is_available():
        pytest.skip("this PyTorch is built without ITT")
    with kinds[scope]():
        assert ranges.profiling()
    assert not ranges.profiling()


def test_ranges_for_nvtx_are_those_of_the_same_switch(monkeypatch):
    # emit_nvtx waits for a device; what it does before and after is PyTorch's own switch
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seen = []
    monkeypatch.setattr(profiler, "_enable_profiler", lambda *_: seen.append(ranges.profiling()))
    monkeypatch.setattr(profiler, "_disable_profiler", lambda: None)
    with profiler.emit_nvtx():
        assert ranges.profiling()
    assert seen == [True]
    assert not ranges.profiling()
