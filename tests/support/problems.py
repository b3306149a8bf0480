# SPDX-License-Identifier: Apache-2.0
"""Problems with known solutions, on which solvers are measured."""

import functools

import numpy as np
import torch

import fastdiff as fd

VP = fd.schedules.VPLinear()
FLOW = fd.schedules.FlowMatching()
T_MAX, T_MIN = 0.8, 0.05
# Several variances, because the leading error of one scalar problem may change sign.
GAUSSIAN = np.array([0.4, 0.5, 0.6, 0.7])
WEIGHTS = [0.5, 0.3, 0.2]
MEANS = [[1.0, -0.5, 0.3, 0.8], [-0.9, 0.6, -1.1, 0.2], [0.2, 1.4, 0.5, -1.0]]
VARIANCES = [[0.04, 0.09, 0.05, 0.16], [0.1, 0.05, 0.08, 0.06], [0.07, 0.12, 0.25, 0.05]]


@functools.cache
def problem(name):
    """(network, x at T_MAX, exact x at T_MIN) of the flow for "gaussian" or "mixture" data."""
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if name == "gaussian":
        model = fd.models.GaussianMixture([1.0], [[0.0] * 4], GAUSSIAN[None])
        scale = [np.hypot(np.sqrt(GAUSSIAN) * VP.alpha(t), VP.sigma(t)) for t in (T_MAX, T_MIN)]
        return model.network(VP), x, x * torch.from_numpy(scale[1] / scale[0])
    network = fd.models.GaussianMixture(WEIGHTS, MEANS, VARIANCES).network(VP)
    fine = fd.plan(VP, "dopri5", 800, grid="logsnr", t_max=T_MAX, t_min=T_MIN)
    return network, x, fd.sample(network, x, fine)


@functools.cache
def flow_problem():
    """(network, x at t = 1, exact x at t = 0) of the mixture's flow on FlowMatching."""
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    network = fd.models.GaussianMixture(WEIGHTS, MEANS, VARIANCES).network(FLOW, "velocity")
    fine = fd.plan(FLOW, "dopri5", 800, prediction="velocity")
    return network, x, fd.sample(network, x, fine)


def two_blobs(schedule, prediction):
    """The network of a mixture of two Gaussians in the plane."""
    means, variances = [[1.0, -1.0], [0.5, 2.0]], [[0.1] * 2, [0.3] * 2]
    return fd.models.GaussianMixture([0.4, 0.6], means, variances).network(schedule, prediction)


def slope(errors):
    """Order from the errors at a number of steps and at twice that number."""
    return float(np.log2(errors[0] / errors[1]))
