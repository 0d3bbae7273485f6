"""What an instance changed against its image: the added, changed and deleted paths."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence

import msgspec

from hutch.storage.overlay import Found, Merged, is_opaque, is_whiteout

__all__ = ["Change", "changes"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One path (absolute, as inside) and its `kind`: A added, C changed, D deleted."""

    kind: str
    path: str


def changes(upper: str, lower: Sequence[str], *, skip: Collection[bytes] = ()) -> Iterator[Change]:
    """Yield the changes of `upper` over `lower` (topmost first), by path.

    A directory with changes beneath it counts as changed, as `docker diff` has it.
    `skip` are paths to leave out, relative, with all beneath.
    """
    with Merged([upper]) as top, Merged(lower) as below:
        pending: list[tuple[bytes, Found | None]] = [(b"", below.root())]
        while pending:
            at, base = pending.pop()
            fd = top.open(0, at)
            try:
                found, deeper = _directory(fd, at, base, below, skip)
            finally:
                os.close(fd)
            yield from found
            pending.extend(reversed(deeper))


def _directory(
    fd: int, at: bytes, base: Found | None, below: Merged, skip: Collection[bytes]
) -> tuple[list[Change], list[tuple[bytes, Found | None]]]:
    found: list[Change] = []
    deeper: list[tuple[bytes, Found | None]] = []
    names = sorted(os.fsencode(name) for name in os.listdir(fd))
    for name in names:
        path = at + b"/" + name if at else name
        if path in skip:
            continue
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        was = below.lookup(at, base.layers, name) if base is not None else None
        if is_whiteout(status):
            if was is not None:
                found.append(_change("D", path))
            continue
        found.append(_change("C" if was is not None else "A", path))
        if not stat.S_ISDIR(status.st_mode):
            continue
        below_it = was if was is not None and stat.S_ISDIR(was.status.st_mode) else None
        if below_it is not None and _opaque(fd, name):
            found += _hidden(fd, name, path, below_it, below)
            below_it = None
        deeper.append((path, below_it))
    return found, deeper


def _opaque(dir_fd: int, name: bytes) -> bool:
    fd = os.open(name, _OPEN, dir_fd=dir_fd)
    try:
        return is_opaque(fd)
    finally:
        os.close(fd)


def _hidden(dir_fd: int, name: bytes, path: bytes, was: Found, below: Merged) -> list[Change]:
    """Return what an opaque directory deletes: what was in it and is not there anew."""
    fd = os.open(name, _OPEN, dir_fd=dir_fd)
    try:
        present = {os.fsencode(child) for child in os.listdir(fd)}
    finally:
        os.close(fd)
    return [
        _change("D", path + b"/" + child)
        for child in below.names(path, was.layers)
        if child not in present and below.lookup(path, was.layers, child) is not None
    ]


def _change(kind: str, path: bytes) -> Change:
    return Change(kind=kind, path="/" + os.fsdecode(path))
