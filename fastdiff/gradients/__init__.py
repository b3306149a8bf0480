# SPDX-License-Identifier: Apache-2.0
"""Gradients of samples: with respect to the start, the conditioning and the network's parameters.

All of them hold the activations of one network evaluation at a time. `Discrete` differentiates the
numbers that the sampler computed: the plan transposed (`fastdiff.plans.transpose`), one evaluation
and one vector-Jacobian product a stage. `AdjointDEIS` solves the continuous adjoint equations of
the probability-flow ODE on a grid of its own, by the transposed rows of an exponential integrator:
the same backward stages, at states of the forward run. Both run on the backend of the forward run.
"""

from .autograd import differentiable
from .options import AdjointDEIS, Discrete, Gradient, gradient_of, parameters_of
from .pools import Pools

__all__ = [
    "AdjointDEIS",
    "Discrete",
    "Gradient",
    "Pools",
    "differentiable",
    "gradient_of",
    "parameters_of",
]
