# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say: no time on a red gate, exact counts, records that read."""

import ast
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fastdiff as fd
from fastdiff.bench import gate, machine, memory, records, runs, timing, traffic

ROOT = Path(__file__).resolve().parent.parent
VP = fd.schedules.VPLinear()
CPU = torch.device("cpu")


def load(name):
    """A module of `benchmarks/`, which is a folder of scripts and no package."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


loops = load("problems.loops")


def invoke(name, *arguments, code=0):
    """The output of `python benchmarks/run.py name arguments`."""
    result = CliRunner().invoke(load("run").main, [name, *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def needs(package):
    return pytest.importorskip(package, reason="a rival; pip install 'fastdiff-engine[bench]'")


def cells_of(table):
    """The cells of a Markdown table, without its head."""
    return [[c.strip() for c in row.strip("|").split("|")] for row in table.splitlines()[2:]]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_import_public_modules_of_the_library(path):
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    own = [name for name in modules if name.split(".")[0] == "fastdiff"]
    assert [name for name in own if any(part.startswith("_") for part in name.split("."))] == []


# -- timing ----------------------------------------------------------------------------------------


def test_percentiles_are_those_of_the_definition():
    found = timing.summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    # ranks 0 .. 5, linear between them: 20 % is rank 1, 50 % rank 2.5, 80 % rank 4
    assert found == timing.Timing(best=1.0, p20=2.0, median=3.5, p80=5.0, rounds=6)


def ticking(monkeypatch):
    """A clock that only work moves; returns a function that makes work of a length."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work(seconds):
        def run():
            now[0] += seconds

        return run

    return work


def test_time_is_divided_by_the_units_and_setup_is_not_counted(monkeypatch):
    work = ticking(monkeypatch)
    rivals = [
        timing.Rival("a", work(1.0), units=4, setup=work(100.0)),
        timing.Rival("b", work(3.0)),
    ]
    timings = timing.race(rivals, seconds=0.0, rounds=3)
    assert timings["a"] == timing.Timing(0.25, 0.25, 0.25, 0.25, 3)
    assert timings["b"] == timing.Timing(3.0, 3.0, 3.0, 3.0, 3)


def test_rivals_take_turns_and_the_first_changes():
    order = []
    rivals = [timing.Rival(name, lambda name=name: order.append(name), 1, int) for name in "abc"]
    timing.race(rivals, seconds=0.0, warmup=1, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_a_quick_rival_runs_as_often_as_a_turn_takes(monkeypatch):
    work, calls = ticking(monkeypatch), []
    quick = work(0.25)
    rivals = [timing.Rival("quick", lambda: (quick(), calls.append(1)))]
    timings = timing.race(rivals, seconds=0.0, warmup=2, rounds=5, turn=1.0)
    assert len(calls) == 2 + 5 * 4
    assert timings["quick"].best == 0.25


# -- gates -----------------------------------------------------------------------------------------


def test_the_gate_opens_up_to_its_tolerance():
    gate.agree("x", torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-4]), 1.1e-4)
    with pytest.raises(gate.GateError, match="Nothing was timed"):
        gate.agree("x", torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-4]), 0.9e-4)
    with pytest.raises(gate.GateError):
        gate.agree("x", torch.tensor([float("nan")]), torch.ones(1), 1.0)


SETTING = runs.Setting(CPU, rounds=1, seconds=0.0, about=(("device", "cpu"),))


def run_of(report=lambda found, place: f"{len(found)} times on {place}", **files):
    return runs.Run(runs.Bench("toy", "", lambda setting: [], report), SETTING, **files)


def line(name):
    return records.record("toy", name, {"best": 1.0})


