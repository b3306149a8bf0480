# SPDX-License-Identifier: Apache-2.0
"""What a call leaves behind: nothing that the next call, or the rest of this one, could see."""

from dataclasses import replace

import pytest
import torch
from support.core import FAST

import fastdiff as fd
from fastdiff.guidance import Guidance

VP = fd.schedules.VPLinear()
PLAN = fd.plan(VP, "deis-2", 4)
EACH = pytest.mark.parametrize("backend", FAST)


def states():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@EACH
def test_a_network_that_writes_the_time_and_then_raises_spoils_no_later_call(backend):
    broken = True

    def network(x, t):
        if broken:
            t.mul_(1000.0)
            raise KeyError("broken")
        return x * torch.sin(t)[:, None]

    sampler = fd.Sampler(network, PLAN, backend=backend)
    with pytest.raises(KeyError, match="broken"):
        sampler(states())
    broken = False
    assert torch.equal(sampler(states()), fd.sample(network, states(), PLAN, backend=backend))


def test_a_scale_a_sample_is_the_guidances_own():
    scale, cond = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), {"y": torch.ones(3)}
    guidance = fd.CFG(scale, uncond={"y": 0.0})
    sampler = fd.Sampler(lambda x, t, y: x * y[:, None], PLAN, guidance=guidance)
    expected = sampler(states(), cond)
    scale.mul_(3.0)
    assert torch.equal(guidance.scale, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    fresh = fd.sample(sampler.network, states(), PLAN, cond=cond, guidance=guidance)
    assert torch.equal(fresh, expected)
    assert torch.equal(sampler(states(), cond), expected)


def energy(which, differentiate):
    """A network that differentiates by x or t, by `differentiate(energy, of)`."""

    def network(x, t):
        with torch.enable_grad():
            of = (x if which == "x" else t).requires_grad_()
            gradient = differentiate(torch.sin(of).sum(), of)
        return gradient.detach().clone() if which == "x" else x.detach() * gradient[:, None]

    return network


def by_backward(value, of):
    value.backward()
    return of.grad


def by_grad(value, of):
    return torch.autograd.grad(value, of)[0]


@EACH
@pytest.mark.parametrize("which", ["x", "t"])
def test_a_gradient_that_would_be_added_to_is_refused(which, backend):
    def truth(x, t):
        return torch.cos(x) if which == "x" else x * torch.cos(t)[:, None]

    expected = fd.sample(truth, states(), PLAN, backend=backend)
    sampler = fd.Sampler(energy(which, by_backward), PLAN, backend=backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"left a gradient in its input.*autograd\.grad"):
            sampler(states())
    own = fd.Sampler(sampler.network, PLAN, backend=backend, fresh_inputs=True)
    legal = fd.Sampler(energy(which, by_grad), PLAN, backend=backend)
    for each in (own, legal, own, legal):
        assert torch.equal(each(states()), expected)


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
def test_a_gradient_left_in_the_time_is_not_added_to(gradient):
    weight = torch.ones(8, requires_grad=True)
    legal = energy("t", by_grad)
    options = {"gradient": gradient, "params": [weight]}
    expected = fd.sample(lambda x, t: weight * legal(x, t), states(), PLAN, **options)
    left = energy("t", by_backward)
    sampler = fd.Sampler(lambda x, t: weight * left(x, t), PLAN, **options)
    if gradient == "discrete":
        with pytest.raises(ValueError, match="left a gradient in its input"):
            sampler(states())
        return
    assert torch.allclose(sampler(states()), expected, rtol=1e-6)


def test_backprop_gives_a_network_that_writes_memory_of_its_own():
    x, weight = states(), torch.ones(8, requires_grad=True)

    def writes(x, t):
        return x.mul_(0.5) * weight

    options = {"gradient": "backprop", "params": [weight]}
    got = fd.sample(writes, x, PLAN, **options)
    assert torch.equal(x, states())
    assert torch.equal(got, fd.sample(lambda x, t: x * 0.5 * weight, x, PLAN, **options))


@pytest.mark.parametrize("xi", [torch.zeros(4, 1), torch.zeros(9, 3, 8), 3, [None] * 4])
def test_noise_given_to_backprop_is_checked_as_everywhere(xi):
    plan, x = fd.plan(VP, "ddpm", 4), states().requires_grad_()
    said = []
    for gradient in (None, "backprop"):
        sampler = fd.Sampler(lambda x, t: x, plan, gradient=gradient)
        with pytest.raises((TypeError, ValueError), match="sample: xi ") as refusal:
            sampler(x.detach() if gradient is None else x, xi=xi)
        said.append(str(refusal.value))
    assert said[0] == said[1]


def test_backprop_of_a_part_draws_the_noise_of_the_part():
    plan, x = fd.plan(VP, "ddpm", 4), states().requires_grad_()
    got = fd.sample(lambda x, t: 0.5 * x, x, plan, seed=3, offset=8, gradient="backprop")
    part = fd.sample(lambda x, t: 0.5 * x, states(), plan, seed=3, offset=8)
    whole = fd.sample(lambda x, t: 0.5 * x, states(), plan, seed=3)
    assert torch.allclose(got, part, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole, part, rtol=1e-1)


def test_a_segment_that_is_run_again_has_the_numbers_of_its_samples():
    stages = [fd.Stage(t=t, b=(0.5,)) for t in (1.0, 0.75, 0.5, 0.25)]
    measure = fd.Measure(into=0, num=fd.Reduction("norm", ("xi",)))
    stages[0] = replace(stages[0], noise=((1, 1.0),), measures=(measure,))
    stages[2] = replace(stages[2], noise=((2, 1.0),), c=0.3, scalars=(("c", 0),))
    plan, gradients = fd.Plan(tuple(stages), (1.0, 0.0)), []
    for gradient in ("backprop", fd.Discrete(), fd.Discrete(checkpoint=2)):
        sampler = fd.Sampler(lambda x, t: 0.5 * torch.sin(x), plan, gradient=gradient)
        x = states().requires_grad_()
        out = sampler(x, seed=1)
        sampler(3.0 * x, seed=7)  # leaves other numbers in the run that is used again
        gradients += torch.autograd.grad(out.sum(), x)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-5)
    assert torch.allclose(gradients[2], gradients[0], rtol=1e-5)


class Many(Guidance):
    """The mean of more branches than a compiled backend holds."""

    branches, per_sample = 17, False

    def weights(self, stage):
        return (1 / 17,) * 17

    def combined_weights(self, stage, like):
        return self.weights(stage)

    def check(self, plan, batch):
        """Fits everything."""

    def conditions(self, cond, batch):
        return cond

    def conditions_given(self):
        return None


def test_a_backward_run_that_no_compiled_backend_holds_runs_on_torch():
    gradients = []
    for gradient in ("backprop", "discrete"):
        x = states().requires_grad_()
        options = {"guidance": Many(), "gradient": gradient}
        out = fd.sample(lambda x, t: torch.sin(x), x, PLAN, **options)
        gradients += torch.autograd.grad(out.sum(), x)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
