"""liblz4: unpack LZ4 blocks, which the standard library cannot; every Debian with apt has it."""

from __future__ import annotations

import ctypes

from hutch.errors import IntegrityError, Unsupported

__all__ = ["SONAME", "decompress_block"]

SONAME = "liblz4.so.1"


def decompress_block(data: bytes, limit: int) -> bytes:
    """Return the content of one raw LZ4 block, which is at most `limit` bytes.

    Raises `IntegrityError` for a damaged block and for one that holds more.
    """
    try:
        library = ctypes.CDLL(SONAME)
    except OSError as exc:
        raise Unsupported(
            f"lz4: {SONAME} is not installed", hint="apt-get install liblz4-1"
        ) from exc
    library.LZ4_decompress_safe.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
    ]
    target = ctypes.create_string_buffer(limit)
    size = library.LZ4_decompress_safe(data, target, len(data), limit)
    if size < 0:
        raise IntegrityError("lz4: the block is damaged")
    return ctypes.string_at(target, size)
