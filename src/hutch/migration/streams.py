"""What a byte stream of a migration carries: sparse files as runs, and trees as tar."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from hutch.errors import IntegrityError
from hutch.storage.sparse import data_ranges

__all__ = ["Pieces", "SentBlocks", "pack_ahead", "pack_changes", "pack_file"]
__all__ += ["unpack_changes", "unpack_file"]

_RUN = struct.Struct("<QQ")
_SIZE = struct.Struct("<Q")
_PIECE = 256 << 10
_BLOCK = 64 << 10
SentBlocks = dict[int, bytes]
"""What was sent of a file ahead: digests of its blocks of 64 KiB, by number."""


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


def pack_ahead(fd: int, sent: SentBlocks) -> Iterator[bytes]:
    """Yield a file that is written to meanwhile, noting what is sent of it. What it grows by
    is left for the changes."""
    size = os.fstat(fd).st_size
    yield _SIZE.pack(size)
    for number in _blocks(fd):
        if number * _BLOCK >= size:
            break
        data = os.pread(fd, min(_BLOCK, size - number * _BLOCK), number * _BLOCK)
        sent[number] = _digest(data)
        yield _RUN.pack(number * _BLOCK, len(data)) + data
    yield _RUN.pack(size, 0)


def pack_changes(fd: int, sent: SentBlocks) -> Iterator[bytes]:
    """Yield what is different in a file that nobody writes to any more. Blocks that have
    become holes are sent as zeros."""
    size = os.fstat(fd).st_size
    yield _SIZE.pack(size)
    for number in sorted(sent.keys() | set(_blocks(fd))):
        data = os.pread(fd, _BLOCK, number * _BLOCK)
        if data and sent.get(number) != _digest(data):
            yield _RUN.pack(number * _BLOCK, len(data)) + data
    yield _RUN.pack(size, 0)


def _blocks(fd: int) -> Iterator[int]:
    """Yield the numbers of the blocks that hold data, each once, in order."""
    done = 0
    for start, length in data_ranges(fd):
        end = -(-(start + length) // _BLOCK)
        yield from range(max(done, start // _BLOCK), end)
        done = max(done, end)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def unpack_file(pieces: Iterable[bytes], path: str, *, limit: int, mode: int = 0o600) -> int:
    """Write such a stream to a new file, safe on the disk; return its size.

    Raises `IntegrityError` for one larger than `limit` or with runs out of order.
    """
    return _unpack(pieces, path, os.O_CREAT | os.O_EXCL, limit, mode)


def unpack_changes(pieces: Iterable[bytes], path: str, *, limit: int) -> int:
    """Write such a stream over a file that is there; return its size."""
    return _unpack(pieces, path, 0, limit, 0)


def _unpack(pieces: Iterable[bytes], path: str, flags: int, limit: int, mode: int) -> int:
    stream = Pieces(pieces)
    (size,) = _SIZE.unpack(stream.exactly(_SIZE.size))
    if size > limit:
        raise IntegrityError(f"{os.path.basename(path)}: {size} bytes, expected at most {limit}")
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags, mode)
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
