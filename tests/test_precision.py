# SPDX-License-Identifier: Apache-2.0
"""Coefficients are those of 50 digits, to 1e-10, for steps of any length and any noise level."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.precise import number, precise
from support.solvers import CASES

import fastdiff as fd
from fastdiff.solvers import Rows

SCHEDULES = {
    "edm": fd.schedules.EDM(),
    "vp-linear": fd.schedules.VPLinear(),
    "flow": fd.schedules.FlowMatching(),
}
LEAST_H, MOST_H = 1e-8, 50.0


@dataclasses.dataclass
class Written(Rows):
    """Rows that keep the weights as the solver hands them over."""

    weights: list = dataclasses.field(default_factory=list)

    def add(self, t, *, x=None, e=None, draws=None, evaluate=True, **fields):
        self.weights.append((t, x, e, draws, fields))
        if draws is None and any(row is not None and row.noise for row in (x, e)):
            self.draw()
        self.evaluations += evaluate
        return self.evaluations - evaluate


def written(solver, schedule, times):
    rows = Written(schedule, "x0", solver.variable(schedule, times), len(times) - 1)
    solver.write(rows, times)
    return rows.weights


def numbers(row):
    """The weights of a row by register."""
    if row is None:
        return {}
    named = {"x": row.x, "e": row.e, "noise": row.noise}
    for group in ("outputs", "extras"):
        named |= {(group, k): v for k, v in getattr(row, group).items()}
    return named


def differences(got, exact):
    """The relative error of every weight, and of every time, of the rows of a run."""
    assert len(got) == len(exact)
    for i, (here, there) in enumerate(zip(got, exact, strict=True)):
        yield (i, "t"), error(here[0], there[0])
        for name, row, wanted in (("x", here[1], there[1]), ("e", here[2], there[2])):
            row, wanted = numbers(row), numbers(wanted)
            assert set(row) == set(wanted)
            outputs = [abs(v) for k, v in wanted.items() if k[0] == "outputs"]
            for register, weight in row.items():
                terms = max(outputs) if register[0] == "outputs" else 0
                yield (i, name, register), error(weight, wanted[register], terms)
        for stream, weight in (here[3] or {}).items():
            yield (i, "draws", stream), error(weight, there[3][stream])


def error(got, exact, terms=0):
    """The relative error; of a weight that crosses zero, beyond the rounding of its terms."""
    assert math.isfinite(got)
    exact = number(exact)
    excess = abs(number(float(got)) - exact) - 16 * number(2.0**-53) * terms
    if excess <= 0:
        return 0.0
    return float(str(excess / abs(exact))) if exact else math.inf


def next_time(schedule, s, h):
    """The time that lies h further in lambda, nearly: of a short step, by the derivative."""
    if h < 1e-3:
        return s - h * 2.0 * float(schedule.sigma(s) ** 2 / schedule.g2(s))
    return float(schedule.t_of_lambda(schedule.lambda_t(s) + h))


@st.composite
def runs(draw):
    """A schedule and times: steps of one length, or each of its own, wherever they fit."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    schedule = SCHEDULES[name]
    lengths = st.floats(math.log(LEAST_H), math.log(MOST_H)).map(math.exp)
    lengths = st.one_of(lengths, st.sampled_from([LEAST_H, 1e-6, 1e-3, 0.1, 1.0, 10.0, MOST_H]))
    h = draw(st.one_of(st.lists(lengths, min_size=5, max_size=5), lengths.map(lambda x: [x] * 5)))
    if name == "edm":
        start = math.exp(draw(st.floats(math.log(1e-4), math.log(700.0))))
    else:
        start = draw(st.one_of(st.floats(1e-4, 0.999), st.sampled_from([1e-3, 0.5, 0.999])))
    times, left = [start], 60.0  # of lambda
    for length in h:
        times.append(next_time(schedule, times[-1], min(length, left)))
        left = max(left - length, LEAST_H)
    if name == "edm" and draw(st.booleans()):
        times[-1] = 0.0
    return name, np.array(times)


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(run=runs())
def test_coefficients_are_those_of_fifty_digits(case, run):
    schedule, times = SCHEDULES[run[0]], run[1]
    solver = fd.solvers.get(case.name, **dict(case.options))
    got = written(solver, schedule, times)
    with precise():
        exact = written(solver, schedule, number(times))
    assert {k: e for k, e in differences(got, exact) if e > 1e-10} == {}
