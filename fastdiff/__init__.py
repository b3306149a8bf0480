# SPDX-License-Identifier: Apache-2.0
"""fastdiff: fast, exact sampling for diffusion and flow models.

A sampler is data: a schedule, a solver and a grid compile to a table of coefficients (`Plan`), and
one fused kernel runs any of them.

    import fastdiff as fd

    schedule = fd.schedules.VPLinear(beta_min=0.1, beta_max=20.0)
    plan = fd.plan(schedule, "deis-3", steps=10, prediction="epsilon")
    x = fd.noise.prior(plan, (64, 1, 8, 8), seeds=0)
    images = fd.sample(network, x, plan)
"""

import torch as _torch  # noqa: F401  before the compiled core: one OpenMP runtime

from . import backends, grids, models, noise, schedules, solvers, tune
from .batcher import Batcher
from .capture import Graph
from .conditioning import PerStage
from .engine.adapted import Adapted, adaptive
from .gradients import AdjointDEIS, Discrete
from .guidance import CFG
from .plans import Measure, Plan, Product, Reduction, Stage
from .sampler import Sampler, sample
from .solvers import plan

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "Adapted",
    "AdjointDEIS",
    "Batcher",
    "Discrete",
    "Graph",
    "Measure",
    "PerStage",
    "Plan",
    "Product",
    "Reduction",
    "Sampler",
    "Stage",
    "adaptive",
    "backends",
    "grids",
    "models",
    "noise",
    "plan",
    "sample",
    "schedules",
    "solvers",
    "tune",
]
