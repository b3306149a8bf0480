# SPDX-License-Identifier: Apache-2.0
"""A call: what its caller gave, checked and carried whole through a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import conditioning, noise
from .._text import shown
from ..plans import Plan

Callback = Callable[[int, float, torch.Tensor, torch.Tensor], Any]
Seeds = int | Sequence[int] | torch.Tensor

_STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OFFSETS = 2**62  # an element's place in a sample is a 64-bit integer


@dataclass(frozen=True)
class Call:
    """What a run is given.

    Attributes:
        x: The state at the plan's first time, [B, ...].
        cond: Conditioning. Whoever makes a call says whether it is that of the samples or that of
            all branches.
        seed: An integer, or one a sample; None for plans without noise.
        xi: Noise given instead of drawn, one tensor a stage; or None.
        extras: The entries of the bank, each broadcastable to x.
        offset: Place of x's first element within the sample that x is a part of.
        callback: Called after every evaluation.
        check: Whether every output is searched for NaN and infinity.
        progress: Whether a bar is shown.
        profiled: Whether a profiler is on, which shows the run's parts.
    """

    x: torch.Tensor
    cond: Any = None
    seed: Any = None
    xi: Any = None
    extras: Sequence[Any] = ()
    offset: int = 0
    callback: Callback | None = None
    check: bool = False
    progress: bool = False
    profiled: bool = False

    @property
    def batch(self) -> int:
        """Samples B."""
        return self.x.shape[0]

    @property
    def one_bank(self) -> bool:
        """Whether every entry of the bank is the same for all samples."""

        def shared(extra: Any) -> bool:
            if not isinstance(extra, torch.Tensor):
                return isinstance(extra, int | float)
            return extra.ndim < self.x.ndim or extra.shape[:1] == (1,)

        return bool(self.extras) and all(map(shared, self.extras))

    @property
    def watched(self) -> bool:
        """Whether the caller looks into the run, so that its stages cannot be one launch."""
        return self.check or self.progress or self.callback is not None or self.xi is not None


def check_state(x: Any) -> None:
    """Raises unless x can be a state."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"sample: x is a tensor; got {type(x).__name__}.")
    if x.dtype not in _STATE_DTYPES:
        raise TypeError(
            f"sample: x is real and floating ({', '.join(map(str, _STATE_DTYPES))}); got "
            f"{x.dtype}. Convert it, e.g. x.float()."
        )
    if x.ndim == 0:
        raise ValueError("sample: x has a batch dimension, [B, ...]; got a scalar tensor.")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"sample: x is a dense tensor; got {x.layout}. Use x.to_dense().")


def check_extras(extras: Any) -> None:
    """Raises unless the entries of the bank are given one by one."""
    if not isinstance(extras, list | tuple):
        raise TypeError(
            "sample: extras is a list or tuple of tensors, one an entry; got "
            f"{type(extras).__name__}. For one entry give extras=(tensor,)."
        )
    for i, extra in enumerate(extras):
        if isinstance(extra, complex) or (isinstance(extra, torch.Tensor) and extra.is_complex()):
            raise TypeError(f"sample: extra registers are real; got a complex extras[{i}].")


def check_call(call: Call, plan: Plan) -> None:
    """Raises where a plan cannot take a call, before anything is run."""
    if call.callback is not None and not callable(call.callback):
        raise TypeError(
            "sample: callback is callable as callback(stage, t, x, x0); got "
            f"{type(call.callback).__name__}."
        )
    if call.check and not bool(torch.isfinite(call.x).all()):
        raise ValueError("sample: x is finite; got NaN or infinity in it.")
    conditioning.check(call.cond, call.batch, len(plan.stages), device=call.x.device)
    if len(call.extras) != plan.extras:
        raise ValueError(
            f"sample: the plan reads {plan.extras} extra input registers; got "
            f"{len(call.extras)}. Give them as extras=(...)."
        )
    offset = call.offset
    whole_number = isinstance(offset, int) and not isinstance(offset, bool)
    if not whole_number or not 0 <= offset < _OFFSETS or offset % 4:
        raise ValueError(
            "sample: offset is the place of x's first element in its sample, a multiple of 4 from "
            f"0 on and below 2**62 (noise is made four elements at a time); got {shown(offset)}."
        )
    whole = any(stage.threshold is not None or stage.measures for stage in plan.stages)
    if offset and whole:
        raise ValueError(
            "sample: thresholds and measures are taken over a whole sample; got a part of one, "
            f"offset={offset}, for a plan that has some. Sample it whole, or leave them out."
        )


def check_given(call: Call, plan: Plan) -> None:
    """Raises where a stochastic plan was given neither seeds nor noise."""
    if plan.stochastic and call.seed is None and call.xi is None:
        raise ValueError(
            f"sample: {plan.solver} draws noise. Give seed= (an integer, or one a sample), "
            "or the noise itself as xi=."
        )


