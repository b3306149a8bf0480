# SPDX-License-Identifier: Apache-2.0
"""Gradients of samples: exact where they say so, of the order they claim, and in flat memory."""

import gc
import itertools

import numpy as np
import pytest
import torch
from support.memory import Peak
from support.nets import Net
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdiff as fd
from fastdiff import backends

VP = fd.schedules.VPLinear()
F64 = torch.float64
BACKENDS = [name for name, state in fd.backends.status().items() if state == "available"]
FAST = [name for name in BACKENDS if name != "triton"]
EACH = pytest.mark.parametrize("backend", FAST)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(idle=True).double()


def plan_of(solver="dpmpp-2m", steps=6, **options):
    return fd.plan(VP, solver, steps, prediction="v", **{"t_max": 0.9, **options})


def gradients(net, plan, gradient, *, batch=3, n=5, dtype=F64, cond=True, **options):
    """The sample, then gradients of a fixed functional: x, y, parameters that have one."""
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(batch, n, generator=generator, dtype=F64) for _ in range(2))
    y = torch.randn(batch, generator=generator, dtype=F64)
    x, y = (v.to(dtype).requires_grad_() for v in (x, y))
    if isinstance(net, nn.Module):
        net.zero_grad()
    out = fd.sample(
        net, x, plan, cond={"y": y} if cond else None, gradient=gradient, seed=5, **options
    )
    (out * weights.to(dtype)).sum().backward()
    found = [out.detach(), x.grad, y.grad]
    if isinstance(net, nn.Module):
        found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [v for v in found if v is not None]


def apart(a, b):
    """The largest relative difference between two lists of tensors."""
    assert len(a) == len(b)
    return max(float((p - q).norm() / q.norm()) for p, q in zip(a, b, strict=True))


# -- the transposed table --------------------------------------------------------------------------


def random_plan(rng):
    """Stages with every kind of term, e carried on for a while, some without an evaluation."""
    stages, evaluations, has_e = [], 0, False
    count = int(rng.integers(1, 9))
    for i in range(count):
        evaluate = bool(rng.random() < 0.8) or i == 0
        b, g = (
            rng.normal(size=rng.integers(0, min(4, evaluations + evaluate) + 1)) * 0.5
            for _ in range(2)
        )
        if not evaluate:
            b[:1] = g[:1] = 0.0
        options = {"p": rng.normal(), "q": rng.normal(), "c_in": rng.normal(), "a_x": rng.normal()}
        options |= {"b": tuple(b), "r": (rng.normal(),), "model_time": 0.3}
        if has_e and rng.random() < 0.6:
            options["a_e"] = rng.normal()
        if i < count - 1 and rng.random() < 0.6:
            options |= {"d_x": rng.normal(), "g": tuple(g), "s": (rng.normal(),)}
            options |= {"c_e": 0.3, "noise": ((i + 1, 0.7), (i + 20, -0.4))}
            if has_e and rng.random() < 0.5:
                options["d_e"] = rng.normal()
        stages.append(fd.Stage(t=0.9 - 0.8 * i / count, evaluate=evaluate, **options))
        has_e = stages[-1].writes_e
        evaluations += evaluate
    return fd.Plan(tuple(stages), (0.9, 0.05))


@EACH
def test_every_plan_is_transposed_exactly(net, backend):
    rng = np.random.default_rng(0)
    x, extra, weights = (torch.randn(3, 5, dtype=F64) for _ in range(3))
    y = torch.randn(3, dtype=F64)
    for case in range(60):
        plan, results = random_plan(rng), []
        for gradient in ("backprop", fd.Discrete(), fd.Discrete(checkpoint=case % 3 + 1)):
            own = [v.clone().requires_grad_() for v in (x, y, extra)]
            options = {"cond": {"y": own[1]}, "extras": own[2:], "seed": 3, "backend": backend}
            out = fd.sample(net, own[0], plan, gradient=gradient, **options)
            wanted = (*own, net.linear.weight)
            found = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
            zeros = map(torch.zeros_like, wanted)
            results.append([z if g is None else g for g, z in zip(found, zeros, strict=True)])
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                size = 1e-12 * float(torch.cat([v.flatten() for v in results[0]]).norm())
                torch.testing.assert_close(a, b, rtol=1e-10, atol=size, msg=f"case {case}")


