# SPDX-License-Identifier: Apache-2.0
"""`fastdiff bench`: what it refuses, what it times and counts, and what it leaves behind."""

import contextlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support.core import needs_core

import fastdiff as fd
from fastdiff.bench import (
    jobs,
    machine,
    noises,
    records,
    roofline,
    rows,
    runs,
    stages,
    timing,
)
from fastdiff.bench.gate import GateError
from fastdiff.bench.jobs import Asked
from fastdiff.cli.app import commands

CPU = torch.device("cpu")
ONCE = ("--rounds", "1", "--seconds", "0", "--device", "cpu")
SETTING = runs.Setting(CPU, rounds=1, seconds=0.0, about=(("device", "cpu"),))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments, code=0):
    done = CliRunner().invoke(commands, ["bench", *map(str, arguments)])
    assert done.exit_code == code, done.output + repr(done.exception)
    return done


def cells_of(output):
    """The head of the table on a page, and its rows."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return table[0], table[1:]


def lines_of(path="r.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# -- the commands ----------------------------------------------------------------------------------


def test_a_stage_is_timed_on_every_backend_here():
    size = ("--size", "64x16,4KiB", "--terms", "1-2", "--noise", "both", "--json", "r.jsonl")
    done = run("stage", *ONCE, *size)
    head, table = cells_of(done.stdout)
    times = "us: median (p20 to p80)"
    assert head[:7] == ["row", "registers of x", "rival", times, "moved", "GB/s", "share of copy_"]
    assert head[7:] == ["launches"]  # no compiler tells registers on a CPU, and no host's time
    names = [row[2] for row in table]
    backends = [name for name in ("cpu", "torch") if not fd.backends.get(name).missing()]
    assert set(names) == {"copy_", *(f"fastdiff {name}" for name in backends)}
    assert len(table) == 2 * 2 * 2 * (1 + len(backends))
    found = lines_of()
    assert len(found) == len(table)
    for r in found:
        assert {"commit", "dirty", "cpu", "cores", "torch", "python", "fastdiff"} <= set(r)
        assert r["threads"] == 1
        assert 0 < r["best"] <= r["p20"] <= r["median"] <= r["p80"]
    own = [r for r in found if r["rival"] == "fastdiff cpu"]
    assert {r["launches"] for r in own} <= {1}
    assert all(r["launches"] > 3 for r in found if r["rival"] == "fastdiff torch")
    if own:
        assert f"The compiled core runs {own[0]['instructions']} code here." in done.stdout


def test_a_backend_alone_and_dtypes_are_what_was_asked_for():
    dtypes = "float32/bfloat16,float64,bfloat16/bfloat16"
    run(
        "stage",
        *ONCE,
        "--backend",
        "torch",
        "--dtype",
        dtypes,
        "--size",
        "4KiB",
        "--json",
        "r.jsonl",
    )
    found = lines_of()
    assert {r["rival"] for r in found} == {"copy_", "fastdiff torch"}
    assert {(r["dtype"], r["network"], tuple(r["shape"])) for r in found} == {
        ("float32", "bfloat16", (1, 1024)),
        ("float64", "float64", (1, 512)),
        ("bfloat16", "bfloat16", (1, 2048)),
    }


def test_a_loop_is_timed_beside_its_network():
    done = run("loop", *ONCE, "--network", "null,mlp", "--steps", 3, "--backend", "torch")
    _, table = cells_of(done.stdout)
    assert [row[3] for row in table] == [
        "fastdiff eager",
        *["network alone", "fastdiff eager"] * 2,
    ]
    assert [row[0].split()[1] for row in table[1::2]] == ["[64,16]", "[1,16]"]  # the largest first


def test_guidance_noise_and_a_plan_of_a_file_go_through_a_loop():
    given = ("--branches", "1,2", "--noise", "with", "--size", "2x3x4", "--steps", 3)
    run("loop", *ONCE, *given, "--backend", "torch", "--json", "r.jsonl")
    assert [r["row"] for r in lines_of()] == ["M=2 G=1, noise", "M=2 G=2, noise"]
    fd.plan(fd.schedules.VPLinear(), "ddim", 4).save("p.json")
    done = run("loop", *ONCE, "--plan", "p.json", "--size", "2x8", "--backend", "torch")
    assert "ddim G=1, 4 steps" in done.stdout


def test_noise_is_timed_beside_torchs():
    done = run("noise", *ONCE, "--size", "2x1000", "--dtype", "float32,float64")
    head, table = cells_of(done.stdout)
    assert head[-1] == "10^9 normals/s"
    assert {"torch normal_", "fastdiff.noise.normal", "fastdiff torch"} <= {row[1] for row in table}
    assert {row[0] for row in table} == {"[2,1000] float32", "[2,1000] float64"}


def test_a_gradient_is_timed_and_its_memory_measured():
    given = ("--size", "2x16", "--steps", 3, "--backend", "torch")
    done = run("gradient", *ONCE, *given, "--json", "r.jsonl")
    head, table = cells_of(done.stdout)
    assert head[-1] == "peak memory"
    assert [row[1] for row in table] == ["bare network", "discrete", "backprop"]
    assert all(row[-1].endswith("iB") for row in table)
    assert {r["part"] for r in lines_of()} == {"time", "memory"}


def test_a_plan_of_a_file_gives_its_heaviest_row():
    fd.plan(fd.schedules.VPLinear(), "deis-3", 6).save("p.json")
    given = ("--plan", "p.json", "--size", "4KiB", "--backend", "torch")
    run("stage", *ONCE, *given, "--json", "r.jsonl")
    (line,) = [r for r in lines_of() if r["rival"] == "fastdiff torch"]
    assert line["plan"] == "deis-3"
    assert line["moved"] == 6 * 4096  # x twice, the output, two earlier ones and the push


def test_a_roofline_is_drawn():
    done = run("stage", *ONCE, "--size", "4KiB,64KiB", "--plot", "r.png")
    assert "plot: r.png" in done.stdout
    with Image.open("r.png") as picture:
        assert picture.size[0] > 500
    assert run("noise", *ONCE, "--size", "4KiB", "--plot", "n.png").exit_code == 0
    with Image.open("n.png") as picture:
        assert picture.size[0] > 500


def test_the_roof_is_the_copy_that_shares_are_of():
    def line(rival, moved, median, bandwidth, **more):
        where = {"rival": rival, "moved": moved, "median": median, "bandwidth_median": bandwidth}
        return {**where, **more}

    found = [
        line("copy_", 800, 2.0, 4.0, share_median=0.5),
        line("fastdiff cpu", 1600, 3.0, 6.0, share_median=0.75),
        line("launcher", 0, 1.0, 0.0, share_median=0.0),
    ]
    assert roofline.roof(found) == (8.0, 2.0)
    without = [{k: v for k, v in r.items() if k != "share_median"} for r in found]
    assert roofline.roof(without) == (6.0, 2.0)
    assert set(roofline.points(found)) == {"copy_", "fastdiff cpu"}
    with pytest.raises(ValueError, match="got none"):
        roofline.roof([])


@pytest.mark.parametrize("large", [False, True])
def test_shares_are_of_the_best_copy_and_of_the_median_one(large, monkeypatch):
    """Of the same size, or of one large copy in the same run."""
    case, shape = rows.Case(1), (1, 1000)  # moves 3 registers of 4000 bytes

    def turns(rivals, *rest):
        made = {"copy_": (1e-6, 2e-6), "fastdiff torch": (3e-6, 8e-6)}
        found = {
            name: timing.Timing(best, best, median, median, 1)
            for name, (best, median) in made.items()
        }
        return {name: (found[name], found[name]) for name in rivals}

    monkeypatch.setattr(stages, "take_turns", turns)
    monkeypatch.setattr(stages, "large_from", lambda place: 0 if large else 10**9)
    cell = stages.Cell(case, shape, CPU)
    kept = stages.measure(cell, cell.makers(("torch",)), SETTING, lambda: (16e9, 2e9), [])
    line = {r["rival"]: r for r in kept}["fastdiff torch"]
    assert (line["bandwidth"], line["bandwidth_median"]) == (4.0, 1.5)
    shares = (4 / 8, 1.5 / 4) if large else (4 / 16, 1.5 / 2)
    assert (line["share"], line["share_median"]) == shares


def test_results_are_added_to_a_file_and_replaced_there():
    for commit in ("a", "a", "b"):
        given = ("--size", "4KiB", "--backend", "torch", "--json", "r.jsonl")
        run("stage", *ONCE, *given, "--commit", commit)
    assert [(r["commit"], r["rival"]) for r in lines_of()] == [
        *(("a", "copy_"), ("a", "fastdiff torch")),
        *(("b", "copy_"), ("b", "fastdiff torch")),
    ]


# -- the gate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "module"), [("stage", stages), ("noise", noises)])
def test_nothing_is_timed_behind_a_shut_gate(name, module, monkeypatch):
    def shut(*arguments, **options):
        raise GateError("they differ")

    monkeypatch.setattr(module, "gate", shut)
    monkeypatch.setattr(module, "take_turns", lambda *a, **k: pytest.fail("it timed"))
    done = run(name, *ONCE, "--size", "4KiB", "--plot", "r.png", "--json", "r.jsonl", code=1)
    assert "they differ" in done.stdout
    assert "1 gates stayed shut" in done.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["loop", "gradient"])
def test_a_wrong_run_is_not_timed(name, monkeypatch):
    library = {"loop": jobs.loops, "gradient": jobs.gradients}[name]
    monkeypatch.setattr(library, "race", lambda *a, **k: pytest.fail("it timed"))
    if name == "loop":
        monkeypatch.setattr(library, "reference", lambda parts, how: 1.01 * parts.start)
    else:
        real = library.by_library

        def wrong(flow, plan, gradient, **options):
            made = real(flow, plan, gradient, **options)
            factor = 1.01 if gradient == "discrete" else 1.0
            return lambda: [None if g is None else factor * g for g in made()]

        monkeypatch.setattr(library, "by_library", wrong)
    done = run(name, *ONCE, "--size", "2x16", "--steps", 2, "--backend", "torch", code=1)
    assert "Nothing was timed" in done.stdout
    assert "1 gates stayed shut" in done.stderr


@needs_core
def test_the_gate_holds_compiled_backends_to_the_bit(monkeypatch):
    """The reference, which agrees to its rounding alone, under another backend's name."""
    real = fd.backends.get
    for served, refused in (("cpu", None), ("torch", "elements that differ from cpu's")):
        monkeypatch.setattr(
            fd.backends, "get", lambda name, as_=served: real(as_ if name == "cuda" else name)
        )
        with pytest.raises(GateError, match=refused) if refused else contextlib.nullcontext():
            stages.gate(rows.Case(3), CPU, names=("cuda",))


