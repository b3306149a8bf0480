# SPDX-License-Identifier: Apache-2.0
"""Captures and the weights they read: replaced tensors are seen; copies and processes apart."""

import copy
import gc
import pickle
from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.captures import MODES, network, plan_of
from support.core import needs_core
from support.nets import Net
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastdiff as fd
from fastdiff import capture
from fastdiff.capture.weights import Weights


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


class Holder(Net):
    """A module that reads tensors which are no parameters and no buffers."""

    def __init__(self, made):
        super().__init__(dropout=0.5)
        self.eval()
        self.kept = made(torch.tensor(2.0))
        self.read = lambda: self.kept

    def forward(self, x, t):
        return super().forward(x, t) * self.read()


def _attribute(net):
    net.kept = torch.tensor(0.5)


def _item(net):
    net.kept[0] = torch.tensor(0.5)


def _whole_list(net):
    net.kept = [torch.tensor(0.5)]


def _whole_tuple(net):
    net.kept = (torch.tensor(0.5),)


def _entry(net):
    net.kept["a"] = torch.tensor(0.5)


def _deep(net):
    net.kept["a"][0]["b"] = torch.tensor(0.5)


def _member(net):
    net.kept.scale = torch.tensor(0.5)


def _rotated(net):
    net.kept.rotate(1)


# how a module keeps a tensor, how it reads it, and how the tensor is replaced
PLAIN = {
    "attribute": (lambda v: v, lambda net: net.kept, _attribute),
    "list": (lambda v: [v], lambda net: net.kept[0], _item),
    "list anew": (lambda v: [v], lambda net: net.kept[0], _whole_list),
    "tuple anew": (lambda v: (v,), lambda net: net.kept[0], _whole_tuple),
    "dict": (lambda v: {"a": v}, lambda net: net.kept["a"], _entry),
    "deep": (lambda v: {"a": ({"b": v},)}, lambda net: net.kept["a"][0]["b"], _deep),
    "object": (lambda v: SimpleNamespace(scale=v), lambda net: net.kept.scale, _member),
    "deque": (
        lambda v: deque([v, v * 3]),
        lambda net: net.kept[0],
        _rotated,
    ),
}


@needs_core
@pytest.mark.parametrize("case", PLAIN)
def test_a_plain_tensor_that_a_module_replaces_is_seen(case, recorder):
    made, read, change = PLAIN[case]
    net = Holder(made)
    net.read = partial(read, net)
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(net, plan, graph="loop")
    sampler(x)
    change(net)
    assert torch.equal(sampler(x), fd.sample(net, x, plan, graph=None))
    assert sampler.stats().captures == 2
    sampler(x)
    assert sampler.stats().captures == 2


@needs_core
def test_a_tensor_that_a_hook_closes_over_is_seen(recorder):
    scale = torch.tensor(2.0)
    net, plan, x = Net(dropout=0.5).eval(), plan_of(), torch.randn(3, 5)

    def hook(module, given, output):
        return output * scale

    net.linear.register_forward_hook(hook)
    sampler = fd.Sampler(net, plan, graph="loop")
    sampler(x)
    scale = torch.tensor(0.5)
    assert torch.equal(sampler(x), fd.sample(net, x, plan, graph=None))
    assert sampler.stats().captures == 2


@needs_core
def test_parametrized_weights_are_followed(recorder):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.tensor(2.0)

        def forward(self, weight):
            return weight * self.scale

    net, plan, x = Net(dropout=0.5).eval(), plan_of(), torch.randn(3, 5)
    scaled = Scaled()
    nn.utils.parametrize.register_parametrization(net.linear, "weight", scaled)
    sampler = fd.Sampler(net, plan, graph="loop")
    sampler(x)
    scaled.scale = torch.tensor(0.5)
    assert torch.equal(sampler(x), fd.sample(net, x, plan, graph=None))
    assert sampler.stats().captures == 2


@needs_core
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_network_is_followed(recorder):
    plan, x, net = plan_of(), torch.randn(3, 5), Net(dropout=0.5).eval().requires_grad_(False)
    traced = torch.jit.trace(net, (x, torch.ones(3)), check_trace=False)
    sampler = fd.Sampler(traced, plan, graph="loop")
    for captures in (1, 1, 2, 2):
        if captures > sampler.stats().captures > 0:
            traced.linear.weight.data = traced.linear.weight.data * 2
        assert torch.equal(sampler(x), fd.sample(traced, x, plan, graph=None))
        assert sampler.stats().captures == captures


# -- what a network makes anew in each call --------------------------------------------------------


class Notes(Net):
    """A module that leaves what it computes in plain attributes, and reads none of it again."""

    def forward(self, x, t):
        h = super().forward(x, t)
        self.last, self.pair, self.by_name = h, (h, 2), {"h": h}
        return h


def _normalised():
    net = Net(dropout=0.5)
    net.linear = nn.utils.weight_norm(net.linear)
    return net


