# SPDX-License-Identifier: Apache-2.0
"""The published tables: our plans end where the authors' own code ends, to 1e-9.

`data/published.json` holds final states that each named repository computed in float64 on a
Gaussian mixture; see its `about` and each case's `source`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff as fd

DATA = json.loads((Path(__file__).parent / "data" / "published.json").read_text())
CASES = {case["key"]: case for case in DATA["cases"]}
VP = fd.schedules.VPLinear(beta_min=0.1, beta_max=20.0)
GRIDS = {"time_uniform": "uniform", "logSNR": "logsnr", "time_quadratic": "quadratic"}
TABLEAUS = {
    "2heun": "heun",
    "3kutta": "kutta3",
    "3heun": "heun3",
    "3ral": "ralston3",
    "3vdh": "vdh3",
    "3ssprk": "ssprk3",
    "4rk": "rk4",
}


def plan_of(case):
    """(plan, start scale, final scale) for a published case."""
    p, grid, steps = case["params"], case["grid"], len(case["grid"]) - 1
    family = case["family"]
    if family in ("dpmsolver", "dpmsolverpp"):
        prefix = "dpm" if family == "dpmsolver" else "dpmpp"
        order, options = p["order"], {"grid": GRIDS[p["skip_type"]], "t_min": 1e-3}
        if order == 1:
            return fd.plan(VP, f"{prefix}-1", 6, **options)
        options |= {"published": True, "solver_type": p["solver_type"]}
        if p["method"] == "multistep":
            options["lower_order_final"] = p["lower_order_final"]
            return fd.plan(VP, f"{prefix}-{order}m", 6, **options)
        suffix = "s" if prefix == "dpmpp" else ""
        return fd.plan(VP, f"{prefix}-{order}{suffix}", 6, method=p["method"], **options)
    if family in ("deis_t_ab", "deis_t_ab_exactquad"):
        published = family == "deis_t_ab"
        return fd.plan(VP, f"deis-{p['ab_order'] + 1}", steps, grid=grid, published=published)
    if family == "deis_rho_ab":
        return fd.plan(VP, f"deis-rhoab-{p['ab_order'] + 1}", steps, grid=grid, published=True)
    if family == "deis_rho_rk":
        return fd.plan(VP, f"deis-{TABLEAUS[p['rk_method']]}", steps, grid=grid)
    if family == "deis_ipndm":
        return fd.plan(VP, "ipndm-4", steps, grid=grid)
    if family == "diffusers_deis":
        lower = p["lower_order_final"]
        name = f"deis-logrho-{p['solver_order']}"
        return fd.plan(VP, name, steps, grid=grid, lower_order_final=lower)
    if family == "diffusers_dpm":
        prefix, suffix = ("dpm", "") if p["algorithm_type"] == "dpmsolver" else ("dpmpp", "s")
        rule = {"midpoint": "dpmsolver", "heun": "taylor"}[p["solver_type"]]
        options = {"published": True, "method": "diffusers", "solver_type": rule}
        return fd.plan(VP, f"{prefix}-{p['solver_order']}{suffix}", steps, grid=grid, **options)
    if family == "diffusers_zero_final":
        name = {2: "DPMSolverMultistepScheduler", 3: "dpmpp-3m"}[p["solver_order"]]
        return fd.plan(VP, name, steps + 1, grid=[*grid, 0.0], lower_order_final=True)
    if family == "flow":
        flow = fd.schedules.FlowMatching()
        return fd.plan(flow, "euler", steps, grid=grid, prediction="velocity")
    edm = fd.schedules.EDM()
    if case["key"] == "kdiff/dpm_fast/6":
        ends = {"t_max": grid[0], "t_min": grid[-1]}
        return fd.plan(edm, "dpm-3", 6, grid="logsnr", published=True, **ends)
    name, options = {
        "edm/heun": ("heun", {}),
        "kdiff/dpm_2": ("dpm_2", {}),
        "kdiff/dpmpp_2m": ("dpmpp_2m", {}),
        "kdiff/dpmpp_3m_sde_eta0.0": (
            "dpmpp-3m",
            {"lower_order_final": False, "solver_type": "taylor", "published": True},
        ),
        "diffsampler/ipndm_sampler": ("ipndm-3", {}),
    }["/".join(case["key"].split("/")[:2])]
    return fd.plan(edm, name, steps, grid=grid, **options)


def network_of(model, plan, schedule):
    mixture = fd.models.GaussianMixture(model["weights"], model["means"], model["variances"])
    return mixture.network(schedule, plan.prediction)


@pytest.mark.parametrize("key", CASES)
def test_plan_ends_where_the_published_code_ends(key):
    case = CASES[key]
    plan = plan_of(case)
    edm = isinstance(plan.schedule, fd.schedules.EDM)
    x = torch.tensor(DATA["xT"], dtype=torch.float64)
    if edm:
        x = x / float(VP.alpha(1.0))
    got = fd.sample(network_of(DATA["model"], plan, plan.schedule), x, plan)
    if edm and plan.times[-1] > 0.0:  # these cases are listed in VP scaling
        got = got * float(VP.alpha(1e-3))
    assert plan.nfe == case["nfe"]
    np.testing.assert_allclose(got.numpy(), case["x"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DATA["stochastic"]["runs"])
def test_stochastic_plan_ends_where_the_published_code_ends(name):
    data, run = DATA["stochastic"], DATA["stochastic"]["runs"][name]
    t = np.arange(1, 1001) / 1000
    schedule = fd.schedules.VPDiscrete(alphas_cumprod=VP.alpha(t) ** 2)
    grid = (np.array(run["grid"]["index"]) + 1.0) / 1000
    if name.startswith("ddim"):
        plan = fd.plan(schedule, "ddim", run["steps"], grid=grid, eta=run["params"]["eta"])
    else:
        options = {"variance": "fixed_large", "clip": 1.0, "published": True}
        plan = fd.plan(schedule, "ddpm", run["steps"], grid=grid, **options)
    z = torch.tensor(data["z"], dtype=torch.float64)
    x = torch.tensor(data["xT"], dtype=torch.float64)
    got = fd.sample(network_of(data["model"], plan, schedule), x, plan, xi=z[run["noise_index"]])
    np.testing.assert_allclose(got.numpy(), run["x_final"], rtol=0, atol=1e-9)


def test_published_integrals_differ_from_the_exact_ones():
    # were `published` ignored, both cases of a grid could not pass
    exact = fd.plan(VP, "deis-4", 6, grid="uniform")
    riemann = fd.plan(VP, "deis-4", 6, grid="uniform", published=True)
    pairs = zip(exact.stages, riemann.stages, strict=True)
    change = max(np.abs(np.subtract(a.b, b.b)).max() for a, b in pairs)
    assert 1e-6 < change < 1e-3
