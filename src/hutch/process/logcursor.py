"""A place in a supervisor's log that goes on without waiting: for readers that have other ways
to learn of writes than a thread that sleeps."""

from __future__ import annotations

import os
from collections import deque

from hutch.process.logfile import LogFile, next_file, open_files, seek_tail

__all__ = ["LogCursor"]

_CHUNK = 256 << 10


class LogCursor:
    """Reads lines from the oldest file of a log to the newest, across rotations; close it.

    `tail` begins at the last so many lines. Not for several threads at once.
    """

    def __init__(self, path: str, *, tail: int | None = None) -> None:
        self._path = path
        files = open_files(path)
        try:
            self._files = deque(files if tail is None else seek_tail(files, tail))
        except BaseException:
            for file in files:
                os.close(file.fd)
            raise

    def waiting(self) -> int:
        """Return how many bytes are there to be read now, in the file that is being read."""
        if not self._files:
            return 0
        fd = self._files[0].fd
        return os.fstat(fd).st_size - os.lseek(fd, 0, os.SEEK_CUR)

    def lines(self) -> list[bytes] | None:
        """Return the next lines without their newlines, some 256 KiB of them; None when there
        is nothing more for now."""
        while True:
            if self._files and (found := self._chunk(self._files[0])):
                return found
            if not self._advance():
                return None

    def _chunk(self, file: LogFile) -> list[bytes]:
        while data := os.read(file.fd, _CHUNK):
            lines = (file.rest + data).split(b"\n")
            file.rest = lines.pop()
            if lines:
                return lines
        return []

    def _advance(self) -> bool:
        """Go on with the next file; False when this one is the newest."""
        if len(self._files) > 1:
            os.close(self._files.popleft().fd)
            return True
        newer = next_file(self._path, self._files[0] if self._files else None)
        if newer is None:
            return False
        # What was written between the last read and the rotation comes before it.
        self._files.append(newer)
        return True

    def close(self) -> None:
        """Let go of the files; safe to repeat."""
        while self._files:
            os.close(self._files.pop().fd)
