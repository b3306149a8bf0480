# SPDX-License-Identifier: Apache-2.0
"""What a gradient costs, and what it may not do."""

import gc

import pytest
import torch
from support.gradients import (
    F64,
    VP,
    apart,
    gradients,
    net_of,
    plan_of,
)
from support.memory import Peak
from support.nets import Net
from torch import nn

import fastdiff as fd


@pytest.fixture
def net():
    return net_of()


# -- costs -----------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Activations of many times its input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 4096), nn.Linear(4096, 64)

    def forward(self, x, t):
        return self.down(torch.tanh(self.up(x)))


def peak_of(steps, gradient):
    torch.manual_seed(0)
    net, plan = Wide(), plan_of("dpmpp-2m", steps)
    x = torch.randn(16, 64, requires_grad=True)
    sampler = fd.Sampler(net, plan, gradient=gradient, params=None)
    gc.collect()
    with Peak() as peak:
        sampler(x).sum().backward()
    return peak.most


def test_memory_grows_by_the_states_alone():
    state = 16 * 64 * 4
    few, many = peak_of(10, "discrete"), peak_of(100, "discrete")
    assert many - few <= 90 * state * 1.2
    assert many - few >= 90 * state * 0.8
    activations = 16 * 4096 * 4
    assert peak_of(30, "backprop") - peak_of(10, "backprop") > 20 * activations


def test_checkpoints_keep_fewer_states():
    state = 16 * 64 * 4
    grown = peak_of(100, fd.Discrete(checkpoint=10)) - peak_of(10, fd.Discrete(checkpoint=10))
    # 10 checkpoints of x and one slot of history beside a segment of 10 states
    assert grown <= 35 * state


def test_a_run_that_is_undone_keeps_no_states():
    def most(steps):
        torch.manual_seed(0)
        plan = fd.plan(VP, "rex-1", steps, prediction="v", t_max=0.9, t_min=0.05)
        x = torch.randn(32, 64, requires_grad=True)
        sampler = fd.Sampler(Wide(), plan, gradient=fd.Discrete(undo=True))
        gc.collect()
        with Peak() as peak:
            sampler(x).sum().backward()
        return peak.most

    # tables and times: less than a quarter of a state for each of the 180 stages
    assert most(100) - most(10) < 180 * 32 * 64 * 4 / 4


@pytest.mark.parametrize(("gradient", "calls"), [("discrete", 2), (fd.Discrete(checkpoint=3), 3)])
def test_a_stage_costs_one_more_evaluation_and_one_product(net, gradient, calls):
    plan, count = plan_of("deis-3", 6), []

    def counted(x, t):
        count.append(1)
        return net(x, t)

    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    fd.sample(counted, x, plan, gradient=gradient, params=net).sum().backward()
    assert len(count) == calls * plan.nfe


# -- what a gradient may not do --------------------------------------------------------------------


def test_a_gradient_of_a_gradient_is_refused(net):
    plan, x = plan_of(), torch.randn(3, 5, dtype=F64, requires_grad=True)
    out = fd.sample(net, x, plan, gradient="discrete")
    with pytest.raises(RuntimeError, match=r"not differentiable again.*backprop"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    out = fd.sample(net, x, plan, gradient="backprop")
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()


def test_freed_buffers_are_autograds_own_error(net):
    plan, x = plan_of(), torch.randn(3, 5, dtype=F64, requires_grad=True)
    out = fd.sample(net, x, plan, gradient="discrete").sum()
    out.backward(retain_graph=True)
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_dropout_is_drawn_again(net):
    class Dropped(Net):
        def forward(self, x, t, y=None):
            return nn.functional.dropout(super().forward(x, t, y), 0.3, self.training)

    net, plan = Dropped().double().train(), plan_of("deis-3")
    results = []
    for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=2)):
        torch.manual_seed(7)
        results.append([*gradients(net, plan, gradient), torch.randn(3)])
    # the generator ends where the forward run left it
    assert apart(results[1], results[0]) < 1e-10
    assert apart(results[2], results[0]) < 1e-10


def _writes(x, t):
    return x.mul_(0.5)


