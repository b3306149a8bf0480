# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints and writes, and how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import fastdiff as fd
from fastdiff.cli.app import commands

SAMPLE = ["sample", "--count", "4", "--steps", "2", "--no-progress"]
COMPARE = ["compare", "--solvers", "ddim,dpmpp-2m", "--nfe", "4,8", "--count", "2", "--no-progress"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, arguments)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_help_and_version_of_every_command():
    assert run("--version").output == f"fastdiff {fd.__version__}\n"
    listed = run("--help").output
    for command in ("sample", "compare", "plan", "solvers", "doctor", "bench"):
        assert command in listed
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "Usage:" in shown.output


# -- sample ----------------------------------------------------------------------------------------


def test_sample_writes_dark_ink_on_a_white_sheet():
    done = run("sample", "--count", "20", "--steps", "10", "--no-progress", "--out", "a.png")
    assert done.exit_code == 0, done.output
    sheet = pixels("a.png")
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 2
    assert 0.5 < (sheet > 200).mean() < 0.95  # mostly paper
    assert (sheet < 55).mean() > 0.02  # and ink
    assert list(Path().iterdir()) == [Path("a.png")]  # nothing else is left behind


def test_sample_is_the_same_for_the_same_seed_alone():
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run(*SAMPLE, "--seed", seed, "--out", f"{name}.png").exit_code == 0
    a, b, c = map(pixels, ("a.png", "b.png", "c.png"))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    "option",
    [["--guidance", "3"], ["--classes", "7"], ["--solver", "ddim"], ["-o", "solver_type=taylor"]],
    ids=" ".join,
)
def test_every_option_of_sample_changes_the_picture(option):
    common = ["sample", "--count", "4", "--steps", "4", "--no-progress", "--classes", "3,5-6"]
    for name, extra in (("a.png", []), ("b.png", option)):
        done = run(*common, *extra, "--out", name)
        assert done.exit_code == 0, done.output
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


def test_sample_replaces_an_earlier_picture():
    Path("digits.png").write_bytes(b"old")
    assert run(*SAMPLE).exit_code == 0
    assert pixels("digits.png").ndim == 2
    assert list(Path().iterdir()) == [Path("digits.png")]


def test_sample_runs_a_saved_plan():
    plan = ["plan", "--prediction", "v", "--solver", "deis-2", "--steps", "2", "--out", "p.json"]
    assert run(*plan).exit_code == 0
    assert run("sample", "--count", "4", "--no-progress", "--plan", "p.json").exit_code == 0


def test_sample_refuses_a_plan_of_another_network():
    assert run("plan", "--schedule", "edm", "--solver", "heun", "--out", "p.json").exit_code == 0
    done = run("sample", "--plan", "p.json")
    assert done.exit_code == 1
    assert "the digits network needs prediction 'v'" in done.output
    assert not Path("digits.png").exists()


# -- compare ---------------------------------------------------------------------------------------


def test_compare_plots_and_tabulates_errors_that_fall():
    done = run(*COMPARE)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith(("ddim", "dpmpp"))]
    assert [row[0] for row in rows] == ["ddim", "dpmpp-2m"] * 2  # on both problems
    assert all(float(at_8) < float(at_4) for _, at_4, at_8 in rows)
    with Image.open("compare.png") as plot:
        assert plot.size[0] > 500


def test_compare_refuses_solvers_that_draw_noise():
    done = run("compare", "--solvers", "ddim,ddpm", "--nfe", "4", "--no-progress")
    assert done.exit_code == 1
    assert "ddpm draws noise" in done.output


# -- plan, solvers, doctor -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["vp-linear", "vp-cosine", "sd", "edm", "flow"])
def test_plan_prints_and_saves_what_the_library_makes(schedule):
    command = ["plan", "--schedule", schedule, "--solver", "ddim", "--steps", "3"]
    done = run(*command, "--out", "p.json")
    assert done.exit_code == 0, done.output
    plan = fd.Plan.load("p.json")
    assert plan.steps == 3
    assert str(plan) in done.output
    assert str(plan) in run("plan", "--load", "p.json").output


def test_solvers_lists_all_of_them_with_their_sources():
    fixed, adaptive = run("solvers").output.split("\n\n")
    lines = fixed.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(fd.solvers.names())
    chosen = [line.split()[0] for line in adaptive.splitlines()[2:]]
    assert chosen == list(fd.solvers.adaptive_names())
    assert all("arXiv" in line for line in lines)


