"""Seals: how a file that must stay as it is was when it was made, and whether it still is.

Where the kernel has fs-verity it checks every block as it is read, and the seal says against
what. Elsewhere a file whose times, size or number have changed since is read against its digest
before it is used; one that nobody has touched costs a look.
"""

from __future__ import annotations

import errno
import hashlib
import os

import msgspec

from hutch.errors import IntegrityError
from hutch.linux.verity import enable_verity, measure_verity

__all__ = ["Seal", "check_seal", "make_seal"]


class Seal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`sha256` in hexadecimal; `verity` is what the kernel checks against, "" for nothing;
    `stamp` changes with whatever is done to the file."""

    sha256: str = ""
    verity: str = ""
    stamp: str = ""


def make_seal(path: str) -> Seal:
    """Seal a file that is whole; nobody may have it open for writing."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        digest = _sha256(fd)
        enable_verity(fd)
        return Seal(sha256=digest, verity=measure_verity(fd), stamp=_stamp(fd))
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
        if seal.sha256 and _read(fd, what, hint) != seal.sha256:
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


def _read(fd: int, what: str, hint: str) -> str:
    try:
        return _sha256(fd)
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        raise IntegrityError(f"{what}: cannot be read: input/output error", hint=hint) from exc


def _sha256(fd: int) -> str:
    with open(os.dup(fd), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
