# SPDX-License-Identifier: Apache-2.0
"""Writing a file in one step: a path holds the old content or the whole new one, never a part.

The new content is written beside the old, flushed to the disk, and renamed over it. The rename is
atomic, so a reader, a crash or a full disk never meets half a file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFLNK: "circle of links",
}


class NotAFile(OSError):
    """Something other than a regular file stands at the path; `kind` says what, in a word."""

    def __init__(self, path: str, kind: str) -> None:
        super().__init__(
            f"fastdiff: only a regular file can be written in one step; got the {kind} {path}. "
            "Give the path of a file."
        )
        self.kind = kind


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, open for binary writing, that takes the place of `path` when the block ends well.

    When the block raises, or the new content cannot be stored, the new file vanishes and `path` is
    what it was. Entering proves that a file can be made in the folder, so work that takes long
    goes inside the block. The block leaves the file open.

    Args:
        path: What to write. A symbolic link is followed: its target is replaced and the link
            stays. A file that exists keeps its permissions; a new one gets those of `open`.

    Raises:
        NotAFile: A folder, a device, a pipe or a socket stands at `path`.
        OSError: `path` cannot be written; `filename` is `path`.
    """
    name = os.fspath(path)
    target = os.path.realpath(name)
    temporary = os.path.join(os.path.dirname(target), f".fastdiff-{secrets.token_hex(8)}")
    made = False
    try:
        kept = _permissions(name, target)
        # The kernel applies the umask to the mode given here. Reading the umask would mean to set
        # it, for every thread of the process.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        handle = os.open(temporary, flags, 0o666 if kept is None else kept)
        made = True
        with os.fdopen(handle, "wb") as file:
            if kept is not None:
                os.fchmod(handle, kept)
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(temporary, target)
    except BaseException as error:
        if made:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError) or isinstance(error, NotAFile):
            raise
        if error.filename not in (None, temporary, target):
            raise
        raise OSError(error.errno, error.strerror or str(error), name) from None


def _permissions(name: str, target: str) -> int | None:
    """The permission bits of the regular file `target`; None where nothing stands there."""
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise NotAFile(name, _KINDS.get(stat.S_IFMT(mode), "special file"))
    return stat.S_IMODE(mode) & 0o777