def test_a_backward_step_is_one_stage(net, monkeypatch):
    launches = []
    bind = backends.TorchBackend.bind

    def counted(self, *arguments, **options):
        stage = bind(self, *arguments, **options)
        run = stage.run
        stage.run = lambda *given: (launches.append(given[0]), run(*given))[1]
        return stage

    monkeypatch.setattr(backends.TorchBackend, "bind", counted)
    plan = plan_of("dpm-3", 4)
    gradients(net, plan, "discrete", backend="torch")
    forward = len(plan.stages)
    assert len(launches) == forward + 1 + forward  # and the first h_bar
    assert launches[forward:] == list(range(forward + 1))


def test_the_table_is_printed_and_says_its_registers():
    transposed = plan_of("deis-3").transpose()
    assert transposed.slots == 1
    assert transposed.pack(1).shape == (7, transposed.layout.width)
    assert "deis-3 transposed" in str(transposed)
    assert plan_of("ddim").transpose().slots == 0


def test_an_e_without_end_is_refused(net):
    middle = [
        fd.Stage(t=0.8, evaluate=False, a_x=0.9, a_e=0.1, d_x=0.1, d_e=1.1) for _ in range(80)
    ]
    first = fd.Stage(t=0.9, b=(0.1,), d_x=1.0, g=(0.2,))
    last = fd.Stage(t=0.1, q=1.0, b=(0.1,), a_e=0.2)
    plan = fd.Plan((first, *middle, last), (0.9, 0.05))
    with pytest.raises(NotImplementedError, match="at most 64 earlier cotangents"):
        gradients(net, plan, "discrete")


# -- the exact gradient ----------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("solver", fd.solvers.names())
def test_discrete_is_backpropagation(net, solver, backend):
    plan = plan_of(solver)
    expected = gradients(net, plan, "backprop")
    assert len(expected) == 5
    for gradient in ("discrete", fd.Discrete(checkpoint=1), fd.Discrete(checkpoint=4)):
        assert apart(gradients(net, plan, gradient, backend=backend), expected) < 1e-10


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without")
@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])
def test_discrete_runs_on_triton(net, solver):
    plan = plan_of(solver, 3)
    expected = gradients(net, plan, "backprop")
    assert apart(gradients(net, plan, "discrete", backend="triton"), expected) < 1e-10


@pytest.mark.parametrize("solver", ["ddpm", "deis-3", "dpmpp-3s"])
def test_gradcheck(net, solver):
    plan = plan_of(solver, 3)
    x = torch.randn(2, 5, dtype=F64, requires_grad=True)
    y = torch.randn(2, dtype=F64, requires_grad=True)

    def run(x, y, *weights):
        return fd.sample(net, x, plan, cond={"y": y}, gradient="discrete", seed=1)

    assert torch.autograd.gradcheck(run, (x, y, net.linear.weight, net.linear.bias))


def test_float32_agrees_to_rounding(net):
    plan = plan_of("deis-3", 8)
    expected = gradients(net, plan, "backprop")
    got = gradients(net.float(), plan, "discrete", dtype=torch.float32)
    assert got[1].dtype == torch.float32
    # eps times the stages and the terms of each
    assert apart([v.double() for v in got], expected) < 2**-23 * 8 * 10


@EACH
@pytest.mark.parametrize(
    "scale", [2.0, torch.tensor([1.0, 2.0, 3.0], dtype=F64), (1.0, 2.0, 3.0, 0.5, 1.0, 2.0)]
)
def test_guidance_reaches_both_branches(net, scale, backend):
    plan = plan_of()
    results = []
    for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=2)):
        none = torch.full((3,), 0.2, dtype=F64, requires_grad=True)
        guidance = fd.CFG(scale, uncond={"y": none})
        found = gradients(net, plan, gradient, guidance=guidance, backend=backend)
        results.append([*found, none.grad])
    assert apart(results[1], results[0]) < 1e-10
    assert apart(results[2], results[0]) < 1e-10


@EACH
@pytest.mark.parametrize("limits", [{"clip": 0.4}, {"threshold": (0.7, 0.2)}])
def test_limits_have_the_gradient_that_autograd_gives_them(net, limits, backend):
    plan = plan_of(**limits)
    expected = gradients(net, plan, "backprop")
    unlimited = gradients(net, plan_of(), "backprop")
    assert apart(expected, unlimited) > 0.01
    for gradient in ("discrete", fd.Discrete(checkpoint=2)):
        assert apart(gradients(net, plan, gradient, backend=backend), expected) < 1e-10


