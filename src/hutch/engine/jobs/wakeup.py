"""How a dispatcher is told that there is something for it, by other processes and by its own
threads: a named pipe, which also tells whether there is a dispatcher at all."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

from hutch.errors import Unavailable

__all__ = ["Wakeup", "poke"]

_NAME = "dispatch"
_LEAVE = b"q"
_OWN = b"r"


def _path(root: Path) -> str:
    return str(root / "locks" / _NAME) + ".fifo"


def poke(root: Path, *, leave: bool = False) -> bool:
    """Wake the dispatcher of a root; return whether there is one. With `leave` ask it to make
    room for another, which one that runs in the background does."""
    try:
        fd = os.open(_path(root), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENOENT):
            return False
        raise Unavailable(f"{_path(root)}: {exc.strerror}") from exc
    try:
        os.write(fd, _LEAVE if leave else b"\0")
    except BlockingIOError:
        pass  # full: it has not looked yet, and will
    except BrokenPipeError:
        return False
    finally:
        os.close(fd)
    return True


class Wakeup:
    """The reading end. Who holds it must hold the dispatcher's lock."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._open = threading.Lock()
        self._closed = False
        self.asked_to_leave = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, root: Path) -> Iterator[Wakeup]:
        """Open the pipe for the length of the block, made if there is none."""
        path = _path(root)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Both ends, so that it never reports the end of the file.
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        wakeup = cls(fd)
        try:
            yield wakeup
        finally:
            with wakeup._open:
                wakeup._closed = True
                os.close(fd)

    def wake(self) -> None:
        """Wake the dispatcher from another thread; nothing happens when it has ended."""
        with self._open, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.write(self._fd, _OWN)

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody wakes it, for so long at most; tell whether that was another than
        its own threads."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        ready = poll.poll(max(0.0, timeout_s) * 1000)
        others = False
        if ready:
            with contextlib.suppress(BlockingIOError):
                while said := os.read(self._fd, 4096):
                    self.asked_to_leave |= _LEAVE in said
                    others |= bool(said.strip(_OWN))
        return others
