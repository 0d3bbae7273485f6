"""Directories of `RUN --mount=type=cache`: `<root>/build-cache/<digest of the id>/`.

`data` is what a step sees, `about.json` says what it is, and `lock` is held by who uses it, so
that no prune takes it away.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

from hutch.decoding import decode_json
from hutch.errors import Busy
from hutch.linux.locks import lock_file
from hutch.storage.faults import disk_errors
from hutch.storage.snapshots import measure

if TYPE_CHECKING:
    from hutch.engine.context import Context

__all__ = ["CacheDirectories", "CacheDirectory"]

_LOCK_WAIT_S = 0.2
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
            with ExitStack() as held:
                fd = self._hold(held, key, sharing, check)
                if fd is None:
                    continue
                self._ensure(key, identifier, fill)
                os.utime(fd)
                yield f"{self._path}/{key}/data"
                return
        raise AssertionError("more private caches at once than there can be steps")

    def _hold(
        self, held: ExitStack, key: str, sharing: str, check: Callable[[], None]
    ) -> int | None:
        """Lock a directory and return the descriptor; None for a private one that is taken."""
        directory = f"{self._path}/{key}"
        exclusive, wait_s = sharing != "shared", 0 if sharing == "private" else _LOCK_WAIT_S
        with disk_errors("build cache"):
            while True:
                os.makedirs(directory, 0o700, exist_ok=True)
                lock = lock_file(f"{directory}/lock", exclusive=exclusive, timeout_s=wait_s)
                try:
                    return held.enter_context(lock)
                except FileNotFoundError:
                    continue  # a prune was faster
                except Busy:
                    if sharing == "private":
                        return None
                    check()

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
        except FileNotFoundError:
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
