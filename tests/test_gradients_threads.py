# SPDX-License-Identifier: Apache-2.0
"""Differentiable calls at once, inside one another and on other threads leave each other alone."""

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.gradients import F64, net_of, plan_of
from torch import nn

import fastdiff as fd
from fastdiff.engine.call import Call
from fastdiff.engine.job import Job
from fastdiff.engine.leases import Leases
from fastdiff.engine.loops import Written
from fastdiff.gradients import Pools, differentiable
from fastdiff.gradients.pools import Recent
from fastdiff.guidance import UNGUIDED

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


# -- whose runs they are ---------------------------------------------------------------------------


class Counted(Leases):
    """Leases that count what is lent and what came back."""

    def __init__(self):
        super().__init__()
        self.lent = self.back = 0

    def lend(self, spec):
        self.lent += 1
        return super().lend(spec)

    def give_back(self, run):
        self.back += 1
        super().give_back(run)


@WAYS
def test_every_run_comes_back_but_one_in_which_something_was_raised(gradient):
    net, x = net_of(), torch.ones(3, 5, dtype=F64, requires_grad=True)
    calls, broken, plan = [], {}, plan_of("ddim", 4)

    def network(x, t):
        calls.append(1)
        what = broken.get(len(calls))
        if what == "error":
            raise KeyError("broken")
        if what == "write":
            x.detach().mul_(2.0)
        return net(x, t)

    def left():
        """Runs that one call and its backward pass leave lent."""
        calls.clear()
        pools, job = Pools(Counted(), Counted()), Job(network, plan, UNGUIDED)
        told = contextlib.nullcontext()
        if broken:
            told = pytest.raises(KeyError if "error" in broken.values() else Written)
        with told:
            out = differentiable(job, gradient, Call(x), pools, tuple(net.linear.parameters()))
            torch.autograd.grad(out.sum(), x)
        return sum(leases.lent - leases.back for leases in (pools.forward, pools.backward))

    assert left() == 0
    for call in range(1, len(calls) + 1):
        for broken[call] in ("error", "write"):
            assert left() >= 1, call
        broken.clear()
    assert left() == 0


def test_a_trace_holds_nothing_of_its_sampler():
    net, x = net_of(), torch.ones(3, 5, dtype=F64, requires_grad=True)
    sampler = fd.Sampler(net, plan_of(), gradient=fd.Discrete(checkpoint=2))
    (expected,) = torch.autograd.grad(sampler(x).sum(), x)
    loss = sampler(x).sum()
    gone = weakref.ref(sampler)
    sampler.set_plan(plan_of("ddim", 3))
    sampler.release()
    del sampler
    gc.collect()
    assert gone() is None
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_what_is_worked_out_from_a_plan_is_made_once_and_forgotten_in_order():
    recent, made = Recent(), []
    plans = [plan_of("ddim", 2) for _ in range(20)]

    def get(plan, key="adjoint"):
        return recent.get(plan, key, lambda: (made.append(plan), len(made))[1])

    assert get(plans[0]) == get(plans[0]) == 1
    assert get(plans[0], "table") == 2
    assert get(plans[1]) == 3  # equal, and another plan
    for plan in plans:
        get(plan)
    count = len(made)
    assert get(plans[-1]) == count
    get(plans[0])
    assert len(made) == count + 1
    recent.clear()
    get(plans[0])
    assert len(made) == count + 2
