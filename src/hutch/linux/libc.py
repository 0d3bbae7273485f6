"""The C library, loaded once, and the way from its errno to `OSError`.

Calls that glibc has no wrapper for go through `syscall`; their numbers are those of the
common table (the same on every architecture since Linux 5.1) or are kept per machine here.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["fs_path", "libc", "raise_errno", "syscall", "syscall_number"]

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

_NUMBERS: dict[str, int] = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "openat2": 437,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "quotactl_fd": 443,
}
_BY_MACHINE: dict[str, dict[str, int]] = {
    "x86_64": {"bpf": 321, "renameat2": 316, "capget": 125, "kcmp": 312, "syncfs": 306},
    "aarch64": {"bpf": 280, "renameat2": 276, "capget": 90, "kcmp": 272, "syncfs": 267},
}


def raise_errno(*paths: str | bytes | None) -> None:
    """Raise `OSError` of the calling thread's errno, naming up to two paths."""
    number = ctypes.get_errno()
    names = [os.fsdecode(path) if path is not None else None for path in paths]
    first = names[0] if names else None
    if len(names) > 1:
        raise OSError(number, os.strerror(number), first, None, names[1])
    raise OSError(number, os.strerror(number), first)


def syscall_number(name: str) -> int:
    """Return the number of a system call on this machine; `NotImplementedError` if unknown."""
    number = _NUMBERS.get(name)
    if number is None:
        number = _BY_MACHINE.get(os.uname().machine, {}).get(name)
    if number is None:
        raise NotImplementedError(f"system call {name} on {os.uname().machine}")
    return number


def syscall(name: str, *arguments: object) -> int:
    """Make a system call; return its result, which the caller compares with zero.

    Integers travel as C longs: ctypes would cut them to 32 bits.
    """
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(libc.syscall(ctypes.c_long(syscall_number(name)), *values))


def fs_path(path: str | bytes | os.PathLike[str]) -> bytes:
    """Return a path as the bytes that the kernel takes."""
    return os.fsencode(path)
