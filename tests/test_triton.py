# SPDX-License-Identifier: Apache-2.0
"""The Triton stage: the compiled core's bits, in the interpreter here and compiled on a GPU.

Run as a script, `python tests/test_triton.py 90`, this file compiles `SPECIALISATIONS` for that
architecture, which needs no GPU, and prints what came out as JSON.
"""

import collections
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.rows import DTYPES, random_output, random_registers, random_row, raw

import fastdiff as fd
from fastdiff import _core, backends, noise
from fastdiff.backends import Registers
from fastdiff.backends import triton as backend_module
from fastdiff.plans import AT_E, CLIP, EVALUATE, THRESHOLD, WRITES_E, WRITES_X, Layout, Plan, Stage

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
philox = pytest.importorskip("fastdiff.kernels.philox")
stage_module = pytest.importorskip("fastdiff.kernels.stage")
threshold_module = pytest.importorskip("fastdiff.kernels.threshold")

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = backend_module.interpreting()
HERE = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled on a GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CORE = pytest.mark.skipif(_core.native is None, reason="the compiled core is not built")
FUSES = pytest.mark.skipif(
    INTERPRETED and VERSION < (3, 9), reason="Triton's interpreter fuses tl.fma from 3.9 on"
)
exact = [CORE, FUSES]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [0, 1, 15, 16, 17, 1023, 1025, 5000]


# -- the specialisations the library relies on -----------------------------------------------------

# Each is what `bind` launches for 16-byte aligned registers of [batch, size]; `m` is written once a
# branch. Deterministic multistep, predictor-corrector (e), stochastic, guided, per-sample rows.
SPECIALISATIONS: dict[str, dict] = {
    "f32 K0": {"terms": 0},
    "f32 K1": {"terms": 1},
    "f32 K2": {"terms": 2},
    "f32 K3": {"terms": 3},
    "f32 K1 m": {"terms": 1, "m": "f32"},
    "f32 K0 e": {"terms": 0, "e": True},
    "f32 K2 e": {"terms": 2, "e": True},
    "f32 K3 e": {"terms": 3, "e": True},
    "f32 K2 G2": {"terms": 2, "m": "f32", "branches": 2},
    "f32 K1 clip": {"terms": 1, "clip": True},
    "f32 K0 noise": {"terms": 0, "draws": 1},
    "f32 K2 noise": {"terms": 2, "draws": 1},
    "f32 K2 e noise G2": {"terms": 2, "e": True, "draws": 1, "m": "f32", "branches": 2},
    "f32 K1 noise twice": {"terms": 1, "draws": 2},
    "f32 K1 xi": {"terms": 1, "xi": True},
    "f32 K2 row on the device": {"terms": 2, "captured": True},
    "f32 no out": {"terms": 0, "out": None, "draws": 1},
    "f32 K1 extras": {"terms": 1, "extras": 2},
    "f32 K2 own rows, long": {"terms": 2, "own": True},
    "f32 K2 own rows, short": {"terms": 2, "own": True, "batch": 4096, "size": 64},
    "f32 K1 noise, short": {"terms": 1, "draws": 1, "batch": 65536, "size": 16},
    "bf16 K0": {"terms": 0, "out": "bf16", "m": "bf16"},
    "bf16 K1": {"terms": 1, "out": "bf16", "m": "bf16"},
    "bf16 K2": {"terms": 2, "out": "bf16", "m": "bf16"},
    "bf16 K3 e": {"terms": 3, "out": "bf16", "m": "bf16", "e": True},
    "bf16 K2 G2": {"terms": 2, "out": "bf16", "m": "bf16", "branches": 2},
    "bf16 K1 noise": {"terms": 1, "out": "bf16", "m": "bf16", "draws": 1},
    "bf16 K2 e noise G2": {
        "terms": 2,
        "out": "bf16",
        "m": "bf16",
        "e": True,
        "draws": 1,
        "branches": 2,
    },
    "bf16 K2 own rows, long": {"terms": 2, "out": "bf16", "m": "bf16", "own": True},
    "bf16 K2 own rows, short": {
        "terms": 2,
        "out": "bf16",
        "m": "bf16",
        "own": True,
        "batch": 4096,
        "size": 64,
    },
    "bf16 K1 noise own rows, short": {
        "terms": 1,
        "out": "bf16",
        "m": "bf16",
        "own": True,
        "batch": 65536,
        "size": 16,
        "draws": 1,
    },
    "bf16 K1 strided out": {"terms": 1, "out": "bf16", "m": "bf16", "stride": 6144},
    "f16 K1": {"terms": 1, "out": "f16", "m": "f16"},
    "f32 K1 backward": {"terms": 1, "e": True, "m": "f32", "push_x": True},
    "bf16 state K2": {"terms": 2, "state": "bf16", "out": "bf16", "m": "bf16"},
    "f64 K2": {"terms": 2, "state": "f64", "out": "f64"},
    "f64 K3 e noise": {"terms": 3, "state": "f64", "out": "f64", "e": True, "draws": 1},
    "f32 K2 threshold": {"terms": 2, "threshold": True},
    "bf16 scale": {"terms": 2, "out": "bf16", "scale": True, "size": 12288},
    "f64 scale": {"terms": 2, "state": "f64", "out": "f64", "scale": True, "size": 12288},
}
ON_EVERY_ARCHITECTURE = (
    *("f32 K0", "f32 K2", "f32 K3 e", "f32 K2 noise", "f32 K2 own rows, short"),
    *("bf16 K1", "bf16 K3 e", "bf16 K2 G2", "bf16 K1 noise", "bf16 K2 own rows, long"),
    *("f16 K1", "f64 K2", "f32 K2 threshold", "bf16 scale", "f64 scale"),
)
# Registers a thread: 80 leave 24 warps of 64 resident on a multiprocessor, 128 leave 16. The
# assembler is told how many the scales' kernel may take.
MOST_REGISTERS, MOST_REGISTERS_WITH_NOISE = 80, 128
BYTES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}


