# SPDX-License-Identifier: Apache-2.0
"""The sampling loop in plain tensor operations: what autograd differentiates and compilers trace.

Terms are added in table order, each product and sum rounding on its own: results agree with the
backends to rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import noise
from ..backends.torch import threshold
from ..conditioning import at_stage
from ..guidance import Guidance
from ..plans import Plan
from .call import Call, check_xi

# What `constants` holds of each stage, in this order.
_FIELDS = (
    *("at_e", "writes_e", "writes_x"),
    *("model_time", "c_in", "p", "q", "a_x", "a_e", "b", "b_raw", "c", "r"),
    *("d_x", "d_e", "d_new", "g", "g_raw", "c_e", "s", "u", "v"),
    *("noise", "reads_noise", "clip", "threshold", "evaluate"),
    *("products", "scalars", "measures"),
)

Constants = tuple[int, tuple[tuple[Any, ...], ...]]
Normal = Callable[[torch.Tensor, int, Sequence[int], torch.dtype], torch.Tensor]
Stage = dict[str, Any]


def constants(plan: Plan) -> Constants:
    """A plan as constants: how many outputs its rows reach back, and its stages as tuples."""
    rows, at_e = [], False
    for stage in plan.stages:
        own: Stage = {name: getattr(stage, name) for name in _FIELDS[1:]}
        own["at_e"], at_e = at_e, stage.writes_e
        own["products"] = tuple((p.into, p.weight, p.entry, p.of, p.at) for p in stage.products)
        own["measures"] = tuple(
            (m.into, _reduction(m.num), _reduction(m.den), m.power, m.weight, m.offset)
            for m in stage.measures
        )
        rows.append(tuple(own[name] for name in _FIELDS))
    reach = max([0, *(j for stage in plan.stages for j in stage.history)])
    return reach, tuple(rows)


def _reduction(reduction: Any) -> tuple[Any, ...] | None:
    return reduction and (reduction.kind, reduction.a, reduction.b, reduction.rank)


def normal(
    seeds: torch.Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype, offset: int = 0
) -> torch.Tensor:
    """Noise of the samples, as `noise.normal`."""
    like: dict[str, Any] = {"dtype": dtype, "device": seeds.device}
    return noise.normal(tuple(shape), seeds, stream, offset=offset, **like)


def _combine(weights: Sequence[Any], terms: Sequence[Any]) -> Any:
    total: Any = 0.0
    for weight, term in zip(weights, terms, strict=True):
        # a coefficient of 0 never reads its register
        if isinstance(weight, torch.Tensor) or weight != 0.0:
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
        plan: The plan's `constants`.
        guidance: How the outputs of the branches become one.
        call: What the caller gave; its conditioning is that of the samples.
        dtype: Dtype of the network's input.
        normal: Makes the noise, as the function of that name does.

    Returns:
        The sample, x's shape and dtype.
    """
    x = call.x
    cond = guidance.conditions(call.cond, x.shape[0])
    state = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    bank = [torch.as_tensor(r, **_place(r)).to(state).expand(x.shape) for r in call.extras]
    seeds: Any = None
    if call.xi is None and call.seed is not None:
        seeds = _seeds(call.seed, x.shape[0], x.device)
    e: Any = None
    history: list[Any] = []
    columns: dict[int, Any] = {}  # of S
    reach, rows = plan
    if call.xi is not None:
        check_xi(call.xi, len(rows), state)
    for i, values in enumerate(rows):
        stage: Stage = dict(zip(_FIELDS, values, strict=True))
        drawn: Any = 0.0
        if stage["reads_noise"] and call.xi is not None:
            drawn = call.xi[i]
        elif stage["reads_noise"]:
            drawn = _drawn(stage["noise"], normal, seeds, state)
        point = e if stage["at_e"] else state
        known = {"x": state, "e": e, "xi": drawn, "bank": bank, "point": point}
        known["history"] = [None, *history]  # from 1 on
        if stage["evaluate"]:
            outputs = _outputs(network, stage, guidance, point, at_stage(cond, i), dtype, i)
            known["out"], known["weights"] = outputs, guidance.combined_weights(i, state)
        _measure(stage, known, columns)
        if stage["evaluate"]:
            known["h"], known["y"] = _predicted(stage, known, columns)
        state, e = _updated(stage, known, columns)
        if stage["evaluate"]:
            history.insert(0, known["h"])
        del history[reach:]
    if x.requires_grad and not state.requires_grad:
        state = state + torch.nan_to_num(0.0 * x)  # nothing reads x: its gradient is 0
    return state.to(x.dtype)


