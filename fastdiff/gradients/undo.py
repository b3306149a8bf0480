# SPDX-License-Identifier: Apache-2.0
"""A run undone stage by stage beside its backward pass: no state is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.run import Run
from ..plans import AT_E, EVALUATE, WRITES_E, WRITES_X, Layout, PackedRow
from .pools import Table
from .sweep import Sweep
from .trace import Input, Trace


def undone(sweep: Sweep, kept: Sequence[torch.Tensor]) -> None:
    """The backward pass of a plan that alternates between x and e.

    Args:
        sweep: The pass.
        kept: x and e at the end of the run.
    """
    trace = sweep.trace
    x, e = kept
    table = trace.recent.get(
        trace.plan, ("undone", trace.job.guidance.branches), lambda: _table_of(trace)
    )
    spec = table.spec(x, trace.job.backend)
    with trace.runs.backward_run(table, spec) as run:
        assert run.registers.e is not None
        run.registers.x.copy_(x)
        run.registers.e.copy_(e)
        states = _Undone(sweep, run)
        sweep.run(trace.plan.transpose(), trace.times, states.at, states.observe)


def _table_of(trace: Trace) -> Table:
    """Rows that take each stage back: x or e as it was before."""
    branches, rows = trace.job.guidance.branches, []
    for i, (stage, at_e) in enumerate(zip(trace.plan.stages, trace.plan.at_e, strict=True)):
        row = PackedRow(p=stage.p, k=(stage.q,) * branches)
        if at_e:  # it moved x
            row.flags = EVALUATE + AT_E + WRITES_X
            row.a_x, row.a_e = 1.0 / stage.a_x, -stage.a_e / stage.a_x
            row.b_0 = -sum(stage.b) / stage.a_x
        elif i > 0:
            row.flags = EVALUATE + WRITES_E
            row.d_e, row.d_x = 1.0 / stage.d_e, -stage.d_x / stage.d_e
            row.g_0 = -sum(stage.g) / stage.d_e
        rows.append(row)
    return Table(tuple(rows), Layout(0, branches), 0)


class _Undone:
    """States of a run that is undone, by rows of the same instruction."""

    def __init__(self, sweep: Sweep, run: Run) -> None:
        self._sweep, self._run = sweep, run
        trace = sweep.trace
        self._points = trace.plan.at_e
        self._dtype = trace.job.input_dtype(trace.call.x)

    def at(self, i: int) -> Input:
        """What the network was given at stage i."""
        registers, trace = self._run.registers, self._sweep.trace
        point = registers.e if self._points[i] else registers.x
        assert point is not None
        given = (point * trace.plan.stages[i].c_in).to(self._dtype)
        branches = trace.job.guidance.branches
        return Input(given if branches == 1 else torch.cat([given] * branches))

    def observe(self, i: int, out: torch.Tensor) -> None:
        """Undoes stage i with its output."""
        if self._sweep.trace.job.guidance.branches > 1:
            out = out.to(self._run.registers.x.dtype, copy=True)
            out = self._sweep.weighed(out, i)
        if i > 0:  # before the first there is nothing to know
            self._run.row(i, out)
