# SPDX-License-Identifier: Apache-2.0
"""The backward pass: the stages of a transposed table, with one product of the network between two.

A backward stage evaluates the network once more and takes its vector-Jacobian product (VJP) with
the cotangent that the stage before left in the input register; then the next backward stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..backends import Registers
from ..conditioning import PerStage, at_stage, flatten, leaves_of, rebuild, staged_in, tensors_in
from ..plans import Transposed
from .hooks import product
from .limits import held, through_limit
from .named import check_named
from .pools import Table
from .trace import Input, Trace, evaluated, written_backward

# What a stage owes to entries of the bank; see `Transposed.extras`.
Owed = Sequence[tuple[int, float, int | None, tuple[str, int] | None]]


def transposed_table(trace: Trace, transposed: Transposed) -> Table:
    """The rows of a transposed plan for the branches of a trace: their cotangents are added."""
    branches = trace.job.guidance.branches

    def made() -> Table:
        rows = tuple(replace(row, k=row.k * branches) for row in transposed.rows)
        layout = replace(transposed.layout, branches=branches)
        entries = len(trace.call.extras) if layout.products else 0
        return Table(rows, layout, transposed.slots, entries)

    return trace.recent.get(transposed, ("transposed", branches), made)


def _may_hide(trace: Trace) -> bool:
    """Whether the network may read, at some stage, a tensor that nobody named.

    A module has its tensors in its parameters; a function may have them anywhere, and so may an
    object in the conditioning that cannot be looked into.
    """
    if not isinstance(trace.job.network, torch.nn.Module):
        return True
    try:
        flatten(trace.call.cond)
    except TypeError:
        return True
    return False


class _Leaves:
    """The tensors that a product of the network is taken for, and the conditioning made of them.

    Each tensor that the conditioning holds is a leaf of its own in a backward stage, so that what
    it was computed from is left alone. A tensor with one entry a stage has a leaf for that entry.
    """

    def __init__(self, trace: Trace) -> None:
        cond, named = trace.call.cond, trace.named
        count = len(named) - len(trace.call.extras)
        self._cond = cond
        # a tensor that stands twice gets its whole gradient once
        firsts = {id(named[k]): k for k in reversed(range(count))}
        self._wanted = {key: k for key, k in firsts.items() if named[k].requires_grad}
        parameters = {id(tensor) for tensor in trace.params}
        own: dict[int, torch.Tensor] = {
            id(tensor): tensor for tensor in trace.params if id(tensor) in self._wanted
        }
        self._staged = {id(staged.values) for staged in staged_in(cond)}

        plain = {id(value) for value, _, _ in leaves_of(cond)} - parameters

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in self._wanted or id(tensor) not in plain:
                return tensor
            return own.setdefault(id(tensor), tensor.detach().requires_grad_())

        self._rebuilt = rebuild(cond, iter([leaf(tensor) for tensor in tensors_in(cond)]))
        places = [(self._wanted[key], tensor) for key, tensor in own.items()]
        self._whole = sorted(places, key=lambda place: place[0])

    def at(self, i: int) -> tuple[Any, list[tuple[int, torch.Tensor, bool]]]:
        """The conditioning at stage i, and its leaves.

        Returns:
            The conditioning; of each leaf the place of its tensor among the named ones, the leaf,
            and whether it is the entry of stage i alone.
        """
        whole = [(k, leaf, False) for k, leaf in self._whole]
        if not self._staged:
            return self._rebuilt, whole
        slices: dict[int, torch.Tensor] = {}
        originals = iter(staged_in(self._cond))

        def take(staged: PerStage, i: int) -> torch.Tensor:
            values = next(originals).values
            entry = values[i].detach().requires_grad_(values.requires_grad)
            return slices.setdefault(id(values), entry)

        now = at_stage(self._rebuilt, i, take)
        staged = [(self._wanted[key], s, True) for key, s in slices.items() if key in self._wanted]
        return now, [*whole, *sorted(staged, key=lambda leaf: leaf[0])]


class Sweep:
    """Backward stages, and the sums of the cotangents of the named tensors.

    Attributes:
        trace: The run that is differentiated.
        x_bar: The cotangent of the result, in the dtype of the registers; after a pass that of x,
            or None where x wants none.
    """

    def __init__(self, trace: Trace, cotangent: torch.Tensor) -> None:
        self.trace = trace
        self.x_bar: torch.Tensor | None = cotangent
        self._leaves = _Leaves(trace)
        self._looks = _may_hide(trace)
        self._totals: list[torch.Tensor | None] = [None] * len(trace.named)
        count = len(trace.named)
        self._registers = range(count - len(trace.call.extras), count)

    def gradients(self) -> list[torch.Tensor | None]:
        """Gradients of the named tensors, in their dtypes."""
        return [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(self._totals, self.trace.named, strict=True)
        ]

    def _add(self, k: int, gradient: torch.Tensor | None, weight: float = 1.0) -> None:
        """Adds to the gradient of a named tensor, in float32 at least."""
        if gradient is None:
            return
        total = self._totals[k]
        if total is None:  # a copy: autograd may have given the cotangent itself
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._totals[k] = gradient.to(wide).mul(weight)
        else:
            total.add_(gradient, alpha=weight)

    def _add_entry(self, k: int, i: int, gradient: torch.Tensor | None, weight: float) -> None:
        """Adds to the gradient of the entry of stage i of a named tensor."""
        if gradient is None:
            return
        total = self._totals[k]
        if total is None:
            total = self._totals[k] = torch.zeros_like(self.trace.named[k])
        total[i].add_(gradient, alpha=weight)

    def vjp(
        self,
        i: int,
        given: torch.Tensor,
        time: torch.Tensor,
        cotangent: Callable[[torch.Tensor], torch.Tensor],
        needs_x: bool,
        weight: float = 1.0,
    ) -> torch.Tensor | None:
        """One evaluation and its vector-Jacobian product.

        Args:
            i: The stage.
            given, time: What the network is given and told.
            cotangent: `cotangent(output)` gives the vector.
            needs_x: Whether the product with respect to `given` is wanted, which is returned.
            weight: Of the products with respect to the named tensors, which are added up.
        """
        trace = self.trace
        cond, leaves = self._leaves.at(i)
        leaf = given.detach().requires_grad_(needs_x)
        with trace.draws.repeated(i), trace.autocast(), torch.enable_grad():
            shown = leaf.clone() if trace.job.fresh_inputs else leaf
            out = evaluated(trace.job, (shown, time, cond), written_backward)
        vector = cotangent(out.detach())
        own = [tensor for _, tensor, _ in leaves]
        if self._looks:
            check_named(out, (leaf, *own, *trace.named))
        inputs = ([leaf] if needs_x else []) + own
        if not inputs or not out.requires_grad:
            return torch.zeros_like(given) if needs_x else None
        with torch.no_grad():
            found = product(out, inputs, vector.to(out.dtype), own)
        for (k, _, staged), gradient in zip(leaves, found[int(needs_x) :], strict=True):
            if staged:
                self._add_entry(k, i, gradient, weight)
            else:
                self._add(k, gradient, weight)
        if not needs_x:
            return None
        return torch.zeros_like(given) if found[0] is None else found[0]

    def weighed(self, m: torch.Tensor, i: int) -> torch.Tensor:
        """Multiplies the cotangent of each branch, [G * B, ...], by its weight, in place."""
        branches = self.trace.job.guidance.branches
        if branches > 1:
            each = m.view(branches, -1, *m.shape[1:])
            for branch, weight in zip(each, self.trace.weights(i), strict=True):
                branch.mul_(weight)
        return m

    def run(
        self,
        transposed: Transposed,
        times: Sequence[torch.Tensor],
        input_at: Callable[[int], Input],
        observe: Callable[[int, torch.Tensor], None] = lambda i, out: None,
    ) -> None:
        """All backward stages of a plan.

        Args:
            transposed: The plan's table.
            times: What the network is told at each stage.
            input_at: What it is given there, asked for from the last stage to the first.
            observe: Is given the stage and the network's output of each evaluation.
        """
        trace, stages, raw, x = self.trace, transposed.stages, transposed.raw, self.x_bar
        assert x is not None
        table = transposed_table(trace, transposed)
        last = len(stages)
        earliest = next((i for i, stage in enumerate(stages) if stage.evaluate), last)
        spec = table.spec(x, trace.job.backend)
        with trace.runs.backward_run(table, spec) as run:
            registers = run.registers
            registers.x.copy_(x)
            for k in range(spec.entries):
                assert registers.bank is not None
                registers.bank[k].copy_(trace.entry(k, registers.x))
            run.row(0, None)
            for row, i in enumerate(reversed(range(last)), start=1):
                stage, m_bar = stages[i], None
                self._credit(i, transposed.extras[i], registers)
                needs_x = trace.needs or i > earliest
                if stage.evaluate:
                    found, m = input_at(i), registers.m
                    assert m is not None

                    def cotangent(
                        out: torch.Tensor,
                        i: int = i,
                        found: Input = found,
                        m: torch.Tensor = m,
                    ) -> torch.Tensor:
                        observe(i, out)
                        if found.point is not None:
                            through_limit(trace, (i, out, found.point), registers, raw[i])
                        return self.weighed(m, i)

                    m_bar = self.vjp(i, found.given, times[i], cotangent, needs_x)
                if not needs_x and not self._registers:
                    break
                if m_bar is None and registers.m is not None and stage.evaluate:
                    m_bar = torch.zeros_like(registers.m)
                run.row(row, m_bar)
            self.finish(registers)

    def finish(self, registers: Registers) -> None:
        """Takes the cotangent of x out of the registers of a pass."""
        dtype = self.trace.call.x.dtype
        self.x_bar = registers.x.to(dtype, copy=True) if self.trace.needs else None

    def _credit(self, i: int, owed: Owed, registers: Registers) -> None:
        """Adds to the gradients of the bank's entries what stage i owes them."""
        for entry, weight, slot, factor in owed:
            k = self._registers[entry]
            if not self.trace.named[k].requires_grad:
                continue
            cotangent = held(registers, slot)
            if factor is not None:
                kind, at = factor
                other = self.trace.noise(i) if kind == "xi" else self.trace.entry(at, cotangent)
                cotangent = cotangent * other
            self._add(k, cotangent, weight)
