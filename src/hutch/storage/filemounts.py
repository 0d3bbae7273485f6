"""File systems in files: mounted through a loop device, frozen, grown, unmounted."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import Unsupported

__all__ = ["device_of", "frozen", "mount_file", "unmount_file", "wait_detached"]

_DETACH_S = 10.0
_POLL_S = 0.01
_GOING = (errno.EIO, errno.ENXIO, errno.EBUSY)


def mount_file(path: str, point: str, kind: str, data: str = "", *, what: str = "size") -> None:
    """Mount the file system of `kind` in a file, without devices and set-user-id programs.

    `what` is the field that errors name. Other `OSError` pass: EINVAL for what this kernel
    cannot mount, or not with these options.
    """
    from hutch.linux import mount as linux
    from hutch.linux.loop import loop_device

    flags = linux.MS_NODEV | linux.MS_NOSUID
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if _mount_attached(path, point, kind, flags, data):
            return
        with loop_device(fd) as device:
            linux.mount(device, point, kind, flags, data or None)
    except FileNotFoundError as exc:
        raise Unsupported(
            f"{what}: this host has no loop devices", hint="load the module loop, or leave it out"
        ) from exc
    except PermissionError as exc:
        raise Unsupported(f"{what}: this user may not mount", hint="run as root") from exc
    finally:
        os.close(fd)


def _mount_attached(path: str, point: str, kind: str, flags: int, data: str) -> bool:
    """Mount the block device that a file is already: unmounted here, it may still be mounted in
    somebody's namespace. Return False where it is none; one that is about to go is waited for."""
    from hutch.linux import mount as linux
    from hutch.linux.loop import held_device

    deadline = time.monotonic() + _DETACH_S
    while True:
        with held_device(path) as device:
            try:
                if device:
                    linux.mount(device, point, kind, flags, data or None)
                    return True
            except OSError as exc:
                if exc.errno not in _GOING or time.monotonic() > deadline:
                    raise
        if wait_detached(path, 0.0):
            return False
        time.sleep(_POLL_S)


def unmount_file(point: str) -> None:
    """Unmount it; not mounted is fine. Who has it in a namespace of its own keeps it there."""
    from hutch.linux import mount as linux

    try:
        # Asked outright: a FUSE mount whose server was killed looks like none.
        linux.umount2(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    except OSError as exc:
        if exc.errno == errno.EPERM and not os.path.ismount(point):
            return
        if exc.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def wait_detached(path: str, timeout_s: float = _DETACH_S) -> bool:
    """Wait until a file that was unmounted is no block device any more, as the last namespace
    that has it goes away; return whether it is not."""
    from hutch.linux.loop import attached_device

    deadline = time.monotonic() + timeout_s
    while attached_device(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def device_of(point: str) -> str:
    """Return the block device that is mounted at a directory, "" for none."""
    status = os.stat(point)
    name = f"/sys/dev/block/{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    try:
        return f"/dev/{os.path.basename(os.readlink(name))}"
    except FileNotFoundError:
        return _source_of(point)  # btrfs has numbers of its own


def _source_of(point: str) -> str:
    wanted = os.path.realpath(point)
    with open("/proc/self/mountinfo") as table:
        for line in table:
            head, _, tail = line.partition(" - ")
            if head.split()[4].encode().decode("unicode_escape") == wanted:
                return tail.split()[1]
    return ""


@contextmanager
def frozen(directory: str) -> Iterator[None]:
    """Keep the file system of a directory as it is on its disk for the length of the block:
    who writes to it waits. The block must not write there."""
    from hutch.linux.files import freeze, thaw

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        freeze(fd)
        try:
            yield
        finally:
            thaw(fd)
    finally:
        os.close(fd)
