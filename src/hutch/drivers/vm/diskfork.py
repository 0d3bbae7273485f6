"""A running machine's disk at one moment, for its twins and its snapshots.

A disk that little was written to, or whose blocks the file system shares, is copied while the
machine stands still. Any other is frozen: the machine goes on writing to an empty overlay, and
the frozen files are linked to where they are wanted (`hutch.storage.diskchain`), which takes
the same few milliseconds however large they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from hutch.drivers.vm.machine import MachineRecord
from hutch.errors import HutchError
from hutch.plan.machine.disks import base_name, node_name
from hutch.qmp.blocks import (
    Node,
    blockdev_add,
    blockdev_del,
    reopen_read_only,
    snapshot_node,
    stream_node,
    top_node,
)
from hutch.qmp.descriptors import fdset, remove_fdset
from hutch.storage.diskchain import (
    chain,
    is_copied,
    link_disk,
    next_overlay,
    overlay_number,
    virtual_size,
)
from hutch.storage.disks import Disks
from hutch.storage.sparse import copy_sparse

if TYPE_CHECKING:
    from hutch.qmp import Monitor

__all__ = ["DiskFork"]

_NODE = node_name(1)
_DEPTH_MAX = 8
_STREAM_S = 3600.0
_FDSET = re.compile(r"/dev/fdset/\d+")


class DiskFork:
    """One taking of a disk: `prepare` while the machine runs, `take` while it stands still,
    `finish` when it runs again. `target` is an existing directory."""

    def __init__(
        self, monitor: Monitor, directory: str, target: str, machine: MachineRecord, disks: Disks
    ) -> None:
        self._monitor = monitor
        self._directory = directory
        self._target = target
        self._machine = machine
        self._disks = disks
        self._frozen: Sequence[str] = ()
        self._top = Node()
        self._overlay = ""

    def prepare(self) -> None:
        """See which way to go, and open the overlay where there is to be one."""
        files: Sequence[str] = chain(self._directory)
        if len(files) == 1 and is_copied(self._directory, self._target):
            return
        self._top = top_node(self._monitor, f"{_NODE}-dev")
        files = self._used(files)
        if len(files) >= _DEPTH_MAX:
            files = self._shorten(files)
        path = next_overlay(self._directory)
        self._disks.create_overlay(path, virtual_size(self._directory))
        self._frozen = files
        self._overlay = self._node(overlay_number(path))
        self._add(path)
        _sync(files[-1])  # what is left for the moment when it stands still is less

    def _node(self, number: int) -> str:
        """Return QEMU's node for the overlay of a number, or for the file beneath all."""
        started = (0, *self._machine.overlays)
        if number > started[-1]:
            return f"{_NODE}-{number}"
        above = sum(other > number for other in started)
        return base_name(_NODE, above) if above else _NODE

    def _used(self, files: Sequence[str]) -> Sequence[str]:
        """Return the files that QEMU has, and remove an overlay that a killed fork had made
        and QEMU never came to use."""
        used = []
        for path in files:
            used.append(path)
            if self._node(overlay_number(path)) == self._top.name:
                break
        for path in files[len(used) :]:
            os.unlink(path)
        return used

    def _shorten(self, files: Sequence[str]) -> Sequence[str]:
        """Bring the overlays beneath the top one into it."""
        stream_node(self._monitor, self._top.name, self._node(0), timeout_s=_STREAM_S)
        _sync(files[-1])  # durable there before they go here
        for path in files[1:-1]:
            os.unlink(path)
            with suppress(HutchError):  # it is not a node of its own
                blockdev_del(self._monitor, self._node(overlay_number(path)))
        return [files[0], files[-1]]

    def _add(self, path: str) -> None:
        file = f"{self._overlay}-file"
        for left in (self._overlay, file):
            with suppress(HutchError):  # by a fork that failed or was killed; mostly none is
                blockdev_del(self._monitor, left)
        cached, aio = self._machine.disk_cache, self._machine.disk_aio
        cache = {"direct": cached == "none", "no-flush": cached == "unsafe"}
        direct = os.O_DIRECT if cache["direct"] else 0
        with _opened(self._monitor, path, os.O_RDWR | direct) as name:
            options = {"driver": "file", "filename": name, "read-only": False, "discard": "unmap"}
            options |= {"cache": cache, "aio": aio}
            blockdev_add(self._monitor, {"node-name": file, **options})
        options = {"driver": "qcow2", "file": file, "backing": None, "read-only": False}
        more = {"discard": "unmap", "detect-zeroes": "unmap", "cache": cache}
        blockdev_add(self._monitor, {"node-name": self._overlay, **options, **more})

    def take(self) -> None:
        """Copy or freeze the disk of the machine, which stands still and has written back."""
        if not self._overlay:
            copy_sparse(chain(self._directory)[0], f"{self._target}/disk.raw")
            return
        snapshot_node(self._monitor, self._top.name, self._overlay)

    def finish(self) -> None:
        """Put the frozen files where they are wanted, and have QEMU let go of its right to
        write to them: one that was taken over later cannot change what others have."""
        if not self._overlay:
            return
        link_disk(self._frozen, self._target)
        top = self._frozen[-1]
        number = overlay_number(top)
        file = f"{self._top.name}-frozen"
        with _opened(self._monitor, top, os.O_RDONLY) as name:
            options = {"driver": "file", "filename": name, "read-only": True}
            blockdev_add(self._monitor, {"node-name": file, **options})
        below = self._node(overlay_number(self._frozen[-2])) if number else None
        driver = "qcow2" if number else "raw"
        reopen_read_only(self._monitor, driver, self._top.name, file, backing=below)
        with suppress(HutchError):  # one that QEMU was started with goes by itself
            blockdev_del(self._monitor, f"{self._top.name}-file")
        for found in _FDSET.findall(self._top.file):
            with suppress(HutchError):  # it is gone already
                remove_fdset(self._monitor, found)


def _sync(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        os.fdatasync(file.fileno())


@contextmanager
def _opened(monitor: Monitor, path: str, mode: int) -> Iterator[str]:
    """Yield where QEMU finds a file that it has not got."""
    fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with fdset(monitor, fd) as name:
            yield name
    finally:
        os.close(fd)