def compiled(
    architecture: int,
    state: str = "f32",
    out: str | None = "f32",
    m: str | None = None,
    e: bool = False,
    terms: int = 0,
    branches: int = 1,
    extras: int = 0,
    draws: int = 0,
    clip: bool = False,
    threshold: bool = False,
    push_x: bool = False,
    scale: bool = False,
    own: bool = False,
    xi: bool = False,
    captured: bool = False,
    batch: int = 64,
    size: int = 3072,
    stride: int | None = None,
):
    """The kernel that `bind` would launch for such registers, compiled without a GPU.

    That of the scales where `scale` is true.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = stage_module.stage_kernel
    arithmetic = "f64" if state == "f64" else "f32"
    block = backend_module.BLOCK[BYTES[arithmetic]]
    apart = own or threshold or scale
    _, _, constants = backend_module.launch_shape(batch, size, stride or size, draws, apart, block)
    copies = branches if m else 0
    constants |= {"TERMS": terms, "BRANCHES": branches, "EXTRAS": extras, "COPIES": copies}
    constants |= {"DRAWS": draws, "CLIP": clip, "PUSH_X": push_x}

    def pointer(dtype, exists=True):
        return "*" + dtype.replace("f", "fp").replace("bfp", "bf") if exists else None

    types = {
        "p_x": pointer(state),
        "p_e": pointer(state, e),
        "p_history": pointer(state, terms > 0),
        "p_m": pointer(m or "", m),
        "p_out": pointer(out or "", out),
        "p_xi": pointer(state, xi),
        "p_extras": (pointer(state),) * extras,
        "p_seeds": "*i64" if draws else None,
        "p_table": pointer(arithmetic),
        "p_index": "*i64" if own else None,
        "p_row_index": "*i64" if captured else None,
        "p_scale": pointer(arithmetic, threshold),
        **dict.fromkeys(("row", "rows", "batch", "size_units", "out_units"), "i32"),
    }
    options = backend_module.OPTIONS
    if scale:
        kernel, options = threshold_module.scale_kernel, backend_module.SCALE_OPTIONS
        _, constants = backend_module.scale_shape(batch, size, BYTES[arithmetic], constants)
        types |= {"p_scale": pointer(arithmetic), "p_quantiles": "*fp64"}
        types = {name: types[name] for name in kernel.arg_names if name in types}
    assert [*types, *constants] == kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    values, attributes = {}, {}
    for i, (name, kind) in enumerate(types.items()):
        if kind is None:
            types[name], values[(i,)] = "constexpr", None
        elif isinstance(kind, tuple):
            attributes |= {(i, j): aligned for j in range(len(kind))}
        elif kind.startswith("*"):
            attributes[(i,)] = aligned
    for i, (name, value) in enumerate(constants.items(), start=len(types)):
        types[name], values[(i,)] = "constexpr", value
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(ASTSource(kernel, types, values, attributes), target, options)


def inspected(binary: bytes) -> dict:
    """Registers, spilled bytes and memory instructions of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()

        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text))
    counts = collections.Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)[.\w]*)", text))
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": int(usage["SHARED"]),
        "instructions": dict(counts),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "few"), [(90, False), (80, True), (100, True)])
