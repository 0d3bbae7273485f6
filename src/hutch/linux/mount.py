"""Mounting: mount(2), umount2(2) and the descriptor-based mount API of Linux 5.2 to 5.12.

One function per system call, named as it; failures are `OSError`. Descriptors that
these calls return are close-on-exec and belong to the caller.
"""

from __future__ import annotations

import ctypes
import os

from hutch.linux.libc import fs_path, libc, raise_errno, syscall

__all__ = [
    "fsconfig_create",
    "fsconfig_set_fd",
    "fsconfig_set_flag",
    "fsconfig_set_string",
    "fsmount",
    "fsopen",
    "is_mount_point",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "overlay_takes_layers",
    "umount2",
]

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

MNT_FORCE = 1
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_RELATIME = 0x00
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOVE_MOUNT_F_SYMLINKS = 0x01
MOVE_MOUNT_F_AUTOMOUNTS = 0x02
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_SYMLINKS = 0x10
MOVE_MOUNT_T_AUTOMOUNTS = 0x20
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_BENEATH = 0x200

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1

FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_BINARY = 2
FSCONFIG_SET_PATH = 3
FSCONFIG_SET_PATH_EMPTY = 4
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount(
    source: str, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    """mount(2)."""
    result = libc.mount(
        fs_path(source),
        fs_path(target),
        fstype.encode() if fstype is not None else None,
        ctypes.c_ulong(flags),
        os.fsencode(data) if data is not None else None,
    )
    if result < 0:
        raise_errno(source, target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    if libc.umount2(fs_path(target), flags) < 0:
        raise_errno(target)


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """open_tree(2): a descriptor of a mount (OPEN_TREE_CLONE: of a detached copy)."""
    fd = syscall("open_tree", dirfd, fs_path(path), flags | OPEN_TREE_CLOEXEC)
    if fd < 0:
        raise_errno(path)
    return fd


def move_mount(
    from_fd: int, from_path: str, to_fd: int, to_path: str, flags: int = MOVE_MOUNT_F_EMPTY_PATH
) -> None:
    """move_mount(2): attach a detached mount or move an attached one."""
    result = syscall("move_mount", from_fd, fs_path(from_path), to_fd, fs_path(to_path), flags)
    if result < 0:
        raise_errno(from_path or None, to_path or None)


def mount_setattr(
    dirfd: int,
    path: str,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
    flags: int = AT_EMPTY_PATH,
) -> None:
    """mount_setattr(2); AT_RECURSIVE in `flags` reaches the mounts beneath."""
    attr = _MountAttr(attr_set, attr_clr, propagation, userns_fd)
    size = ctypes.sizeof(attr)
    if syscall("mount_setattr", dirfd, fs_path(path), flags, ctypes.byref(attr), size) < 0:
        raise_errno(path or None)


def fsopen(fstype: str) -> int:
    """fsopen(2): a context in which a file system is configured."""
    fd = syscall("fsopen", fstype.encode(), FSOPEN_CLOEXEC)
    if fd < 0:
        raise_errno(fstype)
    return fd


def _fsconfig(fd: int, command: int, key: str | None, value: bytes | None, aux: int) -> None:
    name = key.encode() if key is not None else None
    if syscall("fsconfig", fd, command, name, value, aux) < 0:
        raise_errno(key)


def fsconfig_set_flag(fd: int, key: str) -> None:
    """fsconfig(2), FSCONFIG_SET_FLAG: an option without a value."""
    _fsconfig(fd, FSCONFIG_SET_FLAG, key, None, 0)


def fsconfig_set_string(fd: int, key: str, value: str) -> None:
    """fsconfig(2), FSCONFIG_SET_STRING: an option with a value (255 bytes at most)."""
    _fsconfig(fd, FSCONFIG_SET_STRING, key, os.fsencode(value), 0)


def fsconfig_set_fd(fd: int, key: str, value: int) -> None:
    """fsconfig(2), FSCONFIG_SET_FD: an option whose value is a descriptor."""
    _fsconfig(fd, FSCONFIG_SET_FD, key, None, value)


def fsconfig_create(fd: int) -> None:
    """fsconfig(2), FSCONFIG_CMD_CREATE: make the superblock."""
    _fsconfig(fd, FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(fd: int, attr: int = 0) -> int:
    """fsmount(2): a detached mount of the configured file system."""
    mount_fd = syscall("fsmount", fd, FSMOUNT_CLOEXEC, attr)
    if mount_fd < 0:
        raise_errno()
    return mount_fd


def overlay_takes_layers(fd: int) -> bool:
    """Return whether the overlay being configured takes its layers one by one, by `lowerdir+`.

    One that does (from Linux 6.8) refuses an empty name, in other words than an unknown key.
    Before the new mount API came to overlay (6.5) any key was taken and looked at later.
    """
    try:
        fsconfig_set_string(fd, "lowerdir+", "")
    except OSError:
        pass
    else:
        return False
    try:
        said = os.read(fd, 256)  # the context's messages; see fsopen(2)
    except OSError:
        said = b""
    return b"nknown parameter" not in said


def is_mount_point(path: str) -> bool:
    """Return whether `path` (a last link not followed) is the root of a mount, a bind included.

    By the mount ids of the directory and its parent: device numbers would not show a
    bind mount.
    """
    name = os.path.abspath(path)
    if name == "/":
        return True
    try:
        return _mount_id(name) != _mount_id(f"{os.path.dirname(name)}/.")
    except FileNotFoundError:
        return False


def _mount_id(path: str) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
            for line in info:
                if line.startswith(b"mnt_id:"):
                    return int(line.split()[1])
    finally:
        os.close(fd)
    raise OSError(f"no mount id in fdinfo of {path}")
