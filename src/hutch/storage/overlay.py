"""Read a stack of layers as overlayfs would show it, without mounting anything.

Whiteouts (character device 0:0, or an xattr without root) hide what is below; an opaque
directory hides the directories below. Paths are resolved within each layer, and symbolic
links are never followed except by `resolve`, inside the stack.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hutch.errors import NotFound
from hutch.linux.files import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

__all__ = ["Found", "Merged", "is_opaque", "is_whiteout"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
_LINKS = 40
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


class Found(NamedTuple):
    """Something in the merged tree: the layer that shows it (0 is the topmost), its
    status there, and for a directory all the layers it is merged from."""

    layer: int
    status: os.stat_result
    layers: tuple[int, ...]


def is_whiteout(status: os.stat_result) -> bool:
    """Tell whether this is overlayfs's mark of something deleted."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(fd: int) -> bool:
    """Tell whether a directory hides what lower layers have in it."""
    for name in _OPAQUE:
        try:
            if os.getxattr(fd, name) == b"y":
                return True
        except OSError:
            continue
    return False


class Merged:
    """A stack of directories, topmost first; a context manager."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._roots: list[int] = []
        try:
            for path in paths:
                self._roots.append(os.open(path, _OPEN))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the layers."""
        for fd in self._roots:
            os.close(fd)
        self._roots = []

    def root(self) -> Found:
        """Return the root directory."""
        layers = tuple(range(len(self._roots)))
        return Found(0, os.fstat(self._roots[0]), self._until_opaque(b"", layers))

    def open(self, layer: int, path: bytes) -> int:
        """Open a directory of one layer; the caller closes it."""
        return openat2(self._roots[layer], path or b".", _OPEN, 0, _BENEATH)

    def _until_opaque(self, path: bytes, layers: tuple[int, ...]) -> tuple[int, ...]:
        for position, layer in enumerate(layers[:-1]):
            fd = self.open(layer, path)
            try:
                if is_opaque(fd):
                    return layers[: position + 1]
            finally:
                os.close(fd)
        return layers

    def lookup(self, parent: bytes, layers: Sequence[int], name: bytes) -> Found | None:
        """Return what the merged directory `parent` (made of `layers`) shows as `name`."""
        found: Found | None = None
        merged: list[int] = []
        for layer in layers:
            try:
                fd = self.open(layer, parent)
            except OSError:
                continue
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if is_whiteout(status):
                    break
                if found is None:
                    found = Found(layer, status, ())
                    if not stat.S_ISDIR(status.st_mode):
                        return found
                elif not stat.S_ISDIR(status.st_mode):
                    break
                merged.append(layer)
                if self._opaque_child(fd, name):
                    break
            except FileNotFoundError:
                continue
            finally:
                os.close(fd)
        return found._replace(layers=tuple(merged)) if found is not None else None

    def _opaque_child(self, dir_fd: int, name: bytes) -> bool:
        fd = os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            return is_opaque(fd)
        finally:
            os.close(fd)

    def names(self, path: bytes, layers: Sequence[int]) -> list[bytes]:
        """Return the sorted names in a merged directory (whiteouts taken out by `lookup`)."""
        names: set[bytes] = set()
        for layer in layers:
            fd = self.open(layer, path)
            try:
                names.update(os.fsencode(name) for name in os.listdir(fd))
            finally:
                os.close(fd)
        return sorted(names)

    def walk(self, path: bytes = b"", found: Found | None = None) -> Iterator[tuple[bytes, Found]]:
        """Yield (path, what is there) beneath a directory, parents first, names in order."""
        start = found or self.root()
        pending = [(path, start)]
        while pending:
            at, here = pending.pop()
            if at != path:
                yield at, here
            if not stat.S_ISDIR(here.status.st_mode):
                continue
            below = []
            for name in self.names(at, here.layers):
                child = self.lookup(at, here.layers, name)
                if child is not None:
                    below.append((at + b"/" + name if at else name, child))
            pending.extend(reversed(below))

    def resolve(self, path: bytes) -> tuple[bytes, Found]:
        """Follow `path` inside the stack, symbolic links too; raise `NotFound`."""
        todo = [part for part in path.split(b"/") if part not in (b"", b".")]
        done: list[tuple[bytes, Found]] = [(b"", self.root())]
        links = 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                if len(done) > 1:
                    done.pop()
                continue
            at, here = done[-1]
            child = None
            if stat.S_ISDIR(here.status.st_mode):
                child = self.lookup(at, here.layers, name)
            if child is None:
                raise NotFound(f"{os.fsdecode(path)}: not in the image")
            if stat.S_ISLNK(child.status.st_mode):
                links += 1
                if links > _LINKS:
                    raise NotFound(f"{os.fsdecode(path)}: too many symbolic links")
                target = self.readlink(child.layer, at, name)
                if target.startswith(b"/"):
                    done = done[:1]
                todo = [part for part in target.split(b"/") if part not in (b"", b".")] + todo
                continue
            done.append((at + b"/" + name if at else name, child))
        return done[-1]

    def readlink(self, layer: int, parent: bytes, name: bytes) -> bytes:
        """Return a symbolic link's target."""
        fd = self.open(layer, parent)
        try:
            return os.readlink(name, dir_fd=fd)
        finally:
            os.close(fd)
