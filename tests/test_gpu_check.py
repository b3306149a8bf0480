# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: phases that do not keep each other from running, and a page never behind."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name="gpu_check"):
    """A script of `benchmarks/`, which is in no package."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


check, phases = load(), load("phases")
Phase = phases.Phase


def python(code, name="phase", seconds=60.0, **options):
    return Phase(name, [sys.executable, "-c", code], seconds, **options)


def until(done, seconds=30.0):
    """Waits for something that another process does."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# -- phases ----------------------------------------------------------------------------------------


def test_a_phase_that_fails_or_hangs_keeps_no_other_from_running(tmp_path):
    log, mark = tmp_path / "log", tmp_path / "mark"
    late = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    todo = [
        python("print('why'); raise SystemExit(3)", "fails"),
        python(hang, "hangs", 0.5),
        python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "dies"),
        Phase("absent", [str(tmp_path / "no-such-program")], 60),
        python("raise ValueError('the reason')", "raises"),
        python("print('well')", "passes"),
    ]
    results = phases.run_phases(todo, log, os.environ, 600)
    assert [r.how for r in results[:3]] == [
        "failed (exit 3)",
        "stopped after 0.5 s",
        "failed (exit -11)",
    ]
    assert results[3].how.startswith("failed (")
    assert [r.passed for r in results] == [False] * 5 + [True]
    assert (results[0].last, results[5].last) == ("why", "well")
    assert results[1].seconds < 1.9
    assert not mark.exists()
    assert "Traceback (most recent call last)" in log.read_text()
    assert "ValueError: the reason" in results[4].text


def test_the_page_is_written_after_each_phase_and_while_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "TICK", 0.05)
    part, page = tmp_path / "stage.md", tmp_path / "page.md"
    wait = f"import time, pathlib\nwhile not pathlib.Path({str(page)!r} + '.seen').exists(): "
    wait += "time.sleep(0.02)"
    todo = [
        python("print('FAILED tests/test_a.py::test_b (call)\\nE   an error')", "tests"),
        python(
            f"import pathlib; pathlib.Path({str(part)!r}).write_text('a row\\n')\n{wait}",
            "stage benchmark",
            page=part,
        ),
        python("print('2 of 3 met')", "targets", shows=True),
    ]
    seen = []

    def write(results):
        text = phases.page("Check", "a device", todo, results)
        phases.put(page, text)
        seen.append(text)
        if "a row" in text:
            Path(f"{page}.seen").touch()

    phases.run_phases(todo, tmp_path / "log", os.environ, 600, write)
    while_running = next(text for text in seen if "a row" in text)
    assert "| stage benchmark | not ended |" in while_running
    after_tests = next(text for text in seen if "| tests | passed |" in text)
    assert "| targets | not ended |" in after_tests
    assert "## Stage benchmark\n\nNothing yet." in after_tests
    assert "- `tests/test_a.py::test_b`\n" in page.read_text()
    assert "## Targets\n\n2 of 3 met\n" in page.read_text()
    assert list(tmp_path.glob(".page*")) == []


def test_what_a_phase_leaves_over_goes_to_those_that_grow():
    todo = [
        Phase("build", [], 100),
        Phase("tests", [], 50),
        Phase("stage", [], 30, True, 5),
        Phase("loop", [], 10, True, 5),
        Phase("targets", [], 10),
    ]
    assert phases.limit_of(todo, 200.0) == 100  # nothing is over
    assert phases.limit_of(todo, 500.0) == 100  # it has its limit, whatever is over
    # 80 s over for 30 and 10: they share it as 3 to 1
    assert phases.limit_of(todo[2:], 130.0) == 30 + 60
    assert phases.limit_of(todo[3:], 100.0) == 10 + 80
    assert phases.limit_of(todo[2:], 20.0) == 20  # never past the end
    assert phases.limit_of(todo[4:], -1.0) < 0


def test_no_phase_begins_after_the_end(tmp_path):
    todo = [python("import time; time.sleep(30)", "long", 0.3), python("print()", "late")]
    results = phases.run_phases(todo, tmp_path / "log", os.environ, 0.3)
    assert [r.how for r in results] == ["stopped after 0.3 s", "left out: the time is up"]


def test_a_phase_plans_with_its_limit_less_what_it_spares(tmp_path):
    show = "import os, sys; print(sys.argv[1], os.environ['FOR_IT'])"
    command = [sys.executable, "-c", show, phases.BUDGET]
    phase = Phase("stage", command, 30, True, 5, environment={"FOR_IT": "alone"})
    result = phases.run_phase(phase, tmp_path / "log", os.environ, 90)
    assert result.last == "85 alone"