def test_doctor_names_every_backend_and_the_versions():
    done = run("doctor")
    assert done.exit_code == 0, done.output
    for name in (*fd.backends.status(), "torch", "python", "fastdiff"):
        assert any(line.split()[:1] == [name] for line in done.output.splitlines()), name


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--solver", "dpmp-2m"], "dpmpp-2m"),  # the nearest
        (["sample", "--steps", "0"], "1 to 10000 is allowed; got 0."),
        (["sample", "--steps", "-3"], "1 to 10000 is allowed; got -3."),
        (["sample", "--steps", "ten"], "'ten' is not a whole number."),
        (["sample", "--steps", "10.5"], "'10.5' is not a whole number."),
        (["sample", "--steps", "99999999999"], "1 to 10000 is allowed; got 99999999999."),
        (["plan", "--steps", "9" * 5000], "1 to 10000 is allowed; got a number of 5000 digits."),
        (["sample", "--count", "0"], "1 to 10000 is allowed; got 0."),
        (["sample", "--seed", "9" * 20], "is allowed; got 99999999999999999999."),
        (["sample", "--guidance", "1e300"], "-10000 to 10000 is allowed; got 1e300."),
        (["sample", "--guidance", "nan"], "a finite number is needed; got nan."),
        (["sample", "--guidance", "much"], "'much' is not a number."),
        (["plan", "--t-max", "inf"], "a finite number is needed; got inf."),
        (["sample", "--classes", "a-b"], "not a list of numbers such as 0-9 or 3,5"),
        (["sample", "--classes", ""], "not a list of numbers such as 0-9 or 3,5"),
        (["sample", "--classes", "0-" + "9" * 5000], "the list ends at 10000"),
        (["compare", "--nfe", "1-99999999999"], "the list ends at 10000"),
        (["sample", "--classes", "9-0"], "ranges grow"),
        (["sample", "--classes", "3,10"], "the network knows the classes 0-9; got 10"),
        (["sample", "--out", "a.jpg"], "does not end in .png"),
        (["sample", "-o", "eta"], "not NAME=VALUE"),
        (["compare", "--solvers", "ddim,dpmp-2m"], "dpmpp-2m"),
        (["compare", "--nfe", "0-3"], "ranges grow, from 1 on"),
        (["plan", "--schedule", "vp-linera"], "'vp-linear'"),
        (["sample", "--colour", "red"], "No such option"),
        (["--colour"], "No such option"),
        (["sample", "digits"], "unexpected extra argument"),
        (["paint"], "No such command"),
    ],
)
def test_a_wrong_command_exits_2_and_says_what_is_allowed_in_one_line(arguments, said):
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("--help")
    assert said in line
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SAMPLE, "--out", "no/such/a.png"], "the folder no/such does not exist"),
        ([*SAMPLE, "--grid", "karas"], "'karras'"),
        ([*SAMPLE, "--backend", "abacus"], "abacus"),
        ([*SAMPLE, "-o", "eta=2"], "eta"),
        (["sample", "--plan", "none.json"], "none.json"),
        ([*COMPARE, "--out", "no/such/a.png"], "the folder no/such does not exist"),
        (["plan", "--solver", "deis-4", "--steps", "2"], "steps = 2"),
        (["plan", "--t-min", "5"], "t_min"),
        (["plan", "--load", "none.json"], "none.json"),
        (["plan", "--out", "no/such/p.json"], "the folder no/such does not exist"),
    ],
)
def test_work_that_fails_exits_1_with_one_line(arguments, said):
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert list(Path().iterdir()) == []


def test_a_folder_is_no_output():
    Path("a.png").mkdir()
    done = run(*SAMPLE, "--out", "a.png")
    assert done.exit_code == 1
    assert "error: --out: a file is needed; got the folder a.png" in done.output


