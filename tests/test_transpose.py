# SPDX-License-Identifier: Apache-2.0
"""Transposed plans: the rows run backwards give the derivatives of the rows run forwards.

Both are run by one small interpreter of packed rows in NumPy. Derivatives of the forward run are
taken by a complex step, which is exact to rounding.
"""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from support.packed import Registers, inside, run_row

import fastdiff as fd
from fastdiff.plans import Measure, Plan, Product, Reduction, Stage

N = 3  # elements of a sample
STEP = 1e-30
VP = fd.schedules.VPLinear()


class Problem:
    """A plan, linear networks of two branches, noise and a bank."""

    def __init__(self, plan, rng):
        self.plan, self.weights = plan, (-0.5, 1.5)
        self.networks = rng.normal(size=(len(plan.stages), 2, N, N)) * 0.7
        self.normals = rng.normal(size=(len(plan.stages), N))
        self.bank = rng.normal(size=(max(plan.extras, 1), N))
        self.masks = {}

    def forward(self, x, bank):
        plan = self.plan
        r = Registers.holding(x, plan.slots, bank)
        r.m = plan.stages[0].c_in * x
        for i, row in enumerate(plan.rows(self.weights)):
            outs = [net @ r.m for net in self.networks[i]]
            y = run_row(row, r, outs, self.normals[i])
            if y is not None:
                self.masks[i] = inside(row, y)
        return r.x

    def backward(self, x_bar):
        """Cotangents of x and of the bank, by the transposed rows."""
        transposed, stages = self.plan.transpose(), self.plan.stages
        r = Registers.holding(x_bar, transposed.slots, self.bank)
        bank_bar = np.zeros_like(self.bank)

        def register(slot):
            return r.x if slot is None else r.slots[slot]

        run_row(transposed.rows[0], r, (), None)
        for row, i in enumerate(reversed(range(len(stages))), start=1):
            for entry, weight, slot, factor in transposed.extras[i]:
                kind, at = factor if factor is not None else (None, 0)
                times = {"bank": self.bank[at], "xi": self.normals[i]}.get(kind, 1.0)
                bank_bar[entry] += weight * register(slot) * times
            outs = ()
            if stages[i].evaluate:
                if stages[i].limited:
                    r.e = np.where(self.masks[i], r.e, 0.0)
                    for weight, slot, entry in transposed.raw[i]:
                        factor = 1.0 if entry is None else self.bank[entry]
                        r.e = r.e + weight * register(slot) * factor
                    r.m = stages[i].q * r.e
                else:
                    assert transposed.raw[i] == ()
                both = zip(self.networks[i], self.weights, strict=True)
                outs = [w * (net.T @ r.m) for net, w in both]
            packed = transposed.rows[row]
            run_row(dataclasses.replace(packed, k=packed.k * 2), r, outs, None)
        return r.x, bank_bar

    def check(self, rng):
        """Compares with the derivatives of the forward run; returns what was compared."""
        x, x_bar = rng.normal(size=(2, N))
        found_x, found_bank = self.backward_at(x, x_bar)
        for k in range(N):
            moved = x.astype(complex)
            moved[k] += STEP * 1j
            close(found_x[k], x_bar @ self.forward(moved, self.bank).imag / STEP)
        told = sorted(set(range(self.plan.extras)) - self.plan.transpose().unowed)
        for entry in told:
            for k in range(N):
                moved = self.bank.astype(complex)
                moved[entry, k] += STEP * 1j
                result = self.forward(x.astype(complex), moved)
                close(found_bank[entry, k], x_bar @ result.imag / STEP)
        return told

    def backward_at(self, x, x_bar):
        self.forward(x, self.bank)
        return self.backward(x_bar)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


# -- random plans ----------------------------------------------------------------------------------


def random_products(rng, stage, evaluations, has_e):
    """Products that a stage may hold."""
    may = ["x", "bank"] + ["h"] * stage["evaluate"] + ["e"] * has_e + ["xi"]
    may += ["history"] * bool(evaluations)
    made = []
    for _ in range(int(rng.integers(0, 3))):
        into, of = str(rng.choice(["x", "e"])), str(rng.choice(may))
        at = {"bank": 4, "history": int(rng.integers(1, evaluations + 1)) if evaluations else 0}
        made.append(Product(into, rng.normal(), int(rng.integers(0, 4)), of, at.get(of, 0)))
    if rng.random() < 0.3:
        made.append(Product("x", 0.6, int(rng.integers(0, 4)), "new"))
        made += [Product("x", 0.4, 3, "xi")] * (rng.random() < 0.5)
    if rng.random() < 0.3:
        made.append(Product("e", -0.4, int(rng.integers(0, 4)), "new"))
    if stage["evaluate"] and rng.random() < 0.4:
        made.append(Product("y", 0.8, int(rng.integers(0, 4)), "point"))
    return made