DRIVER = """
import sys, pathlib
sys.path.insert(0, {benchmarks!r})
import gpu_check, phases
phases.TICK = 0.05
gpu_check.probe = lambda: {{"gpu": "a fake", "torch": "0"}}
one = phases.Phase("tests", [sys.executable, "-c", "print('FAILED a::b (call)')"], 60)
def listed(setting, folders, cpu, commit):
    code = f'''
import pathlib, time, os
pathlib.Path({{str(folders[0] / "stage.jsonl")!r}}).write_text('{{{{"row": 1}}}}\\\\n')
pathlib.Path({{str(folders[1] / "stage.md")!r}}).write_text('the first row\\\\n')
print("pid", os.getpid(), flush=True)
time.sleep(60)'''
    stage = phases.Phase("stage", [sys.executable, "-c", code], 60, page=folders[1] / "stage.md")
    return [one, stage]
gpu_check.phases_of = listed
gpu_check.ROOT = pathlib.Path({root!r})
sys.exit(gpu_check.main([]))
"""


def alive(pid):
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_check_leaves_the_page_the_rows_and_no_process(tmp_path, how):
    out, driver = tmp_path / "out", tmp_path / "driver.py"
    text = DRIVER.format(benchmarks=str(ROOT / "benchmarks"), root=str(tmp_path / "root"))
    driver.write_text(text)
    environment = {**os.environ, "OUT": str(out)}
    check_process = subprocess.Popen([sys.executable, str(driver)], env=environment)
    page = out / "gpu-check.md"
    try:
        until(lambda: page.exists() and "the first row" in page.read_text())
        pid = int(re.search(r"^pid (\d+)$", (out / "gpu-check.log").read_text(), re.M)[1])
        assert alive(pid)
        check_process.send_signal(how)
        assert check_process.wait(20) == (-9 if how == signal.SIGKILL else 128 + 15)
        until(lambda: not alive(pid), 10)
    finally:
        check_process.kill()
        check_process.wait()
    assert "| tests | passed |" in page.read_text()
    assert "- `a::b`" in page.read_text()
    assert "| stage | not ended |" in page.read_text()
    assert json.loads((out / "stage.jsonl").read_text()) == {"row": 1}
    assert "FAILED a::b (call)" in (out / "gpu-check.log").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["gpu-check.log", "gpu-check.md", "stage.jsonl"]


# -- the plugin of the tests -----------------------------------------------------------------------

BROKEN = """
import time, pytest, support.at_once
@pytest.mark.parametrize("i", range(10))
def test_x(i):
    if i == 2:
        support.at_once.broken = lambda: "an illegal address"
        raise ValueError("the first reason")
    if i == 5:
        time.sleep(60)
    assert i != 7, "the second reason"
"""


def at_once(folder, *options):
    """What pytest says of `BROKEN`, and the code that it ends with."""
    (folder / "test_it.py").write_text(BROKEN)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.at_once", "-rfE", "--tb=short"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--test-seconds", "1.5", *options, "test_it.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_broken_or_hanging_worker_costs_its_own_test_alone(tmp_path):
    pytest.importorskip("xdist")
    code, said, errors = at_once(tmp_path, "-n", "2", "--dist", "worksteal")
    assert code == 1
    # test 2 failed and then ended its worker, test 5 hung, test 7 failed: 7 others passed
    assert "4 failed, 7 passed" in said
    assert "left a CUDA context that serves no further test: an illegal address" in errors
    assert "Timeout" in errors
    assert "in test_x" in errors  # where it hung
    first = said.index("FAILED test_it.py::test_x[2] (call)")
    summary = said.index("short test summary")
    assert first < said.index("ValueError: the first reason") < summary
    assert said.count("the second reason") == 2 + 1  # the line, its error; and the summary's
    assert said.index("FAILED test_it.py::test_x[7] (call)") < summary


def test_without_workers_a_broken_context_ends_the_tests(tmp_path):
    code, said, _ = at_once(tmp_path)
    assert code == 70
    assert "FAILED test_it.py::test_x[2] (call)" in said
    assert "1 failed, 2 passed" in said


# -- what the phases are ---------------------------------------------------------------------------


def test_the_phases_come_by_worth_and_fit_in_their_minutes(tmp_path):
    folders = (tmp_path / "rows", tmp_path / "pages")
    for setting, most in (("short", 360), ("full", 580)):
        todo = check.phases_of(setting, folders, False, "abc")
        names = [p.name for p in todo]
        assert names[:8] == ["build", *check.TESTS, "choice", "stage benchmark"]
        assert names[8:10] == ["loop benchmark", "gradients benchmark"]
        compiled = ["compiled loop benchmark", "compiled stage benchmark"]
        assert names[10:] == [*(compiled if setting == "full" else []), "targets"]
        assert sum(p.seconds for p in todo) <= check.TOTAL[setting] < most
        for phase in todo[7:-1]:
            assert f"--{setting}" in phase.command
            assert phase.command[phase.command.index("--budget") + 1] == phases.BUDGET
            assert phase.command[phase.command.index("--commit") + 1] == "abc"
            # a cell that begins at the end of the budget has time to end
            assert phase.grows
            assert phase.seconds > phase.spare
            assert phase.spare >= 10
            assert ("--compile" in phase.command) == phase.name.startswith("compiled")
        # what comes back from a lent machine is 8 files at most; pages are not among them
        rows = {p for phase in todo for p in phase.command if p.startswith(str(folders[0]))}
        assert len(rows | {"gpu-check.md", "gpu-check.log"}) <= 8


