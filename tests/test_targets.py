# SPDX-License-Identifier: Apache-2.0
"""The targets of a GPU are met, not met or not measured, by what the rows say."""

import importlib
import itertools
import math
import sys
from pathlib import Path

from click.testing import CliRunner

from fastdiff.bench import gradients, loops, records, rows

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.append(BENCHMARKS)
targets = importlib.import_module("reports.targets")

LARGE, SMALL = [1, 2**26], [1, 1024]
GPU = {"device": "cuda", "gpu": "H200", "driver": "1", "triton": "3"}


def line(bench, rival, median, **where):
    return records.record(bench, rival, {"median": median}, **GPU, **where, commit="abc")


def stage(rival, m, g, noise, shape=LARGE, median=100.0, **measured):
    where = {"outputs": m, "branches": g, "noise": noise, "network": "float32", "backward": False}
    return {**line("stage", rival, median, shape=shape, **where), **measured}


def cells(rival, share, time=lambda noise: 100.0):
    return [
        stage(rival, m, g, noise, median=time(noise), share_median=share)
        for m, g, noise in itertools.product(range(1, 5), (1, 2), (False, True))
    ]


def loop(kind, shape, rival, median, steps):
    where = {"network": kind, "shape": shape, "steps": steps, "compiled": False}
    return line("loop", rival, median, timing="waited", **where)


def gradient(rival, median):
    where = {"network": "mlp", "shape": [1, 16], "theta": False, "part": "time"}
    return line("gradients", rival, median, **where)


def shown(found):
    return [(t.measured, t.verdict) for t in targets.targets(found)]


def test_without_a_row_of_a_gpu_nothing_is_measured():
    of_a_cpu = {**stage("fastdiff cpu", 2, 1, False, share_median=0.99), "device": "cpu"}
    for found in ([], [of_a_cpu]):
        page = targets.page(found)
        assert page.startswith("No row is of a GPU.")
        assert page.count("not measured") == 10
    assert {verdict for _, verdict in shown([])} == {"not measured"}


def test_every_target_is_met_by_rows_that_meet_it():
    found = cells("fastdiff cuda", 0.93, lambda noise: 104.0 if noise else 100.0)
    found += cells("fastdiff triton", 0.88, lambda noise: 120.0)
    found += [
        stage("fastdiff cuda, in a graph", 2, 1, False, SMALL, 2.0),
        stage("fastdiff triton, in a graph", 2, 1, False, SMALL, 4.0),
        stage("fastdiff cuda", 2, 1, False, SMALL, 5.0, host=7.5),
        loop("null", [1, 4, 64, 64], loops.LOOP, 3.25, 20),
        loop("mlp", [64, 16], loops.LOOP, 12.0, 10),
        loop("mlp", [64, 16], loops.CAPTURED, 9.0, 10),
        loop("mlp", [1, 16], loops.LOOP, 10.0, 10),
        loop("mlp", [1, 16], targets.THEIRS, 110.0, 10),
        gradient(gradients.BACKPROP, 60.0),
        gradient(gradients.CAPTURED, 20.0),
    ]
    assert shown(found) == [
        ("0.930 (worst of 16)", "met"),  # cuda is the better one in every cell
        ("0.930 (worst of 16)", "met"),
        ("0.880 (worst of 16)", "not met"),
        ("2.00 (worst of 1)", "met"),
        ("7.50 (worst of 1)", "met"),
        ("65.0 (worst of 1)", "met"),
        ("12.0, 3.00", "measured"),
        ("11.0 (worst of 1)", "met"),
        ("3.00 (worst of 1)", "met"),
        ("1.04 (worst of 8)", "met"),
    ]
    page = targets.page(found)
    assert "H200, driver 1" in page
    assert "commit abc" in page


