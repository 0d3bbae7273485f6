"""Directories that hold so much and no more: an ext4 in a sparse file, mounted beside it.

The writer gets ENOSPC at its own limit and takes nothing from anybody else; what it deletes
goes back to the host (`discard`). A pool whose file system has project quotas needs no file
for each; here is the way that works on all.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from hutch.errors import Busy, Exhausted, Unsupported
from hutch.storage.faults import disk_errors
from hutch.storage.filemounts import mount_file, unmount_file
from hutch.storage.snapshots import LIMITED_FILE

if TYPE_CHECKING:
    from hutch.storage.disks import Disks

__all__ = ["ensure_limited", "give_up_limited", "make_limited", "point_of", "release_limited"]
__all__ += ["reserve", "tree_of", "work_of"]

_POINT = "limited"


def point_of(directory: str) -> str:
    """Return where the file system is mounted."""
    return f"{directory}/{_POINT}"


def tree_of(directory: str) -> str:
    """Return where the files are."""
    return f"{directory}/{_POINT}/upper"


def work_of(directory: str) -> str:
    """Return the empty directory beside them, on the same file system."""
    return f"{directory}/{_POINT}/work"


def make_limited(
    disks: Disks, directory: str, size: int, *, field: str, reserved: bool = False
) -> None:
    """Make and mount the file system of `size` bytes; nothing is left of a failure.

    With `reserved` its blocks are taken at once and kept: nobody else can fill the disk that
    it is on so that it has less than it was promised.
    """
    from hutch.storage.disks import check_size

    if os.geteuid() != 0:
        raise Unsupported(
            f"{field}: a size needs root, which may mount", hint="leave it out, or run as root"
        )
    path = f"{directory}/{LIMITED_FILE}"
    disks.create(path, check_size(size, field=field))
    try:
        if reserved:
            _reserve_in_pool(path)
        ensure_limited(directory, reserved=reserved)
    except BaseException:
        release_limited(directory)
        os.unlink(path)
        raise


def _reserve_in_pool(path: str) -> None:
    try:
        reserve(path)
    except Exhausted as exc:
        raise Exhausted(
            str(exc), hint="hutch pool ls tells what is free; hutch pool grow POOL SIZE"
        ) from exc


def reserve(path: str) -> None:
    """Take the blocks of all that a file may hold; `Exhausted` where they are not there."""
    with disk_errors(f"{path}: room for all of it"):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)


def ensure_limited(directory: str, *, reserved: bool = False) -> None:
    """Mount it where it is not (after a reboot, say); the caller sees to it that nobody else
    does so at the same time."""
    point = point_of(directory)
    with disk_errors(f"file system of {directory}"):
        os.makedirs(point, 0o700, exist_ok=True)
        if not os.path.ismount(point):
            data = "" if reserved else "discard"
            mount_file(f"{directory}/{LIMITED_FILE}", point, "ext4", data)


def release_limited(directory: str) -> None:
    """Unmount it before the directory is removed; not mounted is fine."""
    unmount_file(point_of(directory))


def give_up_limited(directory: str) -> None:
    """Unmount it for a machine that is to have the file: it is written back whole, and nobody
    here writes to it any more, also who keeps the mount in a namespace of its own (it stays
    read-only there, on a device that is not used again).

    Raises `Busy` while somebody writes to it.
    """
    from hutch.linux import mount as linux

    point = point_of(directory)
    if not os.path.ismount(point):
        return
    try:
        # Of the file system itself, wherever it is mounted: an unmount alone would be put off
        # until the last of its mounts has gone.
        linux.mount("none", point, None, linux.MS_REMOUNT | linux.MS_RDONLY)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        raise Busy(f"{directory}: is being written to", hint="stop who uses it") from exc
    release_limited(directory)
