"""Mount what a local volume's driver options name (`type`, `device`, `o`)."""

from __future__ import annotations

import errno
import os

from hutch.errors import InvalidArgument, Unsupported
from hutch.linux import mount as linux

__all__ = ["mount_volume", "unmount_volume"]

_FLAGS = {
    "ro": linux.MS_RDONLY,
    "rw": 0,
    "nosuid": linux.MS_NOSUID,
    "suid": 0,
    "nodev": linux.MS_NODEV,
    "dev": 0,
    "noexec": linux.MS_NOEXEC,
    "exec": 0,
    "sync": linux.MS_SYNCHRONOUS,
    "async": 0,
    "noatime": linux.MS_NOATIME,
    "nodiratime": linux.MS_NODIRATIME,
    "relatime": linux.MS_RELATIME,
    "strictatime": linux.MS_STRICTATIME,
    "defaults": 0,
}


def mount_volume(name: str, path: str, *, kind: str, device: str, options: str) -> None:
    """Mount `device` as file system `kind` on `path`, unless something is mounted there."""
    if os.path.ismount(path):
        return
    flags = 0
    data: list[str] = []
    for option in filter(None, options.split(",")):
        if option in _FLAGS:
            flags |= _FLAGS[option]
        else:
            data.append(option)
    try:
        linux.mount(device or kind, path, kind, flags, ",".join(data) or None)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise Unsupported(
                f"volume {name}: this user may not mount {kind or device}",
                hint="run as root, or use a volume without driver options",
            ) from error
        raise InvalidArgument(
            f"volume {name}: mount of {device or kind} as {kind!r} with {options!r}:"
            f" {(error.strerror or '').lower()}",
            field="options",
        ) from error


def unmount_volume(path: str) -> None:
    """Unmount what `mount_volume` mounted; not mounted is fine."""
    if os.path.ismount(path):
        linux.umount2(path, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