def test_networks_that_write_to_their_input_are_refused():
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match=r"stage 0 .* wrote to its input in place"):
        fd.sample(_writes, x, plan_of(), gradient="discrete")


def test_weights_changed_before_backward_are_refused(net):
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    out = fd.sample(net, x, plan_of(), gradient="discrete")
    with torch.no_grad():
        net.linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place.*shape \(5, 5\)"):
        out.sum().backward()


def test_tensors_that_nobody_named_are_refused(net):
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    plan = plan_of()
    with pytest.raises(ValueError, match=r"nobody named, of shape \(5.*params="):
        fd.sample(lambda x, t: net(x, t), x, plan, gradient="discrete")
    out = fd.sample(lambda x, t: net(x, t), x, plan, gradient="discrete", params=net)
    out.sum().backward()
    assert net.linear.weight.grad is not None
    outside = torch.ones(5, dtype=F64, requires_grad=True)
    shift = 2 * outside
    with pytest.raises(ValueError, match=r"nobody named, of shape \(5,\)"):
        fd.sample(lambda x, t: x * shift, x, plan, gradient="discrete")
    a, b = (2 * outside).split([2, 3])  # b hides behind a, of the same operation
    with pytest.raises(ValueError, match=r"nobody named, of shape \(5,\)"):
        fd.sample(
            lambda x, t: x * torch.cat([a, b]), x, plan, gradient="discrete", params=[a]
        )  # fmt: skip
    out = fd.sample(lambda x, t: x * shift, x, plan, gradient="discrete", params=[shift])
    assert torch.autograd.grad(out.sum(), outside)[0].isfinite().all()


@pytest.mark.parametrize("gradient", ["discrete", fd.Discrete(checkpoint=2), fd.AdjointDEIS(2)])
def test_tensors_that_nobody_named_are_refused_at_later_stages_too(gradient):
    outside = torch.ones(5, dtype=F64, requires_grad=True)
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)

    def network(x, t):
        return torch.tanh(x * outside if t[0] < 0.3 else x)

    out = fd.sample(network, x, plan_of(), gradient=gradient)
    with pytest.raises(ValueError, match=r"nobody named, of shape \(5,\)"):
        out.sum().backward()
    out = fd.sample(network, x, plan_of(), gradient=gradient, params=[outside])
    assert float(torch.autograd.grad(out.sum(), outside)[0].abs().min()) > 0


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"gradient": None}, ValueError, r"'discrete', fastdiff\.AdjointDEIS\(\) or 'backprop'"),
        ({"x": torch.randn(3, 5)}, ValueError, "got none in x, cond, extras and the parameters"),
        ({"gradient": "adjoint"}, ValueError, "got 'adjoint'"),
        ({"gradient": 3}, TypeError, "got 3"),
        ({"params": torch.ones(3)}, TypeError, "iterable of tensors"),
        ({"params": {"a": torch.ones(3)}}, TypeError, r"params=d\.values\(\)"),
        ({"callback": print}, ValueError, "takes no callback="),
        ({"out": torch.empty(3, 5)}, ValueError, "takes no callback="),
        ({"graph": "loop"}, ValueError, "captured on cuda; got x on cpu"),
        ({"graph": "stage"}, NotImplementedError, 'graph="loop"'),
        ({"graph": "loop", "gradient": "backprop"}, NotImplementedError, "graph=None"),
        ({"plan": plan_of("ddpm")}, ValueError, "draws noise"),
        ({"xi": torch.randn(6, 3, 5)}, NotImplementedError, "seed="),
        ({"xi": torch.randn(6, 3, 5, requires_grad=True)}, ValueError, "has no gradient"),
    ],
)
def test_bad_requests_are_refused(options, error, says):
    given = {
        "net": lambda x, t: 0.5 * x,
        "x": torch.randn(3, 5, requires_grad=True),
        "plan": plan_of(),
        "gradient": "discrete",
        **options,
    }
    net, x, plan = (given.pop(name) for name in ("net", "x", "plan"))
    with pytest.raises(error, match=says):
        fd.sample(net, x, plan, **given)


