# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend's machine code, and what only a GPU shows."""

import re
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.gpu import (
    CORE,
    CUDA,
    NOISY,
    ONE_STAGE,
    WHY_NOT,
    assert_same,
    gpu,
    needs_cpu,
    needs_module,
    on,
)
from support.rows import (
    DTYPES,
    random_output,
    random_registers,
    random_row,
    table_of,
    written,
)
from support.sass import tool

from fastdiff import backends
from fastdiff.backends import Registers
from fastdiff.plans import CLIP, EVALUATE, THRESHOLD, WRITES_X, Layout

SIZES = [0, 1, 3, 4, 16, 63, 65, 1023, 1024, 1025, 5000]

CPU = torch.device("cpu")


# -- machine code ----------------------------------------------------------------------------------


# The most registers of a thread, in the architectures built by default: 65,536 a processor, 256
# threads a block, so four blocks run at once in float32, three where rows grow, and two in float64.
# The blocks that find scales have 1,024 and 512 threads, and one of them fits.
# Two blocks of 256 threads a multiprocessor are planned for measures.
REGISTERS = {"normals": 40, "measures": 128, "GrownRowId": 128, "RowId": 128}
REGISTERS |= {"thresholdsINS_8GrownRowIf": 64, "GrownRowIf": 80, "RowIf": 64}  # the first that fits


