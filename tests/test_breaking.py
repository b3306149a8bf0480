# SPDX-License-Identifier: Apache-2.0
"""What would go wrong without a word: each is right, or refused with a sentence."""

import gc
import threading
import weakref

import pytest
import torch
from support.core import FAST, needs_core
from support.differential import check_gradient
from support.nets import Net
from support.refusals import alone, refused, right_or_refused

import fastdiff as fd

VP = fd.schedules.VPLinear()
F64 = torch.float64
EACH = pytest.mark.parametrize("backend", FAST)


def network(x, t):
    return torch.tanh(x) * (1 + 0.1 * t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))


def plan_of(solver="deis-3", steps=5, **options):
    return fd.plan(VP, solver, steps, prediction="v", **{"t_max": 0.9, **options})


def by_hand(*stages):
    return fd.Plan(stages, (1.0, 0.0))


# -- D1: coefficients of zero ----------------------------------------------------------------------


@EACH
def test_an_input_weighed_by_zero_is_zeros(backend):
    plan = by_hand(fd.Stage(t=1.0, c_in=2.0, b=(1.0,)), fd.Stage(t=0.5, c_in=0.0, b=(1.0,)))
    seen = []

    def net(x, t):
        seen.append(x.clone())
        return x

    fd.sample(net, torch.tensor([[3.0, 3.0]]), plan, backend=backend)
    assert seen[0].tolist() == [[6.0, 6.0]]
    assert seen[1].tolist() == [[0.0, 0.0]]


@EACH
@pytest.mark.parametrize(
    "first",
    [
        fd.Stage(t=1.0, p=1.0, q=0.0, b=(0.5,)),  # an output of no weight
        fd.Stage(t=1.0, p=1.0, q=1.0, b=(0.0,)),  # an h of no weight
    ],
)
def test_an_output_that_nothing_weighs_gets_a_cotangent_of_zero(first, backend):
    torch.manual_seed(0)
    plan, net, found = by_hand(first, fd.Stage(t=0.5, b=(0.5,))), Net().double(), []
    x = torch.randn(3, 5, dtype=F64)
    for gradient in ("discrete", "backprop"):
        net.zero_grad()
        on = {} if gradient == "backprop" else {"backend": backend}
        fd.sample(net, x, plan, gradient=gradient, **on).sum().backward()
        found.append(net.linear.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])


# -- D2: what a network or a callback does to its arguments ----------------------------------------


@pytest.mark.parametrize("gradient", [None, "discrete"])
def test_a_network_that_changes_the_time_in_place_is_refused(gradient):
    def scaling(x, t):
        t *= 1000
        return torch.tanh(x)

    sampler = fd.Sampler(scaling, plan_of(), gradient=gradient)
    x = torch.randn(2, 3, requires_grad=gradient is not None)
    for _ in range(2):
        with refused("in place"):
            sampler(x)


@pytest.mark.parametrize("gradient", [None, "discrete"])
@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])  # the point is x, and e
def test_a_network_that_changes_its_input_in_place_is_refused(solver, gradient):
    def careless(x, t):
        with torch.no_grad():
            return x.mul_(0.5)

    x = torch.randn(2, 3, requires_grad=gradient is not None)
    kept = x.detach().clone()
    with refused("in place"):
        fd.sample(careless, x, plan_of(solver), gradient=gradient)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])
def test_a_callback_that_changes_the_point_in_place_is_refused(solver):
    def meddle(stage, t, x, x0):
        x.add_(1.0)

    with refused("in place"):
        fd.sample(network, torch.randn(2, 3), plan_of(solver), callback=meddle)


def test_a_sampler_is_right_after_it_refused_a_network():
    careless = True

    def net(x, t):
        if careless:
            t.add_(1.0)
            x.add_(1.0)
        return network(x, t)

    sampler, x = fd.Sampler(net, plan_of()), torch.randn(2, 3)
    with refused("in place"):
        sampler(x)
    careless = False
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of()))


def test_fresh_inputs_are_a_networks_own_to_keep():
    kept = []

    def caching(x, t):
        kept.append((x, x.clone()))
        return network(x, t)

    x = torch.randn(2, 3)
    got = fd.Sampler(caching, plan_of(), fresh_inputs=True)(x)
    assert all(torch.equal(a, b) for a, b in kept)
    assert torch.equal(got, fd.sample(network, x, plan_of()))


