# SPDX-License-Identifier: Apache-2.0
"""Differentiable calls at once, inside one another and on other threads leave each other alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.gradients import F64, net_of, plan_of
from torch import nn

import fastdiff as fd

WAYS = pytest.mark.parametrize(
    "gradient",
    [
        fd.Discrete(),
        fd.Discrete(checkpoint=2),
        fd.AdjointDEIS(2),
        fd.AdjointDEIS(2, states="resolve"),
    ],
)


def given(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weights = (torch.randn(3, 5, generator=generator, dtype=F64) for _ in range(2))
    return x.requires_grad_(), torch.randn(3, generator=generator, dtype=F64), weights


def found(sampler, net, seed):
    """The sample and the gradients in x and in the weights, of one call."""
    x, y, weights = given(seed)
    out = sampler(x, {"y": y}, seed=seed)
    wanted = (x, net.linear.weight)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


@WAYS
def test_eight_threads_may_share_a_sampler(gradient):
    net, plan = net_of(), plan_of("deis-3")
    sampler = fd.Sampler(net, plan, gradient=gradient)
    alone = [found(fd.Sampler(net, plan, gradient=gradient), net, seed) for seed in range(8)]
    begin = threading.Barrier(8)

    def work(seed):
        begin.wait()
        return [found(sampler, net, seed) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for seed, results in enumerate(pool.map(work, range(8))):
            for result in results:
                assert all(map(torch.equal, result, alone[seed])), seed


def test_a_run_of_a_reversible_plan_is_undone_in_several_threads():
    net = net_of()
    plan = fd.plan(fd.schedules.VPLinear(), "rex-1", 6, prediction="v", t_max=0.9, t_min=0.05)
    sampler = fd.Sampler(net, plan, gradient=fd.Discrete(undo=True))
    alone = [found(sampler, net, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for seed, got in enumerate(pool.map(lambda s: found(sampler, net, s), range(4))):
            assert all(map(torch.equal, got, alone[seed]))


@WAYS
def test_the_backward_pass_may_run_on_another_thread(gradient):
    net, plan = net_of(), plan_of("ddpm" if isinstance(gradient, fd.Discrete) else "deis-3")
    sampler = fd.Sampler(net, plan, gradient=gradient)
    expected = [found(sampler, net, seed) for seed in range(6)]
    calls = []
    for seed in range(6):
        x, y, weights = given(seed)
        calls.append((x, (sampler(x, {"y": y}, seed=seed) * weights).sum()))

    def work(seed):
        x, loss = calls[seed]
        return torch.autograd.grad(loss, (x, net.linear.weight))

    with ThreadPoolExecutor(3) as pool:
        for seed, got in enumerate(pool.map(work, reversed(range(6)))):
            assert all(map(torch.equal, got, expected[5 - seed][1:]))


@WAYS
def test_a_network_may_call_the_sampler_that_calls_it(gradient):
    net, plan = net_of(), plan_of("deis-3")
    expected = found(fd.Sampler(net, plan, gradient=gradient), net, 0)
    inner = []

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.net, self.busy = net.linear, net, False

        def forward(self, x, t, y=None):
            if not self.busy and t.requires_grad is False:
                self.busy = True
                with torch.no_grad():
                    sampler(torch.ones(3, 5, dtype=F64), {"y": torch.zeros(3, dtype=F64)})
                with torch.enable_grad():
                    inner.append(found(sampler, net, 0))
                self.busy = False
            return self.net(x, t, y)

    sampler = fd.Sampler(Nested(), plan, gradient=gradient)
    assert all(map(torch.equal, found(sampler, net, 0), expected))
    assert len(inner) >= 2 * len(plan.stages)
    assert all(all(map(torch.equal, each, expected)) for each in inner)


def test_hooks_see_whole_gradients_in_every_thread():
    net, plan, seen = net_of(), plan_of(), []
    sampler = fd.Sampler(net, plan, gradient="discrete")
    expected = [found(sampler, net, seed)[2] for seed in range(4)]
    net.linear.weight.register_hook(lambda g: (seen.append(g.clone()), g.clamp(-0.1, 0.1))[1])
    with ThreadPoolExecutor(4) as pool:
        got = [result[2] for result in pool.map(lambda s: found(sampler, net, s), range(4))]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b.clamp(-0.1, 0.1))
    assert len(seen) == 4
    assert all(any(torch.equal(a, b) for b in expected) for a in seen)
    assert [type(hook).__name__ for hook in net.linear.weight._backward_hooks.values()] == [
        "function"
    ]


def test_an_error_in_a_call_leaves_the_others_alone():
    net, plan, fail = net_of(), plan_of(), []

    def network(x, t, y):
        if fail and fail[0] == len(fail):
            raise KeyError("broken")
        if fail:
            fail.append(0)
        return net(x, t, y)

    sampler = fd.Sampler(network, plan, gradient=fd.Discrete(checkpoint=2), params=net)
    expected = found(sampler, net, 0)
    for call in (2, 5, 8, 11, 14):  # forward, in a segment, in a product
        fail[:] = [call]
        with pytest.raises(KeyError, match="broken"):
            found(sampler, net, 0)
        fail.clear()
        assert all(map(torch.equal, found(sampler, net, 0), expected))


@pytest.mark.parametrize("gradient", ["discrete", fd.Discrete(checkpoint=3)])
def test_random_numbers_that_cannot_be_drawn_again_are_refused(gradient):
    """One generator serves all threads: where another one draws between, the numbers are others."""
    net, plan, between = net_of(dropout=0.3).train(), plan_of("ddim", 4), []

    def network(x, t):
        if between:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(torch.rand, 7).result()
        return net(x, t)

    sampler = fd.Sampler(network, plan, gradient=gradient, params=net)
    x, _, weights = given(0)
    for forward in (True, False):
        between[:] = [1] if forward else []
        loss = (sampler(x) * weights).sum()
        between[:] = [] if forward else [1]
        with pytest.raises(RuntimeError, match=r"drew other random numbers at stage \d.*eval\(\)"):
            loss.backward()
        between.clear()
    torch.manual_seed(3)
    (first,) = torch.autograd.grad((sampler(x) * weights).sum(), x)
    torch.manual_seed(3)
    (second,) = torch.autograd.grad((sampler(x) * weights).sum(), x)
    assert torch.equal(first, second)
