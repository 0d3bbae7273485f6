"""Several layers as one: what all of them together changed, deletions included."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hutch.storage.overlay import Merged, is_opaque, is_whiteout
from hutch.storage.pack import Packer
from hutch.storage.tarstream import REG
from hutch.storage.tarwrite import END, header

__all__ = ["pack_squashed"]

_OPAQUE = b".wh..wh..opq"
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Seen(NamedTuple):
    """What a name is in the stack: `layer` shows it; `layers` make a directory, and `hides`
    says that nothing of the layers below the stack shows through. No status: deleted."""

    layer: int
    status: os.stat_result | None
    layers: tuple[int, ...] = ()
    hides: bool = False


def pack_squashed(paths: Sequence[str]) -> Iterator[bytes]:
    """Yield one layer that does what these unpacked layers (topmost first) do together."""
    packer = Packer()
    with Merged(paths) as merged:
        pending: list[tuple[bytes, tuple[int, ...]]] = [(b"", tuple(range(len(paths))))]
        while pending:
            at, layers = pending.pop()
            deeper: list[tuple[bytes, tuple[int, ...]]] = []
            for base in merged.names(at, layers):
                path = at + b"/" + base if at else base
                seen = _look(merged, at, layers, base)
                if seen.status is None:
                    prefix = at + b"/" if at else b""
                    yield header(prefix + b".wh." + base, REG, mode=0o600)
                    continue
                fd = merged.open(seen.layer, at)
                try:
                    yield from packer.entry(path, seen.status, fd, base)
                finally:
                    os.close(fd)
                if seen.layers:
                    if seen.hides:
                        yield header(path + b"/" + _OPAQUE, REG, mode=0o600)
                    deeper.append((path, seen.layers))
            pending.extend(reversed(deeper))
    yield END


def _look(merged: Merged, at: bytes, layers: Sequence[int], base: bytes) -> _Seen:
    first: tuple[int, os.stat_result] | None = None
    found: list[int] = []
    for layer in layers:
        fd = merged.open(layer, at)
        try:
            status = os.stat(base, dir_fd=fd, follow_symlinks=False)
            opaque = stat.S_ISDIR(status.st_mode) and _is_opaque_child(fd, base)
        except FileNotFoundError:
            continue
        finally:
            os.close(fd)
        if is_whiteout(status):
            if first is None:
                return _Seen(layer, None)
            return _Seen(*first, tuple(found), hides=True)
        if first is None:
            if not stat.S_ISDIR(status.st_mode):
                return _Seen(layer, status)
            first = (layer, status)
        elif not stat.S_ISDIR(status.st_mode):
            return _Seen(*first, tuple(found), hides=True)
        found.append(layer)
        if opaque:
            return _Seen(*first, tuple(found), hides=True)
    assert first is not None
    return _Seen(*first, tuple(found))


def _is_opaque_child(dir_fd: int, base: bytes) -> bool:
    fd = os.open(base, _OPEN, dir_fd=dir_fd)
    try:
        return is_opaque(fd)
    finally:
        os.close(fd)
