# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say: counts are exact, records complete, and both run."""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fastdiff as fd

ROOT = Path(__file__).resolve().parent.parent
VP = fd.schedules.VPLinear()


def load(name):
    """A module of `benchmarks/`, which is a folder of scripts and no package."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


harness = load("harness")


# -- timing ----------------------------------------------------------------------------------------


def test_percentiles_are_those_of_the_definition():
    timing = harness.summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    # ranks 0 .. 5, linear between them: 20 % is rank 1, 50 % rank 2.5, 80 % rank 4
    assert timing == harness.Timing(best=1.0, p20=2.0, median=3.5, p80=5.0, rounds=6)


def test_one_time_is_every_percentile():
    assert harness.summary([2.0]) == harness.Timing(2.0, 2.0, 2.0, 2.0, 1)


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="at least one time"):
        harness.summary([])


def ticking(monkeypatch):
    """A clock that only work moves; returns a function that makes work of a length."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def work(seconds):
        def run():
            now[0] += seconds

        return run

    return work


def test_time_is_divided_by_the_units_and_setup_is_not_counted(monkeypatch):
    work = ticking(monkeypatch)
    rivals = [
        harness.Rival("a", work(1.0), units=4, setup=work(100.0)),
        harness.Rival("b", work(3.0)),
    ]
    timings = harness.race(rivals, seconds=0.0, rounds=3)
    assert timings["a"] == harness.Timing(0.25, 0.25, 0.25, 0.25, 3)
    assert timings["b"] == harness.Timing(3.0, 3.0, 3.0, 3.0, 3)


def test_rivals_take_turns_and_the_first_changes():
    order = []
    rivals = [harness.Rival(name, lambda name=name: order.append(name), 1, int) for name in "abc"]
    harness.race(rivals, seconds=0.0, warmup=1, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_a_quick_rival_runs_as_often_as_a_turn_takes(monkeypatch):
    work, calls = ticking(monkeypatch), []
    quick = work(0.25)
    rivals = [harness.Rival("quick", lambda: (quick(), calls.append(1)))]
    timings = harness.race(rivals, seconds=0.0, warmup=2, rounds=5, turn=1.0)
    assert len(calls) == 2 + 5 * 4
    assert timings["quick"].best == 0.25


def test_rivals_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names differ"):
        harness.race([harness.Rival("a", int), harness.Rival("a", int)])


# -- the gate --------------------------------------------------------------------------------------


def test_the_gate_opens_up_to_its_tolerance():
    harness.agree("x", torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-4]), 1.1e-4)
    with pytest.raises(harness.GateError, match="Nothing was timed"):
        harness.agree("x", torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-4]), 0.9e-4)


def test_the_gate_stays_shut_on_nan():
    with pytest.raises(harness.GateError):
        harness.agree("x", torch.tensor([float("nan")]), torch.ones(1), 1.0)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "row", "reads", "writes"),
    [
        ("ddim", 2, 2, 1),  # x, out -> x
        ("deis-2", 3, 3, 2),  # x, out, H1 -> x, push
        ("deis-3", 3, 4, 2),  # x, out, H1, H2 -> x, push
        ("deis-3", 0, 2, 2),  # no history yet: x, out -> x, push
        ("deis-3", 5, 4, 1),  # nothing comes after: no push
        ("dpmpp-2m", 3, 3, 2),  # h = p x + q out reads no more than x does
        ("dpm-2", 0, 2, 2),  # x, out -> e, push; x stays
        ("dpm-2", 1, 3, 1),  # x, out at e (p = 0), H1 -> x
        ("dpmpp-2s", 1, 4, 1),  # x0 at e reads e as well
        ("deis-rk4", 2, 2, 2),  # the third of four: x, out -> e, push
        ("deis-rk4", 3, 5, 1),  # the fourth sums all: x, out, H1, H2, H3 -> x
    ],
)
def test_registers_moved_are_those_counted_by_hand(solver, row, reads, writes):
    plan = fd.plan(VP, solver, 6)
    assert harness.stage_registers(plan, row) == (reads, writes)


def test_noise_moves_no_bytes():
    noisy = fd.plan(VP, "ddim", 6, eta=1.0)
    assert harness.stage_registers(noisy, 2) == (2, 1)


def test_guidance_reads_an_output_a_branch_and_writes_an_input_a_branch():
    plan = fd.plan(VP, "dpmpp-2m", 6)
    weights = (3.0, -2.0)
    assert harness.stage_registers(plan, 3, weights) == (4, 2)
    moved = harness.stage_bytes(plan, 3, 1000, network=torch.bfloat16, weights=weights, copies=2)
    assert moved == 4 * 4000 + 2 * 2000 + 2 * 2000


def test_bytes_are_registers_times_their_size():
    plan = fd.plan(VP, "dpmpp-2m", 6)
    assert harness.stage_bytes(plan, 3, 1000) == 5 * 1000 * 4
    assert harness.stage_bytes(plan, 3, 1000, torch.float64) == 5 * 1000 * 8
    # float32: x twice, history twice; bfloat16: the output read and the next input written
    assert harness.stage_bytes(plan, 3, 1000, network=torch.bfloat16) == 4 * 4000 + 2 * 2000
    # the last row is DDIM's, pushes nothing and makes no input: x twice and the output
    assert harness.stage_bytes(plan, 5, 1000, network=torch.bfloat16) == 2 * 4000 + 2000


# -- records and tables ----------------------------------------------------------------------------


def test_a_record_says_where_it_comes_from():
    timing = harness.Timing(1e-6, 2e-6, 3e-6, 4e-6, 7)
    line = harness.record("step", "ours", timing, shape=[64, 16], dtype="float32")
    assert list(line) == [
        *("bench", "commit", "dirty", "python", "torch", "numpy", "fastdiff", "diffusers"),
        *("cpu", "cores", "threads", "shape", "dtype", "unit", "rival"),
        *("best", "p20", "median", "p80", "rounds"),
    ]
    assert (line["unit"], line["best"], line["p80"], line["rounds"]) == ("us", 1.0, 4.0, 7)
    assert line["fastdiff"] == fd.__version__
    assert line["threads"] == torch.get_num_threads()


def test_a_record_refuses_a_value_it_would_take_for_a_key():
    with pytest.raises(ValueError, match="measured values"):
        harness.record("order", "ours", {"err": 1.0})


