"""Look at the files that a step copies: in a context or in another stage, never outside.

Both are stacks of directories (`Merged`), whose paths are followed inside the stack, so that
neither `..` nor a symbolic link leads anywhere else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

from hutch.dockerfile.ignore import compile_pattern, has_wildcard
from hutch.errors import InvalidArgument, NotFound
from hutch.storage.overlay import Found, Merged

__all__ = ["Digests", "Item", "Source", "Tree", "clean"]

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_MATCHES = 200_000


class Item(NamedTuple):
    """Something to be copied: where it is, what it is, and its path beneath what was named."""

    path: bytes
    found: Found
    relative: bytes


class Source(NamedTuple):
    """What a source of COPY came to; `path` is where it is, `name` what it is called there."""

    path: bytes
    name: bytes
    found: Found


class Tree:
    """The files of a context or a stage. `ignores` tells paths that are not to be seen, and
    `enter` whether such a directory may still have something to see."""

    def __init__(
        self,
        merged: Merged,
        *,
        ignores: Callable[[str], bool] | None = None,
        enter: Callable[[str], bool] | None = None,
        digests: Digests | None = None,
    ) -> None:
        self.merged = merged
        self._ignores = ignores
        self._enter = enter
        self._digests = digests or Digests()

    def _hidden(self, path: bytes) -> bool:
        return self._ignores is not None and self._ignores(os.fsdecode(path))

    def find(self, written: str) -> list[Source]:
        """Return what a source as written stands for, wildcards matched; raise `NotFound`."""
        pattern = clean(written)
        if not has_wildcard(pattern):
            path = os.fsencode(pattern)
            where, found = self._resolve(path, written)
            return [Source(where, os.path.basename(path), found)]
        matched = list(self._glob(pattern.split("/"), b""))
        if not matched:
            raise NotFound(f"no source files match {written!r}")
        return [
            Source(where, os.path.basename(name), found)
            for name in matched
            for where, found in [self._resolve(name, written)]
        ]

    def top(self) -> list[Source]:
        """Return what is at the top, whatever it is called."""
        layers = self.merged.root().layers
        return [
            Source(name, name, found)
            for name in self.merged.names(b"", layers)
            if (found := self.merged.lookup(b"", layers, name)) is not None
        ]

    def _resolve(self, path: bytes, written: str) -> tuple[bytes, Found]:
        try:
            where, found = self.merged.resolve(path)
        except NotFound:
            raise NotFound(f"{written}: not found") from None
        if where and not self._seen(where, found):
            raise NotFound(
                f"{written}: not found", hint="the ignore file leaves it out of the context"
            )
        return where, found

    def _seen(self, path: bytes, found: Found) -> bool:
        """Tell whether a path is to be seen: a directory that is left out is, where something
        beneath it is not left out."""
        if not self._hidden(path):
            return True
        beneath = self.items(Source(path, os.path.basename(path), found))
        return next(islice(beneath, 1, None), None) is not None

    def _glob(self, parts: list[str], at: bytes) -> Iterator[bytes]:
        """Yield the paths that match, in the order of their names."""
        head, rest = parts[0], parts[1:]
        if not has_wildcard(head):
            below = at + b"/" + os.fsencode(head) if at else os.fsencode(head)
            yield from self._descend(below, rest)
            return
        try:
            where, found = self.merged.resolve(at)
        except NotFound:
            return
        if not stat.S_ISDIR(found.status.st_mode):
            return
        if head == "**" and rest:
            yield from self._glob(rest, at)
        rule = compile_pattern("*" if head == "**" else head)
        count = 0
        for name in self.merged.names(where, found.layers):
            if self.merged.lookup(where, found.layers, name) is None:
                continue
            if rule.fullmatch(os.fsdecode(name)) is None:
                continue
            count += 1
            if count > _MAX_MATCHES:
                raise InvalidArgument(f"more than {_MAX_MATCHES} files match")
            below = at + b"/" + name if at else name
            yield from self._descend(below, parts if head == "**" and rest else rest)

    def _descend(self, path: bytes, rest: list[str]) -> Iterator[bytes]:
        if rest:
            yield from self._glob(rest, path)
            return
        try:
            where, found = self.merged.resolve(path)
        except NotFound:
            return
        if self._seen(where, found):
            yield path

    def items(self, source: Source, leave: Callable[[bytes], bool] | None = None) -> Iterator[Item]:
        """Yield a source and all beneath it; `leave` tells relative paths to leave out.

        A directory that the ignore file leaves out comes with the first thing beneath it that
        is not left out.
        """
        yield Item(source.path, source.found, b"")
        if not stat.S_ISDIR(source.found.status.st_mode):
            return
        prefix = len(source.path) + 1 if source.path else 0
        pending = [(source.path, source.found)]
        owed: dict[bytes, Item] = {}
        while pending:
            at, found = pending.pop()
            below: list[tuple[bytes, Found]] = []
            for name in self.merged.names(at, found.layers):
                child = self.merged.lookup(at, found.layers, name)
                if child is None:
                    continue
                path = at + b"/" + name if at else name
                relative = path[prefix:]
                directory = stat.S_ISDIR(child.status.st_mode)
                if leave is not None and leave(relative):
                    continue
                item = Item(path, child, relative)
                if self._hidden(path):
                    if directory and self._enter is not None and self._enter(os.fsdecode(path)):
                        owed[path] = item
                        below.append((path, child))
                    continue
                yield from _paid(owed, at)
                yield item
                if directory:
                    below.append((path, child))
            pending.extend(reversed(below))

    def digest(self, item: Item) -> str:
        """Return a digest over what an item is: kind, mode, owner, and content or target."""
        status = item.found.status
        kind = stat.S_IFMT(status.st_mode)
        text = f"{status.st_mode:o} {status.st_uid} {status.st_gid}"
        if kind == stat.S_IFREG:
            return f"{text} {self._content(item)}"
        if kind == stat.S_IFLNK:
            parent, _, base = item.path.rpartition(b"/")
            target = self.merged.readlink(item.found.layer, parent, base)
            return f"{text} {sha256(target).hexdigest()}"
        return f"{text} {status.st_rdev if kind != stat.S_IFDIR else 0}"

    def _content(self, item: Item) -> str:
        known = self._digests.get(item.found.status)
        if known is not None:
            return known
        parent, _, base = item.path.rpartition(b"/")
        directory = self.merged.open(item.found.layer, parent)
        try:
            fd = os.open(base, _READ, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            status = os.fstat(fd)
            digest = sha256()
            while data := os.read(fd, 1 << 20):
                digest.update(data)
            found = digest.hexdigest()
            self._digests.put(status, os.fstat(fd), found)
            return found
        finally:
            os.close(fd)

    def read(self, path: str, *, limit: int) -> bytes:
        """Return a regular file's content; raise `NotFound`, or `InvalidArgument` past the
        limit."""
        where, found = self._resolve(os.fsencode(clean(path)), path)
        if not stat.S_ISREG(found.status.st_mode):
            raise InvalidArgument(f"{path}: not a regular file")
        parent, _, base = where.rpartition(b"/")
        directory = self.merged.open(found.layer, parent)
        try:
            fd = os.open(base, _READ, dir_fd=directory)
        finally:
            os.close(directory)
        with open(fd, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InvalidArgument(f"{path}: larger than {limit} bytes")
        return data


def _paid(owed: dict[bytes, Item], at: bytes) -> list[Item]:
    """Take out what is owed of a path and those above it, the highest first."""
    found = []
    while at and owed:
        if at in owed:
            found.append(owed.pop(at))
        at = at.rpartition(b"/")[0]
    return found[::-1]


class Digests:
    """Digests of files by what stat(2) tells of them, kept between builds of one context.

    A file changed within the last two seconds is not noted: one changed again at once would
    look the same.
    """

    def __init__(self, known: dict[str, str] | None = None) -> None:
        self._known = known or {}
        self.seen: dict[str, str] = {}

    @staticmethod
    def _key(status: os.stat_result) -> str:
        return (
            f"{status.st_dev}:{status.st_ino}:{status.st_size}:"
            f"{status.st_mtime_ns}:{status.st_ctime_ns}"
        )

    def get(self, status: os.stat_result) -> str | None:
        key = self._key(status)
        found = self._known.get(key) or self.seen.get(key)
        if found is not None:
            self.seen[key] = found
        return found

    def put(self, before: os.stat_result, after: os.stat_result, digest: str) -> None:
        import time

        key = self._key(after)
        if self._key(before) == key and time.time_ns() - after.st_ctime_ns > 2_000_000_000:
            self.seen[key] = digest

    @property
    def is_changed(self) -> bool:
        """Whether anything is to be kept that was not."""
        return self.seen.keys() != self._known.keys()


def clean(path: str) -> str:
    """Return a path relative to its root: `..` goes no further than that."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
