# SPDX-License-Identifier: Apache-2.0
"""One random plan run or differentiated by fastdiff and by the interpreter, and compared."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

import fastdiff as fd

from . import interpreter, plans
from .core import native

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(1,), (3,), (5,), (17,), (2, 3, 4), (64,), (131,)]


@contextlib.contextmanager
def running(instruction_set, threads):
    """An instruction set of the compiled core and a number of threads, in use."""
    before = torch.get_num_threads()
    own = native.instruction_set() if instruction_set else None
    torch.set_num_threads(threads)
    if instruction_set:
        native.use_instruction_set(instruction_set)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if instruction_set:
            native.use_instruction_set(own)


class Scripted:
    """A network whose outputs were written beforehand, and that notes what it is given.

    So rounding errors do not pass through it, and its inputs are compared by themselves.
    """

    def __init__(self, outputs):
        self.outputs = outputs
        self.given = []

    def __call__(self, x, t, **cond):
        self.given.append((x.clone(), t.clone(), {k: v.clone() for k, v in cond.items()}))
        return self.outputs[len(self.given) - 1]


def laid_out(tensor, how):
    """The same values in another layout: strided, with the batch apart, or transposed."""
    if how == 1:
        wide = torch.zeros(tensor.shape[0], 2 * tensor[0].numel() + 1, dtype=tensor.dtype)
        wide[:, : tensor[0].numel()] = tensor.flatten(1)
        return wide[:, : tensor[0].numel()].view(tensor.shape)
    if how == 2:
        return tensor.flatten(1).t().contiguous().t().reshape(tensor.shape)
    if how == 3:
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor


class Case:
    """A plan and everything that a run of it is given; a function of the seed."""

    def __init__(self, seed, **options):
        self.plan = plans.random_plan(seed, **options)
        generator = torch.Generator().manual_seed(seed)

        def values(*shape):
            return torch.randn(shape, generator=generator, dtype=F64)

        self.state = (F32, F64)[seed % 2]
        self.network = (self.state, BF16, F32, F16, F64)[seed % 5]
        out = (self.network, F32, F64, BF16, F16)[seed // 5 % 5]
        batch, sizes = seed % 3 + 1, SIZES[seed % len(SIZES)]
        self.shape = (batch, *sizes)
        stages = len(self.plan.stages)
        self.scale = (None, None, 2.5, values(batch), [*values(stages).tolist()], 1.0)[seed % 6]
        branches = 1 if self.scale is None or self.scale == 1.0 else 2
        self.x = values(*self.shape).to(self.state)
        self.outputs = [
            laid_out(values(branches * batch, *sizes).to(out), i % 4 if seed % 4 else 0)
            for i in range(self.plan.nfe)
        ]
        self.extras = [
            values(*self.shape[k % 2 :]).to(self.state) for k in range(plans.bank_size(self.plan))
        ]
        drawn = seed % 4 == 3
        self.xi = None if drawn else values(stages, *self.shape).to(self.state)
        self.seeds = [*plans.seeds_of(batch, seed)] if drawn else None
        self.cond, self.uncond = {"y": values(batch, 2)}, {"y": values(batch, 2)}
        # Our normals are float32 and within some units in the last place of Box-Muller.
        coarse = self.state == F32 or (drawn and self.plan.stochastic)
        self.unit = 2.0**-24 if coarse else 2.0**-53

    @property
    def guidance(self):
        return None if self.scale is None else fd.CFG(self.scale, self.uncond)

    def interpreted(self):
        return interpreter.interpret(
            *(self.plan, Scripted([o.to(F64) for o in self.outputs]), self.x),
            cond=self.cond,
            uncond=self.uncond,
            scale=self.scale,
            seeds=self.seeds,
            xi=self.xi,
            extras=self.extras,
        )

    def run(self, backend, callback=None):
        network = Scripted(self.outputs)
        got = fd.sample(
            *(network, self.x, self.plan),
            cond=self.cond,
            guidance=self.guidance,
            seed=self.seeds,
            xi=self.xi,
            extras=self.extras,
            callback=callback,
            backend=backend,
            dtype=self.network,
            graph=None,
        )
        return got, network.given


def check(case, backend):
    """Result, network inputs and callbacks of one run, each within its own rounding."""
    wanted, stages, seen = case.interpreted(), len(case.plan.stages), []

    def look(i, t, x, x0):
        seen.append((i, t, x.clone(), x0.clone()))

    got, given = case.run(backend, look if case.shape[0] == 2 else None)
    context = (case.plan.solver, backend, case.state, case.network)
    assert got.dtype == case.state, context
    assert wanted.x.close(got, case.unit, stages), context
    branches = 2 if case.guidance is not None and case.guidance.branches == 2 else 1
    assert len(given) == len(wanted.inputs), context
    for (stage, value, time), (x, t, cond) in zip(wanted.inputs, given, strict=True):
        assert x.dtype == case.network, context
        for branch in x.chunk(branches):
            assert value.close(branch, case.unit, stages), (*context, stage)
        told = torch.tensor(time, dtype=t.dtype)
        assert t.shape == (branches * case.shape[0],), context
        assert bool((t == told).all()), (*context, stage)
        halves = [case.uncond["y"], case.cond["y"]][2 - branches :]
        assert torch.equal(cond["y"], torch.cat(halves)), (*context, stage)
    if case.shape[0] == 2:
        assert len(seen) == len(wanted.points), context
        for (i, t, x, x0), (stage, time, point, clean) in zip(seen, wanted.points, strict=True):
            assert (i, t) == (stage, time), context
            assert point.close(x, case.unit, stages), (*context, stage)
            assert clean.close(x0, case.unit, stages + 1), (*context, stage)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.w = torch.nn.Parameter(0.6 * torch.randn(4, 4, generator=generator, dtype=F64))

    def forward(self, x, t, y):
        return torch.tanh(x @ self.w + y) * (1 + 0.1 * t[:, None].clamp(-1, 1))


def gradients_of(run, case, net):
    """The sample and the gradients in x, the conditioning, the extras and the weights."""
    net.zero_grad()
    leaves = [case["x"], case["y"], *case["extras"]]
    for leaf in leaves:
        leaf.grad = None
    out = run()
    if out.requires_grad:
        (out * case["weights"]).sum().backward()
    zero = torch.zeros
    found = [leaf.grad for leaf in (*leaves, net.w)]
    shapes = [leaf.shape for leaf in (*leaves, net.w)]
    return [out.detach(), *(zero(s, dtype=F64) if g is None else g
                            for g, s in zip(found, shapes, strict=True))]  # fmt: skip


def backward_case(seed, limits=True):
    plan = plans.random_plan(seed, limits=limits)
    generator = torch.Generator().manual_seed(seed)

    def values(*shape, leaf=False):
        return torch.randn(shape, generator=generator, dtype=F64).requires_grad_(leaf)

    return plan, {
        "x": values(3, 4, leaf=True),
        "y": values(3, 4, leaf=True),
        "extras": [values(3, 4, leaf=True) for _ in range(plans.bank_size(plan))],
        "weights": values(3, 4),
        "uncond": values(3, 4),
        "xi": values(len(plan.stages), 3, 4),
    }


GRADIENTS = {
    "discrete": lambda: "discrete",
    "checkpoint": lambda: fd.Discrete(checkpoint=2),
    "backprop": lambda: "backprop",
}


def check_gradient(seed, kind, backend, limits=True):
    """The gradients of one run against autograd of the interpreter."""
    plan, case = backward_case(seed, limits)
    net, scale = Net(), (None, 2.5, [0.5 + i for i in range(len(plan.stages))])[seed % 3]
    seeds = [*plans.seeds_of(3, seed)]

    def drawn(stage):
        """The noise that the backends draw, which agrees to the last bit."""
        zero = torch.zeros(3, 4, dtype=F64)
        return sum((w * fd.noise.normal((3, 4), seeds, k, dtype=F64) for k, w in stage.noise), zero)

    xi = [drawn(stage) for stage in plan.stages]

    def interpreted():
        return interpreter.interpret(
            *(plan, net, case["x"]),
            cond={"y": case["y"]},
            uncond={"y": case["uncond"]},
            scale=scale,
            xi=xi,
            extras=case["extras"],
        ).x.value

    def sampled():
        return fd.sample(
            *(net, case["x"], plan),
            cond={"y": case["y"]},
            guidance=None if scale is None else fd.CFG(scale, {"y": case["uncond"]}),
            seed=seeds,
            extras=case["extras"],
            gradient=GRADIENTS[kind](),
            backend=backend,
            graph=None,
        )

    if kind != "backprop":
        try:
            unowed = plan.transpose().unowed
        except NotImplementedError as error:  # the run says so, before anything is evaluated
            with pytest.raises(NotImplementedError, match=re.escape(str(error)[:60])):
                sampled()
            return
        for k in unowed:
            case["extras"][k].requires_grad_(False)
    wanted = gradients_of(interpreted, case, net)
    got = gradients_of(sampled, case, net)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        scale = 1.0 + float(b.abs().max())
        assert float((a - b).abs().max()) <= 1e-9 * scale, (seed, kind, backend, i)
