# SPDX-License-Identifier: Apache-2.0
"""The statistics of DPM-Solver-v3 that the authors' code was run with, and their problem."""

import base64
import json
from pathlib import Path

import numpy as np
import torch

import fastdiff as fd

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = json.loads((DATA / "dpm_v3.json").read_text())
PROBLEM = json.loads((DATA / "published.json").read_text())
VP = fd.schedules.VPLinear(beta_min=0.1, beta_max=20.0)
MODEL = PROBLEM["model"]
MIXTURE = fd.models.GaussianMixture(MODEL["weights"], MODEL["means"], MODEL["variances"])
START = torch.tensor(PROBLEM["xT"], dtype=torch.float64)


def _array(name):
    raw = base64.b64decode(PUBLISHED["ems"][name])
    return np.frombuffer(raw, dtype="<f8").reshape(121, 8)


def published(prediction="epsilon"):
    """The statistics of the mixture's network, as those of a network of this prediction."""
    grid = PUBLISHED["ems"]["lambda_grid"]
    return fd.tune.Statistics(
        VP, _array("l"), _array("s"), _array("b"), grid, prediction=prediction
    )


def sampled(plan, statistics, x=START, network=None, **options):
    """A run of a plan on the mixture's network."""
    network = network or MIXTURE.network(VP, plan.prediction)
    return fd.sample(network, x, plan, extras=statistics.extras(plan, x), **options)
