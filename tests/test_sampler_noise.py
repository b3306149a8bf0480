# SPDX-License-Identifier: Apache-2.0
"""Noise drawn and given, and what a callback sees."""

import torch
from support.runs import EACH, VP, network, run

import fastdiff as fd


@EACH
def test_explicit_noise_replaces_the_drawn(backend):
    plan = fd.plan(VP, "ddpm", 4, prediction="v")
    x = torch.randn(2, 9)
    z = torch.stack([fd.noise.normal(x.shape, [4, 8], stage.noise[0][0]) for stage in plan.stages])
    drawn = fd.sample(network, x, plan, backend=backend, seed=[4, 8])
    given = fd.sample(network, x, plan, backend=backend, xi=z)
    torch.testing.assert_close(given, drawn, rtol=1e-6, atol=1e-6)
    assert not torch.equal(fd.sample(network, x, plan, backend=backend, xi=-z), drawn)


def test_seeds_decide_the_noise():
    plan = fd.plan(VP, "ddpm", 4, prediction="v")
    x = torch.randn(2, 9)
    assert torch.equal(
        fd.sample(network, x, plan, seed=5), fd.sample(network, x, plan, seed=range(5, 7))
    )
    assert not torch.equal(fd.sample(network, x, plan, seed=5), fd.sample(network, x, plan, seed=6))


@EACH
def test_callback_sees_the_state_and_the_x0_prediction(backend):
    model = fd.models.GaussianMixture([0.5, 0.5], [[1.0, 2.0], [-1.0, 0.5]], [[0.1] * 2] * 2)
    plan = fd.plan(VP, "dpm-2", 4, prediction="v")
    seen = []

    def note(stage, t, x, x0):
        exact = model.x0(x, float(VP.alpha(t)), float(VP.sigma(t)))
        torch.testing.assert_close(x0, exact, rtol=1e-8, atol=1e-8)
        seen.append((stage, t))

    x = fd.noise.prior(plan, (5, 2), seeds=0, dtype=torch.float64)
    net = model.network(VP, "v")
    with_callback = fd.sample(net, x, plan, callback=note, backend=backend)
    assert [s for s, _ in seen] == list(range(8))
    assert [t for _, t in seen] == [stage.t for stage in plan.stages]
    assert torch.equal(with_callback, fd.sample(net, x, plan, backend=backend))


def test_callback_under_guidance_sees_the_guided_x0():
    plan = fd.plan(VP, "ddim", 3, prediction="x0")
    y = torch.tensor([1.0, 2.0])
    seen = []
    scales = [3.0, 3.0, 7.0]
    for scale in (3.0, torch.tensor([3.0, 7.0]), scales):
        fd.sample(
            lambda x, t, y: y[:, None].expand(-1, 4).contiguous(),
            torch.randn(2, 4),
            plan,
            cond={"y": y},
            guidance=fd.CFG(scale, uncond={"y": 0.5}),
            callback=lambda stage, t, x, x0: seen.append(x0.clone()),
        )
    used = [3.0] * 3 + [torch.tensor([3.0, 7.0])] * 3 + scales
    assert len(seen) == 9
    for x0, scale in zip(seen, used, strict=True):
        expected = (0.5 + scale * (y - 0.5))[:, None].expand(-1, 4)
        torch.testing.assert_close(x0, expected)


def test_callback_sees_the_clipped_x0():
    plan = fd.plan(VP, "ddim", 3, prediction="x0", clip=0.25)
    seen = []
    run(plan=plan, callback=lambda stage, t, x, x0: seen.append(float(x0.abs().max())))
    assert seen == [0.25] * 3


@EACH
def test_callback_sees_the_thresholded_x0(backend):
    plan = fd.plan(VP, "ddim", 1, t_min=0.0, prediction="x0", threshold=(0.5, 0.1))
    seen = []
    got = fd.sample(
        lambda x, t: 3 * x,
        torch.randn(2, 3, 5),
        plan,
        backend=backend,
        callback=lambda stage, t, x, x0: seen.append(x0),
    )
    assert float(seen[0].abs().max()) == 1.0
    torch.testing.assert_close(got, seen[0])
