# SPDX-License-Identifier: Apache-2.0
"""Samplers that need more than sums are tables too: each runs on every backend like any plan.

A limited x0 beside the raw epsilon, a mask from the bank, step sizes from a sample's own norms,
guidance rescaled by its own deviation, and a state of which each part is sampled apart.
"""

import dataclasses

import pytest
import torch
from support.growth import (
    clipped_ddim,
    corrected,
    grid_of,
    inpainted,
    inpainting_loop,
    langevin_loop,
    rescaled,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd

VP = fd.schedules.VPLinear()
FLOW = fd.schedules.FlowMatching()
F32, F64 = torch.float32, torch.float64
BACKENDS = [name for name, state in fd.backends.status().items() if state == "available"]
EACH = pytest.mark.parametrize("backend", BACKENDS)
if "triton" in BACKENDS:
    from support.interpreted import FUSES
needs_core = pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled core is not built")
SHAPE = (3, 2, 5)


def network(x, t, y=None):
    """Element by element, so that a part of a sample and a sample of a batch are as in the whole:
    sums and products round alike whatever stands beside them, which vectorised tanh does not."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    shift = 0.0 if y is None else y.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return 0.6 * x - 0.1 * (x + shift) * x / (1.0 + x * x) + 1e-3 * t


def apart(got, wanted):
    """The relative difference."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def values(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# -- a limited x0 beside the raw epsilon: diffusers' DDIM ------------------------------------------


def diffusers_ddim(**options):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.DDIMScheduler(
        **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **options}
    )
    made.alphas_cumprod = made.alphas_cumprod.double()
    made.final_alpha_cumprod = made.final_alpha_cumprod.double()
    return made


def their_loop(scheduler, x, xi, eta=0.0, clipped=False):
    for t, z in zip(scheduler.timesteps, xi, strict=True):
        out = network(x, torch.full((len(x),), float(t)))
        options = {"eta": eta, "use_clipped_model_output": clipped, "variance_noise": z}
        x = scheduler.step(out, int(t), x, **options).prev_sample
    return x


def their_times(scheduler):
    """Where their steps stand in ours: index i at (i + 1)/1000, and the data at 0."""
    return [*((int(t) + 1) / 1000 for t in scheduler.timesteps), 0.0]


def schedule_of(scheduler):
    return fd.schedules.VPDiscrete(alphas_cumprod=scheduler.alphas_cumprod)


def compared(scheduler, plan, backend, *, eta=0.0, clipped=False):
    """The largest relative difference from their loop, in float32 and in float64."""
    found = []
    for dtype in (F32, F64):
        x, steps = values(2, 3, 7, dtype=dtype), len(scheduler.timesteps)
        xi = values(steps, 2, 3, 7, seed=1, dtype=dtype)
        wanted = their_loop(scheduler, x, xi, eta, clipped)
        found.append(apart(fd.sample(network, x, plan, xi=xi, backend=backend), wanted))
    return found


DDIM_CASES = [  # Triton's interpreter is slow
    (eta, prediction, steps, spacing, backend)
    for eta in (0.0, 1.0)
    for prediction in ("epsilon", "v")
    for steps in (10, 50)
    for spacing in ("leading", "trailing")
    for backend in BACKENDS
    if backend != "triton" or (steps == 10 and spacing == "trailing")
]


@pytest.mark.parametrize(("eta", "prediction", "steps", "spacing", "backend"), DDIM_CASES)
def test_diffusers_clipped_ddim_is_a_table(eta, prediction, steps, spacing, backend):
    theirs = diffusers_ddim(
        clip_sample=True,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        timestep_spacing=spacing,
        steps_offset=int(spacing == "leading" and steps == 50),
    )
    theirs.set_timesteps(steps)
    plan = clipped_ddim(
        *(schedule_of(theirs), their_times(theirs)), eta=eta, prediction=prediction, clip=(-1, 1)
    )
    single, double = compared(theirs, plan, backend, eta=eta)
    assert single < 1e-6
    assert double < 1e-12


