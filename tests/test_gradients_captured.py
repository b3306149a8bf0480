# SPDX-License-Identifier: Apache-2.0
"""Captured gradients: a run and its backward pass as two graphs; and gradients on a GPU."""

from concurrent.futures import ThreadPoolExecutor

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
@pytest.mark.parametrize("scale", [2.0, [1.0, 2.0, 3.0], torch.tensor([1.0, 2.0, 3.0])])
def test_a_captured_gradient_reaches_all_that_an_eager_one_does(net, recorder, scale):
    """The bank, a conditioning of one value a stage, both branches, and noise."""
    stages = tuple(
        fd.Stage(t=1.0 - i / 3, c_in=0.8, b=(0.4,), r=(0.3,), c=0.2, noise=((i + 1, 1.0),))
        for i in range(3)
    )
    plan = fd.Plan(stages, (1.0, 0.0))
    samplers = [fd.Sampler(net, plan, gradient="discrete", graph=graph) for graph in (None, "loop")]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(n, generator=generator, dtype=F64) for n in ((3, 5), (3, 3), (1, 5))]
        none, results = torch.randn(3, generator=generator, dtype=F64), []
        for sampler in samplers:
            x, y, extra, uncond = (v.clone().requires_grad_() for v in (*values, none))
            sampler.set_plan(plan, fd.CFG(scale, {"y": uncond}))
            out = sampler(x, {"y": fd.PerStage(y)}, extras=[extra], seed=seed)
            wanted = (x, y, extra, uncond, net.linear.weight)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), wanted)])
        assert all(map(torch.equal, *results))


@needs_core
@GRADIENTS
def test_a_captured_network_that_writes_to_its_input_is_refused(net, recorder, gradient):
    sampler = fd.Sampler(lambda x, t: net(x.mul_(0.5), t), plan_of(), gradient=gradient,
                         graph="loop", params=net)  # fmt: skip
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match="wrote to its input in place"):
        sampler(x)


@needs_core
def test_threads_that_share_a_captured_gradient_are_right_or_told(net, recorder):
    """Each call replays alone; what it keeps for its backward pass another call overwrites."""
    sampler = fd.Sampler(net, plan_of(), gradient="discrete", graph="loop")
    eager = fd.Sampler(net, plan_of(), gradient="discrete", graph=None)
    values = [torch.randn(3, 5, dtype=F64) for _ in range(4)]

    def found(run, value):
        x = value.clone().requires_grad_()
        out = run(x)
        try:
            return out.detach(), torch.autograd.grad(out.sum(), x)[0], ""
        except RuntimeError as error:
            return out.detach(), None, str(error)

    expected = [found(eager, value) for value in values]
    found(sampler, values[0])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for k, got in enumerate(pool.map(lambda v: found(sampler, v), values)):
                assert torch.equal(got[0], expected[k][0])
                told = "after the sampler was called again" in got[2]
                assert told if got[1] is None else torch.equal(got[1], expected[k][1])


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