def test_specialisations_do_not_spill_and_move_16_bytes_at_a_time(architecture, few, tmp_path):
    assert len(SPECIALISATIONS) <= 40
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__, str(architecture), *["--few"] * few]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(ON_EVERY_ARCHITECTURE if few else SPECIALISATIONS)
    for name, kernel in found.items():
        asked = SPECIALISATIONS[name]
        noisy = asked.get("draws", 0) > 0
        # the assembler of older Tritons spills one register there
        allowed = 8 if architecture == 100 and VERSION < (3, 9) else 0
        assert kernel["spilled"] <= allowed, name
        most = MOST_REGISTERS_WITH_NOISE if noisy else MOST_REGISTERS
        assert kernel["registers"] <= most, name

        # registers are moved by 16-byte vectors alone; what is shorter belongs to the table's row
        state = asked.get("state", "f32")
        elements = 4 if state == "f64" else 8  # of a thread

        def vectors(dtype, elements=elements):
            return elements * BYTES[dtype] // 16

        counts = kernel["instructions"]
        if asked.get(
            "scale"
        ):  # x is read once, though only where p is not 0, and s alone is written
            assert counts["LDG.E.128"] == vectors(state) + vectors(asked["out"]), name
            assert sum(n for k, n in counts.items() if k.startswith("STG")) == 1
            continue
        e, terms = asked.get("e", False), asked["terms"]
        branches = asked.get("branches", 1)
        loads = vectors(state) * (1 + e + terms + asked.get("extras", 0) + asked.get("xi", False))
        stores = vectors(state) * (1 + e + (terms > 0) + asked.get("push_x", False))
        if asked.get("out", "f32"):
            loads += vectors(asked.get("out", "f32")) * branches
        if asked.get("m"):
            stores += vectors(asked["m"]) * branches
        assert counts["LDG.E.128"] == loads, name
        assert {k: n for k, n in counts.items() if k.startswith("STG")} == {"STG.E.128": stores}


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
def normals_kernel(p_z, p_seeds, stream, ROWS: tl.constexpr, COLS: tl.constexpr):
    o_b, o_c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    quad = tl.arange(0, COLS // 4)[None, :].to(tl.int64)
    z = philox.normals(tl.load(p_seeds + o_b), stream.to(tl.uint32), quad, ROWS, COLS)
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
    normals_kernel[(1,)](z, seeds.to(device), stream, ROWS=rows, COLS=cols, **options)
    assert raw(z.cpu()) == noise.reference(seeds.numpy(), cols, stream).tobytes()


# -- rows and registers ----------------------------------------------------------------------------


def reads(row: np.ndarray, layout: Layout) -> dict:
    """Which registers a row reads: by name, history by slot, extras and branches by position."""
    v = dict(zip(layout.columns, row, strict=True))
    flags = int(v["flags"])
    by_x, by_e = bool(flags & WRITES_X), bool(flags & WRITES_E)

    def read(in_x: str, in_e: str) -> bool:
        return bool((by_x and v[in_x]) or (by_e and v[in_e]))

    point = bool(flags & EVALUATE) and v["p"] != 0
    m_from_x = v["c_in_next"] != 0 and not (by_x or by_e)
    terms = [k for k in range(int(v["n_terms"])) if read(f"past_b_{k}", f"past_g_{k}")]
    return {
        "x": read("a_x", "d_x") or (point and not flags & AT_E) or m_from_x,
        "e": read("a_e", "d_e") or (point and bool(flags & AT_E)),
        "history": {int(v[f"slot_{k}"]) for k in terms},
        "extras": {i for i in range(layout.extras) if read(f"r_{i}", f"s_{i}")},
        "branches": {g for g in range(layout.branches) if flags & EVALUATE and v[f"k_{g}"]},
    }


def poison_unread(registers: Registers, rows: list, layout: Layout, out: torch.Tensor) -> None:
    """NaN in whatever none of the rows reads."""
    used = [reads(row, layout) for row in rows]
    if not any(u["x"] for u in used):
        registers.x.fill_(torch.nan)
    if registers.e is not None and not any(u["e"] for u in used):
        registers.e.fill_(torch.nan)
    for name, tensors in (
        ("history", registers.history),
        ("extras", registers.extras),
        ("branches", out.reshape(layout.branches, *registers.x.shape)),
    ):
        for i, tensor in enumerate(tensors):
            if not any(i in u[name] for u in used):
                tensor.fill_(torch.nan)


def moved(registers: Registers, device: str) -> Registers:
    def copy(tensor):
        return None if tensor is None else tensor.to(device, copy=True)

    return Registers(
        *(copy(t) for t in (registers.x, registers.e, registers.history, registers.m)),
        extras=tuple(copy(t) for t in registers.extras),
        seeds=copy(registers.seeds),
    )


def after(name, registers, rows, layout, out, xi=None, index=None, row=0, device="cpu"):
    """The registers on the CPU after one stage of `backend` on `device`."""
    copies = moved(registers, device)
    index = None if index is None else index.to(device)
    run = backends.get(name).bind(copies, torch.from_numpy(np.stack(rows)), layout, index)
    run(row, None if out is None else out.to(device), None if xi is None else xi.to(device))
    return moved(copies, "cpu")


def same(a: Registers, b: Registers) -> bool:
    pairs = zip((a.x, a.e, a.history, a.m), (b.x, b.e, b.history, b.m), strict=True)
    return all(raw(p) == raw(q) for p, q in pairs if p is not None)


# -- the same bits as the compiled core ------------------------------------------------------------


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
@CORE
@FUSES
def test_a_stage_gives_the_bits_of_the_compiled_core(device, state, size):
    rng = np.random.default_rng(size)
    cases = 18 if state == F32 else 6
    for case in range(cases // 3 if size == 5000 else cases):
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
    for case in range(4):
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


# -- thresholds ------------------------------------------------------------------------------------


def thresholds(quantile: float, floor: float, **fields) -> Plan:
    """A plan of one stage, x' = threshold(out) unless `fields` say otherwise."""
    stage = Stage(t=1.0, **{"a_x": 0.0, "b": (1.0,), **fields}, threshold=(quantile, floor))
    return Plan(stages=(stage,), times=(1.0, 0.0), variable="x0")


def thresholded(name, out, quantile, floor, device="cpu", state=None) -> torch.Tensor:
    plan = thresholds(quantile, floor)
    x = torch.full(out.shape, torch.nan, dtype=state or out.dtype, device=device)
    run = backends.get(name).bind(Registers(x=x), as_table(plan), plan.layout)
    run(0, out.to(device), None)
    return x.cpu()


def magnitudes_of_all_kinds(rng, n: int, state) -> torch.Tensor:
    """Samples [8, n] whose order is easy, tied, degenerate; the last three with NaN and inf."""
    odd = rng.normal(size=(3, n))
    odd[0, rng.integers(n)] = np.nan
    odd[1, rng.random(n) < 0.6] = -np.inf
    odd[2] = np.where(rng.random(n) < 0.5, np.inf, -np.nan)
    values = [
        rng.normal(size=n),
        rng.integers(-3, 4, n),
        rng.choice([0.0, -0.0], n),
        rng.normal(size=n) * 10.0 ** rng.integers(-30, 30, n),
        # neighbours that differ in every bit, the greater once
        1.0 - (np.arange(n) > 0) * torch.finfo(state).eps / 2,
        *odd,
    ]
    return torch.from_numpy(np.stack(values)).to(state)


# floors above and below; the sizes end in, at and past a tile of the scales
LEVELS = [(1e-7, 1e-3), (0.5, 2.0), (0.9, 1e-3), (0.995, 1.0), (1.0, 1e-3)]


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(
    ("state", "size"),
    [*((F32, n) for n in (1, 2, 3, 31, 255, 1025, 4096, 5000)), *((F64, n) for n in (1, 31, 2049))],
    ids=lambda v: str(v).removeprefix("torch."),
)
@CORE
@FUSES
def test_a_threshold_gives_the_bits_of_the_compiled_core(device, state, size):
    out = magnitudes_of_all_kinds(np.random.default_rng(size), size, state)
    # the interpreter takes a second for each
    for level in LEVELS if device == "cuda" else LEVELS[size % 3 :: 3]:
        wanted, got = thresholded("cpu", out, *level), thresholded("triton", out, *level, device)
        number = ~wanted.isnan()
        assert raw(got[number]) == raw(wanted[number]), level
        assert bool(got[~number].isnan().all()), level


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64], ids=["float32", "float64"])
def test_a_threshold_is_the_quantile_of_each_sample(device, state):
    for size, (quantile, floor) in ((2, LEVELS[1]), (2, LEVELS[2]), (1500, LEVELS[3])):
        out = magnitudes_of_all_kinds(np.random.default_rng(size), size, state)[:5]
        s = torch.quantile(out.double().abs(), quantile, dim=1).clamp(min=floor).to(state)[:, None]
        wanted = out.clamp(-s, s) / s
        got = thresholded("triton", out, quantile, floor, device)
        # s may fall on the other side of a rounding, then the quotient too
        bound = 2 * torch.finfo(state).eps * (1 + wanted.abs())
        assert bool(((got - wanted).abs() <= bound).all()), (size, quantile, floor)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [BF16, F16], ids=["bfloat16", "float16"])
