# SPDX-License-Identifier: Apache-2.0
"""What a run refuses, and in what words; nothing is changed by a refused call."""

import pytest
import torch
from support.runs import EACH, VP, network, run

import fastdiff as fd


@EACH
@pytest.mark.parametrize(
    ("net", "error", "says"),
    [
        (lambda x, t: x[:, :2], ValueError, r"stage 0 \(t = 1\).*shape, \(2, 4\); got \(2, 2\)"),
        (lambda x, t: x.reshape(4, 2), ValueError, r"\(2, 4\); got \(4, 2\)"),
        (lambda x, t: (x, x), TypeError, r"got tuple.*\[0\]"),
        (lambda x, t: None, TypeError, "got NoneType"),
        (lambda x, t: x.long(), ValueError, "real floating dtype; got torch.int64"),
        (lambda x, t: x.to(torch.complex64), ValueError, "real floating dtype"),
        (lambda x, t: x.to("meta"), ValueError, "on cpu; got meta"),
    ],
)
def test_bad_network_outputs_are_named(net, error, says, backend):
    x = torch.randn(2, 4)
    before = x.clone()
    with pytest.raises(error, match=says):
        run(net, x, backend=backend)
    with pytest.raises(error, match=says):
        run(net, x, backend=backend, check=True)
    with pytest.raises(error, match=says):
        run(net, x, backend=backend, callback=lambda *_: None)
    assert torch.equal(x, before)


def test_a_sampler_works_after_a_failure():
    fail = [True]

    def sometimes(x, t):
        return x[:1] if fail[0] else network(x, t)

    sampler = fd.Sampler(sometimes, fd.plan(VP, "deis-2", 3))
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="shape"):
        sampler(x)
    fail[0] = False
    assert torch.equal(sampler(x), fd.sample(network, x, sampler.plan))


def test_errors_of_the_network_are_its_own():
    def broken(x, t):
        raise ValueError("inside the network")

    with pytest.raises(ValueError, match=r"^inside the network$"):
        run(broken)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_check_names_the_stage_that_left_the_finite(bad):
    def breaks(x, t):
        return network(x, t) if float(t[0]) > 0.9 else torch.full_like(x, bad)

    with pytest.raises(ValueError, match=r"stage 1 .*returned (NaN|infinity)"):
        run(breaks, check=True)
    run(breaks)  # off by default