def test_a_target_is_not_met_by_its_worst_cell():
    found = cells("fastdiff cuda", 0.93, lambda noise: 106.0 if noise else 100.0)
    found[3]["share_median"] = 0.89
    found += [
        stage("fastdiff cuda", 2, 1, False, [1, 2**27], share_median=0.8),  # 512 MiB
        stage("fastdiff cuda", 2, 1, False, [1, 2**24], share_median=0.1),  # 64 MiB binds nothing
        stage("fastdiff cuda, in a graph", 2, 1, False, SMALL, 3.1),
        stage("fastdiff cuda", 2, 1, False, SMALL, 5.0, host=8.1),
        loop("null", [1, 4, 64, 64], loops.LOOP, 3.26, 20),
        loop("mlp", [1, 16], loops.LOOP, 10.0, 10),
        loop("mlp", [1, 16], targets.THEIRS, 99.0, 10),
        gradient(gradients.BACKPROP, 59.0),
        gradient(gradients.CAPTURED, 20.0),
    ]
    verdicts = [verdict for _, verdict in shown(found)]
    none = "not measured"
    assert verdicts == [
        *("not met", "not met", none, "not met", "not met", "not met"),
        *(none, "not met", "not met", "not met"),
    ]
    assert shown(found)[0][0] == "0.800 (worst of 17)"


def test_cells_that_are_missing_keep_a_target_open():
    found = [r for r in cells("fastdiff cuda", 0.95) if r["outputs"] < 4]
    assert shown(found)[0] == ("0.950 (worst of 12 of 16)", "not measured")
    found[0]["share_median"] = 0.5  # one that is under the bound decides
    assert shown(found)[0] == ("0.500 (worst of 12 of 16)", "not met")


def test_the_cells_that_the_targets_bind_are_measured_first_and_large_before_small():
    for short in (True, False):
        found = rows.cells(short, 2**30)
        first = found[: len(rows.BOUND)]
        assert {shape for _, shape in first} == {(1, 2**26)}
        kinds = {(case.outputs, case.branches, case.noise) for case, _ in first}
        assert kinds == set(itertools.product(range(1, 5), (1, 2), (False, True)))
        rest = [math.prod(shape) for _, shape in found]
        assert rest.index(1024) > (rest.index(2**28) if not short else 0)
    assert all(4 * math.prod(shape) <= 2**26 for _, shape in rows.cells(False, 2**26))


def test_the_loops_and_gradients_that_the_targets_bind_are_measured():
    bench_loop, bench_gradients = map(importlib.import_module, ("bench_loop", "bench_gradients"))
    for short in (True, False):
        cases = [cell.case for cell in bench_loop.cells("cuda", short, False)]
        shapes = {(case.kind, case.shape, case.steps) for case in cases}
        wanted = {("null", (1, 4, 64, 64), 20), ("mlp", (64, 16), 10), ("mlp", (1, 16), 10)}
        assert wanted <= shapes
        assert ("mlp", 1) in {(c.kind, c.batch) for c in bench_gradients.cases("cuda", short)}


def test_rivals_that_compile_come_last():
    bench_loop = importlib.import_module("bench_loop")
    compiled = [cell.compiled for cell in bench_loop.cells("cuda", False, True)]
    assert compiled == sorted(compiled)
    assert any(compiled)


def test_the_command_reads_files_and_takes_a_missing_one_for_empty(tmp_path):
    path = tmp_path / "stage.jsonl"
    records.write(path, [stage("fastdiff cuda", 2, 1, False, SMALL, 5.0, host=7.5)])
    main = importlib.import_module("run").main
    done = CliRunner().invoke(main, ["targets", str(path), str(tmp_path / "loop.jsonl")])
    assert done.exit_code == 0, done.output
    assert "7.50 (worst of 1)" in done.output
    assert done.output.count("not measured") == 9


def test_files_that_hold_no_results_are_refused_in_a_sentence(tmp_path):
    main = importlib.import_module("run").main
    (tmp_path / "bytes").write_bytes(b"\xa5\x00")
    (tmp_path / "lists").write_text("[1]\n")
    for name in ("bytes", "lists", "."):
        done = CliRunner().invoke(main, ["targets", str(tmp_path / name)])
        assert done.exit_code == 1
        assert "holds results, a line of JSON each; got something else" in done.output