@CORE
def test_a_sixteen_bit_state_is_thresholded_in_float32(device, state):
    out = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1025))).to(state)
    wanted = thresholded("cpu", out.float(), 0.9, 0.5).to(state)
    assert raw(thresholded("triton", out, 0.9, 0.5, device)) == raw(wanted)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, F64], ids=["float32", "float64"])
@CORE
@FUSES
def test_rows_with_a_threshold_give_the_bits_of_the_compiled_core(device, state):
    rng = np.random.default_rng(31)
    for case in range(20 if state == F32 else 5):
        # 17 samples share a program of the stage where they are short
        batch, size = [(1, 1100), (3, 200), (17, 6), (2, 48), (3, 1)][case % 5]
        layout = Layout(terms=case % 4, branches=case % 2 + 1, extras=case % 3 // 2)
        with_e, draws = case % 4 > 0, case // 2 % 3
        rows = [random_row(rng, layout, with_e, draws, clip=k == 1) for k in range(4)]
        for row in rows[2:]:
            row[0] = int(row[0]) | EVALUATE | WRITES_X | THRESHOLD
            row[6:8] = rng.choice([0.3, 0.9, 0.995, 1.0]), rng.choice([0.1, 0.5, 1.0])
            row[1], row[layout.columns.index("push_x")] = 4, 3
            row[-layout.branches - 2 * layout.extras] = 1.5
        m = [None, *DTYPES][case % 5]
        registers = random_registers(rng, (batch, size), state, layout, with_e, m)
        room = random_output(rng, (batch, size + 16), layout, DTYPES[-case % 4])
        # contiguous, and strided at addresses that are multiples of 16 bytes and that are not
        out = [room[:, :size].contiguous(), room[:, :size], room[:, 3 : size + 3]][case % 3]
        index = torch.from_numpy(rng.permuted(np.arange(batch) % 4)) if case % 5 else None
        used = rows[3:] if index is None else [rows[i] for i in sorted(set(index.tolist()))]
        poison_unread(registers, used, layout, out)
        row = 3 if index is None else 0
        wanted = after("cpu", registers, rows, layout, out.contiguous(), None, index, row)
        copies = moved(registers, device)
        there = room.to(device).as_strided(out.shape, out.stride(), out.storage_offset())
        if case % 3 == 0:
            there = out.to(device)
        run = backends.get("triton").bind(
            *(copies, torch.from_numpy(np.stack(rows)), layout),
            None if index is None else index.to(device),
        )
        run(row, there, None)
        assert same(moved(copies, "cpu"), wanted), case


@pytest.mark.parametrize("device", HERE)
def test_the_quantile_is_a_float64_number(device):
    # at 0.9 the position is 900 exactly; 0.9 in float32 falls short of it
    out = torch.zeros(1, 1001, device=device)
    out[:, :101] = 4.0
    plan, x = thresholds(0.9, 1.0), torch.full_like(out, torch.nan)
    table = as_table(plan)
    run = backends.get("triton").bind(Registers(x=x), table, plan.layout)
    run(0, out, None)
    assert torch.equal(x, out / 4)
    assert run.quantiles.tolist() == [0.9]
    run.quantiles[0] = 0.5  # in place on the device
    run(0, out, None)
    assert torch.equal(x, out.clamp(max=1.0))
    run.table[0, plan.layout.columns.index("clip_hi")] = 2.0
    run(0, out, None)
    assert torch.equal(x, out.clamp(max=2.0) / 2)
    table[0, plan.layout.columns.index("clip_lo")] = 1.0
    run(0, out, None)
    assert torch.equal(x, out / 4)


@pytest.mark.parametrize("device", HERE)
def test_only_rows_that_evaluate_and_threshold_are_given_a_scale(device):
    stages = (
        Stage(t=1.0, a_x=0.0, b=(1.0,), threshold=(0.5, 1.0)),
        Stage(t=0.7, a_x=0.0, b=(1.0,)),
        Stage(t=0.5, a_x=0.5, evaluate=False, threshold=(0.5, 1.0)),
    )
    plan = Plan(stages=stages, times=(1.0, 0.7, 0.5, 0.0), variable="x0")
    for size in (5, 1500):
        x, out = torch.ones(5, size, device=device), torch.full((5, size), 8.0, device=device)
        index = torch.tensor([0, 1, 2, 3, -1], device=device)
        run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout, index)
        run._scale.fill_(torch.nan)
        run(0, out, None)
        assert x.unique(dim=1).tolist() == [[1.0], [8.0], [0.5], [1.0], [1.0]]
        assert run._scale.isnan().tolist() == [False, True, True, True, True]
        run(0, None, None)  # none of those that run evaluates
        assert x.unique(dim=1).tolist() == [[1.0], [8.0], [0.25], [1.0], [1.0]]


