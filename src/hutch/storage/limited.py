"""Directories that hold so much and no more: an ext4 in a sparse file, mounted beside it.

The writer gets ENOSPC at its own limit and takes nothing from anybody else; what it deletes
goes back to the host (`discard`). For hosts whose file system has project quotas there would
be less to mount, but few do, and here is one way that works on all.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hutch.errors import Unsupported
from hutch.storage.faults import disk_errors
from hutch.storage.snapshots import LIMITED_FILE

if TYPE_CHECKING:
    from hutch.storage.disks import Disks

__all__ = ["ensure_limited", "make_limited", "release_limited", "tree_of", "work_of"]

_POINT = "limited"


def tree_of(directory: str) -> str:
    """Return where the files are."""
    return f"{directory}/{_POINT}/upper"


def work_of(directory: str) -> str:
    """Return the empty directory beside them, on the same file system."""
    return f"{directory}/{_POINT}/work"


def make_limited(disks: Disks, directory: str, size: int, *, field: str) -> None:
    """Make and mount the file system of `size` bytes; nothing is left of a failure."""
    from hutch.storage.disks import check_size

    if os.geteuid() != 0:
        raise Unsupported(
            f"{field}: a size needs root, which may mount", hint="leave it out, or run as root"
        )
    disks.create(f"{directory}/{LIMITED_FILE}", check_size(size, field=field))
    try:
        ensure_limited(directory)
    except BaseException:
        release_limited(directory)
        os.unlink(f"{directory}/{LIMITED_FILE}")
        raise


def ensure_limited(directory: str) -> None:
    """Mount it where it is not (after a reboot, say); the caller sees to it that nobody else
    does so at the same time."""
    point = f"{directory}/{_POINT}"
    with disk_errors(f"file system of {directory}"):
        os.makedirs(point, 0o700, exist_ok=True)
        if not os.path.ismount(point):
            _mount(f"{directory}/{LIMITED_FILE}", point)


def _mount(path: str, point: str) -> None:
    from hutch.linux import mount as linux
    from hutch.linux.loop import loop_device

    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with loop_device(fd) as device:
            flags = linux.MS_NODEV | linux.MS_NOSUID
            linux.mount(device, point, "ext4", flags, "discard")
    except FileNotFoundError as exc:
        raise Unsupported(
            "size: this host has no loop devices", hint="load the module loop, or leave it out"
        ) from exc
    except PermissionError as exc:
        raise Unsupported("size: this user may not mount", hint="run as root") from exc
    finally:
        os.close(fd)


def release_limited(directory: str) -> None:
    """Unmount it before the directory is removed; not mounted is fine."""
    from hutch.linux import mount as linux

    point = f"{directory}/{_POINT}"
    if os.path.ismount(point):
        linux.umount2(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
