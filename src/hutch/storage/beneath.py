"""Directories beneath a root by descriptor: resolved as a chroot would, never outside."""

from __future__ import annotations

import os
from collections import OrderedDict

from hutch.errors import IntegrityError
from hutch.linux.files import open_in_root, open_without_links

__all__ = ["Directories", "make_directory", "normalise"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KEPT = 64


def normalise(name: bytes) -> bytes:
    """Return an archive's path relative to the root, without `.`, `..`, doubled slashes.

    An absolute path counts from the root, as in every container engine; one that climbs
    above the root raises `IntegrityError`. The root itself is the empty path.
    """
    if name.endswith(b"/"):
        name = name[:-1]
    if name.startswith(b"./"):
        name = name[2:]
    if not (b"/." in name or b"//" in name or name[:1] in (b".", b"/", b"")):
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise IntegrityError(f"path leaves the root: {os.fsdecode(name[:200])!a}")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


class Directories:
    """Open directories of one root, the last used kept.

    Symbolic links in a path are followed as inside the root (RESOLVE_IN_ROOT), which is
    what an extractor in a chroot does, or refused (ELOOP) without `links`. `made` holds the
    directories that had to be made for something beneath them.
    """

    def __init__(self, root_fd: int, *, links: bool = True) -> None:
        self._root_fd = root_fd
        self._resolve = open_in_root if links else open_without_links
        self._open: OrderedDict[bytes, int] = OrderedDict()
        self.made: set[bytes] = set()
        self.count = 0

    def open(self, path: bytes) -> int:
        """Return a descriptor of the directory, made (0755) with its parents if missing.

        It stays this object's own, and may be closed by the next call.
        """
        if not path:
            return self._root_fd
        fd = self._open.get(path)
        if fd is not None:
            self._open.move_to_end(path)
            return fd
        try:
            fd = self._resolve(self._root_fd, path, _DIRECTORY)
        except FileNotFoundError:
            self._make(path)
            fd = self._resolve(self._root_fd, path, _DIRECTORY)
        self._open[path] = fd
        if len(self._open) > _KEPT:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _make(self, path: bytes) -> None:
        at = 0
        while at >= 0:
            at = path.find(b"/", at + 1)
            prefix = path[:at] if at > 0 else path
            try:
                os.close(self._resolve(self._root_fd, prefix, os.O_PATH | os.O_DIRECTORY))
            except FileNotFoundError:
                parent, _, base = prefix.rpartition(b"/")
                fd = self._resolve(self._root_fd, parent or b"/", _DIRECTORY)
                try:
                    make_directory(fd, base)
                except FileExistsError:
                    raise IntegrityError(
                        f"a dangling symbolic link stands in the path {os.fsdecode(path)!a}"
                    ) from None
                finally:
                    os.close(fd)
                self.made.add(prefix)
                self.count += 1

    def forget(self) -> None:
        """Close all; needed whenever something that exists is removed or replaced."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def make_directory(dir_fd: int, base: bytes) -> None:
    """Make a directory of mode 0755, whatever the umask."""
    os.mkdir(base, 0o755, dir_fd=dir_fd)
    made = os.open(base, _DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        os.fchmod(made, 0o755)
    finally:
        os.close(made)
