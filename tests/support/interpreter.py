# SPDX-License-Identifier: Apache-2.0
"""Plans interpreted in float64, from what the documents say of a stage and from nothing else.

Nothing of fastdiff is imported: a plan is read through the fields of its stages (the docstring of
`fastdiff.Stage` and design.md, section 2), never through its packed table, and noise is Philox with
Box-Muller in float64 (design.md, section 5). Values are float64 tensors, so that autograd
differentiates a run. Beside every value stands its `size`: the same sums over magnitudes, by which
the rounding errors of any correct run are bounded; see `Value.close`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

F64 = torch.float64
ROUNDINGS = 40  # in one stage, at most: a product, a sum and a weight for each of a dozen terms


@dataclass
class Value:
    """A tensor and the sum of the magnitudes of all that it was added from."""

    value: torch.Tensor
    size: torch.Tensor

    @classmethod
    def of(cls, tensor: Any, like: torch.Tensor | None = None) -> Value:
        """A tensor that is exact."""
        tensor = torch.as_tensor(tensor).to(F64)
        if like is not None:
            tensor = tensor.expand(like.shape)
        return cls(tensor, tensor.detach().abs())

    def close(self, got: torch.Tensor, unit: float, stages: int) -> bool:
        """Whether `got` is the value but for `stages` stages of roundings of relative size `unit`.

        A dtype of `got` that is narrower than the state's has rounded once more.
        """
        wanted = self.value.detach()
        bound = ROUNDINGS * stages * unit * self.size
        info = torch.finfo(got.dtype)
        bound = bound + info.eps * (wanted.abs() + bound) + info.tiny
        return bool(((got.detach().to(F64) - wanted).abs() <= bound).all())


def weighed(weight: Any, term: Value) -> Value:
    magnitude = weight.detach().abs() if isinstance(weight, torch.Tensor) else abs(weight)
    return Value(weight * term.value, magnitude * term.size)


def total(terms: Sequence[tuple[Any, Value | None]], like: torch.Tensor) -> Value:
    """The sum of weight times value; a weight of exactly 0 never reads its value."""
    made = Value(torch.zeros_like(like), torch.zeros_like(like))
    for weight, term in terms:
        if isinstance(weight, float | int) and weight == 0.0:
            continue
        assert term is not None, "a row reads what was never written"
        part = weighed(weight, term)
        made = Value(made.value + part.value, made.size + part.size)
    return made


# -- noise -----------------------------------------------------------------------------------------


def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32 with ten rounds over uint64 arrays of 32-bit words."""
    mask, (k0, k1) = np.uint64(0xFFFFFFFF), key
    a, b, c, d = counter
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (second >> np.uint64(32)) ^ b ^ np.uint64(k0),
            second & mask,
            (first >> np.uint64(32)) ^ d ^ np.uint64(k1),
            first & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def normals(shape: Sequence[int], seeds: Sequence[int], stream: int, offset: int = 0) -> np.ndarray:
    """The normals of design.md, section 5, by Box-Muller in float64.

    Args:
        shape: [B, ...].
        seeds: B integers, counted modulo 2**64.
        stream: The stream.
        offset: The place of a sample's first element in the noise, a multiple of 4.
    """
    size = math.prod(shape[1:])
    quad = np.arange((size + 3) // 4, dtype=np.uint64) + np.uint64(offset // 4)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    made = []
    for seed in seeds:
        key = (int(seed) % 2**32, int(seed) // 2**32 % 2**32)
        counter = [quad & low, np.full_like(quad, stream), quad >> shift, np.zeros_like(quad)]
        u = [((w >> np.uint64(9)) + 0.5) * 2.0**-23 for w in philox(counter, key)]
        radius = [np.sqrt(-2.0 * np.log(u[i])) for i in (0, 2)]
        angle = [2.0 * np.pi * u[i] for i in (1, 3)]
        pairs = [(r * np.cos(a), r * np.sin(a)) for r, a in zip(radius, angle, strict=True)]
        made.append(np.stack([*pairs[0], *pairs[1]], -1).reshape(-1)[:size])
    return np.array(made).reshape(tuple(shape))


# -- one run ---------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a run shows of itself.

    Attributes:
        x: The result.
        inputs: Of every evaluation: (stage, what the network is given, the time it is told).
        points: Of every evaluation: (stage, t, the point, the x0 prediction), as callbacks see it.
        history: The h of every evaluation, oldest first.
    """

    x: Value
    inputs: list[tuple[int, Value, float]] = field(default_factory=list)
    points: list[tuple[int, float, Value, Value]] = field(default_factory=list)
    history: list[Value] = field(default_factory=list)


def quantile(magnitudes: torch.Tensor, rank: float) -> torch.Tensor:
    """Of each sample's values, interpolated linearly at rank (n - 1); shaped to multiply them."""
    ordered = magnitudes.reshape(len(magnitudes), -1).sort(dim=1).values
    place = rank * (ordered.shape[1] - 1)
    low = math.floor(place)
    high = min(low + 1, ordered.shape[1] - 1)
    got = ordered[:, low] + (place - low) * (ordered[:, high] - ordered[:, low])
    return got.reshape(-1, *[1] * (magnitudes.ndim - 1))


def limited(stage: Any, y: Value) -> Value:
    """Clipped or thresholded. A limit moves no error up, but for the division by the scale."""
    if stage.clip is not None:
        low, high = stage.clip
        return Value(y.value.clamp(low, high), y.size + max(abs(low), abs(high)))
    if stage.threshold is not None:
        rank, floor, *ceiling = stage.threshold
        scale = quantile(y.value.abs(), rank).clamp(floor, *ceiling)
        cut = torch.minimum(torch.maximum(y.value, -scale), scale) / scale
        most = y.size.reshape(len(y.size), -1).amax(1).reshape(scale.shape)
        return Value(cut, (y.size + most) / scale.detach() + 1.0)
    return y


def branch_weights(scale: Any, stage: int, like: torch.Tensor) -> list[Any]:
    """Of the unconditional and the conditional output; one alone without guidance."""
    if scale is None or (isinstance(scale, float | int) and scale == 1.0):
        return [1.0]
    if isinstance(scale, torch.Tensor):
        scale = scale.to(F64).reshape(-1, *[1] * (like.ndim - 1))
        return [1.0 - scale, scale]
    if isinstance(scale, list | tuple):
        scale = scale[stage]
    return [1.0 - scale, scale]


class _Registers:
    """What the operands of products and reductions are, in the middle of a stage."""

    def __init__(self, bank: list[Value], past: list[Value | None]):
        self.bank, self.past = bank, past
        self.named: dict[str, Value | None] = {}
        self.out: list[Value] = []

    def operand(self, of: str, at: int) -> Value:
        found = {"history": lambda: self.past[at], "bank": lambda: self.bank[at]}.get(
            of, (lambda: self.out[at]) if of == "out" else (lambda: self.named[of])
        )()
        assert found is not None, f"a row reads {of}, which does not exist"
        return found

    def products(self, stage: Any, into: str, made: Value, acc: str = "") -> Value:
        """`made` after the stage's products into it, in their order."""
        for product in getattr(stage, "products", ()):
            if product.into != into:
                continue
            if acc:
                self.named[acc] = made
            left, right = self.bank[product.entry], self.operand(product.of, product.at)
            weight = product.weight
            made = Value(
                made.value + weight * left.value * right.value,
                made.size + abs(weight) * left.size * right.size,
            )
        return made


def reduced(reduction: Any, registers: _Registers) -> torch.Tensor:
    """A number of each sample, [B]."""

    def rows(operand: Any) -> torch.Tensor:
        tensor = registers.operand(operand[0], operand[1] if len(operand) > 1 else 0).value
        return tensor.reshape(len(tensor), -1)

    a = rows(reduction.a)
    b = a if reduction.b is None else rows(reduction.b)
    return {
        "sum": lambda: a.sum(1),
        "dot": lambda: (a * b).sum(1),
        "norm": lambda: (a * a).sum(1).sqrt(),
        "std": lambda: a.std(1),
        "quantile": lambda: quantile(a.abs(), reduction.rank).reshape(-1),
    }[reduction.kind]()


def measured(stage: Any, registers: _Registers, scalars: dict[int, torch.Tensor]) -> None:
    for measure in getattr(stage, "measures", ()):
        ratio = reduced(measure.num, registers)
        if measure.den is not None:
            under = reduced(measure.den, registers)
            ratio = torch.where(under == 0, torch.zeros_like(ratio), ratio / under)
        scalars[measure.into] = measure.offset + measure.weight * ratio**measure.power


def interpret(
    plan: Any,
    network: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *,
    cond: dict[str, torch.Tensor] | None = None,
    uncond: dict[str, torch.Tensor] | None = None,
    scale: Any = None,
    seeds: Sequence[int] | None = None,
    xi: Sequence[torch.Tensor] | None = None,
    extras: Sequence[Any] = (),
    offset: int = 0,
) -> Seen:
    """Runs a plan.

    Args:
        plan: Anything with `stages`.
        network: `network(x, t, **cond)` in float64.
        x: The start, [B, ...].
        cond, uncond: Tensors with B entries each; under guidance the network is called once, on
            uncond's samples and then on cond's.
        scale: Of guidance: None, a number, a tensor [B] or a sequence of one a stage.
        seeds: One integer a sample, for stages that draw; or
        xi: the noise of each stage.
        extras: The bank R, each broadcastable to x.
        offset: Of the elements in the noise.
    """
    start = Value.of(x)
    like = start.value.detach()
    bank = [Value.of(extra, like) for extra in extras]
    state, e, at_e = start, None, False
    seen, scalars = Seen(start), {}

    def scalar(stage: Any, name: str, weight: Any) -> Any:
        index = dict(getattr(stage, "scalars", ())).get(name)
        if index is None:
            return weight
        return weight * scalars[index].reshape(-1, *[1] * (like.ndim - 1))

    for i, stage in enumerate(plan.stages):
        point = e if at_e else state
        assert point is not None
        past: list[Value | None] = [None, *reversed(seen.history)]
        registers = _Registers(bank, past)
        noise = noise_of(stage, i, like, seeds, xi, offset)
        registers.named = {"x": state, "e": e, "xi": noise, "point": point}
        h = y = None
        if stage.evaluate:
            weights = branch_weights(scale, i, like)
            given = weighed(stage.c_in, point) if stage.c_in else Value.of(torch.zeros_like(like))
            seen.inputs.append((i, given, stage.model_time))
            outs = called(network, given.value, stage.model_time, len(weights), cond, uncond)
            registers.out = [Value.of(out) for out in outs]
            combined = total(list(zip(weights, registers.out, strict=True)), like)

            def formed(weights: list[Any], stage=stage, point=point, registers=registers) -> Value:
                made = total([(stage.p, point)], like)
                for w, out in zip(weights, registers.out, strict=True):
                    if not (isinstance(w, float) and w * stage.q == 0.0) and stage.q != 0.0:
                        part = weighed(w * stage.q, out)
                        made = Value(made.value + part.value, made.size + part.size)
                return registers.products(stage, "y", made)

            y = registers.named["y"] = formed(weights)  # as measures see it
            measured(stage, registers, scalars)
            y = formed([scalar(stage, f"w_{g}", w) for g, w in enumerate(weights)])
            registers.named["y"] = y
            h = limited(stage, y)
            if (getattr(stage, "u", 0.0), getattr(stage, "v", 1.0)) != (0.0, 1.0):
                h = total([(stage.u, point), (stage.v, h)], like)
            x0 = limited(stage, total([(stage.x0_p, point), (stage.x0_q, combined)], like))
            seen.points.append((i, stage.t, point, x0))
        else:
            measured(stage, registers, scalars)
        registers.named["h"] = past[0] = h

        def row(own: str, stage=stage, state=state, e=e, h=h, y=y, noise=noise, past=past) -> Value:
            """The sum of x' or e' without products and without the new x'."""
            a, b, c, r, raw = {
                "x": (("a_x", "a_e"), "b", "c", "r", "b_raw"),
                "e": (("d_x", "d_e"), "g", "c_e", "s", "g_raw"),
            }[own]
            terms = [(getattr(stage, name), reg) for name, reg in zip(a, (state, e), strict=True)]
            for j, weight in enumerate(getattr(stage, b)):
                weight = scalar(stage, f"{b}_0", weight) if j == 0 and weight else weight
                terms.append((weight, past[j] if j < len(past) else None))
            terms.append((getattr(stage, raw, 0.0), y))
            weight = getattr(stage, c)
            terms.append((scalar(stage, c, weight) if weight else 0.0, noise))
            terms += list(zip(getattr(stage, r), bank, strict=False))
            return total(terms, like)

        new = registers.products(stage, "x", row("x"), acc="new")
        registers.named["new"] = new
        next_e = row("e")
        next_e = registers.products(
            stage, "e", total([(1.0, next_e), (getattr(stage, "d_new", 0.0), new)], like)
        )
        at_e = moves_e(stage)
        state, e = new, next_e if at_e else e
        if h is not None:
            seen.history.append(h)
    seen.x = state
    return seen


def moves_e(stage: Any) -> bool:
    """Whether the stage writes e: whether anything in its second row is not zero."""
    row = (stage.d_x, stage.d_e, stage.c_e, *stage.g, *stage.s)
    row += (getattr(stage, "g_raw", 0.0), getattr(stage, "d_new", 0.0))
    return any(row) or any(product.into == "e" for product in getattr(stage, "products", ()))


def noise_of(
    stage: Any, i: int, like: torch.Tensor, seeds: Any, xi: Any, offset: int
) -> Value | None:
    """The stage's xi: what was given, or its draws."""
    if xi is not None:
        return Value.of(xi[i])
    if seeds is None or not stage.noise:
        return None
    draws = [(w, torch.from_numpy(normals(like.shape, seeds, s, offset))) for s, w in stage.noise]
    return total([(w, Value.of(z)) for w, z in draws], like)


def called(
    network: Callable[..., torch.Tensor],
    given: torch.Tensor,
    model_time: float,
    branches: int,
    cond: Any,
    uncond: Any,
) -> list[torch.Tensor]:
    """The outputs of every branch, of one call of the network."""
    keywords = dict(cond or {})
    if branches > 1:
        keywords = {
            k: torch.cat([(uncond or {}).get(k, v).expand(v.shape), v]) for k, v in keywords.items()
        }
    times = torch.full((branches * len(given),), model_time, dtype=F64)
    out = network(torch.cat([given] * branches), times, **keywords)
    return list(out.to(F64).split(len(given))) if len(given) else [out] * branches