def _place(given: Any) -> dict[str, Any]:
    """Numbers are on the CPU, whatever the default device."""
    return {} if isinstance(given, torch.Tensor) else {"device": "cpu"}


def _outputs(
    network: Callable[..., torch.Tensor],
    stage: Stage,
    guidance: Guidance,
    point: torch.Tensor,
    cond: Any,
    dtype: torch.dtype,
    i: int,
) -> tuple[torch.Tensor, ...]:
    """The outputs of the branches at stage i, in the state's dtype."""
    copies, c_in = guidance.branches, stage["c_in"]
    given = (c_in * point).to(dtype)  # memory of its own: a network may write to it
    if copies > 1:
        given = torch.cat([given] * copies)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    time = torch.full((given.shape[0],), stage["model_time"], dtype=kind, device=point.device)
    if cond is None:
        out = network(given, time)
    elif isinstance(cond, Mapping):
        out = network(given, time, **cond)
    else:
        out = network(given, time, cond)
    if out.shape != given.shape:
        raise ValueError(
            f"sample: stage {i}: the network returns its input's shape, "
            f"{tuple(given.shape)}; got {tuple(out.shape)}."
        )
    return out.to(point.dtype).chunk(copies) if copies > 1 else (out.to(point.dtype),)


def _drawn(draws: Any, normal: Normal, seeds: torch.Tensor, like: torch.Tensor) -> Any:
    normals = [normal(seeds, stream, like.shape, like.dtype) for stream, _ in draws]
    return _combine([weight for _, weight in draws], normals)


def _product(product: tuple[Any, ...], known: Mapping[str, Any], total: Any) -> Any:
    """What a product adds to a sum; `total` is that of the row so far, where it reads it."""
    _, weight, entry, of, at = product
    operand = total if of == "new" else known[of]
    if of in ("bank", "history"):
        operand = operand[at]
    return weight * known["bank"][entry] * operand


def _scaled(stage: Stage, columns: Mapping[int, Any], name: str, weight: Any, like: Any) -> Any:
    """A coefficient times the number of each sample that the stage names for it."""
    for scalar, column in stage["scalars"]:
        if scalar == name:
            return weight * columns[column].to(like).reshape(-1, *[1] * (like.ndim - 1))
    return weight


def _predicted(
    stage: Stage, known: Mapping[str, Any], columns: Mapping[int, Any] | None
) -> tuple[Any, Any]:
    """(h, y) of a stage. Without columns no number of a sample scales y."""
    weights = list(known["weights"])
    if columns is not None:
        named = enumerate(weights)
        weights = [_scaled(stage, columns, f"w_{g}", w, known["point"]) for g, w in named]
    combined = known["out"][0]
    if len(weights) > 1 or isinstance(weights[0], torch.Tensor):
        combined = weights[0] * known["out"][0]
        for weight, output in zip(weights[1:], known["out"][1:], strict=True):
            combined = combined + weight * output
    y = _combine((stage["q"], stage["p"]), (combined, known["point"]))
    y = y if isinstance(y, torch.Tensor) else torch.zeros_like(known["point"])
    for product in stage["products"]:
        if product[0] == "y":
            y = y + _product(product, known, y)
    h = y
    if stage["clip"] is not None:
        h = h.clamp(stage["clip"][0], stage["clip"][1])
    if stage["threshold"] is not None:
        h = threshold(h, *stage["threshold"])
    if (stage["u"], stage["v"]) != (0.0, 1.0):
        h = _combine((stage["v"], stage["u"]), (h, known["point"]))
        h = h if isinstance(h, torch.Tensor) else torch.zeros_like(y)
    return h, y


