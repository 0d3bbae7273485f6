"""Seals: how a file that must stay as it is was when it was made, and whether it still is.

Where the kernel has fs-verity it checks every block as it is read, and the seal says against
what. Elsewhere a file whose times, size or number have changed since is read against its digest
before it is used; one that nobody has touched costs a look.

The digest is that of the digests of the file's pieces, so that each processor reads its part:
taken in one, it was a tenth of what making a root disk costs.
"""

from __future__ import annotations

import errno
import os

import msgspec

from hutch.errors import IntegrityError
from hutch.linux.verity import enable_verity, measure_verity

__all__ = ["Seal", "check_seal", "is_as_sealed", "make_seal"]

_PIECE = 4 << 20
_BUFFER = 256 << 10
_WORKERS = 4


class Seal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`pieces` is the SHA-256, in hexadecimal, of the SHA-256 of each 4 MiB, one after the
    other; `sha256` that of the file, where an older hutch sealed it; `verity` what the kernel
    checks against, "" for nothing; `stamp` changes with whatever is done to the file."""

    sha256: str = ""
    pieces: str = ""
    verity: str = ""
    stamp: str = ""


def make_seal(path: str) -> Seal:
    """Seal a file that is whole; nobody may have it open for writing."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        digest = _pieces(fd)
        enable_verity(fd)
        return Seal(pieces=digest, verity=measure_verity(fd), stamp=_stamp(fd))
    finally:
        os.close(fd)


def check_seal(path: str, seal: Seal, *, what: str, hint: str) -> Seal:
    """Return the seal of a file that is as it was, with a new stamp where it was touched only;
    raise `IntegrityError` for one that is not. `OSError` passes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if seal.verity:
            _require_measure(fd, seal, what, hint)
            return seal
        stamp = _stamp(fd)
        if stamp == seal.stamp:
            return seal
        if not _is_read_as_sealed(fd, seal, what, hint):
            raise IntegrityError(f"{what}: its content has changed since it was made", hint=hint)
        return msgspec.structs.replace(seal, stamp=stamp)
    finally:
        os.close(fd)


def _require_measure(fd: int, seal: Seal, what: str, hint: str) -> None:
    found = measure_verity(fd)
    if found != seal.verity:
        raise IntegrityError(
            f"{what}: is not the file that was made: the kernel measures {found or 'nothing'},"
            f" expected {seal.verity}",
            hint=hint,
        )


def is_as_sealed(path: str, seal: Seal) -> bool:
    """Read a whole file and tell whether it is as it was when it was sealed. `OSError` passes,
    an input/output error being what the kernel says of a damaged block."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _matches(fd, seal)
    finally:
        os.close(fd)


def _is_read_as_sealed(fd: int, seal: Seal, what: str, hint: str) -> bool:
    try:
        return _matches(fd, seal)
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        raise IntegrityError(f"{what}: cannot be read: input/output error", hint=hint) from exc


def _matches(fd: int, seal: Seal) -> bool:
    if seal.pieces:
        return _pieces(fd) == seal.pieces
    return not seal.sha256 or _sha256(fd) == seal.sha256


def _sha256(fd: int) -> str:
    import hashlib

    with open(os.dup(fd), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pieces(fd: int) -> str:
    """Return the digest of the digests of a file's pieces, read by several threads at once."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    starts = range(0, os.fstat(fd).st_size, _PIECE)
    workers = min(_WORKERS, len(os.sched_getaffinity(0)), len(starts))
    found = hashlib.sha256()
    if workers < 2:
        for start in starts:
            found.update(_piece(fd, start))
        return found.hexdigest()
    with ThreadPoolExecutor(workers, thread_name_prefix="hutch-seal") as pool:
        for digest in pool.map(lambda start: _piece(fd, start), starts):
            found.update(digest)
    return found.hexdigest()


def _piece(fd: int, start: int) -> bytes:
    import hashlib

    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    end = start + _PIECE
    while start < end:
        count = os.preadv(fd, [buffer[: end - start]], start)
        if not count:
            break
        digest.update(buffer[:count])
        start += count
    return digest.digest()


def _stamp(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
