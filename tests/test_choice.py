# SPDX-License-Identifier: Apache-2.0
"""Which backend serves where several can: measured times, the file that keeps them, the order."""

import dataclasses
import json
import os
import threading
import warnings

import pytest
import torch
from click.testing import CliRunner

import fastdiff as fd
from fastdiff import backends
from fastdiff.backends import choice
from fastdiff.cli.app import commands

CPU = torch.device("cpu")
F32, F64 = torch.float32, torch.float64
SMALL, BIG = choice.LARGE - 1, choice.LARGE


class Fake:
    """A backend that is the reference under another name."""

    capturable = counts_writes = True

    def __init__(self, name):
        self.name, self.lacks, self.refuses = name, None, ()

    def missing(self):
        return self.lacks

    def supports(self, state, network, device, layout=None):
        return "not that" if state in self.refuses or device.type != "cpu" else None

    def bind(self, *arguments):
        return backends.get("torch").bind(*arguments)


class Timer:
    """Seconds that a test says, by the order of the cells; counts what it was asked."""

    def __init__(self, monkeypatch, rule):
        self.calls, self.rule = 0, rule
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(choice, "seconds_of", self)
        self.cell = None
        real = choice._times

        def times(fit, plan, of, device, timer):
            noisy = any(stage.noise for stage in plan.stages)
            self.cell = (str(of[0]).removeprefix("torch."), noisy, of[1] > 100)
            self.names = iter([backend.name for backend in fit])
            return real(fit, plan, of, device, timer)

        monkeypatch.setattr(choice, "_times", times)

    def __call__(self, call, device):
        self.calls += 1
        call()
        return self.rule(next(self.names), *self.cell)


def noisy_rows_are_second_s(name, state, noisy, large):
    """`second` wins where noise is drawn on a large state, and nowhere else."""
    return 1e-6 if (name == "second") == (noisy and large) else 2e-6


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Backends `first` and `second` in front of the reference, and a cache of their own."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTDIFF_CHOOSE", raising=False)
    monkeypatch.setattr(choice, "NUMBERS", {"small": 64, "large": 128})
    fakes = {name: Fake(name) for name in ("first", "second")}
    every = {**fakes, "torch": backends.get("torch")}
    monkeypatch.setattr(backends, "_BACKENDS", every)
    choice.TABLES.forget()
    yield fakes
    choice.TABLES.forget()


def chosen(state=F32, noisy=False, elements=SMALL, name=None):
    return backends.choose(name, state, state, CPU, noisy=noisy, elements=elements).name


def everywhere():
    return [
        chosen(state, noisy, elements)
        for state in (F32, F64)
        for noisy in (False, True)
        for elements in (SMALL, BIG)
    ]


def test_without_a_table_the_order_of_the_names_decides_and_nothing_is_measured(two, monkeypatch):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    assert everywhere() == ["first"] * 8
    assert timer.calls == 0
    assert not choice.table_path().exists()
    assert backends.table(CPU) is None


def test_measured_times_decide_by_dtype_noise_and_size(two, monkeypatch):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    table = backends.measure(CPU)
    assert timer.calls == 8 * 2
    assert table.cells[("float32", True, "large")] == {"first": 2e-6, "second": 1e-6}
    assert everywhere() == ["first", "first", "first", "second"] * 2
    # a size that nobody tells is no reason to leave the order
    assert backends.choose(None, F32, F32, CPU, noisy=True).name == "first"


def test_a_backend_asked_for_by_name_is_given(two, monkeypatch):
    Timer(monkeypatch, noisy_rows_are_second_s)
    backends.measure(CPU)
    for name in ("first", "second", "torch"):
        assert chosen(noisy=True, elements=BIG, name=name) == name


def test_a_sampler_takes_what_serves_its_plan_and_its_size(two, monkeypatch):
    Timer(monkeypatch, noisy_rows_are_second_s)
    monkeypatch.setattr(backends, "LARGE", 100)
    monkeypatch.setattr(choice, "LARGE", 100)
    backends.measure(CPU)
    bound = []
    for fake in two.values():
        bind = fake.bind
        monkeypatch.setattr(
            fake, "bind", lambda *a, f=fake, b=bind: (bound.append(f.name), b(*a))[1]
        )
    quiet, noisy = (fd.plan(fd.schedules.VPLinear(), s, 2) for s in ("ddim", "ddpm"))
    sampler = fd.Sampler(lambda x, t: 0.5 * x, quiet)
    sampler(torch.ones(2, 8), seed=0)
    sampler(torch.ones(16, 8), seed=0)
    sampler.set_plan(noisy)
    sampler(torch.ones(2, 8), seed=0)
    sampler(torch.ones(16, 8), seed=0)
    assert bound == ["first", "first", "first", "second"]


