# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say: counts are exact, records complete, and both run."""

import importlib
import json
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
