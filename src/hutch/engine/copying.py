"""Copy between the host and an instance with `docker cp`'s rules for names."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hutch.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from hutch.engine.files import Files
    from hutch.storage.tree import Stat

__all__ = ["copy_in", "copy_out", "target_of"]


def target_of(source: str, source_is_dir: bool, target: str, target_kind: str) -> tuple[str, str]:
    """Return (directory to unpack into, name of the top entry, "" for contents only).

    `target_kind` is "dir", "file" or "" (nothing there). The rules are those that `docker
    cp --help` states: a file goes into a directory or onto a name; a directory goes into
    an existing directory, or becomes the new name; `SOURCE/.` means its contents.
    """
    contents = source.endswith("/.") or source == "."
    parent, base = os.path.split(target.rstrip("/") or "/")
    own = os.path.basename(os.path.normpath(source))
    if not source_is_dir:
        if target_kind == "dir":
            return target, own
        if target.endswith("/"):
            raise NotFound(f"{target}: no such directory", hint="make it first")
        return parent or "/", base
    if target_kind == "file":
        raise InvalidArgument(f"{target}: is a file, {source!r} is a directory", field="target")
    if target_kind == "dir":
        return (target, "") if contents else (target, own)
    return parent or "/", base


def copy_in(files: Files, local: str, path: str, *, follow: bool = False) -> None:
    """Copy a local file or tree into an instance."""
    follow = follow or local.endswith(("/", "/."))
    try:
        status = os.stat(local, follow_symlinks=follow)
    except OSError as exc:
        raise NotFound(f"{local}: {(exc.strerror or '').lower()}") from exc
    is_dir = stat.S_ISDIR(status.st_mode)
    directory, name = target_of(local, is_dir, path, _kind(files, path))
    files.copy_in_tar(directory, _pack_local(local, is_dir, name, follow))


def _kind(files: Files, path: str) -> str:
    try:
        found = files.stat(path)
    except NotFound:
        return ""
    return "dir" if stat.S_ISDIR(found.mode) else "file"


def _pack_local(local: str, is_dir: bool, name: str, follow: bool) -> Iterator[bytes]:
    from hutch.storage import tree

    # A descriptor of the parent is the root: links in the tree are copied, not followed.
    real = os.path.realpath(local)
    if not follow and os.path.islink(local):
        parent_of, own = os.path.split(os.path.abspath(local))
        real = os.path.join(os.path.realpath(parent_of), own)
    parent = os.open(os.path.dirname(real) or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from tree.pack(
            parent,
            "/" if real == "/" else "/" + os.path.basename(real),
            name=name or None,
            contents_only=is_dir and not name,
        )
    finally:
        os.close(parent)


def copy_out(files: Files, path: str, local: str, *, follow: bool = False) -> None:
    """Copy a file or tree of an instance to the host."""
    from hutch.engine.files import ChunkReader
    from hutch.storage import tree

    plain = path[:-2] or "/" if path.endswith("/.") else path
    found = files.stat(plain, follow=follow)
    is_dir = _is_directory(files, plain, found)
    kind = "dir" if os.path.isdir(local) else "file" if os.path.lexists(local) else ""
    directory, name = target_of(path, is_dir, os.path.abspath(local) + _slash(local), kind)
    try:
        root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise NotFound(f"{directory}: {(exc.strerror or '').lower()}") from exc
    try:
        chunks = files.packed(
            plain, follow=follow, name=name or None, contents_only=is_dir and not name
        )
        owner = None if os.geteuid() == 0 else (os.getuid(), os.getgid())
        # A guest makes the tar: it must not choose what is written beside what was asked for.
        tree.extract(root, "/", ChunkReader(chunks), owner=owner, within=name, replace=False)
    finally:
        os.close(root)


def _slash(local: str) -> str:
    return "/" if local.endswith("/") else ""


def _is_directory(files: Files, path: str, found: Stat) -> bool:
    if path.endswith("/") and stat.S_ISLNK(found.mode):
        found = files.stat(path)
    return stat.S_ISDIR(found.mode)
