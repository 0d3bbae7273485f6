"""Read the log that a supervisor writes: the last lines, a span of time, or as it grows.

One record is one line, `TIME STREAM DATA`; docs/reference/log-format.md has the format.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import msgspec

__all__ = ["LogFile", "LogRecord", "next_file", "open_files", "read_log", "seek_tail"]

_CHUNK = 256 << 10
_LETTERS = {ord("o"): (1, True), ord("e"): (2, True), ord("O"): (1, False), ord("E"): (2, False)}
_POLL_FIRST_S = 0.005
_POLL_MOST_S = 0.1


class LogRecord(msgspec.Struct, frozen=True):
    """A line that the process wrote, or a piece of one: `data` ends in a newline if the
    line does; `stream` is 1 for stdout (or the terminal) and 2 for stderr."""

    time_ns: int
    stream: int
    data: bytes


def read_log(
    path: str,
    *,
    tail: int | None = None,
    since_ns: int | None = None,
    until_ns: int | None = None,
    follow: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Iterator[LogRecord]:
    """Yield the log's records, oldest first, from the rotated files too.

    `tail` keeps the last so many lines (before `since_ns` and `until_ns` are looked at).
    With `follow` go on as the log grows, until `stop` says that the instance has ended
    and everything is read. A log that does not exist is empty.
    """
    for line in _lines(path, tail, follow, stop):
        record = _parse(line)
        if record is None or (since_ns is not None and record.time_ns < since_ns):
            continue
        if until_ns is not None and record.time_ns > until_ns:
            return
        yield record


def _parse(line: bytes) -> LogRecord | None:
    """Return the record, or None for a line that a crash has cut short."""
    at = line.find(b" ")
    if at <= 0 or len(line) < at + 3 or line[at + 2] != 0x20:
        return None
    kind = _LETTERS.get(line[at + 1])
    if kind is None or not line[:at].isdigit():
        return None
    stream, whole = kind
    return LogRecord(int(line[:at]), stream, line[at + 3 :] + b"\n" if whole else line[at + 3 :])


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


class LogFile:
    """One file of the log, read forward line by line; half a line waits for its rest."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.rest = b""

    def lines(self) -> Iterator[bytes]:
        while data := os.read(self.fd, _CHUNK):
            lines = (self.rest + data).split(b"\n")
            self.rest = lines.pop()
            yield from lines

    def identity(self) -> tuple[int, int]:
        return _identity(os.fstat(self.fd))


def open_files(path: str) -> list[LogFile]:
    """Open the log's files, oldest first; none where there is no log."""
    return [LogFile(fd) for fd in _open_all(path)]


def _lines(
    path: str, tail: int | None, follow: bool, stop: Callable[[], bool] | None
) -> Iterator[bytes]:
    fds = _open_all(path)
    files = [LogFile(fd) for fd in fds]
    try:
        if tail is not None:
            files = seek_tail(files, tail)
        for file in files:
            yield from file.lines()
        if follow:
            # The descriptors go with the newest file, which `_follow` replaces.
            current = files[-1] if files else None
            fds = [file.fd for file in files[:-1]]
            yield from _follow(path, current, stop)
    finally:
        for fd in fds:
            os.close(fd)


def _open_all(path: str) -> list[int]:
    """Open the log's files, oldest first, each once and none left out while they are rotated."""
    while True:
        newest = _open(path)  # held open, so that its inode number cannot come again
        try:
            fds = _scan(path)
            # One rotation under way is borne; a whole one may have reordered what was seen.
            if _is_newest(path, newest):
                return fds
        finally:
            if newest is not None:
                os.close(newest)
        for fd in fds:
            os.close(fd)


def _scan(path: str) -> list[int]:
    """Open the files from the newest to the oldest; return them the other way round.

    In a rotation a file's number only grows, the oldest file's first. So who counts up meets
    every file, some twice, where who counts down passes a file that is moved past him. Half
    way through a rotation one number is free.
    """
    fds: list[int] = []
    seen: set[tuple[int, int]] = set()
    free = number = 0
    while free < 2:
        fd = _open(f"{path}.{number}" if number else path)
        number += 1
        if fd is None:
            free += 1
            continue
        free = 0
        identity = _identity(os.fstat(fd))
        if identity in seen:
            os.close(fd)
        else:
            seen.add(identity)
            fds.append(fd)
    return fds[::-1]


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _is_newest(path: str, fd: int | None) -> bool:
    """Tell whether the log's newest file is the open one; None stands for no file."""
    try:
        newest = os.stat(path)
    except FileNotFoundError:
        return fd is None
    return fd is not None and _identity(newest) == _identity(os.fstat(fd))


def _ends_line(line: bytes) -> bool:
    at = line.find(b" ")
    return line[at + 1 : at + 2].islower()


def seek_tail(files: list[LogFile], tail: int) -> list[LogFile]:
    """Place the files so that reading them gives the last `tail` lines; drop the older."""
    wanted, newest = tail, True
    for index in range(len(files) - 1, -1, -1):
        offset, found = _tail_offset(files[index].fd, wanted, newest)
        os.lseek(files[index].fd, offset, os.SEEK_SET)
        wanted -= found
        newest = False
        if wanted <= 0 and (offset > 0 or tail == 0 or index == 0):
            for older in files[:index]:
                os.lseek(older.fd, 0, os.SEEK_END)
            return files
    return files


def _tail_offset(fd: int, wanted: int, newest: bool) -> tuple[int, int]:
    """Return where the last `wanted` lines begin and how many lines were found.

    Scan backwards: a line begins after the record that ended the one before.
    """
    end = os.lseek(fd, 0, os.SEEK_END)
    found, at, rest = 0, end, b""
    while at > 0:
        start = max(0, at - _CHUNK)
        block = os.pread(fd, at - start, start) + rest
        cut = 0 if start == 0 else block.find(b"\n") + 1
        if cut == 0 and start > 0:
            at, rest = start, block
            continue
        position = start + len(block)
        for line in reversed(block[cut:].splitlines(keepends=True)):
            if _ends_line(line) or (newest and found == 0 and position == end):
                found += 1
                if found > wanted:
                    return position, wanted
            position -= len(line)
        at, rest = start, block[:cut]
    return 0, found


def _follow(path: str, current: LogFile | None, stop: Callable[[], bool] | None) -> Iterator[bytes]:
    pause = _POLL_FIRST_S
    try:
        while True:
            ending = stop is not None and stop()
            moved = True
            while moved:
                moved = False
                if current is not None:
                    for line in current.lines():
                        pause = _POLL_FIRST_S
                        yield line
                newer = next_file(path, current)
                if newer is not None:
                    if current is not None:
                        # What was written between the read and the rotation.
                        yield from current.lines()
                        os.close(current.fd)
                    current, moved = newer, True
            if ending:
                return
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_MOST_S)
    finally:
        if current is not None:
            os.close(current.fd)


def next_file(path: str, current: LogFile | None) -> LogFile | None:
    """Return the file that came after `current` when the log has been rotated."""
    if _is_newest(path, None if current is None else current.fd):
        return None
    files = [LogFile(fd) for fd in _open_all(path)]
    identities = [file.identity() for file in files]
    at = 0  # the oldest that is left, where `current` is no longer kept
    if current is not None and current.identity() in identities:
        at = identities.index(current.identity()) + 1
    for file in files[:at] + files[at + 1 :]:
        os.close(file.fd)
    return files[at] if at < len(files) else None
