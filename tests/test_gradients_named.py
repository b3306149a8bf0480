# SPDX-License-Identifier: Apache-2.0
"""What gets a gradient: x, the network's parameters, and tensors anywhere in the conditioning."""

from dataclasses import dataclass

import pytest
import torch
from support.gradients import F64, apart, gradients, net_of, plan_of
from support.nets import Net
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdiff as fd


@pytest.fixture
def net():
    return net_of()


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

    other = Checkpointed(idle=True).double()
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


# -- where a tensor may stand ----------------------------------------------------------------------


@dataclass
class Control:
    """A conditioning of a user's own."""

    shift: torch.Tensor
    strength: float = 0.5


@dataclass(frozen=True)
class Nested:
    """One inside another, frozen."""

    control: Control
    name: str = "nested"


class Opaque:
    """An object that is no container."""

    def __init__(self, shift):
        self.shift = shift


# Of each place: the conditioning made of one tensor, and what the network makes of it.
PLACES = {
    "a list": (lambda v: {"c": [v, 2.0]}, lambda c: c["c"][0] * c["c"][1]),
    "a tuple": (lambda v: {"c": (1.0, (v,))}, lambda c: c["c"][1][0]),
    "a dict in a list": (lambda v: {"c": [{"v": v}]}, lambda c: c["c"][0]["v"]),
    "a dataclass": (lambda v: {"c": Control(v)}, lambda c: c["c"].shift * c["c"].strength),
    "a frozen one": (
        lambda v: {"c": Nested(Control(v))},
        lambda c: c["c"].control.shift * c["c"].control.strength,
    ),
    "a third argument": (lambda v: [v], lambda c: c[0]),
}


def in_place(place, gradient, staged, guidance=None):
    """The gradients in x and in a tensor that stands at a place of the conditioning."""
    make, read = PLACES[place]
    plan, generator = plan_of(), torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=F64).requires_grad_()
    shape = (6, 1, 5) if staged else (1, 5)
    value = torch.randn(shape, generator=generator, dtype=F64).requires_grad_()
    cond = make(fd.PerStage(value) if staged else value)
    if isinstance(cond, dict):
        cond = {"y": torch.linspace(0.5, 1.5, 3, dtype=F64), **cond}

    def network(x, t, *whole, **cond):
        assert not isinstance(read(whole[0] if whole else cond), fd.PerStage)
        shift = read(whole[0] if whole else cond)
        return torch.tanh(x + shift) * (0.5 + cond["y"][:, None] if "y" in cond else 1.0)

    out = fd.sample(network, x, plan, cond=cond, gradient=gradient, guidance=guidance)
    return torch.autograd.grad(out.square().sum(), (x, value))


@pytest.mark.parametrize("staged", [False, True], ids=["constant", "a stage"])
@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_has_its_gradient_wherever_it_stands(place, staged):
    expected = in_place(place, "backprop", staged)
    assert bool((expected[1].abs() > 0).all())
    for gradient in (fd.Discrete(), fd.Discrete(checkpoint=2)):
        assert apart(in_place(place, gradient, staged), expected) < 1e-12


@pytest.mark.parametrize("staged", [False, True], ids=["constant", "a stage"])
@pytest.mark.parametrize("place", ["a list", "a dataclass"])
def test_guidance_hands_what_is_whole_to_both_branches(place, staged):
    guidance = fd.CFG(2.0, {"y": 0.25})
    expected = in_place(place, "backprop", staged, guidance)
    assert apart(in_place(place, "discrete", staged, guidance), expected) < 1e-12


def test_a_tensor_may_stand_whole_and_stage_by_stage():
    plan, x, results = plan_of(), torch.randn(3, 5, dtype=F64), []
    values = torch.randn(6, 3, dtype=F64)
    for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=2)):
        y = values.clone().requires_grad_()

        def network(x, t, y, all):
            return torch.tanh(x + y[:, None] + 0.5 * all[0].sum(0)[:, None])

        cond = {"y": fd.PerStage(y), "all": [y]}
        out = fd.sample(network, x, plan, cond=cond, gradient=gradient)
        results.append(torch.autograd.grad(out.square().sum(), y))
    assert apart(results[1], results[0]) < 1e-12
    assert apart(results[2], results[0]) < 1e-12


@pytest.mark.parametrize("gradient", ["discrete", fd.AdjointDEIS(2)])
def test_a_tensor_inside_another_object_is_refused(gradient):
    shift, calls = torch.ones(5, dtype=F64, requires_grad=True), []

    def network(x, t, c, y=None):
        calls.append(1)
        return torch.tanh(x + c[0].shift if t[0] < 0.5 else x)  # unseen at the first stage

    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    options = {"cond": {"c": (Opaque(shift),)}, "gradient": gradient}
    with pytest.raises(ValueError, match=r"requires grad inside cond\['c'\]\[0\]\. Move it out"):
        fd.sample(network, x, plan_of(), **options)
    options["cond"] = {"c": (Opaque(shift.detach()),), "y": torch.ones(3, 1, dtype=F64)}
    hidden = fd.CFG(2.0, {"c": (Opaque(shift),), "y": 0.0})
    with pytest.raises(ValueError, match=r"requires grad inside uncond\['c'\]\[0\]"):
        fd.sample(network, x, plan_of(), guidance=hidden, **options)
    assert calls == []
    fd.sample(network, x, plan_of(), **options).sum().backward()
    assert x.grad.isfinite().all()


def test_a_tensor_deep_inside_another_object_is_never_a_silent_zero(net):
    deep = torch.ones(5, dtype=F64, requires_grad=True)

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, c):
            return self.net(x + c.shift[0] if t[0] < 0.3 else x, t)

    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    out = fd.sample(Late(), x, plan_of(), cond={"c": Opaque([deep])}, gradient="discrete")
    with pytest.raises(ValueError, match=r"nobody named, of shape \(5,\)"):
        out.sum().backward()


def test_an_extra_register_has_its_gradient_in_its_own_shape(net):
    stages = tuple(fd.Stage(t=1.0 - i / 3, b=(0.4,), r=(0.3 * i, 0.2)) for i in range(3))
    plan, x, results = fd.Plan(stages, (1.0, 0.0)), torch.randn(3, 5, dtype=F64), []
    for gradient in ("backprop", "discrete"):
        own = [torch.linspace(-1, 1, n, dtype=F64, requires_grad=True) for n in (5, 1)]
        out = fd.sample(net, x, plan, extras=own, gradient=gradient)
        results.append(torch.autograd.grad(out.square().sum(), own))
    assert [g.shape for g in results[1]] == [(5,), (1,)]
    assert apart(results[1], results[0]) < 1e-12
