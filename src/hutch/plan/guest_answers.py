"""What the agent in a virtual machine answers, read from bytes.

The format is documented in docs/reference/guest-protocol.md. A guest is not trusted: every
length is checked here, and what does not fit is an `IntegrityError`.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any

import msgspec

from hutch.errors import IntegrityError

__all__ = [
    "Answer",
    "BlockStats",
    "FileStat",
    "FilesHead",
    "Process",
    "Stats",
    "decode_answer",
    "decode_count",
    "decode_files_head",
    "decode_listing",
    "decode_processes",
    "decode_stat",
    "decode_stats",
]

MAX_DETAIL_BYTES = 64 << 10

# Beyond it neither sums nor JSON have room; a time in nanoseconds is within some 292 years of 1970.
_MOST = (1 << 63) - 1
_FAR_S = _MOST // 1_000_000_000 - 1

_U32, _U64, _I64 = Struct("<I"), Struct("<Q"), Struct("<q")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a call came to: `errno` 0 and its `body`, or which operation failed on what."""

    errno: int
    index: int
    detail: str
    body: bytes


class BlockStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one disk has read and written since the boot."""

    name: str
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest and the instance in it use."""

    memory_total: int
    memory_available: int
    memory_current: int
    cpu_usage_us: int
    cpu_user_us: int
    cpu_system_us: int
    pids: int
    oom_kills: int
    blocks: tuple[BlockStats, ...]


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process, by the numbers of the guest's root namespace; times in clock ticks."""

    pid: int
    ppid: int
    uid: int
    start_ticks: int
    cpu_ticks: int
    tty: str
    command: str


class FileStat(msgspec.Struct, frozen=True, kw_only=True):
    """A file as lstat(2) and readlink(2) see it."""

    name: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    rdev: tuple[int, int]
    target: str


class FilesHead(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of an answer of the files helper; its stream begins `size` bytes in."""

    errno: int
    detail: str
    size: int


class _Short(Exception):
    """The bytes end before the value does."""


class _Reader:
    """Take fields off bytes that somebody else made."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, layout: Struct = _U32) -> int:
        end = self.at + layout.size
        if end > len(self.data):
            raise _Short
        value: int = layout.unpack_from(self.data, self.at)[0]
        self.at = end
        return value

    def u64(self) -> int:
        return self.number(_U64)

    def blob(self, limit: int = MAX_DETAIL_BYTES) -> bytes:
        size = self.number()
        if size > limit:
            raise IntegrityError(f"the machine's agent sent a text of {size} bytes")
        if self.at + size > len(self.data):
            raise _Short
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        raw = self.blob()
        if self.at >= len(self.data):
            raise _Short
        if self.data[self.at] != 0 or b"\0" in raw:
            raise IntegrityError("the machine's agent sent a text with a wrong end")
        self.at += 1
        return raw.decode("utf-8", "surrogateescape")


def _whole(what: str, data: bytes, read: Callable[[_Reader], Any]) -> Any:
    """Read `data` to its end."""
    reader = _Reader(data)
    try:
        value = read(reader)
    except _Short:
        raise IntegrityError(f"the machine's agent sent {what} that is cut off") from None
    if reader.at != len(data):
        raise IntegrityError(f"the machine's agent sent {what} with more after it")
    return value


def decode_answer(data: bytes) -> Answer:
    """Return the answer of a CALL channel, that ended after these bytes."""
    reader = _Reader(data)
    try:
        errno, index, detail = reader.number(), reader.number(), reader.text()
    except _Short:
        raise IntegrityError("the machine's agent sent an answer that is cut off") from None
    return Answer(errno=errno, index=index, detail=detail, body=data[reader.at :])


def _block(raw: bytes) -> BlockStats:
    words = raw.decode("ascii", "replace").split(" ")
    if len(words) != 5 or not all(word.isascii() and word.isdigit() for word in words[1:]):
        raise IntegrityError(f"the machine's agent sent a disk's figures as {raw[:80]!r}")
    read, written, reads, writes = (int(word) for word in words[1:])
    return BlockStats(
        name=words[0], read_bytes=read, written_bytes=written, reads=reads, writes=writes
    )


def _stats(reader: _Reader) -> Stats:
    names = Stats.__struct_fields__[:-1]
    numbers = {name: reader.u64() for name in names}
    if max(numbers.values()) > _MOST:
        raise IntegrityError("the machine's agent sent figures beyond all bounds")
    blocks = tuple(_block(reader.blob(256)) for _ in range(min(reader.number(), 1024)))
    return Stats(**numbers, blocks=blocks)


def decode_stats(body: bytes) -> Stats:
    """Return what STATS answered."""
    stats: Stats = _whole("figures", body, _stats)
    return stats


def _process(reader: _Reader) -> Process:
    return Process(
        pid=reader.number(),
        ppid=reader.number(),
        uid=reader.number(),
        start_ticks=reader.u64(),
        cpu_ticks=reader.u64(),
        tty=reader.text(),
        command=reader.text(),
    )


def _processes(reader: _Reader) -> tuple[Process, ...]:
    found = []
    while reader.at < len(reader.data):
        found.append(_process(reader))
    return tuple(found)


def decode_processes(body: bytes) -> tuple[Process, ...]:
    """Return what PROCESSES answered."""
    processes: tuple[Process, ...] = _whole("a list of processes", body, _processes)
    return processes


def decode_files_head(data: bytes) -> FilesHead | None:
    """Return the head of an answer of the files helper; None where more bytes are needed."""
    reader = _Reader(data)
    try:
        errno, detail = reader.number(), reader.text()
    except _Short:
        return None
    return FilesHead(errno=errno, detail=detail, size=reader.at)


def _file(reader: _Reader, name: str) -> FileStat:
    mode, uid, gid = reader.number(), reader.number(), reader.number()
    size, seconds = reader.u64(), reader.number(_I64)
    nanoseconds, links = min(reader.number(), 999_999_999), reader.number()
    return FileStat(
        name=name,
        mode=mode,
        uid=uid,
        gid=gid,
        size=size,
        mtime_ns=max(-_FAR_S, min(seconds, _FAR_S)) * 1_000_000_000 + nanoseconds,
        links=links,
        rdev=(reader.number(), reader.number()),
        target=reader.text(),
    )


def decode_stat(body: bytes) -> FileStat:
    """Return what a `StatFile` was answered, without the head."""
    found: FileStat = _whole("a file's record", body, lambda r: _file(r, r.text()))
    return found


def _listing(reader: _Reader) -> tuple[FileStat, ...]:
    found = []
    while name := reader.text():
        if "/" in name or name in (".", ".."):
            raise IntegrityError(f"the machine's agent sent a file's name that is none: {name!r}")
        found.append(_file(reader, name))
    return tuple(found)


def decode_listing(body: bytes) -> tuple[FileStat, ...]:
    """Return what a `ListFiles` was answered, without the head.

    A listing without its end (the helper died) is an `IntegrityError`.
    """
    files: tuple[FileStat, ...] = _whole("a listing", body, _listing)
    return files


def decode_count(body: bytes) -> int:
    """Return how many entries an `UnpackFiles` made."""
    count: int = _whole("a number", body, lambda r: r.number())
    return count
