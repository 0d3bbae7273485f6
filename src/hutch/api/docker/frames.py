"""How Docker puts several streams on one connection: eight bytes of header before each piece."""

from __future__ import annotations

import struct

__all__ = ["MULTIPLEXED", "RAW", "frame", "pack_head", "stream_type"]

RAW = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"

_HEAD = struct.Struct(">BxxxI")


def frame(stream: int, data: bytes) -> bytes:
    """Return a piece of stdout (1) or stderr (2) as Docker frames it."""
    return _HEAD.pack(stream, len(data)) + data


def pack_head(stream: int, length: int) -> bytes:
    """Return the header of a piece of so many bytes."""
    return _HEAD.pack(stream, length)


def stream_type(*, tty: bool, version: tuple[int, int], upgraded: bool = True) -> str:
    """Return the content type of a stream: from 1.42 on it tells whether there are frames, but
    on a connection that was taken over without an upgrade."""
    return RAW if tty or not upgraded or version < (1, 42) else MULTIPLEXED
