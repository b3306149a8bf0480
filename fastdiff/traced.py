# SPDX-License-Identifier: Apache-2.0
"""A sampling run that torch.compile sees through: the loop in plain tensor operations.

Inside a compiled function `fastdiff.sample` takes this path. The plan's coefficients are constants
of the graph, the network is traced with the loop, and the compiler fuses each stage's update with
whatever stands around it: measured, that costs less than calling the fused kernels as opaque
operators, which the compiler would have to order, functionalise and copy for. Only noise, whose
counter arithmetic no compiler fuses well, is an operator: `torch.ops.fastdiff.normal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import reference
from .guidance import CFG
from .plans import Plan, plan_of

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
    """A function is compiled anew for another handle, and guards nothing else of a plan."""
    return reference.constants(plan_of(handle))


@torch.compiler.assume_constant_result
def draws(handle: str) -> bool:
    """Whether a plan is stochastic."""
    return plan_of(handle).stochastic


def sample(
    network: Callable[..., torch.Tensor],
    x: torch.Tensor,
    plan: Plan,
    cond: Any,
    guidance: CFG | None,
    seed: Any,
    xi: Any,
    extras: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `reference.sample`."""
    constants, normal = _constants(plan.handle), torch.ops.fastdiff.normal
    given = (network, x, constants, cond, guidance, seed, xi, extras, dtype, normal)
    return reference.sample(*given)
