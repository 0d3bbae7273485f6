"""A writable layer that is sent while it changes: what was sent ahead, and what still is true.

The target unpacks what came ahead beside the layer. Once nothing writes any more the layer is
sent without the files that have not changed, and their names say which to take from there.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator

from hutch.errors import IntegrityError
from hutch.linux.files import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2, syncfs

__all__ = ["SentFiles", "take_kept"]

_NAMES = 64 << 20
# A file system may tell two writes within one tick of its clock by the same time.
_MARGIN_NS = 2 * 10**9
_Signature = tuple[int, int, int, int]


class SentFiles:
    """The regular files of a directory as they are when this is made, which is before they are
    sent; those that change while they are sent are told by their times later."""

    def __init__(self, directory: str) -> None:
        self._directory = os.fsencode(directory)
        # What is written through a mapping gets its time when a clean page is written to.
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syncfs(fd)
        finally:
            os.close(fd)
        settled = time.time_ns() - _MARGIN_NS
        self._files = {
            path: signature
            for path, signature in self._scan()
            if max(signature[2], signature[3]) < settled
        }

    def _scan(self) -> Iterator[tuple[bytes, _Signature]]:
        pending = [b""]
        while pending:
            parent = pending.pop()
            with os.scandir(os.path.join(self._directory, parent)) as entries:
                for entry in entries:
                    path = os.path.join(parent, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                        continue
                    signature = _signature(entry.stat(follow_symlinks=False))
                    if signature is not None and len(os.listxattr(entry.path)) == 0:
                        yield path, signature

    def unchanged(self) -> list[bytes]:
        """Return the paths of those that are as they were, while nothing writes to them."""
        kept = []
        for path, signature in self._files.items():
            try:
                status = os.lstat(os.path.join(self._directory, path))
            except OSError:
                continue
            if _signature(status) == signature:
                kept.append(path)
        return kept


def _signature(status: os.stat_result) -> _Signature | None:
    """Return what changes with a file; None for what is sent again in any case."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def take_kept(pieces: Iterable[bytes], ahead: str, upper: str) -> None:
    """Move the files that are named from what came ahead to the layer. A name that leads out of
    either, or is not there, is an `IntegrityError`."""
    names = b""
    for piece in pieces:
        names += piece
        if len(names) > _NAMES:
            raise IntegrityError("too many names of files")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    source, target = os.open(ahead, flags), os.open(upper, flags)
    try:
        for name in filter(None, names.split(b"\0")):
            _move(source, target, name)
    finally:
        os.close(source)
        os.close(target)


def _move(source: int, target: int, name: bytes) -> None:
    parent, _, base = name.rpartition(b"/")
    if base in (b"", b".", b".."):
        raise IntegrityError(f"unexpected file {name[:80]!r}")
    try:
        there = _beneath(source, parent)
        try:
            here = _beneath(target, parent)
            try:
                times = os.fstat(here)
                os.rename(base, base, src_dir_fd=there, dst_dir_fd=here)
                os.utime(here, ns=(times.st_atime_ns, times.st_mtime_ns))
            finally:
                os.close(here)
        finally:
            os.close(there)
    except OSError as exc:
        raise IntegrityError(f"file {name[:80]!r}: {(exc.strerror or '').lower()}") from exc


def _beneath(root: int, path: bytes) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return openat2(root, path or b".", flags, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
