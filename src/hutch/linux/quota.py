"""Project quotas: how much the files of one directory tree may take; see quotactl(2), xfs_quota(8).

A project is a number that files carry and inherit from their directory (ext4, XFS).
"""

from __future__ import annotations

import ctypes
import fcntl
import struct

import msgspec

from hutch.linux.libc import raise_errno, syscall

__all__ = ["ProjectUsage", "project_usage", "set_project", "set_project_limit"]

# struct fsxattr: xflags, extsize, nextents, projid, cowextsize, padding.
_FSXATTR = "=5I8x"
_GET_XATTR, _SET_XATTR = 0x801C581F, 0x401C5820
_PROJECT_INHERIT = 0x200
_GET, _SET = 0x800007, 0x800008
_PROJECTS = 2
_BLOCK_LIMITS = 1  # QIF_BLIMITS
_KIB = 1024


class _Quota(ctypes.Structure):
    """struct if_dqblk; limits in KiB, `space` in bytes."""

    _fields_ = (
        ("hard", ctypes.c_uint64),
        ("soft", ctypes.c_uint64),
        ("space", ctypes.c_uint64),
        ("inodes_hard", ctypes.c_uint64),
        ("inodes_soft", ctypes.c_uint64),
        ("inodes", ctypes.c_uint64),
        ("block_time", ctypes.c_uint64),
        ("inode_time", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    )


class ProjectUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a project has and may have (0: no limit), in bytes."""

    used: int
    limit: int


def set_project(fd: int, project: int) -> None:
    """Give a directory a project, which everything made in it inherits. `OSError` passes."""
    flags, extent, count, _, cow = struct.unpack(
        _FSXATTR, fcntl.ioctl(fd, _GET_XATTR, bytes(struct.calcsize(_FSXATTR)))
    )
    changed = struct.pack(_FSXATTR, flags | _PROJECT_INHERIT, extent, count, project, cow)
    fcntl.ioctl(fd, _SET_XATTR, changed)


def set_project_limit(fd: int, project: int, limit: int) -> None:
    """Bound a project of the file system that holds `fd`, in bytes; 0 takes the bound away.

    Who goes beyond gets EDQUOT (ext4) or ENOSPC (XFS). `OSError` passes: ESRCH where the file
    system keeps no quotas, ENOSYS before Linux 5.14.
    """
    quota = _Quota(hard=-(-limit // _KIB), soft=0, valid=_BLOCK_LIMITS)
    _quotactl(fd, _SET, project, quota)


def project_usage(fd: int, project: int) -> ProjectUsage:
    """Return what a project has and may have. `OSError` passes."""
    quota = _Quota()
    _quotactl(fd, _GET, project, quota)
    return ProjectUsage(used=quota.space, limit=quota.hard * _KIB)


def _quotactl(fd: int, command: int, project: int, quota: _Quota) -> None:
    number = command << 8 | _PROJECTS
    if syscall("quotactl_fd", fd, number, project, ctypes.byref(quota)) < 0:
        raise_errno()
