# SPDX-License-Identifier: Apache-2.0
"""Running plans: what a network is given, what comes back, and what is refused."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch

import fastdiff as fd

VP = fd.schedules.VPLinear()
BACKENDS = [name for name, state in fd.backends.status().items() if state == "available"]
EACH = pytest.mark.parametrize("backend", BACKENDS)
THRESHOLDS = EACH


def network(x, t, **cond):
    """A smooth stand-in for a network, different for every sample and time."""
    shift = cond["y"].reshape(-1, *[1] * (x.ndim - 1)) if "y" in cond else 0.0
    return torch.tanh(x + shift) * (1 + t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))


def literal(plan, net, x, draw=None):
    """The formulas of fastdiff.plan, one stage at a time, in float64."""
    e, at_e, outputs = None, False, []
    for i, s in enumerate(plan.stages):
        point = e if at_e else x
        t = torch.full((len(x),), s.model_time, dtype=torch.float64)
        h = s.p * point + s.q * net(s.c_in * point, t)
        if s.clip:
            h = h.clamp(*s.clip)
        if s.threshold:
            quantile, floor = s.threshold
            scale = torch.quantile(h.abs().flatten(1), quantile, dim=1).clamp(min=floor)
            scale = scale.reshape(-1, *[1] * (h.ndim - 1))
            h = h.clamp(-scale, scale) / scale
        outputs.insert(0, h)
        xi = draw(i) if s.c or s.c_e else 0.0
        rows = []
        for a, b, weights, c in ((s.a_x, s.a_e, s.b, s.c), (s.d_x, s.d_e, s.g, s.c_e)):
            value = a * x + (b * e if b else 0.0) + c * xi
            rows.append(value + sum(w * o for w, o in zip(weights, outputs, strict=False)))
        at_e = s.writes_e
        x, e = rows[0], rows[1] if at_e else e
    return x


@EACH
@pytest.mark.parametrize("solver", fd.solvers.names())
def test_a_run_is_the_plans_formulas(solver, backend):
    plan = fd.plan(VP, solver, 6, prediction="v", t_max=0.9)
    x = torch.randn(3, 5, dtype=torch.float64)
    seeds = [11, 5, 2**63 + 1]

    def draw(i):
        return fd.noise.normal(x.shape, seeds, plan.stages[i].noise[0][0], dtype=torch.float64)

    got = fd.sample(network, x, plan, backend=backend, seed=seeds)
    torch.testing.assert_close(got, literal(plan, network, x, draw), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "backend"),
    [
        (name, backend)
        for name in fd.solvers.names()
        for backend in BACKENDS
        # the interpreter takes seconds for one
        if "clip" in fd.solvers.info(name).options and (backend != "triton" or name == "dpmpp-2m")
    ],
)
def test_a_thresholded_run_is_the_plans_formulas(solver, backend):
    plan = fd.plan(VP, solver, 6, prediction="v", threshold=(0.8, 0.3))
    x = torch.randn(3, 4, 5, dtype=torch.float64)

    def draw(i):
        return fd.noise.normal(x.shape, 7, plan.stages[i].noise[0][0], dtype=torch.float64)

    got = fd.sample(network, x, plan, backend=backend, seed=7)
    torch.testing.assert_close(got, literal(plan, network, x, draw), rtol=1e-11, atol=1e-11)
    narrow = fd.sample(network, x.float(), plan, backend=backend, seed=7)
    torch.testing.assert_close(narrow.double(), got, rtol=1e-3, atol=1e-3)


@EACH
def test_scaled_inputs_and_extra_evaluation_points(backend):
    schedule = fd.schedules.EDM()
    for solver in ("heun", "dpmpp-3s", "dpmpp-2m"):
        plan = fd.plan(schedule, solver, 5, prediction="edm")
        x = fd.noise.prior(plan, (2, 3, 4), seeds=1, dtype=torch.float64)
        got = fd.sample(network, x, plan, backend=backend)
        torch.testing.assert_close(got, literal(plan, network, x), rtol=1e-11, atol=1e-11)


@EACH
def test_float32_agrees_with_float64_to_rounding(backend):
    plan = fd.plan(VP, "deis-3", 8, prediction="v")
    x = torch.randn(4, 3, 8, 8)
    exact = fd.sample(network, x.double(), plan, backend=backend)
    got = fd.sample(network, x, plan, backend=backend)
    assert got.dtype == torch.float32
    assert float((got - exact).norm() / exact.norm()) < 1e-5


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_network_keeps_a_float32_state(dtype, backend):
    plan = fd.plan(VP, "dpmpp-2m", 8, prediction="v")
    seen = []

    def low(x, t):
        seen.append((x.dtype, t.dtype))
        return network(x, t)

    x = torch.randn(4, 64)
    got = fd.sample(low, x, plan, backend=backend, dtype=dtype)
    exact = fd.sample(network, x.double(), plan)
    assert set(seen) == {(dtype, torch.float32)}
    assert got.dtype == torch.float32
    assert float((got - exact).norm() / exact.norm()) < 0.05
    assert fd.sample(low, x.to(dtype), plan, backend=backend).dtype == dtype


def test_the_input_dtype_follows_the_networks_parameters():
    linear = torch.nn.Linear(8, 8).to(torch.bfloat16)
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x, t):
            seen.append(x.dtype)
            return self.linear(x)

    fd.sample(Net(), torch.randn(2, 8), fd.plan(VP, "ddim", 2))
    assert set(seen) == {torch.bfloat16}


def test_backends_agree():
    plan = fd.plan(VP, "ddim", 5, eta=0.7, clip=1.0, prediction="v")
    x = torch.randn(3, 100)
    results = [fd.sample(network, x, plan, backend=b, seed=3) for b in BACKENDS]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


# -- what does not change the result ---------------------------------------------------------------


@EACH
def test_a_sample_does_not_depend_on_its_batch(backend):
    plan = fd.plan(VP, "ddpm", 5, prediction="v")
    x = torch.randn(6, 33)
    together = fd.sample(network, x, plan, backend=backend, seed=range(10, 16))
    for b in range(6):
        alone = fd.sample(network, x[b : b + 1], plan, backend=backend, seed=10 + b)
        assert torch.equal(alone[0], together[b])


def test_a_sample_does_not_depend_on_the_threads():
    plan = fd.plan(VP, "ddpm", 3, prediction="v")
    x = torch.randn(2, 200_001)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(fd.sample(lambda x, t: 0.5 * x, x, plan, seed=0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@EACH
def test_strides_do_not_matter(backend):
    plan = fd.plan(VP, "ddpm", 4, prediction="v")
    x = torch.randn(2, 6, 5, 4).permute(0, 3, 1, 2)
    assert not x.is_contiguous()

    def strided(x, t):
        return network(x, t).transpose(2, 3).contiguous().transpose(2, 3)

    plain = fd.sample(network, x.contiguous(), plan, backend=backend, seed=0)
    assert torch.equal(fd.sample(network, x, plan, backend=backend, seed=0), plain)
    assert torch.equal(fd.sample(strided, x, plan, backend=backend, seed=0), plain)


@EACH
def test_a_network_may_return_its_own_input(backend):
    plan = fd.plan(VP, "deis-3", 5)
    x = torch.randn(3, 40)
    copied = fd.sample(lambda x, t: x.clone(), x, plan, backend=backend)
    assert torch.equal(fd.sample(lambda x, t: x, x, plan, backend=backend), copied)


def test_inputs_are_left_as_they_are_and_results_are_the_callers():
    plan = fd.plan(VP, "deis-3", 5)
    x = torch.randn(3, 40)
    before = x.clone()
    sampler = fd.Sampler(network, plan)
    first = sampler(x)
    kept = first.clone()
    sampler(torch.randn(3, 40))
    assert torch.equal(x, before)
    assert torch.equal(first, kept)
    table = plan.table.copy()
    np.testing.assert_array_equal(plan.table, table)


def test_out_is_filled_and_returned():
    plan = fd.plan(VP, "deis-3", 5)
    x = torch.randn(3, 40)
    out = torch.full_like(x, torch.nan)
    assert fd.sample(network, x, plan, out=out) is out
    assert torch.equal(out, fd.sample(network, x, plan))


def test_sampler_serves_one_shape_after_another():
    sampler = fd.Sampler(network, fd.plan(VP, "deis-3", 5))
    for shape, dtype in (
        ((3, 40), torch.float32),
        ((1, 7), torch.float64),
        ((3, 40), torch.float32),
    ):
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(sampler(x), fd.sample(network, x, sampler.plan))


def test_inference_mode_and_no_grad_in_any_order():
    sampler = fd.Sampler(network, fd.plan(VP, "deis-3", 5))
    x = torch.randn(3, 40)
    with torch.inference_mode():
        inside = sampler(x)
    outside = sampler(x)
    with torch.no_grad():
        again = sampler(x)
    assert torch.equal(inside, outside)
    assert torch.equal(outside, again)
    outside.add_(1.0)  # an ordinary tensor


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1,), (3,), (2, 1, 1, 1)])
@EACH
def test_odd_shapes(shape, backend):
    plan = fd.plan(VP, "ddpm", 3)
    x = torch.randn(shape)
    out = fd.sample(lambda x, t: 0.5 * x, x, plan, backend=backend, seed=0)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def test_an_empty_batch_calls_no_network():
    def never(x, t):
        raise AssertionError

    assert fd.sample(never, torch.empty(0, 3), fd.plan(VP, "ddim", 3)).shape == (0, 3)


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.skipif("cpu" not in BACKENDS, reason="counts the compiled path")
def test_the_loop_allocates_no_tensor():
    x = torch.randn(4, 3, 16, 16)
    out = torch.randn(4, 3, 16, 16)
    result = torch.empty_like(x)
    counts = []
    for steps in (10, 50):
        plan = fd.plan(VP, "ddim", steps, eta=1.0)
        sampler = fd.Sampler(lambda x, t: out, plan, backend="cpu")
        sampler(x, seed=0, out=result)
        with torch.profiler.profile(profile_memory=True) as profile:
            sampler(x, seed=0, out=result)
        events = profile.events()
        counts.append((len(events), sum(e.self_cpu_memory_usage > 0 for e in events)))
    assert counts[0] == counts[1]  # operations and allocations do not depend on the steps


@pytest.mark.skipif("cpu" not in BACKENDS, reason="counts the compiled path")
def test_memory_does_not_grow_with_calls():
    x, out = torch.randn(4, 256), torch.randn(4, 256)
    sampler = fd.Sampler(lambda x, t: out, fd.plan(VP, "deis-3", 20))
    result = torch.empty_like(x)
    for _ in range(3):
        sampler(x, out=result)
    gc.collect()
    tracemalloc.start()
    try:
        sampler(x, out=result)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            sampler(x, out=result)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2000  # bytes, over 1000 steps


# -- conditioning and guidance ---------------------------------------------------------------------


def test_conditioning_reaches_the_network():
    seen = []

    def net(x, t, y, more):
        seen.append((y, more["deep"]["z"], more["fixed"]))
        return x

    y, z = torch.arange(3.0), torch.ones(3, 2)
    fixed = (torch.zeros(7),)
    cond = {"y": y, "more": {"deep": {"z": z}, "fixed": fixed}}
    fd.sample(net, torch.randn(3, 4), fd.plan(VP, "ddim", 1), cond=cond)
    assert seen[0][0] is y
    assert seen[0][1] is z
    assert seen[0][2] is fixed


def test_conditioning_may_be_anything_the_network_takes():
    token = object()
    seen = []

    def net(x, t, c):
        seen.append(c)
        return x

    fd.sample(net, torch.randn(3, 4), fd.plan(VP, "ddim", 1), cond=token)
    assert seen == [token]


@EACH
@pytest.mark.parametrize("solver", ["deis-3", "dpm-3", "ddpm"])
def test_guidance_is_the_combination_in_one_batched_call(solver, backend):
    plan = fd.plan(VP, solver, 5, prediction="v", t_max=0.9)
    x = torch.randn(4, 6, dtype=torch.float64)
    y, none = torch.arange(4.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    calls = []

    def counted(x, t, y):
        calls.append(len(x))
        return network(x, t, y=y)

    def guided(x, t):
        out, uncond = network(x, t, y=y), network(x, t, y=none.expand(4))
        return uncond + 3.0 * (out - uncond)

    guidance = fd.CFG(3.0, uncond={"y": none})
    options = {"backend": backend, "seed": 7}
    got = fd.sample(counted, x, plan, cond={"y": y}, guidance=guidance, **options)
    expected = fd.sample(guided, x, plan, **options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert calls == [8] * plan.nfe


@EACH
def test_guidance_per_sample_and_per_stage(backend):
    plan = fd.plan(VP, "deis-3", 5, prediction="v")
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64)

    def sample(scale, rows=slice(None)):
        guidance = fd.CFG(scale, uncond={"y": 0.0})
        return fd.sample(
            network, x[rows], plan, cond={"y": y[rows]}, guidance=guidance, backend=backend
        )

    each = sample(torch.tensor([1.0, 2.5, 4.0]))
    for b, scale in enumerate((1.0, 2.5, 4.0)):
        torch.testing.assert_close(each[b], sample(scale, slice(b, b + 1))[0], rtol=1e-12, atol=0)
    stages = sample([2.5, 2.5, 2.5, 2.5, 2.5])
    torch.testing.assert_close(stages, sample(2.5), rtol=1e-12, atol=0)
    changed = sample([2.5, 2.5, 2.5, 2.5, 9.0])
    assert not torch.equal(changed, stages)


def test_scale_one_calls_the_network_once_a_sample():
    calls = []

    def net(x, t, y):
        calls.append(len(x))
        return x

    plan = fd.plan(VP, "ddim", 2)
    cond = {"y": torch.zeros(3)}
    fd.sample(net, torch.randn(3, 4), plan, cond=cond, guidance=fd.CFG(1.0, uncond={"y": 0.0}))
    assert calls == [3, 3]


def test_missing_keys_of_uncond_are_shared():
    seen = []

    def net(x, t, y, z):
        seen.append((y.tolist(), z.tolist()))
        return x

    cond = {"y": torch.tensor([5, 6]), "z": torch.tensor([1.0, 2.0])}
    guidance = fd.CFG(2.0, uncond={"y": 9})
    fd.sample(net, torch.randn(2, 4), fd.plan(VP, "ddim", 1), cond=cond, guidance=guidance)
    assert seen == [([9, 9, 5, 6], [1.0, 2.0, 1.0, 2.0])]


# -- noise, callbacks, extras ----------------------------------------------------------------------


@EACH
def test_explicit_noise_replaces_the_drawn(backend):
    plan = fd.plan(VP, "ddpm", 4, prediction="v")
    x = torch.randn(2, 9)
    z = torch.stack([fd.noise.normal(x.shape, [4, 8], stage.noise[0][0]) for stage in plan.stages])
    drawn = fd.sample(network, x, plan, backend=backend, seed=[4, 8])
    given = fd.sample(network, x, plan, backend=backend, xi=z)
    torch.testing.assert_close(given, drawn, rtol=1e-6, atol=1e-6)
    assert not torch.equal(fd.sample(network, x, plan, backend=backend, xi=-z), drawn)


def test_seeds_decide_the_noise():
    plan = fd.plan(VP, "ddpm", 4, prediction="v")
    x = torch.randn(2, 9)
    assert torch.equal(
        fd.sample(network, x, plan, seed=5), fd.sample(network, x, plan, seed=range(5, 7))
    )
    assert not torch.equal(fd.sample(network, x, plan, seed=5), fd.sample(network, x, plan, seed=6))


@EACH
def test_callback_sees_the_state_and_the_x0_prediction(backend):
    model = fd.models.GaussianMixture([0.5, 0.5], [[1.0, 2.0], [-1.0, 0.5]], [[0.1] * 2] * 2)
    plan = fd.plan(VP, "dpm-2", 4, prediction="v")
    seen = []

    def note(stage, t, x, x0):
        exact = model.x0(x, float(VP.alpha(t)), float(VP.sigma(t)))
        torch.testing.assert_close(x0, exact, rtol=1e-8, atol=1e-8)
        seen.append((stage, t))

    x = fd.noise.prior(plan, (5, 2), seeds=0, dtype=torch.float64)
    net = model.network(VP, "v")
    with_callback = fd.sample(net, x, plan, callback=note, backend=backend)
    assert [s for s, _ in seen] == list(range(8))
    assert [t for _, t in seen] == [stage.t for stage in plan.stages]
    assert torch.equal(with_callback, fd.sample(net, x, plan, backend=backend))


def test_callback_under_guidance_sees_the_guided_x0():
    plan = fd.plan(VP, "ddim", 3, prediction="x0")
    y = torch.tensor([1.0, 2.0])
    seen = []
    scales = [3.0, 3.0, 7.0]
    for scale in (3.0, torch.tensor([3.0, 7.0]), scales):
        fd.sample(
            lambda x, t, y: y[:, None].expand(-1, 4).contiguous(),
            torch.randn(2, 4),
            plan,
            cond={"y": y},
            guidance=fd.CFG(scale, uncond={"y": 0.5}),
            callback=lambda stage, t, x, x0: seen.append(x0.clone()),
        )
    used = [3.0] * 3 + [torch.tensor([3.0, 7.0])] * 3 + scales
    assert len(seen) == 9
    for x0, scale in zip(seen, used, strict=True):
        expected = (0.5 + scale * (y - 0.5))[:, None].expand(-1, 4)
        torch.testing.assert_close(x0, expected)


def test_callback_sees_the_clipped_x0():
    plan = fd.plan(VP, "ddim", 3, prediction="x0", clip=0.25)
    seen = []
    run(plan=plan, callback=lambda stage, t, x, x0: seen.append(float(x0.abs().max())))
    assert seen == [0.25] * 3


@THRESHOLDS
def test_callback_sees_the_thresholded_x0(backend):
    plan = fd.plan(VP, "ddim", 1, t_min=0.0, prediction="x0", threshold=(0.5, 0.1))
    seen = []
    got = fd.sample(
        lambda x, t: 3 * x,
        torch.randn(2, 3, 5),
        plan,
        backend=backend,
        callback=lambda stage, t, x, x0: seen.append(x0),
    )
    assert float(seen[0].abs().max()) == 1.0
    torch.testing.assert_close(got, seen[0])


@EACH
def test_extra_registers_are_read_with_their_weights(backend):
    stages = (
        fd.Stage(t=1.0, a_x=0.5, b=(0.25,), r=(2.0, 0.0), d_x=1.0, g=(0.5,), s=(0.0, -1.0)),
        fd.Stage(t=0.5, a_x=1.0, b=(0.5,), r=(0.0, 3.0)),
    )
    plan = fd.Plan(stages=stages, times=(1.0, 0.0))
    x, u, v = torch.randn(3, 2, 5, dtype=torch.float64)
    got = fd.sample(lambda x, t: torch.cos(x), x, plan, extras=(u, v), backend=backend)
    h = torch.cos(x)
    e, x = x + 0.5 * h - v, 0.5 * x + 0.25 * h + 2 * u
    torch.testing.assert_close(got, x + 0.5 * torch.cos(e) + 3 * v, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="2 extra input registers; got 1"):
        fd.sample(lambda x, t: x, u, plan, extras=(u,), backend=backend)
    with pytest.raises(ValueError, match="broadcastable"):
        fd.sample(lambda x, t: x, u, plan, extras=(u, torch.ones(7)), backend=backend)


@EACH
def test_a_stage_without_evaluation_costs_no_call(backend):
    stages = (
        fd.Stage(t=1.0, a_x=0.5, c=1.0, noise=((1, 0.6), (2, 0.8)), evaluate=False),
        fd.Stage(t=1.0, a_x=0.5, b=(0.5,)),
    )
    plan = fd.Plan(stages=stages, times=(1.0, 0.0))
    calls = []

    def net(x, t):
        calls.append(x.clone())
        return torch.ones_like(x)

    x = torch.randn(2, 6, dtype=torch.float64)
    got = fd.sample(net, x, plan, seed=3, backend=backend)
    normal = [fd.noise.normal(x.shape, 3, k, dtype=torch.float64) for k in (1, 2)]
    noisy = 0.5 * x + 0.6 * normal[0] + 0.8 * normal[1]
    assert plan.nfe == len(calls) == 1
    torch.testing.assert_close(calls[0], noisy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, 0.5 * noisy + 0.5, rtol=1e-12, atol=1e-12)


# -- what is refused -------------------------------------------------------------------------------


def run(net=network, x=None, plan=None, **options):
    x = torch.randn(2, 4) if x is None else x
    return fd.sample(net, x, plan or fd.plan(VP, "deis-2", 3), **options)


@EACH
@pytest.mark.parametrize(
    ("net", "error", "says"),
    [
        (lambda x, t: x[:, :2], ValueError, r"stage 0 \(t = 1\).*shape, \(2, 4\); got \(2, 2\)"),
        (lambda x, t: x.reshape(4, 2), ValueError, r"\(2, 4\); got \(4, 2\)"),
        (lambda x, t: (x, x), TypeError, r"got tuple.*\[0\]"),
        (lambda x, t: None, TypeError, "got NoneType"),
        (lambda x, t: x.long(), ValueError, "real floating dtype; got torch.int64"),
        (lambda x, t: x.to(torch.complex64), ValueError, "real floating dtype"),
        (lambda x, t: x.to("meta"), ValueError, "on cpu; got meta"),
    ],
)
def test_bad_network_outputs_are_named(net, error, says, backend):
    x = torch.randn(2, 4)
    before = x.clone()
    with pytest.raises(error, match=says):
        run(net, x, backend=backend)
    with pytest.raises(error, match=says):
        run(net, x, backend=backend, check=True)
    with pytest.raises(error, match=says):
        run(net, x, backend=backend, callback=lambda *_: None)
    assert torch.equal(x, before)


def test_a_sampler_works_after_a_failure():
    fail = [True]

    def sometimes(x, t):
        return x[:1] if fail[0] else network(x, t)

    sampler = fd.Sampler(sometimes, fd.plan(VP, "deis-2", 3))
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="shape"):
        sampler(x)
    fail[0] = False
    assert torch.equal(sampler(x), fd.sample(network, x, sampler.plan))


def test_errors_of_the_network_are_its_own():
    def broken(x, t):
        raise ValueError("inside the network")

    with pytest.raises(ValueError, match=r"^inside the network$"):
        run(broken)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_check_names_the_stage_that_left_the_finite(bad):
    def breaks(x, t):
        return network(x, t) if float(t[0]) > 0.9 else torch.full_like(x, bad)

    with pytest.raises(ValueError, match=r"stage 1 .*returned (NaN|infinity)"):
        run(breaks, check=True)
    run(breaks)  # off by default


def test_check_finds_a_network_that_writes_to_its_input():
    with pytest.raises(ValueError, match="in place"):
        run(lambda x, t: x.mul_(0.5), check=True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "real and floating.*int64"),
        ({"x": torch.zeros(2, 4, dtype=torch.complex64)}, TypeError, "real and floating"),
        ({"x": torch.tensor(1.0)}, ValueError, "batch dimension"),
        ({"x": [1.0, 2.0]}, TypeError, "x is a tensor"),
        ({"net": 3}, TypeError, "network is callable"),
        ({"plan": "deis-3"}, TypeError, r"plan is a fastdiff\.Plan"),
        ({"guidance": 7.5}, TypeError, r"guidance is a fastdiff\.CFG"),
        ({"backend": "cup"}, ValueError, "'cpu'"),
        ({"dtype": torch.int64}, TypeError, "floating torch.dtype"),
        ({"graph": "loop"}, ValueError, "graph=None"),
        ({"gradient": "discrete"}, ValueError, "tensors that require grad"),
        ({"gradient": "discret"}, ValueError, "'discrete', 'backprop'"),
        ({"out": torch.zeros(2, 5)}, ValueError, "out is like x"),
        ({"cond": {"y": torch.zeros(3)}}, ValueError, r"cond\['y'\] of shape \(3,\)"),
        ({"cond": {"a": {"b": torch.tensor(1.0)}}}, ValueError, r"cond\['a'\]\['b'\]"),
        ({"guidance": fd.CFG(2.0, uncond={"y": 0})}, ValueError, "got cond=None"),
        ({"guidance": fd.CFG(2.0), "cond": {"y": torch.ones(2)}}, ValueError, "uncond=None"),
        (
            {"guidance": fd.CFG(2.0, uncond={}), "cond": {"y": torch.ones(2)}},
            ValueError,
            "uncond={}",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": None}), "cond": {"y": torch.ones(2)}},
            TypeError,
            "a tensor or a number; got NoneType",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": 0.7}), "cond": {"y": torch.tensor([1, 2])}},
            ValueError,
            "int64; got the unconditional value 0.7",
        ),
        ({"out": "a"}, TypeError, "out is a tensor"),
        ({"out": torch.zeros(1, 4).expand(2, 4)}, ValueError, "memory for every element"),
        ({"x": torch.zeros(2, 4).to_sparse()}, TypeError, "dense"),
        ({"x": torch.full((2, 4), torch.nan), "check": True}, ValueError, "x is finite"),
        (
            {"guidance": fd.CFG(2.0, uncond={"z": 0}), "cond": {"y": torch.zeros(2)}},
            ValueError,
            "has no 'z'",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": torch.ones(2, 3)}), "cond": {"y": torch.ones(2)}},
            ValueError,
            "cond's shape",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": "none"}), "cond": {"y": torch.zeros(2)}},
            TypeError,
            "a tensor or a number",
        ),
        (
            {"guidance": fd.CFG(2.0, uncond={"y": "b"}), "cond": {"y": "a"}},
            TypeError,
            "only tensors can differ",
        ),
        (
            {"guidance": fd.CFG(torch.ones(3), uncond={"y": 1}), "cond": {"y": torch.zeros(2)}},
            ValueError,
            "needs 2 values; got 3",
        ),
        (
            {"guidance": fd.CFG([1.0, 2.0], uncond={"y": 1}), "cond": {"y": torch.zeros(2)}},
            ValueError,
            "needs 3 values",
        ),
        ({"x": torch.zeros(2, 4, requires_grad=True)}, ValueError, "x requires grad"),
        (
            {"cond": {"y": torch.zeros(2, requires_grad=True)}},
            ValueError,
            r"cond\['y'\] requires grad",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_the_network_runs(options, error, says):
    def never(*_, **__):
        raise AssertionError("the network ran")

    with pytest.raises(error, match=says):
        run(**{"net": never, **options})


def test_tracking_is_only_refused_where_grad_mode_is_on():
    with torch.no_grad():
        run(x=torch.zeros(2, 4, requires_grad=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "draws noise. Give seed="),
        ({"seed": [1, 2, 3]}, "3"),
        ({"seed": [1]}, "1"),
        ({"xi": torch.zeros(2, 2, 4)}, "one entry a stage, 3; got 2"),
        ({"xi": torch.zeros(3, 2, 5)}, r"xi\[0\]"),
        ({"xi": torch.zeros(3, 2, 4, dtype=torch.float64)}, r"xi\[0\]"),
    ],
)
def test_bad_noise_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        run(plan=fd.plan(VP, "ddpm", 3), **options)


def test_noise_of_the_wrong_kind_is_refused():
    for xi in (5, [1.0, 2.0, 3.0]):
        with pytest.raises(TypeError, match="xi"):
            run(plan=fd.plan(VP, "ddpm", 3), xi=xi)


def test_a_network_that_says_what_it_predicts_is_believed():
    def net(x, t):
        return x

    net.prediction = "v"
    with pytest.raises(ValueError, match="predicts 'v'"):
        fd.sample(net, torch.randn(2, 4), fd.plan(VP, "ddim", 2))
    fd.sample(net, torch.randn(2, 4), fd.plan(VP, "ddim", 2, prediction="v"))


@pytest.mark.parametrize("name", ["plan", "network", "guidance"])
def test_what_a_sampler_was_made_of_cannot_be_swapped(name):
    sampler = fd.Sampler(network, fd.plan(VP, "ddim", 2))
    with pytest.raises(AttributeError):
        setattr(sampler, name, None)


def test_progress_shows_a_bar(capsys):
    run(progress=True)
    assert "3/3" in capsys.readouterr().err
    run()
    assert capsys.readouterr().err == ""


def test_bad_guidance_is_refused():
    with pytest.raises(TypeError, match="scale is a number"):
        fd.CFG("7.5")
    with pytest.raises(ValueError, match="finite"):
        fd.CFG(float("nan"))
    with pytest.raises(ValueError, match="real tensor"):
        fd.CFG(torch.ones(2, 2))


# -- conditioning that changes along the run -------------------------------------------------------


@pytest.mark.parametrize("solver", ["deis-3", "dpm-2"])
def test_conditioning_may_have_one_value_a_stage(solver):
    plan = fd.plan(VP, solver, 4, prediction="v", t_max=0.9)
    stages = len(plan.stages)
    x, values = torch.randn(3, 5), torch.randn(stages, 3)
    seen = []

    def net(x, t, y):
        seen.append(y.clone())
        return network(x, t, y=y)

    def by_call(x, t):
        return network(x, t, y=values[len(seen) % stages - 1])

    got = fd.sample(net, x, plan, cond={"y": fd.PerStage(values)})
    assert torch.equal(torch.stack(seen), values)
    seen.clear()

    def counted(x, t):
        seen.append(1)
        return by_call(x, t)

    assert torch.equal(got, fd.sample(counted, x, plan))


def test_conditioning_with_one_value_a_stage_is_guided():
    plan = fd.plan(VP, "dpmpp-2m", 4, prediction="v", t_max=0.9)
    x, y = torch.randn(3, 5), torch.randn(3)
    same = fd.PerStage(y.expand(4, 3))
    for uncond in (0.0, torch.zeros(3), fd.PerStage(torch.zeros(4, 3))):
        guidance = fd.CFG(2.0, uncond={"y": uncond})
        got = fd.sample(network, x, plan, cond={"y": same}, guidance=guidance)
        plain = fd.CFG(2.0, uncond={"y": 0.0})
        assert torch.equal(got, fd.sample(network, x, plan, cond={"y": y}, guidance=plain))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fd.PerStage(torch.zeros(4)), r"\[S, B, ...\].*got \(4,\)"),
        (lambda: fd.PerStage([1.0]), "got"),
        (lambda: run(cond={"y": fd.PerStage(torch.zeros(9, 2))}), "one entry a stage of the plan"),
        (lambda: run(cond={"y": fd.PerStage(torch.zeros(4, 3))}), r"one stage of cond\['y'\]"),
    ],
)
def test_bad_values_a_stage_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
