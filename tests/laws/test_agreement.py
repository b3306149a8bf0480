# SPDX-License-Identifier: Apache-2.0
"""Laws of agreement: predictions, first steps, noiseless solvers, saved plans and backends."""

import numpy as np
import pytest
import torch
from support.problems import two_blobs
from support.solvers import (
    CASES,
    DETERMINISTIC,
    SCHEDULES,
    STOCHASTIC,
    VP,
    is_straight,
    with_x0,
)

import fastdiff as fd

# x0 form loses this much where alpha = 0.0066 at t = 1
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
WITH_ETA = [name for name in fd.solvers.names() if "eta" in fd.solvers.info(name).options]


@pytest.mark.parametrize("name", ["vp-linear", "edm", "sd"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_predictions_give_one_trajectory(case, name):
    schedule, _ = SCHEDULES[name]
    results = []
    for prediction in fd.schedules.PREDICTIONS:
        if prediction == "edm" and name != "edm":
            continue
        plan = with_x0(case).plan(schedule, 6, prediction=prediction)
        x = fd.noise.prior(plan, (5, 2), seeds=0, dtype=torch.float64)
        results.append(fd.sample(two_blobs(schedule, prediction), x, plan, seed=7))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **CLOSE)


# evaluations beside those of its steps are a start of the solver's own
PLAIN_START = [c for c in DETERMINISTIC if c.info.nfe_per_step == 1 and c.info.nfe_extra == 0]


@pytest.mark.parametrize("case", PLAIN_START, ids=str)
def test_the_first_step_of_a_multistep_solver_is_ddims(case):
    plan = case.plan(VP, 6, grid="logsnr", prediction="v")
    if plan.variable not in ("epsilon", "x0"):
        pytest.skip("DDIM has no form in this variable")
    first = plan.stages[0]
    ddim = fd.plan(VP, fd.solvers.DDIM(form=plan.variable), 6, prediction="v").stages[0]
    # a predictor-corrector keeps x and predicts e
    x, h = (first.a_x, first.b) if first.writes_x else (first.d_x, first.g)
    for got, wanted in ((x, ddim.a_x), (h, ddim.b), (first.p, ddim.p), (first.q, ddim.q)):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def combines_one_output(case):
    """Whether every step has one output and the state alone, which determines an exact row."""
    stages = case.plan(VP, 6).stages
    return all(len(stage.b) == 1 and not stage.writes_e for stage in stages)


@pytest.mark.parametrize("case", [c for c in DETERMINISTIC if combines_one_output(c)], ids=str)
@pytest.mark.parametrize("name", ["vp-linear", "edm", "sd", "flow"])
def test_first_order_members_are_all_ddim(case, name):
    schedule, _ = SCHEDULES[name]
    start = {"t_max": 0.99} if name == "flow" else {}
    ddim = fd.plan(schedule, "ddim", 6, prediction="v", **start)
    x = fd.noise.prior(ddim, (5, 2), seeds=0, dtype=torch.float64)
    network = two_blobs(schedule, "v")
    own = case.plan(schedule, 6, grid=ddim.times, prediction="v")
    if not is_straight(own):
        pytest.skip("a constant velocity is not a constant epsilon")
    results = [fd.sample(network, x, plan) for plan in (ddim, own)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", [n for n in fd.solvers.names() if "eta" in fd.solvers.info(n).options]
)
def test_without_noise_a_stochastic_solver_is_its_flow(name):
    plan = fd.plan(VP, name, 6, eta=0.0)
    assert not plan.stochastic
    ddim = fd.plan(VP, "ddim", 6)
    assert plan.stages == ddim.stages
    near = fd.plan(VP, name, 6, eta=1e-9)
    np.testing.assert_allclose(
        [s.b[0] for s in near.stages], [s.b[0] for s in plan.stages], rtol=1e-12
    )


def test_eta_one_is_ddpm():
    assert fd.plan(VP, "ddim", 6, eta=1.0).stages == fd.plan(VP, "ddpm", 6).stages


@pytest.mark.parametrize("case", STOCHASTIC, ids=str)
def test_noise_that_is_given_is_the_noise_that_is_drawn(case):
    plan = case.plan(VP, 6, prediction="v")
    x = fd.noise.prior(plan, (3, 2), seeds=0, dtype=torch.float64)
    network = two_blobs(VP, "v")
    streams = [s.noise[0][0] if s.noise else 0 for s in plan.stages]
    xi = torch.stack([fd.noise.normal((3, 2), seeds=5, stream=s).double() for s in streams])
    drawn = fd.sample(network, x, plan, seed=5)
    torch.testing.assert_close(fd.sample(network, x, plan, xi=xi), drawn, rtol=1e-12, atol=1e-12)
    assert not torch.equal(fd.sample(network, x, plan, seed=6), drawn)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_plan_survives_saving(case, name):
    schedule, prediction = SCHEDULES[name]
    plan = case.inside(schedule, prediction=prediction)
    assert fd.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_agree(case, dtype):
    if fd.backends.status()["cpu"] != "available":
        pytest.skip("the compiled core is not built here")
    plan = case.plan(VP, 6, prediction="v")
    x = fd.noise.prior(plan, (3, 2), seeds=0, dtype=dtype)
    network = two_blobs(VP, "v")
    results = [
        fd.sample(
            lambda x, t: network(x.double(), t.double()).to(x.dtype), x, plan, seed=3, backend=b
        )
        for b in ("torch", "cpu")
    ]
    # both round each of at most 8 terms a stage, over at most 24 stages
    tolerance = 8 * 24 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
