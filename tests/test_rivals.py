# SPDX-License-Identifier: Apache-2.0
"""The rivals of the benchmarks do the same work as fastdiff; one that does not is not timed."""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastdiff as fd
from fastdiff.bench import captured, gate, gradients, rows, stages
from fastdiff.bench import loops as sampling_loops
from fastdiff.bench.flows import Flow, vp_plan

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def load(name):
    """A module of `benchmarks/`, which is a folder of scripts and no package."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


flows, loops, eager = (load(name) for name in ("problems.flows", "problems.loops", "rivals.eager"))


def invoke(name, *arguments, code=0):
    """The output of `python benchmarks/run.py name arguments`."""
    result = CliRunner().invoke(load("run").main, [name, *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


# of diffusers, which start at alpha = 0
NOT_FINITE = ("UniPC 1 bh1", "UniPC 2 bh1", "UniPC 3 bh1", "UniPC 3 bh2")


def needs(package):
    return pytest.importorskip(package, reason="a rival; pip install 'fastdiff-engine[bench]'")


# -- wrong rivals are not timed --------------------------------------------------------------------


def test_a_stage_that_differs_by_a_bit_is_not_timed(monkeypatch):
    stage = load("bench_stage")
    stages.gate(rows.CHOSEN[-1], CPU)
    real = fd.backends.get("cpu")

    class Wrong:
        missing = staticmethod(lambda: None)
        supports = staticmethod(lambda *asked: None)

        @staticmethod
        def bind(registers, table, layout):
            registers.x.view(torch.int32)[0, 0] += 1024
            return real.bind(registers, table, layout)

    monkeypatch.setattr(stages, "available", lambda device: ["wrong"])
    monkeypatch.setattr(fd.backends, "get", lambda name: Wrong if name == "wrong" else real)
    monkeypatch.setattr(stage, "measure", lambda *a: pytest.fail("it timed"))
    with pytest.raises(gate.GateError, match="to the bit"):
        stages.gate(rows.Case(), CPU)
    assert "6 gates stayed shut" in invoke("stage", "--device", "cpu", "--largest", 0.07, code=1)


def test_what_a_device_refused_shuts_the_gate_of_the_stage(monkeypatch):
    real = fd.backends.get("cpu")

    class Refusing:
        def __init__(self, *arguments):
            self.bound = real.bind(*arguments)
            self.run = self.bound.run

        def check(self):
            raise ValueError("the device refused a row")

    backend = types.SimpleNamespace(
        missing=lambda: None, supports=lambda *asked: None, bind=Refusing
    )
    monkeypatch.setattr(stages, "available", lambda device: ["refusing"])
    monkeypatch.setattr(fd.backends, "get", lambda name: backend if name == "refusing" else real)
    with pytest.raises(ValueError, match="the device refused a row"):
        stages.gate(rows.Case(), CPU)


def test_a_wrong_loop_is_not_timed(monkeypatch):
    loop = load("bench_loop")
    parts = loops.parts_of(loops.Case("mlp", (2, 16), 10), CPU)
    ddim = importlib.import_module("fastdiff.bench.problems").plan_on_training_times("ddim", 10)
    wrong = fd.sample(parts.network, parts.start, ddim, cond=parts.cond)
    with pytest.raises(gate.GateError, match=r"diffusers eager, MLP \[2,16\]"):
        loop.gate(parts, {"diffusers eager": lambda: wrong}, loop.reference(parts))
    monkeypatch.setattr(loop, "reference", lambda parts: 1.001 * parts.start)
    monkeypatch.setattr(sampling_loops, "race", lambda *a, **k: pytest.fail("it timed"))
    output = invoke("loop", "--device", "cpu", "--case", "null", code=1)
    assert "1 gates stayed shut" in output
    assert "fastdiff eager |" not in output


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_a_wrong_solver_of_diffusers_is_not_compared(monkeypatch):
    needs("diffusers")
    order, diffusers = load("bench_order"), load("rivals.diffusers")
    real = diffusers.final_state
    monkeypatch.setattr(diffusers, "final_state", lambda *a, **k: 1.001 * real(*a, **k))
    with pytest.raises(gate.GateError, match="ddim"):
        order.gate()


def test_a_wrong_sampler_of_k_diffusion_is_not_compared(monkeypatch):
    order, theirs = load("bench_order"), load("rivals.k_diffusion")
    order.restated()
    assert set(order._RESTATED) == set(theirs.SAMPLERS)
    real = theirs.final_state
    monkeypatch.setattr(theirs, "final_state", lambda *a: 1.001 * real(*a))
    with pytest.raises(gate.GateError, match="sample_euler"):
        order.restated()


def test_wrong_gradients_are_not_timed(monkeypatch):
    shared = load("gradient_gate")
    real = shared.gradients

    def wrong(flow, plan, gradient, **options):
        found = real(flow, plan, gradient, **options)
        if gradient == fd.AdjointDEIS(2):
            found["theta"] = 1.02 * found["theta"]
        return found

    monkeypatch.setattr(shared, "gradients", wrong)
    monkeypatch.setattr(gradients, "race", lambda *a, **k: pytest.fail("it timed"))
    output = invoke("gradients", "--part", "time", "--device", "cpu", code=1)
    assert "Gate: gradients: GateError: AdjointDEIS(2), of theta" in output


# -- rivals do the same work -----------------------------------------------------------------------


def test_the_rivals_of_a_stage_compute_what_it_computes():
    for case in (c for c in rows.all_cases() if not c.noise):
        registers, out = rows.registers_of(case, (2, 64), CPU)
        kept = [
            t for t in (registers.x, registers.e, registers.history, registers.m) if t is not None
        ]
        starts = [t.clone() for t in kept]

        def again(kept=kept, starts=starts):
            for register, start in zip(kept, starts, strict=True):
                register.copy_(start)

        rows.bind("torch", case, registers).run(case.row, out, None)
        moved = [t.clone() for t in kept]
        again()
        write = eager.eager_of(case)
        write(case, registers, out, compiled=eager.update_of(case)).run_compiled()
        torch.testing.assert_close(registers.x, moved[0])
        if case.backward:
            torch.testing.assert_close(registers.e, moved[1])
        again()
        # the forward rival's history holds h / p, and weighs it by b p
        if registers.history is not None and not case.backward:
            registers.history.div_(rows.P)
        write(case, registers, out)()
        whole = case.backward or registers.history is None
        for register, wanted in list(zip(kept, moved, strict=True))[: None if whole else 1]:
            torch.testing.assert_close(register, wanted)


def test_triton_passes_the_gate_of_the_stage(monkeypatch):
    triton = pytest.importorskip("triton", reason="pip install triton")
    if torch.cuda.is_available() or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("for the interpreter of triton 3.9 or newer, which fuses fma")
    monkeypatch.setattr(stages, "available", lambda device: ["triton", "torch"])
    for case in rows.CHOSEN:
        stages.gate(case, CPU, (2, 80))


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize("kind", ["null", "mlp", "conv"])
def test_the_rivals_of_a_loop_end_where_it_ends(kind, recorder):
    loop = load("bench_loop")
    shape = {"null": (2, 3, 4, 4), "mlp": (2, 16), "conv": (2, 16, 3)}[kind]
    parts = loops.parts_of(loops.Case(kind, shape, 5, small=True), CPU)
    made = {graph: loop.ours(parts, graph) for graph in (None, "stage", "loop")}
    made |= {"replay": captured.replay_alone(parts), "alone": loop.alone(parts)}
    if loop.installed("diffusers"):
        made["diffusers"] = load("rivals.diffusers").loop_around(parts)
    with torch.no_grad():
        loop.gate(parts, {str(name): run for name, run in made.items()}, loop.reference(parts))
        launched = recorder.launched
        made["replay"]()
        assert recorder.launched == launched + 1
        assert made["alone"]() is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_loops_compiled_whole_end_where_the_reference_does():
    loop = load("bench_loop")
    parts = loops.parts_of(loops.Case("mlp", (2, 16), 3), CPU)
    with torch.no_grad():
        cell = loop.Cell(parts.case, True)
        made = {name: make() for name, make in loop.makers(cell, parts, False).items()}
        assert len(made) == 5
        loop.gate(parts, made, loop.reference(parts))


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize("on", ["mixture", "flow"])
def test_unipc_is_that_of_diffusers(on):
    """From alpha = 0 on a flow as well, where lambda is infinite."""
    needs("diffusers")
    theirs, flow = load("rivals.schedulers"), flows.untrained(on)
    plan = flow.plan("unipc-2", 7, grid="uniform", lower_order_final=True)
    field = load("rivals.fields").Field(flow)
    end = theirs.final_state("UniPC 2 bh2", field, np.array(plan.times))
    assert field.calls == plan.nfe == 7
    torch.testing.assert_close(end, flow.run(plan), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", ["mixture", "flow"])
def test_the_samplers_of_a_rival_spend_what_they_are_given(on):
    order, flow = load("bench_order"), flows.untrained(on)
    for rival, module in order.RIVALS.items():
        if rival != "k-diffusion":
            needs(rival)
        for name, cost in module.offered(flow.schedule).items():
            if name != "explicit_adams in lambda":
                ends = order.their_ends(module, name, cost, flow, "uniform", (11, 12))
                finite = not (on == "flow" and name in NOT_FINITE)
                assert bool(ends) == finite, name


def test_a_fine_path_has_the_noise_of_the_coarse_one():
    network = lambda x, t: torch.full_like(x, 0.3)  # noqa: E731
    flow = Flow("", network, "x0", torch.randn(3, 4).double())
    plan = vp_plan(flow, "ddim", 4, eta=1.0)
    fine, xi = load("bench_adjoint").path_of(flow, plan, 8, seed=0)
    assert len(fine.stages) == len(xi) == 4 * 8
    # the network says the same everywhere, so both end where the path takes them
    ends = [fd.sample(flow.network, flow.start, plan, seed=0)]
    ends += [fd.sample(flow.network, flow.start, fine, xi=xi)]
    torch.testing.assert_close(*ends)
    assert 0.9 < float(torch.stack(xi).std()) < 1.1
