# SPDX-License-Identifier: Apache-2.0
"""Exact gradients: the plan transposed agrees with backpropagation through the loop."""

import numpy as np
import pytest
import torch
from support.gradients import EACH, F64, VP, apart, gradients, net_of, plan_of
from support.nets import Net

import fastdiff as fd
from fastdiff import backends


@pytest.fixture
def net():
    return net_of()


# -- the transposed table --------------------------------------------------------------------------


def random_plan(rng):
    """Stages with every kind of term, e carried on for a while, some without an evaluation."""
    stages, evaluations, has_e = [], 0, False
    count = int(rng.integers(1, 9))
    for i in range(count):
        evaluate = bool(rng.random() < 0.8) or i == 0
        b, g = (
            rng.normal(size=rng.integers(0, min(4, evaluations + evaluate) + 1)) * 0.5
            for _ in range(2)
        )
        if not evaluate:
            b[:1] = g[:1] = 0.0
        options = {"p": rng.normal(), "q": rng.normal(), "c_in": rng.normal(), "a_x": rng.normal()}
        options |= {"b": tuple(b), "r": (rng.normal(),), "model_time": 0.3}
        if has_e and rng.random() < 0.6:
            options["a_e"] = rng.normal()
        if i < count - 1 and rng.random() < 0.6:
            options |= {"d_x": rng.normal(), "g": tuple(g), "s": (rng.normal(),)}
            options |= {"c_e": 0.3, "noise": ((i + 1, 0.7), (i + 20, -0.4))}
            if has_e and rng.random() < 0.5:
                options["d_e"] = rng.normal()
        stages.append(fd.Stage(t=0.9 - 0.8 * i / count, evaluate=evaluate, **options))
        has_e = stages[-1].writes_e
        evaluations += evaluate
    return fd.Plan(tuple(stages), (0.9, 0.05))


@EACH
def test_every_plan_is_transposed_exactly(net, backend):
    rng = np.random.default_rng(0)
    x, extra, weights = (torch.randn(3, 5, dtype=F64) for _ in range(3))
    y = torch.randn(3, dtype=F64)
    for case in range(60):
        plan, results = random_plan(rng), []
        for gradient in ("backprop", fd.Discrete(), fd.Discrete(checkpoint=case % 3 + 1)):
            own = [v.clone().requires_grad_() for v in (x, y, extra)]
            options = {"cond": {"y": own[1]}, "extras": own[2:], "seed": 3, "backend": backend}
            out = fd.sample(net, own[0], plan, gradient=gradient, **options)
            wanted = (*own, net.linear.weight)
            found = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
            zeros = map(torch.zeros_like, wanted)
            results.append([z if g is None else g for g, z in zip(found, zeros, strict=True)])
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                size = 1e-12 * float(torch.cat([v.flatten() for v in results[0]]).norm())
                torch.testing.assert_close(a, b, rtol=1e-10, atol=size, msg=f"case {case}")


def test_a_backward_step_is_one_stage(net, monkeypatch):
    launches = []
    bind = backends.TorchBackend.bind

    def counted(self, *arguments, **options):
        bound = bind(self, *arguments, **options)
        run = bound.run
        bound.run = lambda *given: (launches.append(given[0]), run(*given))[1]
        return bound

    monkeypatch.setattr(backends.TorchBackend, "bind", counted)
    plan = plan_of("dpm-3", 4)
    gradients(net, plan, "discrete", backend="torch")
    forward = len(plan.stages)
    assert len(launches) == forward + 1 + forward  # and the first h_bar
    assert launches[forward:] == list(range(forward + 1))


def test_the_table_is_printed_and_says_its_registers():
    transposed = plan_of("deis-3").transpose()
    assert transposed.slots == 1
    assert transposed.pack(1).shape == (7, transposed.layout.width)
    assert "deis-3 transposed" in str(transposed)
    assert plan_of("ddim").transpose().slots == 0


def test_an_e_without_end_is_refused(net):
    middle = [
        fd.Stage(t=0.8, evaluate=False, a_x=0.9, a_e=0.1, d_x=0.1, d_e=1.1) for _ in range(80)
    ]
    first = fd.Stage(t=0.9, b=(0.1,), d_x=1.0, g=(0.2,))
    last = fd.Stage(t=0.1, q=1.0, b=(0.1,), a_e=0.2)
    plan = fd.Plan((first, *middle, last), (0.9, 0.05))
    with pytest.raises(NotImplementedError, match="at most 64 earlier cotangents"):
        gradients(net, plan, "discrete")


def stages_of(*fields):
    """A plan of one stage for each of these, from t = 1 down to 0."""
    count = len(fields)
    return fd.Plan(
        tuple(fd.Stage(t=1.0 - i / count, **own) for i, own in enumerate(fields)), (1.0, 0.0)
    )


