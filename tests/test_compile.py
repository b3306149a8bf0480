# SPDX-License-Identifier: Apache-2.0
"""A compiled function that contains a sampling run: one graph, any batch, the same samples."""

import importlib
import pickle

import pytest
import torch
from support.nets import Net
from torch._dynamo.testing import CompileCounter

import fastdiff as fd

VP = fd.schedules.VPLinear()


@pytest.fixture
def net():
    torch._dynamo.reset()
    return Net(8)


def plan_of(solver="deis-3", steps=4, **options):
    return fd.plan(VP, solver, steps, prediction="v", **{"t_max": 0.9, **options})


def compiled(function, **options):
    """Compiled without a graph break, or an error."""
    return torch.compile(function, fullgraph=True, **{"backend": "eager", **options})


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_run_inside_a_compiled_function_is_the_eager_run(dtype, net):
    """Of one solver in each dtype; test_registry.py has every solver in one."""
    plan, net = plan_of(), net.to(dtype)
    function = compiled(lambda x: 2 * fd.sample(net, x, plan, seed=3))
    x = torch.randn(3, 8, dtype=dtype)
    got = function(x)
    assert got.dtype == dtype
    close(got, 2 * fd.sample(net, x, plan, seed=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # its import's
def test_the_default_compiler_gives_the_same(net):
    plan = plan_of("ddpm", 2)
    function = compiled(lambda x: fd.sample(net, x, plan, seed=3), backend="inductor", dynamic=True)
    for batch in (3, 5):
        x = torch.randn(batch, 8)
        close(function(x), fd.sample(net, x, plan, seed=3))


def test_one_graph_serves_every_batch_and_seed(net):
    plan, counter = plan_of("ddpm"), CompileCounter()
    function = compiled(
        lambda x, seeds: fd.sample(net, x, plan, seed=seeds), backend=counter, dynamic=True
    )
    for batch in (3, 5, 17):
        x, seeds = torch.randn(batch, 8), torch.arange(batch) * 7
        close(function(x, seeds), fd.sample(net, x, plan, seed=seeds))
    assert counter.frame_count == 1


def test_integer_seeds_may_change(net):
    plan = plan_of("ddpm")
    function = compiled(lambda x, seed: fd.sample(net, x, plan, seed=seed))
    x = torch.randn(3, 8)
    for seed in (0, 1, 12345, 2**40):
        close(function(x, seed), fd.sample(net, x, plan, seed=seed))
    close(
        compiled(lambda x: fd.sample(net, x, plan, seed=[5, 1, 2]))(x),
        fd.sample(net, x, plan, seed=[5, 1, 2]),
    )


def test_another_plan_is_never_taken_for_the_first(net):
    plans = [plan_of(), plan_of(t_max=0.5), plan_of("ddim", 7), plan_of(t_max=0.5)]
    function = compiled(lambda x, plan: fd.sample(net, x, plan))
    x = torch.randn(3, 8)
    for plan in (*plans, *plans):
        close(function(x, plan), fd.sample(net, x, plan))


def test_handles_are_a_plans_own():
    plan = plan_of()
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.handle != plan.handle
    assert fd.Plan.from_json(plan.to_json()).handle not in (plan.handle, again.handle)


@pytest.mark.parametrize("scale", [2.0, (1.0, 2.0, 3.0, 4.0), torch.tensor([1.0, 2.0, 3.0])])
def test_guidance_and_a_samplers_own_arguments(scale, net):
    guidance = fd.CFG(scale, uncond={"y": 0.0})
    sampler = fd.Sampler(net, plan_of(), guidance=guidance)
    function = compiled(lambda x, y: sampler(x, {"y": y}))
    x, y = torch.randn(3, 8), torch.randn(3)
    close(function(x, y), sampler(x, {"y": y}))


@pytest.mark.parametrize(
    ("cond", "take"),
    [
        ({"c": [torch.ones(3)]}, lambda c: c[0]),
        ({"c": {"y": torch.ones(3)}}, lambda c: c["y"]),
        ({"c": [fd.PerStage(torch.arange(12.0).reshape(4, 3))]}, lambda c: c[0]),
        ({"c": {"y": fd.PerStage(torch.arange(12.0).reshape(4, 3))}}, lambda c: c["y"]),
    ],
)
def test_nested_conditioning_means_the_same(cond, take, net):
    def taking(x, t, c):
        return net(x, t, take(c))

    plan, x = plan_of(), torch.randn(3, 8)
    close(
        compiled(lambda x: fd.sample(taking, x, plan, cond=cond))(x),
        fd.sample(taking, x, plan, cond=cond),
    )


def test_clips_thresholds_noise_and_out(net):
    x, xi = torch.randn(3, 8), torch.randn(4, 3, 8)
    limited = compiled(lambda x, plan: fd.sample(net, x, plan))
    for options in ({"clip": (-0.5, 0.5)}, {"threshold": (0.9, 0.2)}):
        plan = plan_of("dpmpp-2m", **options)
        close(limited(x, plan), fd.sample(net, x, plan))
    plan = plan_of("ddpm")
    expected = fd.sample(net, x, plan, xi=xi)
    close(compiled(lambda x, xi: fd.sample(net, x, plan, xi=xi))(x, xi), expected)
    out = torch.empty_like(x)
    result = compiled(lambda x, xi, out: fd.sample(net, x, plan, xi=xi, out=out))(x, xi, out)
    assert result is out
    close(out, expected)


def test_extra_registers_and_stages_without_evaluation(net):
    rows = [
        fd.Stage(t=0.9, p=0.1, q=1.0, a_x=0.5, b=(0.5,), r=(0.25,)),
        fd.Stage(t=0.5, evaluate=False, a_x=0.7, b=(0.0, 0.2), c=0.3, noise=((1, 1.0), (2, 0.5))),
        fd.Stage(t=0.4, p=0.1, q=1.0, a_x=0.5, b=(0.5, 0.1)),
    ]
    plan, x, extra = fd.Plan(rows, (0.9, 0.1)), torch.randn(3, 8), torch.randn(8)
    function = compiled(lambda x, extra: fd.sample(net, x, plan, seed=1, extras=(extra,)))
    close(function(x, extra), fd.sample(net, x, plan, seed=1, extras=(extra,)))


def test_what_surrounds_a_run_keeps_its_gradient(net):
    plan, scale = plan_of(), torch.tensor(2.0, requires_grad=True)
    x = torch.randn(3, 8)
    function = compiled(lambda x, scale: (scale * fd.sample(net, x, plan)).sum())
    function(x, scale).backward()
    close(scale.grad, fd.sample(net, x, plan).sum())
    assert net.linear.weight.grad is None


def test_a_compiled_run_is_differentiated_by_the_compiler_or_refused(net):
    plan = plan_of()
    x = torch.randn(3, 8, requires_grad=True)
    function = compiled(lambda x: fd.sample(net, x, plan, gradient="backprop").square().sum())
    wanted = (x, net.linear.weight)
    got = torch.autograd.grad(function(x), wanted)
    outside = fd.sample(net, x, plan, gradient="discrete").square().sum()
    for a, b in zip(got, torch.autograd.grad(outside, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    sampler = fd.Sampler(net, plan, gradient="discrete")
    for refused in (lambda x: fd.sample(net, x, plan, gradient="discrete"), lambda x: sampler(x)):
        with pytest.raises(Exception, match='another gradient than "backprop"'):
            compiled(refused)(x.detach())


def test_noise_is_an_operator_with_a_fake_implementation():
    importlib.import_module("fastdiff.engine.traced")
    arguments = (torch.arange(3), 1, (3, 5), torch.float32)
    torch.library.opcheck(torch.ops.fastdiff.normal.default, arguments)
    expected = fd.noise.normal((3, 5), torch.arange(3), 1)
    assert torch.equal(torch.ops.fastdiff.normal(*arguments), expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"callback": print}, "cannot be looked into"),
        ({"progress": True}, "cannot be looked into"),
        ({"check": True}, "cannot be looked into"),
        ({"seed": None}, "draws noise"),
        ({"seed": torch.arange(4)}, "a tensor of seeds is int64"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options, says, net):
    plan, x = plan_of("ddpm"), torch.randn(3, 8)
    with pytest.raises(Exception, match=says):
        compiled(lambda x: fd.sample(net, x, plan, **{"seed": 1, **options}))(x)


@pytest.mark.gpu
def test_gpu_a_compiled_run_is_the_eager_run(net):
    net = net.cuda()
    plan, x = plan_of("ddpm", 2), torch.randn(3, 8).cuda()
    function = compiled(lambda x: fd.sample(net, x, plan, seed=3), backend="inductor")
    torch.testing.assert_close(
        function(x), fd.sample(net, x, plan, seed=3, graph=None), rtol=1e-4, atol=1e-4
    )
