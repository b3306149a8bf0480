# SPDX-License-Identifier: Apache-2.0
"""Packed rows say what the stages say: both are run, by interpreters that share nothing."""

import numpy as np
import pytest
import torch
from support import interpreter, packed, plans

N = 3  # elements of a sample
NAMES = ("b_raw", "d_new", "products", "u")


def run_both(plan, rng):
    """The result of the stages, and that of the packed rows, with one linear network a stage."""
    networks = rng.normal(size=(len(plan.stages), N, N))
    noise = rng.normal(size=(len(plan.stages), N))
    bank, x = rng.normal(size=(plan.extras, N)), rng.normal(size=N)
    calls = iter([i for i, stage in enumerate(plan.stages) if stage.evaluate])

    def network(m, t):
        return m @ torch.from_numpy(networks[next(calls)].T)

    def batch(values):
        return [torch.from_numpy(value[None]) for value in values]

    (start,) = batch([x])
    wanted = interpreter.interpret(plan, network, start, xi=batch(noise), extras=batch(bank))
    registers = packed.Registers.holding(x, plan.slots, bank)
    registers.m = plan.stages[0].c_in * x
    for i, row in enumerate(plan.rows()):
        outs = [networks[i] @ registers.m] if plan.stages[i].evaluate else ()
        packed.run_row(row, registers, outs, noise[i])
    return wanted.x.value[0].numpy(), registers.x


@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_do_what_the_stages_say(seed, request):
    rng = np.random.default_rng(seed)
    met = set()
    for case in range(100 * request.config.getoption("--many")):
        plan = plans.random_plan(1000 * seed + case)
        if any(stage.threshold is not None for stage in plan.stages):
            continue  # a quantile is no matter of packing
        wanted, got = run_both(plan, rng)
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10, err_msg=plan.solver)
        met |= {name for stage in plan.stages for name in NAMES if getattr(stage, name)}
    assert met == set(NAMES)
