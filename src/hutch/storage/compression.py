"""Compressed streams: tell gzip, zstd, bzip2, xz and plain apart, unpack and pack them.

Every decoder gives chunks of bounded size, whatever the input expands to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

from hutch.errors import IntegrityError, InvalidArgument
from hutch.storage.streams import Rewound

__all__ = ["CHUNK", "Readable", "compress", "decompress", "detect"]

CHUNK = 1 << 20
_INPUT = 1 << 18

_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
)


class Readable(Protocol):
    """Anything with `read`: a file, a socket file, a pipe."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; nothing means the end."""
        ...


def detect(head: bytes) -> str:
    """Return `gzip`, `zstd`, `bzip2`, `xz` or `none` from a stream's first bytes."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    # Skippable frames may open a zstd stream (RFC 8878, 3.1.2).
    if len(head) >= 4 and 0x50 <= head[0] <= 0x5F and head[1:4] == b"\x2a\x4d\x18":
        return "zstd"
    return "none"


def decompress(stream: Readable) -> Iterator[bytes]:
    """Yield the plain content of `stream` in chunks of at most `CHUNK` bytes.

    The compression is told from the content, as a media type may be wrong. Raises
    `IntegrityError` for a damaged or truncated stream.
    """
    head = _at_least(stream, 6)
    source = Rewound(head, stream)
    name = detect(head)
    if name == "gzip":
        yield from _gunzip(source)
    elif name == "zstd":
        yield from _unzstd(source)
    elif name in ("bzip2", "xz"):
        yield from _stdlib(source, name)
    else:
        while data := source.read(CHUNK):
            yield data


def _at_least(stream: Readable, size: int) -> bytes:
    head = b""
    while len(head) < size and (more := stream.read(_INPUT)):
        head += more
    return head


def _members(source: Readable, new: Callable[[], Any], errors: Any, name: str) -> Iterator[bytes]:
    """Decode members one after another with a decoder of bz2's shape."""
    decoder = new()
    data = source.read(_INPUT)
    while True:
        try:
            plain = decoder.decompress(data, CHUNK)
        except errors as error:
            raise IntegrityError(f"{name} stream is damaged: {error}") from error
        data = b""
        if plain:
            yield plain
        if decoder.eof:
            data = decoder.unused_data.lstrip(b"\0")
            while not data and (more := source.read(_INPUT)):
                data = more.lstrip(b"\0")
            if not data:
                return
            decoder = new()
        elif decoder.needs_input:
            data = source.read(_INPUT)
            if not data:
                raise IntegrityError(f"{name} stream is truncated")


def _gunzip(source: Readable) -> Iterator[bytes]:
    from isal import igzip_lib

    def new() -> Any:
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    return _members(source, new, (igzip_lib.IsalError, EOFError, ValueError), "gzip")


def _stdlib(source: Readable, name: str) -> Iterator[bytes]:
    if name == "bzip2":
        import bz2

        return _members(source, bz2.BZ2Decompressor, (OSError, EOFError, ValueError), name)
    import lzma

    def new() -> Any:
        return lzma.LZMADecompressor(memlimit=256 << 20)

    return _members(source, new, (lzma.LZMAError, EOFError), name)


def _unzstd(source: Readable) -> Iterator[bytes]:
    import zstandard

    # A frame may ask for a window of gigabytes; image builders stay at or under 128 MiB.
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    reader: Any = decoder.stream_reader(
        cast("Any", source), read_size=_INPUT, read_across_frames=True
    )
    try:
        while data := reader.read(CHUNK):
            yield data
    except zstandard.ZstdError as error:
        raise IntegrityError(f"zstd stream is damaged: {error}") from error


def compress(chunks: Iterable[bytes], name: str, *, level: int | None = None) -> Iterator[bytes]:
    """Yield `chunks` compressed as `gzip`, `zstd` or `none`; the same input, the same output."""
    if name == "none":
        yield from chunks
        return
    encoder: Any
    if name == "gzip":
        from isal import isal_zlib

        encoder = isal_zlib.compressobj(2 if level is None else level, isal_zlib.DEFLATED, 31)
    elif name == "zstd":
        import zstandard

        encoder = zstandard.ZstdCompressor(level=3 if level is None else level).compressobj()
    else:
        raise InvalidArgument(f"expected gzip, zstd or none, got {name!r}", field="compression")
    for chunk in chunks:
        if data := encoder.compress(chunk):
            yield data
    yield encoder.flush()
