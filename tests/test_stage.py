# SPDX-License-Identifier: Apache-2.0
"""The one instruction: every backend against the row's formula, and the promises around it."""

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.core import needs_core
from support.rows import (
    DTYPES,
    SLOTS,
    copied,
    entries,
    random_output,
    random_registers,
    random_row,
    raw,
    same,
    table_of,
    written,
)

from fastdiff import backends, noise
from fastdiff.backends import Registers
from fastdiff.plans import (
    AT_E,
    CLIP,
    EVALUATE,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    Plan,
    Stage,
)

BACKENDS = [
    pytest.param(name, marks=needs_core if name == "cpu" else ()) for name in ("torch", "cpu")
]
SIZES = [0, 1, 3, 15, 16, 63, 65, 1023, 1024, 1025, 5000]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- one stage ---------------------------------------------------------------------------------


def run_once(
    name: str,
    registers: Registers,
    row: np.ndarray,
    layout: Layout,
    out: torch.Tensor | None,
    xi: torch.Tensor | None = None,
) -> Registers:
    """A copy of the registers after one stage."""
    after = copied(registers)
    backends.get(name).bind(after, table_of(row), layout).run(0, out, xi)
    return after


# -- the formula -------------------------------------------------------------------------------


class Sum:
    """A linear combination in extended precision beside the sum of its terms' magnitudes."""

    def __init__(self, terms: list[tuple[float, "Sum | torch.Tensor | None"]]) -> None:
        self.value = self.size = np.longdouble(0)
        self.roundings = 0
        for weight, term in terms:
            if weight == 0.0:
                continue
            inner = term if isinstance(term, Sum) else None
            value = inner.value if inner else term.double().numpy().astype(np.longdouble)
            self.value = self.value + np.longdouble(weight) * value
            self.size = self.size + abs(weight) * (inner.size if inner else np.abs(value))
            # a product, a sum and the weight itself
            self.roundings = max(self.roundings, inner.roundings if inner else 0) + 3

    def close(self, got: torch.Tensor, state: torch.dtype) -> bool:
        """Within eps * sum |c_k x_k| for each rounding, and one rounding to the dtype of `got`."""
        unit = torch.finfo(state).eps / 2
        bound = self.roundings * unit * self.size
        if got.dtype != state:
            info = torch.finfo(got.dtype)
            bound = bound + info.eps / 2 * (np.abs(self.value) + bound) + info.tiny * info.eps
        return bool(np.all(np.abs(got.double().numpy() - self.value) <= bound))


def formula(registers: Registers, row: np.ndarray, layout: Layout, out, xi) -> SimpleNamespace:
    """x', e', the push and m' of a row; None where it does not write them."""
    v = dict(zip(layout.columns, row, strict=True))
    flags, shape = int(v["flags"]), registers.x.shape
    x, e, history = registers.x, registers.e, registers.history
    point = e if flags & AT_E else x
    h = None
    if flags & EVALUATE:
        branches = out.reshape(layout.branches, *shape)
        h = Sum([*((v[f"k_{g}"], branches[g]) for g in range(layout.branches)), (v["p"], point)])
        if flags & CLIP:
            h.value = np.clip(h.value, v["lo"], v["hi"])
    if xi is None and v["draws"]:
        ks = range(1, int(v["draws"]) + 1)
        draw = [noise.normal(shape, registers.seeds, int(v[f"stream_{k}"])) for k in ks]
        xi = Sum([(v[f"xi_{k}"], z) for k, z in zip(ks, draw, strict=True)])
    terms = range(int(v["n_terms"]))

    def total(names: tuple[str, ...], past: str, extra: str) -> Sum:
        weights = [v[name] for name in names]
        slots = [(v[f"{past}_{k}"], history[int(v[f"slot_{k}"])]) for k in terms]
        extras = [(v[f"{extra}_{i}"], r) for i, r in enumerate(entries(registers))]
        head = list(zip(weights[:3], (x, e, h), strict=True))
        return Sum([*head, *slots, (weights[3], xi), *extras])

    x_next = e_next = m = None
    if flags & WRITES_X:
        x_next = total(("a_x", "a_e", "b_0", "c"), "past_b", "r")
    if flags & WRITES_E:
        e_next = total(("d_x", "d_e", "g_0", "c_e"), "past_g", "s")
    if registers.m is not None and flags & WRITES_M:
        m = Sum([(v["c_in_next"], e_next or x_next or x)])
    pushes = {int(v["push"]): h, int(v["push_x"]): Sum([(1.0, x)]) if v["push_x"] >= 0 else None}
    return SimpleNamespace(x=x_next, e=e_next, pushes=pushes, m=m, v=v)


