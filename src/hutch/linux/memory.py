"""Read another process's memory: process_vm_readv(2), and which of its pages are its own."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Sequence

from hutch.linux.libc import libc, raise_errno, syscall

__all__ = ["MAP_POPULATE", "PAGE", "own_pages", "process_vm_readv", "swap_in"]

PAGE = mmap.PAGESIZE
MAP_POPULATE = 0x8000
_IOV_MAX = 1024
# Of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst), byte 7: present,
# swapped, and whether the page is a file's or shared.
_PRESENT, _SWAPPED, _SHARED = 0x80, 0x40, 0x20
_OWN = bytes(bool(byte & (_PRESENT | _SWAPPED)) and not byte & _SHARED for byte in range(256))
_ENTRY = 8
_WILL_NEED = 3  # MADV_WILLNEED
_RUN = re.compile(b"\x01+")


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


libc.process_vm_readv.restype = ctypes.c_ssize_t


def process_vm_readv(pid: int, target: mmap.mmap, pieces: Sequence[tuple[int, int, int]]) -> None:
    """Copy pieces of a process's memory, (address, length, offset in `target`).

    It takes the right to trace the process. Raise `OSError`: EFAULT where not all of it could
    be read.
    """
    if any(at < 0 or at + length > len(target) for _, length, at in pieces):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    view = ctypes.c_char.from_buffer(target)
    try:
        base = ctypes.addressof(view)
        for first in range(0, len(pieces), _IOV_MAX):
            part = pieces[first : first + _IOV_MAX]
            vectors = _IoVec * len(part)
            local = vectors(*[_IoVec(base + at, length) for _, length, at in part])
            remote = vectors(*[_IoVec(address, length) for address, length, _ in part])
            count = ctypes.c_ulong(len(part))
            done = libc.process_vm_readv(
                ctypes.c_int(pid), local, count, remote, count, ctypes.c_ulong(0)
            )
            if done < 0:
                raise_errno()
            if done != sum(length for _, length, _ in part):
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    finally:
        del view  # or the mapping could not be closed


def own_pages(pagemap: int, start: int, size: int) -> list[tuple[int, int]]:
    """Return the runs of pages (address, length) in a range that are a process's own: not a
    file's and not shared, so those that a private mapping has been written to.

    `pagemap` is /proc/PID/pagemap, open. A page that was never touched is nobody's.
    """
    found = []
    step = 1 << 28  # of addresses, which are 512 kB of the map
    for at in range(start, start + size, step):
        length = min(step, start + size - at)
        entries = os.pread(pagemap, length // PAGE * _ENTRY, at // PAGE * _ENTRY)
        if len(entries) != length // PAGE * _ENTRY:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        for match in _RUN.finditer(entries[_ENTRY - 1 :: _ENTRY].translate(_OWN)):
            first, end = match.span()
            found.append((at + first * PAGE, (end - first) * PAGE))
    return found


def swap_in(pid: int) -> bool:
    """Ask the kernel to read back what it has swapped out of a process; return whether it did.

    It takes Linux 5.10 and the right to trace the process. The kernel reads in its own time.
    """
    try:
        ranges = _swapped_ranges(pid)
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False  # it has ended, or is not ours
    try:
        for first in range(0, len(ranges), _IOV_MAX):
            part = ranges[first : first + _IOV_MAX]
            vector = (_IoVec * len(part))(*[_IoVec(start, length) for start, length in part])
            if syscall("process_madvise", pidfd, vector, len(part), _WILL_NEED, 0) < 0:
                return False
    finally:
        os.close(pidfd)
    return True


def _swapped_ranges(pid: int) -> list[tuple[int, int]]:
    """Return the mappings (address, length) of a process of which some is swapped out."""
    found: list[tuple[int, int]] = []
    start = end = 0
    with open(f"/proc/{pid}/smaps", "rb") as file:
        for line in file:
            word, _, rest = line.partition(b" ")
            if word == b"Swap:" and int(rest.split()[0]):
                found.append((start, end - start))
            elif not word.endswith(b":"):
                low, _, high = word.partition(b"-")
                start, end = int(low, 16), int(high, 16)
    return found