@EACH
@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_reversible_run_is_undone_without_stored_states(net, backend, scale):
    plan = fd.plan(VP, "rex-1", 6, prediction="v", t_max=0.9, t_min=0.05)
    guidance = None if scale is None else fd.CFG(scale, uncond={"y": 0.0})
    options = {"guidance": guidance, "backend": backend}
    expected = gradients(net, plan, "backprop", guidance=guidance)
    for gradient in (fd.Discrete(), fd.Discrete(undo=True), fd.Discrete(checkpoint=3)):
        assert apart(gradients(net, plan, gradient, **options), expected) < 1e-10, gradient


def test_the_round_trip_of_a_reversible_run_is_close():
    torch.manual_seed(0)
    net = Net(idle=True).double()
    for steps, bound in ((10, 1e-12), (100, 1e-11)):
        plan = fd.plan(VP, "rex-1", steps, prediction="v", t_max=0.9, t_min=0.05)
        exact = gradients(net, plan, "discrete")
        assert apart(gradients(net, plan, fd.Discrete(undo=True)), exact) < bound
    plan = fd.plan(VP, "rex-1", 20, prediction="v", t_max=0.9, t_min=0.05)
    exact = gradients(net, plan, "discrete")
    single = gradients(net.float(), plan, fd.Discrete(undo=True), dtype=torch.float32)
    assert apart([v.double() for v in single], exact) < 1e-3


def test_plans_that_cannot_be_undone_are_refused(net):
    with pytest.raises(ValueError, match=r"undo=True needs a plan.*rex-1"):
        gradients(net, plan_of("deis-3"), fd.Discrete(undo=True))


def test_straight_through_passes_a_threshold_by(net):
    plan = plan_of("ddim", 1, threshold=(0.5, 0.1))
    got = gradients(net, plan, fd.Discrete(threshold="straight-through"), cond=False)
    stage = plan.stages[0]
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    time = torch.full((3,), stage.model_time, dtype=F64)
    h = stage.p * x + stage.q * net(x, time)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(3, 5, generator=generator, dtype=F64) for _ in range(2)][1]
    (expected,) = torch.autograd.grad(stage.a_x * x + stage.b[0] * h, x, weights)
    assert apart([got[1]], [expected]) < 1e-12


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_have_float32_cotangents(dtype, backend):
    torch.manual_seed(0)
    net, plan = Net(idle=True), plan_of("deis-3")
    exact = gradients(net, plan, "discrete", dtype=torch.float32, backend=backend)
    got = gradients(net.to(dtype), plan, "discrete", dtype=torch.float32, backend=backend)
    assert [v.dtype for v in got] == [*[torch.float32] * 3, dtype, dtype]
    assert apart([v.float() for v in got], exact) < 0.05


def test_autocast_is_that_of_the_forward_run():
    torch.manual_seed(0)
    net, plan, seen = Net(idle=True), plan_of(), []

    def watched(x, t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return net(x, t)

    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fd.sample(watched, x, plan, gradient="discrete", params=net)
    out.sum().backward()
    assert all(seen)
    assert len(seen) == 2 * len(plan.stages)
    assert x.grad.dtype == net.linear.weight.grad.dtype == torch.float32


# -- parameters and conditioning -------------------------------------------------------------------


def test_only_what_requires_grad_is_computed(net):
    plan, x = plan_of(), torch.randn(3, 5, dtype=F64)
    out = fd.sample(net, x, plan, gradient="discrete")
    out.sum().backward()
    assert net.linear.weight.grad is not None
    assert net.idle.grad is None
    net.zero_grad(set_to_none=True)
    net.requires_grad_(False)
    x.requires_grad_()
    fd.sample(net, x, plan, gradient="discrete").sum().backward()
    assert x.grad is not None
    assert net.linear.weight.grad is None


def test_gradients_accumulate_and_hooks_fire_once(net):
    plan, x = plan_of(), torch.randn(3, 5, dtype=F64)
    fired = []
    net.linear.weight.register_post_accumulate_grad_hook(lambda p: fired.append(1))
    fd.sample(net, x, plan, gradient="discrete").sum().backward()
    once = net.linear.weight.grad.clone()
    fd.sample(net, x, plan, gradient="discrete").sum().backward()
    torch.testing.assert_close(net.linear.weight.grad, 2 * once)
    assert len(fired) == 2


def test_functional_parameters_are_named(net):
    plan, x = plan_of(), torch.randn(3, 5, dtype=F64)
    scale = torch.tensor(1.5, dtype=F64, requires_grad=True)
    weights = {name: scale * p.detach() for name, p in net.named_parameters()}

    def functional(x, t):
        return torch.func.functional_call(net, weights, (x, t))

    grads = []
    for gradient in ("backprop", "discrete"):
        out = fd.sample(functional, x, plan, gradient=gradient, params=weights.values())
        grads += torch.autograd.grad(out.sum(), scale, retain_graph=True)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=0)


