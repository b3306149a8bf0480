# SPDX-License-Identifier: Apache-2.0
"""Loads and stores in the machine code of the CUDA kernels; needs cuobjdump, and no GPU."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import sass
from support.machine import Thread
from support.sass import Instruction

from fastdiff import noise


@pytest.fixture(scope="module", params=sass.ARCHITECTURES)
def stages(request, tmp_path_factory) -> dict[str, list[Instruction]]:
    """The stage kernels of an architecture, by name."""
    path = sass.module_with(request.param, tmp_path_factory.mktemp("sass"))
    if path is None:
        pytest.skip("needs cuobjdump, and the CUDA module built for it or nvcc")
    found = {
        name: sass.instructions(text)
        for name, text in sass.dumped(path, request.param).items()
        if "stage" in name
    }
    assert len(found) in (32, len(sass.SOME))
    return found


def wide_stores(kernel: str) -> int:
    """Stores of 16 bytes that a kernel has at least.

    x, push and push_x without e, and e with it: 7, which float64 doubles; m in float32 and, twice,
    in float64, without e and with it: 6.
    """
    return (14 if "RowId" in kernel else 7) + 6


@pytest.mark.slow
def test_whole_quads_are_stored_at_once(stages):
    for name, code in stages.items():
        assert sass.split_quads(code, "STG") == [], name
        stores = [i for i in code if re.match(r"STG\.E(\.\w+)*\.128", i.code)]
        assert len(stores) >= wide_stores(name), name


@pytest.mark.slow
def test_whole_quads_are_loaded_at_once(stages):
    for name, code in stages.items():
        assert sass.split_quads(code, "LDG") == [], name
        assert any(re.match(r"LDG\.E(\.\w+)*\.128", i.code) for i in code), name


def loads_ahead(kernel: str, with_e: bool) -> int:
    """x, e and three terms; two outputs, where they are as wide; float64 takes twice as many."""
    state, out = re.search(r"RowI([fd])EE(?:NS_)?(\w)", kernel).groups()
    wide = {"f": 2, "d": 4}.get(out, 0)
    return (4 + with_e) * (1 if state == "f" else 2) + wide


@pytest.mark.slow
def test_loads_of_a_quad_are_under_way_together(stages, request):
    shared = {name: code for name, code in stages.items() if "stage_shared" in name}
    assert len(shared) in (16, 3)
    with_e = request.node.callspec.params["stages"] != "sm_80"  # there e is loaded apart
    for name, code in shared.items():
        assert sass.loads_in_flight(code) >= loads_ahead(name, with_e), name


@pytest.mark.slow
def test_a_row_is_resolved_in_few_instructions(stages):
    """Of compute capability 9.0 and newer, whose kernels then wait for those ahead."""
    name = next(n for n in stages if "stage_sharedINS_3RowIfEEf" in n)
    names = [i.name for i in stages[name]]
    if "ACQBULK" not in names:
        pytest.skip("no kernel of this architecture waits")
    before = names[: names.index("ACQBULK")]
    assert len(before) <= 640  # 598 for 9.0, loading the row and finding the addresses included
    assert before.count("DSETP") <= 15
    assert not {"F2I", "I2F"} & set(before)


# -- noise -----------------------------------------------------------------------------------------

NOISE = """
#include "philox.h"
__global__ void quad(const uint64_t* seed, float4* z, uint32_t stream) {
    const uint64_t q = blockIdx.x * 256ull + threadIdx.x;
    float v[4];
    fastdiff::normal_quad(*seed, stream, q, v);
    z[q] = make_float4(v[0], v[1], v[2], v[3]);
}
__global__ void root(float* v) { *v = fastdiff::ScalarLanes::sqrt(*v); }
__global__ void whole_root(float* v) { *v = __fsqrt_rn(*v); }
"""


def newton(code: list[Instruction]) -> str:
    """What follows from a reciprocal root by products and sums alone, as a formula."""
    known: dict[str, str] = {}
    last = ""
    for i in code:
        operands = [o.removesuffix(".reuse") for o in i.operands]
        if i.name == "MUFU":
            known = {operands[0]: "r", operands[1]: "v"}
        elif i.name in {"FMUL", "FFMA"} and known:
            terms = [known.get(o.lstrip("-"), o).join(["-" * o.startswith("-"), ""])
                     for o in operands[1:]]  # fmt: skip
            last = f"{i.name}({', '.join(sorted(terms[:2]) + terms[2:])})"
            known[operands[0]] = last
    return last


@pytest.mark.slow
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_a_counter_takes_few_instructions_and_the_root_of_the_whole_range(arch, tmp_path):
    if shutil.which("nvcc") is None or sass.tool("cuobjdump") is None:
        pytest.skip("needs nvcc and cuobjdump")
    code = sass.dumped(sass.compiled(NOISE, arch, tmp_path), arch)
    quad, root, whole = (
        sass.instructions(next(text for name, text in code.items() if f"{len(k)}{k}P" in name))
        for k in ("quad", "root", "whole_root")
    )
    count = [i.name for i in quad].index("EXIT")
    assert count <= 185
    assert not any(i.jumps for i in quad[:count])  # two roots, and no test of their range
    assert newton(root).startswith("FFMA(")
    assert newton(root) == newton(whole[: [i.name for i in whole].index("EXIT")])


# -- a whole quad ----------------------------------------------------------------------------------

# A row of M = terms + 1, with noise or without, and a launch of it: their bytes.
LAUNCH = """
#include <cstdio>
#include <cstdlib>
#include "cuda/thread.h"
using namespace fastdiff;
int main(int, char** asked) {
    const int terms = atoi(asked[1]), noise = atoi(asked[2]);
    static double row[head::kColumns + term::kColumns + branch::kColumns];
    cuda::Launch l{};
    StageArgs& a = l.args;
    a.x = (void*)(1ll << 32), a.history = (void*)(2ll << 32), a.out = (void*)(3ll << 32);
    a.seeds = (uint64_t*)(4ll << 32), a.table = row, a.terms = terms;
    a.size = a.out_stride = 1 << 24;
    a.batch = a.rows = a.bank_batch = a.copies = a.branches = 1, a.slots = 2;
    l.aligned = true;
    row[head::flags] = kEvaluate | kWritesX, row[head::push] = terms ? 1 : -1;
    row[head::push_x] = -1, row[head::v] = 1, row[head::n_terms] = terms;
    for (int k = head::scalar_b; k <= head::scalar_ce; ++k) row[k] = -1;
    row[head::draws] = noise, row[head::stream_1] = 7, row[head::xi_1] = 1;
    row[head::p] = 0.5, row[head::a_x] = 0.75, row[head::b_0] = 0.5, row[head::c] = noise * 0.25;
    row[head::kColumns + term::past_b] = -0.25;  // of slot 0
    row[a.branch_offset() + branch::k] = 2, row[a.branch_offset() + branch::scalar_k] = -1;
    static cuda::Placed<Row<float>> at;
    at.resolve(cuda::Warp{0}, l, 0);
    at.find_places<float>(cuda::Warp{0}, l);
    fwrite(&l, sizeof l, 1, stdout);
    fwrite(&at, sizeof at, 1, stdout);
    fprintf(stderr, "%zu", sizeof l);
    return at.status;
}
"""


@pytest.fixture(scope="module")
def shared_rows(tmp_path_factory) -> tuple[list[Instruction], Path]:
    """The kernel of float32 rows that samples share, for sm_90, and the program above."""
    folder = tmp_path_factory.mktemp("quad")
    path = sass.module_with("sm_90", folder)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if path is None or shutil.which(compiler[0]) is None:
        pytest.skip("needs cuobjdump, the CUDA module built for sm_90 or nvcc, and a C++ compiler")
    kernels = sass.dumped(path, "sm_90")
    code = next(text for name, text in kernels.items() if "stage_sharedINS_3RowIfEEfEE" in name)
    (folder / "launch.cpp").write_text(LAUNCH)
    flags = ["-std=c++17", "-O0", f"-I{sass.ROOT / 'csrc'}", "-o", str(folder / "launch")]
    sass.run(*compiler, *flags, str(folder / "launch.cpp"))
    return sass.instructions(code), folder / "launch"


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("terms", [0, 1])
def test_a_whole_quad_takes_few_instructions(shared_rows, terms, noisy):
    code, program = shared_rows
    done = subprocess.run([program, str(terms), str(int(noisy))], capture_output=True, check=True)
    size = int(done.stderr)
    # one thread of one block, which is not of the warp that resolves the row
    special = {"SR_TID.X": 40, "SR_CTAID.X": 0, "SR_CgaCtaId": 0, "grid": 1}
    half = int(np.float32(0.5).view(np.uint32))
    row = done.stdout[size:]
    shared = bytearray(0x400) + row + bytearray(1 << 12)  # as the kernel lays it out
    thread = Thread(code, done.stdout[:size], shared, special, lambda address: half)
    ends: list[int] = []
    stores: list[tuple[int, list[int]]] = []

    def until(thread: Thread) -> bool:
        found = [s for s in thread.stored if s[0] >> 32 == 1]
        if len(found) > len(stores):
            stores.append(found[-1])
            ends.append(len(thread.issued))
        return len(stores) == 4

    thread.run(until)
    # h = 2 out + x / 2, x' = 3 x / 4 + h / 2 - term / 4 + xi / 4, where all that is read is 1/2:
    # sums that are exact but for the last
    seeds = np.array([half << 32 | half])
    xi = noise.reference(seeds, 4 * 1024, 7)[0].astype(np.float64) if noisy else np.zeros(4 * 1024)
    for turn, (address, words) in enumerate(stores):
        quad = 40 + 256 * turn
        assert address == (1 << 32) + 16 * quad
        wanted = (1 - 0.125 * terms + 0.25 * xi[4 * quad : 4 * quad + 4]).astype(np.float32)
        assert words == wanted.view(np.uint32).tolist()
    assert sum(s[0] >> 32 == 2 for s in thread.stored) in (3 * terms, 4 * terms)
    (taken,) = set(np.diff(ends))
    assert taken <= (375 if noisy else 200)


# -- what counts as split --------------------------------------------------------------------------

QUAD = """
        /*0000*/              @P0 BRA 0x60 ;
        /*0010*/              @{a} STG.E desc[UR6][R4.64], R8 ;
        /*0020*/              {between} ;
        /*0030*/              @{b} STG.E desc[UR6][R4.64+0x8], R10 ;
        /*0040*/              @{a} STG.E desc[UR6][R4.64+0x4], R9 ;
        /*0050*/              @{b} STG.E desc[UR6][R4.64+0xc], R11 ;
        /*0060*/              EXIT ;
"""


@pytest.mark.parametrize(
    ("a", "b", "between", "split"),
    [
        ("P1", "P1", "FADD R1, R2, R3", True),
        ("!PT", "!PT", "FADD R1, R2, R3", True),
        ("P1", "!P1", "FADD R1, R2, R3", False),
        ("P1", "P2", "FADD R1, R2, R3", False),
        ("P1", "P1", "ISETP.GT.AND P1, PT, R2, 0x1, PT", False),
        ("P1", "P1", "IMAD.WIDE R4, R2, 0x4, R6", False),
        ("P1", "P1", "@P2 BRA 0x10", False),
    ],
)
def test_a_split_quad_is_told_from_single_elements(a, b, between, split):
    code = sass.instructions(QUAD.format(a=a, b=b, between=between))
    assert len(code) == 7
    assert bool(sass.split_quads(code, "STG")) == split