# -- the error -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("state", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_the_error_is_at_most_twice_that_of_eager_torch(device, state):
    # relative to a float64 run on the same stored values, in the norm (a float64 state: the tests
    # of bits)
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
            extras=tuple(r.double() for r in registers.extras),
        )
        exact = after("torch", double, [row], layout, out)
        eager = after("torch", registers, [row], layout, out)
        got = after("triton", registers, [row], layout, out, device=device)

        def error(run: Registers, name: str, exact=exact) -> float:
            wanted = getattr(exact, name)
            return float((getattr(run, name).double() - wanted).norm() / wanted.norm())

        for name in ("x", "e", "m"):
            if getattr(registers, name) is not None and bool(getattr(exact, name).isfinite().all()):
                assert error(got, name) <= 2 * error(eager, name), (case, name)


# -- whole plans -----------------------------------------------------------------------------------

SOLVERS = ["ddim", "deis-3", "dpmpp-3m", "dpm-3", "deis-kutta3", "ddpm"]


def network(x, t, y=None):
    """Two products: the same bits on every device."""
    scale = 0.25 if y is None else y.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return x * scale * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("solver", SOLVERS)
@CORE
@FUSES
def test_a_whole_plan_gives_the_bits_of_the_compiled_core(device, solver):
    plan = fd.plan(fd.schedules.VPLinear(), solver, 4 if solver != "dpm-3" else 2)
    for dtype, network_dtype in ((F32, None), (F32, BF16), (F64, None)):
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


# -- the table -------------------------------------------------------------------------------------


def as_table(plan: Plan) -> torch.Tensor:
    return torch.tensor(plan.table)


def test_columns_and_flags_are_those_of_plans():
    head = Layout(0, 0).HEAD
    for i, name in enumerate(head):
        assert getattr(stage_module, f"_{name.upper()}").value == i, name
    assert stage_module._HEAD.value == len(head)
    flags = {"EVALUATE": EVALUATE, "AT_E": AT_E, "WRITES_E": WRITES_E, "WRITES_X": WRITES_X}
    for name, value in {**flags, "CLIPS": CLIP, "THRESHOLDS": THRESHOLD}.items():
        assert getattr(stage_module, f"_{name}").value == value, name


@pytest.mark.parametrize("device", HERE)
def test_the_table_is_read_at_every_call(device):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
    b_0 = plan.layout.columns.index("b_0")
    table = as_table(plan)
    x = torch.ones(1, 8, device=device)
    ones, nans = torch.ones(1, 8, device=device), torch.full((1, 8), torch.nan, device=device)
    run = backends.get("triton").bind(Registers(x=x), table, plan.layout)
    run(0, ones, None)
    assert x.tolist() == [[2.5] * 8]
    table[0, b_0] = 0.0  # seen by version
    run(0, nans, None)
    assert x.tolist() == [[1.25] * 8]
    run.table[0, b_0] = 1.0  # in place on the device
    run(0, ones, None)
    assert x.tolist() == [[1.625] * 8]
    table.numpy()[0, b_0] = 3.0  # not seen by PyTorch
    run.refresh(table)
    run(0, ones, None)
    assert x.tolist() == [[3.8125] * 8]


