"""File system calls that the standard library lacks: safe opening, renaming, holes, clones."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from hutch.linux.libc import fs_path, libc, raise_errno, syscall

__all__ = [
    "clone_file",
    "create_sealed_memfd",
    "fallocate",
    "freeze",
    "is_in_memory",
    "link_fd",
    "open_in_root",
    "openat2",
    "punch_hole",
    "renameat2",
    "set_topdir",
    "syncfs",
    "thaw",
    "trim",
]

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

FICLONE = 0x40049409
FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
FITRIM = 0xC0185879

FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_TOPDIR_FL = 0x20000

_TMPFS_MAGIC, _RAMFS_MAGIC = 0x01021994, 0x858458F6

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(dirfd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2), always close-on-exec.

    The kernel answers EAGAIN when a rename races with a RESOLVE_BENEATH or
    RESOLVE_IN_ROOT walk; the call is then made again, a bounded number of times.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for attempt in range(32):
        fd = syscall("openat2", dirfd, fs_path(path), ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EAGAIN or attempt == 31 or resolve & RESOLVE_CACHED:
            break
    raise_errno(path)
    raise AssertionError


def open_in_root(root_fd: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """Open a path as a process whose root directory is `root_fd` would see it.

    Absolute symbolic links and `..` stay beneath the root; magic links are refused.
    """
    return openat2(root_fd, path, flags, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def open_without_links(root_fd: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """Open a path beneath `root_fd` on whose way no symbolic link is: ELOOP for one."""
    return openat2(root_fd, path, flags, mode, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)


def renameat2(
    old_dirfd: int, old: str | bytes, new_dirfd: int, new: str | bytes, flags: int = 0
) -> None:
    """renameat2(2)."""
    result = syscall("renameat2", old_dirfd, fs_path(old), new_dirfd, fs_path(new), flags)
    if result < 0:
        raise_errno(old, new)


def link_fd(fd: int, dirfd: int, name: str | bytes) -> None:
    """Give an open file (O_TMPFILE, or O_PATH) a name, by linkat(2) through /proc/self/fd."""
    source = f"/proc/self/fd/{fd}".encode()
    if libc.linkat(AT_FDCWD, source, dirfd, fs_path(name), AT_SYMLINK_FOLLOW) < 0:
        raise_errno(name)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) < 0:
        raise_errno()


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a range back to the file system; it then reads as zeros."""
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def clone_file(source_fd: int, target_fd: int) -> None:
    """ioctl FICLONE: share all blocks (OSError EOPNOTSUPP or EXDEV where it cannot)."""
    import fcntl

    fcntl.ioctl(target_fd, FICLONE, source_fd)


def freeze(fd: int) -> None:
    """ioctl FIFREEZE: write the file system that holds `fd` out whole, and let whoever writes
    to it wait until `thaw`."""
    import fcntl

    fcntl.ioctl(fd, FIFREEZE, 0)


def thaw(fd: int) -> None:
    """ioctl FITHAW: let writers go on."""
    import fcntl

    fcntl.ioctl(fd, FITHAW, 0)


def trim(fd: int) -> int:
    """ioctl FITRIM: discard what the file system that holds `fd` does not use; return the bytes
    of it (which may have been discarded before)."""
    import fcntl
    import struct

    wanted = struct.pack("=3Q", 0, (1 << 64) - 1, 0)
    return int(struct.unpack("=3Q", fcntl.ioctl(fd, FITRIM, wanted))[1])


def is_in_memory(path: str) -> bool:
    """Tell whether a file's content is in memory and nowhere else (tmpfs, ramfs), by statfs(2)."""
    # Its first field is `long f_type`; the whole is 120 bytes on 64 bits.
    buffer = ctypes.create_string_buffer(256)
    if libc.statfs(fs_path(path), buffer) < 0:
        raise_errno(path)
    return ctypes.c_long.from_buffer(buffer).value in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def syncfs(fd: int) -> None:
    """syncfs(2): write back the file system that holds `fd`."""
    if libc.syncfs(fd) < 0:
        raise_errno()


def create_sealed_memfd(name: str, content: bytes) -> int:
    """Return a memfd with this content, sealed against any change; the caller closes it."""
    import fcntl

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_topdir(path: str | os.PathLike[str]) -> None:
    """Tell ext4 that the directories in this one have nothing to do with each other: it then
    spreads them over the disk. See `T` in chattr(1). `OSError` elsewhere."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # The size that the request names is that of a long; what is moved is an int.
        (flags,) = struct.unpack("=i4x", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=i4x", flags | FS_TOPDIR_FL))
    finally:
        os.close(fd)
