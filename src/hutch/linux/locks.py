"""Locks between processes and threads, held by a file descriptor."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import Busy

__all__ = ["is_locked", "lock_file", "lock_holder"]

_NOBODYS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_FLOCK = "hh4xqqi4x"  # struct flock: type, whence, start, length, pid


@contextmanager
def lock_file(
    path: str | os.PathLike[str], *, exclusive: bool = True, timeout_s: float | None = None
) -> Iterator[int]:
    """Hold flock(2) on a file, made (0600) if missing, for the length of the block.

    Works between threads too, since each call opens the file anew; it is not re-entrant.
    The file may be removed by a holder: who waited then locks the new one. The kernel
    releases the lock when the holder dies. Without `timeout_s` it waits for as long as
    it takes; when the time is over, `Busy`. Yields the descriptor.
    """
    name = os.fspath(path)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, deadline, name)
            if _is_same_file(fd, name):
                break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    try:
        yield fd
    finally:
        # Not by closing alone: a child being spawned may hold a copy for a moment.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Tell whether a process holds flock(2) on a file or a directory.

    What is not there, or is a link, is nobody's. True at this moment only, and for this moment
    who asks holds the lock.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in _NOBODYS:
            return False
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def lock_holder(fd: int) -> int:
    """Return the process that keeps a record lock (fcntl(2), F_SETLK) on the file, 0 for none.

    The kernel's word, and so true at this moment; the descriptor must be writable.
    """
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, question)
    kind, _, _, _, pid = struct.unpack(_FLOCK, answer)
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def _lock(fd: int, operation: int, deadline: float | None, name: str) -> None:
    if deadline is None:
        fcntl.flock(fd, operation)
        return
    pause = 0.0005
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Busy(f"somebody else holds the lock {name}") from None
        # flock(2) has no timeout, and a signal to end it would not be ours to send.
        time.sleep(min(pause, left))
        pause = min(pause * 2, 0.01)


def _is_same_file(fd: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, follow_symlinks=False))
    except FileNotFoundError:
        return False