def test_a_path_that_cannot_be_written_is_found_before_the_work(monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", path)

    def never(*_, **__):
        raise AssertionError("the work was done")

    monkeypatch.setattr(os, "open", refuse)  # root could write anywhere
    monkeypatch.setattr(fd, "sample", never)
    done = run(*SAMPLE, "--out", "a.png")
    assert done.exit_code == 1
    assert "a.png cannot be written (Permission denied)" in done.output


def test_a_device_is_no_output_and_stays():
    Path("a.png").symlink_to("/dev/null")
    done = run(*SAMPLE, "--out", "a.png")
    assert done.exit_code == 1
    assert "error: --out: a file is needed; got the device a.png" in done.output
    assert Path("/dev/null").is_char_device()


def test_pictures_that_are_not_finite_are_a_failure(monkeypatch):
    def overflow(network, x, plan, **_):
        return x / torch.tensor([0.0, 1.0, 1.0, 1.0]).view(-1, 1, 1, 1)

    monkeypatch.setattr(fd, "sample", overflow)
    done = run(*SAMPLE, "--guidance", "9000")
    assert done.exit_code == 1
    assert "got 1 of 4 pictures with values that are not, at guidance 9000" in done.stderr
    assert list(Path().iterdir()) == []


def test_errors_that_are_not_finite_are_a_failure(monkeypatch):
    monkeypatch.setattr(fd, "sample", lambda network, x, plan, **_: x * float("nan"))
    done = run(*COMPARE)
    assert done.exit_code == 1
    assert "ddim with 4 steps on digits, 8x8 got values that are not" in done.stderr
    assert list(Path().iterdir()) == []


def test_nothing_from_a_plan_file_steers_the_terminal():
    plan = fd.plan(fd.schedules.VPLinear(), "ddim", 2, prediction="v")
    evil = "\x1b]0;owned\x07\x9b2J\u202egnp.\r"
    Path("p.json").write_text(json.dumps({**json.loads(plan.to_json()), "solver": evil}))
    for command in (["plan", "--load", "p.json"], ["sample", "--plan", "p.json", "--no-progress"]):
        shown = run(*command)
        assert all(c.isprintable() or c == "\n" for c in shown.output)
        assert r"\x1b]0;owned\x07\x9b2J\u202egnp.\r" in shown.output
    wrong = run("plan", "--load", evil)
    assert wrong.exit_code == 1
    assert all(c.isprintable() or c == "\n" for c in wrong.output)


@pytest.mark.parametrize("command", [["plan", "--load"], ["sample", "--plan"]])
def test_a_missing_plan_file_is_named(command):
    done = run(*command, "nowhere.json")
    assert done.exit_code == 1
    assert "nowhere.json cannot be read" in done.stderr


@pytest.mark.parametrize(("text", "value"), [("False", False), ("true", True), ("True", True)])
def test_options_are_read_as_values(text, value):
    done = run("plan", "--solver", "deis-3", "-o", f"published={text}", "--out", "p.json")
    assert done.exit_code == 0, done.output
    plan = fd.plan(fd.schedules.VPLinear(), "deis-3", 10, published=value)
    assert fd.Plan.load("p.json") == plan


def test_a_failure_leaves_the_old_picture_as_it_was():
    Path("digits.png").write_bytes(b"old")
    done = run(*SAMPLE, "--backend", "abacus")
    assert done.exit_code == 1
    assert Path("digits.png").read_bytes() == b"old"
    assert list(Path().iterdir()) == [Path("digits.png")]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "fastdiff-plan"}', "\udcff"])
def test_a_broken_plan_file_is_named(text):
    Path("p.json").write_text(text, errors="surrogateescape")
    done = run("plan", "--load", "p.json")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "p.json" in done.stderr


def test_a_truncated_plan_file_is_refused():
    assert run("plan", "--out", "p.json").exit_code == 0
    text = Path("p.json").read_text()
    assert json.loads(text)
    Path("p.json").write_text(text[: len(text) // 2])
    assert "truncated" in run("plan", "--load", "p.json").output


def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("fastdiff")
    done = subprocess.run([command, "solvers"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("name")


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "fastdiff.cli", "solvers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("solvers").stdout


WITHOUT_CLICK = """
import sys
sys.modules["click"] = None
import fastdiff.cli
print("imported")
fastdiff.cli.main()
"""


def test_without_click_the_package_imports_and_the_command_says_what_to_install():
    command = [sys.executable, "-c", WITHOUT_CLICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == "imported\n"
    assert done.stderr.splitlines()[-1].endswith('Run: pip install "fastdiff-engine[cli]"')
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("module", "command"), [("PIL", SAMPLE), ("tqdm", COMPARE)])
def test_a_missing_package_is_named(module, command, monkeypatch):
    monkeypatch.delitem(sys.modules, "PIL.Image", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    done = run(*command)
    assert done.exit_code == 1
    assert f"this command needs {module}; it is not installed" in done.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--load", "p.json", "--steps", "50"],
        ["plan", "--load", "p.json", "--schedule", "edm", "--t-max", "1"],
        ["sample", "--plan", "p.json", "--solver", "ddim", "-o", "eta=1"],
    ],
)
def test_an_option_of_a_plan_beside_a_plan_of_a_file_is_refused(command):
    fd.plan(fd.schedules.VPLinear(), "ddim", 3, prediction="v").save("p.json")
    done = run(*command)
    assert done.exit_code == 2
    for name in command[3::2]:
        assert name in done.output
    assert "Leave them out" in done.output
