# SPDX-License-Identifier: Apache-2.0
"""What a bound stage promises beside its arithmetic: memory, lazy views, forks, parts, choosing."""

import multiprocessing

import numpy as np
import pytest
import torch
from support.core import native, needs_core
from support.rows import raw

from fastdiff import _core, backends, noise
from fastdiff.backends import Registers
from fastdiff.plans import EVALUATE, WRITES_M, WRITES_X, Layout, layout
from fastdiff.plans.layout import PackedRow, encode, layout_of

NAMES = [pytest.param(name, marks=needs_core if name == "cpu" else ()) for name in ("torch", "cpu")]
CPU = torch.device("cpu")
MIXED = PackedRow(flags=EVALUATE | WRITES_X, a_x=0.5, b_0=1.0, k=(2.0,))  # x' = x / 2 + 2 out


def bound(name: str, registers: Registers, row: PackedRow, **options):
    columns = layout_of([row])
    table = torch.from_numpy(encode([row], columns))
    return backends.get(name).bind(registers, table, columns, **options)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", ["first", "flipped", "itself", "late"])
def test_an_output_on_the_registers_is_read_before_they_are_written(name, view):
    store = torch.randn(4, 3000)
    x = store[:3]
    out = {
        "first": lambda x: x[:1].expand_as(x),
        "flipped": lambda x: x.flatten().flip(0).view_as(x),
        "itself": lambda x: x,
        "late": lambda x: store[1:],
    }[view](x)
    wanted = 0.5 * x + 2.0 * out
    bound(name, Registers(x=x), MIXED).run(0, out, None)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_noise_given_on_the_registers_is_read_before_they_are_written(name):
    row = PackedRow(flags=WRITES_X, a_x=0.5, c=2.0)
    for begin in (0, 1):
        store = torch.randn(4, 3000)
        x, xi = store[:3], store[begin : begin + 3]
        wanted = 0.5 * x + 2.0 * xi
        bound(name, Registers(x=x), row).run(0, None, xi)
        assert torch.equal(x, wanted)