def test_checkpointed_networks(net):
    plan = plan_of()
    expected = gradients(net, plan, "discrete")

    class Checkpointed(Net):
        def forward(self, x, t, y=None):
            return checkpoint(super().forward, x, t, y, use_reentrant=False)

    other = Checkpointed().double()
    other.load_state_dict(net.state_dict())
    assert apart(gradients(other, plan, "discrete"), expected) < 1e-12


def test_nested_conditioning_and_tensors_inside_tuples(net):
    def network(x, t, deep, pair):
        return torch.tanh(x * deep["a"]["b"][:, None] + pair[0]) * pair[1]

    plan, x = plan_of(), torch.randn(3, 5, dtype=F64)
    results = []
    for gradient in ("backprop", "discrete"):
        b = torch.linspace(0.5, 1.5, 3, dtype=F64, requires_grad=True)
        shift = torch.full((5,), 0.1, dtype=F64, requires_grad=True)
        cond = {"deep": {"a": {"b": b}}, "pair": (shift, 0.9)}
        out = fd.sample(network, x, plan, cond=cond, gradient=gradient)
        results.append(torch.autograd.grad(out.sum(), (b, shift)))
    assert apart(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("solver", ["deis-3", "dpm-2", "ddpm"])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_each_stage_of_a_changing_conditioning_has_its_gradient(net, solver, scale):
    plan = plan_of(solver)
    guidance = None if scale is None else fd.CFG(scale, uncond={"y": 0.0})
    results = []
    for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=2)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 5, generator=generator, dtype=F64)
        values = torch.randn(
            len(plan.stages), 3, generator=generator, dtype=F64, requires_grad=True
        )
        cond = {"y": fd.PerStage(values)}
        out = fd.sample(
            *(net, x, plan), cond=cond, gradient=gradient, guidance=guidance, seed=1
        )  # fmt: skip
        results.append(torch.autograd.grad(out.square().sum(), values)[0])
    assert bool((results[0].flatten(1).norm(dim=1) > 0).all())
    assert apart(results[1:2], results[:1]) < 1e-10
    assert apart(results[2:], results[:1]) < 1e-10


SHARED = {
    "twice": lambda y: ({"y": y, "z": y}, lambda c: c["y"] + 2 * c["z"]),
    "nested": lambda y: ({"y": y, "d": {"z": y}}, lambda c: c["y"] + 2 * c["d"]["z"]),
    "tuple": lambda y: ({"p": (y, y)}, lambda c: c["p"][0] + 2 * c["p"][1]),
    "a stage": lambda y: (
        {"y": fd.PerStage(y), "z": fd.PerStage(y)},
        lambda c: c["y"] + 2 * c["z"],
    ),
}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("gradient", [fd.Discrete(), fd.Discrete(checkpoint=2)])
def test_a_tensor_that_stands_twice_has_its_gradient_once(gradient, shared):
    plan = plan_of()
    x = torch.randn(3, 5, dtype=F64)
    shape = (6, 3) if shared == "a stage" else (3,)
    values, results = torch.randn(shape, dtype=F64), []
    for kind in ("backprop", gradient):
        y = values.clone().requires_grad_()
        cond, shift = SHARED[shared](y)

        def network(x, t, shift=shift, **cond):
            return torch.tanh(x + shift(cond)[:, None])

        out = fd.sample(network, x, plan, cond=cond, gradient=kind)
        results.append(torch.autograd.grad(out.square().sum(), y))
    assert apart(results[1], results[0]) < 1e-12


def test_a_parameter_may_be_conditioning_too(net):
    plan, x, results = plan_of(), torch.randn(3, 5, dtype=F64), []
    for gradient in ("backprop", "discrete"):
        p = torch.linspace(0.5, 1.5, 3, dtype=F64).requires_grad_()

        def network(x, t, y, p=p):
            return torch.tanh(x * p[:, None] + y[:, None])

        out = fd.sample(network, x, plan, cond={"y": p}, params=[p], gradient=gradient)
        results.append(torch.autograd.grad(out.sum(), p))
    assert apart(results[1], results[0]) < 1e-12


