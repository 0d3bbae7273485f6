"""A machine's memory, taken from its QEMU from outside: only the pages that it has written to.

A machine that went on from a template maps the template's memory file privately: what it wrote
to is its own, and the rest is in that file. So no more than its own pages are copied while it
stands still. Every way to the memory may be closed (a kernel's policy, a QEMU that maps it in
another way); then `find_memory` finds none, and QEMU writes its memory itself.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from hutch.linux.memory import MAP_POPULATE, PAGE, own_pages, process_vm_readv
from hutch.process.records import read_pid
from hutch.storage.sparse import data_ranges

__all__ = ["SEALS", "Capture", "FileCapture", "Source", "find_memory", "without"]

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_POPULATE
# What it writes between the estimate and the moment it stands still.
_SLACK = 1 << 20

Pieces = list[tuple[int, int]]
"""Runs of pages: (offset in the memory, length)."""


class _Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    rights: str
    inode: int
    path: str


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory is: a range of a process, and the file (-1: none) that it is based on."""

    pid: int
    pagemap: int
    start: int
    size: int
    base: int

    def own(self) -> Pieces:
        """Return the pages that are the machine's own, now."""
        found = own_pages(self.pagemap, self.start, self.size)
        return [(address - self.start, length) for address, length in found]

    def own_size(self) -> int:
        """Return the bytes of its own pages, now."""
        return sum(length for _, length in self.own())

    def read(self, target: mmap.mmap, pieces: Pieces, places: Sequence[int]) -> None:
        """Copy pages to these offsets of `target`."""
        wanted = [
            (self.start + offset, length, at)
            for (offset, length), at in zip(pieces, places, strict=True)
        ]
        process_vm_readv(self.pid, target, wanted)


@contextmanager
def find_memory(run_directory: str, size: int) -> Iterator[Source | None]:
    """Hold the memory of a machine of so many bytes, or None where it cannot be reached."""
    with ExitStack() as held:
        source = None
        with suppress(OSError):
            source = _find(run_directory, size, held)
        yield source


def _find(run_directory: str, size: int, held: ExitStack) -> Source | None:
    record = read_pid(run_directory)
    for pid in _children(record.pid) if record is not None else ():
        mapping = _guest_memory(pid, size)
        if mapping is None:
            continue
        base = _open_base(pid, mapping)
        if base >= 0:
            held.callback(os.close, base)
        elif mapping.inode:
            continue
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        held.callback(os.close, pagemap)
        source = Source(pid=pid, pagemap=pagemap, start=mapping.start, size=size, base=base)
        return source if _is_readable(source) else None
    return None


def _is_readable(source: Source) -> bool:
    with mmap.mmap(-1, PAGE) as page:
        source.read(page, [(0, PAGE)], [0])
    return True


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += map(int, file.read().split())
    return found


def _guest_memory(pid: int, size: int) -> _Mapping | None:
    """Return the one mapping that is the guest's memory.

    It is private and of the memory's size, of a memory file of ours, or anonymous with QEMU's
    guard behind it (`qemu_ram_mmap`).
    """
    with open(f"/proc/{pid}/maps") as file:
        mappings = [_mapping(line) for line in file]
    found = []
    for mapping, following in zip(mappings, [*mappings[1:], None], strict=True):
        if mapping.end - mapping.start != size or mapping.rights != "rw-p":
            continue
        guarded = following and following.start == mapping.end and following.rights == "---p"
        if mapping.path.startswith("/memfd:hutch-") or (not mapping.path and guarded):
            found.append(mapping)
    return found[0] if len(found) == 1 else None


def _mapping(line: str) -> _Mapping:
    place, rights, _, _, inode, *path = line.split(maxsplit=5)
    start, end = (int(number, 16) for number in place.split("-"))
    return _Mapping(
        start=start, end=end, rights=rights, inode=int(inode), path=path[0].strip() if path else ""
    )


def _open_base(pid: int, mapping: _Mapping) -> int:
    """Return the memory file that is mapped, if nobody can write to it any more; else -1."""
    if not mapping.inode:
        return -1
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with suppress(OSError):
            if os.stat(path).st_ino != mapping.inode or "/memfd:" not in os.readlink(path):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(fd).st_ino == mapping.inode and _is_sealed(fd):
                return fd
            os.close(fd)
    return -1


def _is_sealed(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS


class Capture:
    """A copy of a machine's own pages, in memory of ours; `take` makes it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        estimate = source.own_size()
        self._buffer = mmap.mmap(-1, estimate + estimate // 4 + _SLACK, flags=_ANONYMOUS)
        self._own: Pieces = []

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BufferError):  # a view lives in a traceback: it goes with that
            self._buffer.close()

    def take(self) -> None:
        """Copy the pages of the machine, which stands still."""
        self._own = self._source.own()
        total = sum(length for _, length in self._own)
        if total > len(self._buffer):
            self._buffer.close()
            self._buffer = mmap.mmap(-1, total, flags=_ANONYMOUS)
        self._source.read(self._buffer, self._own, _consecutive(self._own))

    def own_pages(self) -> Iterator[tuple[int, memoryview]]:
        """Yield its own pages, (offset, bytes)."""
        whole = memoryview(self._buffer)
        for (offset, length), at in zip(self._own, _consecutive(self._own), strict=True):
            yield offset, whole[at : at + length]

    def all_pages(self) -> Iterator[tuple[int, memoryview]]:
        """Yield its own pages, then those that it has from the file it is based on."""
        yield from self.own_pages()
        base = self._source.base
        if base >= 0:
            # Private: before Linux 6.7 a file sealed against writing is not mapped shared.
            mapped = mmap.mmap(base, self._source.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            whole = memoryview(mapped)
            for offset, length in without(data_ranges(base), self._own):
                yield offset, whole[offset : offset + length]


class FileCapture:
    """A copy of a machine's whole memory as a memory file, which others map privately."""

    def __init__(self, source: Source) -> None:
        """Copy what there is now: what is copied again in `take` has its room then."""
        self._source = source
        self._own: Pieces = []
        self.file = os.memfd_create("hutch-twins", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.file, source.size)
            self.take()
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> FileCapture:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def take(self) -> None:
        """Copy the machine's own pages, which stands still."""
        self._own = self._source.own()
        with mmap.mmap(self.file, self._source.size) as target:
            self._source.read(target, self._own, [offset for offset, _ in self._own])

    def finish(self) -> None:
        """Copy the rest, from the file that it is based on, and seal the copy."""
        base = self._source.base
        if base >= 0:
            for offset, length in without(data_ranges(base), self._own):
                copy_range(base, self.file, offset, length)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, SEALS)


def copy_range(source: int, target: int, offset: int, length: int) -> None:
    """Copy a range from one memory file to the same place in another."""
    os.lseek(target, offset, os.SEEK_SET)
    end = offset + length
    while offset < end:
        copied = os.sendfile(target, source, offset, end - offset)
        if not copied:
            raise OSError(f"a memory file ends at {offset}")
        offset += copied


def without(ranges: Iterable[tuple[int, int]], taken: Pieces) -> Iterator[tuple[int, int]]:
    """Yield what remains of ranges, both in order and as (offset, length)."""
    number = 0
    for start, length in ranges:
        end = start + length
        while number < len(taken) and taken[number][0] < end:
            begin, size = taken[number]
            if begin > start:
                yield start, begin - start
            start = max(start, begin + size)
            if start >= end:
                break
            number += 1
        if start < end:
            yield start, end - start


def _consecutive(pieces: Pieces) -> list[int]:
    places, at = [], 0
    for _, length in pieces:
        places.append(at)
        at += length
    return places