def test_writing_again_replaces_the_same_line_and_keeps_the_others(tmp_path):
    path = tmp_path / "results" / "step.jsonl"
    first = harness.record("order", "ours", {"error": 1.0}, nfe=5)
    other = harness.record("order", "ours", {"error": 3.0}, nfe=6)
    harness.write(path, [first, other])
    harness.write(path, [{**first, "error": 2.0}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{**first, "error": 2.0}, other]


def test_numbers_keep_three_digits():
    values = (0.0, 0.00123, 0.1, 1.234, 12.34, 123.4, 1234.5, 1e-5)
    shown = ["0", "0.00123", "0.100", "1.23", "12.3", "123", "1234", "1.0e-05"]
    assert [harness.number(value) for value in values] == shown


def test_a_table_is_markdown_with_aligned_columns():
    text = harness.table(["name", "us"], [["a", "1.00"], ["long name", "12.0"]])
    assert text.splitlines() == [
        "| name      |   us |",
        "|-----------|-----:|",
        "| a         | 1.00 |",
        "| long name | 12.0 |",
    ]


def test_a_section_of_a_document_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n<!-- step:begin -->\nold\n<!-- step:end -->\nB\n")
    harness.replace_section(page, "step", "new\n")
    assert page.read_text() == "# A\n<!-- step:begin -->\nnew\n<!-- step:end -->\nB\n"
    with pytest.raises(ValueError, match="order:begin"):
        harness.replace_section(page, "order", "new")


# -- both benches run ------------------------------------------------------------------------------


def invoke(module, *arguments):
    result = CliRunner().invoke(module.main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_bench_step_runs(tmp_path):
    pytest.importorskip("diffusers", reason="the rival; pip install 'fastdiff-engine[bench]'")
    out, page = tmp_path / "step.jsonl", tmp_path / "page.md"
    page.write_text("<!-- step:begin -->\n<!-- step:end -->\n")
    arguments = ["--shape", "1,4,64,64", "--steps", 6, "--seconds", 0, "--rounds", 1]
    arguments += ["--large", 0.5, "--large-threads", 1, "--out", out, "--docs", page]
    before = torch.get_num_threads()
    output = invoke(load("bench_step"), *arguments)
    assert torch.get_num_threads() == before
    small = {r["rival"]: r for r in records(out) if r["bench"] == "step"}
    large = {r["rival"]: r for r in records(out) if r["bench"] == "step-large"}
    assert len(small) == 11
    assert all(0 < r["best"] <= r["median"] <= r["p80"] for r in small.values())
    numel = 2**17
    moved = {name: r["moved"] / numel / 4 for name, r in large.items()}
    assert moved["copy_"] == moved["mul_, in place"] == 2
    assert moved["fastdiff dpmpp-2m"] == 5
    assert moved["fastdiff deis-3"] == 6
    assert moved["fastdiff ddim"] == moved["fastdiff ddim, eta = 1"] == 3
    assert "[1,4,64,64]" in output
    assert "1/30" in output  # every target stands beside its ratio
    assert "copy_" in page.read_text()


def test_bench_step_times_nothing_on_a_red_gate(monkeypatch):
    pytest.importorskip("diffusers", reason="the rival; pip install 'fastdiff-engine[bench]'")
    bench = load("bench_step")

    def shut(*arguments):
        raise harness.GateError("shut")

    monkeypatch.setattr(bench, "gate", shut)
    monkeypatch.setattr(bench, "small", lambda *arguments: pytest.fail("it timed"))
    result = CliRunner().invoke(bench.main, ["--large", "0"])
    assert isinstance(result.exception, harness.GateError)
    assert "us a step" not in result.output


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_bench_order_runs_beside_diffusers(tmp_path):
    pytest.importorskip("diffusers", reason="the rival; pip install 'fastdiff-engine[bench]'")
    out = tmp_path / "order.jsonl"
    arguments = ["--problems", "mixture", "--solvers", "ddim,heun,dpmpp-2m,dpm-3", "--nfe", "6,8"]
    arguments += ["--reference", 60, "--out", out, "--images", tmp_path]
    output = invoke(load("bench_order"), *arguments)
    by = {(r["solver"], r["grid"], r["rival"]): r["error"] for r in records(out)}
    assert len(by) == 4 * 2 * 2
    for grid in ("logsnr", "uniform"):
        ours, theirs = (by["ddim", grid, rival] for rival in ("fastdiff", "diffusers"))
        assert set(ours) == set(theirs) == {"6", "8"}
        assert ours["8"] == pytest.approx(theirs["8"], rel=1e-3)
        # dpm-3 spends 3 evaluations a step: it has no 8
        assert set(by["dpm-3", grid, "fastdiff"]) == {"6"}
    assert "grid `logsnr`" in output
    assert (tmp_path / "accuracy-mixture.png").stat().st_size > 1000


def test_bench_order_runs_without_diffusers(tmp_path):
    out = tmp_path / "order.jsonl"
    arguments = ["--problems", "mixture", "--solvers", "ddim,euler,deis-3", "--nfe", "5"]
    arguments += ["--reference", 60, "--grids", "uniform", "--no-diffusers", "--out", out]
    output = invoke(load("bench_order"), *arguments)
    assert {(r["solver"], r["rival"]) for r in records(out)} == {
        (solver, "fastdiff") for solver in ("ddim", "euler", "deis-3")
    }
    assert "`ddim` stands for `euler`" in output


def test_a_budget_that_cannot_be_spent_has_no_plan():
    bench = load("bench_order")
    assert bench.plan_of("heun", 5, "uniform", "epsilon") is None
    assert bench.plan_of("deis-4", 3, "uniform", "epsilon") is None
    assert bench.plan_of("deis-rk4", 8, "uniform", "epsilon").steps == 2


# -- the stage -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_bench_stage_runs(tmp_path):
    out, summary = tmp_path / "stage.jsonl", tmp_path / "stage.md"
    page = tmp_path / "page.md"
    page.write_text("<!-- stage:begin -->\n<!-- stage:end -->\n")
    arguments = ["--device", "cpu", "--largest", 0.0625, "--seconds", 0, "--rounds", 1]
    arguments += ["--out", out, "--summary", summary, "--docs", page, "--commit", "abc"]
    output = invoke(load("bench_stage"), *arguments)
    lines = [r for r in records(out) if not r["rival"].startswith("diffusers")]
    assert len(lines) == 6 * 4  # six rows at 4 KiB; copy_, eager torch, cpu and torch
    assert {r["commit"] for r in lines} == {"abc"}
    back = {(r["outputs"], r["rival"]): r for r in lines if r["backward"]}
    lines = [r for r in lines if not r["backward"]]
    by = {(r["outputs"], r["network"], r["noise"], r["rival"]): r for r in lines}
    # 1024 elements: x twice, the output, H1 and the push
    assert by[2, "float32", False, "fastdiff cpu"]["moved"] == 5 * 4096
    assert by[2, "float32", True, "fastdiff cpu"]["moved"] == 5 * 4096
    # an output read and an input written in half the size
    assert by[2, "bfloat16", False, "fastdiff cpu"]["moved"] == 4 * 4096 + 2 * 2048
    # one more H; two outputs and two inputs
    assert by[3, "bfloat16", True, "fastdiff cpu"]["moved"] == 5 * 4096 + 4 * 2048
    # x, h_bar twice, the product and the next one's cotangent
    assert back[2, "fastdiff cpu"]["moved"] == 6 * 4096
    # an earlier x_bar as well, and this one kept; two products and two cotangents
    assert back[3, "fastdiff cpu"]["moved"] == (5 + 3 + 2) * 4096
    assert all(r["share"] > 0 for r in (*lines, *back.values()))
    assert "not measured" in output  # nothing of 64 MiB
    assert "not measured" in summary.read_text()
    assert "copy_" in page.read_text()


def test_bench_stage_has_every_row_once_and_the_weightiest_first():
    bench = load("bench_stage")
    assert len(bench.all_cases()) == 4 * 2 * 2 * 2 + 4 * 2
    assert sum(case.backward for case in bench.all_cases()) == 4 * 2
    full = bench.cells(False, 1024 * bench.MIB)
    assert len(full) == len(set(full))
    assert full[: len(bench.CHOSEN) * 3] == bench.cells(True, 1024 * bench.MIB)
    shapes = {shape for case, shape in full if case == bench.Case()}
    assert shapes == {(1, s // 4) for s in bench.SIZES} | set(bench.TINY)
    at_64 = {case for case, shape in full if shape == (1, bench.LARGE // 4)}
    assert at_64 == set(bench.all_cases())
    assert {shape for _, shape in bench.cells(False, bench.MIB)} == {
        *((1, s // 4) for s in bench.SIZES[:3]),
        (4096, 64),
    }


def test_the_rivals_of_a_stage_compute_what_it_computes():
    bench = load("bench_stage")
    for case in (c for c in bench.all_cases() if not c.noise):
        registers, out = bench.registers_of(case, (2, 64), torch.device("cpu"))
        kept = [
            t for t in (registers.x, registers.e, registers.history, registers.m) if t is not None
        ]
        starts = [t.clone() for t in kept]

        def again(kept=kept, starts=starts):
            for register, start in zip(kept, starts, strict=True):
                register.copy_(start)

        bench.bind("torch", case, registers)(case.row, out, None)
        moved = [t.clone() for t in kept]
        again()
        write = bench.eager_of(case)
        compiled = write(case, registers, out, compiled=bench.update_of(case))
        compiled.run_compiled()
        torch.testing.assert_close(registers.x, moved[0])
        if case.backward:
            torch.testing.assert_close(registers.e, moved[1])
        again()
        # the forward rival's history holds h / p, and weighs it by b p
        if registers.history is not None and not case.backward:
            registers.history.div_(bench.P)
        write(case, registers, out)()
        whole = case.backward or registers.history is None
        for register, wanted in list(zip(kept, moved, strict=True))[: None if whole else 1]:
            torch.testing.assert_close(register, wanted)


def test_a_stage_that_differs_by_a_bit_is_not_timed(monkeypatch):
    bench = load("bench_stage")
    cpu = torch.device("cpu")
    bench.gate(bench.CHOSEN[-1], cpu)
    monkeypatch.setattr(bench, "available", lambda device: ["wrong"])
    real = bench.backends.get("cpu")

    class Wrong:
        missing = staticmethod(lambda: None)

        @staticmethod
        def bind(registers, table, layout):
            registers.x.view(torch.int32)[0, 0] += 1024
            return real.bind(registers, table, layout)

    monkeypatch.setattr(bench.backends, "get", lambda name: Wrong if name == "wrong" else real)
    with pytest.raises(harness.GateError, match="to the bit"):
        bench.gate(bench.Case(), cpu)
    monkeypatch.setattr(bench, "measure", lambda *a: pytest.fail("it timed"))
    arguments = ["--device", "cpu", "--largest", "0.0625", "--seconds", "0", "--rounds", "1"]
    result = CliRunner().invoke(bench.main, arguments)
    assert result.exit_code == 1
    assert "6 rows did not pass the gate" in result.output


def test_triton_passes_the_gate_of_the_stage(monkeypatch):
    triton = pytest.importorskip("triton", reason="pip install triton")
    if torch.cuda.is_available() or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("for the interpreter of triton 3.9 or newer, which fuses fma")
    bench = load("bench_stage")
    monkeypatch.setattr(bench, "available", lambda device: ["triton", "torch"])
    for case in bench.CHOSEN:
        bench.gate(case, torch.device("cpu"), (2, 80))


def test_a_rival_that_fails_leaves_the_others(monkeypatch, tmp_path):
    bench = load("bench_stage")
    monkeypatch.setattr(bench, "CHOSEN", bench.CHOSEN[:1])

    def broken(case):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(bench, "compiled_update", broken)
    arguments = ["--device", "cpu", "--largest", "0.0625", "--seconds", "0", "--rounds", "1"]
    result = CliRunner().invoke(bench.main, [*arguments, "--compile"])
    assert result.exit_code == 1
    assert "Failed: torch.compile, M=2 G=1 float32, 4 KiB: RuntimeError: no compiler" in (
        result.output
    )
    assert "fastdiff cpu" in result.output


def test_a_turn_on_cuda_times_the_device_and_the_host_apart(monkeypatch):
    bench, log = load("bench_stage"), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 6.0  # ms

    monkeypatch.setattr(bench.torch.cuda, "Event", Event)
    monkeypatch.setattr(bench.torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(bench.torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    ticks = iter([1.0, 4.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    calls = [lambda: log.append("a"), lambda: log.append("b")]
    assert bench._cuda_turn(calls, 3, 1e-5) == (0.002, 1.0)
    assert log == ["wait", "sleep", "record", "a", "b", "a", "record", "wait"]


def test_a_target_is_held_against_the_worst_cell():
    bench = load("bench_stage")

    def line(rival, shape, noise=False, share=0.0, host=1.0, backward=False):
        return {
            "rival": rival,
            "shape": shape,
            "noise": noise,
            "backward": backward,
            "share_median": share,
            "host": host,
        }

    large, small = [1, 2**24], [1, 1024]
    found = [
        line("fastdiff cuda", large, share=0.95),
        line("fastdiff cuda", large, share=0.89),
        line("fastdiff triton", large, share=0.91, noise=True),
        line("fastdiff triton", large, share=0.85, backward=True),
        line("fastdiff cuda", small, host=7.9, share=0.1),
        line("fastdiff triton", small, host=12.0),
        line(bench.LAUNCHER, small, host=8.0),
    ]
    rows = bench.targets(found, "cuda").splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(c[2], c[3]) for c in cells] == [
        ("0.890 (worst of 2)", "not met"),
        *[("", "not measured")] * 3,
        ("0.910 (worst of 1)", "met"),
        ("0.850 (worst of 1)", "not met"),
        ("7.90 (worst of 1)", "met"),
        ("12.0 (worst of 1)", "met"),
    ]
    assert cells[7][1] == "under 13.0"


# -- whole loops -----------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_bench_loop_runs(tmp_path):
    out, summary, page = (tmp_path / name for name in ("loop.jsonl", "loop.md", "page.md"))
    page.write_text("<!-- loop:begin -->\n<!-- loop:end -->\n")
    arguments = ["--device", "cpu", "--case", "null", "--case", "mlp", "--no-compile"]
    arguments += ["--seconds", 0, "--rounds", 1, "--commit", "abc"]
    arguments += ["--out", out, "--summary", summary, "--docs", page]
    before = torch.get_num_threads()
    output = invoke(load("bench_loop"), *arguments)
    assert torch.get_num_threads() == before
    lines = [r for r in records(out) if not r["rival"].startswith("diffusers")]
    assert {(r["network"], r["rival"]) for r in lines} == {
        ("null", "fastdiff eager"),
        ("mlp", "fastdiff eager"),
        ("mlp", "network alone"),
    }
    assert all(r["median"] > 0 and r["timing"] == "waited" for r in lines)
    assert {(r["commit"], r["device"], r["backend"]) for r in lines} == {("abc", "cpu", "cpu")}
    # no figure of a GPU: every target is not measured, and no graph stands in the table
    assert output.count("not measured") == 7
    assert "graph" not in {word for r in lines for word in r["rival"].split()}
    assert "MLP [1,16], 10 steps" in page.read_text()
    assert summary.read_text() in output


def test_bench_loop_leaves_out_what_needs_diffusers(monkeypatch):
    bench, made = load("bench_loop"), []
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)

    def measure(cell, setting, lost):
        made.append((cell.case.kind, setting.diffusers))
        return []

    monkeypatch.setattr(bench, "measure", measure)
    output = invoke(bench, "--device", "cpu")
    assert {kind for kind, _ in made} == {"null", "mlp", "conv"}
    assert not any(there for _, there in made)
    assert "its networks: DiT-S/2 [1,4,32,32], 20 steps; small SD U-Net" in output
    parts = bench.parts_of(bench.Case("mlp", (2, 16), 4), CPU)
    cell = bench.Cell(parts.case)
    assert set(bench.makers(cell, parts, False)) == {bench.NETWORK, bench.EAGER}


def test_cells_of_loops_come_once_and_compilers_last():
    bench = load("bench_loop")
    for place in ("cpu", "cuda"):
        full = bench.cells(place, False, True)
        assert len(full) == len(set(full))
        assert [cell.compiled for cell in full] == sorted(cell.compiled for cell in full)
        shapes = {c.case.shape for c in full if c.case.kind == "mlp"}
        assert shapes == {(1, 16), (16, 16), (256, 16)}
        assert {c.case.shape[2] for c in full if c.case.kind == "conv"} == {2, 14}
        assert {c.case.small for c in full if c.case.kind == "unet"} == {place == "cpu"}
    assert {c.case.kind for c in bench.cells("cuda", True, False)} == set(bench.TITLES)
    assert bench.cells("cpu", True, True, ["mlp"]) == [
        bench.Cell(bench.Case("mlp", (1, 16), 10)),
        bench.Cell(bench.Case("mlp", (1, 16), 10), True),
    ]


def test_a_budget_leaves_out_cells_and_says_which(monkeypatch):
    bench = load("bench_loop")
    monkeypatch.setattr(bench, "measure", lambda *arguments: pytest.fail("it ran"))
    output = invoke(bench, "--device", "cpu", "--case", "null", "--budget", 4)
    assert "The budget of 4 s left out null [1,4,64,64], 20 steps." in output


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize("kind", ["null", "mlp", "conv"])
def test_the_rivals_of_a_loop_end_where_it_ends(kind, recorder):
    bench, made = load("bench_loop"), recorder
    shape = {"null": (2, 3, 4, 4), "mlp": (2, 16), "conv": (2, 16, 3)}[kind]
    parts = bench.parts_of(bench.Case(kind, shape, 5, small=True), CPU)
    loops = {
        bench.EAGER: bench.ours(parts, None),
        bench.STAGE: bench.ours(parts, "stage"),
        bench.LOOP: bench.ours(parts, "loop"),
        bench.REPLAY: bench.replay_alone(parts),
        bench.NETWORK: bench.alone(parts),
    }
    if importlib.util.find_spec("diffusers"):
        loops[bench.THEIRS] = bench.theirs(parts)
    with torch.no_grad():
        wanted = bench.reference(parts)
        bench.gate(parts, loops, wanted)
        launched = made.launched
        loops[bench.REPLAY]()
        assert made.launched == launched + 1
        assert loops[bench.NETWORK]() is None


def test_a_wrong_loop_is_not_timed(monkeypatch):
    bench = load("bench_loop")
    parts = bench.parts_of(bench.Case("mlp", (2, 16), 10), CPU)
    wrong = fd.sample(
        parts.network, parts.start, load("bench_step").plan("ddim", 10), cond=parts.cond
    )
    with pytest.raises(harness.GateError, match=r"diffusers eager, MLP \[2,16\]"):
        bench.gate(parts, {bench.THEIRS: lambda: wrong}, bench.reference(parts))
    monkeypatch.setattr(bench, "reference", lambda parts: 1.001 * parts.start)
    monkeypatch.setattr(bench.harness, "race", lambda *a, **k: pytest.fail("it timed"))
    result = CliRunner().invoke(bench.main, ["--device", "cpu", "--case", "null"])
    assert result.exit_code == 1
    assert "1 cells did not pass the gate" in result.output
    assert "fastdiff eager |" not in result.output


def test_a_loop_that_fails_leaves_the_others(monkeypatch):
    bench = load("bench_loop")

    def broken(*arguments):
        raise RuntimeError("no such step")

    monkeypatch.setattr(bench, "theirs", broken)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    arguments = ["--device", "cpu", "--case", "null", "--seconds", "0", "--rounds", "1"]
    result = CliRunner().invoke(bench.main, arguments)
    assert result.exit_code == 1
    assert "Failed: diffusers eager, null [1,4,64,64], 20 steps: RuntimeError: no such step" in (
        result.output
    )
    assert "fastdiff eager |" in result.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_loops_compiled_whole_end_where_the_reference_does():
    bench = load("bench_loop")
    parts = bench.parts_of(bench.Case("mlp", (2, 16), 3), CPU)
    with torch.no_grad():
        cell = bench.Cell(parts.case, True)
        loops = {name: make() for name, make in bench.makers(cell, parts, False).items()}
        assert set(loops) == {
            *(bench.COMPILED, bench.OURS_COMPILED),
            *(bench.AS_ONE, bench.TRACED, bench.OPERATOR),
        }
        bench.gate(parts, loops, bench.reference(parts))


def test_the_stage_operator_follows_registers_that_were_copied():
    bench = load("bench_loop")
    x, history, seen = torch.zeros(2), torch.zeros(1, 2), []

    def run(row, out, xi):
        seen.append((row, x.clone()))
        x.add_(out)
        history.fill_(7.0)

    bench._bound.append((run, x, history))
    copy, kept = torch.ones(2), torch.zeros(1, 2)
    bench._run_stage(len(bench._bound) - 1, 3, copy, kept, torch.full((2,), 2.0))
    bench._bound.pop()
    assert seen[0][0] == 3
    assert torch.equal(seen[0][1], torch.ones(2))
    assert torch.equal(copy, torch.full((2,), 3.0))
    assert torch.equal(kept, torch.full((1, 2), 7.0))


def test_a_turn_waits_for_the_end_of_its_loops(monkeypatch):
    bench, log = load("bench_loop"), []
    monkeypatch.setattr(bench.torch.cuda, "synchronize", lambda device: log.append("wait"))
    loop = lambda: log.append("loop")  # noqa: E731
    bench.loops_in_a_turn(loop, 3, torch.device("cuda", 0))()
    assert log == ["loop", "loop", "loop", "wait"]
    bench.loops_in_a_turn(loop, 1, CPU)()
    assert log[4:] == ["loop"]


def test_a_network_is_warmed_on_a_side_stream_before_it_is_captured(monkeypatch):
    bench, log, here = load("bench_loop"), [], ["main"]

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def on(where):
        before, here[0] = here[0], where
        yield
        here[0] = before

    cuda = bench.torch.cuda
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(cuda, "stream", lambda stream: on(stream.name))
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "graph", lambda graph: on("capture"))
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: log.append("clear"), raising=False)
    parts = bench.parts_of(bench.Case("mlp", (2, 16), 4), CPU)
    inner, outputs = parts.network.forward, []

    def forward(x, t, obs):
        log.append(here[0])
        outputs.append(inner(x, t, obs))
        return outputs[-1]

    parts.network.forward = forward
    graphed = bench.Graphed(parts)
    warm = ["side waits for main", "side", "side", "side", "main waits for side"]
    assert log == [*warm, "clear", "capture", "clear"]
    x, t = torch.randn(2, 16), torch.full((2,), 5)
    assert graphed(x, t, **parts.cond) is outputs[-1]
    assert log[-1] == "replay"
    assert torch.equal(graphed.x, x)
    assert torch.equal(graphed.t, t)


def test_on_cuda_loops_are_timed_waited_for_and_in_queues(monkeypatch):
    bench = load("bench_loop")
    parts = bench.parts_of(bench.Case("null", (1, 3), 4), CPU)
    monkeypatch.setattr(bench, "parts_of", lambda case, device: parts)
    slow = bench.ours(parts, None)

    def makers(cell, parts, with_diffusers):
        def sleeping():
            bench.time.sleep(0.011)
            return slow()

        return {bench.EAGER: lambda: bench.ours(parts, None), bench.LOOP: lambda: sleeping}

    turns = []

    def turn(loop, count, device):
        turns.append(count)
        return loop

    monkeypatch.setattr(bench, "makers", makers)
    monkeypatch.setattr(bench, "_wait", lambda device: None)
    monkeypatch.setattr(bench, "loops_in_a_turn", turn)
    monkeypatch.setattr(bench.backends, "choose", lambda *a: bench.backends.get("cpu"))
    setting = bench.Setting(torch.device("cuda", 0), 1, 0.0, False, (("device", "cuda"),))
    lines = bench.measure(bench.Cell(parts.case), setting, [])
    assert [(r["rival"], r["timing"]) for r in lines] == [
        *((bench.EAGER, "waited"), (bench.LOOP, "waited")),
        (bench.EAGER, "queued"),  # the slow one fills a turn by itself
    ]
    assert turns[:2] == [1, 1]
    assert len(turns) == 3
    assert 1 < turns[2] <= 64
    assert "queued: median" in bench.report(lines, "cuda")


def line_of_loop(bench, case, rival, median, timing="waited", device="cuda"):
    numbers = dict.fromkeys(("best", "p20", "median", "p80"), median)
    where = {"rival": rival, "timing": timing, "device": device, "compiled": False}
    kind = {"network": case.kind, "shape": list(case.shape), "steps": case.steps}
    return {**where, **kind, "dtype": "float32", "small": False, "parameters": 0, **numbers}


def test_targets_of_loops_are_met_or_not_or_not_measured():
    bench = load("bench_loop")
    null, mlp = bench.Case("null", (1, 4, 64, 64), 20), bench.Case("mlp", (1, 16), 10)
    found = [
        line_of_loop(bench, null, bench.REPLAY, 2.9, "queued"),
        line_of_loop(bench, null, bench.LOOP, 3.1),
        line_of_loop(bench, mlp, bench.LOOP, 12.0),
        line_of_loop(bench, mlp, bench.LOOP, 12.0, "queued"),
        line_of_loop(bench, mlp, bench.THEIRS, 130.0),
        line_of_loop(bench, mlp, bench.CAPTURED, 9.9),
        line_of_loop(bench, mlp, bench.CAPTURED, 10.1, "queued"),
    ]

    def shown(lines):
        rows = [row.strip("|").split("|") for row in bench.targets(lines).splitlines()[2:]]
        return [(cells[2].strip(), cells[3].strip()) for cells in rows]

    none = ("", "not measured")
    assert shown(found) == [
        *(("2.90 us", "met"), ("62.0 us", "not met"), none, ("10.8", "met"), none),
        *(("21.0 us", "not met"), ("19.0 us", "met")),
    ]
    assert shown([{**line, "device": "cpu"} for line in found]) == [none] * 7
    # 5 % of a slow network is more than 2 us a stage
    slow = [
        line_of_loop(bench, mlp, bench.LOOP, 104.0),
        line_of_loop(bench, mlp, bench.CAPTURED, 100.0),
    ]
    assert shown(slow)[5] == ("40.0 us", "met")


def test_the_networks_own_time_is_that_of_its_kind():
    bench = load("bench_loop")
    mlp, null = bench.Case("mlp", (1, 16), 10), bench.Case("null", (1, 4, 64, 64), 20)
    times = {bench.NETWORK: 50.0, bench.CAPTURED: 9.0, bench.EAGER: 60.0, bench.LOOP: 10.0}
    found = [line_of_loop(bench, mlp, name, us) for name, us in times.items()]
    found += [line_of_loop(bench, null, bench.LOOP, 2.0)]
    found += [line_of_loop(bench, mlp, bench.GRAPHED, 30.0, "queued")]
    extra = bench.beyond(found, "median")
    by = {(key[0].kind, key[3]): value for key, value in extra.items()}
    assert by == {
        ("mlp", bench.EAGER): 10.0,
        ("mlp", bench.LOOP): 1.0,
        ("null", bench.LOOP): 2.0,
    }
    report = bench.report(found, "cuda")
    assert "1.00 / 1.00" in report


# -- gradients -------------------------------------------------------------------------------------


def test_the_mixture_to_differentiate_is_the_librarys():
    bench = load("bench_gradients")
    order, network = load("bench_order"), bench.Mixture()
    x, t = torch.randn(5, 8, dtype=torch.float64), torch.linspace(0.05, 1.0, 5).double()
    for z in (torch.zeros(2), torch.tensor([0.3, -0.2])):
        means = network.means * (1 + z[0]) + z[1] * network.moves
        model = fd.models.GaussianMixture(order.WEIGHTS, means, order.VARIANCES)
        got = network(x, t, z.double().expand(5, 2))
        torch.testing.assert_close(got, model.network(bench.VP)(x, t))


def test_errors_are_medians_over_samples_and_of_parameters_in_all():
    bench = load("bench_gradients")
    exact = {"x": torch.eye(3), "theta": torch.tensor([3.0, 4.0])}
    found = {"x": torch.diag(torch.tensor([1.1, 1.0, 9.0])), "theta": torch.tensor([3.0, 4.5])}
    errors = bench.apart(found, exact)
    assert errors["x"] == pytest.approx(0.1)
    assert errors["theta"] == pytest.approx(0.1)


def test_gradients_are_gated_before_they_are_measured(monkeypatch):
    bench = load("bench_gradients")
    bench.gate()
    real = bench.gradients

    def wrong(flow, plan, gradient, **options):
        found = real(flow, plan, gradient, **options)
        if gradient == fd.AdjointDEIS(2):
            found["theta"] = 1.02 * found["theta"]
        return found

    monkeypatch.setattr(bench, "gradients", wrong)
    monkeypatch.setattr(bench, "measure_time", lambda *a: pytest.fail("it timed"))
    result = CliRunner().invoke(bench.main, ["--part", "time", "--device", "cpu"])
    assert isinstance(result.exception, harness.GateError)
    assert "AdjointDEIS(2), of theta" in str(result.exception)


def test_a_wrong_torchdiffeq_is_refused(monkeypatch):
    pytest.importorskip("torchdiffeq", reason="the rival; pip install 'fastdiff-engine[bench]'")
    bench = load("bench_gradients")
    real = bench.InLambda.forward
    monkeypatch.setattr(bench.InLambda, "forward", lambda self, lam, x: 0.9 * real(self, lam, x))
    with pytest.raises(harness.GateError, match="torchdiffeq dopri5"):
        bench.gate()


def test_a_case_with_a_wrong_gradient_is_not_timed(monkeypatch):
    bench = load("bench_gradients")
    real = bench.by_library

    def wrong(flow, plan, gradient, network=None, graph=None):
        run = real(flow, plan, gradient, network, graph)
        if network is None:
            return run
        return lambda: [g if g is None else 1.01 * g for g in run()]

    monkeypatch.setattr(bench, "gate", lambda: None)
    monkeypatch.setattr(bench, "cases", lambda place, short: [bench.Case("digits", 2)])
    monkeypatch.setattr(bench, "by_library", wrong)
    monkeypatch.setattr(bench.harness, "race", lambda *a, **k: pytest.fail("it timed"))
    arguments = ["--part", "time", "--device", "cpu", "--steps", "2", "--no-torchdiffeq"]
    result = CliRunner().invoke(bench.main, arguments)
    assert result.exit_code == 1
    assert "Gate: backprop, checkpointed by step, of x" in result.output
    assert "1 cases did not pass the gate" in result.output


def test_a_solver_that_asks_for_too_many_calls_is_stopped():
    pytest.importorskip("torchdiffeq", reason="the rival; pip install 'fastdiff-engine[bench]'")
    bench = load("bench_gradients")
    flow = bench.mixture(2)
    found, calls = bench.their_gradients(flow, **bench.stepped(flow, "midpoint", 3))
    assert calls == 3 * 2 * 2
    assert len(found) == 3  # of x, z and the means
    with pytest.raises(bench.Exhausted, match="more than 11 calls"):
        bench.their_gradients(flow, 11, **bench.stepped(flow, "midpoint", 3))


def test_ours_stands_beside_the_best_within_as_many_calls():
    bench = load("bench_gradients")
    ours, other = bench.HELD[0], "discrete, ddim"
    points = {
        ours: {10: 0.5, 20: 0.1},
        other: {10: 0.2, 20: 0.15},
        "torchdiffeq rk4": {8: 0.4, 16: 0.3},
        "torchdiffeq midpoint": {12: 0.05, 24: 0.01},
    }
    budgets = [6, 10, 20]
    assert bench.best_of(points, bench.THEIR_BEST, budgets) == {10: 0.4, 20: 0.05}
    assert bench.best_of(points, bench.OUR_BEST, budgets) == {10: 0.2, 20: 0.1}
    assert bench.best_of(points, "torchdiffeq rk4", budgets) == {10: 0.4, 20: 0.3}
    assert bench.factors(points, ours, budgets) == pytest.approx({10: 0.8, 20: 0.5})
    assert bench.factors(points, bench.OUR_BEST, budgets) == pytest.approx({10: 2.0, 20: 0.5})


def line_of_gradients(part, rival, value, steps=20, theta=False, device="cpu"):
    numbers = dict.fromkeys(("best", "p20", "median", "p80"), value)
    where = {"part": part, "rival": rival, "device": device, "network": "digits", "theta": theta}
    return {**where, "shape": [16, 1, 8, 8], "steps": steps, **numbers}


def test_targets_of_gradients_are_met_or_not_or_not_measured():
    bench = load("bench_gradients")
    state, mib = 16 * 64 * 4, 2**20
    found = [
        line_of_gradients("time", bench.BARE, 100.0),
        line_of_gradients("time", bench.DISCRETE, 109.0),
        line_of_gradients("time", bench.CHECKPOINTED, 108.0),
        line_of_gradients("time", bench.BARE, 100.0, theta=True),
        line_of_gradients("time", bench.DISCRETE, 111.0, theta=True),
    ]
    for theta, kept in ((False, 0), (True, mib // 50)):
        for steps in (10, 100):
            of_ours = mib + steps * (state + kept)
            found.append(line_of_gradients("memory", bench.DISCRETE, of_ours, steps, theta))
            whole = mib + steps * (state + mib)
            found.append(line_of_gradients("memory", bench.BACKPROP, whole, steps, theta))
    errors = {
        "mixture": {bench.HELD[0]: {10: 0.1, 200: 0.1}, "torchdiffeq rk4": {10: 0.2, 160: 0.05}},
        "digits": {bench.HELD[0]: {10: 0.1, 20: 0.1}, "torchdiffeq rk4": {10: 0.3, 16: 0.05}},
        "empirical": {bench.HELD[0]: {10: 0.1}},
    }

    def shown(lines, errors):
        rows = bench.targets(lines, errors, [10, 20, 200]).splitlines()[2:]
        rows = [row.strip("|").split("|") for row in rows]
        return [(cells[2].strip(), cells[3].strip()) for cells in rows]

    verdicts = shown(found, errors)
    assert verdicts[:5] == [
        ("1.090 / 1.090", "met"),
        ("1.110 / 1.110", "not met"),
        ("1.009 of it", "not met"),
        ("0", "met"),
        ("0.0200", "not met"),
    ]
    # 200 evaluations are past the target; at 20 torchdiffeq is closer
    assert verdicts[5] == ("2.00 to 2.00", "met")
    assert verdicts[7] == ("0.500 to 3.00; not at 20", "not met")
    assert verdicts[9:] == [("", "not measured")] * 2
    cuda = [{**line, "device": "cuda"} for line in found]
    assert shown(cuda, {})[:2] == [("", "not measured")] * 2


def test_memory_counts_what_lives():
    bench = load("bench_gradients")
    with bench.Peak() as peak:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # the same memory
        del a, b
        c = torch.ones(500)
    assert (peak.most, peak.now) == (4000, 2000)
    del c
    assert peak.now == 0


def test_memory_grows_as_the_case_says():
    bench = load("bench_gradients")
    setting = bench.Setting(CPU, 1, 0.0, False, (("device", "cpu"),))
    lines = bench.measure_memory(bench.Case("digits", 2), setting, lost := [], (2, 4))
    assert lost == []
    grown = {rival: bench._growth(by) for (_, rival), by in bench.peaks(lines).items()}
    state = 2 * 64 * 4
    assert grown[bench.DISCRETE] < 3 * state < 50 * state < grown[bench.BACKPROP]
    assert grown[bench.CHECKPOINTED] < 3 * state
    assert "states a step" in bench.report_memory(lines)


def test_a_fine_path_has_the_noise_of_the_coarse_one():
    bench = load("bench_gradients")
    flow = bench.Flow("", lambda x, t: torch.full_like(x, 0.3), "x0", torch.randn(3, 4).double())
    plan = bench.plan_of(flow, "ddim", 4, eta=1.0)
    fine, xi = bench.path_of(flow, plan, 8, seed=0)
    assert len(fine.stages) == len(xi) == 4 * 8
    # the network says the same everywhere, so both end where the path takes them
    ends = [fd.sample(flow.network, flow.start, plan, seed=0)]
    ends += [fd.sample(flow.network, flow.start, fine, xi=xi)]
    torch.testing.assert_close(*ends)
    assert 0.9 < float(torch.stack(xi).std()) < 1.1


def test_captured_gradients_are_rivals_too(recorder):
    bench = load("bench_gradients")
    case = bench.Case("mlp", 2, steps=4)
    flow = bench.flow_of(case, CPU)
    plan = bench.plan_of(flow, "dpmpp-2m", 4)
    runs = {
        bench.BACKPROP: bench.by_library(flow, plan, "backprop"),
        bench.CAPTURED: bench.by_library(flow, plan, "discrete", graph="loop"),
    }
    bench.gate_case(flow, runs)
    assert bench.is_exact(bench.CAPTURED)
    assert not bench.is_exact(bench.ADJOINT_CAPTURED)


def test_a_gradient_that_fails_leaves_the_others(monkeypatch):
    bench = load("bench_gradients")

    def broken(network):
        raise RuntimeError("no checkpoints here")

    monkeypatch.setattr(bench, "recomputed", broken)
    case = bench.Case("mlp", 1, steps=3)
    runs = bench.made(case, bench.flow_of(case, CPU), False, lost := [])
    assert lost == [f"{bench.CHECKPOINTED}, {case}: RuntimeError: no checkpoints here"]
    assert {bench.DISCRETE, bench.BACKPROP} <= set(runs)


def test_a_transformer_of_dits_size_keeps_its_shape():
    bench = load("bench_gradients")
    network = bench.Dit(width=48, depth=2, heads=2, size=8)
    assert network(torch.randn(3, 4, 8, 8), torch.rand(3)).shape == (3, 4, 8, 8)


@pytest.mark.parametrize("theirs", [True, False])
def test_bench_gradients_runs(tmp_path, monkeypatch, theirs):
    bench = load("bench_gradients")
    there = bench.has_torchdiffeq()
    if theirs and not there:
        pytest.skip("torchdiffeq is missing: pip install 'fastdiff-engine[bench]'")
    if not theirs:
        monkeypatch.setattr(bench, "has_torchdiffeq", lambda: False)
    monkeypatch.setattr(bench, "cases", lambda place, short: [bench.Case("mlp", 2)])
    monkeypatch.setattr(bench, "memory_cases", lambda place: [bench.Case("mlp", 2)])
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "page.md", "docs.md"))
    marks = [f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in ("gradients", "adjoint")]
    page.write_text("".join(marks))
    arguments = ["--device", "cpu", "--problem", "mixture", "--fine", 20, "--steps", 3]
    arguments += ["--memory-steps", "3,4", "--evaluations", "8,12", "--table-steps", "4"]
    arguments += ["--seconds", 0, "--rounds", 1, "--commit", "abc", "--out", out]
    arguments += ["--summary", summary, "--docs", page, "--images", tmp_path]
    before = torch.get_num_threads()
    output = invoke(bench, *arguments)
    assert torch.get_num_threads() == before
    lines = records(out)
    by_part = {part: [r for r in lines if r["part"] == part] for part in bench.PARTS}
    assert {r["commit"] for r in lines} == {"abc"}
    named = {r["rival"] for r in by_part["time"]}
    assert {bench.BARE, bench.DISCRETE, bench.BACKPROP, bench.CHECKPOINTED} <= named
    assert all(r["median"] > 0 for r in by_part["time"])
    assert {r["steps"] for r in by_part["memory"]} == {3, 4}
    errors = {r["rival"]: r["error"] for r in by_part["error"]}
    # as many evaluations forward and backward
    assert all(set(errors[name]) == {"8", "12"} for name in bench.OURS)
    assert any(name.startswith("torchdiffeq") for name in (*named, *errors)) == theirs
    table = {(r["problem"], r["grid"], r["of"]) for r in by_part["table"]}
    leaves = ("a_x", "a_z", "a_theta")
    assert table == {
        *(("mixture", grid, leaf) for grid in ("logsnr", "uniform") for leaf in leaves),
        *(("sde", "logsnr", leaf) for leaf in leaves),
    }
    assert ("torchdiffeq is not installed: its rows are left out." in output) != theirs
    first, second = page.read_text().split("<!-- adjoint:begin -->")
    assert "network evaluations" in first
    assert "order 3, epsilon" in second
    assert "states a step" in summary.read_text()
    assert (tmp_path / "gradients.png").stat().st_size > 1000


def test_a_budget_leaves_out_gradients_and_says_which(monkeypatch):
    bench = load("bench_gradients")
    monkeypatch.setattr(bench, "gate", lambda: None)
    monkeypatch.setattr(bench, "measure_time", lambda *a: pytest.fail("it ran"))
    output = invoke(bench, "--device", "cpu", "--part", "time", "--budget", 1)
    assert "The budget of 1 s left out time, digits network, batch 16, a_x." in output


# -- the GPU check ---------------------------------------------------------------------------------


def test_a_phase_that_fails_or_hangs_keeps_no_other_from_running(tmp_path):
    check, log = load("gpu_check"), tmp_path / "log"
    mark = tmp_path / "mark"
    late = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    phases = [
        check.Phase("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60),
        check.Phase("hangs", [sys.executable, "-c", hang], 0.5),
        check.Phase("absent", [str(tmp_path / "no-such-program")], 60),
        check.Phase("passes", [sys.executable, "-c", "print('well')"], 60),
    ]
    results = check.run_phases(phases, log, os.environ)
    assert [r.how for r in results[:2]] == ["failed (exit 3)", "stopped after 0.5 s"]
    assert results[2].how.startswith("failed (")
    assert [r.passed for r in results] == [False, False, False, True]
    assert (results[0].last, results[3].last) == ("why", "well")
    assert results[1].seconds < 1.9
    assert not mark.exists()
    (tmp_path / "stage.md").write_text("the stages\n")
    parts = [tmp_path / "stage.md", tmp_path / "loop.md"]
    text = check.summary({"gpu": "none"}, "short", results, parts)
    assert "| hangs | stopped after 0.5 s |" in text
    assert "## The stage benchmark\n\nthe stages\n" in text
    assert text.endswith("## The loop benchmark\n\nIt measured nothing.\n")


def test_the_phases_fit_in_their_minutes(tmp_path):
    check = load("gpu_check")
    for setting, most in (("short", 240), ("full", 480)):
        phases = check.phases_of(setting, tmp_path, False, "abc")
        names = ["build", "tests", *(f"{name} benchmark" for name in check.BENCHES)]
        assert [p.name for p in phases] == names
        assert sum(p.seconds for p in phases) < most
        for phase in phases[2:]:
            assert ("--full" in phase.command) == (setting == "full")
            # a cell that begins at the end of the budget has time to end
            budget = float(phase.command[phase.command.index("--budget") + 1])
            assert phase.seconds - budget >= 15
            assert budget > phase.seconds / 2


def test_the_gpu_check_is_refused_without_a_gpu(monkeypatch, capsys, tmp_path):
    check = load("gpu_check")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "probe", lambda: {"torch": "2.13.0+cpu", "gpu": None})
    monkeypatch.setattr(check, "run_phases", lambda *a: pytest.fail("it ran"))
    assert check.main([]) == 2
    assert "a CUDA device is needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_gpu_check_sums_up_and_fails_with_its_phases(monkeypatch, capsys, tmp_path):
    check = load("gpu_check")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("FASTDIFF_CUDA_ARCHS", raising=False)
    found = {"torch": "2.11.0", "gpu": "A GPU", "arch": "90"}
    monkeypatch.setattr(check, "probe", lambda: found)
    show = "import os; print(os.environ['FASTDIFF_CUDA_ARCHS'], 'TRITON_INTERPRET' in os.environ)"
    codes = iter([0, 1])

    def phases(setting, folder, cpu, commit):
        (folder / "stage.md").write_text("the table\n")
        (folder / "loop.md").write_text("the loops\n")
        (folder / "gradients.md").write_text("the gradients\n")
        return [check.Phase("only", [sys.executable, "-c", f"{show}; exit({next(codes)})"], 60)]

    monkeypatch.setattr(check, "phases_of", phases)
    assert check.main(["--setting", "short"]) == 0
    text = (tmp_path / "gpu-check.md").read_text()
    assert "gpu A GPU" in text
    assert "`90 False`" in text
    assert text.index("the table") < text.index("the loops") < text.index("the gradients")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu-check.log", "gpu-check.md"]
    assert check.main(["--setting", "short"]) == 1
    assert "not passed: only" in capsys.readouterr().err
