"""Hand descriptors to a running QEMU: by name (`getfd`) or as a set with a path (`add-fd`).

A confined QEMU can open nothing, so disks, memory state and sockets reach it this way.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from hutch.errors import HutchError
from hutch.qmp.errors import CommandFailed
from hutch.qmp.monitor import Monitor

__all__ = ["add_fd", "fdset", "remove_fdset", "send_fd"]


class _Added(msgspec.Struct, frozen=True):
    set: int = msgspec.field(name="fdset-id")


@contextmanager
def send_fd(monitor: Monitor, fd: int) -> Iterator[str]:
    """Give QEMU a copy of a descriptor; yields the name under which a command may take it.

    What no command took is closed at the end of the block.
    """
    name = f"hutch-{uuid.uuid4().hex[:12]}"
    monitor.execute("getfd", {"fdname": name}, fds=[fd])
    try:
        yield name
    finally:
        _undo(monitor, "closefd", {"fdname": name})


def add_fd(monitor: Monitor, *fds: int) -> str:
    """Give QEMU copies of descriptors as one new set; return the path to open it by.

    QEMU picks the member whose access mode (read, write, both) is the one it opens with,
    so it must be there: both for a writable disk, read only for a read-only one. The set
    lasts until `remove_fdset`, and beyond while a disk made from it is open.
    """
    arguments: dict[str, object] = {}
    for fd in fds:
        added: _Added = monitor.ask("add-fd", arguments, kind=_Added, fds=[fd])
        arguments = {"fdset-id": added.set}
    return f"/dev/fdset/{arguments['fdset-id']}"


def remove_fdset(monitor: Monitor, path: str) -> None:
    """Take back a set that `add_fd` made."""
    monitor.execute("remove-fd", {"fdset-id": int(path.rpartition("/")[2])})


@contextmanager
def fdset(monitor: Monitor, *fds: int) -> Iterator[str]:
    """Give QEMU copies of descriptors for the length of the block; yields their path."""
    path = add_fd(monitor, *fds)
    try:
        yield path
    finally:
        _undo(monitor, "remove-fd", {"fdset-id": int(path.rpartition("/")[2])})


def _undo(monitor: Monitor, command: str, arguments: dict[str, object]) -> None:
    try:
        monitor.execute(command, arguments)
    except CommandFailed:
        pass  # the command that it was for has taken it
    except HutchError:
        pass  # a QEMU that is gone holds nothing, and the loss was told already
