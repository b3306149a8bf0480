# SPDX-License-Identifier: Apache-2.0
"""diffusers' own PNDM, LMS and iPNDM schedulers, given float64 tables, end where our plans end."""

import numpy as np
import pytest
import torch
from support import problems

import fastdiff as fd

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = fd.schedules.VPDiscrete.scaled_linear(0.00085, 0.012, 1000)
MIXTURE = fd.models.GaussianMixture(problems.WEIGHTS, problems.MEANS, problems.VARIANCES)
X = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 4)))


def pndm(steps, **options):
    """A PNDMScheduler with Stable Diffusion's betas in float64."""
    made = diffusers.PNDMScheduler(1000, **SD, steps_offset=1, set_alpha_to_one=True, **options)
    made.alphas_cumprod = torch.tensor(SCHEDULE.alphas_cumprod)
    made.set_timesteps(steps)
    return made


def follow(scheduler, network, x):
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.double().expand(len(x)))
        x = scheduler.step(output, t, x).prev_sample
    return x


def plan_of(scheduler, name, **options):
    times = [(t + 1) / 1000 for t in scheduler._timesteps[::-1]] + [0.0]
    return fd.plan(SCHEDULE, name, len(times) - 1, grid=times, **options)


@pytest.mark.parametrize(
    ("name", "skip", "steps", "published"),
    [
        ("plms", True, 1, False),
        ("plms", True, 2, False),
        ("plms", True, 3, False),
        ("plms", True, 20, False),
        ("plms", True, 30, False),
        ("PNDMScheduler", False, 4, False),
        ("PNDMScheduler", False, 10, False),
        ("PNDMScheduler", False, 50, False),
        ("pndm", False, 8, True),  # steps of 125 and of 33 training indices
        ("pndm", False, 30, True),
    ],
)
def test_a_plan_ends_where_pndm_scheduler_ends(name, skip, steps, published):
    scheduler = pndm(steps, skip_prk_steps=skip)
    plan = plan_of(scheduler, name, **({"published": True} if published else {}))
    network = MIXTURE.network(SCHEDULE)
    theirs = follow(scheduler, network, X)
    np.testing.assert_allclose(fd.sample(network, X, plan), theirs, rtol=0, atol=1e-9)
    assert plan.nfe == len(scheduler.timesteps)
    told = [stage.model_time for stage in plan.stages]
    np.testing.assert_allclose(told, scheduler.timesteps.numpy())


def test_the_middle_of_an_odd_step_is_the_middle():
    theirs = plan_of(pndm(30), "pndm", published=True).stages[:3]
    ours = plan_of(pndm(30), "pndm").stages[:3]
    first, next_first = (pndm(30)._timesteps[::-1][i] for i in (0, 1))
    assert ours[1].model_time == pytest.approx((first + next_first) / 2)
    assert theirs[1].model_time == (first + next_first - 1) / 2
    assert ours[0].d_x == ours[1].d_x  # both trial points stand where the network is told
    assert theirs[0].d_x != theirs[1].d_x


def test_pndm_scheduler_leaves_the_marginal_on_linspace_times():
    x0, noise = X, X.flip(0)  # a network that is right says the noise
    scheduler = pndm(10, skip_prk_steps=True, timestep_spacing="linspace")
    plan = plan_of(scheduler, "plms")
    t = plan.times[0]
    x = float(SCHEDULE.alpha(t)) * x0 + float(SCHEDULE.sigma(t)) * noise
    ours, theirs = fd.sample(lambda x, t: noise, x, plan), follow(scheduler, lambda x, t: noise, x)
    np.testing.assert_allclose(ours, x0, rtol=0, atol=1e-9)
    assert float((theirs - x0).norm() / x0.norm()) > 0.1


def test_the_last_step_of_a_default_pndm_scheduler_goes_nowhere():
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(10)
    states = [X]
    for t in scheduler.timesteps:
        states.append(scheduler.step(torch.tanh(states[-1]), t, states[-1]).prev_sample)
    assert torch.equal(states[-1], states[-2])


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_pndm_scheduler_is_of_order_one_on_v_and_ours_of_two(prediction):
    schedule, parts = fd.schedules.VPLinear(), (128, 256)
    start, end, training = 0.8125, 0.0625, 25600
    at = np.arange(1, training + 1) / training
    network = MIXTURE.network(schedule, prediction)
    span = {"t_max": start, "t_min": end, "prediction": prediction}
    exact = fd.sample(network, X, fd.plan(schedule, "deis-rk4", 300, grid="logsnr", **span))
    theirs, ours = [], []
    for count in parts:
        kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
        scheduler = diffusers.PNDMScheduler(training, skip_prk_steps=True, prediction_type=kind)
        scheduler.alphas_cumprod = torch.tensor(schedule.alpha(at) ** 2)
        scheduler.set_timesteps(count)
        indices = np.arange(start * training, end * training, -training // count) - 1
        x = X
        for t in [indices[0], indices[1], *indices[1:]]:  # as its set_timesteps has them
            output = network(x, torch.full((len(x),), (t + 1) / training, dtype=torch.float64))
            x = scheduler.step(output, int(t), x).prev_sample
        theirs.append(float((x - exact).norm()))
        plan = fd.plan(schedule, "plms", len(indices), grid="uniform", **span)
        ours.append(float((fd.sample(network, X, plan) - exact).norm()))
    assert problems.slope(ours) > 1.75
    if prediction == "epsilon":
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)
    else:
        assert problems.slope(theirs) < 1.25
        assert theirs[1] > 10.0 * ours[1]