def test_no_job_behind_a_red_gate_is_measured():
    checks = []

    def shut():
        checks.append("shut")
        raise gate.GateError("they differ")

    red, green = runs.Gate("rows", shut), runs.Gate("columns", lambda: checks.append("open"))
    run = run_of()
    run.go(
        [
            runs.Job("first", lambda lost: pytest.fail("it was timed"), red),
            runs.Job("second", lambda lost: pytest.fail("it was timed"), red),
            runs.Job("third", lambda lost: [line("a")], green),
            runs.Job("fourth", lambda lost: shut()),  # shut while it is measured
        ]
    )
    assert checks == ["shut", "open", "shut"]  # once a gate
    assert [r["rival"] for r in run.records] == ["a"]
    assert run.refused == 2
    assert "- Gate: rows: GateError: they differ" in run.page()


def test_what_fails_is_said_and_leaves_the_others(tmp_path):
    def broken(lost):
        raise RuntimeError("no compiler\nand more")

    def large(lost):
        raise MemoryError("needs 9 GiB")

    def partly(lost):
        lost.append("one rival: why")
        return [line("a"), line("b")]

    out, summary = tmp_path / "toy.jsonl", tmp_path / "toy.md"
    run = run_of(out=out, summary=summary)
    jobs = [broken, large, partly]
    run.go([runs.Job(job.__name__, job) for job in jobs])
    assert run.lost == ["broken: RuntimeError: no compiler", "one rival: why"]
    assert "- large is left out: MemoryError: needs 9 GiB." in run.page()
    assert "2 times on cpu" in run.page()
    assert summary.read_text() == run.page() + "\n"
    assert [r["rival"] for r in records.read(out)] == ["a", "b"]


def test_a_budget_leaves_out_jobs_and_says_which():
    run = run_of()
    never = lambda lost: pytest.fail("it ran")  # noqa: E731
    jobs = [runs.Job(f"job {k}", never, seconds=5.0) for k in range(7)]
    run.go([*jobs, runs.Job("short", lambda lost: [line("a")], seconds=1.0)], budget=4.0)
    assert len(run.records) == 1
    assert run.notes == [
        "The budget of 4 s left out job 0; job 1; job 2; job 3; job 4; and 2 more."
    ]


def test_a_command_fails_with_its_gates(monkeypatch):
    monkeypatch.setattr(load("bench_step"), "small", lambda *a, **k: pytest.fail("it timed"))
    eager_step = load("bench_step").Hoisted
    monkeypatch.setattr(eager_step, "__call__", lambda self, network, start: 1.01 * start)
    output = invoke("step", "--large", 0, "--shape", "3,4", code=1)
    assert "1 gates stayed shut" in output
    assert "us a step" not in output


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
        ("dpm-2", 0, 2, 1),  # x, out -> e; x stays
        ("dpm-2", 1, 2, 1),  # x, out at e (p = 0) -> x: the first output has no weight
        ("dpmpp-2s", 1, 3, 1),  # x0 at e reads e as well
        ("deis-rk4", 2, 2, 2),  # the third of four: x, out -> e, push
        ("deis-rk4", 3, 5, 1),  # the fourth sums all: x, out, H1, H2, H3 -> x
    ],
)
def test_registers_moved_are_those_counted_by_hand(solver, row, reads, writes):
    plan = fd.plan(VP, solver, 6)
    assert traffic.stage_registers(plan, row) == (reads, writes)


def test_bytes_are_registers_times_their_size():
    plan = fd.plan(VP, "dpmpp-2m", 6)
    assert traffic.stage_bytes(plan, 3, 1000) == 5 * 1000 * 4
    assert traffic.stage_bytes(plan, 3, 1000, torch.float64) == 5 * 1000 * 8
    # float32: x twice, history twice; bfloat16: the output read and the next input written
    assert traffic.stage_bytes(plan, 3, 1000, network=torch.bfloat16) == 4 * 4000 + 2 * 2000
    # the last row is DDIM's, pushes nothing and makes no input: x twice and the output
    assert traffic.stage_bytes(plan, 5, 1000, network=torch.bfloat16) == 2 * 4000 + 2000


