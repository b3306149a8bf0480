# SPDX-License-Identifier: Apache-2.0
"""EDM's, k-diffusion's and diff-sampler's own final states, to 1e-9; see `data/multi.json`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff as fd

FOLDER = Path(__file__).parent / "data"
PROBLEM = json.loads((FOLDER / "published.json").read_text())
CASES = {case["key"]: case for case in json.loads((FOLDER / "multi.json").read_text())["cases"]}
VP = fd.schedules.VPLinear(beta_min=0.1, beta_max=20.0)
EDM = fd.schedules.EDM()
FULL = {"lower_order_final": False}
# function -> (name here, options)
K_DIFFUSION = {
    "euler": ("sample_euler", {}),
    "heun": ("sample_heun", {}),
    "dpm_2": ("sample_dpm_2", {}),
    "lms_order3": ("lms-3", {}),
    "lms_order4": ("sample_lms", {}),
    "dpmpp_2m": ("sample_dpmpp_2m", {}),
    "dpmpp_2s_ancestral_eta0.0": ("dpmpp-2s", {}),
    "dpmpp_sde_eta0.0": ("dpmpp-2s", {}),
    "dpmpp_2m_sde_eta0.0_solver_typemidpoint": ("dpmpp-2m", FULL),
    "dpmpp_2m_sde_eta0.0_solver_typeheun": ("res_multistep", {}),
    "dpmpp_3m_sde_eta0.0": ("dpmpp-3m", FULL | {"solver_type": "taylor", "published": True}),
}


def plan_of(case):
    package, function = case["key"].split("/")[:2]
    grid, steps = case["grid"], len(case["grid"]) - 1
    if function == "dpm_fast":
        ends = {"t_max": grid[0], "t_min": grid[-1]}
        return fd.plan(EDM, "sample_dpm_fast", case["params"]["n"], grid="logsnr", **ends)
    if package == "diffsampler":
        order = case["params"]["max_order"]
        if function == "ipndm_sampler":
            return fd.plan(EDM, f"ipndm-{order}", steps, grid=grid)
        options = {"published": True} if order > 2 else {}
        return fd.plan(EDM, f"ipndm-v-{order}", steps, grid=grid, **options)
    name, options = (function, {}) if package == "edm_ablation" else K_DIFFUSION[function]
    return fd.plan(EDM, name, steps, grid=grid, **options)


@pytest.mark.parametrize("key", CASES)
def test_plan_ends_where_the_published_code_ends(key):
    case = CASES[key]
    plan = plan_of(case)
    model = [PROBLEM["model"][k] for k in ("weights", "means", "variances")]
    network = fd.models.GaussianMixture(*model).network(EDM, plan.prediction)
    x = torch.tensor(PROBLEM["xT"], dtype=torch.float64) / float(VP.alpha(1.0))
    got = fd.sample(network, x, plan)
    if plan.times[-1] > 0.0:
        got = got * float(VP.alpha(1e-3))
    assert plan.nfe == case["nfe"]
    np.testing.assert_allclose(got.numpy(), case["x"], rtol=0, atol=1e-9)