@EACH
@pytest.mark.parametrize("ceiling", [1.5, 1.02])
def test_diffusers_threshold_is_a_floor_and_a_ceiling(ceiling, backend):
    theirs = diffusers_ddim(
        thresholding=True, sample_max_value=ceiling, dynamic_thresholding_ratio=0.8
    )
    theirs.set_timesteps(10)
    place = schedule_of(theirs), their_times(theirs)
    plan = clipped_ddim(*place, threshold=(0.8, 1.0, ceiling))
    single, double = compared(theirs, plan, backend)
    assert single < 1e-6
    assert double < 1e-12
    # the ceiling was met
    assert compared(theirs, clipped_ddim(*place, threshold=(0.8, 1.0)), backend)[1] > 1e-3


@EACH
def test_epsilon_from_the_clipped_x0_is_ddim_as_it_stands(backend):
    theirs = diffusers_ddim(clip_sample=True)
    theirs.set_timesteps(10)
    ours = fd.plan(schedule_of(theirs), "ddim", 10, grid=their_times(theirs), clip=1.0)
    single, double = compared(theirs, ours, backend, clipped=True)
    assert single < 1e-6
    assert double < 1e-12
    assert compared(theirs, ours, backend)[1] > 1e-3  # the raw epsilon is another sampler


@EACH
def test_the_gradient_of_clipped_ddim_is_exact(backend):
    for limit in ({"clip": (-1.0, 1.0), "eta": 1.0}, {"threshold": (0.8, 0.5, 1.5)}):
        check_gradient(clipped_ddim(VP, grid_of(2), **limit), backend)


# -- a mask from the bank --------------------------------------------------------------------------


def painting(steps=7):
    plan = fd.plan(VP, "dpmpp-3m", steps, t_max=0.9, t_min=0.02)
    return plan, inpainted(plan)


def bank_of(kind, dtype=F64):
    mask = values(*SHAPE, seed=2)
    mask = {"hard": mask > 0, "soft": torch.sigmoid(mask), "shared": (mask > 0)[:1]}[kind]
    return [
        mask.to(dtype),
        values(*SHAPE, seed=3, dtype=dtype),
        values(*SHAPE, seed=4, dtype=dtype),
    ]


@EACH
@pytest.mark.parametrize("kind", ["hard", "soft", "shared"])
def test_inpainting_is_a_transformed_plan(kind, backend):
    plan, painted = painting()
    wanted = inpainting_loop(network, values(*SHAPE, dtype=F64), plan, bank_of(kind))
    for dtype, bound in ((F32, 2e-6), (F64, 1e-13)):
        x, bank = values(*SHAPE, dtype=dtype), bank_of(kind, dtype)
        got = fd.sample(network, x, painted, extras=bank, backend=backend)
        assert apart(got, wanted) < bound
    if kind != "soft":  # outside the mask the noise is the run's own, inside it is what is known
        mask = bank[0].expand(SHAPE) == 1
        alpha, sigma = (float(f(plan.times[-1])) for f in (VP.alpha, VP.sigma))
        there = alpha * bank[1] + sigma * bank[2]
        torch.testing.assert_close(got[mask], there[mask], rtol=1e-12, atol=1e-12)
        assert (got - there)[~mask].abs().min() > 1e-6


@EACH
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_gradient_of_inpainting_is_exact(kind, backend):
    check_gradient(painting(5)[1], backend, extras=bank_of(kind))


def check_gradient(plan, backend, **options):
    """Gradients in x and the conditioning by "discrete" against "backprop"."""

    def gradients(how):
        x, y = values(*SHAPE, dtype=F64).requires_grad_(), values(3, dtype=F64).requires_grad_()
        own = None if how == "backprop" else backend
        out = fd.sample(
            *(network, x, plan), cond={"y": y}, gradient=how, backend=own, seed=5, **options
        )
        return torch.autograd.grad((out * values(*SHAPE, seed=5)).sum(), (x, y))

    for got, wanted in zip(gradients("discrete"), gradients("backprop"), strict=True):
        assert apart(got, wanted) < 1e-10
        assert wanted.norm() > 1e-3


def test_the_gradient_of_a_mask_is_autograds_or_refused():
    painted, x = painting(3)[1], values(*SHAPE, dtype=F64)
    bank = [extra.requires_grad_() for extra in bank_of("soft")]
    wanted = inpainting_loop(network, x, painting(3)[0], bank)
    got = fd.sample(network, x, painted, extras=bank, gradient="backprop")
    each = [torch.autograd.grad(v.square().sum(), bank) for v in (got, wanted)]
    for a, b in zip(*each, strict=True):
        assert apart(a, b) < 1e-12
    with pytest.raises(NotImplementedError, match=r"no gradient in the transposed.*extras\[0\]"):
        fd.sample(network, x, painted, extras=bank, gradient="discrete")