def random_plan(rng, grown=0.5):
    """Stages with every kind of term, as likely as `grown` each."""
    stages, evaluations, has_e = [], 0, False
    count = int(rng.integers(1, 6))

    def maybe(chance=grown):
        return rng.normal() if rng.random() < chance else 0.0

    for i in range(count):
        evaluate = bool(rng.random() < 0.8)
        b, g = (
            tuple(maybe(0.7) for _ in range(int(rng.integers(0, min(3, evaluations) + 2))))
            for _ in range(2)
        )
        if not evaluate:
            b, g = ((0.0, *weights[1:]) for weights in (b, g))
        stage = {"t": 0.9 - 0.8 * i / count, "evaluate": evaluate, "b": b, "a_x": maybe(0.9)}
        stage |= {"p": maybe(), "q": maybe(0.9), "c_in": maybe(0.9), "r": (maybe(),), "c": maybe()}
        stage |= {"noise": ((i + 1, 1.0),), "a_e": maybe() if has_e else 0.0}
        if evaluate:
            stage |= {"u": maybe(), "v": rng.normal() if rng.random() < grown else 1.0}
            stage |= {"b_raw": maybe(), "clip": (-0.8, 0.5) if rng.random() < grown else None}
        products = random_products(rng, stage, evaluations, has_e)
        if i < count - 1 and rng.random() < 0.6:
            stage |= {"d_x": maybe(), "g": g, "s": (0.0, maybe()), "d_new": maybe(), "c_e": 0.2}
            stage |= {"d_e": maybe() if has_e else 0.0, "g_raw": maybe() if evaluate else 0.0}
        else:
            products = [p for p in products if p.into != "e"]
        stage["products"] = tuple(products) if rng.random() < 2 * grown else ()
        stages.append(Stage(**stage))
        has_e = has_e or stages[-1].writes_e
        evaluations += evaluate
    return Plan(tuple(stages), (0.9, 0.05), variable="x0")


@pytest.mark.parametrize("seed", range(4))
def test_random_plans_are_transposed_exactly(seed):
    rng = np.random.default_rng(seed)
    done = refused = entries = 0
    for _ in range(100):
        plan = random_plan(rng, grown=0.3)
        try:
            plan.transpose()
        except NotImplementedError:
            refused += 1
            continue
        entries += len(Problem(plan, rng).check(rng))
        done += 1
    assert done > 60
    assert entries > 60


@pytest.mark.parametrize("name", fd.solvers.names())
def test_every_solver_is_transposed_exactly(name):
    rng = np.random.default_rng(0)
    steps = max(4, fd.solvers.info(name).least_steps)
    Problem(fd.plan(VP, name, steps, prediction="v"), rng).check(rng)


# -- each growth alone -----------------------------------------------------------------------------


def three(middle, **first):
    """Three stages about the one of interest; the first writes an e."""
    start = Stage(t=0.9, p=0.3, q=0.7, a_x=0.8, b=(0.5,), d_x=0.4, g=(0.6,), **first)
    end = Stage(t=0.3, q=0.9, a_x=1.1, b=(0.4, 0.3, 0.2)[: 2 + middle.evaluate])
    return Plan((start, middle, end), (0.9, 0.6, 0.0), variable="x0")