def poison_unread(registers: Registers, row: np.ndarray, layout: Layout, out) -> None:
    """NaN in every register, slot and branch whose coefficients are all 0."""
    v = dict(zip(layout.columns, row, strict=True))
    flags = int(v["flags"])
    by_x, by_e = bool(flags & WRITES_X), bool(flags & WRITES_E)
    point = bool(flags & EVALUATE) and v["p"] != 0
    m_from_x = flags & WRITES_M and v["c_in_next"] != 0 and not (by_x or by_e)
    at_x, at_e = point and not flags & AT_E, point and flags & AT_E

    def read(in_x: str, in_e: str) -> bool:
        return bool((by_x and v[in_x]) or (by_e and v[in_e]))

    if not (read("a_x", "d_x") or at_x or m_from_x or v["push_x"] >= 0):
        registers.x.fill_(torch.nan)
    if registers.e is not None and not (read("a_e", "d_e") or at_e):
        registers.e.fill_(torch.nan)
    terms = [k for k in range(int(v["n_terms"])) if read(f"past_b_{k}", f"past_g_{k}")]
    for slot in set(range(SLOTS)) - {int(v[f"slot_{k}"]) for k in terms}:
        registers.history[slot].fill_(torch.nan)
    for i, extra in enumerate(entries(registers)):
        if not read(f"r_{i}", f"s_{i}"):
            extra.fill_(torch.nan)
    for g in range(layout.branches):
        if v[f"k_{g}"] == 0:
            out.reshape(layout.branches, *registers.x.shape)[g] = torch.nan


# -- against the formula -----------------------------------------------------------------------

