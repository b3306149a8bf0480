# SPDX-License-Identifier: Apache-2.0
"""Plan files that would take the time, the memory, the terminal or the neighbours' files."""

import json
import os
import stat
import threading
import time

import pytest
from support.refusals import REFUSALS, alone, refused

import fastdiff as fd

PLAN = fd.plan(fd.schedules.VPLinear(), "deis-3", 4, prediction="v", t_max=0.9)
# A file is loaded in a process of its own, which may take 8 GiB of addresses.
LOAD = """
import resource, fastdiff as fd
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    fd.Plan.load({path!r}{options})
    print("loaded")
except (ValueError, TypeError, OSError) as error:
    print("refused:", str(error)[:300])
"""


def load_alone(path, options="", timeout=30):
    return alone(LOAD.format(path=str(path), options=options), timeout)


def data_of(plan=PLAN):
    return json.loads(plan.to_json())


# -- D8: rows that read what is not there ----------------------------------------------------------


def test_a_stage_without_an_evaluation_reads_no_further_than_the_first_output():
    first = fd.Stage(t=1.0)
    with refused("reads"):
        fd.Plan((first, fd.Stage(t=0.5, evaluate=False, b=(0.0, 0.0, 1.0))), (1.0, 0.0))
    plan = fd.Plan((first, fd.Stage(t=0.5, evaluate=False, b=(0.0, 1.0))), (1.0, 0.0))
    assert plan.slots == 1


# -- D9: time and memory ---------------------------------------------------------------------------


def took(text):
    """Seconds until the text is a plan or refused."""
    start = time.perf_counter()
    try:
        fd.Plan.from_json(text)
    except REFUSALS as error:
        assert len(str(error)) < 2000
    return time.perf_counter() - start


@pytest.mark.parametrize("where", ["plan", "stage"])
def test_many_keys_are_read_in_linear_time(where):
    data = data_of()
    node = data if where == "plan" else data["stages"][0]
    node.update({f"key {i}": 0 for i in range(20_000)})
    assert took(json.dumps(data)) < 3.0


@pytest.mark.parametrize("name", ["b", "g", "r", "noise"])
def test_long_rows_are_read_in_linear_time(name):
    data = data_of()
    data["stages"][0][name] = [0] * 100_000
    assert took(json.dumps(data)) < 3.0


def test_a_device_is_not_read(tmp_path):
    assert load_alone("/dev/zero").startswith("refused: ")


def test_a_pipe_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert load_alone(pipe).startswith("refused: ")


def test_a_file_past_the_limit_is_refused_and_the_limit_is_the_callers(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    size = path.stat().st_size
    assert fd.Plan.load(path, max_bytes=size) == PLAN
    with refused("max_bytes"):
        fd.Plan.load(path, max_bytes=size - 1)
    with open(path, "ab") as file:
        file.truncate(1 << 32)  # takes no room on the disk
    assert load_alone(path).startswith("refused: ")


# -- D10, D11: saving ------------------------------------------------------------------------------


def test_saving_leaves_the_umask_alone(tmp_path, monkeypatch):
    def touched(mask):
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", touched)
    PLAN.save(tmp_path / "plan.json")
    assert fd.Plan.load(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_mode_that_open_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        PLAN.save(tmp_path / "plan.json")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plan.json", "other")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_the_mode_of_a_file_is_kept(tmp_path, mode):
    path = tmp_path / "plan.json"
    path.touch()
    path.chmod(mode)
    try:
        PLAN.save(path)
    except OSError as error:
        assert (mode, error.filename) == (0o444, str(path))  # read-only may be taken at its word
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_link_is_followed_or_refused(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    try:
        PLAN.save(link)
    except (OSError, *REFUSALS):
        assert target.read_text() == "old"
    else:
        assert fd.Plan.load(target) == PLAN
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "target.json"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    printed = alone(f"""
import fastdiff as fd
plan = fd.plan(fd.schedules.VPLinear(), "ddim", 2)
try:
    plan.save({str(pipe)!r})
    print("saved")
except OSError as error:
    print("refused:", error)
""")
    assert printed.startswith("refused: ")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_threads_that_save_one_file_leave_one_whole_plan(tmp_path):
    path = tmp_path / "plan.json"
    many = [fd.plan(fd.schedules.VPLinear(), "ddim", n) for n in range(1, 9)]
    threads = [threading.Thread(target=p.save, args=(path,)) for p in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fd.Plan.load(path) in many
    assert list(tmp_path.iterdir()) == [path]


# -- D14, D16: what a file says --------------------------------------------------------------------


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["x0_p", "x0_q"])
def test_an_infinite_prediction_is_refused_or_saved(name, value):
    text = fd.Plan((fd.Stage(t=1.0, **{name: 12345.0}),), (1.0, 0.0)).to_json()
    try:
        plan = fd.Plan.from_json(text.replace("12345.0", value))
    except ValueError as error:
        assert name in str(error) or "finite" in str(error) or value.strip("-") in str(error)
        return
    assert fd.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", ["solver", "schedule"])
@pytest.mark.parametrize("odd", ["\ud800", "a\x1b[2Jb", "a\x9bb", "a\rb\x07", "a\nb", "a\u202eb"])
def test_names_neither_break_printing_nor_reach_the_terminal(name, odd):
    data = data_of()
    data[name] = odd
    try:
        plan = fd.Plan.from_json(json.dumps(data))
    except REFUSALS as error:
        shown = str(error)
    else:
        shown = str(plan)
        assert fd.Plan.from_json(plan.to_json()) == plan
    shown.encode()
    assert not set(shown) & set("\x1b\x9b\r\x07\u202e\ud800")
    assert len(shown.splitlines()) <= 1 + 2 * len(PLAN.stages)


def test_an_error_quotes_no_escape_sequences():
    for text in ('{"format": "fastdiff-plan", "version": 1, "\x1b[2J": 1}', '{"a": "\\u001b[2J"}'):
        with pytest.raises(REFUSALS) as caught:
            fd.Plan.from_json(text)
        assert "\x1b" not in str(caught.value)


def test_a_byte_order_mark_is_no_truncation(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xef\xbb\xbf" + PLAN.to_json().encode())
    try:
        assert fd.Plan.load(path) == PLAN
    except ValueError as error:
        shown = str(error)
        assert "truncated" not in shown
        assert "byte" in shown or "BOM" in shown


@pytest.mark.parametrize("where", ["field", "value", "stage field", "number"])
def test_messages_are_short_whatever_the_file_holds(where):
    data, long = data_of(), "x" * 2_000_000
    if where == "field":
        data[long] = 1
    elif where == "value":
        data["prediction"] = long
    elif where == "stage field":
        data["stages"][0][long] = 1
    else:
        data["stages"][0]["clip"] = [0.0] * 50_000
    with pytest.raises(REFUSALS) as caught:
        fd.Plan.from_json(json.dumps(data))
    assert len(str(caught.value)) < 2000