@pytest.mark.parametrize("state", [torch.float64, torch.bfloat16, torch.float16])
def test_the_gate_of_a_stage_knows_the_rounding_of_every_dtype(state, monkeypatch):
    case = rows.Case(3, 2, state, True, state=state)
    stages.gate(case, CPU, names=["torch"])
    real = stages.bind
    calls = []

    def wrong(name, case, registers):
        calls.append(name)
        if len(calls) == 2:
            registers.x.mul_(1.1)
        return real(name, case, registers)

    monkeypatch.setattr(stages, "bind", wrong)
    if "cpu" in stages.available(CPU) and state == torch.float64:
        with pytest.raises(GateError, match="Nothing was timed"):
            stages.gate(case, CPU, names=["torch"])


def test_noise_that_differs_by_a_bit_is_not_timed(monkeypatch):
    noises.gate(["torch"], torch.float32, CPU)
    real = fd.noise.normal
    monkeypatch.setattr(fd.noise, "normal", lambda *a, **k: real(*a, **k) * (1 + 2.0**-22))
    with pytest.raises(GateError, match="the same bits"):
        noises.gate(["torch"], torch.float32, CPU)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stage", "--size", "big"], "'big' is no size such as 64x4x64x64 or 256MiB"),
        (["stage", "--size", "64"], "bytes have a unit, such as 64B"),
        (["stage", "--size", "64x0"], "'64x0' is no size"),
        (["stage", "--size", "0MiB"], "'0MiB' is no size"),
        (["stage", "--size", "-1KiB"], "'-1KiB' is no size"),
        (["stage", "--size", "1.5GiB"], "'1.5GiB' is no size"),
        (["stage", "--size", "9" * 5000 + "B"], "is no size"),
        (["stage", "--dtype", "int8"], "'int8' is not one of float32, float64"),
        (["stage", "--dtype", "float32/int8"], "or STATE/NETWORK such as float32/bfloat16"),
        (["loop", "--dtype", "float32/float16"], "'float32/float16' is not one of"),
        (["noise", "--dtype", "float16"], "'float16' is not one of float32, float64."),
        (["stage", "--terms", "0"], "ranges grow, from 1 on"),
        (["stage", "--terms", "1,101"], "the list ends at 100"),
        (["stage", "--noise", "much"], "'much' is not one of"),
        (["loop", "--branches", "3"], "1 or 2 is allowed; got 3."),
        (["loop", "--network", "unet"], "'unet' is not one of null, mlp."),
        (["stage", "--plot", "r.jpg"], "does not end in .png"),
        (["loop", "--plot", "r.png"], "No such option"),
        (["stage", "--rounds", "0"], "1 to 10000 is allowed; got 0."),
        (["jump"], "No such command"),
        (["stage", "--plan", "p.json", "--terms", "2"], "--terms as well. Leave them out."),
    ],
)
def test_a_wrong_command_exits_2_and_says_what_is_allowed(arguments, said):
    done = run(*arguments, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stage", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["loop", "--backend", "cuda"], 'backend="cuda": it does not run here'),
        (["stage", "--size", "1000000000GiB"], "Take a smaller one."),
        (["stage", "--size", "999999999x999999999x999999999"], "Take a smaller one."),
        (["loop", "--size", "1000000000GiB"], "Take a smaller one."),
        (["noise", "--size", "1000000000GiB"], "Take a smaller one."),
        (["loop", "--network", "mlp", "--size", "4KiB,2x3x4"], "BxA such as 64x16; got [2,3,4]"),
        (["gradient", "--size", "1x1000000"], "got [1,1000000]. Give another size."),
        (["gradient", "--size", "999999999999x16"], "Take a smaller one."),
        (["loop", "--network", "mlp", "--size", "99999999999x1"], "Take a smaller one."),
        (["stage", "--backend", "torch,cpu", "--branches", "17"], "up to 16 branches; got 17"),
        (["stage", "--plan", "none.json"], "none.json cannot be read"),
        (["stage", "--plan", "wrong.json"], "wrong.json"),
        (["loop", "--plan", "wrong.json"], "wrong.json"),
        (["stage", "--plan", "bank.json"], "got one that reads a bank"),
        (["loop", "--plan", "bank.json"], "got one that reads 1 tensors of the caller's"),
        (["gradient", "--plan", "bank.json"], "got one that reads 1 tensors of the caller's"),
        (["stage", "--json", "no/such/r.jsonl"], "--json: the folder no/such does not exist"),
        (["stage", "--json", "wrong.json"], "--json: wrong.json holds results"),
        (["stage", "--json", "folder"], "--json: a file is needed; got the folder folder."),
        (["stage", "--json", "/proc/r.jsonl"], "--json: /proc/r.jsonl cannot be written"),
        (["stage", "--plot", "no/such/r.png"], "--plot: the folder no/such does not exist"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_timed(arguments, said, monkeypatch):
    for module in (stages, noises):
        monkeypatch.setattr(module, "take_turns", lambda *a, **k: pytest.fail("it timed"))
    for module in (jobs.loops, jobs.gradients):
        monkeypatch.setattr(module, "race", lambda *a, **k: pytest.fail("it timed"))
    Path("wrong.json").write_text('{"format": "fastdiff-plan"')
    Path("folder").mkdir()
    stage = fd.Stage(t=1.0, a_x=0.5, b=(0.1,), r=(0.2,))
    fd.Plan(stages=(stage,), times=(1.0, 0.0)).save("bank.json")
    done = run(*arguments, code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert done.stdout == ""


def test_what_one_backend_does_not_serve_is_timed_on_the_others():
    done = run("stage", *ONCE, "--size", "4KiB", "--branches", "17", "--terms", "100")
    _, table = cells_of(done.stdout)
    assert [row[2] for row in table] == ["copy_", "fastdiff torch"]
    assert rows.Case(rows.MOST_OUTPUTS).bytes(1) == 4 * (rows.MOST_OUTPUTS + 3)
    assert min(map(abs, rows.weights_of(rows.MOST_OUTPUTS))) > torch.finfo(torch.float32).tiny


def test_who_breaks_off_sees_what_was_measured(monkeypatch):
    def broken_off(counting):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "count", broken_off)
    done = run("stage", *ONCE, "--size", "4KiB", "--backend", "torch", "--plot", "r.png", code=1)
    _, table = cells_of(done.stdout)
    assert [row[2] for row in table] == ["copy_", "fastdiff torch"]
    assert not Path("r.png").exists()


def test_an_interpreter_is_not_timed(monkeypatch):
    served = types.SimpleNamespace(name="triton")
    monkeypatch.setattr(fd.backends, "choose", lambda *a: served)
    done = run("stage", *ONCE, "--backend", "triton", code=1)
    assert "run in an interpreter, which is for tests" in done.stderr


def test_a_device_that_is_not_here_is_refused():
    if torch.cuda.is_available():
        pytest.skip("for machines without one")
    assert "PyTorch finds no CUDA device" in run("noise", "--device", "cuda", code=1).stderr


# -- sizes, turns and graphs -----------------------------------------------------------------------


def test_bytes_become_elements_of_the_dtype_and_the_largest_come_first():
    asked = Asked(sizes=(4096, (2, 5000), 2**20, (2, 5000)))
    assert asked.shapes(torch.float32) == [(1, 2**18), (2, 5000), (1, 1024)]
    assert asked.shapes(torch.bfloat16)[0] == (1, 2**19)
    cells = jobs.stage_cells(Asked(sizes=(4096, 2**20), terms=(1, 2), noise=(False, True)))
    sizes = [case.register_bytes(shape) for case, shape in cells]
    assert sizes == sorted(sizes, reverse=True)
    assert [case.outputs for case, _ in cells] == [1, 1, 2, 2] * 2


def test_weights_keep_x_bounded_at_any_number_of_terms_and_branches():
    assert rows.weights_of(4) == (0.3, -0.2, 0.1, -0.05)
    for count in range(1, 17):
        assert len(rows.weights_of(count)) == count
        assert sum(map(abs, rows.weights_of(count))) < 0.8
        assert sum(rows.guidance_of(count)) == pytest.approx(1.0)


def test_a_launch_of_many_units_is_divided_by_them(monkeypatch):
    monkeypatch.setattr(timing, "_cpu_turn", lambda calls, launches, host: (8.0, 4.0))
    found = timing.take_turns({"one": [int], "many": [int]}, CPU, 2, 0.0, units={"many": 4})
    assert [(found[name][0].median, found[name][1].median) for name in ("one", "many")] == [
        (8.0, 4.0),
        (2.0, 1.0),
    ]


def test_a_small_stage_is_timed_inside_a_graph_on_cuda(monkeypatch):
    launched = []

    def capture(body):
        body()
        return lambda: launched.append("graph"), None

    monkeypatch.setattr(stages, "capture", capture)
    cell = stages.Cell(rows.Case(), (1, 64), CPU)
    cell.device = types.SimpleNamespace(type="cuda")  # what it offers there
    real = fd.backends.get("torch")
    monkeypatch.setattr(fd.backends, "get", lambda name: real)
    makers = cell.makers(["cuda"])
    assert list(makers) == ["copy_", "fastdiff cuda", "fastdiff cuda, in a graph"]
    found = stages.measure(cell, makers, SETTING, lambda: (1e9, 1e9), [])
    assert launched
    assert {r["rival"] for r in found} == set(makers)
    monkeypatch.setattr(stages, "take_turns", lambda *a: pytest.fail(str(a[-1])))
    with pytest.raises(pytest.fail.Exception, match="'fastdiff cuda, in a graph': 32"):
        stages.measure(cell, makers, SETTING, lambda: (1e9, 1e9), [])
    large = stages.Cell(rows.Case(), (1, 2**19), CPU)
    large.device = cell.device
    assert list(large.makers(["cuda"])) == ["copy_", "fastdiff cuda"]


def test_shares_of_small_cells_are_of_a_large_copy_and_of_large_ones_of_their_own(monkeypatch):
    found = {}
    for size in (1024, 2**21):
        monkeypatch.setattr(rows, "PARALLEL", 2**22)
        cell = stages.Cell(rows.Case(), (1, size), CPU)
        lines = stages.measure(cell, cell.makers([]), SETTING, lambda: (2e9, 1e9), [])
        (found[size],) = (r for r in lines if r["rival"] == "copy_")
    assert found[2**21]["share_median"] == 1.0
    assert found[1024]["share_median"] == pytest.approx(found[1024]["bandwidth_median"], rel=1e-3)


# -- where results come from -----------------------------------------------------------------------


def test_an_installed_package_has_a_version_and_no_commit(monkeypatch, tmp_path):
    assert not machine.commit()[0].startswith(machine.VERSION)  # the tree is under version control
    elsewhere = tmp_path / "site-packages" / "machine.py"
    elsewhere.parent.mkdir()
    elsewhere.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for given in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "somebody else's"]):
        subprocess.run([*git, *given], check=True)
    monkeypatch.setattr(machine, "__file__", str(elsewhere))
    machine.commit.cache_clear()
    try:
        assert machine.commit() == (f"version {fd.__version__}", False)
        line = records.record("stage", "ours", {"best": 1.0})
    finally:
        machine.commit.cache_clear()
    assert "no commit is known: the package as it is installed." in records.where(line)


def test_importing_the_library_imports_no_benchmark():
    script = "import sys, fastdiff; print([n for n in sys.modules if 'fastdiff.bench' in n])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
