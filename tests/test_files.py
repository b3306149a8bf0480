# SPDX-License-Identifier: Apache-2.0
"""Files written in one step: what is replaced, what is kept, and what is refused."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from fastdiff._files import NotAFile, replacing


def write(path, content=b"new"):
    with replacing(path) as file:
        file.write(content)


def permissions(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def umask_022():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_the_new_content_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append(os.fstat(f).st_size), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    write(tmp_path / "a", b"12345")
    assert calls == [5, "replace"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_content_that_cannot_be_stored_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write(path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_block_keeps_the_name_it_has(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")


# -- permissions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
def test_an_existing_file_keeps_its_permissions(tmp_path, umask_022, mode):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert permissions(path) == mode


def test_a_private_file_is_never_readable_by_others_on_the_way(tmp_path, umask_022):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with replacing(path):
        (new,) = (p for p in tmp_path.iterdir() if p != path)
        assert permissions(new) == 0o600


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_a_new_file_gets_the_permissions_that_open_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "a")
        (tmp_path / "b").write_bytes(b"")
    finally:
        os.umask(before)
    assert permissions(tmp_path / "a") == permissions(tmp_path / "b") == 0o666 & ~mask


def test_the_umask_is_never_touched(tmp_path, monkeypatch):
    def refuse(_):
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", refuse)
    write(tmp_path / "a")
    write(tmp_path / "a")


# -- what stands at the path -----------------------------------------------------------------------


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(Path("far") / "target")
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert permissions(target) == 0o600
    assert list((tmp_path / "far").iterdir()) == [target]


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(NotAFile, match=f"the folder {tmp_path}. Give the path of a file"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening one waits for a reader
    said = []

    def attempt():
        try:
            write(tmp_path / "pipe")
        except NotAFile as error:
            said.append(error.kind)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert said == ["pipe"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_device_is_refused_and_stays(tmp_path, through_a_link):
    path = Path("/dev/null")
    if through_a_link:
        path = tmp_path / "link"
        path.symlink_to("/dev/null")
    with pytest.raises(NotAFile, match="the device") as caught:
        write(path)
    assert caught.value.kind == "device"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="circle of links"):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_folder_that_does_not_exist_is_named_with_the_path(tmp_path):
    path = tmp_path / "no" / "a"
    with pytest.raises(FileNotFoundError) as caught:
        write(path)
    assert caught.value.filename == str(path)


def test_a_name_as_long_as_names_may_be_is_written(tmp_path):
    path = tmp_path / ("a" * 255)
    write(path)
    assert path.read_bytes() == b"new"
