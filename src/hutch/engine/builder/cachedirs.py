"""Directories of `RUN --mount=type=cache`: `<root>/build-cache/<digest of the id>/`.

`data` is what a step sees, `about.json` says what it is, and `lock` is held by who uses it, so
that no prune takes it away.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

from hutch.decoding import decode_json
from hutch.storage.faults import disk_errors
from hutch.storage.snapshots import measure

if TYPE_CHECKING:
    from hutch.engine.context import Context

__all__ = ["CacheDirectories", "CacheDirectory"]

_PAUSE_S = 0.05
_MAX_PRIVATE = 64


class CacheDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """One directory: the id it was asked for by, bytes it takes, when it was used last (in
    seconds since the epoch), and whether it is in use."""

    key: str
    id: str
    size: int = 0
    used_at: float = 0
    in_use: bool = False


class _About(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created_at: float


class CacheDirectories:
    """The cache directories of one root."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._path = f"{context.root}/build-cache"

    @contextmanager
    def use(
        self,
        identifier: str,
        sharing: str,
        check: Callable[[], None],
        fill: Callable[[str], None],
    ) -> Iterator[str]:
        """Hold a directory and yield its path.

        `shared` is with everybody, `locked` waits for it to be free, `private` is another one
        where somebody has it. `check` is called while it waits, and ends that by raising;
        `fill` is given a new one.
        """
        for number in range(_MAX_PRIVATE):
            key = sha256(f"{identifier}\0{number}".encode()).hexdigest()[:32]
            fd = self._open(key)
            try:
                if sharing == "private":
                    if not _lock(fd, fcntl.LOCK_EX):
                        continue
                else:
                    kind = fcntl.LOCK_EX if sharing == "locked" else fcntl.LOCK_SH
                    while not _lock(fd, kind):
                        check()
                        time.sleep(_PAUSE_S)
                self._ensure(key, identifier, fill)
                os.utime(fd)
                yield f"{self._path}/{key}/data"
                return
            finally:
                os.close(fd)
        raise AssertionError("more private caches at once than there can be steps")

    def _open(self, key: str) -> int:
        directory = f"{self._path}/{key}"
        with disk_errors("build cache"):
            while True:
                os.makedirs(directory, 0o700, exist_ok=True)
                try:
                    return os.open(
                        f"{directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
                    )
                except FileNotFoundError:
                    continue  # a prune was faster

    def _ensure(self, key: str, identifier: str, fill: Callable[[str], None]) -> None:
        """Make the directory of a cache; several that share it may do so at once."""
        directory = f"{self._path}/{key}"
        with disk_errors("build cache"):
            os.makedirs(directory, 0o700, exist_ok=True)
            if os.path.isdir(f"{directory}/data"):
                return
            fresh = f"{directory}/new-{os.urandom(6).hex()}"
            os.mkdir(fresh, 0o755)
            try:
                fill(fresh)
                about = _About(id=identifier, created_at=time.time())
                with open(f"{directory}/about.json", "wb") as file:
                    file.write(msgspec.json.encode(about))
                os.rename(fresh, f"{directory}/data")
            except BaseException as error:
                self._context.trash.discard(fresh)
                if isinstance(error, OSError) and os.path.isdir(f"{directory}/data"):
                    return
                raise

    def all(self) -> list[CacheDirectory]:
        """Return the directories, those used last first."""
        found = []
        for key in self._keys():
            directory = f"{self._path}/{key}"
            try:
                with open(f"{directory}/about.json", "rb") as file:
                    identifier = decode_json(file.read(), _About).id
                used_at = os.stat(f"{directory}/lock").st_mtime
            except (OSError, msgspec.DecodeError):
                continue
            found.append(
                CacheDirectory(
                    key=key,
                    id=identifier,
                    size=measure(f"{directory}/data").bytes,
                    used_at=used_at,
                    in_use=self._is_used(key),
                )
            )
        return sorted(found, key=lambda one: one.used_at, reverse=True)

    def _keys(self) -> list[str]:
        try:
            return [key for key in os.listdir(self._path) if not key.startswith(".")]
        except FileNotFoundError:
            return []

    def _is_used(self, key: str) -> bool:
        try:
            fd = os.open(f"{self._path}/{key}/lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _lock(fd, fcntl.LOCK_EX)
        finally:
            os.close(fd)

    def remove(self, key: str) -> bool:
        """Remove a directory that nobody uses; return whether it is gone."""
        try:
            fd = os.open(f"{self._path}/{key}/lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return self._context.trash.discard(f"{self._path}/{key}")
        try:
            return _lock(fd, fcntl.LOCK_EX) and self._context.trash.discard(f"{self._path}/{key}")
        finally:
            os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