@pytest.mark.parametrize("device", HERE)
def test_a_table_that_needs_another_kernel_is_refused(device):
    stage = Stage(t=1.0, a_x=0.5, c=1.0, b=(1.0,), noise=((1, 1.0),))
    plan = Plan(stages=(stage,), times=(1.0, 0.0), variable="x0")
    x, seeds = torch.ones(1, 8, device=device), torch.ones(1, dtype=torch.int64, device=device)
    run = backends.get("triton").bind(Registers(x=x, seeds=seeds), as_table(plan), plan.layout)
    for change in (
        {"noise": ((1, 1.0), (2, 1.0))},
        {"clip": (-1.0, 1.0)},
        {"threshold": (0.9, 1.0)},
    ):
        other = dataclasses.replace(plan, stages=(dataclasses.replace(stage, **change),))
        with pytest.raises(ValueError, match="Bind it anew"):
            run.refresh(as_table(other))
    with pytest.raises(ValueError, match=r"float64 \[1, 22\] on the CPU; got .*\[2, 22\]"):
        run.refresh(torch.zeros(2, 22, dtype=F64))


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("own", [False, True])
@CORE
@FUSES
def test_the_row_may_stand_on_the_device(device, own):
    rng = np.random.default_rng(12)
    layout = Layout(terms=2, branches=1)
    rows = [random_row(rng, layout, True, 1, False) for _ in range(4)]
    registers = random_registers(rng, (3, 70), F32, layout, True, F16)
    out = random_output(rng, (3, 70), layout, F16)
    index = torch.tensor([0, 1, 0]) if own else None
    start, there = torch.tensor([0], device=device), moved(registers, device)
    bind = backends.get("triton").bind
    indexed = index.to(device) if own else None
    run = bind(there, torch.from_numpy(np.stack(rows)), layout, indexed, start)
    for i in (1, 2):
        start.fill_(i)
        registers = after("cpu", registers, rows, layout, out, None, index, i)
        run(0, out.to(device), None)
        assert same(moved(there, "cpu"), registers)
    start.fill_(4)
    run(0, out.to(device), None)
    assert same(moved(there, "cpu"), registers)


@pytest.mark.parametrize("device", HERE)
def test_a_sample_whose_row_is_outside_the_table_is_left_alone(device):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
    for size in (8, 1500):
        x = torch.ones(3, size, device=device)
        index = torch.tensor([0, 1, -1], device=device)
        run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout, index)
        run(0, torch.ones(3, size, device=device), None)
        assert x[:, 0].tolist() == [2.5, 1.0, 1.0]


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draws", "own"), [(0, False), (1, False), (0, True)])
@pytest.mark.parametrize("batch", [1, 3, 64, 500])
@pytest.mark.parametrize("size", [1, 3, 16, 64, 1000, 1023, 1025, 2**20, 2**31 + 3])
def test_tiles_cover_every_element_once(batch, size, draws, own):
    (programs, _, _), (b, units, _), constants = backend_module.launch_shape(
        batch, size, size, draws, own, 1024
    )
    rows, cols = constants["ROWS"], constants["COLS"]
    n = units * constants["UNIT"]
    assert b * n == batch * size
    assert rows * cols <= 1024
    assert cols >= n or rows == 1
    assert programs == -(-b // rows) * -(-n // cols)
    if batch * size >= 2**15 and size >= 16:
        assert programs * 1024 < 2.1 * batch * size  # small samples fill their tiles


def test_a_launch_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(ValueError, match="Split the batch"):
        backend_module.launch_shape(2**20, 2**22, 2**22, 1, False, 1024)
    _, _, constants = backend_module.launch_shape(2**31, 1, 1, 0, True, 1024)
    with pytest.raises(ValueError, match="Split the batch"):
        backend_module.scale_shape(2**31, 1, 4, constants)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize("of_scales", [False, True])
def test_later_launches_pass_what_the_first_passed(monkeypatch, of_scales):
    # a compiled kernel is called with all arguments in order, past the look-up of the first launch
    class Kernel:
        def __init__(self, kernel):
            self.names, self.launches = kernel.arg_names, []

        def __getitem__(self, grid):
            def first(*args, num_warps, enable_fp_fusion, maxnreg=None, **constants):
                self.launches.append((grid, dict(zip(self.names, args, strict=False)) | constants))
                assert not enable_fp_fusion
                return Binary(self)

            return first

    class Binary:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names, launches = self.kernel.names, self.kernel.launches
            return lambda *args: launches.append((grid, dict(zip(names, args, strict=True))))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    layout = Layout(terms=2, branches=2, extras=1)
    registers = random_registers(np.random.default_rng(0), (3, 20), F32, layout, True, BF16)
    table = torch.zeros(2, layout.width, dtype=F64)
    table[:, [layout.columns.index(name) for name in ("push", "push_x")]] = -1
    if of_scales:
        table[:, 0], table[:, 6:8] = EVALUATE + THRESHOLD, 1.0
    run = backends.get("triton").bind(registers, table, layout)
    kernels = Kernel(run._kernel), Kernel(run._scale_kernel)
    monkeypatch.setattr(run, "_interpreted", False)
    monkeypatch.setattr(run, "_kernel", kernels[0])
    monkeypatch.setattr(run, "_scale_kernel", kernels[1])
    launches, names = kernels[of_scales].launches, kernels[of_scales].names
    outputs = [torch.zeros(6, 20), torch.zeros(6, 20), torch.zeros(6, 40)[:, :20]]
    for i, out in enumerate((outputs[0], outputs[1], outputs[2], outputs[2])):
        run(i % 2, out, None)
        grid, arguments = launches[-1]
        assert len(grid) == 3
        assert arguments["p_out"] is out
        assert arguments["row"] == i % 2
    assert len(launches) == 4
    assert len(kernels[not of_scales].launches) == 4 * of_scales
    for first, later in (launches[:2], launches[2:]):
        assert first[0] == later[0]
        assert list(first[1]) == list(later[1]) == names
        assert all(
            later[1][name] is first[1][name]
            for name in names
            if name not in ("p_out", "row", "rows", "batch", "size_units", "out_units")
        )
    assert launches[0][1]["OUT_UNIT"] == 0
    assert launches[2][1]["OUT_UNIT"] == 4


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    size = 2**31 + 40
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(1.0,)),), times=(1.0, 0.0))
    x = torch.ones(1, size, dtype=BF16, device="cuda")
    out = torch.ones(1, size, dtype=BF16, device="cuda")
    backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)(0, out, None)
    assert bool((x == 1.5).all())
    plan = thresholds(1 - 2**-27, 0.5)
    out[:, -9:] = 8.0  # the highest nine lie past the position
    out[:, 2**20 : 2**20 + 9] = -4.0
    backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)(0, out, None)
    assert x[:, -10:].tolist() == [[0.25] + [1.0] * 9]
    assert bool((x[:, 2**20 : 2**20 + 9] == -1.0).all())


