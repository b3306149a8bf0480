# SPDX-License-Identifier: Apache-2.0
"""Solvers in velocity: their tables, both ends of a flow, what torchdiffeq computes, refusals."""

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import problems
from support.problems import FLOW, VP, two_blobs

import fastdiff as fd
from fastdiff.bench import records
from fastdiff.solvers.ode.velocity import integrals

ROOT = Path(__file__).resolve().parent.parent
RK = ("midpoint", "heun3", "bosh3", "rk4", "rk4-38", "dopri5")
ADAMS = ("ab-2", "ab-3", "ab-4", "abm-2", "abm-3", "abm-4", "abm-5")
UNEVEN = [1.0, 0.9, 0.65, 0.5, 0.3, 0.22, 0.1, 0.0]


def load(name):
    """A module of `benchmarks/`, which is a folder of scripts and no package."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def ran(solver, steps=7, schedule=FLOW, prediction="velocity", **options):
    plan = fd.plan(schedule, solver, steps, prediction=prediction, **options)
    x = fd.noise.normal((5, 2), 0, 0, dtype=torch.float64)
    return fd.sample(two_blobs(schedule, prediction), x, plan)


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("euler", "euler"),
        ("midpoint", "midpoint"),
        ("heun2", "heun"),
        ("heun3", "heun3"),
        ("rk4", "rk4-38"),
    ],
)
def test_torchdiffeq_ends_where_the_same_table_ends(theirs, ours, steps):
    pytest.importorskip("torchdiffeq", reason="a rival; pip install 'fastdiff-engine[bench]'")
    flow = load("problems.flows").flow_network(16)
    state, calls = load("rivals.torchdiffeq").velocity_state(flow, theirs, steps)
    plan = flow.plan(ours, steps, grid="uniform")
    assert plan.nfe == calls
    torch.testing.assert_close(flow.run(plan), state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", range(3, 10))
def test_torchdiffeqs_adams_is_ours_from_the_same_start(steps):
    # theirs takes two steps of the 3/8 rule, then combines three velocities, on equal steps alone
    pytest.importorskip("torchdiffeq", reason="a rival; pip install 'fastdiff-engine[bench]'")
    flow = load("problems.flows").flow_network(16)
    state, _ = load("rivals.torchdiffeq").velocity_state(flow, "explicit_adams", steps, max_order=4)
    rows = fd.solvers.Rows(FLOW, "velocity", "velocity", steps)
    times = np.linspace(1.0, 0.0, steps + 1)
    start = fd.plan(FLOW, "rk4-38", 2, grid=times[:3], prediction="velocity").stages
    made = [0, 4]
    rows.stages, rows.evaluations = list(start), 8
    for i in range(2, steps):
        made.append(rows.current)
        weights = integrals(
            times[i : i - 3 : -1] if i > 2 else times[2::-1], times[i], times[i + 1]
        )
        outputs = dict(zip(made[:-4:-1], weights.tolist(), strict=True))
        rows.add(times[i], x=fd.solvers.Row(outputs=outputs))
    plan = fd.Plan(tuple(rows.stages), tuple(times), "custom", "velocity", "velocity", FLOW)
    torch.testing.assert_close(flow.run(plan), state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("span", [1e-9, 1e-4, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_integrals_are_exact_for_polynomials_whatever_the_length_of_a_step(count, span):
    s, t = 0.5, 0.5 - 0.7 * span
    nodes = [s + span * back for back in (0.0, 0.5, 1.3, 1.7, 2.6, 3.1)[:count]]
    weights = integrals(nodes, s, t)
    for power in range(count):
        exact = (t - s) ** (power + 1) / (power + 1)
        found = weights @ (np.array(nodes) - s) ** power
        size = np.abs(weights) @ np.abs(np.array(nodes) - s) ** power
        assert abs(found - exact) <= 1e-13 * size + 1e-16 * span ** (power + 1)


def test_equal_steps_have_the_weights_of_the_books():
    stage = fd.plan(FLOW, "ab-4", 8, prediction="velocity").stages[-1]
    np.testing.assert_allclose(stage.b, np.array([55, -59, 37, -9]) / 24 * -0.125, rtol=1e-12)
    plan = fd.plan(FLOW, "abm-3", 8, prediction="velocity", mode="pece")
    predictor, corrector = plan.stages[-2:]
    # every other evaluation is at a corrected state, and those are kept
    np.testing.assert_allclose(predictor.g[::2], np.array([23, -16, 5]) / 12 * -0.125, rtol=1e-12)
    old_ones = [0, 1, 3, 5]
    np.testing.assert_allclose(
        np.array(corrector.b)[old_ones], np.array([9, 19, -5, 1]) / 24 * -0.125, rtol=1e-12
    )
    assert corrector.t == 0.0


@pytest.mark.parametrize("order", [2, 3])
def test_pec_on_equal_steps_is_adams_bashforth_after_its_start(order):
    pec = fd.plan(FLOW, f"abm-{order}", 10, prediction="velocity").stages
    ab = fd.plan(FLOW, f"ab-{order + 1}", 10, prediction="velocity").stages
    for one, other in zip(pec[order + 1 :], ab[order + 1 :], strict=True):
        np.testing.assert_allclose(one.b, other.b, rtol=1e-11)
    assert len(pec[1].b) == 2  # v_1 and v_0: the first step is corrected by the trapezoidal rule
    np.testing.assert_allclose(pec[1].b[0] + pec[1].b[1], -0.1, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize("grid", [UNEVEN, "uniform"])
def test_a_predictor_and_corrector_follow_their_formulas(order, grid):
    """The textbook loop, with two states."""
    times = np.array(grid) if grid is UNEVEN else np.linspace(1.0, 0.0, 8)
    x = fd.noise.normal((5, 2), 0, 0, dtype=torch.float64)
    network = two_blobs(FLOW, "velocity")
    velocities, corrected, predicted = [], x, x
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        velocities.insert(0, network(predicted, torch.full((5,), s, dtype=x.dtype)))
        back = times[i::-1]
        if i:
            used = integrals(back[: min(order, i) + 1], times[i - 1], s)
            corrected = corrected + sum(
                w * v for w, v in zip(used.tolist(), velocities, strict=False)
            )
        used = integrals(back[:order], s, t)
        predicted = corrected + sum(w * v for w, v in zip(used.tolist(), velocities, strict=False))
    made = ran(f"abm-{order}", 7, grid=grid, warmup="lower")
    torch.testing.assert_close(made, predicted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in ADAMS if n not in ("abm-4", "abm-5")])
def test_the_first_step_is_eulers(name):
    first = fd.plan(FLOW, name, 7, prediction="velocity").stages[0]
    assert first == fd.plan(FLOW, "euler", 7, prediction="velocity").stages[0]


@pytest.mark.parametrize("name", ["abm-4", "abm-5"])
def test_one_step_of_runge_kutta_is_all_the_start_that_it_takes(name):
    network, x, exact = problems.flow_problem()
    auto = fd.plan(FLOW, name, 38, prediction="velocity")
    assert auto == fd.plan(FLOW, name, 38, prediction="velocity", warmup="first")
    assert auto.stages[:3] == fd.plan(FLOW, "heun3", 38, prediction="velocity").stages[:3]
    assert auto.nfe == 40
    errors = {}
    for warmup in ("lower", "first", "runge-kutta"):
        plan = fd.plan(FLOW, name, 160, prediction="velocity", warmup=warmup)
        errors[warmup] = float((fd.sample(network, x, plan) - exact).norm())
    assert errors["first"] < errors["lower"] / 3
    assert errors["first"] < 1.2 * errors["runge-kutta"]


@pytest.mark.parametrize("prediction", ["velocity", "v"])
@pytest.mark.parametrize("name", [*RK, *ADAMS, "heun"])
def test_a_run_from_noise_to_data_uses_the_velocity_at_both_ends(name, prediction):
    plan = fd.plan(FLOW, name, 7, prediction=prediction)
    assert (plan.times[0], plan.times[-1]) == (1.0, 0.0)
    info = fd.solvers.info(name)
    assert plan.nfe == 7 * info.nfe_per_step + info.nfe_extra
    with_end = name in ("heun", "rk4", "rk4-38", "dopri5")
    assert (plan.stages[-1].t == 0.0) == with_end
    assert torch.isfinite(ran(name, prediction=prediction)).all()


def test_the_last_step_of_heun_on_a_flow_is_of_second_order():
    network, x, exact = problems.flow_problem()
    heun = fd.plan(FLOW, "heun", 10, prediction="velocity")
    whole = float((fd.sample(network, x, heun) - exact).norm())
    # with Euler at its end, which is what a network that cannot be asked at t = 0 would need
    stages = heun.stages[:-2]
    last = fd.plan(FLOW, "euler", 1, grid=heun.times[-2:], prediction="velocity").stages
    ended = fd.Plan((*stages, *last), heun.times, "heun", "velocity", "velocity", FLOW)
    assert whole < 0.7 * float((fd.sample(network, x, ended) - exact).norm())


def test_a_network_that_tells_no_velocity_at_the_data_is_not_asked_there():
    for name in ("heun", "rk4", "rk4-38", "dopri5"):
        plan = fd.plan(FLOW, name, 5, prediction="x0")
        assert plan.stages[-1].t > 0.0
        closing = "midpoint" if name == "heun" else "heun3"
        wanted = fd.plan(FLOW, closing, 1, grid=plan.times[-2:], prediction="x0").stages
        assert plan.stages[-len(wanted) :] == wanted
    pece = fd.plan(FLOW, "abm-3", 5, prediction="x0", mode="pece")
    assert (pece.nfe, pece.stages[-1].t) == (9, pece.times[-2])


def test_heun_on_edm_ends_with_euler():
    plan = fd.plan(fd.schedules.EDM(), "heun", 5)
    assert (plan.nfe, plan.variable, plan.stages[-1].t) == (9, "epsilon", plan.times[-2])


@pytest.mark.parametrize("name", [*RK, *ADAMS])
def test_an_infinite_velocity_at_the_data_is_stepped_over_by_x0(name):
    plan = fd.plan(VP, name, 6, grid="quadratic", t_min=0.0)
    ddim = fd.plan(VP, "ddim", 6, grid="quadratic", t_min=0.0)
    last = plan.stages[-1]
    assert last.t == plan.times[-2] > 0.0
    # what the row makes of x and of the network's epsilon, as DDIM's last row does
    of_x, of_eps = last.a_x + last.b[0] * last.p, last.b[0] * last.q
    end = ddim.stages[-1]
    if name in RK or name.startswith("ab-"):
        assert of_x == pytest.approx(end.a_x, rel=1e-12)
        assert of_eps == pytest.approx(end.b[0], rel=1e-12)
    assert torch.isfinite(ran(name, 6, VP, "epsilon", grid="quadratic", t_min=0.0)).all()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.plan(FLOW, "ab-4", 3, prediction="velocity"), ValueError,
         "ab-4: it combines 4 outputs and needs at least as many steps; got steps = 3"),
        (lambda: fd.plan(FLOW, "abm-3", 2, prediction="velocity"), ValueError, "^abm-3: .*steps"),
        (lambda: fd.solvers.AdamsBashforth(order=5), ValueError,
         "order is one of 1, 2, 3, 4; got 5"),
        (lambda: fd.solvers.AdamsMoulton(order=1), ValueError, "order is one of 2, 3, 4, 5; got 1"),
        (lambda: fd.plan(FLOW, "abm-2", 4, mode="ec"), ValueError, "mode is one of 'pec', 'pece'"),
        (lambda: fd.plan(FLOW, "ab-2", 4, warmup="euler"), ValueError, "warmup is one of"),
        (lambda: fd.plan(FLOW, "ab-2", 4, warmup="first"), ValueError, "'lower', 'runge-kutta'"),
        (lambda: fd.plan(FLOW, "ab-2", 4, mode="pece"), TypeError, "ab-2: no option 'mode'"),
        (lambda: fd.solvers.VelocityRK("ssprk3"), ValueError, "tableau is one of 'midpoint'"),
        (lambda: fd.solvers.RhoRK("dopri5"), ValueError, "tableau is one of 'euler'"),
        (lambda: fd.plan(FLOW, "rk4", 4, prediction="epsilon"), ValueError,
         "velocity does not follow from epsilon at t = 1.0"),
        (lambda: fd.plan(FLOW, "rk4", 4, clip=1.0, prediction="velocity"), TypeError, "no option"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


# -- the benchmark ---------------------------------------------------------------------------------


def test_flows_are_held_against_torchdiffeqs_best():
    report = load("reports.flow")

    def line(rival, solver, error):
        return {"problem": "flow", "rival": rival, "solver": solver, "error": error}

    found = [
        line("fastdiff", "ab-3", {"5": 0.4, "6": 0.3}),
        line("fastdiff", "rk4", {"6": 0.2, "8": 0.1}),
        line("torchdiffeq", "euler", {"5": 0.4, "6": 0.5}),
        line("torchdiffeq", "midpoint", {"6": 0.1}),
    ]
    assert report.best_of(found, "fastdiff") == {5: (0.4, "ab-3"), 6: (0.2, "rk4"), 8: (0.1, "rk4")}
    page = report.page(found, "cpu")
    assert "at 1 of 2 numbers of evaluations; it is worse at 6." in page
    lines = report.bests(found).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[1] == ["6", "0.200", "rk4", "0.100", "midpoint", "0.500"]
    assert cells[2] == ["8", "0.100", "rk4", "", "", ""]


def test_ours_is_no_worse_than_torchdiffeqs_best_on_flows():
    found = records.read(ROOT / "benchmarks" / "results" / "flow.jsonl")
    report = load("reports.flow")
    for problem in ("flow", "flow-mixture"):
        of = [r for r in found if r["problem"] == problem]
        ours, theirs = (report.best_of(of, side) for side in ("fastdiff", "torchdiffeq"))
        assert {*theirs} >= {*range(5, 41)}
        worse = [n for n in range(5, 41) if ours[n][0] > theirs[n][0]]
        assert worse == []