COMBINATIONS = list(itertools.product((torch.float32, torch.float64), DTYPES, (None, *DTYPES)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("state", "out_dtype", "m_dtype"), COMBINATIONS, ids=lambda d: str(d).removeprefix("torch.")
)
def test_a_stage_is_its_rows_formula(name, state, out_dtype, m_dtype):
    rng = np.random.default_rng(COMBINATIONS.index((state, out_dtype, m_dtype)))
    for case in range(33):
        size, batch = SIZES[case % len(SIZES)], case % 3 + 1
        layout = Layout(terms=case % 6, branches=case % 2 + 1, extras=case % 4 // 2 * 2)
        with_e, draws = case % 5 < 2, case % 7 % 3
        row = random_row(rng, layout, with_e, draws)
        registers = random_registers(rng, (batch, size), state, layout, with_e, m_dtype)
        out = random_output(rng, (batch, size), layout, out_dtype)
        xi = registers.x.new_tensor(rng.normal(size=(batch, size))) if case % 4 == 3 else None
        if layout.extras == 2:
            row[layout.extra_offset : layout.extra_offset + 3] = 0.0
        poison_unread(registers, row, layout, out)

        wanted = formula(registers, row, layout, out, xi)
        got = run_once(name, registers, row, layout, out, xi)

        context = (case, wanted.v)
        for before, after, update in (
            (registers.x, got.x, wanted.x),
            (registers.e, got.e, wanted.e),
            (registers.m, got.m, wanted.m),
        ):
            if update is None:
                assert after is None or same(before, after), context
            else:
                for copy in after.split(batch):
                    assert update.close(copy, state), context
        for slot in range(SLOTS):
            if wanted.pushes.get(slot) is not None:
                assert wanted.pushes[slot].close(got.history[slot], state), context
            else:
                assert same(registers.history[slot], got.history[slot]), context


@pytest.mark.parametrize("name", BACKENDS)
def test_packed_plans_run_as_their_stages_say(name):
    stages = (
        Stage(t=1.0, p=0.2, q=0.9, a_x=0.9, b=(0.3,)),
        Stage(t=0.8, a_x=1.0, d_x=0.8, g=(0.5, 0.1)),
        Stage(t=0.6, c_in=0.5, a_x=0.7, a_e=0.2, b=(0.4, -0.3, 0.1), c=0.2, noise=((3, 1.0),)),
        Stage(t=0.4, evaluate=False, a_x=0.5, c=0.5, noise=((4, 0.6), (5, 0.8))),
    )
    plan = Plan(stages=stages, times=(1.0, 0.0))
    layout = dataclasses.replace(plan.layout, branches=2)
    rng = np.random.default_rng(0)
    registers = random_registers(rng, (2, 40), torch.float64, layout, with_e=True)
    registers.history.fill_(torch.nan)
    table = torch.from_numpy(plan.pack((2.0, -1.0)))
    bound = backends.get(name).bind(registers, table, layout)

    x, e, past = registers.x.clone(), None, []
    for n, s in enumerate(stages):
        out = random_output(rng, (2, 40), layout, torch.float32)
        bound.run(n, out if s.evaluate else None, None)
        point = x if e is None else e
        h = [s.p * point + s.q * (2.0 * out[:2].double() - out[2:].double())] if s.evaluate else [x]
        z = [noise.normal((2, 40), registers.seeds, k, dtype=torch.float64) for k, _ in s.noise]
        xi = sum(w * draw for (_, w), draw in zip(s.noise, z, strict=True))
        terms = [*h, *past]
        moved = s.d_x * x + sum(w * k for w, k in zip(s.g, terms, strict=False))
        x = s.a_x * x + (s.a_e * e if s.a_e else 0) + s.c * xi
        x = x + sum(w * k for w, k in zip(s.b, terms, strict=False))
        e = moved if s.writes_e else None
        past = [*h, *past] if s.evaluate else past
        assert torch.allclose(registers.x, x, rtol=0, atol=1e-14)
        if e is not None:
            assert torch.allclose(registers.e, e, rtol=0, atol=1e-14)


# -- bits --------------------------------------------------------------------------------------


def contract(registers: Registers, row: np.ndarray, layout: Layout, out: torch.Tensor) -> list:
    """x', e', h of a float32 row by fused multiply-adds in table order, each sum from 0."""
    v = {k: np.float32(c) for k, c in zip(layout.columns, row, strict=True)}
    flags = int(v["flags"])
    x, e = registers.x.numpy(), registers.e.numpy()

    def chain(terms):
        total = np.zeros_like(x)
        for weight, value in terms:
            if weight != 0:
                total = noise._fma(value, weight, total)
        return total

    branches = out.float().numpy().reshape(layout.branches, *x.shape)
    h = chain([(v[f"k_{g}"], branches[g]) for g in range(layout.branches)])
    if v["p"] != 0:
        h = noise._fma(e if flags & AT_E else x, v["p"], h)
    if flags & CLIP:
        h = np.clip(h, v["lo"], v["hi"])
    draw = [
        (v[f"xi_{k}"], noise.normal(x.shape, registers.seeds, int(v[f"stream_{k}"])).numpy())
        for k in range(1, int(v["draws"]) + 1)
    ]
    xi = chain(draw)
    terms = range(int(v["n_terms"]))
    past = [registers.history[int(v[f"slot_{k}"])].numpy() for k in terms]
    extras = [r.numpy() for r in entries(registers)]
    sums = []
    for head, b, r in ((("a_x", "a_e", "b_0", "c"), "past_b", "r"),
                       (("d_x", "d_e", "g_0", "c_e"), "past_g", "s")):  # fmt: skip
        a_x, a_e, b_0, c = (v[name] for name in head)
        slots = [(v[f"{b}_{k}"], past[k]) for k in terms]
        inputs = [(v[f"{r}_{i}"], extra) for i, extra in enumerate(extras)]
        sums.append(chain([(a_x, x), (a_e, e), (b_0, h), *slots, (c, xi), *inputs]))
    return [*sums, h]


@needs_core
def test_the_core_rounds_once_a_term_in_table_order(instruction_set):
    rng = np.random.default_rng(1)
    for case in range(40):
        layout = Layout(terms=case % 6, branches=case % 2 + 1, extras=case % 3)
        shape = (2, [5, 64, 131, 1029][case % 4])
        row = random_row(rng, layout, with_e=True, draws=case % 3)
        row[0] = int(row[0]) | EVALUATE | WRITES_X | WRITES_E
        row[1], row[layout.columns.index("push_x")] = 0, 1
        registers = random_registers(rng, shape, torch.float32, layout, with_e=True)
        out = random_output(rng, shape, layout, DTYPES[case % 4])
        got = run_once("cpu", registers, row, layout, out)
        wanted = contract(registers, row, layout, out)
        for tensor, array in zip((got.x, got.e, got.history[0]), wanted, strict=True):
            assert raw(tensor) == array.tobytes(), case
        assert same(got.history[1], registers.x)


@needs_core
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_packs_vectors_and_single_elements_give_the_same_bits(instruction_set, state):
    # [1, N] runs in packs of vectors; samples of 1 and 17 elements with a gap between them run
    # one by one, in single elements and single vectors
    rng = np.random.default_rng(2)
    for case, dtype in enumerate(DTYPES * 3):
        layout = Layout(terms=case % 4, branches=1, extras=case % 2)
        row = random_row(rng, layout, with_e=True, draws=0)
        registers = random_registers(rng, (1, 1700), state, layout, with_e=True, m=dtype)
        out = random_output(rng, (1, 1700), layout, dtype)
        whole = run_once("cpu", registers, row, layout, out)
        for size in (1, 17):
            shape = (1700 // size, size)
            split = dataclasses.replace(
                registers,
                x=registers.x.view(shape),
                e=registers.e.view(shape),
                history=registers.history.view(SLOTS, *shape),
                m=registers.m.view(shape),
                bank=None if registers.bank is None else registers.bank.view(-1, *shape),
                seeds=None,
            )
            gapped = torch.full((shape[0], size + 3), torch.nan, dtype=dtype)
            gapped[:, :size] = out.view(shape)
            apart = run_once("cpu", split, row, layout, gapped[:, :size])
            for a, b in zip(written(whole), written(apart), strict=True):
                assert raw(a) == raw(b), case


@needs_core
def test_sixteen_bit_outputs_widen_exactly(instruction_set):
    layout = Layout(terms=0)
    row = Plan(stages=(Stage(t=1.0, a_x=0.0, b=(1.0,)),), times=(1.0, 0.0)).table[0]
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype, state in itertools.product(DTYPES[2:], DTYPES[:2]):
        for count in (2**16, 2**16 - 1):  # the last elements run one by one
            out = patterns[:count].view(dtype).view(1, -1)
            registers = Registers(x=torch.full((1, count), torch.nan, dtype=state))
            backends.get("cpu").bind(registers, torch.tensor(row[None]), layout).run(0, out, None)
            assert torch.equal(registers.x.nan_to_num(1e9), out.to(state).nan_to_num(1e9) + 0.0)


@needs_core
def test_the_next_input_is_rounded_to_nearest_even(instruction_set):
    layout = Layout(terms=0)
    stages = (Stage(t=1.0, evaluate=False, a_x=1.0), Stage(t=0.5))
    table = torch.tensor(Plan(stages=stages, times=(1.0, 0.0)).table)
    rng = np.random.default_rng(3)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    ties = [halves.view(d).float() for d in DTYPES[2:]]
    ties = [(a[:-1] + a[1:]) / 2 for a in ties]
    values = [torch.from_numpy(rng.integers(-(2**31), 2**31, 40_003).astype(np.int32))]
    values = torch.cat([values[0].view(torch.float32), *ties, torch.tensor([65519.0, 65520.0])])
    for state, dtype in itertools.product(DTYPES[:2], DTYPES):
        x = values.to(state).view(1, -1)
        m = torch.zeros(3 * x.shape[0], x.shape[1], dtype=dtype)
        backends.get("cpu").bind(Registers(x=x, m=m), table, layout).run(0, None, None)
        wanted = x.to(dtype)
        number = ~wanted.isnan()[0]
        for copy in m:
            assert bool(copy[~number].isnan().all())
            assert same(copy[number], wanted[0][number])


@needs_core
@pytest.mark.parametrize("shape", [(1, 200_001), (3, 70_000), (20_001, 7)])
def test_threads_do_not_change_a_bit(threads, shape):
    rng = np.random.default_rng(4)
    layout = Layout(terms=2, branches=2, extras=1)
    row = random_row(rng, layout, with_e=True, draws=2)
    row[0] = int(row[0]) | EVALUATE | WRITES_X | WRITES_E
    registers = random_registers(rng, shape, torch.float32, layout, True, torch.bfloat16)
    wide = random_output(rng, (shape[0], shape[1] + 1), layout, torch.float16)
    for out in (wide[:, 1:], wide[:, 1:].contiguous()):
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(written(run_once("cpu", registers, row, layout, out)))
        for result in results[1:]:
            assert all(same(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [1, 6, 16, 300, 2000])
def test_a_sample_does_not_depend_on_its_batch(name, size):
    rng = np.random.default_rng(5)
    layout = Layout(terms=2, branches=2, extras=1)
    row = random_row(rng, layout, with_e=True, draws=2)
    row[0] = int(row[0]) | EVALUATE | WRITES_X | WRITES_E
    registers = random_registers(rng, (5, size), torch.float32, layout, True, torch.float16)
    out = random_output(rng, (5, size), layout, torch.float32)
    together = run_once(name, registers, row, layout, out)
    for b in range(5):
        alone = Registers(
            x=registers.x[b : b + 1],
            e=registers.e[b : b + 1],
            history=registers.history[:, b : b + 1].contiguous(),
            m=registers.m[b::5].contiguous(),
            bank=registers.bank[:, b : b + 1].contiguous(),
            seeds=registers.seeds[b : b + 1],
        )
        alone = run_once(name, alone, row, layout, out[b::5].contiguous())
        assert same(alone.x[0], together.x[b])
        assert same(alone.e[0], together.e[b])
        assert same(alone.history[:, 0], together.history[:, b])
        assert same(alone.m, together.m[b::5])


# -- promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_each_sample_may_stand_at_its_own_row(name):
    rng = np.random.default_rng(6)
    layout = Layout(terms=3, branches=2, extras=1)
    rows = [random_row(rng, layout, with_e=True, draws=k % 3) for k in range(6)]
    for row in rows:
        row[0] = int(row[0]) | EVALUATE
    registers = random_registers(rng, (5, 70), torch.float32, layout, True, torch.bfloat16)
    out = random_output(rng, (5, 70), layout, torch.bfloat16)
    index = torch.tensor([2, 0, 0, 4, 1])
    after = copied(registers)
    backends.get(name).bind(after, table_of(*rows), layout, index).run(1, out, None)
    for b in range(5):
        wanted = run_once(name, registers, rows[1 + int(index[b])], layout, out)
        assert same(after.x[b], wanted.x[b])
        assert same(after.e[b], wanted.e[b])
        assert same(after.history[:, b], wanted.history[:, b])
        assert same(after.m[b::5], wanted.m[b::5])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("view", ["batch stride", "transposed", "expanded", "channels last"])
def test_strides_of_the_output_do_not_matter(name, view):
    rng = np.random.default_rng(7)
    layout = Layout(terms=1, branches=2)
    row = random_row(rng, layout, with_e=False, draws=1)
    row[0] = int(row[0]) | EVALUATE | WRITES_X
    registers = random_registers(rng, (3, 4, 5, 6), torch.float32, layout)
    base = torch.from_numpy(rng.normal(size=(6, 8, 5, 6))).float()
    out = {
        "batch stride": base[:, :4],
        "transposed": base[:, :4].transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": base[:1, :4].expand(6, 4, 5, 6),
        "channels last": base[:, :4].to(memory_format=torch.channels_last),
    }[view]
    wanted = run_once(name, registers, row, layout, out.contiguous())
    got = run_once(name, registers, row, layout, out)
    assert all(same(a, b) for a, b in zip(written(wanted), written(got), strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_noise_given_is_used_like_noise_drawn(name, state):
    rng = np.random.default_rng(8)
    stage = Stage(t=1.0, a_x=0.5, c=0.3, noise=((7, 1.0),), b=(0.1,))
    plan = Plan(stages=(stage,), times=(1.0, 0.0))
    registers = random_registers(rng, (2, 33), state, plan.layout)
    out = random_output(rng, (2, 33), plan.layout, torch.float32)
    drawn = run_once(name, registers, plan.table[0], plan.layout, out)
    xi = noise.normal((2, 33), registers.seeds, 7, dtype=state)
    unseeded = dataclasses.replace(registers, seeds=None)
    given = run_once(name, unseeded, plan.table[0], plan.layout, out, xi)
    assert same(drawn.x, given.x)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_table_is_read_at_every_call(name):
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(2.0,)),), times=(1.0, 0.0))
    table = torch.tensor(plan.table)
    registers = Registers(x=torch.ones(1, 8))
    bound = backends.get(name).bind(registers, table, plan.layout)
    bound.run(0, torch.ones(1, 8), None)
    assert torch.equal(registers.x, torch.full((1, 8), 2.5))
    table[0, plan.layout.columns.index("b_0")] = 0.0
    bound.run(0, torch.full((1, 8), torch.nan), None)
    assert torch.equal(registers.x, torch.full((1, 8), 1.25))


@needs_core
def test_registers_live_as_long_as_the_bound_stage():
    plan = Plan(stages=(Stage(t=1.0, a_x=0.5, b=(1.0,)),), times=(1.0, 0.0))

    def bound() -> tuple[Callable, int]:
        registers = Registers(x=torch.ones(1, 1 << 16))
        stage = backends.get("cpu").bind(registers, torch.tensor(plan.table), plan.layout)
        return stage.run, registers.x.data_ptr()

    run, address = bound()
    others = [torch.zeros(1, 1 << 16) for _ in range(8)]
    assert address not in {t.data_ptr() for t in others}
    run(0, torch.ones(1, 1 << 16), None)
    assert all(not t.any() for t in others)