@needs_core
def test_registers_that_overlap_are_refused_on_cpu():
    store = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"got x and bank. Clone one of them"):
        bound("cpu", Registers(x=store[:2], bank=store[None, 1:3]), MIXED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_lazily_negated_outputs_and_noise_keep_their_signs(name, shape):
    values = torch.randn(shape, dtype=torch.complex64)
    out = values.conj().imag
    assert out.is_neg()
    registers = Registers(x=torch.zeros(shape))
    bound(name, registers, MIXED).run(0, out, None)
    assert torch.equal(registers.x, -2.0 * values.imag)
    row = PackedRow(flags=WRITES_X, c=1.0)
    bound(name, registers, row).run(0, None, out)
    assert torch.equal(registers.x, -values.imag)


@needs_core
def test_a_lazily_negated_register_is_refused():
    x = torch.randn(1, 1, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match=r"Pass x\.resolve_neg\(\)"):
        bound("cpu", Registers(x=x), MIXED)


@pytest.mark.parametrize("name", NAMES)
def test_a_next_input_of_weight_0_is_written_as_zeros(name):
    registers = Registers(x=torch.ones(2, 9), m=torch.full((4, 9), torch.nan))
    bound(name, registers, PackedRow(flags=WRITES_M | WRITES_X, a_x=1.0)).run(0, None, None)
    assert torch.equal(registers.m, torch.zeros(4, 9))
    registers.m.fill_(7.0)
    bound(name, registers, PackedRow(flags=WRITES_X, a_x=1.0, c_in_next=1.0)).run(0, None, None)
    assert torch.equal(registers.m, torch.full((4, 9), 7.0))


# -- processes -------------------------------------------------------------------------------------


def run_and_tell(registers: Registers, out: torch.Tensor, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(2)
    bound("cpu", registers, MIXED).run(0, out, None)
    queue.put([raw(registers.x), raw(noise.normal((2, 70_000), 3))])


@needs_core
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_runs_although_threads_do_not_live_on_in_it():
    context, before = multiprocessing.get_context("fork"), torch.get_num_threads()
    queue, results = context.Queue(), []
    # tensors are made here: PyTorch's own loops hang in the fork
    out, made = torch.ones(2, 70_000), [Registers(x=torch.ones(2, 70_000)) for _ in range(2)]
    try:
        run_and_tell(made[0], out, queue)  # starts the threads
        results.append(queue.get(timeout=60))
        child = context.Process(target=run_and_tell, args=(made[1], out, queue))
        child.start()
        try:
            results.append(queue.get(timeout=60))
        finally:
            child.kill()
            child.join()
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


# -- parts of samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_core), False])
def test_the_noise_of_a_part_is_that_of_the_whole(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(_core, "native", None)
    whole = noise.normal((3, 700), [5, -1, 9], 2)
    for begin, size in ((0, 700), (4, 3), (8, 64), (300, 400), (696, 4)):
        part = noise.normal((3, size), [5, -1, 9], 2, offset=begin)
        assert raw(part) == raw(whole[:, begin : begin + size])
    far = noise.normal((1, 8), 5, offset=2**40)
    assert raw(far[:, 4:]) == raw(noise.normal((1, 4), 5, offset=2**40 + 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [20, 3000])
def test_a_bound_stage_draws_for_its_part(name, size):
    row = PackedRow(flags=WRITES_X, c=1.0, draws=((4, 1.0),))
    seeds = torch.tensor([3, 8])
    wanted = noise.normal((2, size + 8), seeds, 4)[:, 8:]
    for index in (None, torch.zeros(2, dtype=torch.int64)):
        registers = Registers(x=torch.zeros(2, size), seeds=seeds)
        bound(name, registers, row, stage_index=index, offset=8).run(0, None, None)
        assert torch.equal(registers.x, wanted)


@pytest.mark.parametrize("offset", [-4, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_offset_is_a_multiple_of_4(name, offset):
    with pytest.raises(ValueError, match=f"multiple of 4, >= 0; got {offset}"):
        bound(name, Registers(x=torch.zeros(1, 4)), MIXED, offset=offset)
    with pytest.raises(ValueError, match=f"multiple of 4, >= 0; got {offset}"):
        noise.normal((1, 4), 0, offset=offset)


# -- the protocol ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_refresh_puts_other_rows_in_the_tables_place(name):
    registers = Registers(x=torch.ones(1, 4))
    stage = bound(name, registers, MIXED)
    other = PackedRow(flags=EVALUATE | WRITES_X, b_0=3.0, k=(1.0,))
    stage.refresh(torch.from_numpy(encode([other], layout_of([other]))))
    stage.run(0, torch.ones(1, 4), None)
    stage.check()
    assert torch.equal(registers.x, torch.full((1, 4), 3.0))


@needs_core
@pytest.mark.parametrize(
    "beyond", [{"terms": 65}, {"branches": 17}, {"extras": 17}, {"measures": 17}]
)
def test_a_layout_beyond_the_core_is_served_by_torch(beyond):
    columns = Layout(**beyond)
    kinds = (torch.float32, torch.float32, CPU)
    assert backends.choose(None, *kinds).name == "cpu"
    assert backends.choose(None, *kinds, columns).name == "torch"
    with pytest.raises(NotImplementedError, match=r"up to .* Use one of: torch"):
        backends.choose("cpu", *kinds, columns)


# -- the core and this code ------------------------------------------------------------------------


@needs_core
def test_the_core_has_the_columns_and_codes_of_plans_layout():
    for group in ("HEAD", "TERM", "BRANCH", "EXTRA", "PRODUCT", "MEASURE"):
        assert native.columns[group] == tuple(getattr(layout, group))
    assert native.columns["INTO"] == layout.INTO
    assert native.columns["OF"] == layout.OF
    assert native.columns["REDUCTIONS"] == layout.REDUCTIONS
    flags = ("EVALUATE", "AT_E", "WRITES_E", "WRITES_X", "CLIP", "THRESHOLD", "WRITES_M")
    assert native.flags == {name: getattr(layout, name) for name in (*flags, "ALL_FLAGS")}


@needs_core
@pytest.mark.parametrize("name", ["HEAD", "MEASURE", "OF", "CLIP", "MAX_PRODUCTS"])
def test_a_core_with_other_columns_is_named(monkeypatch, name):
    assert _core.unfit(native) is None
    monkeypatch.setattr(layout, name, ("other",) if name.isupper() and name != "CLIP" else 99)
    assert name in _core.unfit(native)


@needs_core
def test_a_core_with_another_abi_is_named(monkeypatch):
    monkeypatch.setattr(_core, "ABI", 99)
    assert _core.unfit(native) == f"ABI {native.abi}, 99 is needed"
    assert np.isfinite(native.abi)