def check_untransformed(
    call: Call, gradient: Any, parameters: Callable[[], Sequence[torch.Tensor]]
) -> None:
    """Raises where a transformation of PyTorch's would pass through a run unseen.

    Args:
        call: The call.
        gradient: The sampler's gradient. "backprop" is made of plain tensor operations, which every
            transformation sees.
        parameters: Gives the network's parameters, where they have to be looked at.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "sample: torch.jit.trace records tensor operations, and a run is none: the trace would "
            "return its example. Use torch.compile or torch.export, or trace the network alone."
        )
    if gradient == "backprop":
        return
    dual = getattr(forward_ad, "_current_level", -1) >= 0
    functional = torch._C._are_functorch_transforms_active()
    if not dual and not functional:
        return
    extras = [extra for extra in call.extras if isinstance(extra, torch.Tensor)]
    for tensor in (call.x, *conditioning.tensors_in(call.cond), *extras, *parameters()):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise NotImplementedError(
                "sample: torch.func (forward-mode jvp, grad, vmap) does not see into a run; got a "
                'tensor that it transforms. Use gradient="backprop", or sample outside of it.'
            )
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "sample: a run has no forward-mode derivative; got a dual tensor. Use "
                'gradient="backprop", or a reverse-mode gradient.'
            )


def check_tracking(call: Call, gradient: Any, given: Any) -> None:
    """Raises where a derivative would be lost without a word.

    Args:
        call: The call.
        gradient: The sampler's gradient.
        given: The conditioning that the guidance holds.
    """
    if gradient is not None and torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"sample: nothing can be differentiated in inference mode; got "
            f"gradient={gradient!r} there. Leave torch.inference_mode(), or use "
            "torch.no_grad() to sample without a gradient."
        )
    if gradient is not None or not torch.is_grad_enabled():
        return
    tracked = ["x"] if call.x.requires_grad else []
    tracked += conditioning.requiring_grad(call.cond)
    tracked += conditioning.requiring_grad(given, "uncond")
    tracked += conditioning.requiring_grad(call.extras, "extras") if call.extras else []
    if tracked:
        raise ValueError(
            f"sample: gradient=None does not track, and {', '.join(tracked)} requires grad."
            " Detach it, sample under torch.no_grad(), or choose a gradient: 'discrete', "
            "fastdiff.AdjointDEIS() or 'backprop'."
        )


def check_differentiable(call: Call, gradient: Any, plan: Plan, out: Any) -> None:
    """Raises where a run that is differentiated cannot take a call."""
    if call.check or call.progress or call.callback is not None or out is not None:
        raise ValueError(
            f"sample: a run with gradient={gradient!r} takes no callback=, progress=, "
            "check= or out=. Leave them out, or sample under torch.no_grad()."
        )
    if conditioning.requiring_grad(call.xi, "xi"):
        raise ValueError(
            "sample: noise given as xi= has no gradient; got a tensor that requires grad. "
            "Detach it."
        )
    if plan.stochastic and call.seed is None and call.xi is None:
        raise ValueError(
            f"sample: {plan.solver} draws noise. Give seed= (an integer, or one a "
            "sample): the backward pass may have to draw it again."
        )


def check_out(out: Any, x: torch.Tensor) -> None:
    """Raises unless a result can be written to `out`."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"sample: out is a tensor like x; got {type(out).__name__}.")
    if not _alike(out, x):
        raise ValueError(f"sample: out is like x, {_kind(x)}; got {_kind(out)}.")
    reach = 0  # of the dimensions of smaller strides
    sizes = sorted((st, n) for st, n in zip(out.stride(), out.shape, strict=True) if n > 1)
    for stride, size in sizes:
        if stride <= reach:
            raise ValueError(
                "sample: out has memory for every element; got an expanded tensor, or another "
                f"whose elements overlap, of strides {out.stride()}."
            )
        reach += stride * (size - 1)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype and device."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _kind(tensor: torch.Tensor) -> str:
    """Shape, dtype and device, as errors show them."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_xi(xi: Any, stages: int, x: torch.Tensor) -> None:
    """Raises unless noise is given as one tensor like the state for each stage."""
    if not isinstance(xi, torch.Tensor | list | tuple):
        raise TypeError(f"sample: xi is a tensor, or a list of one a stage; got {xi!r}.")
    if isinstance(xi, torch.Tensor) and xi.ndim == 0:
        raise ValueError(f"sample: xi has one entry a stage, {stages}; got a scalar.")
    if len(xi) != stages:
        raise ValueError(f"sample: xi has one entry a stage, {stages}; got {len(xi)}.")
    for i, z in enumerate(xi):
        if not isinstance(z, torch.Tensor):
            raise TypeError(f"sample: xi holds tensors; got {type(z).__name__} as xi[{i}].")
        if not _alike(z, x):
            raise ValueError(
                f"sample: xi is like the state, {_kind(x)}; got xi[{i}] of {_kind(z)}."
            )


def seeds_on(device: torch.device, seed: Any, batch: int) -> torch.Tensor:
    """Seeds as bit patterns, int64 [B]: those of a caller who has them on the device, where they
    lie, which waits for nothing; others on the host. See `noise.seeds_tensor`."""
    if not isinstance(seed, torch.Tensor) or seed.device != device:
        return noise.seeds_tensor(seed, batch)
    if seed.dtype == torch.int64 and seed.shape == (batch,):
        return seed
    return noise.seeds_tensor(seed, batch)