@pytest.mark.slow
def test_every_test_marked_gpu_is_in_one_phase():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "tests"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(found) > 10, done.stdout + done.stderr
    listed = [path for name in check.TESTS for path in check.files_of(name)]
    assert found <= set(listed)
    assert len(listed) == len(set(listed))


def test_tests_run_in_workers_of_the_phase_with_their_failures_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: object())
    phase = check.tests_of("cuda tests", "full", False)
    text = " ".join(phase.command)
    for option in ("-m gpu", "-n 8", "-p support.at_once", "-W default", "--tb=short", "-rfE"):
        assert option in text
    assert str(ROOT / "tests") in phase.environment["PYTHONPATH"].split(os.pathsep)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in check.tests_of("cuda tests", "full", False).command


def test_wheels_are_unpacked_and_not_installed(tmp_path):
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "x = 5\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nVersion: 1.0\n")
    found = check.unpacked(tmp_path, tmp_path / "there")
    show = "import carried, importlib.metadata as m; print(carried.x, m.version('carried'))"
    phase = python(show, environment={"PYTHONPATH": found})
    assert phases.run_phase(phase, tmp_path / "log", os.environ).last == "5 1.0"
    with pytest.raises(SystemExit, match="--wheels is a folder with wheels"):
        check.unpacked(tmp_path / "there", tmp_path / "x")


# -- the whole -------------------------------------------------------------------------------------


def test_the_gpu_check_is_refused_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "probe", lambda: {"torch": "2.13.0+cpu", "gpu": None})
    monkeypatch.setattr(check, "run_phases", lambda *a: pytest.fail("it ran"))
    assert check.main([]) == 2
    assert "a CUDA device is needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_gpu_check_sums_up_and_fails_with_its_phases(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "ROOT", tmp_path / "root")
    monkeypatch.setattr(check.signal, "signal", lambda *a: None)
    monkeypatch.delenv("FASTDIFF_CUDA_ARCHS", raising=False)
    found = {"torch": "2.11.0", "gpu": "A GPU", "arch": "90"}
    monkeypatch.setattr(check, "probe", lambda: found)
    show = "import os; print(os.environ['FASTDIFF_CUDA_ARCHS'], 'TRITON_INTERPRET' in os.environ)"
    codes = iter([0, 1])

    def listed(setting, folders, cpu, commit):
        for name in ("stage", "loop"):
            (folders[1] / f"{name}.md").write_text(f"the {name}s\n")
        one = python(f"{show}; exit({next(codes)})", "only", page=folders[1] / "stage.md")
        return [one, python("", "more", page=folders[1] / "loop.md")]

    monkeypatch.setattr(check, "phases_of", listed)
    assert check.main(["--setting", "short"]) == 0
    text = (tmp_path / "gpu-check.md").read_text()
    assert "gpu A GPU" in text
    assert "`90 False`" in text
    assert text.index("the stages") < text.index("the loops")
    assert [p.name for p in sorted(tmp_path.glob("gpu*"))] == ["gpu-check.log", "gpu-check.md"]
    assert check.main(["--setting", "short"]) == 1
    assert "not passed: only" in capsys.readouterr().err


def test_rows_of_a_dry_run_are_no_results(tmp_path, monkeypatch):
    found = []

    def listed(setting, folders, *rest):
        found.append(folders[0])
        return [python("print('well')")]

    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "probe", lambda: {"gpu": None, "torch": "2"})
    monkeypatch.setattr(check, "phases_of", listed)
    monkeypatch.setattr(phases, "ROOT", tmp_path)
    assert check.main(["--cpu"]) == 0
    assert found == [tmp_path / "out"]
    assert not (tmp_path / "benchmarks").exists()
    assert (tmp_path / "out" / "gpu-check-cpu.md").exists()


@pytest.mark.slow
def test_a_dry_run_on_the_cpu_goes_through_every_part(tmp_path):
    pytest.importorskip("triton", reason="the tests of the check's first phase import it")
    script = str(ROOT / "benchmarks" / "gpu_check.py")
    command = [sys.executable, script, "--cpu", "--setting", "short", "--commit", "0123456789ab"]
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log = (tmp_path / "gpu-check.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    text = (tmp_path / "gpu-check-cpu.md").read_text()
    for phase in check.phases_of("short", (tmp_path, tmp_path), True):
        assert f"| {phase.name} | passed |" in text
    assert "skipped" in log
    assert "M=2 G=1 float32" in text
    assert "M=3" not in text  # `--only`
    assert "not measured" in text
    for bench in ("stage", "loop"):
        rows = (tmp_path / f"{bench}.jsonl").read_text().splitlines()
        assert {json.loads(row)["commit"] for row in rows} == {"0123456789ab"}