# -- D3, D4: outputs in strange memory -------------------------------------------------------------

SQUARE = plan_of("ddim", 3)
VIEWS = {
    "its first sample for all": lambda x: x[:1].expand_as(x),
    "its last sample for all": lambda x: x[-1:].expand_as(x),
    "one element for all": lambda x: x[:1, :1].expand_as(x),
    "its transpose": lambda x: x.t(),
    "itself": lambda x: x,
    "overlapping windows of it": lambda x: x.as_strided((4, 4), (1, 1)),
}


@needs_core
@pytest.mark.parametrize("view", VIEWS)
def test_an_output_that_is_a_view_of_the_input_is_right(view):
    x = torch.randn(4, 4)
    wanted = fd.sample(lambda x, t: VIEWS[view](x).clone(), x, SQUARE, backend="torch")
    right_or_refused(
        lambda: fd.sample(lambda x, t: VIEWS[view](x), x, SQUARE, backend="cpu"), wanted, "overlap"
    )


@EACH
def test_an_output_with_the_negative_bit_is_negative(backend):
    def net(x, t):
        out = torch.complex(x, x).conj().imag
        assert out.is_neg()
        return out

    x = torch.randn(3, 4)
    wanted = fd.sample(lambda x, t: -x.clone(), x, SQUARE, backend=backend)
    right_or_refused(lambda: fd.sample(net, x, SQUARE, backend=backend), wanted, "negative")


# -- D5: threads and re-entrance -------------------------------------------------------------------


def in_threads(count, work):
    """The results of `work(i)` in threads of their own, started together."""
    results, barrier = [None] * count, threading.Barrier(count)

    def run(i):
        barrier.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def slow(x, t):
    """Lets other threads in between the parts of a stage."""
    threading.Event().wait(0.0002)
    return network(x, t)


@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])
def test_eight_threads_share_a_sampler(solver):
    sampler, plan = fd.Sampler(slow, plan_of(solver)), plan_of(solver)
    xs = [torch.randn(2, 7) for _ in range(8)]
    wanted = [fd.sample(network, x, plan) for x in xs]
    for i, rounds in enumerate(in_threads(8, lambda i: [sampler(xs[i]) for _ in range(5)])):
        for got in rounds:
            assert torch.equal(got, wanted[i])


@pytest.mark.parametrize("gradient", ["discrete", fd.Discrete(checkpoint=2)])
def test_eight_threads_share_a_samplers_gradient(gradient):
    plan, weight = plan_of(), torch.ones(7, dtype=F64)
    sampler = fd.Sampler(slow, plan, gradient=gradient)

    def work(i):
        found = []
        for k in range(3):
            x = (weight * (i + k)).expand(2, 7).clone().requires_grad_()
            sampler(x).pow(2).sum().backward()
            found.append(x.grad)
        return found

    wanted = [work(i) for i in range(8)]
    for got, one in zip(in_threads(8, work), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, one, strict=True))


def test_a_sampler_may_be_called_from_its_own_callback():
    sampler, x, inner = fd.Sampler(network, plan_of()), torch.randn(2, 3), torch.randn(2, 3)
    wanted, also, seen = sampler(x), sampler(inner), []
    got = sampler(x, callback=lambda *_: seen.append(sampler(inner)))
    assert torch.equal(got, wanted)
    assert all(torch.equal(s, also) for s in seen)


def test_a_sampler_may_be_called_from_its_own_network():
    depth, inner = 0, torch.randn(2, 3)

    def net(x, t):
        nonlocal depth
        if depth == 0:
            depth += 1
            nested.append(sampler(inner))
            depth -= 1
        return network(x, t)

    nested = []
    sampler, x = fd.Sampler(net, plan_of()), torch.randn(2, 3)
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of()))
    assert all(torch.equal(n, fd.sample(network, inner, plan_of())) for n in nested)


