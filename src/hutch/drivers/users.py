"""Resolve `user[:group]` and supplementary groups inside a root file system, as Docker does.

The files are read through descriptors of the image's own layers with RESOLVE_IN_ROOT, so
that a symbolic link in an image cannot make the host's password file answer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from hutch.errors import InvalidArgument, NotFound
from hutch.linux.files import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2
from hutch.plan.assets import ResolvedUser

__all__ = ["LayeredReader", "read_beneath", "resolve_user"]

_MAX_FILE = 4 << 20
_MAX_ID = (1 << 32) - 2
ReadFile = Callable[[str], bytes | None]


class LayeredReader:
    """Reads small files of an overlay that is not mounted: the highest layer wins."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories

    def __call__(self, path: str) -> bytes | None:
        """Return the content, or None where no layer has the file (or one removed it)."""
        for directory in self._directories:
            try:
                root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                content = read_beneath(root, path)
            except _Whiteout:
                return None
            finally:
                os.close(root)
            if content is not None:
                return content
        return None


class _Whiteout(Exception):
    """An upper layer says that the file is gone."""


def read_beneath(root: int, path: str) -> bytes | None:
    """Return a regular file's content (at most 4 MiB) beneath `root`, or None."""
    try:
        fd = openat2(
            root,
            path.lstrip("/"),
            os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY,
            resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
        )
    except OSError:
        _check_whiteout(root, path)
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        chunks = []
        size = 0
        while size < _MAX_FILE and (chunk := os.read(fd, 1 << 16)):
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks)
    finally:
        os.close(fd)


def _check_whiteout(root: int, path: str) -> None:
    try:
        status = os.stat(path.lstrip("/"), dir_fd=root, follow_symlinks=False)
    except OSError:
        return
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        raise _Whiteout


def resolve_user(
    user: str, groups: Sequence[str], read: ReadFile, *, field: str = "user"
) -> ResolvedUser:
    """Return numbers for `user` (`""` is root) with the groups its name belongs to.

    A numeric id needs no entry in the password file; a name does. Groups named in `user`
    replace the primary one; `groups` are added to the supplementary ones, among which the
    primary one is too.
    """
    name, _, group = user.partition(":")
    name = name or "0"
    passwd = _entries(read("/etc/passwd"), 7)
    entry = _find(passwd, name, 2)
    if entry is None and not name.isdecimal():
        raise NotFound(
            f"{field}: no user {name!r} in the image's /etc/passwd",
            hint="use a numeric id, or add the user to the image",
        )
    uid = _number(entry[2] if entry else name, field)
    gid = _number(entry[3], field) if entry else 0
    home = (entry[5] if entry else "") or "/"
    if uid == 0 and entry is None:
        home = "/root"
    groupfile = _entries(read("/etc/group"), 4) if group or groups or entry else []
    extra: list[int] = []
    if group:
        gid = _group(groupfile, group, field)
    elif entry:
        extra = [
            _number(line[2], field)
            for line in groupfile
            if entry[0] in line[3].split(",") and line[2].isdecimal()
        ]
    extra += [_group(groupfile, item, "group_add") for item in groups]
    # The primary group too: without it, taking a group away would let its members in where
    # the file's mode shuts that group out (CVE-2022-36109).
    return ResolvedUser(uid=uid, gid=gid, groups=tuple(dict.fromkeys((gid, *extra))), home=home)


def _entries(content: bytes | None, fields: int) -> list[list[str]]:
    if not content:
        return []
    lines = content.decode("utf-8", "replace").splitlines()
    split = [line.split(":") for line in lines if line and not line.startswith("#")]
    return [line for line in split if len(line) >= fields]


def _find(entries: list[list[str]], wanted: str, number_column: int) -> list[str] | None:
    for line in entries:
        if line[0] == wanted:
            return line
    if wanted.isdecimal():
        for line in entries:
            if line[number_column] == wanted:
                return line
    return None


def _group(entries: list[list[str]], wanted: str, field: str) -> int:
    line = _find(entries, wanted, 2)
    if line is not None:
        return _number(line[2], field)
    if wanted.isdecimal():
        return _number(wanted, field)
    raise NotFound(
        f"{field}: no group {wanted!r} in the image's /etc/group",
        hint="use a numeric id, or add the group to the image",
    )


def _number(text: str, field: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_ID:
        raise InvalidArgument(f"not a user or group id: {text!r}", field=field)
    return int(text)