@pytest.mark.parametrize("steps", [3, 10, 25])
def test_a_plan_ends_where_lms_scheduler_ends(steps):
    scheduler = diffusers.LMSDiscreteScheduler(1000, **SD, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    times = [(float(t) + 1) / 1000 for t in scheduler.timesteps] + [0.0]
    rho = SCHEDULE.rho(np.array(times))
    scheduler.sigmas = torch.tensor(rho)
    network = MIXTURE.network(SCHEDULE)
    name = "LMSDiscreteScheduler" if steps > 3 else "lms-3"
    plan = fd.plan(SCHEDULE, name, steps, grid=times)
    theirs = follow(scheduler, network, X / float(SCHEDULE.alpha(times[0])))
    np.testing.assert_allclose(fd.sample(network, X, plan), theirs, rtol=0, atol=1e-9)


def test_the_weights_of_lms_scheduler_have_five_digits():
    scheduler = diffusers.LMSDiscreteScheduler(1000, **SD, timestep_spacing="trailing")
    scheduler.set_timesteps(25)
    times = np.array([(float(t) + 1) / 1000 for t in scheduler.timesteps] + [0.0])
    plan = fd.plan(SCHEDULE, "lms-4", 25, grid=times)
    rho, exact_error, error = SCHEDULE.rho(times), 0.0, 0.0
    for i in (5, 12, 23):
        # an interpolation of degree 3 integrates the powers of rho up to 3
        nodes = rho[i : i - 4 : -1] / rho[i]
        powers = np.arange(1, 5)
        integrals = ((rho[i + 1] / rho[i]) ** powers - 1.0) / powers
        exact = rho[i] * np.linalg.solve(np.vander(nodes, increasing=True).T, integrals)
        ours = np.array(plan.stages[i].b) / float(SCHEDULE.alpha(times[i + 1]))
        theirs = np.array([scheduler.get_lms_coefficient(4, i, j) for j in range(4)])
        exact_error = max(exact_error, np.abs(ours / exact - 1.0).max())
        error = max(error, np.abs(theirs / exact - 1.0).max())
    assert exact_error < 1e-10
    assert 1e-7 < error < 1e-4


def test_a_plan_ends_where_ipndm_scheduler_ends():
    schedule = fd.schedules.Custom(
        alpha=lambda t: np.sqrt(1.0 - np.sin(0.5 * np.pi * t) ** 4),
        sigma=lambda t: np.sin(0.5 * np.pi * t) ** 2,
        grid_range=(0.02, 0.98),
    )
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(12)
    times = np.linspace(0.95, 0.05, 13)
    scheduler.betas = torch.tensor(schedule.sigma(times))
    scheduler.alphas = torch.tensor(schedule.alpha(times))
    scheduler.timesteps = torch.tensor(times[:-1])
    network = MIXTURE.network(schedule, "v")  # its epsilon is sigma x + alpha v
    plan = fd.plan(schedule, "IPNDMScheduler", 12, grid=times, prediction="v")
    theirs = follow(scheduler, network, X)
    np.testing.assert_allclose(fd.sample(network, X, plan), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler"])
def test_a_plan_ends_where_singlestep_schedulers_end(name, steps):
    made = {"timestep_spacing": "trailing"} if name.startswith("K") else {}
    scheduler = getattr(diffusers, name)(1000, **SD, **made)
    scheduler.set_timesteps(steps)
    told = scheduler.timesteps.double().numpy()
    times = [*((told[::2] if made else told) + 1) / 1000, 0.0]
    network = MIXTURE.network(SCHEDULE)
    plan = fd.plan(SCHEDULE, name, steps, grid=times)
    x = X / float(SCHEDULE.alpha(times[0])) if made else X
    theirs = follow(scheduler, lambda x, t: network(x.double(), t), x)
    assert plan.nfe == len(told)
    np.testing.assert_allclose([stage.model_time for stage in plan.stages], told, atol=1e-3)
    # their tables are float32
    np.testing.assert_allclose(fd.sample(network, X, plan), theirs, rtol=0, atol=1e-5)