def test_a_forward_between_a_forward_and_its_backward_changes_nothing():
    sampler = fd.Sampler(network, plan_of(), gradient="discrete")
    x, other = (torch.randn(2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    sampler(x).sum().backward()
    wanted, x.grad = x.grad, None
    first = sampler(x).sum()
    second = sampler(other).sum()
    first.backward()
    second.backward()
    assert torch.equal(x.grad, wanted)


# -- D6, D7: gradients that would be another thing's -----------------------------------------------


def test_the_adjoint_refuses_a_schedule_that_is_not_the_plans():
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    for other in (fd.schedules.FlowMatching(), fd.schedules.VPLinear(beta_max=10.0)):
        with refused("schedule"):
            fd.sample(network, x, plan_of(), gradient=fd.AdjointDEIS(schedule=other))
    fd.sample(network, x, plan_of(), gradient=fd.AdjointDEIS(schedule=fd.schedules.VPLinear()))


JIT = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # its import's


@JIT
@pytest.mark.parametrize("gradient", [None, "discrete"])
def test_forward_mode_is_refused(gradient):
    x, plan = torch.randn(2, 3), plan_of()
    with torch.autograd.forward_ad.dual_level(), refused("forward|jvp|require"):
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        fd.sample(network, dual, plan, gradient=gradient)
    with refused("forward|jvp|require"):
        torch.func.jvp(
            lambda x: fd.sample(network, x, plan, gradient=gradient), (x,), (torch.ones_like(x),)
        )


@JIT
def test_forward_mode_through_the_conditioning_is_refused():
    def net(x, t, y):
        return network(x, t) + y

    x, plan = torch.randn(2, 3), plan_of()
    with torch.autograd.forward_ad.dual_level(), refused("forward|jvp"):
        y = torch.autograd.forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3))
        fd.sample(net, x, plan, cond={"y": y})


@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_a_trace_is_refused():
    with refused("trac"):
        torch.jit.trace(lambda x: fd.sample(network, x, plan_of()), torch.randn(2, 3))


# -- D12: memory that goes away --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["x.set_(torch.zeros(1))", "x.resize_(1 << 22)", "x.data = torch.zeros(7)"]
)
def test_a_network_that_takes_its_inputs_memory_away_is_refused(change):
    printed = alone(f"""
import torch, fastdiff as fd
plan = fd.plan(fd.schedules.VPLinear(), "deis-3", 5, prediction="v", t_max=0.9)
meddling = True
def net(x, t):
    out = torch.tanh(x)
    if meddling:
        {change}
    return out
x = torch.randn(2, 3)
sampler = fd.Sampler(net, plan)
try:
    sampler(x)
except (ValueError, TypeError, RuntimeError) as error:
    print("refused:", error)
meddling = False
same = torch.equal(sampler(x), fd.sample(lambda x, t: torch.tanh(x), x, plan))
print("right after" if same else "wrong after")
""")
    assert "refused: " in printed
    assert "right after" in printed


# -- D13: plans that evaluate nothing --------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["discrete", fd.Discrete(checkpoint=1), "backprop"])
def test_a_plan_without_evaluations_has_a_gradient(gradient):
    rows = [fd.Stage(t=t, evaluate=False, a_x=a) for t, a in ((1.0, 0.5), (0.5, 3.0))]
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    fd.sample(network, x, by_hand(*rows), gradient=gradient).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1.5))


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
def test_a_result_of_zero_has_a_gradient_of_zero(gradient):
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    plan = by_hand(fd.Stage(t=1.0, b=(0.5,)), fd.Stage(t=0.5, a_x=0.0, b=(0.0,)))
    out = fd.sample(network, x, plan, gradient=gradient)
    assert torch.equal(out.detach(), torch.zeros(2, 3, dtype=F64))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_backprop_of_random_plans_is_the_interpreters(many):
    for seed in range(100 * many):
        check_gradient(seed, "backprop", None)


# -- D15, D17 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["terms", "extras"])
def test_what_no_compiled_backend_holds_runs_on_torch(kind):
    x = torch.randn(2, 3, dtype=F64)
    if kind == "terms":
        rows = [fd.Stage(t=1 - i / 100, a_x=1.0) for i in range(70)]
        plan, extras = by_hand(*rows, fd.Stage(t=0.1, b=(0.01,) * 71)), []
    else:
        plan, extras = by_hand(fd.Stage(t=1.0, b=(1.0,), r=(0.1,) * 20)), [x] * 20
    wanted = fd.sample(network, x, plan, extras=extras, backend="torch")
    torch.testing.assert_close(fd.sample(network, x, plan, extras=extras), wanted)


def test_a_plan_that_was_transposed_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        plan = plan_of()
        plan.transpose()
        gone = weakref.ref(plan)
        del plan
        assert gone() is None
    finally:
        gc.enable()