@pytest.mark.gpu
def test_a_captured_stage_reads_the_table_at_replay():
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(1.0,)),), times=(1.0, 0.0))
    x, out = torch.ones(4, 300, device="cuda"), torch.ones(4, 300, device="cuda")
    run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0, out, None)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0, out, None)
    for coefficient in (1.0, 3.0):
        x.fill_(2.0)
        run.table[0, plan.layout.columns.index("b_0")] = coefficient
        graph.replay()
        assert bool((x == 1.0 + coefficient).all())


@pytest.mark.gpu
def test_a_captured_threshold_reads_its_levels_at_replay():
    plan = thresholds(0.5, 1.0)
    out = torch.randn(4, 3001, device="cuda")
    x = torch.full_like(out, torch.nan)
    row = torch.zeros(1, dtype=torch.int64, device="cuda")
    run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout, None, row)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0, out, None)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0, out, None)
    for quantile, floor in ((0.5, 0.1), (0.9, 0.1), (0.9, 5.0), (1.0, 5.0)):
        x.fill_(torch.nan)
        run._scale.fill_(torch.nan)
        out.normal_(std=3.0)
        run.quantiles.fill_(quantile)
        run.table[0, plan.layout.columns.index("clip_hi")] = floor
        graph.replay()
        assert raw(x.cpu()) == raw(thresholded("torch", out.cpu(), quantile, floor))
    row.fill_(1)
    x.fill_(2.0)
    graph.replay()
    assert bool((x == 2.0).all())


# -- mistakes --------------------------------------------------------------------------------------

PLAN = Plan(stages=(Stage(t=1.0, b=(1.0,)),), times=(1.0, 0.0))
ROOM = torch.ones(3, 4)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x is \[B, \.\.\.\]"),
        ({"x": torch.ones(4, 2).t()}, ValueError, r"Pass x\.contiguous\(\)"),
        ({"x": torch.ones(2, 4, dtype=torch.int32)}, NotImplementedError, "got torch.int32"),
        ({"x": torch.ones(2, 4, device="meta")}, NotImplementedError, 'got meta. Use backend="t'),
        ({"m": torch.ones(2, 4, dtype=torch.int8)}, NotImplementedError, "networks in float32, "),
        ({"m": torch.ones(3, 4)}, ValueError, r"m is \[2, 4\]; got \[3, 4\]"),
        ({"e": torch.ones(2, 4).double()}, TypeError, "e is torch.float32; got torch.float64"),
        ({"e": torch.ones(2, 4, device="meta")}, ValueError, r"Move e: e\.to\('cpu'\)"),
        ({"history": torch.ones(1, 2, 5)}, ValueError, r"history is \[1, 2, 4\]"),
        ({"seeds": torch.ones(3, dtype=torch.int64)}, ValueError, r"seeds is \[2\]"),
        ({"extras": (torch.ones(2, 4),)}, ValueError, "names 0 extra registers; got 1"),
        ({"x": ROOM[:2], "e": ROOM[1:]}, ValueError, r"x and e overlap. Pass e\.clone\(\)"),
        ({"x": ROOM[:2], "m": ROOM[:2]}, ValueError, "x and m overlap"),
        (
            {"x": torch.frombuffer(bytearray(36), dtype=F32, offset=1, count=8).view(2, 4)},
            *(ValueError, "aligned to its 4-byte elements"),
        ),
    ],
)
def test_wrong_registers_are_refused_when_bound(change, error, message):
    registers = dataclasses.replace(Registers(x=torch.ones(2, 4)), **change)
    with pytest.raises(error, match=message):
        backends.get("triton").bind(registers, as_table(PLAN), PLAN.layout)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (torch.ones(1, 22), TypeError, "table is torch.float64; got torch.float32"),
        (torch.ones(1, 20, dtype=F64), ValueError, r"table is \[rows, 22\]; got \[1, 20\]"),
        (torch.ones(1, 22, dtype=F64, device="meta"), ValueError, r"Pass table\.cpu\(\)"),
    ],
)
def test_a_wrong_table_is_refused_when_bound(table, error, message):
    with pytest.raises(error, match=message):
        backends.get("triton").bind(Registers(x=torch.ones(2, 4)), table, PLAN.layout)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"flags": 64}, "known bits; row 1 has flags = 64"),
        ({"flags": np.nan}, "flags"),
        ({"push": 6}, "history has 6 slots; row 1 has push = 6"),
        ({"slot_0": -1}, "history has 6 slots; row 1 has slot_0 = -1"),
        ({"slot_0": 0.5}, "slots"),
        ({"n_terms": 2}, "fit the layout"),
        ({"draws": 3}, "fit the layout"),
        ({"stream_1": -1}, "streams"),
        ({"stream_1": 2**24 + 1}, "streams"),
        ({"a_e": 1.0}, r"Registers\.e"),
        ({"flags": WRITES_E}, r"Registers\.e"),
        ({"flags": WRITES_X}, "without an evaluation"),
        ({"flags": EVALUATE + THRESHOLD, "clip_hi": 1.0}, r"a quantile in \(0, 1\].*row 1"),
        ({"flags": EVALUATE + THRESHOLD, "clip_lo": 1.1, "clip_hi": 1.0}, "a quantile"),
        ({"flags": EVALUATE + THRESHOLD, "clip_lo": np.nan, "clip_hi": 1.0}, "a quantile"),
        ({"flags": EVALUATE + THRESHOLD, "clip_lo": 0.5}, "positive floor"),
        ({"flags": EVALUATE + THRESHOLD, "clip_lo": 0.5, "clip_hi": 1e99}, "floor"),
        ({"flags": EVALUATE + THRESHOLD, "clip_lo": 0.5, "clip_hi": 1e-99}, "floor"),
        ({"flags": EVALUATE + CLIP + THRESHOLD, "clip_lo": 0.5, "clip_hi": 1.0}, "without a clip"),
    ],
)
def test_a_table_that_would_corrupt_memory_is_refused_when_bound(edit, message):
    stage = Stage(t=0.5, a_x=0.5, b=(1.0, 1.0), c=1.0, noise=((1, 1.0),))
    plan = Plan(stages=(Stage(t=1.0, b=(1.0,)), stage), times=(1.0, 0.0))
    table = as_table(plan)
    for name, value in edit.items():
        table[1, plan.layout.columns.index(name)] = value
    registers = random_registers(np.random.default_rng(9), (2, 50), F32, plan.layout)
    with pytest.raises(ValueError, match=message):
        backends.get("triton").bind(registers, table, plan.layout)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("row", "out", "xi", "error", "message"),
    [
        (0, None, None, ValueError, "Give out"),
        (0, torch.ones(2, 5), None, ValueError, r"\[2, 4\].*got \[2, 5\]"),
        (0, torch.ones(2, 4, dtype=torch.int32), None, TypeError, "got torch.int32"),
        (0, torch.ones(2, 4, device="meta"), None, ValueError, "lies on cpu.*got meta"),
        (0, torch.ones(2, 4), torch.ones(2, 3), ValueError, r"xi is \[2, 4\]; got \[2, 3\]"),
        (0, torch.ones(2, 4), torch.ones(2, 4).double(), TypeError, "xi is torch.float32"),
        (0, torch.ones(2, 4), torch.ones(2, 4, device="meta"), ValueError, "xi lies on cpu"),
        (2, torch.ones(2, 4), None, IndexError, r"\[0, 2\).*got 2"),
        (-1, torch.ones(2, 4), None, IndexError, "got -1"),
        (1, torch.ones(2, 4), None, ValueError, r"Bind Registers\.seeds, or give xi"),
    ],
)
def test_a_wrong_call_is_named_and_writes_nothing(row, out, xi, error, message):
    noisy = Stage(t=0.5, b=(1.0,), c=1.0, noise=((1, 1.0),))
    plan = Plan(stages=(*PLAN.stages, noisy), times=(1.0, 0.0))
    x = torch.ones(2, 4)
    run = backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)
    with pytest.raises(error, match=message):
        run(row, out, xi)
    assert torch.equal(x, torch.ones(2, 4))


