# SPDX-License-Identifier: Apache-2.0
"""Captures and the weights they read: replaced tensors are seen; copies and processes apart."""

import copy
import pickle
from functools import partial

import pytest
import torch
from support.captures import network, plan_of
from support.core import needs_core
from support.nets import Net
from torch import nn

import fastdiff as fd
from fastdiff import capture


def _in_place(net):
    with torch.no_grad():
        net.linear.weight.mul_(2)


def _assign(net):
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=True)


def _data(net):
    net.linear.weight.data = net.linear.weight.data.clone()


def _submodule(net):
    net.linear = nn.Linear(5, 5)


def _train(net):
    net.train()


class Policy:
    """A plain object that holds its network."""

    def __init__(self, net):
        self.nets = {"all": [net]}

    def predict(self, x, t):
        return self.nets["all"][0](x, t)


WRAPPERS = {
    "method of an object": lambda net: Policy(net).predict,
    "closure over an object": lambda net: (lambda policy: lambda x, t: policy.predict(x, t))(
        Policy(net)
    ),
    "module": lambda net: net,
    "bound": lambda net: net.forward,
    "partial": lambda net: partial(net),
    "closure": lambda net: lambda x, t: net(x, t),
}


@needs_core
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("change", [_in_place, _assign, _data, _submodule, _train])
def test_weights_that_move_are_captured_again(change, wrap, recorder):
    plan, x, net = plan_of(), torch.randn(3, 5), Net(dropout=0.5).eval()
    sampler = fd.Sampler(WRAPPERS[wrap](net), plan, graph="loop")
    sampler(x)
    change(net)
    sampler(x)
    assert sampler.stats().captures == (1 if change is _in_place else 2)
    assert sampler.stats().evictions == (0 if change is _in_place else 1)
    assert sampler.stats().loops == 1


@needs_core
def test_a_tensor_that_an_object_replaces_is_seen(recorder):
    class Scaled:
        def __init__(self):
            self.scale = torch.tensor(2.0)

        def __call__(self, x, t):
            return network(x, t) * self.scale

    plan, x, net = plan_of(), torch.randn(3, 5), Scaled()
    sampler = fd.Sampler(net, plan, graph="loop")
    sampler(x)
    net.scale = torch.tensor(0.5)
    sampler(x)
    assert sampler.stats().captures == 2


@needs_core
def test_a_network_that_makes_its_buffers_anew_is_refused(recorder):
    class Anew(Net):
        def forward(self, x, t):
            self.register_buffer("seen", x.mean().clone())
            return super().forward(x, t)

    with pytest.raises(RuntimeError, match="replaced tensors that it keeps"):
        fd.Sampler(Anew(), plan_of(), graph="loop")(torch.randn(3, 5))


@needs_core
def test_release_is_for_changes_that_cannot_be_seen(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(network, plan, graph="loop")
    sampler(x)
    sampler.release()
    assert sampler.stats().loops == 0
    sampler(x)
    assert sampler.stats().captures == 2


# -- between processes -----------------------------------------------------------------------------


@needs_core
def test_a_copy_is_a_sampler_of_its_own(recorder):
    net, plan, x = Net(dropout=0.5).eval(), plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(net, plan, graph=fd.Graph("loop", loops=3))
    expected = sampler(x)
    copied = copy.deepcopy(sampler)
    assert copied.stats() == capture.Stats()
    assert copied.network is not net
    assert copied.plan is plan
    with torch.no_grad():
        net.linear.weight.zero_()
    assert torch.equal(copied(x), expected)


def test_a_sampler_is_not_pickled():
    with pytest.raises(TypeError, match=r"plan\.to_json\(\)"):
        pickle.dumps(fd.Sampler(network, plan_of()))


def test_a_plan_crosses_processes_as_text():
    plan = plan_of("dpmpp-2m", threshold=(0.995, 1.0))
    again = fd.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.structure == plan.structure
