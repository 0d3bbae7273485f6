"""Archives for the tests: entries written as asked, well formed or not."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

from hutch.storage.tarstream import DIR, LNK, REG, SYM
from hutch.storage.tarwrite import END, header, padding
from hutch.storage.unpack import UnpackLimits, UnpackOptions, UnpackResult, unpack

__all__ = ["directory", "end", "file", "hard_link", "raw_header", "symlink", "unpack_bytes"]


def file(name: str | bytes, data: bytes = b"", *, mode: int = 0o644, **more: Any) -> bytes:
    return header(_name(name), REG, size=len(data), mode=mode, **more) + data + padding(len(data))


def directory(name: str | bytes, *, mode: int = 0o755, **more: Any) -> bytes:
    return header(_name(name), DIR, mode=mode, **more)


def symlink(name: str | bytes, target: str | bytes) -> bytes:
    return header(_name(name), SYM, mode=0o777, linkname=_name(target))


def hard_link(name: str | bytes, target: str | bytes) -> bytes:
    return header(_name(name), LNK, linkname=_name(target))


_FIELDS = {
    "name": slice(0, 100),
    "mode": slice(100, 108),
    "uid": slice(108, 116),
    "gid": slice(116, 124),
    "size": slice(124, 136),
    "mtime": slice(136, 148),
    "linkname": slice(157, 257),
    "magic": slice(257, 265),
    "devmajor": slice(329, 337),
    "devminor": slice(337, 345),
    "prefix": slice(345, 500),
}


def raw_header(kind: bytes, **fields: bytes) -> bytes:
    """Return a header with these bytes in its fields, whatever they mean, and a good checksum."""
    block = bytearray(header(b"x", kind))
    for name, value in fields.items():
        place = _FIELDS[name]
        block[place] = value[: place.stop - place.start].ljust(place.stop - place.start, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def end() -> bytes:
    return END


def _name(name: str | bytes) -> bytes:
    return name if isinstance(name, bytes) else os.fsencode(name)


def unpack_bytes(
    data: bytes,
    target: Path,
    *,
    limits: UnpackLimits | None = None,
    options: UnpackOptions | None = None,
    diff_id: str | None = None,
) -> UnpackResult:
    """Unpack an archive into `target`, made if it is not there."""
    target.mkdir(exist_ok=True)
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return unpack(io.BytesIO(data), fd, limits=limits, options=options, diff_id=diff_id)
    finally:
        os.close(fd)


def python_tar(root: Path, format: int) -> bytes:
    """Return a tar of `root` written by Python's own module."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        archive.add(root, arcname=".")
    return buffer.getvalue()