def test_memory_counts_what_lives():
    with memory.Peak() as peak:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # the same memory
        del a, b
        c = torch.ones(500)
    assert (peak.most, peak.now) == (4000, 2000)
    del c
    assert peak.now == 0


# -- records and tables ----------------------------------------------------------------------------


def test_a_record_says_where_it_comes_from():
    measured = timing.Timing(1e-6, 2e-6, 3e-6, 4e-6, 7)
    line = records.record("step", "ours", measured, shape=[64, 16], dtype="float32")
    assert list(line) == [
        *("bench", "commit", "dirty", "python", "torch", "numpy", "fastdiff", "diffusers"),
        *("cpu", "cores", "threads", "shape", "dtype", "unit", "rival"),
        *("best", "p20", "median", "p80", "rounds"),
    ]
    assert (line["unit"], line["best"], line["p80"], line["rounds"]) == ("us", 1.0, 4.0, 7)
    assert line["fastdiff"] == fd.__version__
    assert line["threads"] == torch.get_num_threads()


def test_writing_again_replaces_the_same_line_and_keeps_the_others(tmp_path):
    path = tmp_path / "results" / "step.jsonl"
    first = records.record("order", "ours", {"error": 1.0}, nfe=5)
    other = records.record("order", "ours", {"error": 3.0}, nfe=6)
    records.write(path, [first, other])
    records.write(path, [{**first, "error": 2.0}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{**first, "error": 2.0}, other]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
def test_recorded_results_can_be_read(path):
    found = records.read(path)
    assert found
    for r in found:
        assert {"bench", "commit", "dirty", "cpu", "cores", "threads", "rival"} <= set(r)
        assert set(r) & set(records.MEASURED)
        assert r["commit"] in records.where(r)


@pytest.mark.parametrize("name", ["performance", "accuracy", "gradients"])
def test_the_results_pages_are_those_of_the_recorded_results(name):
    page = load("reports.pages").page(name, ROOT / "benchmarks" / "results")
    written = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert written == page, "run: python benchmarks/run.py report"


# -- each bench runs -------------------------------------------------------------------------------


SMALL = ("--seconds", 0, "--rounds", 1, "--commit", "abc")
SMOKE = {
    "step": ("--shape", "1,4,64,64", "--steps", 6, "--large", 0.5, "--large-threads", 1),
    "order": (
        "--problems",
        "mixture",
        "--solvers",
        "ddim,dpm-3",
        "--nfe",
        "6,8",
        "--reference",
        60,
    ),
    "flow": ("--problem", "flow", "--nfe", "5,8,10", "--reference", 40),
    "stage": ("--largest", 0.0625),
    "loop": ("--case", "null", "--case", "mlp", "--no-compile"),
    "gradients": ("--steps", 2, "--memory-steps", "2,4"),
    "adjoint": ("--problem", "mixture", "--fine", 20, "--evaluations", "8,12", "--table-steps", 4),
}


@pytest.fixture(scope="module")
def small_gradients():
    with pytest.MonkeyPatch.context() as patch:
        module = load("bench_gradients")
        patch.setattr(module, "cases", lambda place, short: [module.Case("mlp", 2)])
        patch.setattr(module, "memory_cases", lambda place: [module.Case("mlp", 2)])
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory, small_gradients):
    """The output and the records of a bench, run once."""
    done = {}

    def run(name):
        if name not in done:
            out = tmp_path_factory.mktemp(name) / "out.jsonl"
            output = invoke(name, "--device", "cpu", *SMALL, *SMOKE[name], "--out", out)
            done[name] = output, records.read(out)
        return done[name]

    return run


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize("name", SMOKE)
def test_a_bench_runs_and_reports_what_it_recorded(name, ran):
    if name in ("step", "loop", "order"):
        needs("diffusers")
    if name == "flow":
        needs("torchdiffeq")
    output, found = ran(name)
    module = {b.name: b for b in load("run").BENCHES}[name]
    assert module.report(found, "cpu") in output
    assert {r["commit"] for r in found} == {"abc"}
    assert all(0 < r["best"] <= r["median"] <= r["p80"] for r in found if "median" in r)
    assert sum(len(r["error"]) if "error" in r else 1 for r in found) > 4


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_bytes_moved_stand_in_the_records(ran):
    needs("diffusers")
    large = [r for r in ran("step")[1] if r["bench"] == "step-large"]
    moved = {r["rival"]: r["moved"] / 2**17 / 4 for r in large}
    assert moved["copy_"] == moved["mul_, in place"] == 2
    assert moved["fastdiff dpmpp-2m"] == 5
    assert moved["fastdiff deis-3"] == 6
    assert moved["fastdiff ddim"] == moved["fastdiff ddim, eta = 1"] == 3
    found = [r for r in ran("stage")[1] if r["rival"] == "fastdiff cpu"]
    by = {(r["outputs"], r["network"], r["backward"]): r["moved"] for r in found}
    # 1024 elements: x twice, the output, H1 and the push
    assert by[2, "float32", False] == 5 * 4096
    # an output read and an input written in half the size
    assert by[2, "bfloat16", False] == 4 * 4096 + 2 * 2048
    # one more H; two outputs and two inputs
    assert by[3, "bfloat16", False] == 5 * 4096 + 4 * 2048
    # x, h_bar twice, the product and the next one's cotangent
    assert by[2, "float32", True] == 6 * 4096
    # an earlier x_bar as well, and this one kept; two products and two cotangents
    assert by[3, "float32", True] == (5 + 3 + 2) * 4096