@EACH
def test_a_bank_that_all_samples_share_is_kept_once(backend):
    _, painted = painting(3)
    x, bank = values(*SHAPE), [extra[:1] for extra in bank_of("hard", F32)]
    sampler = fd.Sampler(network, painted, backend=backend)

    wanted = sampler(x, extras=[extra.expand(SHAPE) for extra in bank])
    ((run,),) = sampler._leases._idle.values()
    assert run.spec.bank_batch == 3
    for shared in (bank, [extra[0] for extra in bank], [bank[0][0], *bank[1:]]):
        assert torch.equal(sampler(x, extras=shared), wanted)
        _, (run,) = sampler._leases._idle.values()  # the spec of the first call is kept too
        assert run.registers.bank.shape == (3, 1, *SHAPE[1:])
    scalar = sampler(x, extras=[1.0, torch.tensor(0.5), bank[2]])
    wanted = sampler(x, extras=[torch.ones(SHAPE), torch.full(SHAPE, 0.5), bank[2]])
    assert torch.equal(scalar, wanted)
    with pytest.raises(ValueError, match=r"broadcastable to x.*extras\[1\]"):
        sampler(x, extras=[bank[0], torch.ones(7), bank[2]])


# -- step sizes from a sample's own norms ----------------------------------------------------------


TIMES, SNR, SEEDS = grid_of(4), 0.16, [3, 1 << 40, -5]
LANGEVIN = corrected(VP, TIMES, snr=SNR)


@pytest.mark.parametrize(
    "backend", [pytest.param(n, marks=[FUSES] if n == "triton" else []) for n in BACKENDS]
)
def test_a_langevin_step_is_a_row_with_measures(backend):
    def drawn(i):
        ((stream, _),) = LANGEVIN.stages[2 * i + 1].noise
        return fd.noise.normal(SHAPE, SEEDS, stream, dtype=F64)

    wanted = langevin_loop(network, values(*SHAPE, dtype=F64), VP, TIMES, SNR, drawn)
    for dtype, bound in ((F32, 2e-6), (F64, 1e-13)):
        x = values(*SHAPE, dtype=dtype)
        assert apart(fd.sample(network, x, LANGEVIN, seed=SEEDS, backend=backend), wanted) < bound


@EACH
def test_a_samples_measures_do_not_depend_on_its_batch(backend):
    x = values(*SHAPE) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    whole = fd.sample(network, x, LANGEVIN, seed=SEEDS, backend=backend)
    for b, seed in enumerate(SEEDS):
        alone = fd.sample(network, x[b : b + 1], LANGEVIN, seed=[seed], backend=backend)
        assert torch.equal(alone[0], whole[b])


@needs_core
@pytest.mark.parametrize(
    "other", [pytest.param("triton", marks=FUSES)] if "triton" in BACKENDS else []
)
def test_measures_have_the_same_bits_everywhere(other):
    x = values(2, 2100)
    run = [fd.sample(network, x, LANGEVIN, seed=1, backend=name) for name in ("cpu", other)]
    assert torch.equal(*run)


