# SPDX-License-Identifier: Apache-2.0
"""A sampling run that torch.compile sees through: the loop in plain tensor operations.

Inside a compiled function `fastdiff.sample` takes this path. The plan's coefficients are constants
of the graph, the network is traced with the loop, and the compiler fuses each stage's update with
whatever stands around it: measured, that costs less than calling the fused kernels as opaque
operators, which the compiler would have to order, functionalise and copy for. Only noise, whose
counter arithmetic no compiler fuses well, is an operator: `torch.ops.fastdiff.normal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..plans import living
from . import reference
from .call import Call
from .job import Job

_library = torch.library.Library("fastdiff", "DEF")
_library.define("normal(Tensor seeds, int stream, SymInt[] shape, ScalarType dtype) -> Tensor")


def _normal_meta(
    seeds: torch.Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    return seeds.new_empty(shape, dtype=dtype)


_library.impl("normal", reference.normal, "CompositeExplicitAutograd")
_library.impl("normal", _normal_meta, "Meta")


@torch.compiler.assume_constant_result
def _constants(handle: str) -> reference.Constants:
    """The constants of a plan. A function is compiled anew for another handle alone."""
    return reference.constants(living(handle))


@torch.compiler.assume_constant_result
def _draws(handle: str) -> bool:
    """Whether a plan is stochastic."""
    return bool(living(handle).stochastic)


def sample(job: Job, call: Call, gradient: Any, out: torch.Tensor | None) -> torch.Tensor:
    """A run inside a compiled function. Its refusals are raised while the function is compiled."""
    if call.callback is not None or call.progress or call.check:
        raise ValueError(
            "sample: inside torch.compile a run cannot be looked into; got callback=, progress= or "
            "check=. Leave them out, or sample outside the compiled function."
        )
    if call.offset:
        raise NotImplementedError(
            "sample: inside torch.compile a sample is whole; got offset=. Sample outside the "
            "compiled function."
        )
    if call.seed is None and call.xi is None and _draws(job.plan.handle):
        raise ValueError(
            "sample: the plan draws noise. Give seed= (an integer, or one a sample), or the noise "
            "itself as xi=."
        )
    tracked = gradient is not None and torch.is_grad_enabled()
    if tracked and not (isinstance(gradient, str) and gradient == "backprop"):
        raise NotImplementedError(
            "sample: inside torch.compile a run is differentiated by the compiler; got another "
            'gradient than "backprop". Use that, or sample outside the compiled function.'
        )
    x = call.x
    if torch.is_grad_enabled() and x.requires_grad and not tracked:
        raise ValueError(
            "sample: gradient=None does not track, and x requires grad. Detach it or sample under "
            "torch.no_grad()."
        )
    constants, normal = _constants(job.plan.handle), torch.ops.fastdiff.normal
    with torch.set_grad_enabled(tracked):
        result = reference.sample(
            *(job.network, constants, job.guidance, call, job.input_dtype(x), normal)
        )
    return result if out is None else out.copy_(result)
