# SPDX-License-Identifier: Apache-2.0
"""A run as one operation of autograd: what a sampler calls for a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..capture import Captures
from ..conditioning import tensors_in, varies
from ..engine.call import Call, seeds_on
from ..engine.job import Job
from ..plans import Transposed, alternates
from .backward import backward
from .captured import captured_run, check_once
from .flow import adjoint_of, check_guidance, on_the_plans_times
from .named import check_hidden, check_versions
from .options import AdjointDEIS, Discrete
from .pools import Pools
from .trace import Trace


def differentiable(
    job: Job,
    gradient: Discrete | AdjointDEIS,
    call: Call,
    pools: Pools,
    params: tuple[torch.Tensor, ...],
    captures: Captures | None = None,
) -> torch.Tensor:
    """A run whose result autograd can differentiate.

    Calls and backward passes may happen at once, in several threads, and inside one another.

    Args:
        job: What is sampled.
        gradient: How the run is differentiated.
        call: What the caller gave; its conditioning is that of the samples.
        pools: Where runs come from; a sampler has one for all its calls.
        params: Tensors besides x, the conditioning and the extra registers that want a gradient.
        captures: Where the two graphs of a captured run are kept; None: the run is eager.

    Returns:
        The sample, like x.

    Raises:
        ValueError: No tensor requires grad, or one does where no gradient reaches it; or the
            gradient cannot pass what the plan does.
        NotImplementedError: The plan or the call has what this gradient does not serve.
        RuntimeError: The network cannot be captured.
    """
    if call.xi is not None:
        raise NotImplementedError(
            "sample: the backward pass draws noise again from seed=; got xi=. Give seed=, or "
            'gradient="backprop".'
        )
    plan, guidance, x = job.plan, job.guidance, call.x
    check_hidden(call.cond)
    check_hidden(guidance.conditions_given(), "uncond")
    cond = guidance.conditions(call.cond, call.batch)
    if isinstance(gradient, AdjointDEIS):
        check_guidance(guidance, plan)
        if varies(cond):
            gradient = on_the_plans_times(gradient, plan)
        adjoint_of(gradient, plan, pools.recent)  # says what it cannot do
    elif gradient.undo and not alternates(plan.stages):
        raise ValueError(
            "Discrete: undo=True needs a plan whose every stage moves one of x and e from the "
            f'other, such as "rex-1"; got {plan.solver}. Use that, or checkpoint=.'
        )
    extras = tuple(
        r if isinstance(r, torch.Tensor) else torch.as_tensor(r, device=x.device)
        for r in call.extras
    )
    if isinstance(gradient, Discrete):
        _check_owed(plan.transpose(), extras)
    named = (*params, *tensors_in(cond), *extras)
    if not any(tensor.requires_grad for tensor in (x, *named)):
        raise ValueError(
            f"sample: gradient={gradient!r} differentiates with respect to tensors that require "
            "grad; got none in x, cond, extras and the parameters. Call x.requires_grad_(), name "
            "tensors in params=, or use gradient=None."
        )
    if call.batch == 0:
        return x.clone()
    seeds = None if call.seed is None else seeds_on(x.device, call.seed, call.batch).clone()
    call = replace(call, cond=cond, seed=seeds, extras=extras)
    if captures is not None:
        return captured_run(job, gradient, call, params, pools.recent, captures)
    call = replace(call, x=x.detach())
    trace = Trace(job, gradient, call, params, pools, pools.recent, x.requires_grad)
    return _Function.apply(trace, x, *named)


def _check_owed(transposed: Transposed, extras: Sequence[torch.Tensor]) -> None:
    """Raises where an entry of the bank wants a gradient that the table does not hold."""
    for k in sorted(transposed.unowed):
        if k < len(extras) and extras[k].requires_grad:
            raise NotImplementedError(
                "sample: an entry of the bank that multiplies x, e, h or an earlier output has no "
                f"gradient in the transposed table; got extras[{k}] that requires grad, and "
                f'{transposed.solver} has such a product. Detach it, or use gradient="backprop".'
            )


class _Function(torch.autograd.Function):
    """A run as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, x: torch.Tensor, *named: torch.Tensor) -> torch.Tensor:
        result, kept = trace.forward()
        ctx.save_for_backward(*kept)
        ctx.trace = trace
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        check_once()
        trace = ctx.trace
        check_versions(trace.named, trace.versions)
        _, *kept = ctx.saved_tensors  # the times, which are looked at for writes, come first
        return None, *backward(trace, cotangent, kept)
