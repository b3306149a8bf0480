# SPDX-License-Identifier: Apache-2.0
"""What a call leaves behind: nothing that the next call, or the rest of this one, could see."""

import pytest
import torch
from support.core import FAST

import fastdiff as fd

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
