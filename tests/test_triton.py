# SPDX-License-Identifier: Apache-2.0
"""The Triton stage: the compiled core's bits, in the interpreter here and compiled on a GPU."""

import dataclasses

import numpy as np
import pytest
import torch
from support.core import needs_core as CORE
from support.interpreted import (
    FUSES,
    HERE,
    INTERPRETED,
    after,
    as_table,
    moved,
    network,
    poison_unread,
    same,
    takes_few,
)
from support.rows import DTYPES, random_output, random_registers, random_row, raw

import fastdiff as fd
from fastdiff import backends, noise
from fastdiff.backends import Registers
from fastdiff.plans import (
    EVALUATE,
    WRITES_E,
    WRITES_X,
    Layout,
    Plan,
    Stage,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
philox = pytest.importorskip("fastdiff.kernels.philox")
F32, F64, BF16, F16 = DTYPES
SIZES = [0, 1, 15, 16, 17, 1023, 1025, 5000]

# -- noise -----------------------------------------------------------------------------------------

SEEDS = [0, 1, 2**32 - 1, 2**63, -2, 0x0123456789ABCDEF]


@triton.jit
def words_kernel(p_words, p_seeds, p_quads, stream, N: tl.constexpr):
    o = tl.arange(0, N)
    seed, quad = tl.load(p_seeds + o), tl.load(p_quads + o)
    w0, w1, w2, w3 = philox.words(seed, stream.to(tl.uint32), quad)
    tl.store(p_words + 4 * o, w0.to(tl.int32, bitcast=True))
    tl.store(p_words + 4 * o + 1, w1.to(tl.int32, bitcast=True))
    tl.store(p_words + 4 * o + 2, w2.to(tl.int32, bitcast=True))
    tl.store(p_words + 4 * o + 3, w3.to(tl.int32, bitcast=True))


@triton.jit
def normals_kernel(p_z, p_seeds, stream, SAMPLES: tl.constexpr, COLS: tl.constexpr):
    o_b, o_c = tl.arange(0, SAMPLES)[:, None], tl.arange(0, COLS)[None, :]
    quad = tl.arange(0, COLS // 4)[None, :].to(tl.int64)
    z = philox.normals(tl.load(p_seeds + o_b), stream.to(tl.uint32), quad, SAMPLES, COLS)
    tl.store(p_z + o_b * COLS + o_c, z)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("stream", [0, 5, 2**24])
def test_philox_words_are_the_definitions(device, stream):
    count = 64
    seeds = noise.seeds_tensor((SEEDS * count)[:count], count)
    quads = torch.arange(count) * 0x1234567 + torch.arange(count) ** 2 * 2**26  # past 2^32 too
    words = torch.zeros(count, 4, dtype=torch.int32, device=device)
    words_kernel[(1,)](words, seeds.to(device), quads.to(device), stream, N=count)
    key = seeds.numpy().view(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    quad = quads.numpy().astype(np.uint64)
    counter = (quad & low, np.full_like(quad, stream), quad >> shift, np.zeros_like(quad))
    wanted = np.stack(noise.philox(counter, (key & low, key >> shift)), 1).astype(np.uint32)
    assert words.cpu().numpy().view(np.uint32).tolist() == wanted.tolist()


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1024), (16, 64), (256, 4)])
@pytest.mark.parametrize("stream", [0, 7])
@FUSES
def test_normals_are_the_definitions_bit_for_bit(device, rows, cols, stream):
    seeds = noise.seeds_tensor((SEEDS * rows)[:rows], rows)
    z = torch.zeros(rows, cols, device=device)
    options = {} if INTERPRETED else {"enable_fp_fusion": False}
    normals_kernel[(1,)](z, seeds.to(device), stream, SAMPLES=rows, COLS=cols, **options)
    assert raw(z.cpu()) == noise.reference(seeds.numpy(), cols, stream).tobytes()


