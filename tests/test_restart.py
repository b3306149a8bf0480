# SPDX-License-Identifier: Apache-2.0
"""Plans that go back: Restart, cycles and self-recurrence around any solver."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from oracles import restart as oracles
from support.problems import two_blobs
from support.solvers import SCHEDULES, VP, follow, perfect

import fastdiff as fd
from fastdiff.solvers.sde.restart import Returning

EDM = fd.schedules.EDM()
F64 = torch.float64
CIFAR = [(0.06, 0.30, 2, 2)]
IMAGENET = [
    (19.35, 40.79, 1, 3),
    (1.09, 1.92, 1, 3),
    (0.59, 1.09, 5, 3),
    (0.30, 0.59, 5, 3),
    (0.06, 0.30, 6, 5),
]
TWICE = [(0.1, 0.6, 2, 3), (0.05, 0.2, 1, 2)]  # in the times of VP schedules and flows
SHARED = fd.tune.Statistics(VP, [0.9, 0.1], [0.5, -0.5], [0.2, 0.1], [-5.1, 4.6])
INNER = ["heun", "ddim", "dpmpp-2m", "deis-3", "dpmpp-3s", "ddpm", "rex-1"]


def plans(schedule, prediction, steps=7, **options):
    """Plans of each kind around each inner solver."""
    restarts = (
        [(0.3, 9.0, 2, 3), (0.1, 0.5, 1, 2)] if isinstance(schedule, fd.schedules.EDM) else TWICE
    )
    start = {"t_max": 0.99} if isinstance(schedule, fd.schedules.FlowMatching) else {}
    for inner in INNER:
        arguments = {"inner": inner, "prediction": prediction, **start, **options}
        yield fd.plan(schedule, "restart", steps, restarts=restarts, **arguments)
        yield fd.plan(schedule, "recurrence", steps, length=2, repeats=3, **arguments)
        yield fd.plan(schedule, "recurrence", steps, **arguments)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def given(plan, z):
    """Noise by stage: z in the order of the rows that draw."""
    draws, nothing = iter(z), torch.zeros_like(z[0])
    return torch.stack([next(draws) if s.reads_noise else nothing for s in plan.stages])


# -- the papers' loops -----------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "restarts", "nfe"), [(18, CIFAR, 43), (36, IMAGENET, 203)])
@pytest.mark.parametrize("prediction", ["edm", "x0"])
def test_restart_is_its_papers_loop(steps, restarts, nfe, prediction):
    plan = fd.plan(EDM, "restart", steps, restarts=restarts, s_noise=1.003, prediction=prediction)
    assert plan.nfe == nfe  # of the paper's tables
    x, z = 80.0 * values(3, 2), values(40, 3, 2, seed=1)
    denoise = two_blobs(EDM, "x0")
    wanted = oracles.restart(
        lambda x, t: denoise(x, torch.full((3,), t, dtype=F64)),
        *(x, steps, [(n + 1, k, low, high) for low, high, k, n in restarts], 1.003, iter(z)),
    )
    got = fd.sample(two_blobs(EDM, prediction), x, plan, xi=given(plan, z))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("count", "length", "repeats"), [(10, 1, 2), (10, 3, 4), (12, 5, 2)])
def test_cycles_are_repaints(count, length, repeats):
    plan = fd.plan(VP, "recurrence", count, grid="uniform", length=length, repeats=repeats)
    times = np.linspace(VP.t_max, VP.t_min, count + 1)
    ours = [int(np.argmin(np.abs(times - t))) for t in plan.times]
    theirs = [count - 1 - t for t in oracles.repaint_times(count, length, repeats)]
    turns = [
        n
        for before, n, after in zip([None, *theirs], theirs, [*theirs[1:], None], strict=False)
        if before is None or after is None or not before > n > after  # they go up in single steps
    ]
    assert ours == turns


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_self_recurrence_is_its_papers_loop(repeats):
    plan = fd.plan(VP, "recurrence", 5, repeats=repeats, prediction="x0")
    network, x, z = two_blobs(VP, "x0"), values(3, 2), values(20, 3, 2, seed=1)

    def step(x, t, s):
        x0 = network(x, torch.full((3,), t, dtype=F64))
        return float(VP.alpha(s)) * x0 + float(VP.sigma(s) / VP.sigma(t)) * (
            x - float(VP.alpha(t)) * x0
        )

    times = fd.plan(VP, "ddim", 5).times
    wanted = oracles.universal_recurrence(
        step, x, times, lambda t: float(VP.alpha(t)), lambda t: float(VP.sigma(t)), repeats, iter(z)
    )
    got = fd.sample(network, x, plan, xi=given(plan, z))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert plan.nfe == 5 + (repeats - 1) * 4


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_perfect_prediction_stays_on_the_marginal_up_and_down(name):
    schedule, prediction = SCHEDULES[name]
    for plan in plans(schedule, prediction):
        start = np.array([schedule.alpha(plan.times[0]), schedule.sigma(plan.times[0])])
        states = follow(plan, start, perfect(schedule, prediction))
        assert len(states) == plan.steps
        assert not plan.descends
        tolerance = 1e-11 * (1 + np.abs(start).sum())
        for x, t in zip(states, plan.times[1:], strict=True):
            assert x[0] == pytest.approx(float(schedule.alpha(t)), abs=tolerance)
            assert np.linalg.norm(x[1:]) == pytest.approx(float(schedule.sigma(t)), abs=tolerance)


@pytest.mark.parametrize("variance", [0.04, 0.5])
@pytest.mark.parametrize("inner", ["heun", "dpmpp-2m", "deis-3", "ddpm"])
def test_gaussian_data_keep_their_variance(inner, variance):
    def spread(t):
        return float(VP.alpha(t) ** 2 * variance + VP.sigma(t) ** 2)

    def error(name, steps, **options):
        ends = {"t_max": 0.9, "t_min": 0.02}
        plan = fd.plan(VP, name, steps, inner=inner, **ends, **options)
        x = follow(
            plan,
            np.array([np.sqrt(spread(0.9))]),
            lambda stage, point: float(VP.sigma(stage.t)) / spread(stage.t) * point,
        )[-1]
        return abs(float(x @ x) / spread(0.02) - 1.0)

    def restarts(n):
        return [(0.3, 0.7, 2, n), (0.05, 0.4, 1, n)]

    for name, options in (
        ("restart", lambda n, **more: {"restarts": restarts(n // 2), **more}),
        ("recurrence", lambda n, **more: {"length": n // 4, "repeats": 3, **more}),
    ):
        coarse, fine = (error(name, n, **options(n)) for n in (40, 160))
        assert fine < 0.3 * coarse  # first order at least: nothing is left but the steps' error
        assert fine < 0.05
        if not fd.solvers.info(inner).stochastic:  # one that draws itself forgets it again
            assert error(name, 160, **options(160, s_noise=1.3)) > 2.0 * fine


def test_restarts_forget_the_errors_made_before():
    # The first step is much too long. What it leaves is contracted by noise, not by more steps.
    network = fd.models.GaussianMixture([1.0], [[0.0, 0.0]], [[0.04, 0.3]]).network(VP)
    grid = [0.99, *fd.plan(VP, "ddim", 20, t_max=0.15, t_min=0.01).times]

    def spread(plan):
        x = fd.noise.prior(plan, (4096, 2), seeds=0, dtype=F64)
        got = fd.sample(network, x, plan, seed=1)
        t = plan.times[-1]
        exact = VP.alpha(t) ** 2 * np.array([0.04, 0.3]) + VP.sigma(t) ** 2
        return float(np.abs(got.var(0).numpy() / exact - 1.0).max())

    plain = fd.plan(VP, "ddim", 21, grid=grid)
    fresh = fd.plan(VP, "restart", 21, grid=grid, inner="ddim", restarts=[(0.15, 0.8, 2, 20)])
    assert spread(fresh) < 0.5 * spread(plain)


@pytest.mark.parametrize("h", [1e-8, 1e-4, 0.1, 3.0, 50.0])
@pytest.mark.parametrize("low", [1e-4, 0.3, 10.0])
def test_renoising_is_accurate_however_short_it_is(low, h):
    high = low * np.exp(h)
    plan = fd.plan(EDM, "recurrence", 2, grid=[high, low, 0.5 * low], prediction="x0")
    ((scale, noise),) = [(s.a_x, s.c) for s in plan.stages if not s.evaluate]
    assert scale == 1.0
    exact = np.sqrt((high - low) * (high + low))  # the difference of two floats is exact here
    assert noise == pytest.approx(exact, rel=1e-10)


def test_two_restarts_may_stand_at_one_time():
    restarts = [(0.3, 0.9, 1, 2), (0.3, 2.0, 2, 3)]
    plan = fd.plan(EDM, "restart", 6, restarts=restarts, prediction="edm")
    rises = [(t, u) for t, u in itertools.pairwise(plan.times) if u > t]
    (low,) = {t for t, _ in rises}
    assert [u for _, u in rises] == [0.9, 2.0, 2.0]
    assert plan.nfe == 11 + 2 * (2 + 3 + 3)
    assert low in fd.plan(EDM, "heun", 6, prediction="edm").times


def test_history_ends_where_noise_comes_in():
    plan = fd.plan(VP, "restart", 8, inner="dpmpp-3m", restarts=[(0.1, 0.6, 2, 4)], grid="uniform")
    fresh = False
    for stage in plan.stages:
        if not stage.evaluate:
            assert (stage.b, stage.a_e) == ((), 0.0)
            fresh = True
        elif fresh:
            assert len(stage.b) == 1
            fresh = False
    # after the last restart the run goes on with the history of the stretch
    assert len(plan.stages[-2].b) == 3
    assert fd.plan(VP, "recurrence", 6, inner="dpmpp-3s").nfe == 3 * 11  # it needs no history
    short = fd.plan(VP, "recurrence", 6, inner="deis-3")
    assert {len(s.b) for s in short.stages if s.evaluate} == {1, 2}


@pytest.mark.parametrize("inner", fd.solvers.names())
def test_cycles_go_around_any_solver(inner):
    if issubclass(fd.solvers.info(inner).make, Returning):
        with pytest.raises(ValueError, match="inner is a solver whose times fall"):
            fd.plan(VP, "recurrence", 9, inner=inner, length=4)
        return
    for options in ({}, {"jump": True}):  # a jump takes one of the last stretch's five
        plan = fd.plan(VP, "recurrence", 9, inner=inner, length=4, **options)
        assert plan.steps == 9 + 2 * (1 + 4)
    info = fd.solvers.info(inner)
    if info.least_steps == 1 or "order" in {f.name for f in dataclasses.fields(info.make)}:
        assert fd.plan(VP, "recurrence", 4, inner=inner, repeats=3).steps == 4 + 6 * 2


@pytest.mark.parametrize("inner", ["heun", "dpmpp-2m", "deis-3"])
def test_without_going_back_the_plan_is_the_inner_solvers(inner):
    for name, options in (
        ("restart", {}),
        ("recurrence", {"repeats": 1}),
        ("recurrence", {"length": 9}),
    ):
        plan = fd.plan(VP, name, 6, inner=inner, **options)
        own = fd.plan(VP, inner, 6)
        assert (plan.stages, plan.times) == (own.stages, own.times)


def test_a_grid_may_restart_from_the_data_and_end_with_a_jump():
    plan = fd.plan(EDM, "restart", 6, prediction="edm", restarts=[(0.0, 0.5, 2, 3)])
    assert [t for t, u in itertools.pairwise(plan.times) if u > t] == [0.0, 0.0]
    jump = fd.plan(EDM, "restart", 6, prediction="edm", restarts=[(0.3, 0.9, 2, 3)], jump=True)
    assert jump.times[-1] == 0.0
    p, q = EDM.conversion("epsilon", "x0", jump.times[-2])
    assert (jump.stages[-1].a_x, jump.stages[-1].b) == (p, (q,))


# -- all that takes a plan takes these -------------------------------------------------------------

GOING_BACK = tuple(plans(VP, "v", 5, t_max=0.9))
FAST = [n for n, s in fd.backends.status().items() if s == "available" and n != "triton"]


def network(x, t):
    return torch.tanh(x) * (0.3 + t.reshape(-1, 1).to(x.dtype))


@pytest.mark.parametrize("backend", FAST)
def test_gradients_take_plans_that_go_back(backend):
    for plan in GOING_BACK:
        grads = []
        for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=3)):
            x = values(3, 4).requires_grad_()
            own = None if gradient == "backprop" else backend
            out = fd.sample(network, x, plan, seed=3, gradient=gradient, backend=own)
            grads.append(torch.autograd.grad(out.square().sum(), x)[0])
        for got in grads[1:]:
            torch.testing.assert_close(got, grads[0], rtol=1e-10, atol=1e-10)


def test_a_compiled_run_takes_plans_that_go_back():
    def run(x):
        return fd.sample(network, x, GOING_BACK[3], seed=3)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(values(3, 4)), run(values(3, 4)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plan", GOING_BACK, ids=lambda plan: plan.solver)
def test_callbacks_files_and_conditioning_take_plans_that_go_back(plan):
    seen, told = [], []
    shifts = torch.arange(len(plan.stages), dtype=F64).reshape(-1, 1, 1).expand(-1, 3, 1)
    fd.sample(
        *(lambda x, t, y: told.append(y.clone()) or network(x, t) + y, values(3, 4), plan),
        cond={"y": fd.PerStage(shifts)},
        seed=3,
        callback=lambda i, t, *_: seen.append((i, t)),
    )
    assert shifts[-1].tolist() == told[-1].tolist()
    assert seen == [(i, s.t) for i, s in enumerate(plan.stages) if s.evaluate]
    assert fd.Plan.from_json(plan.to_json()) == plan
    assert str(plan).count(" xi") >= 2


def test_a_batcher_takes_plans_that_go_back():
    batcher = fd.Batcher(network, GOING_BACK[:2], (2, 4), dtype=F64)
    x, running = values(2, 4), {}
    for i in range(2):
        running[batcher.add(x[i], i, seed=7 + i)] = i
    done = 0
    while done < 2:
        for place, got in batcher.step().items():
            i = running[place]
            wanted = fd.sample(network, x[i : i + 1], GOING_BACK[i], seed=[7 + i])
            torch.testing.assert_close(got, wanted[0], rtol=1e-9, atol=1e-9)
            done += 1


def test_the_adjoint_refuses_plans_that_go_back():
    plan = fd.plan(VP, "restart", 5, restarts=TWICE)
    with pytest.raises(
        NotImplementedError, match=r"the plan's times decrease throughout; got times"
    ):
        fd.sample(network, values(3, 4).requires_grad_(), plan, seed=3, gradient=fd.AdjointDEIS())


# -- bad input -------------------------------------------------------------------------------------


def restart(*restarts, **options):
    return fd.plan(VP, "restart", 6, restarts=restarts, **options)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: restart((0.3, 0.2, 1, 2)), ValueError, "from t_min up to t_max.*t_min = 0.3"),
        (lambda: restart((0.1, 0.2, 0, 2)), ValueError, "K lies between 1"),
        (lambda: restart((0.1, 0.2, 1.5, 2)), TypeError, "K is an integer"),
        (lambda: restart((0.1, 0.2, 1, 0)), ValueError, "steps lies between 1"),
        (lambda: restart((0.1, 0.2, 1)), TypeError, r"sequence of \(t_min, t_max, K, steps\)"),
        (lambda: fd.plan(VP, "restart", 6, restarts=0.3), TypeError, "sequence of"),
        (lambda: restart((0.1, "a", 1, 2)), TypeError, "t_max is a number"),
        (lambda: restart((0.1, 1.5, 1, 2)), ValueError, "within the grid, from 0.001 to 1"),
        (lambda: restart((1e-4, 0.5, 1, 2)), ValueError, "within the grid"),
        (lambda: restart((0.4, 0.45, 1, 2), grid=[1, 0.8, 0.6, 0.5, 0.1, 0.05, 0.01]), ValueError,
         "nearest time is 0.5"),
        (lambda: restart((0.1, 0.2, 10**5, 20)), ValueError, "at most 1000000 steps.*got 2000006"),
        (lambda: restart(inner="hein"), ValueError, "unknown solver"),
        (lambda: restart(inner=fd.solvers.get("dpm-v3-2", statistics=SHARED)), ValueError,
         "without statistics of a network.*got 'dpm-v3-2"),
        (lambda: fd.solvers.Restart(inner="heun"), TypeError, "inner is a fastdiff.solvers.Solver"),
        (lambda: restart(inner="restart"), ValueError, "inner is a solver whose times fall"),
        (lambda: restart(s_noise=0.0), ValueError, "s_noise is positive"),
        (lambda: restart(inner="dpm-2", clip=1.0), TypeError, "no option 'clip'"),
        (lambda: fd.plan(VP, "recurrence", 6, length=0), ValueError, "length lies between 1"),
        (lambda: fd.plan(VP, "recurrence", 6, repeats="2"), TypeError, "repeats is an integer"),
        (lambda: fd.plan(VP, "ddim", 3, grid=[1, 0.3, 0.6, 0.1]), ValueError,
         r"from step 1 to 2 the time grows.*draws noise.*'restart'"),
        (lambda: fd.plan(VP, "ddim", 3, grid=[0.1, 0.3, 0.6, 1]), ValueError,
         "strictly decrease.*reversed.*encodes"),
        (lambda: fd.plan(VP, "ddim", 2, grid=[1, 0.3, 0.3]), ValueError, "repeats.*too many steps"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_the_reason(make, error, says):
    with pytest.raises(error, match=says):
        make()
