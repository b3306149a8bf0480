# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver-v3 ends where the authors' own code ends, to 1e-9, with their statistics."""

import numpy as np
import pytest
from support.statistics import PUBLISHED, VP, published, sampled

import fastdiff as fd

CASES = {case["key"]: case for case in PUBLISHED["cases"]}
SWITCHES = ("degenerated", "p_pseudo", "use_corrector", "c_pseudo", "lower_order_final")
GRIDS = {"time_uniform": "uniform", "logSNR": "logsnr"}


def plan_of(case, statistics, **options):
    p = case["params"]
    given = {name: p[name] for name in SWITCHES} | {"published": True} | options
    name, grid = f"dpm-v3-{p['order']}", GRIDS[p["skip_type"]]
    return fd.plan(VP, name, p["steps"], grid=grid, statistics=statistics, **given)


@pytest.mark.parametrize("key", CASES)
def test_plan_ends_where_the_published_code_ends(key):
    case, statistics = CASES[key], published()
    plan = plan_of(case, statistics)
    np.testing.assert_allclose(plan.times, case["grid"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        statistics.lambda_grid[case["indexes"]], VP.lambda_t(plan.times), rtol=0, atol=1e-10
    )
    assert plan.nfe == len(plan.stages) == case["nfe"]
    np.testing.assert_allclose(sampled(plan, statistics).numpy(), case["x"], rtol=0, atol=1e-9)


def test_every_option_is_among_the_cases():
    seen = [(c["params"]["order"], *(c["params"][n] for n in SWITCHES)) for c in CASES.values()]
    for column in zip(*seen, strict=True):
        assert len(set(column)) > 1 or column[0] is True  # all lower their last steps
    assert any(stage.products == () for c in CASES.values() for stage in _stages(c))
    assert max(len(stage.products) for c in CASES.values() for stage in _stages(c)) == 8


def _stages(case):
    return plan_of(case, published()).stages


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_published_grid_without_statistics_is_theirs_of_120_intervals(order):
    options = {"published": True, "grid": "uniform", "c_pseudo": True}
    ours = fd.plan(VP, f"dpm-v3-{order}", 6, **options)
    statistics = published()
    given = fd.plan(VP, f"dpm-v3-{order}", 6, statistics=statistics, degenerated=True, **options)
    for stage, other in zip(ours.stages, given.stages, strict=True):
        np.testing.assert_allclose(stage.b, other.b, rtol=0, atol=1e-9)


def test_published_trapezoids_differ_from_the_exact_integrals():
    # were `published` ignored, no case could pass
    case, statistics = CASES["dpmv3/3/deg0_pp0_uc1_cp1/uniform_t/6"], published()
    theirs = sampled(plan_of(case, statistics), statistics)
    exact = fd.plan(
        VP, "dpm-v3-3", 6, grid=case["grid"], statistics=statistics, c_pseudo=True,
        lower_order_final=True,
    )  # fmt: skip
    assert 1e-6 < float((sampled(exact, statistics) - theirs).abs().max()) < 1e-2
    # and the authors' trapezoids on a grid eight times finer are nearer to ours
    fine = np.linspace(statistics.lambda_grid[0], statistics.lambda_grid[-1], 961)
    parts = [
        np.stack([np.interp(fine, statistics.lambda_grid, v[:, d]) for d in range(8)], 1)
        for v in (statistics.l, statistics.s, statistics.b)
    ]
    finer = fd.tune.Statistics(VP, *parts, fine)
    options = {"published": True, "c_pseudo": True}
    plan = fd.plan(VP, "dpm-v3-3", 6, grid=case["grid"], statistics=finer, **options)
    near = sampled(plan, finer)
    change = [float((sampled(exact, statistics) - x).abs().max()) for x in (theirs, near)]
    assert change[1] < 0.1 * change[0]