UNREAD = {
    "q = 0": stages_of({"p": 1.0, "q": 0.0, "b": (0.5,)}, {"b": (0.5,)}),
    "q = 0 at the end": stages_of({"b": (0.5,)}, {"p": 1.0, "q": 0.0, "b": (0.5,)}),
    "nothing weighs the first": stages_of({"b": ()}, {"b": (0.5,), "p": 0.3}),
    "nothing weighs the last": stages_of({"b": (0.5,), "p": 0.3}, {"b": ()}),
    "nothing weighs any": stages_of({"b": ()}, {"b": ()}),
    "c_in = 0": stages_of({"b": (0.5,)}, {"c_in": 0.0, "p": 0.4, "b": (0.5,)}),
    "no evaluation between": stages_of(
        {"b": (0.5,)}, {"evaluate": False, "a_x": 0.7, "b": (0.0, 0.2)}, {"b": (0.4,)}
    ),
    "the result is 0": stages_of({"a_x": 0.0, "b": ()}),
    "the result forgets x": stages_of({"b": (0.5,)}, {"a_x": 0.0, "b": ()}),
}


@EACH
@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("plan", UNREAD.values(), ids=UNREAD)
def test_outputs_that_nothing_reads_owe_nothing(net, plan, scale, backend):
    """Every input of a product is written, as zeros where nothing is owed."""
    weights = torch.linspace(-1, 1, 15, dtype=F64).reshape(3, 5)
    values, y = torch.randn(3, 5, dtype=F64), torch.randn(3, dtype=F64)
    guidance = None if scale is None else fd.CFG(scale, {"y": 0.0})

    def interpreted(x):
        history = []
        for stage in plan.stages:
            if stage.evaluate:
                given, t = stage.c_in * x, torch.full((3,), stage.model_time, dtype=F64)
                out = net(given, t, y)
                if scale is not None:
                    none = net(given, t, torch.zeros_like(y))
                    out = none + scale * (out - none)
                history.insert(0, stage.q * out + stage.p * x)
            past = history if stage.evaluate else [torch.zeros_like(x), *history]
            x = stage.a_x * x + sum((b * h for b, h in zip(stage.b, past, strict=False)), 0 * x)
        return x

    results = []
    for gradient in (None, fd.Discrete(), fd.Discrete(checkpoint=1)):
        x = values.clone().requires_grad_()
        if gradient is None:
            out = interpreted(x)
        else:
            options = {"guidance": guidance, "backend": backend}
            out = fd.sample(net, x, plan, cond={"y": y}, gradient=gradient, **options)
        wanted = (x, net.linear.weight)
        found = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
        zeros = map(torch.zeros_like, wanted)
        results.append([z if g is None else g for g, z in zip(found, zeros, strict=True)])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@EACH
def test_a_plan_without_evaluations_has_the_gradient_of_its_updates(backend):
    calls = []
    plan = stages_of(
        {"evaluate": False, "a_x": 0.5, "r": (2.0,)}, {"evaluate": False, "a_x": 3.0, "b": ()}
    )
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    extra = torch.randn(5, dtype=F64, requires_grad=True)
    options = {"gradient": "discrete", "backend": backend}
    out = fd.sample(lambda x, t: calls.append(1), x, plan, extras=[extra], **options)
    torch.testing.assert_close(out.detach(), 1.5 * x.detach() + 6.0 * extra.detach())
    a_x, a_extra = torch.autograd.grad(out.sum(), (x, extra))
    assert torch.equal(a_x, torch.full((3, 5), 1.5, dtype=F64))
    assert torch.equal(a_extra, torch.full((5,), 18.0, dtype=F64))
    assert calls == []
    out = fd.sample(lambda x, t: x, x.detach(), plan, extras=[extra], **options)
    assert torch.equal(torch.autograd.grad(out.sum(), extra)[0], a_extra)


def test_rows_without_a_transpose_are_refused_before_they_run():
    calls = []
    measure = fd.Measure(0, fd.Reduction("norm", ("x",)))
    plan = stages_of({"b": (0.5,), "measures": (measure,), "scalars": (("b_0", 0),)})
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    for gradient in (fd.Discrete(), fd.Discrete(checkpoint=1)):
        with pytest.raises(NotImplementedError, match=r"transpose: .*backprop"):
            fd.sample(lambda x, t: calls.append(1) or x, x, plan, gradient=gradient)
    with pytest.raises(NotImplementedError, match="measures of the samples are not part of"):
        fd.sample(lambda x, t: calls.append(1) or x, x, plan, gradient=fd.AdjointDEIS(schedule=VP))
    assert calls == []


def test_an_entry_that_multiplies_the_state_has_no_gradient_in_the_table():
    calls = []
    plan = stages_of({"b": (0.5,), "products": (fd.Product("x", 0.5, 0, "x"),)})
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    extra = torch.ones(5, dtype=F64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"got extras\[0\] that requires grad.*backprop"):
        fd.sample(
            *(lambda x, t: calls.append(1) or x, x, plan), extras=[extra], gradient="discrete"
        )  # fmt: skip
    assert calls == []


# -- the exact gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "deis-3", "dpmpp-3s"])
def test_gradcheck(net, solver):
    plan = plan_of(solver, 3)
    x = torch.randn(2, 5, dtype=F64, requires_grad=True)
    y = torch.randn(2, dtype=F64, requires_grad=True)

    def run(x, y, *weights):
        return fd.sample(net, x, plan, cond={"y": y}, gradient="discrete", seed=1)

    assert torch.autograd.gradcheck(run, (x, y, net.linear.weight, net.linear.bias))