def test_the_file_is_read_by_the_next_process_which_measures_nothing(two, monkeypatch):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    monkeypatch.setenv("FASTDIFF_CHOOSE", "measure")
    assert everywhere() == ["first", "first", "first", "second"] * 2
    assert timer.calls == 16
    choice.TABLES.forget()  # as a new process begins
    assert everywhere() == ["first", "first", "first", "second"] * 2
    assert timer.calls == 16
    assert backends.table(CPU).source == str(choice.table_path())


@pytest.mark.parametrize("part", ["fastdiff", "torch", "triton"])
def test_times_of_other_versions_are_not_used(two, monkeypatch, part):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    backends.measure(CPU)
    path = choice.table_path()
    kept = json.loads(path.read_text())
    kept["classes"][0]["versions"][part] = "0.0"
    other = {**kept["classes"][0], "device": "another device"}
    path.write_text(json.dumps({**kept, "classes": [*kept["classes"], other]}))
    choice.TABLES.forget()
    assert chosen(noisy=True, elements=BIG) == "first"
    choice.TABLES.forget()
    monkeypatch.setenv("FASTDIFF_CHOOSE", "measure")
    assert chosen(noisy=True, elements=BIG) == "second"
    assert timer.calls == 32
    # what is measured takes the place of the old versions, and leaves other devices alone
    devices = [item["device"] for item in json.loads(path.read_text())["classes"]]
    assert devices == ["another device", "cpu"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2}',
        '{"version": 1, "classes": [{}]}',
        "[" * 100_000,
        '{"version": 1, "classes": [{"device": "cpu", "capability": "", "versions": {}, '
        '"cells": [{"state": "float32", "noise": true, "size": "large", '
        '"microseconds": {"first": NaN}}]}]}',
        "x" * (choice.MOST_BYTES + 1),
    ],
    ids=["empty", "cut", "list", "version", "parts", "deep", "nan", "long"],
)
def test_a_broken_file_is_said_once_and_not_used(two, monkeypatch, text):
    path = choice.table_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="doctor --measure` writes it anew"):
        assert chosen() == "first"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert everywhere() == ["first"] * 8
    Timer(monkeypatch, noisy_rows_are_second_s)
    backends.measure(CPU)
    choice.TABLES.forget()
    assert chosen(noisy=True, elements=BIG) == "second"


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_said_and_not_waited_for(two, kind):
    path = choice.table_path()
    path.parent.mkdir(parents=True)
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.warns(RuntimeWarning, match="a regular file"):
        assert chosen() == "first"


def test_a_folder_that_cannot_be_written_costs_a_warning(two, monkeypatch, tmp_path):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("FASTDIFF_CHOOSE", "measure")
    with pytest.warns(RuntimeWarning, match="FASTDIFF_CACHE names another folder"):
        assert chosen(noisy=True, elements=BIG) == "second"
    assert chosen(noisy=True, elements=BIG) == "second"
    assert timer.calls == 16
    with pytest.raises(OSError, match="cache"):
        backends.measure(CPU)


def test_nothing_is_measured_while_a_graph_is_recorded_or_a_function_compiled(two, monkeypatch):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    monkeypatch.setenv("FASTDIFF_CHOOSE", "measure")
    with monkeypatch.context() as inside:
        inside.setattr(torch.compiler, "is_compiling", lambda: True)
        assert chosen(noisy=True, elements=BIG) == "first"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not choice.can_measure(torch.device("cuda", 0))
    assert timer.calls == 0
    assert chosen(noisy=True, elements=BIG) == "second"