# -- the same bits as the compiled core ------------------------------------------------------------


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
@CORE
@FUSES
def test_a_stage_gives_the_bits_of_the_compiled_core(device, state, size):
    rng = np.random.default_rng(size)
    cases = 18 if state == F32 else 6
    cases = cases // 3 if size > 1023 else cases
    if takes_few(device) and size not in (16, 17):  # these have what divides and what does not
        cases = min(cases, 2)
    for case in range(cases):
        batch = case % 3 + 1
        layout = Layout(terms=case % 5, branches=case % 2 + 1, extras=2 * (case % 4 == 3))
        with_e, draws = case % 3 > 0, [0, 1, 2, 1][case // 2 % 4]
        m = [None, *DTYPES][(case + 1) % 5]
        row = random_row(rng, layout, with_e, draws, clip=case % 4 == 1)
        registers = random_registers(rng, (batch, size), state, layout, with_e, m)
        out = random_output(rng, (batch, size), layout, DTYPES[case % 4])
        xi = torch.from_numpy(rng.normal(size=(batch, size))).to(state) if case % 6 == 5 else None
        poison_unread(registers, [row], layout, out)
        wanted = after("cpu", registers, [row], layout, out, xi)
        got = after("triton", registers, [row], layout, out, xi, device=device)
        assert same(got, wanted), (case, dict(zip(layout.columns, row, strict=True)))


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("shape", [(5, 1), (7, 16), (300, 5), (3, 63), (4, 1025)])
@CORE
@FUSES
def test_each_sample_may_stand_at_its_own_row(device, shape):
    rng = np.random.default_rng(shape[1])
    for case in range(1 if takes_few(device) and shape != (7, 16) else 4):
        layout = Layout(terms=3, branches=case % 2 + 1, extras=case // 2)
        rows = [random_row(rng, layout, True, k % 3, clip=k % 2 == 0) for k in range(6)]
        registers = random_registers(rng, shape, F32, layout, True, DTYPES[case])
        out = random_output(rng, shape, layout, DTYPES[-case])
        index = torch.from_numpy(rng.integers(0, 5, shape[0]))
        used = [rows[1 + i] for i in sorted(set(index.tolist()))]
        poison_unread(registers, used, layout, out)
        wanted = after("cpu", registers, rows, layout, out, None, index, 1)
        got = after("triton", registers, rows, layout, out, None, index, 1, device)
        assert same(got, wanted), case


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("view", ["batch stride", "odd stride", "transposed", "expanded"])
@CORE
@FUSES
def test_strides_of_the_output_do_not_matter(device, view):
    rng = np.random.default_rng(7)
    layout = Layout(terms=1, branches=2)
    row = random_row(rng, layout, False, 0, False)
    row[0] = EVALUATE + WRITES_X
    base = torch.from_numpy(rng.normal(size=(6, 9, 5, 6))).float()
    out = {
        "batch stride": base[:, :4],
        "odd stride": base.flatten(1)[:, 3:123].unflatten(1, (4, 5, 6)),
        "transposed": base[:, :4].transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": base[:1, :4].expand(6, 4, 5, 6),
    }[view]
    registers = random_registers(rng, (3, 4, 5, 6), F32, layout)
    wanted = after("cpu", registers, [row], layout, out.contiguous())
    copies = moved(registers, device)
    stored = base.to(device)  # the same view there
    there = stored.as_strided(out.shape, out.stride(), out.storage_offset())
    if view == "transposed":
        there = out.to(device)
    backends.get("triton").bind(copies, torch.from_numpy(row[None]), layout)(0, there, None)
    assert same(moved(copies, "cpu"), wanted)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("offset", [1, 2, 4])
@CORE
@FUSES
def test_registers_need_not_stand_at_16_byte_boundaries(device, offset):
    rng = np.random.default_rng(offset)
    layout = Layout(terms=2)
    row = random_row(rng, layout, False, 1, False)
    row[0] = EVALUATE + WRITES_X
    registers = random_registers(rng, (2, 48), F32, layout, m=BF16)
    out = random_output(rng, (2, 48), layout, BF16)
    wanted = after("cpu", registers, [row], layout, out)

    def shifted(tensor):
        room = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=device)
        return room[offset:].view(tensor.shape).copy_(tensor)

    there = Registers(
        *(shifted(registers.x), None, shifted(registers.history), shifted(registers.m)),
        seeds=shifted(registers.seeds),
    )
    backends.get("triton").bind(there, torch.from_numpy(row[None]), layout)(0, shifted(out), None)
    assert same(moved(there, "cpu"), wanted)


@pytest.mark.parametrize("device", HERE)
@FUSES
def test_sixteen_bit_numbers_are_read_and_written_as_pytorch_does(device):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.0, b=(1.0,)), Stage(t=0.5)), times=(1.0, 0.0))
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    rng = np.random.default_rng(3)
    for dtype in (BF16, F16):
        halves = patterns.view(dtype).float()
        middle = (halves[:-1] + halves[1:])[::5] / 2  # ties
        anything = torch.from_numpy(rng.integers(-(2**31), 2**31, 4001).astype(np.int32))
        floats = torch.cat([middle, anything.view(F32), torch.tensor([65519.0, 65520.0, 0.0])])
        for out in (patterns.view(dtype).view(1, -1), floats.view(1, -1)):
            x = torch.full(out.shape, torch.nan, device=device)
            m = torch.zeros(out.shape, dtype=dtype, device=device)
            run = backends.get("triton").bind(Registers(x=x, m=m), as_table(plan), plan.layout)
            run(0, out.to(device), None)
            wanted = out.float() + 0.0
            number = ~wanted.isnan()
            assert torch.equal(x.cpu()[number], wanted[number])
            assert raw(m.cpu()[number]) == raw(wanted.to(dtype)[number])
            assert bool(m.cpu()[~number].isnan().all())