def test_float32_agrees_to_rounding(net):
    plan = plan_of("deis-3", 8)
    expected = gradients(net, plan, "backprop")
    got = gradients(net.float(), plan, "discrete", dtype=torch.float32)
    assert got[1].dtype == torch.float32
    # eps times the stages and the terms of each
    assert apart([v.double() for v in got], expected) < 2**-23 * 8 * 10


@EACH
@pytest.mark.parametrize(
    "scale", [2.0, torch.tensor([1.0, 2.0, 3.0], dtype=F64), (1.0, 2.0, 3.0, 0.5, 1.0, 2.0)]
)
def test_guidance_reaches_both_branches(net, scale, backend):
    plan = plan_of()
    results = []
    for gradient in ("backprop", "discrete", fd.Discrete(checkpoint=2)):
        none = torch.full((3,), 0.2, dtype=F64, requires_grad=True)
        guidance = fd.CFG(scale, uncond={"y": none})
        found = gradients(net, plan, gradient, guidance=guidance, backend=backend)
        results.append([*found, none.grad])
    assert apart(results[1], results[0]) < 1e-10
    assert apart(results[2], results[0]) < 1e-10


@EACH
@pytest.mark.parametrize("limits", [{"clip": 0.4}, {"threshold": (0.7, 0.2)}])
def test_limits_have_the_gradient_that_autograd_gives_them(net, limits, backend):
    plan = plan_of(**limits)
    expected = gradients(net, plan, "backprop")
    unlimited = gradients(net, plan_of(), "backprop")
    assert apart(expected, unlimited) > 0.01
    for gradient in ("discrete", fd.Discrete(checkpoint=2)):
        assert apart(gradients(net, plan, gradient, backend=backend), expected) < 1e-10


@EACH
@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_reversible_run_is_undone_without_stored_states(net, backend, scale):
    plan = fd.plan(VP, "rex-1", 6, prediction="v", t_max=0.9, t_min=0.05)
    guidance = None if scale is None else fd.CFG(scale, uncond={"y": 0.0})
    options = {"guidance": guidance, "backend": backend}
    expected = gradients(net, plan, "backprop", guidance=guidance)
    for gradient in (fd.Discrete(), fd.Discrete(undo=True), fd.Discrete(checkpoint=3)):
        assert apart(gradients(net, plan, gradient, **options), expected) < 1e-10, gradient


def test_the_round_trip_of_a_reversible_run_is_close():
    torch.manual_seed(0)
    net = Net(idle=True).double()
    for steps, bound in ((10, 1e-12), (100, 1e-11)):
        plan = fd.plan(VP, "rex-1", steps, prediction="v", t_max=0.9, t_min=0.05)
        exact = gradients(net, plan, "discrete")
        assert apart(gradients(net, plan, fd.Discrete(undo=True)), exact) < bound
    plan = fd.plan(VP, "rex-1", 20, prediction="v", t_max=0.9, t_min=0.05)
    exact = gradients(net, plan, "discrete")
    single = gradients(net.float(), plan, fd.Discrete(undo=True), dtype=torch.float32)
    assert apart([v.double() for v in single], exact) < 1e-3


def test_plans_that_cannot_be_undone_are_refused(net):
    with pytest.raises(ValueError, match=r"undo=True needs a plan.*rex-1"):
        gradients(net, plan_of("deis-3"), fd.Discrete(undo=True))


def test_straight_through_passes_a_threshold_by(net):
    plan = plan_of("ddim", 1, threshold=(0.5, 0.1))
    got = gradients(net, plan, fd.Discrete(threshold="straight-through"), cond=False)
    stage = plan.stages[0]
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    time = torch.full((3,), stage.model_time, dtype=F64)
    h = stage.p * x + stage.q * net(x, time)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(3, 5, generator=generator, dtype=F64) for _ in range(2)][1]
    (expected,) = torch.autograd.grad(stage.a_x * x + stage.b[0] * h, x, weights)
    assert apart([got[1]], [expected]) < 1e-12


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_have_float32_cotangents(dtype, backend):
    torch.manual_seed(0)
    net, plan = Net(idle=True), plan_of("deis-3")
    exact = gradients(net, plan, "discrete", dtype=torch.float32, backend=backend)
    got = gradients(net.to(dtype), plan, "discrete", dtype=torch.float32, backend=backend)
    assert [v.dtype for v in got] == [*[torch.float32] * 3, dtype, dtype]
    assert apart([v.float() for v in got], exact) < 0.05


def test_autocast_is_that_of_the_forward_run():
    torch.manual_seed(0)
    net, plan, seen = Net(idle=True), plan_of(), []

    def watched(x, t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return net(x, t)

    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fd.sample(watched, x, plan, gradient="discrete", params=net)
    out.sum().backward()
    assert all(seen)
    assert len(seen) == 2 * len(plan.stages)
    assert x.grad.dtype == net.linear.weight.grad.dtype == torch.float32