class Reads(TorchDispatchMode):
    """Counts the operations that bring a number to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero")
        self.count += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


@needs_core
@pytest.mark.parametrize("which", ["langevin", "inpainting", "clipped"])
def test_no_number_is_read_in_the_loop(which):
    plan = {"langevin": LANGEVIN, "inpainting": painting()[1], "clipped": CLIPPED}[which]
    x, extras = values(*SHAPE), bank_of("soft", F32) if plan.extras else ()
    sampler = fd.Sampler(network, plan, backend="cpu")
    for again in (False, True):
        with Reads() as reads:
            sampler(x, seed=torch.tensor([1, 2, 3]), extras=extras)
        assert reads.count == 0, again
    with Reads() as reads:
        x.sum().item()
    assert reads.count == 1


def test_the_gradient_of_measures_is_autograds_or_refused():
    def result(x):
        draw = {s.noise[0][0]: z for s, z in zip(LANGEVIN.stages[1::2], xi[1::2], strict=True)}
        streams = [s.noise[0][0] for s in LANGEVIN.stages[1::2]]
        return langevin_loop(network, x, VP, TIMES, SNR, lambda i: draw[streams[i]])

    x, xi = values(*SHAPE, dtype=F64).requires_grad_(), values(8, *SHAPE, seed=6, dtype=F64)
    (wanted,) = torch.autograd.grad(result(x).square().sum(), x)
    out = fd.sample(network, x, LANGEVIN, xi=xi, gradient="backprop")
    assert apart(*torch.autograd.grad(out.square().sum(), x), wanted) < 1e-12
    with pytest.raises(NotImplementedError, match="measures"):
        fd.sample(network, x, LANGEVIN, seed=0, gradient="discrete")


# -- guidance --------------------------------------------------------------------------------------

GUIDED = rescaled(fd.plan(FLOW, "euler", 4, prediction="velocity"), 0.7)


@EACH
@pytest.mark.parametrize("scale", [3.0, torch.tensor([3.0, 1.0, 0.0]), [2.0, 5.0, 1.0, 0.0]])
def test_rescaled_guidance_is_a_measure_of_the_outputs(scale, backend):
    def per_sample(v):
        return v.reshape(-1, *[1] * (len(SHAPE) - 1))

    x, y = values(*SHAPE, dtype=F64), values(3, seed=7, dtype=F64)
    guidance, wanted = fd.CFG(scale, uncond={"y": -1.0}), x
    for i, stage in enumerate(GUIDED.stages):
        w = scale[i] if isinstance(scale, list) else scale
        w = per_sample(w.double()) if isinstance(w, torch.Tensor) else w
        t = torch.full((3,), stage.model_time, dtype=F64)
        cond, uncond = network(wanted, t, y), network(wanted, t, torch.full_like(y, -1.0))
        out = uncond + w * (cond - uncond)
        ratio = per_sample(cond.flatten(1).std(1) / out.flatten(1).std(1))
        wanted = stage.a_x * wanted + stage.b[0] * (0.3 + 0.7 * ratio) * out
    for dtype, bound in ((F32, 2e-6), (F64, 1e-13)):
        got = fd.sample(
            *(network, x.to(dtype), GUIDED),
            cond={"y": y.to(dtype)},
            guidance=guidance,
            backend=backend,
        )
        assert apart(got, wanted) < bound


# -- a part of a sample ----------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m"])
def test_halves_of_a_state_draw_the_wholes_noise(solver, backend):
    plan = fd.plan(VP, solver, 4, t_max=0.9)
    if not plan.stochastic:  # two draws, in a row of its own between the steps
        first, *rest = plan.stages
        draws = fd.Stage(first.t, evaluate=False, noise=((3, 1.0), (9, -0.5)), c=0.4)
        plan = dataclasses.replace(plan, stages=(draws, first, *rest))
    for size, split in ((22, 12), (2100, 1028)):
        x = values(2, size)
        whole = fd.sample(network, x, plan, seed=[7, 1 << 33], backend=backend)
        halves = [
            fd.sample(network, part, plan, seed=[7, 1 << 33], offset=offset, backend=backend)
            for offset, part in ((0, x[:, :split]), (split, x[:, split:]))
        ]
        assert torch.equal(torch.cat(halves, dim=1), whole)
        alone = fd.sample(network, x[:, split:], plan, seed=[7, 1 << 33], backend=backend)
        assert not torch.equal(alone, whole[:, split:])


@EACH
def test_a_part_of_a_sample_has_the_wholes_gradient(backend):
    plan = fd.plan(VP, "ddpm", 4, t_max=0.9)
    x = values(2, 22, dtype=F64).requires_grad_()

    def gradient(at, part):
        options = {"seed": [7, 9], "gradient": "discrete", "backend": backend}
        out = fd.sample(network, part, plan, offset=at, **options)
        return torch.autograd.grad(out.square().sum(), part)[0]

    halves = [
        gradient(at, x.detach()[:, at:end].requires_grad_()) for at, end in ((0, 12), (12, 22))
    ]
    assert torch.equal(torch.cat(halves, dim=1), gradient(0, x))


def test_parts_that_cannot_be_sampled_alone_are_refused():
    plan = fd.plan(VP, "ddpm", 3, t_max=0.9)
    for offset in (1, 6, -4, 4.0, True):
        with pytest.raises(ValueError, match=r"offset is .* a multiple of 4 from 0 on"):
            fd.sample(network, values(*SHAPE), plan, seed=0, offset=offset)
    limited = fd.plan(VP, "dpmpp-2m", 3, t_max=0.9, threshold=0.9)
    for plan in (limited, LANGEVIN):
        with pytest.raises(ValueError, match=r"taken over a whole sample.*offset=4"):
            fd.sample(network, values(*SHAPE), plan, seed=0, offset=4)


# -- captured, and in a batcher --------------------------------------------------------------------

CLIPPED = clipped_ddim(VP, grid_of(6), eta=1.0, clip=(-1.0, 1.0))
THRESHOLDED = clipped_ddim(VP, grid_of(5), threshold=(0.8, 0.5, 1.5))
MODES = pytest.mark.parametrize("mode", ["loop", "stage"])


def given(plan, seed):
    bank = [values(*SHAPE, seed=seed + k) for k in range(plan.extras)]
    return {"seed": seed, "extras": bank}


@needs_core
@MODES
@pytest.mark.parametrize("plan", [CLIPPED, THRESHOLDED, LANGEVIN, painting()[1]])
def test_a_replay_has_the_bits_of_the_eager_run(plan, mode, recorder):
    sampler = fd.Sampler(network, plan, graph=mode)
    for seed in (1, 2, 3):
        x = values(*SHAPE, seed=seed)
        wanted = fd.sample(network, x, plan, **given(plan, seed), graph=None)
        assert torch.equal(sampler(x, **given(plan, seed)), wanted)
    assert sampler.stats().captures == 1


@needs_core
@MODES
def test_a_capture_is_shared_where_numbers_and_entries_alone_differ(mode, recorder):
    plan, painted = painting()
    swapped = inpainted(plan, mask=1, known=2, noise=0)
    longer = corrected(VP, grid_of(4, t_max=0.8), snr=0.3)
    quantiles = []
    for stage in LANGEVIN.stages:
        changed = [
            dataclasses.replace(m, num=fd.Reduction("quantile", ("xi",), rank=0.9))
            for m in stage.measures
        ]
        quantiles.append(dataclasses.replace(stage, measures=tuple(changed)))
    quantiles = dataclasses.replace(LANGEVIN, stages=tuple(quantiles))
    moved = dataclasses.replace(  # the measures and what reads them, a stage earlier
        LANGEVIN, stages=(*LANGEVIN.stages[1:2], *LANGEVIN.stages[:1], *LANGEVIN.stages[2:])
    )
    for plans, captures in (
        ((painted, swapped, painted), 1),
        ((LANGEVIN, longer), 1),
        ((LANGEVIN, quantiles, moved), None),
        ((plan, painted, CLIPPED, LANGEVIN, plan), None),
    ):
        sampler = fd.Sampler(network, plans[0], graph=mode)
        for chosen in plans:
            sampler.set_plan(chosen)
            x, arguments = values(*SHAPE, seed=9), given(chosen, 5)
            wanted = fd.sample(network, x, chosen, **arguments, graph=None)
            assert torch.equal(sampler(x, **arguments), wanted)
        if captures is not None:
            assert sampler.stats().captures == captures


@EACH
@pytest.mark.parametrize("graph", [None, "stage"])
def test_a_batcher_measures_and_limits(graph, backend, recorder):
    if graph == "stage" and not fd.backends.get(backend).capturable:
        pytest.skip("its stages are not captured")
    plans = [CLIPPED, LANGEVIN, THRESHOLDED]
    batcher = fd.Batcher(network, plans, (2, *SHAPE[1:]), backend=backend, graph=graph)
    waiting = [(values(*SHAPE[1:], seed=i), i % 3, 20 + i) for i in range(5)]
    running, done = {}, 0
    while waiting or running:
        if waiting and batcher.free:
            x, plan, seed = waiting.pop(0)
            running[batcher.add(x, plan, seed=seed)] = x, plan, seed
        for place, got in batcher.step().items():
            x, plan, seed = running.pop(place)
            wanted = fd.sample(network, x[None], plans[plan], seed=[seed], backend=backend)
            torch.testing.assert_close(got, wanted[0], rtol=1e-6, atol=1e-6)
            done += 1
    assert done == 5


def test_a_batcher_has_no_bank():
    with pytest.raises(ValueError, match=r"no extra registers.*3 extras"):
        fd.Batcher(network, [painting()[1]], SHAPE)
