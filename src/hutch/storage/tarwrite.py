"""Write tar headers: ustar where it fits, PAX records for what does not."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["END", "header", "padding"]

_BLOCK = 512
_PAX_NAME = b"PaxHeaders.0/"

END = bytes(2 * _BLOCK)
"""Two zero blocks: the end of an archive."""


def padding(size: int) -> bytes:
    """Return the zeros that follow `size` bytes of data."""
    return bytes(-size % _BLOCK)


def header(
    name: bytes,
    kind: bytes,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    linkname: bytes = b"",
    device: tuple[int, int] = (0, 0),
    pax: Mapping[bytes, bytes] | None = None,
) -> bytes:
    """Return the header block(s) of one entry; `pax` are further extended records."""
    records = dict(pax or {})
    if len(name) > 100:
        records[b"path"] = name
    if len(linkname) > 100:
        records[b"linkpath"] = linkname
    if size >= 8**11:
        records[b"size"] = b"%d" % size
    if uid >= 8**7:
        records[b"uid"] = b"%d" % uid
    if gid >= 8**7:
        records[b"gid"] = b"%d" % gid
    if not 0 <= mtime < 8**11 and b"mtime" not in records:
        records[b"mtime"] = b"%d" % mtime
    block = _block(
        name,
        kind,
        mode=mode,
        uid=uid if uid < 8**7 else 0,
        gid=gid if gid < 8**7 else 0,
        size=size if size < 8**11 else 0,
        mtime=mtime if 0 <= mtime < 8**11 else 0,
        linkname=linkname,
        device=device,
    )
    if not records:
        return block
    body = b"".join(_record(key, records[key]) for key in sorted(records))
    base = name.rstrip(b"/").rpartition(b"/")[2]
    extended = _block(_PAX_NAME + base[:80], b"x", size=len(body), mtime=0)
    return extended + body + padding(len(body)) + block


def _record(key: bytes, value: bytes) -> bytes:
    """Return `length key=value\\n`, where the length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d" % length + rest


def _block(
    name: bytes,
    kind: bytes,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    linkname: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        name[:100].ljust(100, b"\0"),
        mode,
        uid,
        gid,
        size,
        mtime,
    )
    tail = b"%s%s%s%s%07o\0%07o\0" % (
        kind,
        linkname[:100].ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(64),
        device[0],
        device[1],
    )
    checksum = sum(head) + sum(tail) + 8 * 0x20
    return (head + b"%06o\0 " % checksum + tail).ljust(_BLOCK, b"\0")