@pytest.mark.parametrize("device", HERE)
def test_a_network_may_return_a_view_of_its_input(device):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
    for view in (lambda x: x, lambda x: x[:1].expand(3, 1500), lambda x: x.flip(0)):
        x = torch.arange(4500.0, device=device).view(3, 1500)
        wanted = 0.5 * x + 2.0 * view(x)
        backends.get("triton").bind(Registers(x=x), as_table(plan), plan.layout)(0, view(x), None)
        assert torch.equal(x, wanted)


# -- choosing --------------------------------------------------------------------------------------


def test_the_interpreter_is_never_chosen_unasked():
    for state, network_dtype in itertools.product(DTYPES, DTYPES):
        chosen = backends.choose(None, state, network_dtype, torch.device("cpu"))
        assert chosen.name in ("cpu", "torch")


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_the_interpreter_serves_cpu_tensors_when_asked():
    assert backends.status()["triton"] == "available"
    assert backends.choose("triton", F32, BF16, torch.device("cpu")).name == "triton"
    with pytest.raises(NotImplementedError, match=r"runs cpu tensors \(TRITON_INTERPRET=1"):
        backends.choose("triton", F32, BF16, torch.device("cuda"))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(backend_module, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA GPU with its driver" in backends.status()["triton"]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backends.get("triton").bind(Registers(x=torch.ones(2, 4)), as_table(PLAN), PLAN.layout)
    with pytest.raises(RuntimeError, match="does not run here; it needs an NVIDIA GPU"):
        backends.choose("triton", F32, F32, torch.device("cuda"))
    monkeypatch.setattr(backend_module.importlib.metadata, "version", lambda _: "2.1.0")
    assert backends.status()["triton"] == "triton 2.1.0 is too old; pip install --upgrade triton"
    monkeypatch.setattr(backend_module.importlib.util, "find_spec", lambda _: None)
    assert backends.status()["triton"] == "triton is not installed; pip install triton"


if __name__ == "__main__":
    chosen = ON_EVERY_ARCHITECTURE if "--few" in sys.argv else SPECIALISATIONS
    found = {
        name: inspected(compiled(int(sys.argv[1]), **SPECIALISATIONS[name]).asm["cubin"])
        for name in chosen
    }
    print(json.dumps(found))
    sys.exit()