@pytest.fixture(scope="module")
def cuobjdump() -> Callable[..., str]:
    program = tool("cuobjdump")
    if CORE is None or program is None:
        pytest.skip(str(WHY_NOT) if CORE is None else "needs cuobjdump")

    def dump(*options: str) -> str:
        done = subprocess.run([program, *options, CORE.__file__], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return dump


def functions(text: str, start: str) -> dict[str, str]:
    """The parts of a dump by kernel."""
    parts = re.split(rf"^\s*{start}\s*:?\s*(\S+?):?\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_kernels_spill_nothing_and_leave_room_for_the_blocks_planned(cuobjdump, record_property):
    archs = set(re.findall(r"sm_\d+", cuobjdump("--list-elf")))
    if not archs:
        pytest.skip("the module holds PTX alone")
    for arch in archs:
        usages = cuobjdump("--dump-resource-usage", "--gpu-architecture", arch)
        kernels = functions(usages, "Function")
        assert len({name for name in kernels if "stage" in name}) == 32
        assert len({name for name in kernels if "thresholds" in name}) == 16
        assert len({name for name in kernels if "measures" in name}) == 8
        for name, usage in kernels.items():
            used = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", usage)}
            kind = next(kind for kind in REGISTERS if kind in name)
            record_property(f"{arch} {name}", used["REG"])
            assert used["REG"] <= REGISTERS[kind], (arch, name, used)
            assert used["STACK"] == 0, (arch, name, used)
            assert used["LOCAL"] == 0, (arch, name, used)


def test_registers_move_in_accesses_of_sixteen_bytes_and_none_is_in_local_memory(cuobjdump):
    available = set(re.findall(r"sm_\d+", cuobjdump("--list-elf")))
    if not available:
        pytest.skip("the module holds PTX alone")
    arch = "sm_90" if "sm_90" in available else max(available)
    code = functions(cuobjdump("--dump-sass", "--gpu-architecture", arch), "Function")
    stages = {name: text for name, text in code.items() if "stage" in name}
    assert len(stages) == 32
    for name, text in stages.items():
        assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", text), name
        assert re.search(r"\bSTG\.E(\.\w+)*\.128\b", text), name
    scales = {name: text for name, text in code.items() if "thresholds" in name}
    assert len(scales) == 16
    for name, text in scales.items():
        assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", text), name
        assert re.search(r"\bATOMS\.POPC\.INC\b", text), name  # counts, in shared memory
        assert not re.search(r"(?<!BAR\.)\b(ATOM|ATOMG|RED)\.", text), name  # none in global memory
    for name, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), name
        assert not re.search(r"\bLD\.E\b|\bST\.E\b", text), name  # address spaces are known


def test_rows_are_resolved_before_the_wait_and_all_else_follows_it(cuobjdump):
    """A launch may begin before the kernel ahead of it has ended: until it waits it reads the
    doubles of its row, so no register in float32, and writes nothing."""
    available = set(re.findall(r"sm_\d+", cuobjdump("--list-elf")))
    if not available:
        pytest.skip("the module holds PTX alone")
    for arch in available:
        code = functions(cuobjdump("--dump-sass", "--gpu-architecture", arch), "Function")
        for name, text in code.items():
            waits = [m.start() for m in re.finditer(r"\bACQBULK\b", text)]
            if int(arch.removeprefix("sm_")) < 90 or "normals" in name:
                assert waits == [], (arch, name)
                continue
            assert len(waits) == 1, (arch, name)
            before, after = text[: waits[0]], text[waits[0] :]
            row = re.findall(r"\bLDG\.E(\S*)", before)
            assert len(row) >= 3, (arch, name)
            assert set(row) <= {".64"}, (arch, name, set(row))
            assert not re.search(r"\b(STG|RED|ATOM|ATOMG)\b", before), (arch, name)
            if "stage" in name and "Grown" not in name:  # no column is cast to an integer and back
                assert not re.search(r"\bF2I\.(\w+\.)*F64\b|\bI2F\.F64\b", before), (arch, name)
            assert re.search(r"\bSTG\b", after), (arch, name)


# -- on GPUs alone ---------------------------------------------------------------------------------


@gpu
@needs_module
@needs_cpu
def test_stages_run_on_the_current_stream():
    rng = np.random.default_rng(12)
    registers = random_registers(rng, (4, 1 << 16), torch.float32, NOISY.layout)
    out = random_output(rng, (4, 1 << 16), NOISY.layout, torch.float32)
    table, given = torch.tensor(NOISY.table), out.to(CUDA)
    streams = [torch.cuda.Stream(CUDA) for _ in range(2)]
    results = []
    for stream in streams:
        there = on(CUDA, registers)
        bound = backends.get("cuda").bind(there, table, NOISY.layout)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what escapes the stream runs before this is over
            late = given * 1.0
            for row in (0, 1):
                bound.run(row, late, None)
        results.append(there)
    torch.cuda.synchronize()
    reference = backends.get("cpu").bind(registers, table, NOISY.layout)
    for row in (0, 1):
        reference.run(row, out, None)
    for there in results:
        assert_same(there, registers)


@gpu
@needs_module
@needs_cpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_registers_on_another_device_than_the_current_one():
    rng = np.random.default_rng(13)
    other = torch.device("cuda", 1)
    registers = random_registers(rng, (2, 999), torch.float32, NOISY.layout)
    out, table = (
        random_output(rng, (2, 999), NOISY.layout, torch.float32),
        torch.tensor(NOISY.table),
    )
    there = on(other, registers)
    with torch.cuda.device(0):
        backends.get("cuda").bind(there, table, NOISY.layout).run(0, out.to(other), None)
        assert torch.cuda.current_device() == 0
    backends.get("cpu").bind(registers, table, NOISY.layout).run(0, out, None)
    assert_same(there, registers)
    with pytest.raises(ValueError, match="lies on cuda:1"):
        backends.get("cuda").bind(there, table, NOISY.layout).run(0, out.to(CUDA), None)


@gpu
@needs_module
@needs_cpu
@pytest.mark.parametrize("indexed", [False, True])
def test_replay_reads_the_new_table(indexed):
    rng = np.random.default_rng(14)
    registers = random_registers(rng, (3, 50), torch.float32, NOISY.layout, m=torch.bfloat16)
    out, table = random_output(rng, (3, 50), NOISY.layout, torch.float32), torch.tensor(NOISY.table)
    index = torch.tensor([1, 0, 1]) if indexed else None
    there, given = on(CUDA, registers), out.to(CUDA)
    at = torch.zeros(1, dtype=torch.int64, device=CUDA)
    bound = backends.get("cuda").bind(
        there, table, NOISY.layout, index.to(CUDA) if indexed else None, at
    )
    start = on(CUDA, registers)
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream(CUDA))
    with torch.cuda.stream(side):
        bound.run(0, given, None)
    torch.cuda.current_stream(CUDA).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.run(0, given, None)
    for change in range(3):
        table[:, NOISY.layout.columns.index("b_0")] = 0.1 * change
        bound.table.copy_(table)
        row = 0 if indexed else change % 2
        at.fill_(row)
        for a, b in zip(written(there), written(start), strict=True):
            a.copy_(b)
        expected = on(CPU, start)
        expected.seeds.copy_(registers.seeds)
        backends.get("cpu").bind(expected, table, NOISY.layout, index).run(row, out, None)
        graph.replay()
        assert_same(there, expected)
        for a in written(there):
            a.fill_(torch.nan)