@needs_core
@pytest.mark.parametrize("make", [lambda: Notes(dropout=0.5), _normalised])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_a_network_writes_before_it_reads_is_its_own(make, recorder):
    net, plan, x = make().eval(), plan_of(), torch.randn(3, 5)
    expected = fd.sample(net, x, plan, graph=None)
    sampler = fd.Sampler(net, plan, graph="loop")
    for _ in range(3):
        assert torch.equal(sampler(x), expected)
    assert sampler.stats().captures == 1


@needs_core
def test_what_a_network_reads_from_the_call_before_is_refused_and_left_as_it_was(recorder):
    class Recurrent(Net):
        def forward(self, x, t):
            self.state = 1e-6 * super().forward(x, t) + 0.0 * self.state
            return super().forward(x, t) + 1e-6 * self.state

    net, x = Recurrent(dropout=0.5).eval(), torch.randn(3, 5)
    net.state = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="replaced tensors that it keeps"):
        fd.Sampler(net, plan_of(), graph="loop")(x)
    assert net.state.isfinite().all()


# -- what is looked at when ------------------------------------------------------------------------


@pytest.fixture
def looked(monkeypatch, recorder):
    """How many tensors' addresses were read, and how many launches there had been, at each look."""
    looks, pointer = [], torch.Tensor.data_ptr
    watched = set()

    def counting(tensor):
        if id(tensor) in watched:
            looks.append(recorder.launched)
        return pointer(tensor)

    monkeypatch.setattr(torch.Tensor, "data_ptr", counting)
    return watched, looks


@needs_core
@MODES
def test_no_tensor_is_touched_before_the_launch(mode, recorder, looked):
    net = nn.Sequential(*[nn.Linear(5, 5) for _ in range(20)])
    sampler, x = fd.Sampler(lambda x, t: net(x), plan_of(), graph=mode), torch.randn(3, 5)
    sampler(x)
    watched, looks = looked
    watched.update(map(id, net.parameters()))
    before = recorder.launched
    sampler(x)
    assert len(looks) == 40
    assert set(looks) == {before + (1 if mode == "loop" else 6)}  # all after the last launch


@needs_core
def test_a_network_that_writes_to_its_tensors_is_looked_at_before_the_launch(recorder):
    class Counts(Net):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, t):
            self.calls += 1
            return super().forward(x, t)

    net, x = Counts().eval(), torch.randn(3, 5)
    sampler = fd.Sampler(net, plan_of(), graph="loop")
    sampler(x)
    launched, calls = recorder.launched, float(net.calls)
    sampler(x)
    assert (recorder.launched - launched, float(net.calls) - calls) == (1, 6)
    launched = recorder.launched
    net.linear = nn.Linear(5, 5)
    sampler(x)
    assert recorder.launched - launched == 1  # that which checks the new capture


@needs_core
@MODES
def test_a_replay_of_moved_weights_is_thrown_away(mode, recorder):
    net, plan, x = Net(dropout=0.5), plan_of(), torch.randn(3, 5)  # it draws
    torch.manual_seed(1)
    sampler = fd.Sampler(net, plan, graph=mode)
    sampler(x)
    state, out = torch.get_rng_state(), torch.empty_like(x)
    _data(net)
    _in_place(net)
    expected = fd.sample(net, x, plan, graph=None)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert sampler(x, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert recorder.settled == 1  # what the device still read is given up after that


@needs_core
@pytest.mark.parametrize("change", [_assign, _data, _submodule])
def test_a_graphs_weights_live_until_a_call_sees_that_they_moved(change, recorder):
    net, plan, x = Net(dropout=0.5).eval(), plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(net, plan, graph="loop")
    sampler(x)
    old = StorageWeakRef(net.linear.weight.untyped_storage())
    change(net)
    gc.collect()
    assert not old.expired()
    sampler(x)
    gc.collect()
    assert old.expired()


@needs_core
def test_a_captured_gradient_reads_the_weights_of_its_run(recorder):
    net, plan, x = Net(dropout=0.5).eval(), plan_of(), torch.randn(3, 5)
    captured = fd.Sampler(net, plan, graph="loop", gradient="discrete")
    eager = fd.Sampler(net, plan, graph=None, gradient="discrete")

    def gradient(sampler):
        given = x.clone().requires_grad_()
        result = sampler(given)
        return result, torch.autograd.grad(result.square().sum(), given, retain_graph=True)[0]

    gradient(captured)
    _data(net)
    _in_place(net)  # the old memory keeps the old values
    for got, wanted in zip(gradient(captured), gradient(eager), strict=True):
        torch.testing.assert_close(got, wanted)
    assert captured.stats().captures == 2
    result = captured(x.clone().requires_grad_())
    old = StorageWeakRef(net.linear.weight.untyped_storage())
    net.linear.weight.data = torch.zeros(5, 5)
    captured.release()
    gc.collect()
    assert result.requires_grad
    assert not old.expired()  # the backward graph reads it


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_number_on_the_host_is_a_constant_of_the_graph(dtype):
    net = Net()
    net.scale = torch.ones((), dtype=dtype)
    elsewhere = Weights(net, torch.device("meta"))
    here = Weights(net, torch.device("cpu"))
    assert not elsewhere.moved()
    net.scale.zero_()
    assert elsewhere.moved()
    assert not here.moved()
