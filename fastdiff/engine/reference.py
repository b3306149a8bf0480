# SPDX-License-Identifier: Apache-2.0
"""The sampling loop in plain tensor operations: what autograd differentiates and compilers trace.

Terms are added in table order, each product and sum rounding on its own: results agree with the
backends to rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import noise
from ..backends.torch import threshold
from ..conditioning import at_stage
from ..guidance import Guidance, combine
from ..plans import Plan, Stage
from .call import Call

Constants = tuple[int, tuple[tuple[Any, ...], ...]]
Normal = Callable[[torch.Tensor, int, Sequence[int], torch.dtype], torch.Tensor]

_FIELDS = (
    *("model_time", "c_in", "p", "q", "a_x", "a_e", "b", "c", "r", "d_x", "d_e", "g", "c_e", "s"),
    *("noise", "clip", "threshold", "evaluate"),
)


def constants(plan: Plan) -> Constants:
    """A plan as constants: the outputs that a row reads at most, and its stages as tuples."""
    rows, at_e = [], False
    for i, s in enumerate(plan.stages):
        _check(i, s)
        rows.append((at_e, s.writes_e, s.writes_x, *(getattr(s, field) for field in _FIELDS)))
        at_e = s.writes_e
    return max(max(len(s.b), len(s.g)) for s in plan.stages), tuple(rows)


def _check(i: int, s: Stage) -> None:
    """Raises where a stage has terms that this loop does not know."""
    weights = (s.u, s.v, s.b_raw, s.g_raw, s.d_new) != (0.0, 1.0, 0.0, 0.0, 0.0)
    if weights or s.products or s.scalars or s.measures or len(s.threshold or ()) > 2:
        raise NotImplementedError(
            f"sample: stage {i} has u, v, b_raw, g_raw, d_new, a ceiling, products, scalars or "
            "measures, which the loop in tensor operations does not run. Use another gradient, or "
            "run it outside of torch.compile."
        )


def normal(
    seeds: torch.Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Noise of the samples, as `noise.normal`."""
    return noise.normal(tuple(shape), seeds, stream, dtype=dtype, device=seeds.device)


def _combine(weights: Sequence[float], terms: Sequence[Any]) -> Any:
    total: Any = 0.0
    for weight, term in zip(weights, terms, strict=True):
        if weight != 0.0:  # a coefficient of 0 never reads its register
            total = weight * term + total
    return total


def sample(
    network: Callable[..., torch.Tensor],
    plan: Constants,
    guidance: Guidance,
    call: Call,
    dtype: torch.dtype,
    normal: Normal,
) -> torch.Tensor:
    """A run in tensor operations alone; arguments are checked by the caller.

    Args:
        network: `network(x, t, **cond)`.
        plan: `constants` of it.
        guidance: How the outputs of the branches become one.
        call: What the caller gave; its conditioning is that of the samples.
        dtype: Of the network's input.
        normal: As the function of that name.

    Returns:
        The sample, x's shape and dtype.
    """
    x, copies, batch = call.x, guidance.branches, call.x.shape[0]
    told = torch.float64 if dtype == torch.float64 else torch.float32
    cond, seed, xi, extras = guidance.conditions(call.cond, batch), call.seed, call.xi, call.extras
    state = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    registers = [torch.as_tensor(r).to(state).expand(x.shape) for r in extras]
    seeds: Any = None
    if xi is None and seed is not None:
        seeds = _seeds(seed, batch, x.device)
    e: Any = None
    history: list[Any] = []
    reach, rows = plan
    for i, row in enumerate(rows):
        at_e, writes_e, writes_x, model_time, c_in, p, q, a_x, a_e, b, c, r = row[:12]
        d_x, d_e, g, c_e, s, draws, clip, limit, evaluate = row[12:]
        point = e if at_e else state
        h: Any = 0.0
        if evaluate:
            given = (point if c_in == 1.0 else c_in * point).to(dtype)
            if copies > 1:
                given = torch.cat([given] * copies)
            time = torch.full((copies * batch,), model_time, dtype=told, device=x.device)
            now = at_stage(cond, i)
            if now is None:
                out = network(given, time)
            elif isinstance(now, Mapping):
                out = network(given, time, **now)
            else:
                out = network(given, time, now)
            if out.shape != given.shape:
                raise ValueError(
                    f"sample: stage {i}: the network returns its input's shape, "
                    f"{tuple(given.shape)}; got {tuple(out.shape)}."
                )
            out = out.to(state.dtype)
            if copies > 1:
                out = combine(guidance.combined_weights(i, state), out.chunk(copies))
            h = _combine((q, p), (out, point))
            if clip is not None:
                h = h.clamp(clip[0], clip[1])
            if limit is not None:
                h = threshold(h, limit[0], limit[1])
            history.insert(0, h)
        past = history if evaluate else [0.0, *history]
        drawn: Any = 0.0
        if (c or c_e) and xi is not None:
            drawn = xi[i]
        elif c or c_e:
            normals = [normal(seeds, stream, x.shape, state.dtype) for stream, _ in draws]
            drawn = _combine([weight for _, weight in draws], normals)
        x_next, e_next = state, e
        if writes_x:
            terms = [state, e, *past[: len(b)], drawn, *registers[: len(r)]]
            x_next = _combine([a_x, a_e, *b, c, *r], terms)
        if writes_e:
            terms = [state, e, *past[: len(g)], drawn, *registers[: len(s)]]
            e_next = _combine([d_x, d_e, *g, c_e, *s], terms)
        state, e = x_next, e_next
        del history[max(reach - 1, 0) :]
    return state.to(x.dtype)


def _seeds(seed: Any, batch: int, device: torch.device) -> torch.Tensor:
    """Seeds of the samples, int64 [batch]; see `noise.seeds_tensor`."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.shape != (batch,):
            raise ValueError(
                f"sample: a tensor of seeds is int64 [{batch}]; got {seed.dtype} "
                f"{tuple(seed.shape)}."
            )
        return seed.to(device)
    if isinstance(seed, int | torch.SymInt):
        return torch.arange(batch, device=device).add(seed)
    return noise.seeds_tensor(seed, batch).to(device)
