# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: phases that do not keep each other from running, and a page that sums up."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load():
    """`benchmarks/gpu_check.py`, which is a script and in no package."""
    path = ROOT / "benchmarks" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_phase_that_fails_or_hangs_keeps_no_other_from_running(tmp_path):
    check, log = load(), tmp_path / "log"
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
    check = load()
    for setting, most in (("short", 360), ("full", 540)):
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
    check = load()
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "probe", lambda: {"torch": "2.13.0+cpu", "gpu": None})
    monkeypatch.setattr(check, "run_phases", lambda *a: pytest.fail("it ran"))
    assert check.main([]) == 2
    assert "a CUDA device is needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_gpu_check_sums_up_and_fails_with_its_phases(monkeypatch, capsys, tmp_path):
    check = load()
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
