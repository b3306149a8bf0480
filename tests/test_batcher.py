# SPDX-License-Identifier: Apache-2.0
"""Samples at different stages of different plans in one batch, each as if it were alone."""

import copy
import pickle

import pytest
import torch
from support.captures import VP, network, plan_of
from support.core import BACKENDS, needs_core

import fastdiff as fd

EACH = pytest.mark.parametrize("backend", BACKENDS)


PLANS = [plan_of("ddim", 3), plan_of("deis-3", 7), plan_of("dpm-2", 2), plan_of("ddpm", 5)]


def serve(batcher, requests):
    """Runs requests (x, plan, seed, cond) through a batcher as places come free, two at a time."""
    waiting, running, results = list(enumerate(requests)), {}, {}
    while waiting or running:
        for _ in range(min(2, batcher.free, len(waiting))):
            i, (x, plan, seed, cond) = waiting.pop(0)
            running[batcher.add(x, plan, seed=seed, cond=cond)] = i
        for place, sample in batcher.step().items():
            results[running.pop(place)] = sample
    return [results[i] for i in range(len(requests))]


def requests_of(count, shape, dtype=torch.float32, y=False):
    made = []
    for i in range(count):
        cond = {"y": torch.randn(1)} if y else None
        made.append((torch.randn(shape, dtype=dtype), i % len(PLANS), 10 + i, cond))
    return made


def alone(request, guidance=None, backend=None):
    x, plan, seed, cond = request
    return fd.sample(
        *(network, x[None], PLANS[plan]),
        seed=seed,
        cond=cond,
        guidance=guidance,
        backend=backend,
        graph=None,
    )[0]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_sample_is_what_it_is_alone(dtype, backend):
    requests = requests_of(9, (2, 3), dtype)
    batcher = fd.Batcher(network, PLANS, (3, 2, 3), dtype=dtype, backend=backend)
    for request, got in zip(requests, serve(batcher, requests), strict=True):
        torch.testing.assert_close(got, alone(request, backend=backend), rtol=1e-6, atol=1e-6)
    assert batcher.free == 3


@pytest.mark.parametrize("scale", [None, 2.0])
def test_conditioning_and_guidance_are_a_samples_own(scale):
    guidance = None if scale is None else fd.CFG(scale, uncond={"y": 0.0})
    requests = requests_of(9, (6,), y=True)
    example = {"y": torch.zeros(4)}
    batcher = fd.Batcher(network, PLANS, (4, 6), cond=example, guidance=guidance)
    for request, got in zip(requests, serve(batcher, requests), strict=True):
        torch.testing.assert_close(got, alone(request, guidance), rtol=1e-6, atol=1e-6)


@needs_core
def test_one_captured_stage_serves_every_mixture(recorder):
    requests = requests_of(9, (6,), y=True)
    batcher = fd.Batcher(network, PLANS, (4, 6), cond={"y": torch.zeros(4)}, graph="stage")
    for request, got in zip(requests, serve(batcher, requests), strict=True):
        torch.testing.assert_close(got, alone(request), rtol=1e-6, atol=1e-6)
    assert batcher.stats().captures == 1
    recorder.facts = "autocast"
    batcher.add(torch.randn(6), cond={"y": torch.zeros(1)})
    batcher.step()
    assert batcher.stats().captures == 2


@needs_core
@pytest.mark.parametrize("graph", [None, "stage"])
def test_an_error_moves_no_sample(graph, recorder):
    fail = []

    def net(x, t):
        if fail:
            raise KeyError("mine")
        return network(x, t)

    batcher, x = fd.Batcher(net, PLANS, (2, 6), graph=graph), torch.randn(6)
    place = batcher.add(x)
    fail.append(1)
    with pytest.raises(KeyError, match="mine"):
        batcher.step()
    fail.clear()
    results = [batcher.step() for _ in range(3)]
    assert [list(r) for r in results] == [[], [], [place]]
    torch.testing.assert_close(results[-1][place], alone((x, 0, None, None)))


@needs_core
def test_a_bound_that_is_too_small_moves_no_sample(recorder):
    batcher = fd.Batcher(network, PLANS, (2, 6), graph=fd.Graph("stage", bytes=10))
    batcher.add(torch.randn(6))
    before = batcher._run.registers.x.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Graph\.bytes"):
            batcher.step()
    assert torch.equal(batcher._run.registers.x, before)


def test_what_places_share_is_the_examples():
    def net(x, t, pair):
        return x * pair[0]

    shared = torch.tensor(0.5)
    batcher = fd.Batcher(net, PLANS[0], (2, 6), cond={"pair": (shared, 1)})
    batcher.add(torch.randn(6), cond={"pair": (shared.clone(), 1)})
    with pytest.raises(ValueError, match="the same tensors inside tuples"):
        batcher.add(torch.randn(6), cond={"pair": (torch.tensor(0.25), 1)})
    assert batcher.free == 1


