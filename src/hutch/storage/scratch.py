"""Directories for work under way, `<root>/tmp/…`, that do not outlive who made them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.storage.faults import disk_errors
from hutch.storage.trash import Trash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["clean_scratch", "scratch_directory"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def scratch_directory(root: str | Path, trash: Trash, *, purpose: str) -> Iterator[str]:
    """Yield a new directory of mode 0700, gone when the block ends.

    It is locked as long as this process lives, so that `clean_scratch` of another one only
    takes what a killed process left.
    """
    parent = f"{os.fspath(root)}/tmp"
    with disk_errors(purpose):
        os.makedirs(parent, 0o700, exist_ok=True)
        path, fd = _new(parent)
    try:
        yield path
    finally:
        trash.discard(path)
        os.close(fd)


def _new(parent: str) -> tuple[str, int]:
    while True:
        path = f"{parent}/{os.urandom(8).hex()}"
        os.mkdir(path, 0o700)
        try:
            fd = os.open(path, _OPEN)
        except FileNotFoundError:
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        # Between the two calls a cleaner may have taken it for a dead process's.
        if os.path.exists(path):
            return path, fd
        os.close(fd)


def clean_scratch(root: str | Path, trash: Trash) -> int:
    """Throw away the directories of processes that are gone; return how many."""
    parent = f"{os.fspath(root)}/tmp"
    count = 0
    try:
        names = os.listdir(parent)
    except FileNotFoundError:
        return 0
    for name in names:
        try:
            fd = os.open(f"{parent}/{name}", _OPEN)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            count += trash.discard(f"{parent}/{name}")
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
    return count