def test_hooks_see_the_gradient_of_the_run_once(net):
    plan, x, fired, results = plan_of(), torch.randn(3, 5, dtype=F64), [], []
    for gradient in ("backprop", "discrete"):
        net.zero_grad()
        handle = net.linear.weight.register_hook(lambda g: (fired.append(1), g.clamp(-0.1, 0.1))[1])
        fd.sample(net, x, plan, gradient=gradient).sum().backward()
        handle.remove()
        results.append([net.linear.weight.grad.clone()])
    assert len(fired) == 2
    assert apart(results[1], results[0]) < 1e-10


def test_networks_that_differentiate_an_energy():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 25, dtype=F64).reshape(5, 5))

        def forward(self, x, t):
            with torch.enable_grad():
                x = x if x.requires_grad else x.requires_grad_()
                energy = torch.tanh(x @ self.weight).square().sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0]

    plan, net, results = plan_of(), Energy(), []
    values = torch.randn(3, 5, dtype=F64)
    for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=2)):
        x = values.clone().requires_grad_()
        out = fd.sample(net, x, plan, gradient=gradient)
        results.append(torch.autograd.grad(out.square().sum(), (x, net.weight)))
    assert apart(results[1], results[0]) < 1e-10
    assert apart(results[2], results[0]) < 1e-10


def test_seeds_changed_after_the_run_do_not_matter(net):
    plan = plan_of("ddpm")
    seeds, grads = torch.arange(3), []
    for changed in (0, 100):
        x = torch.ones(3, 5, dtype=F64, requires_grad=True)
        own = seeds.clone()
        out = fd.sample(net, x, plan, seed=own, gradient=fd.Discrete(checkpoint=2))
        own += changed
        grads.append(torch.autograd.grad(out.square().sum(), x))
    assert apart(grads[1], grads[0]) == 0.0


