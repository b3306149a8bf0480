# SPDX-License-Identifier: Apache-2.0
"""Captured gradients: a run and its backward pass as two graphs; and gradients on a GPU."""

import pytest
import torch
from support.gradients import BACKENDS, F64, apart, net_of, plan_of
from support.nets import Net
from torch import nn

import fastdiff as fd


@pytest.fixture
def net():
    return net_of()


# -- captured --------------------------------------------------------------------------------------


needs_core = pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled core is not built")
GRADIENTS = pytest.mark.parametrize(
    "gradient",
    [
        fd.Discrete(),
        fd.AdjointDEIS(2),
        fd.AdjointDEIS(1, published=True),
    ],
)


@needs_core
@GRADIENTS
@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])
def test_a_captured_gradient_equals_the_eager_one(net, recorder, solver, gradient):
    plan = plan_of(solver)
    sampler = fd.Sampler(net, plan, gradient=gradient, graph="loop")
    for seed in range(3):
        torch.manual_seed(seed)
        x, y, weights = torch.randn(3, 5, dtype=F64), torch.randn(3, dtype=F64), torch.randn(3, 5)
        results = []
        for run in (fd.Sampler(net, plan, gradient=gradient), sampler):
            own = [v.clone().requires_grad_() for v in (x, y)]
            net.zero_grad()
            out = run(own[0], {"y": own[1]})
            (out * weights).sum().backward()
            results.append([out.detach(), *(v.grad for v in own), net.linear.weight.grad.clone()])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            net.linear.weight.mul_(0.9)  # in place: the graphs read it where it lies
    stats = sampler.stats()
    assert (stats.captures, stats.replays) == (1, 2 + 3 * 2)  # one pair to compare with


@needs_core
def test_a_captured_gradient_is_not_the_buffer_it_was_made_in(net, recorder):
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph="loop")
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    sampler(x).sum().backward()
    kept = net.linear.weight.grad, x.grad
    copies = [g.clone() for g in kept]
    other = torch.randn(3, 5, dtype=F64, requires_grad=True)
    torch.autograd.grad((sampler(other) ** 2).sum(), other)
    for g, c in zip(kept, copies, strict=True):
        assert torch.equal(g, c)


@needs_core
def test_states_of_another_captured_run_are_not_taken(net, recorder):
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph="loop")
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    first = sampler(x)
    second = sampler(x)
    with pytest.raises(RuntimeError, match=r"after the sampler was called again"):
        first.sum().backward()
    second.sum().backward()
    assert x.grad.isfinite().all()


@needs_core
def test_what_a_captured_gradient_depends_on_is_in_its_key(net, recorder):
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph="loop")
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    sampler(x).sum().backward()
    sampler(x.detach()).sum().backward()  # parameters alone
    sampler.set_plan(plan_of("ddim"))
    got = torch.autograd.grad(sampler(x).sum(), x)[0]
    expected = fd.sample(net, x, plan_of("ddim"), gradient="discrete")
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), x)[0])
    assert sampler.stats().captures == 3


@needs_core
def test_a_captured_network_that_draws_is_refused(recorder):
    class Dropped(Net):
        def forward(self, x, t, y=None):
            return nn.functional.dropout(super().forward(x, t, y), 0.3, self.training)

    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    sampler = fd.Sampler(Dropped().double().train(), plan_of(), gradient="discrete", graph="loop")
    with pytest.raises(NotImplementedError, match=r"draws at stage 0.*graph=None"):
        sampler(x)
    sampler = fd.Sampler(Net(idle=True).double(), plan_of(), gradient=fd.Discrete(2), graph="loop")
    with pytest.raises(NotImplementedError, match="checkpoint=None"):
        sampler(x)


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("solver", fd.solvers.names())
def test_gpu_discrete_is_backpropagation(net, solver, backend):
    net = net.cuda()
    plan = plan_of(solver)
    x = torch.randn(3, 5, dtype=F64).cuda().requires_grad_()
    grads = []
    for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=2)):
        out = fd.sample(net, x, plan, gradient=gradient, backend=backend, seed=5)
        grads.append(torch.autograd.grad(out.sum(), (x, net.linear.weight)))
    assert apart(grads[1], grads[0]) < 1e-10
    assert apart(grads[2], grads[0]) < 1e-10


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("gradient", [fd.Discrete(), fd.AdjointDEIS(2)])
def test_gpu_a_captured_gradient_equals_the_eager_one(net, gradient, backend):
    net, plan = net.cuda(), plan_of("deis-3")
    sampler = fd.Sampler(net, plan, gradient=gradient, graph="loop", backend=backend)
    eager = fd.Sampler(net, plan, gradient=gradient, graph=None, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x, weights = torch.randn(3, 5, dtype=F64).cuda(), torch.randn(3, 5).cuda()
        results = []
        for run in (eager, sampler):
            own = x.clone().requires_grad_()
            wanted = (own, net.linear.weight)
            results.append(torch.autograd.grad((run(own) * weights).sum(), wanted))
        assert apart(results[1], results[0]) < 1e-10
    assert sampler.stats().captures == 1
