"""Streams of other things: of chunks, and of a stream whose beginning was read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.storage.compression import Readable

__all__ = ["ChunkStream", "Rewound"]


class ChunkStream:
    """A stream out of chunks, small ones joined."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, size: int, /) -> bytes:
        """Return the next chunks, of `size` bytes or a little more; nothing at the end."""
        parts: list[bytes] = []
        length = 0
        for chunk in self._chunks:
            parts.append(chunk)
            length += len(chunk)
            if length >= size:
                break
        return b"".join(parts)


class Rewound:
    """A stream with its first bytes put back."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, as many as there are below 0; nothing at the end."""
        if self._head:
            data = self._head if size < 0 else self._head[:size]
            self._head = self._head[len(data) :]
            return data
        return self._stream.read(size)