def test_a_sampler_may_run_again_before_backward(net):
    plan, other = plan_of("ddpm"), plan_of("ddim", 6)
    for gradient in (fd.Discrete(), fd.Discrete(checkpoint=2)):
        sampler = fd.Sampler(net, plan, gradient=gradient)
        x = torch.randn(3, 5, dtype=F64, requires_grad=True)
        (alone,) = torch.autograd.grad(sampler(x, seed=1).sum(), x)
        out = sampler(x, seed=1)
        sampler.set_plan(other)
        sampler(torch.randn(3, 5, dtype=F64, requires_grad=True))
        sampler.set_plan(plan)
        (got,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(got, alone)


def test_without_grad_mode_a_run_is_not_tracked(net):
    plan, x = plan_of(), torch.randn(3, 5, dtype=F64, requires_grad=True)
    sampler = fd.Sampler(net, plan, gradient="discrete")
    with torch.no_grad():
        plain = sampler(x, out=torch.empty(3, 5, dtype=F64))
    assert not plain.requires_grad
    assert torch.equal(plain, sampler(x).detach())


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


# -- the continuous adjoint ------------------------------------------------------------------------


class Mixture(nn.Module):
    """epsilon of a Gaussian mixture whose means are parameters and stretch with z."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mu = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=F64))

    def forward(self, x, t, z):
        alpha, sigma = (torch.as_tensor(f(t.numpy()))[:, None] for f in (VP.alpha, VP.sigma))
        mu = self.mu * (1 + 0.3 * z)[:, None, None]
        variance = alpha**2 * 0.1 + sigma**2
        d = x[:, None] - alpha[..., None] * mu
        w = torch.softmax(-d.square().sum(-1) / (2 * variance), -1)
        return sigma * (w[..., None] * d).sum(1) / variance


ENDS = {"t_max": 0.95, "t_min": 0.02}


def flow_gradients(plan, gradient, network=None):
    """a_x, a_z, a_theta of a fixed functional of 16 samples."""
    network = network or Mixture()
    generator = torch.Generator().manual_seed(3)
    x, weights = (torch.randn(16, 2, generator=generator, dtype=F64) for _ in range(2))
    x.requires_grad_()
    z = torch.zeros(16, dtype=F64, requires_grad=True)
    out = fd.sample(network, x, plan, cond={"z": z}, gradient=gradient, seed=3)
    return torch.autograd.grad((out * weights).sum(), (x, z, network.mu))


@pytest.fixture(scope="module")
def fine():
    """The exact flow: a plan fine enough to be one, and its gradients."""
    plan = fd.plan(VP, "dpmpp-3m", 600, grid="logsnr", warmup="runge-kutta", **ENDS)
    return plan, flow_gradients(plan, fd.Discrete(checkpoint=25))


def orders(errors):
    return [np.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["epsilon", "x0"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_adjoint_is_of_its_order_in_x_conditioning_and_parameters(fine, order, form):
    plan, exact = fine
    found = [
        flow_gradients(plan, fd.AdjointDEIS(order, form, steps=m, grid="logsnr"))
        for m in (40, 80, 160)
    ]
    for k in range(3):  # a_x, a_z, a_theta
        errors = [float((g[k] - exact[k]).norm() / exact[k].norm()) for g in found]
        # the warm-up's step is of lower order, and its share not gone here
        assert orders(errors)[-1] > order - 0.45, (k, errors)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "form"), [(1, "epsilon"), (2, "epsilon"), (2, "x0")])
def test_the_published_forms_are_of_their_order(fine, order, form):
    plan, exact = fine
    found = [
        flow_gradients(plan, fd.AdjointDEIS(order, form, steps=m, grid="logsnr", published=True))
        for m in (60, 120, 240)
    ]
    for k in range(3):
        errors = [float((g[k] - exact[k]).norm() / exact[k].norm()) for g in found]
        assert orders(errors)[-1] > order - 0.25, (k, errors)


def test_ours_is_far_closer_than_the_published_at_few_steps(fine):
    plan, exact = fine

    def error(**options):
        (a_x, _, _) = flow_gradients(plan, fd.AdjointDEIS(steps=20, grid="logsnr", **options))
        return float(((a_x - exact[0]).norm(dim=1) / exact[0].norm(dim=1)).median())

    assert error(order=1, form="epsilon") < 0.5 * error(order=1, form="epsilon", published=True)
    for form in ("epsilon", "x0"):
        assert error(order=2, form=form) < 0.2 * error(order=2, form=form, published=True)


@pytest.mark.slow
def test_coarse_states_bound_the_order(fine):
    _, exact = fine
    errors = []
    for steps in (20, 40, 80):
        plan = fd.plan(VP, "ddim", steps, grid="logsnr", **ENDS)
        (a_x, _, _) = flow_gradients(plan, fd.AdjointDEIS(3))
        errors.append(float((a_x - exact[0]).norm() / exact[0].norm()))
    assert abs(orders(errors)[-1] - 1.0) < 0.25


@pytest.mark.parametrize("states", ["recorded", "resolve"])
def test_states_recorded_or_resolved_serve_a_grid_of_the_adjoints_own(fine, states):
    _, exact = fine
    plan = fd.plan(VP, "dpmpp-3m", 40, grid="uniform", **ENDS)
    for options in ({}, {"steps": 60}, {"steps": 50, "grid": "karras"}):
        (a_x, _, _) = flow_gradients(plan, fd.AdjointDEIS(3, states=states, **options))
        error = (a_x - exact[0]).norm(dim=1) / exact[0].norm(dim=1)
        assert float(error.median()) < 0.02, options


def test_on_its_own_rows_the_adjoint_is_the_discrete_gradient():
    for order, form, name in ((3, "epsilon", "deis-logrho-3"), (2, "epsilon", "deis-logrho-2")):
        plan = fd.plan(VP, name, 12, grid="logsnr", **ENDS)
        expected = flow_gradients(plan, "discrete")
        assert apart(flow_gradients(plan, fd.AdjointDEIS(order, form)), expected) < 1e-12


def test_a_changing_conditioning_sums_to_a_constant_ones_gradient(fine):
    plan, _ = fine
    coarse = fd.plan(VP, "dpmpp-3m", 40, grid="logsnr", **ENDS)
    network = Mixture()
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    psi = torch.linspace(0.5, 1.5, 41, dtype=F64)[:-1, None]  # of time, smooth
    z = torch.zeros(40, 16, dtype=F64, requires_grad=True)
    out = fd.sample(
        *(network, x, coarse), cond={"z": fd.PerStage(z)}, gradient=fd.AdjointDEIS(2)
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.sum(), z)
    constant = torch.zeros(16, dtype=F64, requires_grad=True)
    out = fd.sample(network, x, plan, cond={"z": constant}, gradient="discrete")
    (expected,) = torch.autograd.grad(out.sum(), constant)
    assert apart([got.sum(0)], [expected]) < 0.03
    # against a function of time: the gradient along z(t) = r psi(t)
    stages = len(plan.stages)
    wide = torch.linspace(0.5, 1.5, stages + 1, dtype=F64)[:-1, None]
    r = torch.zeros(16, dtype=F64, requires_grad=True)
    cond = {"z": fd.PerStage(wide * r)}
    (expected,) = torch.autograd.grad(
        fd.sample(network, x, plan, cond=cond, gradient="discrete").sum(), r
    )
    assert apart([(psi * got).sum(0)], [expected]) < 0.03
    with pytest.raises(NotImplementedError, match="the plan's own times"):
        fd.sample(
            *(network, x, coarse), cond={"z": fd.PerStage(z)}, gradient=fd.AdjointDEIS(2, steps=20)
        )  # fmt: skip


def test_along_drawn_noise_the_network_counts_twice():
    plan = fd.plan(VP, "ddim", 12, eta=1.0, grid="logsnr", **ENDS)
    expected = flow_gradients(plan, "discrete")
    assert apart(flow_gradients(plan, fd.AdjointDEIS(1)), expected) < 1e-12
    fine = fd.plan(VP, "ddim", 480, eta=1.0, grid="logsnr", **ENDS)
    discrete = flow_gradients(fine, "discrete")
    second = flow_gradients(fine, fd.AdjointDEIS(2))
    published = flow_gradients(fine, fd.AdjointDEIS(1, published=True))
    assert 1e-6 < apart(second, discrete) < 0.1
    assert 1e-6 < apart(published, discrete) < 0.2


def test_ends_without_a_finite_lambda_have_a_gradient():
    flow = fd.schedules.FlowMatching()

    class Velocity(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, x, t, z):
            return x - torch.tanh(x + self.mu) * (1 + z[:, None])

    plan = fd.plan(flow, "euler", 12, prediction="velocity", t_max=1.0, t_min=0.0)
    network = Velocity()
    discrete = flow_gradients(plan, "discrete", network)
    adjoint = flow_gradients(plan, fd.AdjointDEIS(2), network)
    assert apart(adjoint, discrete) < 0.3
    for options in ({"published": True}, {"states": "resolve"}):
        with pytest.raises(ValueError, match="needs alpha > 0 at the start"):
            flow_gradients(plan, fd.AdjointDEIS(2, **options), network)


@pytest.mark.parametrize(
    ("plan", "gradient", "error", "says"),
    [
        (plan_of(clip=1.0), fd.AdjointDEIS(), ValueError, "no clip and no threshold"),
        (plan_of(threshold=0.9), fd.AdjointDEIS(), ValueError, "no clip and no threshold"),
        (
            fd.Plan.from_json(plan_of().to_json()),
            fd.AdjointDEIS(),
            ValueError,
            r"AdjointDEIS\(schedule=",
        ),
        (plan_of("ddpm"), fd.AdjointDEIS(states="resolve"), NotImplementedError, "recorded states"),
        (plan_of("ddpm"), fd.AdjointDEIS(form="epsilon"), NotImplementedError, "x0 form"),
        (plan_of("ddpm"), fd.AdjointDEIS(steps=20), NotImplementedError, "cannot be interpolated"),
        (plan_of("ddim", eta=0.5), fd.AdjointDEIS(), NotImplementedError, "tau = 1"),
        (plan_of(), fd.AdjointDEIS(grid="karas"), ValueError, "karras"),
    ],
)
def test_flows_without_such_an_adjoint_are_refused_before_they_run(plan, gradient, error, says):
    calls = []
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(error, match=says):
        fd.sample(lambda x, t: calls.append(1) or x, x, plan, gradient=gradient, seed=0)
    assert calls == []


def test_a_schedule_may_be_given_for_a_loaded_plan():
    plan = fd.plan(VP, "dpmpp-2m", 10, **ENDS)
    loaded = fd.Plan.from_json(plan.to_json())
    expected = flow_gradients(plan, fd.AdjointDEIS(2))
    assert apart(flow_gradients(loaded, fd.AdjointDEIS(2, schedule=VP)), expected) == 0.0


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