def test_errors_of_gradients_count_both_passes(ran):
    points = load("reports.adjoint").points_of(ran("adjoint")[1], "error")
    assert all(
        set(points["mixture", "logsnr", "x"][name]) == {8, 12}
        for name in load("bench_adjoint").OURS
    )


def test_benches_run_without_their_rivals(monkeypatch, tmp_path):
    absent = {"diffusers", "torchdiffeq"}
    real = machine.installed
    benches = ("loop", "stage", "order", "flow", "gradients", "adjoint")
    for name in (f"bench_{stem}" for stem in benches):
        monkeypatch.setattr(load(name), "installed", lambda p: p not in absent and real(p))
    monkeypatch.setattr(load("gradient_gate"), "installed", lambda p: p not in absent and real(p))
    out, small = tmp_path / "out.jsonl", ("--device", "cpu", *SMALL)
    output = invoke("loop", *small, "--no-compile", "--case", "mlp", "--case", "dit", "--out", out)
    assert "its networks (DiT-S/2, SD U-Net) are left out" in output
    order = ("--problems", "mixture", "--solvers", "ddim,euler", "--nfe", 5, "--reference", 60)
    assert "`ddim` stands for `euler`" in invoke("order", *small, *order, "--out", out)
    assert "torchdiffeq was not measured." in invoke("flow", *small, *SMOKE["flow"])
    output = invoke("adjoint", *small, *SMOKE["adjoint"], "--part", "error", "--out", out)
    rivals = {r["rival"] for r in records.read(out)}
    assert rivals - {"k-diffusion"} == {
        "network alone", "fastdiff eager", "fastdiff", *load("bench_adjoint").OURS
    }  # fmt: skip
    assert "k-diffusion" in rivals  # restated here


# -- targets ---------------------------------------------------------------------------------------


