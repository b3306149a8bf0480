# SPDX-License-Identifier: Apache-2.0
"""The updates as one would write them in eager PyTorch, and the same for torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastdiff as fd
from fastdiff.backends import Registers
from fastdiff.bench.rows import A_X, C, Case, P, weights_of


class Hoisted:
    """DPM++2M as one would write it in eager torch, with floats made beforehand and no new tensors.

    Args:
        plan: Rows of dpmpp-2m, from which the coefficients come.
        folded: Four kernels a step instead of five: the history keeps h/p, so that making it is
            one `torch.add`.
        compiled: The step goes through `torch.compile`, with its coefficients in a tensor.
    """

    def __init__(
        self, plan: fd.Plan, shape: Sequence[int], *, folded: bool = False, compiled: bool = False
    ) -> None:
        self.x, self.h, self.past = (torch.zeros(tuple(shape)) for _ in range(3))
        self.rows = []
        last_p = 1.0
        for stage in plan.stages:
            b_0, b_1 = (*stage.b, 0.0)[:2]
            p, q = stage.p, stage.q
            row = (1.0, q / p, stage.a_x, b_0 * p, b_1 * last_p) if folded else ()
            self.rows.append(row or (p, q, stage.a_x, b_0, b_1))
            last_p = p
        self.step = self._folded if folded else self._plain
        if compiled:
            self.rows = [torch.tensor(row) for row in self.rows]  # type: ignore[misc]
            self.step = torch.compile(_fused)

    def __call__(self, network: Callable[..., torch.Tensor], start: torch.Tensor) -> torch.Tensor:
        x, h, past, step = self.x, self.h, self.past, self.step
        x.copy_(start)
        for row in self.rows:
            step(x, network(x, x), h, past, row)
            h, past = past, h
        return x

    @staticmethod
    def _plain(x: torch.Tensor, out: torch.Tensor, h: Any, past: Any, row: Any) -> None:
        p, q, a, b_0, b_1 = row
        torch.mul(x, p, out=h)
        h.add_(out, alpha=q)
        x.mul_(a).add_(h, alpha=b_0).add_(past, alpha=b_1)

    @staticmethod
    def _folded(x: torch.Tensor, out: torch.Tensor, h: Any, past: Any, row: Any) -> None:
        _, q, a, b_0, b_1 = row
        torch.add(x, out, alpha=q, out=h)
        x.mul_(a).add_(h, alpha=b_0).add_(past, alpha=b_1)


def _fused(x: torch.Tensor, out: torch.Tensor, h: Any, past: Any, row: Any) -> None:
    p, q, a, b_0, b_1 = row.unbind()
    new = p * x + q * out
    h.copy_(new)
    x.copy_(a * x + b_0 * new + b_1 * past)


class Eager:
    """A row as one would write it in eager torch, with floats made beforehand and no new tensors.

    The history keeps h / p, which makes h with its first output one `torch.add`.

    Args:
        case: The row.
        registers: x, history and m are those of the stage; h has a tensor of its own.
        out: The network's output.
        compiled: The same update through `torch.compile`, with coefficients in a tensor.
    """

    def __init__(
        self, case: Case, registers: Registers, out: torch.Tensor, *, compiled: Any = None
    ) -> None:
        x = registers.x
        self.x, self.h, self.m = x, torch.zeros_like(x), registers.m
        # newest first, as in the case's row, whose slots were filled in order
        self.past = [] if registers.history is None else list(registers.history)[::-1]
        self.outputs = list(out.view(case.branches, *x.shape))
        self.inputs = [] if self.m is None else list(self.m.view(case.branches, *x.shape))
        self.z = torch.zeros_like(x) if case.noise and compiled is None else None
        self.w = [w / P for w in case.weights]
        self.b = [b * P for b in weights_of(case.outputs)]
        if compiled is not None:
            row = torch.tensor(
                [P, A_X, C, *case.weights, *weights_of(case.outputs)], device=x.device
            )
            # Each gets a tensor of its own: views that are written cost the compiled code copies.
            past, inputs = ([t.clone() for t in ts] for ts in (self.past, self.inputs))
            self.arguments = (x, self.h, past, self.outputs, inputs, row)
            self.compiled = compiled

    def __call__(self) -> None:
        x, h = self.x, self.h
        torch.add(x, self.outputs[0], alpha=self.w[0], out=h)
        for w, out in zip(self.w[1:], self.outputs[1:], strict=True):
            h.add_(out, alpha=w)
        x.mul_(A_X).add_(h, alpha=self.b[0])
        for b, past in zip(self.b[1:], self.past, strict=True):
            x.add_(past, alpha=b)
        if self.z is not None:
            x.add_(self.z.normal_(), alpha=C)
        for m in self.inputs:
            m.copy_(x)

    def run_compiled(self) -> None:
        self.compiled(*self.arguments)


def _update(noise: bool, x: Any, h: Any, past: Any, outputs: Any, inputs: Any, row: Any) -> None:
    p, a, c, *rest = row.unbind()
    weights, b = rest[: len(outputs)], rest[len(outputs) :]
    new = p * x
    for w, out in zip(weights, outputs, strict=True):
        new = new + w * out.to(x.dtype)  # a weight of no dimension does not widen it
    total = a * x + b[0] * new
    for weight, register in zip(b[1:], past, strict=True):
        total = total + weight * register
    if noise:
        total = total + c * torch.randn_like(x)
    if past:
        past[-1].copy_(new)
    x.copy_(total)
    for m in inputs:
        m.copy_(total)


class EagerBackward:
    """A row of the transposed plan, written as `Eager` writes one, with the same arguments.

        v = p e + sum of the outputs,   x' = a x + b v,   e' = d x + g v + sum g_j past_j,   m = e'

    and where the row pushes, x goes to the history.
    """

    def __init__(
        self, case: Case, registers: Registers, out: torch.Tensor, *, compiled: Any = None
    ) -> None:
        assert registers.e is not None
        assert registers.m is not None
        value, x = case.values, registers.x
        self.x, self.e, self.h = x, registers.e, torch.zeros_like(x)
        self.outputs = list(out.view(case.branches, *x.shape))
        self.inputs = list(registers.m.view(case.branches, *x.shape))
        past = [] if registers.history is None else list(registers.history)
        terms = range(int(value["n_terms"]))
        self.past = [past[int(value[f"slot_{k}"])] for k in terms]
        self.g_past = [value[f"past_g_{k}"] for k in terms]
        self.pushed = past[int(value["push_x"])] if value["push_x"] >= 0 else None
        self.p, self.a, self.b, self.d, self.g = (
            value[name] for name in ("p", "a_x", "b_0", "d_x", "g_0")
        )
        if compiled is not None:
            numbers = [self.p, self.a, self.b, self.d, self.g, *self.g_past]
            row = torch.tensor(numbers, dtype=torch.float32, device=x.device)
            # Each gets a tensor of its own, as in `Eager`; one may be both pushed to and read.
            own = {id(t): t.clone() for t in past}
            read = [own[id(t)] for t in self.past]
            pushed = None if self.pushed is None else own[id(self.pushed)]
            inputs = [t.clone() for t in self.inputs]
            self.arguments = (x, self.e, read, pushed, self.outputs, inputs, row)
            self.compiled = compiled

    def __call__(self) -> None:
        x, e, v = self.x, self.e, self.h
        torch.add(self.outputs[0], e, alpha=self.p, out=v)
        for out in self.outputs[1:]:
            v.add_(out)
        torch.mul(x, self.d, out=e)
        e.add_(v, alpha=self.g)
        for g, past in zip(self.g_past, self.past, strict=True):
            e.add_(past, alpha=g)
        if self.pushed is not None:
            self.pushed.copy_(x)
        x.mul_(self.a).add_(v, alpha=self.b)
        for m in self.inputs:
            m.copy_(e)

    def run_compiled(self) -> None:
        self.compiled(*self.arguments)


def _update_backward(
    x: Any, e: Any, past: Any, pushed: Any, outputs: Any, inputs: Any, row: Any
) -> None:
    p, a, b, d, g, *g_past = row.unbind()
    v = p * e
    for out in outputs:
        v = v + out
    total = d * x + g * v
    for weight, register in zip(g_past, past, strict=True):
        total = total + weight * register
    new = a * x + b * v
    if pushed is not None:
        pushed.copy_(x)
    x.copy_(new)
    e.copy_(total)
    for m in inputs:
        m.copy_(total)


def eager_of(case: Case) -> type[Eager] | type[EagerBackward]:
    return EagerBackward if case.backward else Eager


def update_of(case: Case) -> Callable[..., None]:
    return _update_backward if case.backward else functools.partial(_update, case.noise)


def compiled_update(case: Case) -> Any:
    """The update of a case under `torch.compile`, which forgets what it compiled before."""
    torch._dynamo.reset()
    return torch.compile(update_of(case), dynamic=False)
