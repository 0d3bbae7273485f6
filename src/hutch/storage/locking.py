"""Advisory locks on files that come and go: between threads and between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import Busy

__all__ = ["file_lock", "open_locked", "try_file_lock"]

_POLL_S = 0.01
_POLL_MAX_S = 0.1


def open_locked(path: str, *, timeout_s: float | None = None) -> int:
    """Open (or create, 0600) `path` and lock it exclusively; closing it unlocks.

    The file may be renamed or unlinked by its holder: the lock is only taken on the file
    that has this name now. Raises `Busy` after `timeout_s` (None waits for ever).
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pause = _POLL_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # Waiting in flock(2) itself could not be ended: another thread cannot
            # interrupt it, and a closed descriptor does not wake it.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(fd, path):
                return fd
            os.close(fd)
            continue
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR):
                raise
        except BaseException:
            os.close(fd)
            raise
        if deadline is not None and time.monotonic() >= deadline:
            raise Busy(f"{os.path.basename(path)}: locked by another process")
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL_MAX_S)


def _is_named(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextmanager
def file_lock(path: str, *, timeout_s: float | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which is removed afterwards."""
    fd = open_locked(path, timeout_s=timeout_s)
    try:
        yield
    finally:
        try:
            os.unlink(path)
        finally:
            os.close(fd)


@contextmanager
def try_file_lock(path: str) -> Iterator[bool]:
    """Hold the lock if nobody else does; the value tells whether."""
    try:
        fd = open_locked(path, timeout_s=0)
    except Busy:
        yield False
        return
    try:
        yield True
    finally:
        try:
            os.unlink(path)
        finally:
            os.close(fd)