def test_a_target_of_a_stage_is_held_against_the_worst_cell():
    report = load("reports.stage")

    def line(rival, shape, noise=False, share=0.0, host=1.0, backward=False):
        where = {"rival": rival, "shape": shape, "noise": noise, "backward": backward}
        return {**where, "share_median": share, "host": host}

    large, small = [1, 2**26], [1, 1024]
    found = [
        line("fastdiff cuda", large, share=0.95),
        line("fastdiff cuda", large, share=0.89),
        line("fastdiff triton", large, share=0.91, noise=True),
        line("fastdiff triton", large, share=0.85, backward=True),
        line("fastdiff cuda", small, host=7.9, share=0.1),
        line("fastdiff triton", small, host=12.0),
        line(report.LAUNCHER, small, host=8.0),
    ]
    cells = cells_of(report.targets(found, "cuda"))
    assert [(c[2], c[3]) for c in cells] == [
        ("0.890 (worst of 2)", "not met"),
        *[("", "not measured")] * 3,
        ("0.910 (worst of 1)", "met"),
        ("0.850 (worst of 1)", "not met"),
        ("7.90 (worst of 1)", "met"),
        ("12.0 (worst of 1)", "met"),
    ]
    assert cells[7][1] == "under 13.0"


def line_of_loop(case, rival, median, timing="waited", device="cuda"):
    numbers = dict.fromkeys(("best", "p20", "median", "p80"), median)
    where = {"rival": rival, "timing": timing, "device": device, "compiled": False}
    kind = {"network": case.kind, "shape": list(case.shape), "steps": case.steps}
    return {**where, **kind, "dtype": "float32", "small": False, "parameters": 0, **numbers}


def test_targets_of_loops_are_met_or_not_or_not_measured():
    report = load("reports.loop")
    null, mlp = loops.Case("null", (1, 4, 64, 64), 20), loops.Case("mlp", (1, 16), 10)
    found = [
        line_of_loop(null, report.REPLAY, 2.9, "queued"),
        line_of_loop(null, report.LOOP, 3.3),
        line_of_loop(mlp, report.LOOP, 12.0),
        line_of_loop(mlp, report.LOOP, 12.0, "queued"),
        line_of_loop(mlp, report.THEIRS, 130.0),
        line_of_loop(mlp, report.CAPTURED, 9.9),
        line_of_loop(mlp, report.CAPTURED, 10.1, "queued"),
    ]

    def shown(lines):
        return [(cells[2], cells[3]) for cells in cells_of(report.targets(lines))]

    none = ("", "not measured")
    assert shown(found) == [
        *(("2.90 us", "met"), ("66.0 us", "not met"), none, ("10.8", "met"), none),
        *(("21.0 us", "not met"), ("19.0 us", "met")),
    ]
    assert shown([{**line, "device": "cpu"} for line in found]) == [none] * 7
    extra = {(k[3], k[2]): v for k, v in report.beyond(found, "median").items()}
    assert extra[report.LOOP, "waited"] == pytest.approx(2.1)  # beyond the captured network
    assert (report.THEIRS, "waited") not in extra  # the network alone was not measured


def test_ours_is_held_against_the_best_within_as_many_calls():
    report = load("reports.adjoint")
    ours, other = report.HELD[0], "discrete, ddim"
    points = {
        ours: {10: 0.5, 20: 0.1, 200: 0.01},
        other: {10: 0.2, 20: 0.15},
        "torchdiffeq rk4": {8: 0.4, 16: 0.3},
        "torchdiffeq midpoint": {12: 0.05, 24: 0.01},
    }
    assert report.best_of(points, report.THEIR_BEST, [6, 10, 20]) == {10: 0.4, 20: 0.05}
    assert report.best_of(points, report.OUR_BEST, [6, 10, 20]) == {10: 0.2, 20: 0.1}
    assert report.factors(points, ours, [6, 10, 20]) == pytest.approx({10: 0.8, 20: 0.5})
    # 200 evaluations are past the target
    shown = [(c[2], c[3]) for c in cells_of(report.targets({"mixture": points}))]
    assert shown == [
        ("0.500 to 0.800; not at 10, 20", "not met"),
        ("0.500 to 2.00; not at 20", "not met"),
    ]
