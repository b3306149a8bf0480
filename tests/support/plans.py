# SPDX-License-Identifier: Apache-2.0
"""Random valid plans that cover the whole instruction, each a function of its seed."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import fastdiff as fd

FIELDS = {f.name for f in dataclasses.fields(fd.Stage)}
GROWN = {"u", "v", "b_raw", "g_raw", "d_new", "products"} <= FIELDS
PREDICTIONS = ("epsilon", "x0", "v", "velocity", "score", "edm")


class _Maker:
    """One plan in the making: what stands in which register."""

    def __init__(self, rng: random.Random, limits: bool, noise: bool, extras: int, grown: bool):
        self.rng, self.limits, self.noise, self.extras = rng, limits, noise, extras
        self.grown = grown and GROWN
        self.done, self.has_e = 0, False

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def number(self, zero: float = 0.25) -> float:
        """A coefficient: 0 or 1 often, else of size about a half, so that nothing grows."""
        if self.chance(zero):
            return 0.0
        return 1.0 if self.chance(0.15) else round(self.rng.gauss(0.0, 0.5), 3) or 0.5

    def row(self, evaluate: bool) -> tuple[float, ...]:
        """b or g: reaches back as far as outputs exist."""
        reach = self.rng.randint(0, min(self.done, 4))
        first = self.number() if evaluate else 0.0
        return (first, *(self.number(0.4) for _ in range(reach)))

    def registers(self) -> tuple[float, ...]:
        return tuple(self.number(0.5) for _ in range(self.rng.randint(0, self.extras)))

    def stage(self, t: float, last: bool) -> fd.Stage:
        evaluate = self.chance(0.85)
        fields: dict[str, Any] = {"t": t, "evaluate": evaluate}
        fields["model_time"] = self.rng.choice([t, round(1000 * t, 2), -1.5, 0.0])
        fields["c_in"] = self.rng.choice([1.0, 1.0, 0.0, 0.7, -1.25])
        fields["p"], fields["q"] = self.number(), self.number(0.15)
        fields["x0_p"], fields["x0_q"] = self.number(), self.number()
        fields["a_x"] = 1.0 if self.chance(0.3) else self.number()
        fields["a_e"] = self.number() if self.has_e else 0.0
        fields["b"] = () if self.chance(0.15) else self.row(evaluate)
        fields["r"] = self.registers()
        noisy = self.noise and self.chance(0.5)
        if noisy:
            streams = self.rng.sample(range(1, 40), self.rng.randint(1, 2))
            fields["noise"] = tuple((s, self.number(0.1)) for s in streams)
            fields["c"] = self.number()
        if not last and self.chance(0.45):
            fields["d_x"], fields["g"] = self.number(), self.row(evaluate)
            fields["d_e"] = self.number() if self.has_e else 0.0
            fields["s"] = self.registers()
            fields["c_e"] = self.number() if noisy else 0.0
        if evaluate and self.limits and self.chance(0.3):
            low = round(self.rng.uniform(-1.5, 0.5), 2)
            fields["clip"] = (low, low + round(self.rng.uniform(0.1, 2.0), 2))
        elif evaluate and self.limits and self.chance(0.2):
            fields["threshold"] = (self.rng.choice([0.3, 0.9, 1.0]), self.rng.choice([0.25, 1.0]))
            if self.grown and self.chance(0.4):
                fields["threshold"] += (self.rng.choice([1.0, 1.5]),)
        if self.grown:
            self.grow(fields, evaluate, last, noisy)
        made = fd.Stage(**fields)
        self.done += evaluate
        self.has_e = self.has_e or made.writes_e
        return made

    def grow(self, fields: dict[str, Any], evaluate: bool, last: bool, noisy: bool) -> None:
        """What the later fields of a stage hold."""
        if evaluate and self.chance(0.25):
            fields["u"], fields["v"] = self.number(), self.number(0.1)
        if evaluate and self.chance(0.25):
            fields["b_raw"] = self.number()
        if evaluate and not last and self.chance(0.15):
            fields["g_raw"] = self.number()
        if not last and self.chance(0.2):
            fields["d_new"] = self.number()
        if not self.extras or not self.chance(0.5):
            return
        operands = [("x", 0), ("bank", self.rng.randrange(self.extras))]
        operands += [("e", 0)] * self.has_e + [("h", 0)] * evaluate + [("xi", 0)] * noisy
        operands += [("history", self.rng.randint(1, min(self.done, 4)))] if self.done else []
        products, new = [], False
        for _ in range(self.rng.randint(1, 4)):
            into = self.rng.choice(["x", "x", "e", "y"])
            if (into == "y" and not evaluate) or (into == "e" and last):
                into = "x"
            if into == "y":
                of, at = "point", 0
            elif into == "x" and new:
                # after the product of the new x', only what the kernel holds on to
                chosen = [o for o in operands if o[0] in ("xi", "bank")]
                of, at = self.rng.choice(chosen)
            else:
                of, at = self.rng.choice([*operands, ("new", 0)])
                new = new or (into == "x" and of == "new")
            entry, weight = self.rng.randrange(self.extras), self.number(0.0)
            products.append(fd.Product(into, weight, entry, of, at))
        fields["products"] = tuple(products)


def random_plan(
    seed: int,
    *,
    limits: bool = True,
    noise: bool = True,
    extras: int = 2,
    grown: bool = True,
    evaluations: bool = True,
    prediction: str | None = None,
) -> fd.Plan:
    """A valid plan of one to seven stages.

    Args:
        seed: The same seed and options give the same plan.
        limits: Whether stages may clip or threshold.
        noise: Whether they may draw.
        extras: Entries of the bank that they may read.
        grown: Whether they may use the fields beyond the first instruction, where there are any.
        evaluations: Whether a plan without a single evaluation is drawn again.
        prediction: What the network returns; None: any.
    """
    rng = random.Random(seed)
    while True:
        maker = _Maker(rng, limits, noise, extras, grown)
        count = rng.randint(1, 7)
        times = sorted((round(rng.uniform(0.01, 1.0), 3) for _ in range(count)), reverse=True)
        stages = [maker.stage(t, i == count - 1) for i, t in enumerate(times)]
        if maker.done == 0 and evaluations:
            continue
        return fd.Plan(
            tuple(stages),
            (1.0, *sorted({0.5, 0.0}, reverse=True)),
            solver=f"random {seed}",
            prediction=prediction or rng.choice(PREDICTIONS),
            variable="x0" if limits else rng.choice(PREDICTIONS),
            prior_scale=round(math.exp(rng.gauss(0.0, 1.0)), 3),
        )


def bank_size(plan: fd.Plan) -> int:
    """How many tensors a run of the plan is given as extras."""
    return int(plan.extras)


def strategy(**options: Any) -> Any:
    """Hypothesis's strategy of such plans, which shrinks towards small seeds."""
    from hypothesis import strategies

    return strategies.integers(0, 2**32).map(lambda seed: random_plan(seed, **options))


def seeds_of(count: int, start: int = 0) -> Sequence[int]:
    """Seeds of samples that differ in their low and in their high words."""
    return [(start + i) * 0x9E3779B97F4A7C15 % 2**63 for i in range(count)]
