"""What a byte stream of a migration carries: sparse files as runs, and trees as tar."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator

from hutch.errors import IntegrityError
from hutch.storage.sparse import data_ranges

__all__ = ["Pieces", "pack_file", "unpack_file"]

_RUN = struct.Struct("<QQ")
_SIZE = struct.Struct("<Q")
_PIECE = 256 << 10


class Pieces:
    """A readable made of pieces: what takes a file, takes a stream of the link."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, nothing at the end."""
        if size < 0:
            rest = bytes(self._rest) + b"".join(self._pieces)
            self._rest = memoryview(b"")
            return rest
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        found, self._rest = self._rest[:size], self._rest[size:]
        return bytes(found)

    def exactly(self, size: int) -> bytes:
        """Return `size` bytes; raise `IntegrityError` where the stream ends before."""
        found = bytearray()
        while len(found) < size:
            piece = self.read(size - len(found))
            if not piece:
                raise IntegrityError("a file was cut short on its way")
            found += piece
        return bytes(found)

    def finish(self) -> None:
        """Raise unless the stream is at its end."""
        if self.read(1):
            raise IntegrityError("a file is longer than it said")


def pack_file(fd: int) -> Iterator[bytes]:
    """Yield a file with its holes: u64 size, runs of u64 offset, u64 length and data, and a
    run of length 0 at the end."""
    size = os.fstat(fd).st_size
    yield _SIZE.pack(size)
    for start, length in data_ranges(fd):
        for at in range(start, start + length, _PIECE):
            count = min(_PIECE, start + length - at)
            data = os.pread(fd, count, at)
            if len(data) != count:
                raise OSError(5, "a file was cut short while it was read")
            yield _RUN.pack(at, count) + data
    yield _RUN.pack(size, 0)


def unpack_file(pieces: Iterable[bytes], path: str, *, limit: int, mode: int = 0o600) -> int:
    """Write such a stream to a new file, safe on the disk; return its size.

    Raises `IntegrityError` for one larger than `limit` or with runs out of order.
    """
    stream = Pieces(pieces)
    (size,) = _SIZE.unpack(stream.exactly(_SIZE.size))
    if size > limit:
        raise IntegrityError(f"{os.path.basename(path)}: {size} bytes, expected at most {limit}")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.ftruncate(fd, size)
        at = 0
        while True:
            start, count = _RUN.unpack(stream.exactly(_RUN.size))
            if start < at or count > _PIECE or start + count > size:
                raise IntegrityError(f"{os.path.basename(path)}: data out of order or range")
            if count == 0:
                break
            _write_at(fd, stream.exactly(count), start)
            at = start + count
        stream.finish()
        os.fsync(fd)
    finally:
        os.close(fd)
    return int(size)


def _write_at(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
