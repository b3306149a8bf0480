# SPDX-License-Identifier: Apache-2.0
"""Adaptive steps: the published loops, what a tolerance buys, samples that are alone in a batch,
and plans that replay what was accepted."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff as fd

FOLDER = Path(__file__).parent / "data"
CASES = {case["key"]: case for case in json.loads((FOLDER / "adaptive.json").read_text())["cases"]}
PUBLISHED = json.loads((FOLDER / "published.json").read_text())
MODEL = PUBLISHED["model"]
MIXTURE = fd.models.GaussianMixture(MODEL["weights"], MODEL["means"], MODEL["variances"])
VP, EDM, FLOW = fd.schedules.VPLinear(), fd.schedules.EDM(), fd.schedules.FlowMatching()
FORMS = {"bosh3": ("v", "epsilon", "velocity"), "dopri5": ("v",)}
FORMS |= {"dpm-12": ("epsilon", "x0"), "dpm-23": ("epsilon", "x0")}
EACH = [(name, form) for name, forms in FORMS.items() for form in forms]
BACKENDS = [name for name, state in fd.backends.status().items() if state == "available"]


def start(schedule, batch=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 8, generator=generator, dtype=torch.float64)
    return (x * schedule.prior_scale(schedule.t_max)).to(dtype)


def smooth(x, t, y=None):
    """A cheap network of any prediction, whose arithmetic does not depend on its batch."""
    out = torch.tanh(x.double()) * (0.6 + 0.1 * torch.cos(t.double())[:, None])
    return (out if y is None else out + y.double()[:, None]).to(x.dtype)


def exact(schedule, prediction, x, **ends):
    network = MIXTURE.network(schedule, prediction)
    options = {"rtol": 1e-9, "atol": 1e-9, "prediction": prediction, **ends}
    return fd.adaptive(network, x, schedule, "dopri5", max_nfe=5000, **options).x


def rms(a, b):
    return float((a - b).pow(2).mean().sqrt())


# -- the published loops ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", CASES)
def test_published_loops_end_where_their_code_ends(key):
    case = CASES[key]
    p, ends = case["params"], dict(zip(("t_max", "t_min"), case["grid"], strict=True))
    x, scale, schedule = torch.tensor(PUBLISHED["xT"], dtype=torch.float64), 1.0, VP
    if case["family"] == "k-diffusion":
        x, scale, schedule = x / float(VP.alpha(1.0)), float(VP.alpha(1e-3)), EDM
        options = {"published": "k-diffusion"}
    else:
        form = {"dpmsolver": "epsilon", "dpmsolver++": "x0"}[p["algorithm_type"]]
        options = {"published": "dpm-solver", "form": form}
    network = MIXTURE.network(schedule, "epsilon")
    tolerance = {"rtol": p["rtol"], "atol": p["atol"]}
    name = {2: "dpm-12", 3: "dpm-23"}[p["order"]]
    result = fd.adaptive(network, x, schedule, name, **tolerance, **ends, **options)
    assert set(result.nfe) == {case["nfe"]}
    np.testing.assert_allclose(result.x.numpy() * scale, case["x"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("schedule", "own"), [(VP, "dpm-solver"), (EDM, "k-diffusion")])
def test_published_is_the_loop_of_the_schedules_frame(schedule, own):
    network, x = MIXTURE.network(schedule, "epsilon"), start(schedule)
    given = fd.adaptive(network, x, schedule, "sample_dpm_adaptive", published=True)
    named = fd.adaptive(network, x, schedule, "dpm-23", published=own)
    assert given.times == named.times
    assert torch.equal(given.x, named.x)


def test_a_published_loop_steps_for_the_whole_batch_and_ours_for_each_sample():
    network, x = MIXTURE.network(VP, "epsilon"), start(VP)
    together = fd.adaptive(network, x, VP, "dpm-12", published=True)
    apart = fd.adaptive(network, x, VP, "dpm-12")
    assert len(set(together.times)) == 1
    assert len(set(apart.times)) == len(x)


def test_shared_steps_are_those_of_the_worst_sample():
    network, x = MIXTURE.network(VP, "epsilon"), start(VP, 6)
    options = {"rtol": 1e-4, "atol": 1e-4}
    shared = fd.adaptive(network, x, VP, shared=True, **options)
    apart = fd.adaptive(network, x, VP, **options)
    assert len(set(shared.times)) == 1
    assert shared.nfe[0] >= max(apart.nfe)
    assert torch.equal(fd.sample(network, x, shared.plan()), shared.x)
    assert rms(shared.x, exact(VP, "epsilon", x)) < 2e-4


# -- what a tolerance buys -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_error_and_cost_follow_the_tolerance(name):
    order = fd.solvers.adaptive_info(name).measured_order
    loose, tight = (1e-3, 1e-5) if order > 2 else (1e-3, 1e-4)
    x = start(VP)
    network, true = MIXTURE.network(VP, "epsilon"), exact(VP, "epsilon", x)
    runs = [
        fd.adaptive(network, x, VP, name, rtol=tol, atol=tol, max_nfe=5000)
        for tol in (loose, tight)
    ]
    errors = [rms(run.x, true) for run in runs]
    costs = [np.mean(run.nfe) for run in runs]
    span = np.log(loose / tight)
    # the step of the higher order is kept: its error in all is about h^order, and a step's h^order
    # is what the tolerance bounds
    assert 0.75 < np.log(errors[0] / errors[1]) / span < 1.5
    assert 0.5 / order < np.log(costs[1] / costs[0]) / span < 1.2 / order


@pytest.mark.parametrize("name", ["bosh3", "dopri5"])
@pytest.mark.parametrize(("schedule", "ends"), [(VP, (1.0, 1e-3)), (FLOW, (1.0, 0.0))])
def test_costs_no_more_than_torchdiffeq_at_equal_error(name, schedule, ends):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    x, network = start(schedule), MIXTURE.network(schedule, "velocity")
    true = exact(schedule, "velocity", x)
    asked = []

    def velocity(t, x):
        asked.append(float(t))  # it steps past the end, where there is no schedule
        return network(x, t.clamp(min=0.0).expand(len(x)))

    ours = []
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        run = fd.adaptive(*(network, x, schedule, name), rtol=tol, atol=tol, prediction="velocity")
        ours.append((np.mean(run.nfe), rms(run.x, true)))
        assert min(map(min, run.times)) == ends[1]
    for tol in (1e-1, 1e-2, 1e-3):
        asked.clear()
        times = torch.tensor(ends, dtype=torch.float64)
        theirs = torchdiffeq.odeint(velocity, x, times, rtol=tol, atol=tol, method=name)[-1]
        assert min(asked) < 0.0
        error = rms(theirs, true)
        if error < 0.05:  # above, samples end on another mode
            assert any(nfe <= len(asked) and own <= error for nfe, own in ours)


def test_steps_in_the_angle_are_the_same_in_every_scaling():
    # one flow in two frames: times of equal sigma/alpha, samples that differ by alpha
    ends = [VP.t_of_lambda(EDM.lambda_t(t)) for t in (80.0, 0.01)]
    a, b = (dict(zip(("t_max", "t_min"), each, strict=True)) for each in (ends, (80.0, 0.01)))
    x = start(EDM)
    edm = fd.adaptive(MIXTURE.network(EDM, "epsilon"), x, EDM, "bosh3", **b)
    scaled = x * float(VP.alpha(a["t_max"]))
    vp = fd.adaptive(MIXTURE.network(VP, "epsilon"), scaled, VP, "bosh3", **a)
    assert edm.nfe == vp.nfe
    for own, other in zip(edm.times, vp.times, strict=True):
        np.testing.assert_allclose(EDM.lambda_t(own), VP.lambda_t(other), atol=1e-9)
    torch.testing.assert_close(edm.x * float(VP.alpha(a["t_min"])), vp.x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", ["velocity", "v", "x0"])
def test_flow_matching_runs_from_noise_to_data(prediction):
    x = start(FLOW)
    network = MIXTURE.network(FLOW, prediction)
    run = fd.adaptive(network, x, FLOW, "dopri5", rtol=1e-6, atol=1e-6, prediction=prediction)
    assert {(times[0], times[-1]) for times in run.times} == {(1.0, 0.0)}
    # a prediction that says nothing at t = 0 jumps there from t_floor
    assert {times[-2] == FLOW.t_floor for times in run.times} == {prediction == "x0"}
    true = exact(FLOW, "velocity", x)
    assert rms(run.x, true) < (1e-5 if prediction != "x0" else 1e-4)


@pytest.mark.parametrize(("name", "extra"), [("bosh3", 0), ("dpm-23", 1)])
def test_a_run_to_sigma_zero_ends_by_a_jump_to_x0(name, extra):
    x, network = start(EDM), MIXTURE.network(EDM, "x0")
    run = fd.adaptive(network, x, EDM, name, prediction="x0")
    short = fd.adaptive(network, x, EDM, name, prediction="x0", t_min=EDM.sigma_min)
    x0 = network(short.x, torch.full((len(x),), EDM.sigma_min))
    torch.testing.assert_close(run.x, x0, rtol=0, atol=1e-10)  # x0 of x0 and x, times sigma_max
    assert [a - b for a, b in zip(run.nfe, short.nfe, strict=True)] == [extra] * len(x)


# -- alone in a batch ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), EACH)
def test_a_sample_does_not_depend_on_its_batch_and_replays_bit_for_bit(name, form):
    x = start(VP, 5, torch.float32) * torch.tensor([1.0, 3.0, 0.1, 1.0, 8.0])[:, None]
    options = {"rtol": 1e-3, "atol": 1e-3, "form": form}
    run = fd.adaptive(smooth, x, VP, name, **options)
    assert len(set(run.times)) > 1
    for b in range(len(x)):
        alone = fd.adaptive(smooth, x[b : b + 1], VP, name, **options)
        assert (alone.times[0], alone.nfe[0]) == (run.times[b], run.nfe[b])
        assert torch.equal(alone.x[0], run.x[b])
        plan = run.plan(b)
        assert torch.equal(fd.sample(smooth, x[b : b + 1], plan)[0], run.x[b])
        assert plan.nfe <= run.nfe[b]


def test_the_network_is_called_for_the_samples_that_need_it():
    counts = torch.zeros(5, dtype=torch.int64)

    def counted(x, t, who):
        counts[who] += 1
        return smooth(x, t)

    x = start(VP, 5, torch.float32) * torch.tensor([1.0, 3.0, 0.1, 1.0, 8.0])[:, None]
    refused = 0
    for name in FORMS:
        counts.zero_()
        run = fd.adaptive(counted, x, VP, name, rtol=1e-3, atol=1e-3, cond={"who": torch.arange(5)})
        assert run.nfe == tuple(counts.tolist())
        assert len(set(run.times)) > 1
        refused += sum(run.refused)
    assert refused > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_takes_the_same_steps_and_replays_them(backend):
    x = start(VP, 2, torch.float32)
    options = {"rtol": 0.3, "atol": 0.3}
    run = fd.adaptive(smooth, x, VP, "bosh3", backend=backend, **options)
    ours = fd.adaptive(smooth, x, VP, "bosh3", backend="torch", **options)
    assert run.nfe == ours.nfe
    torch.testing.assert_close(run.x, ours.x, rtol=0, atol=1e-4)
    replayed = fd.sample(smooth, x[:1], run.plan(0), backend=backend)
    assert torch.equal(replayed, run.x[:1])


def test_no_sample_and_other_dtypes():
    assert fd.adaptive(smooth, torch.empty(0, 8), VP).times == ()
    x = start(VP, 2, torch.bfloat16)
    run = fd.adaptive(smooth, x, VP, dtype=torch.float32)
    assert run.x.dtype == torch.bfloat16
    strided = start(VP, 4)[::2].expand(2, 2, 8).transpose(0, 1)
    run = fd.adaptive(lambda x, t: torch.tanh(x) * 0.5, strided, VP)
    assert run.x.shape == strided.shape
    assert torch.equal(run.x[:, 0], run.x[:, 1])


# -- guidance and replay ---------------------------------------------------------------------------


def test_guidance_is_that_of_the_guided_network():
    x, y = start(VP, 3), torch.tensor([0.5, -0.5, 0.2])

    def guided(x, t, y, scale):
        plain = smooth(x, t, torch.zeros_like(y))
        return plain + scale[:, None] * (smooth(x, t, y) - plain)

    uncond = {"y": torch.zeros(3)}
    for scale in (3.0, torch.tensor([1.5, 3.0, 2.0], dtype=torch.float64)):
        each = torch.as_tensor(scale, dtype=torch.float64).expand(3)
        run = fd.adaptive(smooth, x, VP, cond={"y": y}, guidance=fd.CFG(scale, uncond=uncond))
        by_hand = fd.adaptive(guided, x, VP, cond={"y": y, "scale": each})
        assert run.nfe == by_hand.nfe
        torch.testing.assert_close(run.x, by_hand.x, rtol=0, atol=1e-10)


def test_a_replayed_plan_has_the_exact_gradient():
    x = start(VP, 1).requires_grad_()
    plan = fd.adaptive(smooth, x.detach(), VP, "dopri5").plan()
    gradients = []
    for gradient in ("discrete", "backprop"):
        out = fd.sample(smooth, x, plan, gradient=gradient)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FORMS)
def test_a_replayed_plan_is_captured_as_one_loop(name, recorder):
    x = start(VP, 2, torch.float32)
    run = fd.adaptive(smooth, x, VP, name, shared=True)
    sampler = fd.Sampler(smooth, run.plan(), graph="loop")
    for _ in range(2):
        torch.testing.assert_close(sampler(x), run.x, rtol=0, atol=1e-6)
    assert recorder.launched > 0


def test_a_saved_plan_is_the_one_that_was_replayed(tmp_path):
    plan = fd.adaptive(smooth, start(VP, 1), VP).plan(0)
    plan.save(tmp_path / "plan.json")
    assert fd.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(("name", "form"), [e for e in EACH if e[1] in ("epsilon", "x0")])
def test_a_perfect_prediction_stays_on_the_marginal(name, form):
    pair = fd.adaptive(smooth, start(VP, 1), VP, name, form=form).solver
    plan = pair.plan(VP, 4, grid="logsnr", prediction=form)
    x0, eps = start(VP, 2), start(VP, 2).flip(1)
    at = {"epsilon": eps, "x0": x0}[form]
    x = float(VP.alpha(plan.times[0])) * x0 + float(VP.sigma(plan.times[0])) * eps
    got = fd.sample(lambda x, t: at, x, plan)
    last = plan.times[-1]
    want = float(VP.alpha(last)) * x0 + float(VP.sigma(last)) * eps
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_step_in_the_angle_keeps_its_digits():
    mpmath = pytest.importorskip("mpmath")
    pair = fd.solvers.EmbeddedRK("bosh3")
    with mpmath.workdps(50):
        for t, h in itertools.product((80.0, 1.0, 1e-3), (1e-8, 1e-3, 1.0, 50.0)):
            s, end = mpmath.mpf(t), mpmath.mpf(float(EDM.t_of_lambda(EDM.lambda_t(t) + h)))
            rows = fd.solvers.Rows(EDM, "v", "v")
            pair.step(rows, t, float(end), None, "last")
            b_0 = rows.stages[-1].b[-1]  # the weight 2/9 of the first output
            length = mpmath.atan(end) - mpmath.atan(s)
            want = mpmath.hypot(1, end) / mpmath.hypot(1, s) * length * 2 / 9
            assert abs(b_0 / want - 1) < 1e-12


# -- refusals --------------------------------------------------------------------------------------


def nan_after(limit):
    def network(x, t):
        out = smooth(x, t)
        out[1][t[1:2].expand(8) < limit] = float("nan")
        return out

    return network


def nan_near_the_data(x, t):
    return torch.where((t < 0.0021)[:, None], float("nan"), smooth(x, t))


X = start(VP, 2)
REFUSED = {
    "graph": ({"graph": "loop"}, NotImplementedError, r"result\.plan\(sample\)"),
    "stage": ({"graph": "stage"}, NotImplementedError, "takes graph='stage'"),
    "gradient": ({"gradient": "discrete"}, NotImplementedError, "takes gradient='discrete'"),
    "name": ({"solver": "bosh33"}, ValueError, "Did you mean 'bosh3'"),
    "kind": ({"solver": 3}, TypeError, "adaptive_names"),
    "plan": (
        {"schedule": fd.plan(VP, "ddim", 4)},
        TypeError,
        r"fastdiff\.schedules\.Schedule; got Plan\. It takes no plan",
    ),
    "option": ({"eta": 1.0}, TypeError, "no option 'eta'"),
    "form": ({"form": "score"}, ValueError, "form is one of 'v', 'epsilon', 'velocity'"),
    "rtol": ({"rtol": -1.0}, ValueError, "rtol is finite and not negative"),
    "exact": ({"rtol": 0.0, "atol": 0.0}, ValueError, "no step is without an error"),
    "few": ({"max_nfe": 3}, ValueError, "a step of bosh3 takes 4 evaluations"),
    "count": ({"max_nfe": 10.0}, TypeError, "max_nfe is an integer"),
    "shared": ({"shared": "yes"}, ValueError, "shared is one of False, True"),
    "first": ({"h_init": 0.0}, ValueError, "h_init is positive"),
    "loop": ({"published": "diffusers"}, ValueError, "'dpm-solver', 'k-diffusion'"),
    "pair": ({"published": True}, ValueError, "those of dpm-12 and dpm-23"),
    "scales": (
        {"cond": {"y": torch.ones(2)}, "guidance": fd.CFG([1.0, 2.0], uncond={"y": 0.0})},
        NotImplementedError,
        "one scale a stage",
    ),
    "batch": (
        {"cond": {"y": torch.ones(2)}, "guidance": fd.CFG(torch.ones(3), uncond={"y": 0.0})},
        ValueError,
        "needs 2 values",
    ),
    "staged": (
        {"cond": {"y": fd.PerStage(torch.ones(4, 2))}},
        NotImplementedError,
        "PerStage in the conditioning",
    ),
    "cond": ({"cond": {"y": torch.ones(3)}}, ValueError, "one entry a sample"),
    "ends": ({"t_max": 0.1, "t_min": 0.2}, ValueError, "t_min < t_max"),
    "integers": ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "real and floating"),
    "schedule": ({"schedule": "vp"}, TypeError, "schedule is a fastdiff.schedules.Schedule"),
    "lambda": ({"schedule": FLOW, "solver": "dpm-23"}, ValueError, "infinite at t_max = 1"),
    "network": ({"network": None}, TypeError, r"callable as network\(x, t\); got None"),
    "dtype": ({"dtype": torch.int8}, TypeError, "dtype is a floating torch.dtype"),
    "meta": ({"x": X.to("meta")}, ValueError, "on the meta device, which has none"),
    "tracked": ({"x": X.clone().requires_grad_()}, ValueError, "x requires grad"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_refuses_before_the_first_call(which):
    options, kind, words = REFUSED[which]

    def network(*_, **__):
        raise AssertionError("called")

    given = {"network": network, "x": X, "schedule": VP, "solver": "bosh3"} | options
    with pytest.raises(kind, match=words):
        fd.adaptive(**given)


def test_a_tolerance_out_of_reach_says_how_far_it_came():
    with pytest.raises(
        ValueError, match=r"as t = 0\.\d+ with sample \d after \d+ evaluations"
    ) as e:
        fd.adaptive(smooth, X, VP, rtol=1e-9, atol=0.0, max_nfe=50)
    assert isinstance(e.value, RuntimeError)
    assert "times what rtol = 1e-09 and atol = 0 allow" in str(e.value)
    assert "larger max_nfe" in str(e.value)


def test_nan_names_the_sample_and_the_time():
    with pytest.raises(ValueError, match=r"NaN or infinity for sample 1, in the step from t = 0\."):
        fd.adaptive(nan_after(0.3), X, VP)
    for name in ("dpm-12", "dpm-23"):  # the evaluation of a jump is in no error
        with pytest.raises(ValueError, match=r"for sample \d, in the step from t = 0\.002 to 0"):
            fd.adaptive(nan_near_the_data, 80.0 * X, EDM, name, prediction="x0")


def test_a_network_that_writes_to_its_input_is_refused():
    with pytest.raises(ValueError, match="wrote to its input in place"):
        fd.adaptive(lambda x, t: x.mul_(0.5), X, VP)
    with pytest.raises(ValueError, match="returns its input's shape"):
        fd.adaptive(lambda x, t: x[:1], X, VP)


def test_a_compiled_function_is_told_to_replay():
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return fd.adaptive(smooth, x, VP).x

    with pytest.raises(Exception, match=r"inside torch\.compile"):
        compiled(X)


def test_a_plan_of_an_adaptive_name_points_to_the_verb():
    for name in ("dpm-12", "dpm-23", "dpm_adaptive", "sample_dpm_adaptive"):
        with pytest.raises(ValueError, match=r"Use fastdiff\.adaptive"):
            fd.plan(VP, name, 10)


def test_a_plan_of_samples_with_times_of_their_own_is_named():
    run = fd.adaptive(smooth, start(VP, 3), VP, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"Give plan\(sample\)"):
        run.plan()
    with pytest.raises(ValueError, match="below 3"):
        run.plan(3)
    with pytest.raises(ValueError, match="got a run of none"):
        fd.adaptive(smooth, torch.empty(0, 8), VP).plan()
