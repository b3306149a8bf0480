# SPDX-License-Identifier: Apache-2.0
"""Conditioning and guidance as a run hands them to the network."""

import pytest
import torch
from support.runs import EACH, VP, network, run

import fastdiff as fd


def test_conditioning_reaches_the_network():
    seen = []

    def net(x, t, y, more):
        seen.append((y, more["deep"]["z"], more["fixed"]))
        return x

    y, z = torch.arange(3.0), torch.ones(3, 2)
    fixed = (torch.zeros(7),)
    cond = {"y": y, "more": {"deep": {"z": z}, "fixed": fixed}}
    fd.sample(net, torch.randn(3, 4), fd.plan(VP, "ddim", 1), cond=cond)
    assert seen[0][0] is y
    assert seen[0][1] is z
    assert seen[0][2] is fixed


def test_conditioning_may_be_anything_the_network_takes():
    token = object()
    seen = []

    def net(x, t, c):
        seen.append(c)
        return x

    fd.sample(net, torch.randn(3, 4), fd.plan(VP, "ddim", 1), cond=token)
    assert seen == [token]


@EACH
@pytest.mark.parametrize("solver", ["deis-3", "dpm-3", "ddpm"])
def test_guidance_is_the_combination_in_one_batched_call(solver, backend):
    plan = fd.plan(VP, solver, 5, prediction="v", t_max=0.9)
    x = torch.randn(4, 6, dtype=torch.float64)
    y, none = torch.arange(4.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    calls = []

    def counted(x, t, y):
        calls.append(len(x))
        return network(x, t, y=y)

    def guided(x, t):
        out, uncond = network(x, t, y=y), network(x, t, y=none.expand(4))
        return uncond + 3.0 * (out - uncond)

    guidance = fd.CFG(3.0, uncond={"y": none})
    options = {"backend": backend, "seed": 7}
    got = fd.sample(counted, x, plan, cond={"y": y}, guidance=guidance, **options)
    expected = fd.sample(guided, x, plan, **options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert calls == [8] * plan.nfe


@EACH
def test_guidance_per_sample_and_per_stage(backend):
    plan = fd.plan(VP, "deis-3", 5, prediction="v")
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64)

    def sample(scale, rows=slice(None)):
        guidance = fd.CFG(scale, uncond={"y": 0.0})
        return fd.sample(
            network, x[rows], plan, cond={"y": y[rows]}, guidance=guidance, backend=backend
        )

    each = sample(torch.tensor([1.0, 2.5, 4.0]))
    for b, scale in enumerate((1.0, 2.5, 4.0)):
        torch.testing.assert_close(each[b], sample(scale, slice(b, b + 1))[0], rtol=1e-12, atol=0)
    stages = sample([2.5, 2.5, 2.5, 2.5, 2.5])
    torch.testing.assert_close(stages, sample(2.5), rtol=1e-12, atol=0)
    changed = sample([2.5, 2.5, 2.5, 2.5, 9.0])
    assert not torch.equal(changed, stages)


def test_scale_one_calls_the_network_once_a_sample():
    calls = []

    def net(x, t, y):
        calls.append(len(x))
        return x

    plan = fd.plan(VP, "ddim", 2)
    cond = {"y": torch.zeros(3)}
    fd.sample(net, torch.randn(3, 4), plan, cond=cond, guidance=fd.CFG(1.0, uncond={"y": 0.0}))
    assert calls == [3, 3]


def test_missing_keys_of_uncond_are_shared():
    seen = []

    def net(x, t, y, z):
        seen.append((y.tolist(), z.tolist()))
        return x

    cond = {"y": torch.tensor([5, 6]), "z": torch.tensor([1.0, 2.0])}
    guidance = fd.CFG(2.0, uncond={"y": 9})
    fd.sample(net, torch.randn(2, 4), fd.plan(VP, "ddim", 1), cond=cond, guidance=guidance)
    assert seen == [([9, 9, 5, 6], [1.0, 2.0, 1.0, 2.0])]


# -- conditioning that changes along the run -------------------------------------------------------


@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])
def test_conditioning_may_have_one_value_a_stage(solver):
    plan = fd.plan(VP, solver, 4, prediction="v", t_max=0.9)
    stages = len(plan.stages)
    x, values = torch.randn(3, 5), torch.randn(stages, 3)
    seen = []

    def net(x, t, y):
        seen.append(y.clone())
        return network(x, t, y=y)

    def by_call(x, t):
        return network(x, t, y=values[len(seen) % stages - 1])

    got = fd.sample(net, x, plan, cond={"y": fd.PerStage(values)})
    assert torch.equal(torch.stack(seen), values)
    seen.clear()

    def counted(x, t):
        seen.append(1)
        return by_call(x, t)

    assert torch.equal(got, fd.sample(counted, x, plan))


def test_conditioning_with_one_value_a_stage_is_guided():
    plan = fd.plan(VP, "dpmpp-2m", 4, prediction="v", t_max=0.9)
    x, y = torch.randn(3, 5), torch.randn(3)
    same = fd.PerStage(y.expand(4, 3))
    for uncond in (0.0, torch.zeros(3), fd.PerStage(torch.zeros(4, 3))):
        guidance = fd.CFG(2.0, uncond={"y": uncond})
        got = fd.sample(network, x, plan, cond={"y": same}, guidance=guidance)
        plain = fd.CFG(2.0, uncond={"y": 0.0})
        assert torch.equal(got, fd.sample(network, x, plan, cond={"y": y}, guidance=plain))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fd.PerStage(torch.zeros(4)), r"\[S, B, ...\].*got \(4,\)"),
        (lambda: fd.PerStage([1.0]), "got"),
        (lambda: run(cond={"y": fd.PerStage(torch.zeros(9, 2))}), "one entry a stage of the plan"),
        (lambda: run(cond={"y": fd.PerStage(torch.zeros(4, 3))}), r"one stage of cond\['y'\]"),
    ],
)
def test_bad_values_a_stage_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
