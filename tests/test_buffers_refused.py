# SPDX-License-Identifier: Apache-2.0
"""What runs on buffers refuse, in what words, and what they leave then."""

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from support.captures import network, plan_of
from support.core import BACKENDS, needs_core

import fastdiff as fd
from fastdiff.guidance import Guidance

PLAN = plan_of("deis-3", 6)
LIKE = torch.zeros(3, 5)


@needs_core
@pytest.mark.parametrize("captured", [False, True])
def test_a_second_run_from_what_the_first_left_is_asked_for(captured, recorder):
    sampler = fd.Sampler(network, PLAN, graph="loop" if captured else None)
    x = torch.randn(3, 5)
    buffers = sampler.buffers(x)
    first = buffers.run().clone()
    with pytest.raises(ValueError, match=r"nothing was written to x.*run\(filled=True\)"):
        buffers.run()
    assert torch.equal(buffers.x, first)
    expected = fd.sample(network, first, PLAN)
    assert torch.equal(buffers.run(filled=True), expected)
    with torch.inference_mode():
        buffers.x.copy_(x)
        assert torch.equal(buffers.run(), first)
    buffers.x.data.copy_(x)  # which a version counter does not see
    with pytest.raises(ValueError, match="nothing was written"):
        buffers.run()
    assert torch.equal(buffers.run(filled=True), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_broke_off_has_consumed_x(backend):
    fails = [True]

    def net(x, t):
        if fails[0] and float(t[0]) < 0.5:
            raise KeyError("broken")
        return network(x, t)

    buffers = fd.Sampler(net, PLAN, backend=backend).buffers(LIKE)
    with pytest.raises(KeyError):
        buffers.run()
    with pytest.raises(ValueError, match="nothing was written"):
        buffers.run()
    fails[0] = False
    x = torch.randn(3, 5)
    buffers.x.copy_(x)
    assert torch.equal(buffers.run(), fd.sample(network, x, PLAN, backend=backend))


@needs_core
def test_a_refused_capture_leaves_x_or_runs_eagerly(recorder):
    recorder.synchronises = RuntimeError("called a synchronizing CUDA operation")
    x = torch.randn(3, 5)
    sampler = fd.Sampler(network, PLAN, graph="loop")
    buffers = sampler.buffers(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="neither waits"):
            buffers.run()
        assert torch.equal(buffers.x, x)
    buffers = fd.Sampler(network, PLAN).buffers(x)
    with pytest.warns(RuntimeWarning, match="Until then it runs eagerly") as caught:
        result = buffers.run()
    assert caught[0].filename == __file__
    automatic = fd.Sampler(network, PLAN)
    automatic(x)
    with pytest.warns(RuntimeWarning, match="runs eagerly") as caught:
        automatic(x)
    assert caught[0].filename == __file__
    assert torch.equal(result, fd.sample(network, x, PLAN))
    buffers.x.copy_(x)
    assert torch.equal(buffers.run(), fd.sample(network, x, PLAN))  # without a second warning


def test_a_run_at_the_same_time_is_refused():
    inner = []

    def net(x, t):
        try:
            buffers.run(filled=True)
        except RuntimeError as error:
            inner.append(str(error))
        with_thread(lambda: buffers.run(filled=True))
        return network(x, t)

    def with_thread(call):
        def caught():
            try:
                call()
            except RuntimeError as error:
                inner.append(str(error))

        thread = threading.Thread(target=caught)
        thread.start()
        thread.join()

    x = torch.randn(3, 5)
    buffers = fd.Sampler(net, PLAN).buffers(x)
    assert torch.equal(buffers.run(), fd.sample(network, x, PLAN))
    assert len(inner) == 12
    assert all("buffers serve one run at a time" in said for said in inner)


def test_buffers_that_were_moved_or_replaced_are_refused():
    @dataclass
    class Held:
        y: torch.Tensor

    def net(x, t, y, held):
        return network(x, t, y) * held.y

    def made():
        cond = {"y": torch.zeros(3), "held": Held(torch.ones(5))}
        return fd.Sampler(net, PLAN).buffers(LIKE, cond)

    def move_x(buffers):
        buffers.x.data = torch.zeros(3, 5)

    def move_cond(buffers):
        buffers.cond["y"].data = torch.zeros(3)

    def replace(buffers):
        buffers.cond["held"].y = torch.zeros(5)

    def shrink_x(buffers):
        buffers.x.resize_(2, 5)

    def shrink_cond(buffers):
        buffers.cond["y"].resize_(2)

    for change in (move_x, move_cond, replace, shrink_x, shrink_cond):
        buffers = made()
        change(buffers)
        with pytest.raises(RuntimeError, match=r"stay where they lie.*Write into it"):
            buffers.run(filled=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_that_the_network_wrote_to_are_given_up(backend):
    buffers = fd.Sampler(lambda x, t: x.mul_(0.5), PLAN, backend=backend).buffers(LIKE)
    with pytest.raises(ValueError, match="wrote to its input in place"):
        buffers.run()
    buffers.x.copy_(LIKE)
    with pytest.raises(RuntimeError, match=r"were given up.*Make new ones"):
        buffers.run()


def test_a_network_may_differentiate_by_its_input_again_and_again():
    def net(x, t):
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(torch.sin(x).sum(), x)[0]

    buffers = fd.Sampler(net, PLAN).buffers(LIKE)
    for _ in range(2):
        x = torch.randn(3, 5)
        buffers.x.copy_(x)
        assert torch.equal(buffers.run(), fd.sample(lambda x, t: torch.cos(x), x, PLAN))
        assert not buffers.x.requires_grad


def test_gradients_are_refused():
    for gradient in ("discrete", "backprop", fd.AdjointDEIS()):
        with pytest.raises(ValueError, match="without a gradient"):
            fd.Sampler(network, PLAN, gradient=gradient).buffers(LIKE)
    with pytest.raises(ValueError, match="x requires grad"):
        fd.Sampler(network, PLAN).buffers(LIKE.clone().requires_grad_())
    for name in ("x", "cond"):
        buffers = fd.Sampler(network, PLAN).buffers(LIKE, {"y": torch.zeros(3)})
        tensor = buffers.x if name == "x" else buffers.cond["y"]
        tensor.copy_(torch.ones(tensor.shape, requires_grad=True))
        with pytest.raises(ValueError, match="carry no gradient"):
            buffers.run(filled=True)


def test_what_cannot_be_run_in_place_is_refused(recorder):
    sampler = fd.Sampler(network, PLAN, graph=None)
    with pytest.raises(ValueError, match="one sample at least"):
        sampler.buffers(torch.zeros(0, 5))
    with pytest.raises(TypeError, match="x is a tensor"):
        sampler.buffers([1.0])
    with pytest.raises(ValueError, match="Give seed="):
        fd.Sampler(network, plan_of("ddpm")).buffers(LIKE)
    with pytest.raises(NotImplementedError, match='by a whole loop; got graph="stage"'):
        fd.Sampler(network, PLAN, graph="stage").buffers(LIKE)
    with pytest.raises(ValueError, match="no stages to look into"):
        fd.Sampler(network, PLAN, graph="loop", check=True).buffers(LIKE)
    buffers = fd.Sampler(network, PLAN, check=True).buffers(LIKE)
    buffers.x.fill_(torch.nan)
    with pytest.raises(ValueError, match="x is finite"):
        buffers.run()


@needs_core
def test_an_opaque_object_in_the_conditioning_is_refused_where_a_loop_is_captured(recorder):
    class Scale:
        value = 0.5

    def net(x, t, scale):
        return network(x, t) * scale.value

    cond = {"scale": Scale()}
    with pytest.raises(TypeError, match="whose changes it would miss"):
        fd.Sampler(net, PLAN, graph="loop").buffers(LIKE, cond).run()
    buffers = fd.Sampler(net, PLAN).buffers(LIKE, cond)
    assert torch.equal(buffers.run(), fd.sample(net, LIKE, PLAN, cond=cond))
    assert recorder.recorded == 0


def test_inside_another_recording_or_compilation_buffers_are_refused(monkeypatch):
    sampler = fd.Sampler(network, PLAN, graph=None)
    buffers = sampler.buffers(LIKE)
    monkeypatch.setattr("fastdiff.capture.buffers.capturing", lambda device: True)
    for use in (lambda: sampler.buffers(LIKE), buffers.run):
        with pytest.raises(RuntimeError, match="Call the sampler itself there"):
            use()
    monkeypatch.setattr("fastdiff.capture.buffers.capturing", lambda device: False)
    compiled = torch.compile(lambda: buffers.run() + 1.0, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compile around them"):
        compiled()


@pytest.mark.filterwarnings("ignore")  # the compiler's own, of what it leaves alone
def test_a_run_leaves_a_graph_of_the_compilers():
    buffers = fd.Sampler(network, PLAN, graph=None).buffers(LIKE)
    compiled = torch.compile(lambda: buffers.run() + 1.0, backend="eager")
    assert torch.equal(compiled(), fd.sample(network, LIKE, PLAN) + 1.0)


@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_a_trace_of_a_run_is_refused():
    buffers = fd.Sampler(network, PLAN).buffers(LIKE)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: buffers.run() + x, LIKE)


def test_a_guidance_that_computes_is_refused():
    class Mixed(Guidance):
        branches, per_sample = 2, False

        def weights(self, stage):
            return (0.5, 0.5)

        def combined_weights(self, stage, like):
            return (0.5, 0.5)

        def check(self, plan, batch):
            pass

        def conditions(self, cond, batch):
            return {"y": torch.cat([2.0 * cond["y"], cond["y"]])}

        def conditions_given(self):
            return None

    sampler = fd.Sampler(network, PLAN, guidance=Mixed())
    sampler(LIKE, {"y": torch.ones(3)})
    with pytest.raises(NotImplementedError, match="got Mixed, which computes with it"):
        sampler.buffers(LIKE, {"y": torch.ones(3)})


def test_buffers_are_neither_copied_nor_sent():
    buffers = fd.Sampler(network, PLAN).buffers(LIKE)
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"Buffers: .* one process"):
            use(buffers)
