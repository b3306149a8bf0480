# SPDX-License-Identifier: Apache-2.0
"""Every solver compiles on every grid, and takes the ends of a schedule or says why it cannot."""

import numpy as np
import pytest
import torch
from support.solvers import CASES, DETERMINISTIC, SCHEDULES

import fastdiff as fd


@pytest.mark.parametrize(
    "grid", ["uniform", "quadratic", "power(3)", "logsnr", "karras", "exponential"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_solver_compiles_on_every_grid(case, grid):
    for name in ("vp-linear", "sd", "edm"):
        schedule, prediction = SCHEDULES[name]
        plan = case.plan(schedule, 7, grid=grid, prediction=prediction)
        assert plan.steps == 7 or not plan.descends  # one that goes back takes more


@pytest.mark.parametrize("rate", [0.7, 1.3, 2.2, 3.0, 4.1, 5.5])
def test_every_solver_compiles_on_custom_schedules(rate):
    schedule = fd.schedules.Custom(
        lambda t: np.exp(-rate * t**2),
        lambda t: np.sqrt(-np.expm1(-2 * rate * t**2)),
        t_range=(1e-3, 1.0),
    )
    for case in CASES:
        for grid in ("uniform", "logsnr", "karras"):
            plan = case.plan(schedule, 5, grid=grid, prediction="v")
            assert plan.steps == 5 or not plan.descends


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("name", ["edm", "vp-linear", "sd"])
def test_a_grid_may_end_at_the_data(case, name):
    schedule, _ = SCHEDULES[name]
    model = fd.models.GaussianMixture([1.0], [[0.3, -0.2]], [[0.04, 0.09]])
    grid = {"edm": "auto", "vp-linear": "quadratic", "sd": "trailing"}[name]
    end = {} if grid == "trailing" else {"t_min": 0.0}
    plan = case.plan(schedule, 250, grid=grid, prediction="x0", **end)
    assert plan.times[-1] == 0.0
    x = fd.noise.prior(plan, (16, 2), seeds=0, dtype=torch.float64)
    out = fd.sample(model.network(schedule, "x0"), x, plan, check=True)
    # the flow of a Gaussian, from unit scale (or sigma_max) to the data's own
    mean, spread = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.2, 0.3]).double()
    start = float(schedule.sigma(plan.times[0]))
    shift = float(schedule.alpha(plan.times[0]))
    exact = mean + spread * (x - shift * mean) / torch.sqrt(shift**2 * spread**2 + start**2)
    assert float((out - exact).abs().max()) < 0.05


FROM_NOISE = "ab-3 midpoint rk4 ddim dpmpp-2m dpmpp-3m"


@pytest.mark.parametrize(
    ("schedule", "solvers"),
    [
        (fd.schedules.FlowMatching(), FROM_NOISE + " euler heun"),
        (
            fd.schedules.Custom(
                lambda t: 1.0 - t**2,
                lambda t: np.sqrt(t**2 * (2.0 - t**2)),
                t_range=(0.0, 1.0),
                grid_range=(0.01, 1.0),
            ),
            FROM_NOISE,
        ),
    ],
    ids=["flow", "curved"],
)
def test_the_solvers_that_a_refusal_names_start_at_pure_noise(schedule, solvers):
    for case in DETERMINISTIC:
        try:
            plan = case.plan(schedule, 6, prediction="velocity", grid="uniform")
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{case.name}: the epsilon form divides by alpha")
            # a start beside alpha = 0 runs and is wrong by more than the data's spread
            assert "Take t_max" not in message
            named = message.partition("starts there:")[2]
            for solver in solvers.split():
                assert solver in named
                there = fd.plan(schedule, solver, 6, prediction="velocity", grid="uniform")
                assert there.times[0] == 1.0
            assert ("euler" in named) == ("euler" in solvers)
        else:
            assert plan.times[0] == 1.0
    with pytest.raises(ValueError, match="the epsilon form divides by alpha"):
        fd.plan(schedule, "deis-rk4", 6, prediction="velocity", grid="uniform")


def test_a_grid_that_a_refusal_names_starts_at_pure_noise():
    flow = fd.schedules.FlowMatching()
    with pytest.raises(ValueError, match="Take grid='uniform' or 'quadratic'") as refused:
        fd.plan(flow, "ab-3", 6, prediction="velocity", grid="logsnr")
    assert "t_max = 1." in str(refused.value)
    for grid in ("uniform", "quadratic"):
        assert fd.plan(flow, "ab-3", 6, prediction="velocity", grid=grid).times[0] == 1.0