class _Names(NamedTuple):
    """What the terms of one sum are called in a stage."""

    into: str
    x: str
    e: str
    outputs: str
    raw: str
    noise: str
    extras: str
    scalar: str


_X = _Names("x", "a_x", "a_e", "b", "b_raw", "c", "r", "b_0")
_E = _Names("e", "d_x", "d_e", "g", "g_raw", "c_e", "s", "g_0")


def _updated(stage: Stage, known: dict[str, Any], columns: Mapping[int, Any]) -> tuple[Any, Any]:
    """x and e after a stage."""
    x_next, e_next = known["x"], known["e"]
    if stage["writes_x"]:
        x_next = _total(_X, stage, known, columns)
        for product in stage["products"]:
            if product[0] == "x":
                x_next = x_next + _product(product, known, x_next)
    if stage["writes_e"]:
        e_next = _total(_E, stage, known, columns)
        if stage["d_new"]:
            e_next = e_next + stage["d_new"] * x_next
        for product in stage["products"]:
            if product[0] == "e":
                e_next = e_next + _product(product, known, x_next)
    return x_next, e_next


def _total(
    names: _Names, stage: Stage, known: Mapping[str, Any], columns: Mapping[int, Any]
) -> Any:
    """The terms of a sum that are a number times a register."""
    x, first, c = known["x"], stage[names.outputs][:1], stage[names.noise]
    if first and first[0]:
        first = (_scaled(stage, columns, names.scalar, first[0], x),)
    if c:
        c = _scaled(stage, columns, names.noise, c, x)
    earlier = stage[names.outputs][1:]
    extras = stage[names.extras]
    weights = [stage[names.x], stage[names.e], *first, stage[names.raw], *earlier, c, *extras]
    past = known["history"][1 : 1 + len(earlier)]
    terms = [x, known["e"], *([known.get("h")] * len(first)), known.get("y"), *past]
    total = _combine(weights, [*terms, known["xi"], *known["bank"][: len(extras)]])
    return total if isinstance(total, torch.Tensor) else torch.zeros_like(x)


# -- numbers of samples ----------------------------------------------------------------------------


def _measure(stage: Stage, known: dict[str, Any], columns: dict[int, Any]) -> None:
    """Makes the stage's measures, float64 [B], into the columns of S."""
    if stage["measures"] and "out" in known:
        known["y"] = _predicted(stage, known, None)[1]
    for into, num, den, power, weight, offset in stage["measures"]:
        ratio = _reduced(num, known)
        if den is not None:
            below = _reduced(den, known)
            ratio = torch.where(below == 0, 0.0, ratio / torch.where(below == 0, 1.0, below))
        columns[into] = offset + weight * ratio**power


def _reduced(reduction: tuple[Any, ...], known: Mapping[str, Any]) -> torch.Tensor:
    kind, first, second, rank = reduction
    a = _operand(first, known)
    if kind == "sum":
        return a.sum(1)
    if kind == "std":
        return a.std(1)
    if kind == "quantile":
        return torch.quantile(a.abs(), rank, dim=1)
    b = a if second is None else _operand(second, known)
    dot = (a * b).sum(1)
    return dot.sqrt() if kind == "norm" else dot


def _operand(operand: tuple[Any, ...], known: Mapping[str, Any]) -> torch.Tensor:
    """What a reduction reads, float64 [B, n]."""
    value = known[operand[0]]
    value = value if len(operand) == 1 else value[operand[1]]
    return value.double().flatten(1)


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