MIDDLE = Stage(t=0.6, p=0.2, q=0.6, c_in=0.9, a_x=0.7, a_e=0.5, b=(0.3, 0.2), noise=((1, 1.0),))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"u": 0.4, "v": 0.3}, []),
        ({"u": 0.4, "v": 0.3, "clip": (-0.5, 0.4)}, []),
        ({"b_raw": 0.8}, []),
        ({"b_raw": 0.8, "clip": (-0.5, 0.4)}, []),
        ({"d_x": 0.5, "g_raw": 0.8, "d_e": 0.2, "clip": (-0.5, 0.4)}, []),
        ({"d_x": 0.5, "d_new": 0.8}, []),
        ({"d_new": 0.8}, []),
        ({"r": (0.3,), "d_x": 0.5, "s": (0.0, 0.6), "d_new": 0.8}, [0, 1]),
        ({"products": (Product("y", 0.5, 0, "point"),)}, []),
        ({"products": (Product("x", 0.5, 0, "x"),)}, []),
        ({"products": (Product("x", 0.5, 0, "e"),)}, []),
        ({"products": (Product("x", 0.5, 0, "h"),)}, []),
        ({"products": (Product("x", 0.5, 0, "history", 1),)}, []),
        ({"products": (Product("x", 0.5, 0, "xi"),)}, [0]),
        ({"products": (Product("x", 0.5, 0, "bank", 1),)}, [0, 1]),
        ({"products": (Product("x", 0.5, 0, "bank", 0),)}, [0]),
        ({"products": (Product("x", 0.5, 0, "new"),)}, []),
        (
            {"products": (Product("x", 0.5, 0, "new"), Product("x", 0.4, 1, "xi")), "r": (0, 0, 2)},
            [2],
        ),
        ({"d_x": 0.2, "products": (Product("e", 0.5, 0, "new"),)}, []),
        ({"d_x": 0.2, "products": (Product("e", 0.5, 0, "h"), Product("e", 0.5, 1, "x"))}, []),
        ({"d_x": 0.2, "products": (Product("e", 0.5, 0, "bank", 1),)}, [0, 1]),
        ({"c_in": 0.0}, []),
        ({"q": 0.0, "p": 0.5}, []),
        ({"b": ()}, []),
        ({"evaluate": False, "b": (0.0, 0.4), "p": 0.0}, []),
    ],
)
def test_each_term_is_transposed(changes, told):
    rng = np.random.default_rng(1)
    plan = three(dataclasses.replace(MIDDLE, **changes))
    assert Problem(plan, rng).check(rng) == told


@pytest.mark.parametrize(
    "stages",
    [
        (Stage(t=1.0, evaluate=False, a_x=0.5),),
        (Stage(t=1.0, evaluate=False, a_x=0.0),),
        (Stage(t=1.0, a_x=0.0, b=(1.0,)), Stage(t=0.5, evaluate=False, a_x=0.0)),
        (Stage(t=1.0),),
        (Stage(t=1.0, products=(Product("x", 0.5, 0, "new"),), b=(0.5,)),),
        (Stage(t=1.0, products=(Product("x", 0.5, 0, "h"),), b=(0.5,)),),
        (Stage(t=1.0, evaluate=False, products=(Product("x", 0.5, 0, "new"),)),),
        (Stage(t=1.0, b=(0.5,), d_x=1.0), Stage(t=0.5, evaluate=False)),
    ],
)
def test_plans_that_leave_little_are_transposed(stages):
    rng = np.random.default_rng(2)
    Problem(Plan(stages, (1.0, 0.0)), rng).check(rng)


def test_more_than_one_entry_at_once_is_refused():
    carried = Product("e", 0.5, 0, "e")
    stages = (
        Stage(t=0.9, b=(0.5,), d_x=1.0),
        Stage(t=0.8, d_x=0.1, products=(carried,)),
        Stage(t=0.7, d_x=0.1, products=(carried,)),
        Stage(t=0.6, a_e=1.0),
    )
    with pytest.raises(NotImplementedError, match="would multiply an e that is carried on with"):
        Plan(stages, (0.9, 0.0)).transpose()


def test_more_products_than_a_row_holds_are_refused():
    each = [Product("x", 0.1 * i + 0.1, i, "x") for i in range(7)]
    stages = [
        Stage(t=1.0, b=(0.5,), products=(Product("x", 0.5, 0, "h"), Product("x", 0.5, 1, "h"))),
        Stage(t=0.5, b=(0.5,), products=each),
    ]
    with pytest.raises(NotImplementedError, match=r"at most 8 products; .* would have 9"):
        Plan(tuple(stages), (1.0, 0.0)).transpose()


def test_scalars_that_depend_on_the_state_are_refused():
    def plan(reduction, **changes):
        measure = Measure(0, Reduction("norm", reduction))
        stage = Stage(t=1.0, b=(0.5,), c=0.5, noise=((1, 1.0),), measures=(measure,), **changes)
        return Plan((stage,), (1.0, 0.0))

    for reduction in (("x",), ("out", 0), ("y",)):
        with pytest.raises(NotImplementedError, match="scales c by column 0 of S"):
            plan(reduction, scalars={"c": 0}).transpose()
    for name in ("b_0", "w_0"):
        with pytest.raises(NotImplementedError, match=f"scales {name} by column 0"):
            plan(("xi",), scalars={name: 0}).transpose()
    plan(("xi",), scalars={"c": 0}).transpose()
    assert plan(("bank", 2), scalars={"c": 0}).transpose().unowed == {2}
    plan(("x",)).transpose()  # a measure that nothing reads


def test_a_plan_and_its_transpose_are_freed_together():
    gc.disable()
    try:
        plan = fd.plan(VP, "deis-3", 4)
        plan.transpose()
        gone = weakref.ref(plan)
        del plan
        assert gone() is None
    finally:
        gc.enable()
