# SPDX-License-Identifier: Apache-2.0
"""UniPC: the authors' tables, the mended corrector, its stages, and what is refused."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support import problems
from support.problems import T_MAX, T_MIN, VP, two_blobs

import fastdiff as fd

DATA = Path(__file__).parent / "data"
COMMON = json.loads((DATA / "published.json").read_text())
CASES = {case["key"]: case for case in json.loads((DATA / "unipc.json").read_text())["cases"]}


def plan_of(case):
    p, grid = case["params"], case["grid"]
    if case["family"] == "unipc":
        form = {"data_prediction": "x0", "noise_prediction": "epsilon"}[p["algorithm_type"]]
        options = {"form": form, "variant": p["variant"], "published": True}
        options["lower_order_final"] = p["lower_order_final"]
        return fd.plan(VP, f"unipc-{p['order']}", len(grid) - 1, grid=grid, **options)
    options = {"lower_order_final": True}
    if case["family"] == "diffusers_zero_final":
        grid = [*grid, 0.0]
    else:
        form = "x0" if p["predict_x0"] else "epsilon"
        options |= {"variant": p["solver_type"], "form": form}
    return fd.plan(VP, f"unipc-{p['solver_order']}", len(grid) - 1, grid=grid, **options)


@pytest.mark.parametrize("key", CASES)
def test_plan_ends_where_the_published_code_ends(key):
    case, plan, model = CASES[key], plan_of(CASES[key]), COMMON["model"]
    mixture = fd.models.GaussianMixture(model["weights"], model["means"], model["variances"])
    got = fd.sample(mixture.network(VP), torch.tensor(COMMON["xT"], dtype=torch.float64), plan)
    assert plan.nfe == case["nfe"]
    np.testing.assert_allclose(got.numpy(), case["x"], rtol=0, atol=1e-9)


def measured(name, steps=160, **options):
    network, x, exact = problems.problem("gaussian")
    errors = [
        float((fd.sample(network, x, fd.plan(VP, name, n, **SPAN, **options)) - exact).norm())
        for n in (steps, 2 * steps)
    ]
    return problems.slope(errors)


SPAN = {"grid": "logsnr", "t_max": T_MAX, "t_min": T_MIN}


@pytest.mark.parametrize("order", [2, 3])
def test_the_corrector_of_vary_coeff_is_of_order_one_as_published(order):
    options = {"variant": "vary_coeff", "warmup": "runge-kutta", "lower_order_final": False}
    assert measured(f"unipc-{order}", **options) > order + 0.75
    assert measured(f"unipc-{order}", published=True, **options) < 1.3


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_corrector_adds_one_to_the_order(order):
    options = {"warmup": "runge-kutta"}
    assert measured(f"unipc-{order}", corrector=False, **options) == pytest.approx(order, abs=0.25)
    assert measured(f"unipc-{order}", **options) == pytest.approx(order + 1, abs=0.25)


def test_the_default_warmup_caps_the_order():
    # one corrected first-order step leaves h³ behind
    assert measured("unipc-4", corrector=False) < 3.0


@pytest.mark.parametrize("form", ["x0", "epsilon"])
def test_the_predictor_alone_is_a_solver_of_the_dpm_family(form):
    prefix = {"x0": "dpmpp", "epsilon": "dpm"}[form]
    common = {"grid": "logsnr", "lower_order_final": False}
    for order, rule in ((2, "dpmsolver"), (3, "dpmsolver")):
        options = {"form": form, "corrector": False, **common}
        ours = fd.plan(VP, f"unipc-{order}", 8, **options)
        theirs = fd.plan(VP, f"{prefix}-{order}m", 8, solver_type=rule, **common)
        for stage, same in zip(ours.stages, theirs.stages, strict=True):
            np.testing.assert_allclose(stage.b, same.b, rtol=1e-12)
            assert stage.a_x == same.a_x
    varied = fd.plan(VP, "unipc-2", 8, variant="vary_coeff", form=form, corrector=False, **common)
    exact = fd.plan(VP, f"{prefix}-2m", 8, solver_type="taylor", **common)
    for stage, same in zip(varied.stages, exact.stages, strict=True):
        np.testing.assert_allclose(stage.b, same.b, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["x0", "epsilon"])
def test_a_correction_and_the_next_prediction_are_one_stage(order, form):
    plan = fd.plan(VP, f"unipc-{order}", 9, grid="logsnr", form=form)
    assert len(plan.stages) == plan.nfe == plan.steps == 9
    assert [stage.t for stage in plan.stages] == [*plan.times[:-1]]
    both = [stage.writes_x and stage.writes_e for stage in plan.stages]
    assert both == [False, *[True] * 7, False]


def loop(network, x, times, order):
    """UniPC in x0 form with both steps as exact integrals, written as two separate updates."""
    lam = VP.lambda_t(times)
    known, at = [], []

    def integral(s, t, nodes, values):
        """alpha_t times the integral over the step of the polynomial through the values."""
        points, weights = np.polynomial.legendre.leggauss(20)
        u = 0.5 * (lam[s] + lam[t]) + 0.5 * (lam[t] - lam[s]) * points
        kernel = 0.5 * (lam[t] - lam[s]) * weights * np.exp(u - lam[t])
        total = 0.0
        for j, value in enumerate(values):
            others = [lam[m] for m in nodes if m != nodes[j]]
            basis = np.prod([(u - o) / (lam[nodes[j]] - o) for o in others], axis=0)
            total = total + float((kernel * basis).sum()) * value
        return float(VP.alpha(times[t])) * total

    predicted = x
    for i in range(len(times) - 1):
        said = network(predicted, torch.full((len(x),), times[i], dtype=torch.float64))
        if i:  # correct the step that led here, from the old x
            nodes = [i, *at[:order]][: order + 1]
            part = integral(i - 1, i, nodes, [said, *known[:order]])
            x = float(VP.sigma(times[i]) / VP.sigma(times[i - 1])) * x + part
        known, at = [said, *known], [i, *at]
        count = min(order, len(known))
        part = integral(i, i + 1, at[:count], known[:count])
        predicted = float(VP.sigma(times[i + 1]) / VP.sigma(times[i])) * x + part
    return predicted


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plan_is_the_papers_loop(order):
    plan = fd.plan(
        *(VP, f"unipc-{order}", 7),
        **{**SPAN, "variant": "vary_coeff", "prediction": "x0"},
        lower_order_final=False,
    )
    network = two_blobs(VP, "x0")
    x = fd.noise.prior(plan, (5, 2), seeds=0, dtype=torch.float64)
    wanted = loop(network, x, np.array(plan.times), order)
    torch.testing.assert_close(fd.sample(network, x, plan), wanted, rtol=1e-11, atol=1e-11)


def test_steps_that_are_named_are_not_corrected():
    plan = fd.plan(VP, "unipc-3", 8, disable_corrector=[0, 2])
    assert [stage.writes_e for stage in plan.stages] == [False, True, False, *[True] * 4, False]
    every = fd.plan(VP, "unipc-3", 8, disable_corrector=range(7))
    assert every.stages == fd.plan(VP, "unipc-3", 8, corrector=False).stages


def test_a_step_from_or_to_an_infinite_lambda_is_of_first_order():
    flow = fd.schedules.FlowMatching()
    plan = fd.plan(flow, "unipc-3", 6, prediction="velocity")
    assert (plan.times[0], plan.times[-1]) == (1.0, 0.0)
    first, second = plan.stages[:2]
    half = 0.5 * (1.0 - plan.times[1])  # of alpha: the exact weight of a straight x0 in alpha/sigma
    assert first.writes_e
    assert second.b == pytest.approx((half, half), abs=1e-15)
    plain = fd.plan(flow, "unipc-3", 6, prediction="velocity", variant="bh1")
    assert not plain.stages[0].writes_e  # its B(h) is infinite
    assert len(plain.stages[0].b) == len(plain.stages[1].b or plain.stages[1].g) == 1
    for form in ("x0", "epsilon"):
        plan = fd.plan(fd.schedules.EDM(), "unipc-3", 6, form=form, lower_order_final=False)
        assert plan.stages[-1].writes_x
        assert all(np.isfinite(stage.b).all() for stage in plan.stages)


@pytest.mark.parametrize(
    "options", [{"lower_order_final": False}, {"predict_x0": False, "lower_order_final": True}]
)
def test_diffusers_is_not_finite_where_the_grid_ends_at_the_data(options):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.UniPCMultistepScheduler(**options)
    x = torch.ones(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about diffusers' use of it
        made.set_timesteps(6)
        for t in made.timesteps:
            x = made.step(0.1 * x, t, x).prev_sample
    assert not torch.isfinite(x).all()
    schedule = fd.schedules.VPDiscrete.linear()
    form = "epsilon" if "predict_x0" in options else "x0"
    lower = options["lower_order_final"]
    plan = fd.plan(schedule, "unipc-2", 6, grid="trailing", form=form, lower_order_final=lower)
    assert plan.times[-1] == 0.0
    assert torch.isfinite(fd.sample(lambda x, t: 0.1 * x, torch.ones(1, 4), plan)).all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"disable_corrector": (7,)}, ValueError, "steps 0 to 6 of 8 are corrected, since"),
        ({"disable_corrector": (-1,)}, ValueError, "the last one never is"),
        ({"disable_corrector": 3}, TypeError, "a sequence of steps, counted from 0; got 3"),
        ({"disable_corrector": (0.5,)}, TypeError, "a sequence of steps"),
        ({"disable_corrector": (0,), "corrector": False}, ValueError, "of a corrector; got"),
        ({"variant": "bh3"}, ValueError, "variant is one of 'bh1', 'bh2', 'vary_coeff'"),
        ({"form": "epsilon", "clip": 1.0}, ValueError, "clip applies to x0"),
        ({"corrector": 1}, ValueError, "corrector is one of False, True"),
    ],
)
def test_what_unipc_cannot_do_is_refused(options, error, says):
    with pytest.raises(error, match=says):
        fd.plan(VP, "unipc-3", 8, **options)


def test_an_order_above_the_steps_is_refused():
    with pytest.raises(ValueError, match=r"unipc-4: .* needs at least as many steps"):
        fd.plan(VP, "unipc-4", 3)


def test_one_step_has_no_corrector_to_leave_out():
    with pytest.raises(ValueError, match=r"unipc-1: no step is corrected, .* and steps = 1\."):
        fd.plan(VP, "unipc-1", 1, disable_corrector=(0,))
