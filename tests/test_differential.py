# SPDX-License-Identifier: Apache-2.0
"""Random plans on every backend, in a batcher and backwards, against an independent interpreter.

`--many N` takes N times as many plans, for a night.
"""

import itertools

import pytest
import torch
from support import plans
from support.core import BACKENDS, INSTRUCTION_SETS, needs_core
from support.differential import Case, check, check_gradient, running

import fastdiff as fd

ON = [
    pytest.param("torch", None, 150, id="torch"),
    *(pytest.param("cpu", name, 500, id=f"cpu-{name}") for name in INSTRUCTION_SETS),
    *(pytest.param(name, None, 5, id=name) for name in BACKENDS if name == "triton"),
]


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that the library allocates without writing it holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.mark.parametrize("chunk", range(4))
@pytest.mark.parametrize(("backend", "instruction_set", "count"), ON)
def test_random_plans_run_as_the_interpreter_says(
    backend, instruction_set, count, chunk, poisoned, many
):
    for i in range(count * many):
        seed = 1_000_000 * chunk + i
        with running(instruction_set, seed % 3 + 1 if instruction_set else 1):
            check(Case(seed), backend)


@needs_core
def test_random_plans_have_the_same_bits_on_every_instruction_set_and_thread(poisoned, many):
    for seed in range(100 * many):
        case, results = Case(seed), []
        for name, threads in itertools.product(INSTRUCTION_SETS, (1, 3)):
            with running(name, threads):
                got, given = case.run("cpu")
                results.append([got, *(x for x, _, _ in given)])
        for result in results[1:]:
            for a, b in zip(results[0], result, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), seed


# -- in a batcher ----------------------------------------------------------------------------------


def smooth(x, t, y=None):
    ones = [1] * (x.ndim - 1)
    out = torch.tanh(x) * (1 + 0.1 * t.reshape(-1, *ones).clamp(-1, 1).to(x.dtype))
    return out if y is None else out + 0.5 * y.reshape(-1, *ones).to(x.dtype)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_core)])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_batcher_gives_random_plans_the_samplers_bits(backend, scale, poisoned, many):
    guidance = None if scale is None else fd.CFG(scale, {"y": 0.25})
    for group in range(12 * many):
        chosen = [plans.random_plan(7 * group + k, extras=0, prediction="v") for k in range(3)]
        example = {"y": torch.zeros(2)}
        batcher = fd.Batcher(
            smooth, chosen, (2, 6), cond=example, guidance=guidance, backend=backend
        )
        generator = torch.Generator().manual_seed(group)
        waiting, running_, done = [], {}, {}
        for i in range(6):
            x, y = (torch.randn(s, generator=generator) for s in ((6,), (1,)))
            waiting.append((i, x, i % 3, 100 * group + i, y))
        requests = list(waiting)
        while waiting or running_:
            while waiting and batcher.free:
                i, x, k, seed, y = waiting.pop(0)
                running_[batcher.add(x, k, seed=seed, cond={"y": y})] = i
            for place, sample in batcher.step().items():
                done[running_.pop(place)] = sample
        for i, x, k, seed, y in requests:
            wanted = fd.sample(
                *(smooth, x[None], chosen[k]),
                cond={"y": y},
                seed=[seed],
                guidance=guidance,
                backend=backend,
                graph=None,
            )
            same = torch.equal(done[i].nan_to_num(7.0), wanted[0].nan_to_num(7.0))
            assert same, (group, i, chosen[k].solver)


# -- backwards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_core), "torch"])
@pytest.mark.parametrize("kind", ["discrete", "checkpoint"])
def test_gradients_of_random_plans_are_the_interpreters(kind, backend, poisoned, many):
    for seed in range((200 if backend == "cpu" else 50) * many):
        check_gradient(seed, kind, backend)
