"""Room kept beside the database for when the disk is full: it is then given up, so that what
runs can still be stopped, listed and removed, which is what makes room again.

SQLite needs some for its log and its index even to read.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Reserve"]

_SIZE = 1 << 20
# A disk with less than this left is nearly full: the reserve is not taken from the rest of it.
_PLENTY = 16 << 20
# What a transaction may write to the log, and SQLite to the index.
_ENOUGH = 256 << 10


class Reserve:
    """A file that only takes space, beside the database at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = f"{path}-reserve"

    def ensure(self) -> None:
        """Take the space where there is plenty; without it, or on a file system that does
        not give space ahead of use, there is no reserve."""
        try:
            if os.stat(self._path).st_size == _SIZE:
                return
        except FileNotFoundError:
            pass
        try:
            status = os.statvfs(os.path.dirname(self._path) or ".")
            if status.f_bavail * status.f_frsize < _PLENTY:
                return
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _SIZE)
            finally:
                os.close(fd)
        except OSError:
            return

    def is_needed(self) -> bool:
        """Tell whether a transaction might not find room without the reserve."""
        return self._has_less_than(_ENOUGH)

    def is_kept_for_ends(self) -> bool:
        """Tell whether what is left is for what makes room: nothing new is to take it.

        Once the reserve is given up as much is to stay free as it was.
        """
        return self._has_less_than(_ENOUGH if os.path.exists(self._path) else _ENOUGH + _SIZE)

    def _has_less_than(self, size: int) -> bool:
        try:
            status = os.statvfs(os.path.dirname(self._path) or ".")
        except OSError:
            return False
        return status.f_bavail * status.f_frsize < size

    def give_up(self) -> bool:
        """Give the space back; False where there was none."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True
