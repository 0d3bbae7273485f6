"""A snapshot of a machine as one tar stream, which GNU tar unpacks with its holes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from hutch.engine.records import SnapshotRecord
from hutch.storage.sparse import data_ranges
from hutch.storage.tarwrite import END, header, padding

__all__ = ["export_snapshot"]

_PIECE = 1 << 20
_RECORD = b"snapshot.json"


def export_snapshot(record: SnapshotRecord, directory: str) -> Iterator[bytes]:
    """Yield `snapshot.json`, then the files of the directory."""
    mtime = record.created_ns // 10**9
    content = msgspec.json.format(msgspec.json.encode(record)) + b"\n"
    yield header(_RECORD, b"0", mode=0o600, size=len(content), mtime=mtime)
    yield content + padding(len(content))
    for name in sorted(os.listdir(directory)):
        with open(f"{directory}/{name}", "rb", buffering=0) as file:
            yield from _sparse_entry(name.encode(), file.fileno(), mtime)
    yield END


def _sparse_entry(name: bytes, fd: int, mtime: int) -> Iterator[bytes]:
    """Yield a file in the format GNU.sparse 1.0: its map stands before its data."""
    size = os.fstat(fd).st_size
    ranges = list(data_ranges(fd))
    numbers = [len(ranges), *(number for pair in ranges for number in pair)]
    table = b"".join(b"%d\n" % number for number in numbers)
    table += padding(len(table))
    stored = len(table) + sum(length for _, length in ranges)
    pax = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": name,
        b"GNU.sparse.realsize": b"%d" % size,
    }
    yield header(b"GNUSparseFile.0/" + name, b"0", mode=0o600, size=stored, mtime=mtime, pax=pax)
    yield table
    for start, length in ranges:
        for at in range(start, start + length, _PIECE):
            yield _read(fd, at, min(_PIECE, start + length - at))
    yield padding(stored)


def _read(fd: int, at: int, count: int) -> bytes:
    pieces = []
    while count:
        piece = os.pread(fd, count, at)
        if not piece:
            raise OSError("a file of the snapshot was cut short")
        pieces.append(piece)
        at += len(piece)
        count -= len(piece)
    return b"".join(pieces)