def test_bad_outputs_are_named():
    batcher = fd.Batcher(lambda x, t: (x,), PLANS[0], (2, 6))
    batcher.add(torch.randn(6))
    with pytest.raises((TypeError, AttributeError), match="Batcher: the network returns a tensor"):
        batcher.step()


@needs_core
@pytest.mark.parametrize("graph", [None, "stage"])
def test_a_network_that_writes_to_its_input_spoils_no_later_sample(graph, recorder):
    careless = [1]

    def net(x, t):
        out = network(x, t)
        if careless:
            x.mul_(0.5)
        return out

    x = torch.randn(6)
    batcher = fd.Batcher(net, PLANS, (2, 6), graph=graph)
    batcher.add(torch.randn(6))
    with pytest.raises(ValueError, match="in place"):
        batcher.step()
    careless.clear()
    while batcher.free < 2:
        batcher.step()
    place, done = batcher.add(x), {}
    while place not in done:
        done = batcher.step()
    torch.testing.assert_close(done[place], alone((x, 0, None, None)))


def test_a_sample_that_was_written_to_is_given_up():
    batcher = fd.Batcher(lambda x, t: x.mul_(0.5), PLANS, (2, 6))
    batcher.add(torch.randn(6))
    with pytest.raises(RuntimeError, match="given up: add them again"):
        batcher.step()
    assert batcher.free == 2


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_batcher_is_not_copied(make):
    with pytest.raises(TypeError, match="belong to one batcher"):
        make(fd.Batcher(network, PLANS, (2, 6)))


def test_places_are_taken_and_given_back():
    batcher, x = fd.Batcher(network, PLANS[0], (2, 6)), torch.randn(6)
    assert (batcher.free, batcher.add(x), batcher.add(x), batcher.free) == (2, 0, 1, 0)
    with pytest.raises(RuntimeError, match=r"all 2 places are taken"):
        batcher.add(x)
    done = [batcher.step() for _ in range(3)][-1]
    assert sorted(done) == [0, 1]
    kept = done[0].clone()
    batcher.add(torch.randn(6))
    batcher.step()
    assert torch.equal(done[0], kept)  # results are the caller's own
    assert batcher.free == 1


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.Batcher(network, [], (2, 6)), TypeError, "at least one"),
        (lambda: fd.Batcher(network, ["x"], (2, 6)), TypeError, "fastdiff.Plan"),
        (
            lambda: fd.Batcher(network, [PLANS[0], fd.plan(VP, "ddim", 3)], (2, 6)),
            ValueError,
            "one prediction",
        ),
        (lambda: fd.Batcher(network, PLANS, (0, 6)), ValueError, "at least 1"),
        (lambda: fd.Batcher(3, PLANS, (2, 6)), TypeError, "callable"),
        (lambda: fd.Batcher(fd.models.digits(), fd.plan(VP, "ddim", 3), (2, 6)), ValueError, "'v'"),
        (lambda: fd.Batcher(network, PLANS, (2, 6), cond=object()), TypeError, "conditioning is"),
        (
            lambda: fd.Batcher(network, PLANS, (2, 6), cond={"y": fd.PerStage(torch.ones(3, 2))}),
            NotImplementedError,
            "different stages",
        ),
        (lambda: fd.Batcher(network, PLANS, ()), ValueError, "shape is"),
        (lambda: fd.Batcher(network, PLANS, (2, 6), dtype=torch.bfloat16), ValueError, "float32"),
        (lambda: fd.Batcher(network, PLANS, (2, 6), graph="loop"), ValueError, "one stage"),
        (lambda: fd.Batcher(network, PLANS, (2, 6), graph="stage"), ValueError, "graph=None"),
        (
            lambda: fd.Batcher(network, PLANS, (2, 6), guidance=fd.CFG(torch.ones(2))),
            ValueError,
            "a number for its scale",
        ),
    ],
)
def test_bad_settings_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((torch.zeros(5),), {}, ValueError, r"one sample, \(6,\); got \(5,\)"),
        (("x",), {}, ValueError, "got str"),
        ((torch.zeros(6), 4), {}, ValueError, "an index below 4; got 4"),
        ((torch.zeros(6), True), {}, ValueError, "got True"),
        ((torch.zeros(6), 3), {}, ValueError, "draws noise"),
        ((torch.zeros(6), 0), {"cond": {"z": torch.zeros(1)}}, ValueError, "structure"),
        ((torch.zeros(6), 0), {"cond": {"y": torch.zeros(2)}}, ValueError, "one entry a sample"),
        ((torch.zeros(6), 0), {}, ValueError, "structure"),
    ],
)
def test_bad_requests_are_refused_and_take_no_place(arguments, options, error, says):
    batcher = fd.Batcher(network, PLANS, (2, 6), cond={"y": torch.zeros(2)})
    with pytest.raises(error, match=says):
        batcher.add(*arguments, **options)
    assert batcher.free == 2
    with pytest.raises(RuntimeError, match="no sample to move"):
        batcher.step()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_one_captured_stage_serves_every_mixture(backend):
    requests = [
        (x.cuda(), plan, seed, {"y": cond["y"].cuda()})
        for x, plan, seed, cond in requests_of(9, (6,), y=True)
    ]
    batcher = fd.Batcher(
        *(network, PLANS, (4, 6)),
        cond={"y": torch.zeros(4).cuda()},
        device="cuda",
        backend=backend,
    )
    for request, got in zip(requests, serve(batcher, requests), strict=True):
        torch.testing.assert_close(got, alone(request, backend=backend), rtol=1e-6, atol=1e-6)
    assert batcher.stats().captures == 1


