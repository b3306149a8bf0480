# SPDX-License-Identifier: Apache-2.0
"""What diffusers 0.42.1 gets wrong, measured on its own schedulers, beside what is right here."""

import importlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support import problems
from support.problems import T_MAX, T_MIN, VP

import fastdiff as fd
from fastdiff.bench.flows import Flow

diffusers = pytest.importorskip("diffusers", reason="pip install 'fastdiff-engine[bench]'")


@pytest.fixture
def theirs(monkeypatch):
    """`rivals.diffusers`, which runs diffusers' schedulers over the times of a plan."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent.parent / "benchmarks")])
    return importlib.import_module("rivals.diffusers")


def states(scheduler, steps, x):
    """The states that a scheduler goes through with a network that says a tenth of each."""
    found = [x]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about diffusers' use of it
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            found.append(scheduler.step(0.1 * found[-1], t, found[-1]).prev_sample)
    return found


@pytest.mark.parametrize("name", ["dpmpp-3m", "dpm-3m"])
def test_third_order_multistep_is_of_order_two_there_and_three_here(name, theirs):
    network, x, exact = problems.problem("mixture")
    flow = Flow("", network, "epsilon", x)
    errors = {"theirs": [], "ours": []}
    for steps in (80, 160):  # their state is float32: finer grids measure its rounding
        options = {"grid": "logsnr", "t_max": T_MAX, "t_min": T_MIN, "lower_order_final": False}
        plan = fd.plan(VP, name, steps, **options)
        state = theirs.final_state(name, plan, flow, lower_order_final=False)
        errors["theirs"].append(float((state.double() - exact).norm()))
        errors["ours"].append(float((fd.sample(network, x, plan) - exact).norm()))
    assert problems.slope(errors["theirs"]) < 2.4
    assert problems.slope(errors["ours"]) > 2.9


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_deis_wastes_its_last_evaluation_there(sigmas):
    scheduler = diffusers.DEISMultistepScheduler(**{sigmas: True})
    *_, before, after = states(scheduler, 6, torch.linspace(-1.0, 1.0, 8)[None])
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)  # the sixth step stands still
    schedule = fd.schedules.VPDiscrete.linear()
    grid = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}[sigmas]
    plan = fd.plan(schedule, "deis-logrho-2", 6, grid=grid)
    assert np.all(np.diff(plan.times) < 0)
    again = [float(schedule.t_of_lambda(-np.log(float(s)))) for s in scheduler.sigmas]
    with pytest.raises(ValueError, match="decreas"):
        fd.plan(schedule, "deis-logrho-2", 6, grid=again)


def test_the_resolution_shift_is_applied_twice_to_the_lower_end_there():
    def shifted(t, shift=3.0):
        return shift * t / (1.0 + (shift - 1.0) * t)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    states(scheduler, 6, torch.ones(1, 4))
    assert float(scheduler.sigmas[-2]) == pytest.approx(shifted(shifted(1e-3)), rel=1e-4)
    flow = fd.schedules.FlowMatching()
    plan = fd.plan(flow, "euler", 5, grid="shift(3)", t_min=shifted(1e-3), prediction="velocity")
    even = np.linspace(1.0, 1e-3, 6)
    np.testing.assert_allclose(plan.times, shifted(even), rtol=1e-12)