def test_threads_measure_once(two, monkeypatch):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    monkeypatch.setenv("FASTDIFF_CHOOSE", "measure")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(chosen(noisy=True, elements=BIG)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["second"] * 4
    assert timer.calls == 16


def test_names_decide_where_that_is_asked_for(two, monkeypatch):
    Timer(monkeypatch, noisy_rows_are_second_s)
    backends.measure(CPU)
    monkeypatch.setenv("FASTDIFF_CHOOSE", "name")
    assert everywhere() == ["first"] * 8
    monkeypatch.setenv("FASTDIFF_CHOOSE", "fastest")
    with pytest.raises(ValueError, match='FASTDIFF_CHOOSE is "measure", "name" or not set'):
        chosen()


def test_one_backend_is_no_choice(two, monkeypatch):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    two["first"].lacks = "it is not built"
    monkeypatch.setenv("FASTDIFF_CHOOSE", "measure")
    assert everywhere() == ["second"] * 8
    assert backends.measure(CPU) is None
    assert timer.calls == 0


def test_a_backend_that_cannot_serve_is_not_chosen_by_its_times(two, monkeypatch):
    Timer(monkeypatch, noisy_rows_are_second_s)
    backends.measure(CPU)
    two["second"].refuses = (F64,)
    assert chosen(F32, True, BIG) == "second"
    assert chosen(F64, True, BIG) == "first"


def test_a_cell_that_one_backend_serves_is_not_measured(two, monkeypatch):
    timer = Timer(monkeypatch, noisy_rows_are_second_s)
    two["second"].refuses = (F64,)
    assert {cell[0] for cell in backends.measure(CPU).cells} == {"float32"}
    assert timer.calls == 8


def test_a_few_per_cent_do_not_change_the_order():
    of = choice.class_of(CPU)
    cell = ("float32", False, "small")

    def fastest(second, names=("first", "second")):
        table = choice.Table(of, {cell: {"first": 1e-6, "second": second}}, "")
        return table.fastest(cell, names)

    assert fastest(0.98e-6) == "first"
    assert fastest(0.96e-6) == "second"
    assert fastest(0.96e-6, ("first", "third")) is None


def test_a_table_may_come_with_the_package_and_the_users_own_goes_first(two, monkeypatch, tmp_path):
    cell = ("float32", False, "small")
    of = choice.DeviceClass("cpu", "", (("torch", "another"),))  # its versions do not count
    shipped = choice.Table(of, {cell: {"first": 2e-6, "second": 1e-6}}, "")
    monkeypatch.setattr(choice, "SHIPPED", tmp_path / "measured.json")
    choice.write(choice.SHIPPED, [shipped])
    assert chosen() == "second"
    assert backends.table(CPU).source == "the package"
    Timer(monkeypatch, noisy_rows_are_second_s)
    backends.measure(CPU)
    assert chosen() == "first"


def test_tables_of_the_package_name_backends_and_cells_that_exist():
    assert choice.SHIPPED.exists()
    for table in choice.read(choice.SHIPPED):
        assert table.of.capability
        for (state, _, size), times in table.cells.items():
            assert state in choice.STATES
            assert size in choice.NUMBERS
            assert set(times) <= set(backends.names())


def test_a_file_gives_back_what_was_written(tmp_path):
    of = dataclasses.replace(choice.class_of(CPU), device="A device", capability="9.0")
    table = choice.Table(of, {("float64", True, "large"): {"cuda": 1.25e-6, "triton": 3e-3}}, "")
    choice.write(tmp_path / "new" / "a.json", [table])
    (found,) = choice.read(tmp_path / "new" / "a.json")
    assert (found.of, found.cells) == (of, table.cells)
    assert choice.read(tmp_path / "none.json") == []


def test_the_doctor_shows_and_measures_the_choice(two, monkeypatch, tmp_path):
    Timer(monkeypatch, noisy_rows_are_second_s)
    run = CliRunner().invoke
    assert "cpu: first serves before second, by the order" in run(commands, ["doctor"]).output
    done = run(commands, ["doctor", "--measure"])
    assert done.exit_code == 0, done.output
    assert "Times: measured here." in done.output
    assert "float32  yes    large  2.00       1.00        second" in done.output
    choice.TABLES.forget()
    assert f"Times: {choice.table_path()}." in run(commands, ["doctor"]).output
    out = tmp_path / "kept" / "choice.json"
    assert run(commands, ["doctor", "--measure", "--out", str(out)]).exit_code == 0
    assert len(choice.read(out)[0].cells) == 8
    refused = run(commands, ["doctor", "--out", str(out)])
    assert refused.exit_code == 2
    assert "Give --measure as well" in refused.output
    two["second"].lacks = "it is not built"
    assert "cpu: first serves. Nothing is to be chosen." in run(commands, ["doctor"]).output
    done = run(commands, ["doctor", "--measure", "--out", str(out)])
    assert done.exit_code == 0
    assert "Nothing was measured." in done.output


def test_the_doctor_does_not_show_a_table_that_is_not_used(two, monkeypatch):
    Timer(monkeypatch, noisy_rows_are_second_s)
    backends.measure(CPU)
    monkeypatch.setenv("FASTDIFF_CHOOSE", "name")
    done = CliRunner().invoke(commands, ["doctor"])
    assert "by the order of the names. FASTDIFF_CHOOSE=name." in done.output
    assert "Times:" not in done.output
    monkeypatch.setenv("FASTDIFF_CHOOSE", "nmae")
    done = CliRunner().invoke(commands, ["doctor"])
    assert done.exit_code == 1
    assert "got 'nmae'" in done.output


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    assert choice.table_path() == tmp_path / "backends.json"
    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.setattr(choice.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert choice.table_path() == tmp_path / "x" / "fastdiff" / "backends.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice.table_path() == tmp_path / ".cache" / "fastdiff" / "backends.json"
    monkeypatch.setattr(choice.sys, "platform", "darwin")
    assert choice.table_path() == tmp_path / "Library" / "Caches" / "fastdiff" / "backends.json"


@pytest.mark.gpu
def test_a_device_is_measured_by_replays(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    device = torch.device("cuda", 0)
    if len(backends.rivals(device)) < 2:
        pytest.skip("one backend runs here")
    table = backends.measure(device)
    choice.TABLES.forget()
    assert backends.table(device).cells.keys() == table.cells.keys()
    assert len(table.cells) == 8
    for times in table.cells.values():
        assert all(1e-7 < seconds < 1e-1 for seconds in times.values())
    choice.TABLES.forget()