def test_check_finds_a_network_that_writes_to_its_input():
    with pytest.raises(ValueError, match="in place"):
        run(lambda x, t: x.mul_(0.5), check=True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "real and floating.*int64"),
        ({"x": torch.zeros(2, 4, dtype=torch.complex64)}, TypeError, "real and floating"),
        ({"x": torch.tensor(1.0)}, ValueError, "batch dimension"),
        ({"x": [1.0, 2.0]}, TypeError, "x is a tensor"),
        ({"net": 3}, TypeError, "network is callable"),
        ({"plan": "deis-3"}, TypeError, r"plan is a fastdiff\.Plan"),
        ({"guidance": 7.5}, TypeError, r"guidance is a fastdiff\.CFG"),
        ({"backend": "cup"}, ValueError, "'cpu'"),
        ({"dtype": torch.int64}, TypeError, "floating torch.dtype"),
        ({"graph": "loop"}, ValueError, "graph=None"),
        ({"gradient": "discrete"}, ValueError, "tensors that require grad"),
        ({"gradient": "discret"}, ValueError, "'discrete', 'backprop'"),
        ({"out": torch.zeros(2, 5)}, ValueError, "out is like x"),
        ({"cond": {"y": torch.zeros(3)}}, ValueError, r"cond\['y'\] of shape \(3,\)"),
        ({"cond": {"a": {"b": torch.tensor(1.0)}}}, ValueError, r"cond\['a'\]\['b'\]"),
        ({"guidance": fd.CFG(2.0, uncond={"y": 0})}, ValueError, "got cond=None"),
        ({"guidance": fd.CFG(2.0), "cond": {"y": torch.ones(2)}}, ValueError, "uncond=None"),
        (
            {"guidance": fd.CFG(2.0, uncond={}), "cond": {"y": torch.ones(2)}},
            ValueError,
            "uncond={}",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": None}), "cond": {"y": torch.ones(2)}},
            TypeError,
            "a tensor or a number; got NoneType",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": 0.7}), "cond": {"y": torch.tensor([1, 2])}},
            ValueError,
            "int64; got the unconditional value 0.7",
        ),
        ({"out": "a"}, TypeError, "out is a tensor"),
        ({"out": torch.zeros(1, 4).expand(2, 4)}, ValueError, "memory for every element"),
        ({"x": torch.zeros(2, 4).to_sparse()}, TypeError, "dense"),
        ({"x": torch.full((2, 4), torch.nan), "check": True}, ValueError, "x is finite"),
        (
            {"guidance": fd.CFG(2.0, uncond={"z": 0}), "cond": {"y": torch.zeros(2)}},
            ValueError,
            "has no 'z'",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": torch.ones(2, 3)}), "cond": {"y": torch.ones(2)}},
            ValueError,
            "cond's shape",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": "none"}), "cond": {"y": torch.zeros(2)}},
            TypeError,
            "a tensor or a number",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": "b"}), "cond": {"y": "a"}},
            TypeError,
            "only tensors can differ",
        ),
        (
            {"guidance": fd.CFG(torch.ones(3), uncond={"y": 1}), "cond": {"y": torch.zeros(2)}},
            ValueError,
            "needs 2 values; got 3",
        ),
        (
            {"guidance": fd.CFG([1.0, 2.0], uncond={"y": 1}), "cond": {"y": torch.zeros(2)}},
            ValueError,
            "needs 3 values",
        ),
        ({"x": torch.zeros(2, 4, requires_grad=True)}, ValueError, "x requires grad"),
        (
            {"cond": {"y": torch.zeros(2, requires_grad=True)}},
            ValueError,
            r"cond\['y'\] requires grad",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_the_network_runs(options, error, says):
    def never(*_, **__):
        raise AssertionError("the network ran")

    with pytest.raises(error, match=says):
        run(**{"net": never, **options})


def test_tracking_is_only_refused_where_grad_mode_is_on():
    with torch.no_grad():
        run(x=torch.zeros(2, 4, requires_grad=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "draws noise. Give seed="),
        ({"seed": [1, 2, 3]}, "3"),
        ({"seed": [1]}, "1"),
        ({"xi": torch.zeros(2, 2, 4)}, "one entry a stage, 3; got 2"),
        ({"xi": torch.zeros(3, 2, 5)}, r"xi\[0\]"),
        ({"xi": torch.zeros(3, 2, 4, dtype=torch.float64)}, r"xi\[0\]"),
    ],
)
def test_bad_noise_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        run(plan=fd.plan(VP, "ddpm", 3), **options)


def test_noise_of_the_wrong_kind_is_refused():
    for xi in (5, [1.0, 2.0, 3.0]):
        with pytest.raises(TypeError, match="xi"):
            run(plan=fd.plan(VP, "ddpm", 3), xi=xi)


def test_a_network_that_says_what_it_predicts_is_believed():
    def net(x, t):
        return x

    net.prediction = "v"
    with pytest.raises(ValueError, match="predicts 'v'"):
        fd.sample(net, torch.randn(2, 4), fd.plan(VP, "ddim", 2))
    fd.sample(net, torch.randn(2, 4), fd.plan(VP, "ddim", 2, prediction="v"))


@pytest.mark.parametrize("name", ["plan", "network", "guidance"])
def test_what_a_sampler_was_made_of_cannot_be_swapped(name):
    sampler = fd.Sampler(network, fd.plan(VP, "ddim", 2))
    with pytest.raises(AttributeError):
        setattr(sampler, name, None)


def test_progress_shows_a_bar(capsys):
    run(progress=True)
    assert "3/3" in capsys.readouterr().err
    run()
    assert capsys.readouterr().err == ""


def test_bad_guidance_is_refused():
    with pytest.raises(TypeError, match="scale is a number"):
        fd.CFG("7.5")
    with pytest.raises(ValueError, match="finite"):
        fd.CFG(float("nan"))
    with pytest.raises(ValueError, match="real tensor"):
        fd.CFG(torch.ones(2, 2))
