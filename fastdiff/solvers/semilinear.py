# SPDX-License-Identifier: Apache-2.0
"""Exponential integrators of a network's output less a linear part, and the rows they become.

With l, s and b functions of lambda, numbers or one for each element of a sample, let

    h = x0 + (l - 1) x / alpha,        dh/dlambda = s h - b + what is left

and L, S their integrals. Variation of constants on a step from s to t gives

    x_t = a x_s + alpha_t e^{-(L_t - L_s)} int e^{(L - L_s) + (S - S_s)} (g - B) dlambda

    a = (alpha_t / alpha_s) e^{-(L_t - L_s)},   B(lambda) = int_s^lambda e^{-(S - S_s)} b
    g_j = e^{S_s - S_j} h_j + B_j               constant where nothing is left

and a solver is a polynomial for g in lambda through outputs at several times. l = 1, s = b = 0
makes h the x0 prediction, and the step that of DPM-Solver++.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..plans import Product
from ..schedules import Array, Schedule
from .exponential import moments, transfer
from .rows import Row, Rows

Coefficient = float | Array  # a number, or one for each element of a sample
Terms = Mapping[int | str, Coefficient]  # weights of "x", "e", "new", "one" and of outputs


class LinearPart(abc.ABC):
    """l, s and b of a network, as the integrals that a step needs."""

    @property
    @abc.abstractmethod
    def elementwise(self) -> bool:
        """Whether any coefficient may differ from element to element."""

    @abc.abstractmethod
    def offset(self, t: float) -> Coefficient:
        """(l - 1) / alpha at t: the weight of x in h, beside x0."""

    @abc.abstractmethod
    def step(self, s: float, t: float, count: int) -> tuple[Coefficient, list[Coefficient]]:
        """(a, N) of a step: N_p is the weight of (lambda - lambda_s)^p in g, p < count."""

    @abc.abstractmethod
    def drift(self, s: float, t: float) -> Coefficient:
        """What a step subtracts for B."""

    @abc.abstractmethod
    def node(self, s: float, at: float) -> tuple[Coefficient, Coefficient]:
        """(e^{S_s - S_j}, B_j) of the output at time `at` in a step from s."""


@dataclass(frozen=True)
class NoLinearPart(LinearPart):
    """l = 1 and s = b = 0, exactly: h is the x0 prediction."""

    schedule: Schedule

    @property
    def elementwise(self) -> bool:
        return False

    def offset(self, t: float) -> Coefficient:
        return 0.0

    def step(self, s: float, t: float, count: int) -> tuple[Coefficient, list[Coefficient]]:
        a = transfer(self.schedule, "x0", s, t)
        return a, moments(self.schedule, "x0", s, t, count).tolist()

    def drift(self, s: float, t: float) -> Coefficient:
        return 0.0

    def node(self, s: float, at: float) -> tuple[Coefficient, Coefficient]:
        return 1.0, 0.0


@dataclass(frozen=True)
class Update:
    """x_t = a x_s + sum_j weights[j] h_j + shift."""

    a: Coefficient
    weights: list[Coefficient]
    shift: Coefficient

    def of(self, state: Terms, outputs: Sequence[int]) -> dict[int | str, Coefficient]:
        """The update as terms, of a state that is itself a sum of terms."""
        found: dict[int | str, Coefficient] = {key: self.a * c for key, c in state.items()}
        for key, weight in zip(outputs, self.weights, strict=True):
            found[key] = found.get(key, 0.0) + weight
        found["one"] = found.get("one", 0.0) + self.shift
        return found


def update(
    part: LinearPart, schedule: Schedule, t: float, nodes: Sequence[float], pseudo: bool = False
) -> Update:
    """The step from nodes[0] to t by the polynomial through the outputs at `nodes`.

    Args:
        part: The linear part.
        schedule: Gives the lengths in lambda.
        t: End of the step.
        nodes: Times of outputs, that of the state first; t may be among them (a corrector).
        pseudo: Takes sum_n g[0..n] (lambda - lambda_s)^n over the divided differences, in place of
            the interpolating polynomial: the paper's pseudo-order, of order 2 at most.
    """
    s, count = nodes[0], len(nodes)
    a, weights = part.step(s, t, count)
    gap = np.zeros((count, count))  # lambda_j - lambda_m
    for m in range(count):
        for j in range(count):
            gap[m, j] = float(schedule.h(nodes[m], nodes[j])) if m != j else 0.0
    sums: list[Coefficient] = [0.0] * count
    basis = np.array([1.0])  # of the n-th difference, by powers of lambda - lambda_s
    for n in range(count):
        if n:
            root = 0.0 if pseudo else gap[0, n - 1]
            basis = np.append(0.0, basis) - root * np.append(basis, 0.0)
        of_difference = sum(c * w for c, w in zip(basis.tolist(), weights, strict=False) if c)
        for j in range(n + 1):
            others = [m for m in range(n + 1) if m != j]
            difference = 1.0 / float(np.prod(gap[others, j]))
            sums[j] = sums[j] + difference * of_difference
    shift: Coefficient = -part.drift(s, t)
    outputs = []
    for total, at in zip(sums, nodes, strict=True):
        scale, constant = part.node(s, at)
        outputs.append(scale * total)
        shift = shift + constant * total
    return Update(a, outputs, shift)


@dataclass
class Writer:
    """Writes rows whose coefficients are numbers or tensors: weights, or products with the bank.

    Attributes:
        rows: The rows of the plan.
        part: The linear part; it makes h of x0 at every evaluation.
        bank: Entries of the bank, in order.
    """

    rows: Rows
    part: LinearPart
    bank: list[Array] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)

    def add(self, t: float, x: Terms | None = None, e: Terms | None = None) -> int:
        """A stage that evaluates at t; see `Rows.add`. Returns the evaluation's number."""
        k = self.rows.current
        products: list[Product] = []
        fields: dict[str, Any] = {}
        offset = _plain(self.part.offset(t))
        if isinstance(offset, float):
            fields["u"] = offset
        else:
            products.append(Product("y", 1.0, self._entry(offset), "point"))
        into_x = None if x is None else self._row("x", k, x, products)
        into_e = None if e is None else self._row("e", k, e, products)
        if e is not None:
            new = _plain(e.get("new", 0.0))
            if isinstance(new, float):
                fields["d_new"] = new
        fields = {name: value for name, value in fields.items() if value}
        self.rows.add(t, x=into_x, e=into_e, products=tuple(products), **fields)
        return k

    def _row(self, into: str, k: int, terms: Terms, products: list[Product]) -> Row:
        """The weights of a sum; what differs between elements goes to `products`."""
        plain: dict[str, float] = {"x": 0.0, "e": 0.0}
        outputs: dict[int, float] = {}
        extras: dict[int, float] = {}
        for key, given in terms.items():
            value = _plain(given)
            if isinstance(value, float):
                if key == "one" and value:
                    extras[self._entry(np.ones(()))] = value
                elif isinstance(key, int):
                    outputs[key] = value
                elif key in plain:
                    plain[key] = value
                continue
            entry = self._entry(value)
            if key == "one":
                extras[entry] = 1.0
            elif not isinstance(key, int):
                products.append(Product(into, 1.0, entry, key))
            elif key == k:
                products.append(Product(into, 1.0, entry, "h"))
            else:
                products.append(Product(into, 1.0, entry, "history", k - key))
        return Row(x=plain["x"], e=plain["e"], outputs=outputs, extras=extras)

    def _entry(self, value: Array) -> int:
        """Index of an entry of the bank; equal tensors share one."""
        key = repr(value.shape).encode() + value.tobytes()
        if key not in self._known:
            self._known[key] = len(self.bank)
            self.bank.append(value)
        return self._known[key]


def _plain(value: Coefficient) -> Coefficient:
    """A coefficient as a number where all its elements are equal."""
    array = np.asarray(value, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            "dpm-v3: coefficients are finite; got NaN or infinity: the statistics grow too fast "
            "for a step, as those of few samples may. Estimate them from more samples, take more "
            "steps, or do without."
        )
    first = float(array.flat[0])
    return first if bool((array == first).all()) else np.ascontiguousarray(array)