@gpu
@needs_module
@needs_cpu
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("state", DTYPES[:2])
def test_a_replay_thresholds_by_the_new_table(state, indexed):
    rng = np.random.default_rng(24)
    layout = Layout(terms=1, branches=2)
    rows = [random_row(rng, layout, with_e=False, draws=k) for k in range(2)]
    for row in rows:
        row[0] = (int(row[0]) & ~CLIP) | EVALUATE | WRITES_X | THRESHOLD
    registers = random_registers(rng, (3, 20_003), state, layout, m=torch.bfloat16)
    outs = [random_output(rng, (3, 20_003), layout, torch.float16) for _ in range(3)]
    index = torch.tensor([1, 0, 1]) if indexed else None
    at = torch.zeros(1, dtype=torch.int64, device=CUDA)
    there, start, given = on(CUDA, registers), on(CUDA, registers), outs[0].to(CUDA)
    table = table_of(*rows)
    table[:, 6:8] = torch.tensor([0.9, 0.5])
    bound = backends.get("cuda").bind(
        there, table, layout, None if index is None else index.to(CUDA), at
    )
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream(CUDA))
    with torch.cuda.stream(side):
        bound.run(0, given, None)
    torch.cuda.current_stream(CUDA).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.run(0, given, None)
    for change, pair in enumerate([(0.3, 0.01), (0.995, 0.5), (1.0, 2.0)]):
        table[:, 6:8] = torch.tensor(pair)
        table[1, 0] = EVALUATE + WRITES_X + (THRESHOLD if change else 0)
        bound.table.copy_(table)
        given.copy_(outs[change])
        row = 0 if indexed else change % 2
        at.fill_(row)
        for a, b in zip(written(there), written(start), strict=True):
            a.copy_(b)
        expected = on(CPU, start)
        backends.get("cpu").bind(expected, table, layout, index).run(row, outs[change], None)
        graph.replay()
        bound.check()
        assert_same(there, expected, change)
        for a in written(there):
            a.fill_(torch.nan)


@gpu
@needs_module
def test_a_table_changed_during_a_capture_is_refused():
    table = torch.tensor(ONE_STAGE.table)
    registers = Registers(x=torch.ones(1, 8, device=CUDA))
    bound = backends.get("cuda").bind(registers, table, ONE_STAGE.layout)
    out = torch.ones(1, 8, device=CUDA)
    table.mul_(1.0)
    with (
        pytest.raises(RuntimeError, match="before a capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        bound.run(0, out, None)
    bound.run(0, out, None)
    torch.cuda.synchronize()


@gpu
@needs_module
@pytest.mark.slow
def test_more_elements_than_a_32_bit_index_counts():
    size = (1 << 31) + 5
    if torch.cuda.mem_get_info(CUDA)[0] < 3 * 2 * size + 4 * size:
        pytest.skip("needs about 20 GiB of device memory")
    x = torch.ones(1, size, device=CUDA)
    out = torch.ones(1, size, dtype=torch.bfloat16, device=CUDA)
    out[0, -3:] = 3.0
    bound = backends.get("cuda").bind(
        Registers(x=x), torch.tensor(ONE_STAGE.table), ONE_STAGE.layout
    )
    bound.run(0, out, None)
    bound.check()
    assert bool((x[0, :-3] == 2.5).all())
    assert x[0, -3:].tolist() == [6.5, 6.5, 6.5]
