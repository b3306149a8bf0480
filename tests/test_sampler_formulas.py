# SPDX-License-Identifier: Apache-2.0
"""A run is its plan's formulas, on every backend and in every dtype."""

import pytest
import torch
from support.core import BACKENDS
from support.runs import EACH, VP, literal, network

import fastdiff as fd


@pytest.mark.parametrize(
    ("solver", "backend"),
    [
        (name, backend)
        for name in fd.solvers.names()
        for backend in BACKENDS
        # the interpreter takes seconds for one
        if "clip" in fd.solvers.info(name).options and (backend != "triton" or name == "dpmpp-2m")
    ],
)
def test_a_thresholded_run_is_the_plans_formulas(solver, backend):
    plan = fd.plan(VP, solver, 6, prediction="v", threshold=(0.8, 0.3))
    x = torch.randn(3, 4, 5, dtype=torch.float64)

    def draw(i):
        return fd.noise.normal(x.shape, 7, plan.stages[i].noise[0][0], dtype=torch.float64)

    got = fd.sample(network, x, plan, backend=backend, seed=7)
    torch.testing.assert_close(got, literal(plan, network, x, draw), rtol=1e-11, atol=1e-11)
    narrow = fd.sample(network, x.float(), plan, backend=backend, seed=7)
    torch.testing.assert_close(narrow.double(), got, rtol=1e-3, atol=1e-3)


@EACH
def test_scaled_inputs_and_extra_evaluation_points(backend):
    schedule = fd.schedules.EDM()
    for solver in ("heun", "dpmpp-3s", "dpmpp-2m"):
        plan = fd.plan(schedule, solver, 5, prediction="edm")
        x = fd.noise.prior(plan, (2, 3, 4), seeds=1, dtype=torch.float64)
        got = fd.sample(network, x, plan, backend=backend)
        torch.testing.assert_close(got, literal(plan, network, x), rtol=1e-11, atol=1e-11)


@EACH
def test_float32_agrees_with_float64_to_rounding(backend):
    plan = fd.plan(VP, "deis-3", 8, prediction="v")
    x = torch.randn(4, 3, 8, 8)
    exact = fd.sample(network, x.double(), plan, backend=backend)
    got = fd.sample(network, x, plan, backend=backend)
    assert got.dtype == torch.float32
    assert float((got - exact).norm() / exact.norm()) < 1e-5


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_network_keeps_a_float32_state(dtype, backend):
    plan = fd.plan(VP, "dpmpp-2m", 8, prediction="v")
    seen = []

    def low(x, t):
        seen.append((x.dtype, t.dtype))
        return network(x, t)

    x = torch.randn(4, 64)
    got = fd.sample(low, x, plan, backend=backend, dtype=dtype)
    exact = fd.sample(network, x.double(), plan)
    assert set(seen) == {(dtype, torch.float32)}
    assert got.dtype == torch.float32
    assert float((got - exact).norm() / exact.norm()) < 0.05
    assert fd.sample(low, x.to(dtype), plan, backend=backend).dtype == dtype


def test_the_input_dtype_follows_the_networks_parameters():
    linear = torch.nn.Linear(8, 8).to(torch.bfloat16)
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x, t):
            seen.append(x.dtype)
            return self.linear(x)

    fd.sample(Net(), torch.randn(2, 8), fd.plan(VP, "ddim", 2))
    assert set(seen) == {torch.bfloat16}


def test_backends_agree():
    plan = fd.plan(VP, "ddim", 5, eta=0.7, clip=1.0, prediction="v")
    x = torch.randn(3, 100)
    results = [fd.sample(network, x, plan, backend=b, seed=3) for b in BACKENDS]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@EACH
def test_extra_registers_are_read_with_their_weights(backend):
    stages = (
        fd.Stage(t=1.0, a_x=0.5, b=(0.25,), r=(2.0, 0.0), d_x=1.0, g=(0.5,), s=(0.0, -1.0)),
        fd.Stage(t=0.5, a_x=1.0, b=(0.5,), r=(0.0, 3.0)),
    )
    plan = fd.Plan(stages=stages, times=(1.0, 0.0))
    x, u, v = torch.randn(3, 2, 5, dtype=torch.float64)
    got = fd.sample(lambda x, t: torch.cos(x), x, plan, extras=(u, v), backend=backend)
    h = torch.cos(x)
    e, x = x + 0.5 * h - v, 0.5 * x + 0.25 * h + 2 * u
    torch.testing.assert_close(got, x + 0.5 * torch.cos(e) + 3 * v, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="2 extra input registers; got 1"):
        fd.sample(lambda x, t: x, u, plan, extras=(u,), backend=backend)
    with pytest.raises(ValueError, match="broadcastable"):
        fd.sample(lambda x, t: x, u, plan, extras=(u, torch.ones(7)), backend=backend)


@EACH
def test_a_stage_without_evaluation_costs_no_call(backend):
    stages = (
        fd.Stage(t=1.0, a_x=0.5, c=1.0, noise=((1, 0.6), (2, 0.8)), evaluate=False),
        fd.Stage(t=1.0, a_x=0.5, b=(0.5,)),
    )
    plan = fd.Plan(stages=stages, times=(1.0, 0.0))
    calls = []

    def net(x, t):
        calls.append(x.clone())
        return torch.ones_like(x)

    x = torch.randn(2, 6, dtype=torch.float64)
    got = fd.sample(net, x, plan, seed=3, backend=backend)
    normal = [fd.noise.normal(x.shape, 3, k, dtype=torch.float64) for k in (1, 2)]
    noisy = 0.5 * x + 0.6 * normal[0] + 0.8 * normal[1]
    assert plan.nfe == len(calls) == 1
    torch.testing.assert_close(calls[0], noisy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, 0.5 * noisy + 0.5, rtol=1e-12, atol=1e-12)