def test_inference_mode_is_refused(net):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference mode.*no_grad"):
        fd.sample(net, torch.randn(3, 5, dtype=F64), plan_of(), gradient="discrete")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fd.Discrete(checkpoint=0), "from 1 on; got 0"),
        (lambda: fd.Discrete(checkpoint=True), "got True"),
        (lambda: fd.Discrete(threshold="none"), "got 'none'"),
        (lambda: fd.Discrete(checkpoint=2, undo=True), "needs no checkpoint"),
        (lambda: fd.AdjointDEIS(4), "order is one of 1, 2, 3; got 4"),
        (lambda: fd.AdjointDEIS(form="v"), "got 'v'"),
        (lambda: fd.AdjointDEIS(states="kept"), "got 'kept'"),
        (lambda: fd.AdjointDEIS(published=1), "got 1"),
        (lambda: fd.AdjointDEIS(3, published=True), "of order 1 and 2"),
        (lambda: fd.AdjointDEIS(steps=0), "got 0"),
    ],
)
def test_bad_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_an_empty_batch_has_an_empty_gradient(net):
    x = torch.randn(0, 5, dtype=F64, requires_grad=True)
    fd.sample(net, x, plan_of(), gradient="discrete").sum().backward()
    assert x.grad.shape == (0, 5)


# -- networks that write to what they are given ----------------------------------------------------


class Writer(nn.Module):
    """Writes to x or to t in place at one of its calls."""

    def __init__(self, net, what, call):
        super().__init__()
        self.net, self.what, self.call, self.calls = net, what, call, 0

    def forward(self, x, t, y=None):
        self.calls += 1
        if self.calls == self.call:
            with torch.no_grad():
                (x.detach() if self.what == "x" else t).mul_(1000.0)
        return self.net(x, t, y)


GRADIENTS = pytest.mark.parametrize(
    "gradient",
    [
        fd.Discrete(),
        fd.Discrete(checkpoint=2),
        fd.AdjointDEIS(2),
        fd.AdjointDEIS(2, published=True),
        fd.AdjointDEIS(2, states="resolve"),
    ],
)


@GRADIENTS
@pytest.mark.parametrize("what", ["x", "t"])
def test_writing_to_an_input_is_refused_wherever_it_happens(net, gradient, what):
    plan = plan_of("ddim", 4)
    writer = Writer(net, what, None)
    sampler = fd.Sampler(writer, plan, gradient=gradient)

    def found():
        x = torch.ones(3, 5, dtype=F64, requires_grad=True)
        writer.calls = 0
        out = sampler(x, {"y": torch.ones(3, dtype=F64)})
        return [out.detach(), *torch.autograd.grad(out.sum(), (x, net.linear.weight))]

    expected = found()
    for call in range(1, writer.calls + 1):
        writer.call = call
        with pytest.raises((ValueError, RuntimeError), match="wrote to its input in place"):
            found()
        writer.call = None
        assert all(map(torch.equal, found(), expected)), call  # nothing of it is left


def test_a_pass_that_was_refused_cannot_be_taken_again_on_what_was_overwritten(net):
    writer = Writer(net, "t", 5)
    x = torch.ones(3, 5, dtype=F64, requires_grad=True)
    out = fd.sample(writer, x, plan_of("ddim", 4), gradient="discrete").sum()
    with pytest.raises(RuntimeError, match="wrote to its input in place"):
        out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@GRADIENTS
def test_fresh_inputs_may_be_written_to(net, gradient):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, y=None):
            x *= 0.5
            t *= 2.0
            return self.net(x, t, y)

    def found(network, fresh):
        x = torch.ones(3, 5, dtype=F64, requires_grad=True)
        sampler = fd.Sampler(network, plan_of(), gradient=gradient, fresh_inputs=fresh)
        wanted = (x, net.linear.weight)
        return torch.autograd.grad(sampler(x, {"y": torch.ones(3, dtype=F64)}).sum(), wanted)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, y=None):
            return self.net(0.5 * x, 2.0 * t, y)

    assert apart(found(Scaled(), True), found(Plain(), False)) < 1e-14