@pytest.mark.parametrize("device", HERE)
def test_a_network_may_return_a_view_of_its_input(device):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
    for view in (lambda x: x, lambda x: x[:1].expand(3, 1500), lambda x: x.flip(0)):
        x = torch.arange(4500.0, device=device).view(3, 1500)
        wanted = 0.5 * x + 2.0 * view(x)
        backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)(0, view(x), None)
        assert torch.equal(x, wanted)


# -- the error -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_the_error_is_at_most_twice_that_of_eager_torch(device, state):
    # against a float64 run on the same stored values, in the norm (a float64 state: the tests of
    # bits)
    rng = np.random.default_rng(11)
    for case in range(4):
        layout = Layout(terms=case + 1, branches=case % 2 + 1, extras=case // 2)
        row = random_row(rng, layout, case % 2 == 0, 1, clip=case == 3)
        row[0] = int(row[0]) | EVALUATE | WRITES_X | (WRITES_E if case % 2 == 0 else 0)
        network = state if case < 2 else BF16
        shape = (2, 1500)
        registers = random_registers(rng, shape, state, layout, case % 2 == 0, network)
        out = random_output(rng, shape, layout, network)
        double = dataclasses.replace(
            registers,
            x=registers.x.double(),
            e=None if registers.e is None else registers.e.double(),
            history=registers.history.double(),
            m=registers.m.double(),
            bank=None if registers.bank is None else registers.bank.double(),
        )
        exact = after("torch", double, [row], layout, out)
        eager = after("torch", registers, [row], layout, out)
        got = after("triton", registers, [row], layout, out, device=device)

        def error(run: Registers, name: str, exact=exact) -> float:
            return float((getattr(run, name).double() - getattr(exact, name)).norm())

        for name in ("x", "e", "m"):
            if getattr(registers, name) is not None and bool(getattr(exact, name).isfinite().all()):
                assert error(got, name) <= 2 * error(eager, name), (case, name)


# -- whole plans -----------------------------------------------------------------------------------

SOLVERS = ["ddim", "deis-3", "dpmpp-3m", "dpm-3", "deis-kutta3", "ddpm"]


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("solver", SOLVERS)
@CORE
@FUSES
def test_a_whole_plan_gives_the_bits_of_the_compiled_core(device, solver):
    plan = fd.plan(fd.schedules.VPLinear(), solver, 4 if solver != "dpm-3" else 2)
    dtypes = [(F32, BF16), (F32, None), (F64, None)]
    for dtype, network_dtype in dtypes[:1] if takes_few(device) and solver != "ddpm" else dtypes:
        x = fd.noise.prior(plan, (3, 2, 5, 3), seeds=1, dtype=dtype)
        options = {"seed": 4, "dtype": network_dtype}
        wanted = fd.sample(network, x, plan, backend="cpu", **options)
        got = fd.sample(network, x.to(device), plan, backend="triton", **options)
        assert raw(got.cpu()) == raw(wanted)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("scale", [3.0, torch.tensor([1.5, 2.0, 0.0])], ids=["one", "per sample"])
@CORE
@FUSES
def test_a_guided_plan_gives_the_bits_of_the_compiled_core(device, scale):
    plan = fd.plan(fd.schedules.VPLinear(), "ddpm", 4)
    x = fd.noise.prior(plan, (3, 2, 9), seeds=1)
    results = []
    for name, where in (("cpu", "cpu"), ("triton", device)):
        y = torch.tensor([0.1, 0.2, 0.3], device=where)
        guidance = fd.CFG(scale, uncond={"y": 0.0})
        options = {"cond": {"y": y}, "guidance": guidance, "seed": 2, "dtype": BF16}
        results.append(fd.sample(network, x.to(where), plan, backend=name, **options).cpu())
    assert raw(results[0]) == raw(results[1])


@pytest.mark.parametrize("device", HERE)
@CORE
@FUSES
def test_a_thresholded_plan_gives_the_bits_of_the_compiled_core(device):
    plan = fd.plan(fd.schedules.VPLinear(), "dpmpp-2m", 3, threshold=(0.9, 0.5))
    x = fd.noise.prior(plan, (3, 2, 5, 3), seeds=1)
    wanted = fd.sample(network, x, plan, backend="cpu", dtype=BF16)
    got = fd.sample(network, x.to(device), plan, backend="triton", dtype=BF16)
    assert raw(got.cpu()) == raw(wanted)
