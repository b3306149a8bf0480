# SPDX-License-Identifier: Apache-2.0
"""One row of a plan: an evaluation of the network and the linear update after it.

    y  = p * point + q * sum_g w_g out_g + products into "y"    point = e if the stage before wrote
                                                                e, else x
    h  = limit(y)                                 limit: nothing, `clip` or `threshold`
    h  = u * point + v * limit(y)                 only where (u, v) is not (0, 1)
    xi = sum_k weight_k * normal(seed, stream_k)
    x' = a_x x + a_e e + b[0] h + b_raw y + sum_{j>=1} b[j] H_j + c   xi + sum_i r[i] R_i
         + products into "x"
    e' = d_x x + d_e e + g[0] h + g_raw y + sum_{j>=1} g[j] H_j + c_e xi + sum_i s[i] R_i
         + d_new x' + products into "e"

`H_j` is the h of the j-th evaluation before this one, `R_i` the i-th entry of the bank. Under a
threshold each sample's y is clipped to [-s, s] and divided by s, where s is the quantile of the
sample's |y|, but at least the floor and at most the ceiling.

Coefficients are float64. A coefficient of exactly 0 means that the register is not read. A stage
whose second row is all zeros writes no e: the next evaluation is then at x, and e keeps what it
holds. A stage with `a_x = 1` and nothing else in its first row leaves x untouched. Those three
rules are what the flags of a packed row say; nothing else is derived from a solver's name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checks import LARGEST_INDEX, finite, floats, index, is_number, number, shown
from .layout import MAX_PRODUCTS
from .terms import MOST_BRANCHES, MOST_SCALARS, Measure, Product

LEAST_FLOOR = 2.0**-126  # the least normal float32: a floor is not 0 in any state
MOST_FLOOR = (2.0 - 2.0**-23) * 2.0**127  # the largest float32: a floor is not infinite in any
MAX_STREAM = LARGEST_INDEX

Threshold = tuple[float, float] | tuple[float, float, float]


@dataclass(frozen=True)
class Stage:
    """One row of a plan: an evaluation and the linear update after it (see the module's formulas).

    Args:
        t: Time of the evaluation, in the schedule's units.
        model_time: Time the network is told, in the network's units.
        c_in: The network is given `c_in * point`.
        p, q: Weights that make the solver's variable of the output: y = p * point + q * out.
        x0_p, x0_q: Weights that make the x0 prediction, for callbacks: x0 = x0_p * point
            + x0_q * out. They are NaN where no x0 exists (alpha = 0).
        a_x, a_e, b, c, r: Weights of x'. `b[0]` weighs h, `b[j]` the h of j evaluations before.
        d_x, d_e, g, c_e, s: Weights of e'. No e' is written where all of them are 0.
        noise: Up to two draws (stream, weight), stream >= 1; xi is their weighted sum.
        clip: (lo, hi) applied to y, which is an x0.
        threshold: (quantile, floor) or (quantile, floor, ceiling), with 0 < quantile <= 1 and
            0 < floor <= ceiling. It is applied in place of `clip`. The quantile is interpolated
            linearly at position quantile (n - 1) among the n ordered |y| of a sample (as
            torch.quantile does, in float64).
        evaluate: False for a stage without a network call, which has no h and counts no NFE.
        u, v: h = u * point + v * limit(y), such as the epsilon that follows from a limited x0.
        b_raw, g_raw: Weights of y, before the limit, in x' and e'.
        d_new: Weight of this stage's x' in e'.
        products: Up to eight products with entries of the bank.
        scalars: Columns of S that multiply coefficients: (("b_0", 3), ("w_1", 0)) or a mapping.
            Coefficients are b_0, g_0, c, c_e and the branch weights w_0, w_1, ...
        measures: Numbers of each sample that this stage writes to S before its update.

    Raises:
        ValueError: A coefficient is not finite, or the row contradicts itself.
        TypeError: A field has the wrong kind.
    """

    t: float
    model_time: float = 0.0
    c_in: float = 1.0
    p: float = 0.0
    q: float = 1.0
    x0_p: float = math.nan
    x0_q: float = math.nan
    a_x: float = 1.0
    a_e: float = 0.0
    b: tuple[float, ...] = ()
    c: float = 0.0
    r: tuple[float, ...] = ()
    d_x: float = 0.0
    d_e: float = 0.0
    g: tuple[float, ...] = ()
    c_e: float = 0.0
    s: tuple[float, ...] = ()
    noise: tuple[tuple[int, float], ...] = ()
    clip: tuple[float, float] | None = None
    threshold: Threshold | None = None
    evaluate: bool = True
    u: float = 0.0
    v: float = 1.0
    b_raw: float = 0.0
    g_raw: float = 0.0
    d_new: float = 0.0
    products: tuple[Product, ...] = ()
    scalars: tuple[tuple[str, int], ...] = ()
    measures: tuple[Measure, ...] = ()

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("t", number("Stage", "t", self.t))
        where = f" at t = {self.t}"
        for name in _NUMBERS:
            value = number("Stage", name, getattr(self, name))
            put(name, value)
            if not (math.isfinite(value) or (name in ("x0_p", "x0_q") and math.isnan(value))):
                finite("Stage", name, value, where)
        for name in ("b", "r", "g", "s"):
            values = floats("Stage", name, getattr(self, name))
            if not all(map(math.isfinite, values)):
                for i, value in enumerate(values):
                    finite("Stage", f"{name}[{i}]", value, where)
            count = len(values)
            while count and values[count - 1] == 0.0:
                count -= 1
            put(name, values[:count])
        put("noise", _noise(self.noise))
        if self.clip is not None:
            clip = floats("Stage", "clip", self.clip)
            if len(clip) != 2 or not -math.inf < clip[0] < clip[1] < math.inf:
                raise ValueError(
                    f"Stage: clip is (lo, hi), finite, with lo < hi; got {shown(self.clip)}."
                )
            put("clip", clip)
        if self.threshold is not None:
            put("threshold", self._checked_threshold())
        if not isinstance(self.evaluate, bool):
            raise TypeError(f"Stage: evaluate is True or False; got {shown(self.evaluate)}.")
        put("products", _products(self.products))
        put("scalars", _scalars(self.scalars))
        put("measures", _sequence("measures", self.measures, Measure))
        if not self.evaluate:
            self._check_no_output()
        if not self.noise:
            self._check_no_noise()

    def __reduce__(self) -> Any:
        # Made anew where it is unpickled, a stage holds that process's NaN and compares equal.
        return Stage, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def _checked_threshold(self) -> Threshold:
        given = floats("Stage", "threshold", self.threshold)
        if (
            not 2 <= len(given) <= 3
            or not (0.0 < given[0] <= 1.0 and LEAST_FLOOR <= given[1] <= MOST_FLOOR)
            or not (given[1] <= given[-1] <= MOST_FLOOR or given[2:] == (math.inf,))
        ):
            raise ValueError(
                "Stage: threshold is (quantile, floor) or (quantile, floor, ceiling), with "
                f"0 < quantile <= 1, a finite floor of at least {LEAST_FLOOR:.3g} and at most "
                f"{MOST_FLOOR:.3g}, and floor <= ceiling; got {shown(self.threshold)}."
            )
        if self.clip is not None:
            raise ValueError(
                f"Stage: h is clipped or thresholded, not both; got clip = {shown(self.clip)} and "
                f"threshold = {shown(self.threshold)}. Leave one out."
            )
        quantile, floor, *ceiling = given
        if ceiling in ([], [math.inf]):
            return quantile, floor
        return quantile, floor, ceiling[0]

    def _check_no_output(self) -> None:
        """Raises where a stage without an evaluation reads what an evaluation leaves."""
        read = {"b[0] or g[0]": any((*self.b[:1], *self.g[:1]))}
        read["u or v"] = (self.u, self.v) != (0.0, 1.0)
        read["b_raw or g_raw"] = bool(self.b_raw or self.g_raw)
        for name, found in read.items():
            if found:
                raise ValueError(
                    f"Stage: without an evaluation there is no h; got {name} set at t = {self.t}. "
                    "Set evaluate=True or weigh only earlier outputs (b[1], b[2], ...)."
                )
        names = [f"a product of {p.of!r}" for p in self.products if p.of in ("h", "point")]
        names += [f"a measure of {o[0]!r}" for m in self.measures for o in m.operands if _is_out(o)]
        names += [f"the scalar of {name!r}" for name, _ in self.scalars if name[0] == "w"]
        if names:
            raise ValueError(
                f"Stage: without an evaluation there is no output; got {names[0]} at t = {self.t}. "
                "Set evaluate=True or leave it out."
            )

    def _check_no_noise(self) -> None:
        """Raises where a stage that draws nothing reads noise."""
        if self.reads_noise:
            of = any(p.of == "xi" for p in self.products)
            what = f"c = {self.c}, c_e = {self.c_e} weigh"
            if not (self.c or self.c_e):
                what = "a product reads" if of else "a measure reads"
            raise ValueError(
                f"Stage: {what} a noise that is not drawn at "
                f"t = {self.t}. Give noise=((stream, 1.0),) with stream >= 1."
            )

    @property
    def writes_e(self) -> bool:
        """Whether the next evaluation is at e'."""
        weights = (self.d_x, self.d_e, self.c_e, self.g_raw, self.d_new, *self.g, *self.s)
        return any(weights) or any(p.into == "e" for p in self.products)

    @property
    def writes_x(self) -> bool:
        """Whether x changes."""
        weights = (self.a_e, self.c, self.b_raw, *self.b, *self.r)
        return self.a_x != 1.0 or any(weights) or any(p.into == "x" for p in self.products)

    @property
    def reads_noise(self) -> bool:
        """Whether xi is weighed, multiplied or measured."""
        measured = any(operand == ("xi",) for m in self.measures for operand in m.operands)
        return bool(self.c or self.c_e) or measured or any(p.of == "xi" for p in self.products)

    @property
    def reads_e(self) -> str | None:
        """What reads the e of earlier stages beside the evaluation, in words; None: nothing."""
        if self.a_e or self.d_e:
            return f"a_e = {self.a_e}, d_e = {self.d_e}"
        if any(p.of == "e" for p in self.products):
            return "by a product"
        if any(operand == ("e",) for m in self.measures for operand in m.operands):
            return "by a measure"
        return None

    @functools.cached_property
    def history(self) -> tuple[int, ...]:
        """The j of every earlier output H_j that this stage reads, increasing."""
        read = {j for j in range(1, len(self.b)) if self.b[j]}
        read |= {j for j in range(1, len(self.g)) if self.g[j]}
        read |= {p.at for p in self.products if p.of == "history"}
        operands = (operand for m in self.measures for operand in m.operands)
        read |= {o[1] for o in operands if len(o) == 2 and o[0] == "history"}
        return tuple(sorted(read))

    @property
    def entries(self) -> int:
        """One more than the largest index into the bank that this stage names."""
        named = [len(self.r), len(self.s)]
        for p in self.products:
            named += [p.entry + 1] + [p.at + 1] * (p.of == "bank")
        operands = (operand for m in self.measures for operand in m.operands)
        named += [o[1] + 1 for o in operands if len(o) == 2 and o[0] == "bank"]
        return max(named)

    @property
    def branches(self) -> int:
        """One more than the largest branch that this stage names, at least 1."""
        named = [int(name[2:]) for name, _ in self.scalars if name[0] == "w"]
        operands = (operand for m in self.measures for operand in m.operands)
        named += [o[1] for o in operands if len(o) == 2 and o[0] == "out"]
        return 1 + max(named, default=0)

    @property
    def limited(self) -> bool:
        """Whether y is clipped or thresholded."""
        return self.clip is not None or self.threshold is not None


_NUMBERS = tuple(f.name for f in dataclasses.fields(Stage) if f.type == "float")
SCALED = ("b_0", "g_0", "c", "c_e")  # coefficients that a column of S may multiply, beside w_g


def evaluated_at_e(stages: Sequence[Stage]) -> tuple[bool, ...]:
    """For each stage, whether its evaluation is at e."""
    return (False, *(stage.writes_e for stage in stages[:-1]))


def _is_out(operand: tuple[Any, ...]) -> bool:
    return operand[0] in ("out", "y")


def _sequence(name: str, given: Any, kind: type) -> tuple[Any, ...]:
    each = given
    if isinstance(given, list | tuple):
        each = next((each for each in given if not isinstance(each, kind)), None)
        if each is None:
            return tuple(given)
    raise TypeError(f"Stage: {name} are fastdiff.{kind.__name__} objects; got {shown(each)}.")


def _products(given: Any) -> tuple[Product, ...]:
    products = tuple(p for p in _sequence("products", given, Product) if p.weight != 0.0)
    if len(products) > MAX_PRODUCTS:
        raise ValueError(f"Stage: at most {MAX_PRODUCTS} products a stage; got {len(products)}.")
    last = False
    for product in products:
        if product.into != "x":
            continue
        if last and product.of not in ("xi", "bank"):
            raise ValueError(
                "Stage: after the product of 'new' into 'x' only products of 'xi' and 'bank' "
                f"follow into 'x'; got one of {product.of!r}. Put it before."
            )
        last = last or product.of == "new"
    return products


def _scalars(given: Any) -> tuple[tuple[str, int], ...]:
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in pairs
    ):
        raise TypeError(
            "Stage: scalars is a mapping from coefficients to columns of S, or pairs of both; got "
            f"{shown(given)}."
        )
    found: dict[str, int] = {}
    for name, column in pairs:
        branch = name[2:] if name.startswith("w_") else ""
        known = branch.isascii() and branch.isdigit() and str(int(branch[:4])) == branch
        if name not in SCALED and not (known and int(branch) < MOST_BRANCHES):
            raise ValueError(
                f"Stage: a scalar multiplies {', '.join(SCALED)} or a branch weight w_0, w_1, ...; "
                f"got {shown(name)}."
            )
        if name in found:
            raise ValueError(f"Stage: one scalar a coefficient; got two of {name!r}.")
        found[name] = index("Stage", f"the scalar of {name!r}", column, most=MOST_SCALARS - 1)
    order = {name: i for i, name in enumerate(SCALED)}
    names = sorted(found, key=lambda name: (order.get(name, len(order)), len(name), name))
    return tuple((name, found[name]) for name in names)


def _noise(given: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(given, list | tuple):
        raise TypeError(f"Stage: noise is a sequence of (stream, weight); got {shown(given)}.")
    draws = []
    for draw in given:
        if not isinstance(draw, list | tuple) or len(draw) != 2 or not all(map(is_number, draw)):
            raise TypeError(f"Stage: a draw is (stream, weight); got {shown(draw)}.")
        stream, weight = draw
        if not 1 <= stream < MAX_STREAM or int(stream) != stream:
            raise ValueError(
                f"Stage: noise streams are integers from 1 to {MAX_STREAM - 1} (stream 0 is "
                f"the starting noise); got {shown(stream)}."
            )
        weight = number("Stage", "a noise weight", weight)
        if not math.isfinite(weight):
            raise ValueError(f"Stage: noise weights are finite; got {weight!r}.")
        draws.append((int(stream), weight))
    if len(draws) > 2:
        raise ValueError(f"Stage: at most two draws a stage; got {len(draws)}.")
    return tuple(draws)