MEASURED = fd.Plan(
    (
        fd.Stage(
            t=1.0,
            b=(0.5,),
            scalars=(("b_0", 0),),
            measures=(fd.Measure(into=0, num=fd.Reduction("norm", ("x",))),),
        ),
        fd.Stage(t=0.5, b=(0.5,), scalars=(("b_0", 0),)),
    ),
    (1.0, 0.0),
    prediction="v",
)


@EACH
def test_measures_are_made_for_each_place(backend):
    x = torch.randn(3, 8)
    batcher = fd.Batcher(torch_tanh, [plan_of("ddim", 3), MEASURED], (2, 8), backend=backend)
    done = {batcher.add(x[0]): None, batcher.add(x[1], 1): None}
    while None in done.values():
        done.update(batcher.step())
    for i, plan in enumerate((plan_of("ddim", 3), MEASURED)):
        alone = fd.sample(torch_tanh, x[i : i + 1], plan, backend=backend, graph=None)
        assert torch.allclose(done[i], alone[0], rtol=1e-6, atol=1e-6)


def torch_tanh(x, t):
    return torch.tanh(x)


@pytest.mark.parametrize("spoil", [True, False])
@pytest.mark.parametrize("error", [None, KeyError("broken"), KeyboardInterrupt()])
def test_a_step_that_was_broken_off_half_way_is_not_gone_on_with(error, spoil):
    calls = []

    def network(x, t):
        calls.append(1)
        if len(calls) == 1:
            if spoil:
                x.mul_(3.0)
            if error is not None:
                raise error
        return torch.tanh(x)

    x, plan = torch.randn(8), plan_of("ddim", 3)
    batcher = fd.Batcher(network, [plan], (2, 8))
    place = batcher.add(x)
    if spoil or error is not None:
        with pytest.raises(ValueError if error is None else type(error)):
            batcher.step()
    if spoil:  # what was refused is given up; what was broken off may be half moved
        says = "no sample to move" if error is None else "broken off half way"
        with pytest.raises(RuntimeError, match=says):
            batcher.step()
        assert batcher.free == 2 or error is not None
        return
    done = {}
    while place not in done:
        done = batcher.step()
    assert torch.allclose(done[place], fd.sample(torch_tanh, x[None], plan)[0], atol=1e-6)


@needs_core
@pytest.mark.parametrize("what", ["add", "step"])
@pytest.mark.parametrize("whose", ["a captured network", "somebody"])
def test_a_batcher_inside_a_recording_is_refused(whose, what, recorder):
    """Its places are counted in Python; and a capture in a capture would wait for itself."""
    batcher = fd.Batcher(network, PLANS, (2, 6), graph="stage")
    batcher.add(torch.randn(6))

    def call():
        return batcher.step() if what == "step" else batcher.add(torch.randn(6))

    def net(x, t):
        call()
        return network(x, t)

    says = rf"{what}\(\) counts places in Python.*Call it outside"
    if whose == "somebody":
        with recorder.recording("stream 1", "his"), pytest.raises(RuntimeError, match=says):
            call()
    else:
        sampler = fd.Sampler(net, PLANS[0], graph="loop")
        with pytest.raises(RuntimeError, match=says):
            sampler(torch.randn(2, 6))
    assert batcher.free == 1
    batcher.step()
    assert batcher.add(torch.randn(6)) == 1


@needs_core
def test_a_network_that_steps_a_batcher_runs_eagerly_by_itself(recorder):
    batcher = fd.Batcher(network, [plan_of("ddim", 40)], (1, 6), graph="stage")
    batcher.add(torch.randn(6))

    def net(x, t):
        batcher.step()
        return network(x, t)

    sampler, x = fd.Sampler(net, PLANS[0]), torch.randn(2, 6)
    expected = sampler(x)
    with pytest.warns(RuntimeWarning, match="counts places in Python"):
        assert torch.equal(sampler(x), expected)
    assert batcher.stats().captures == 1


def test_seeds_of_a_request_may_lie_on_the_device(monkeypatch):
    batcher = fd.Batcher(network, [fd.plan(VP, "ddpm", 3)], (2, 6), graph=None)
    x = torch.randn(6)
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    batcher.add(x, seed=torch.tensor([7]))
    monkeypatch.undo()
    batcher.add(x, seed=7)
    done = {}
    while len(done) < 2:
        done.update(batcher.step())
    assert torch.equal(done[0], done[1])
