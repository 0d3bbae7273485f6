"""inotify(7): be told of changes to files and directories."""

from __future__ import annotations

import os
import select
import struct
from types import TracebackType

import msgspec

from hutch.linux.libc import fs_path, libc, raise_errno

__all__ = ["Event", "Inotify"]

IN_ACCESS = 0x001
IN_MODIFY = 0x002
IN_ATTRIB = 0x004
IN_CLOSE_WRITE = 0x008
IN_MOVED_FROM = 0x040
IN_MOVED_TO = 0x080
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x01000000
IN_DONT_FOLLOW = 0x02000000

_HEADER = struct.Struct("=iIII")


class Event(msgspec.Struct, frozen=True):
    """One event: the watch, what happened (IN_*), and the name in a watched directory."""

    watch: int
    mask: int
    name: str


class Inotify:
    """An inotify instance; a context manager. `fd` may be polled with others."""

    def __init__(self) -> None:
        self.fd: int = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise_errno()

    def __enter__(self) -> Inotify:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all watches; safe to call again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def add(self, path: str | os.PathLike[str], mask: int) -> int:
        """Watch a path for the events in `mask`; return the number of the watch."""
        watch: int = libc.inotify_add_watch(self.fd, fs_path(path), mask)
        if watch < 0:
            raise_errno(os.fspath(path))
        return watch

    def read(self, timeout_s: float | None) -> list[Event]:
        """Wait for events and return them; nothing when the time is over."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        if not poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000 + 0.999))):
            return []
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return []
        events = []
        offset = 0
        while offset < len(data):
            watch, mask, _, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            events.append(Event(watch, mask, name))
            offset += length
        return events
