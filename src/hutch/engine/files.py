"""The files of an instance: read, write, list, copy in and out, running or not.

A running instance is reached through its own root, so its volumes and tmpfs are seen; a
stopped one through its layers, mounted for the moment and attached nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hutch.drivers.base import Tree
from hutch.engine.context import Context
from hutch.engine.finish import refresh
from hutch.engine.lookup import load
from hutch.errors import Denied, InvalidArgument, NotFound
from hutch.lifecycle import State
from hutch.spec.model import InstanceSpec

if TYPE_CHECKING:
    from hutch.linux.idmap import IdMapping
    from hutch.storage.compression import Readable
    from hutch.storage.tree import Stat

__all__ = ["ChunkReader", "Files", "open_root"]

_CHUNK = 1 << 20


@contextmanager
def open_root(context: Context, identifier: str, *, read_only: bool = True) -> Iterator[int]:
    """Hold a descriptor of the instance's root directory."""
    from hutch.drivers.container.processes import open_process
    from hutch.drivers.container.processes import open_root as open_process_root

    record = refresh(context, load(context, identifier))
    if record.state in (State.RUNNING, State.PAUSED):
        with open_process(record.pid, record.start_time):
            fd = open_process_root(record.pid)
        if record.spec.read_only and not read_only and os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            os.close(fd)
            raise Denied(f"instance {record.name}: its root file system is read-only")
    else:
        if context.rootless:
            from hutch.drivers.container.own_ids import open_merged
        else:
            from hutch.storage.merged import open_merged

        fd = open_merged(context.snapshots.load(identifier, record.chain_ids), read_only=read_only)
    try:
        yield fd
    finally:
        os.close(fd)


class HostTree:
    """The files beneath a directory of this host; see `hutch.drivers.base.Tree`."""

    def __init__(self, root: int, mapping: IdMapping | None) -> None:
        self._root = root
        self._mapping = mapping

    def stat(self, path: str, *, follow: bool) -> Stat:
        """Return what a path is."""
        from hutch.storage import tree

        return tree.stat(self._root, path, follow=follow)

    def list(self, path: str) -> Sequence[Stat]:
        """Return what a directory holds."""
        from hutch.storage import tree

        return tree.list_directory(self._root, path)

    def read(self, path: str, *, limit: int | None) -> bytes:
        """Return a file's content."""
        from hutch.storage import tree

        return tree.read(self._root, path, limit=limit)

    def write(
        self,
        path: str,
        data: bytes | Iterator[bytes],
        *,
        mode: int | None,
        owner: tuple[int, int] | None,
        append: bool,
        parents: bool,
    ) -> None:
        """Write a file."""
        from hutch.storage import tree

        tree.write(self._root, path, data, mode=mode, owner=owner, append=append, parents=parents)

    def mkdir(self, path: str, *, mode: int, owner: tuple[int, int] | None) -> None:
        """Make a directory with its parents."""
        from hutch.storage import tree

        tree.make_directory(self._root, path, mode=mode, owner=owner)

    def remove(self, path: str, *, recursive: bool) -> None:
        """Remove what is at a path."""
        from hutch.storage import tree

        tree.remove(self._root, path, recursive=recursive)

    def pack(
        self, path: str, *, follow: bool, name: str | None, contents_only: bool
    ) -> Iterator[bytes]:
        """Yield a file or a tree as a tar."""
        from hutch.storage import tree

        return tree.pack(
            self._root,
            path,
            follow=follow,
            name=name,
            contents_only=contents_only,
            mapping=self._mapping,
        )

    def extract(self, path: str, stream: Readable, *, owner: tuple[int, int] | None) -> int:
        """Unpack a tar into a directory."""
        from hutch.storage import tree

        return tree.extract(
            self._root, path, stream, owner=owner, mapping=self._mapping, replace=False
        )


@contextmanager
def open_tree(context: Context, identifier: str, *, read_only: bool = True) -> Iterator[Tree]:
    """Hold the files of an instance: through its guest's agent, or its root on this host."""
    record = refresh(context, load(context, identifier))
    if record.spec.isolation == "vm":
        from hutch.engine.guest_files import open_guest

        with open_guest(context, record) as guest:
            yield guest
        return
    with open_root(context, identifier, read_only=read_only) as root:
        yield HostTree(root, _mapping(record.spec))


def _mapping(spec: InstanceSpec) -> IdMapping | None:
    """Return the map by which owners inside differ from those on the host."""
    if spec.userns in ("", "host"):
        return None
    from hutch.drivers.container.idmaps import mapping_of

    return mapping_of(spec)


def _path(given: str | os.PathLike[str]) -> str:
    """Return a path inside an instance as text."""
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str):
        raise InvalidArgument(f"expected a path, got {given!r}", field="path")
    return path


class Files:
    """The files of one instance; paths are absolute inside it, and stay inside it: links
    are followed as the instance's own processes would."""

    def __init__(self, context: Context, identifier: str) -> None:
        self._context = context
        self._id = identifier
        self._held: Tree | None = None

    @contextmanager
    def _for_copying(self) -> Iterator[Files]:
        """Do several things in one go: a stopped virtual machine is reached only once."""
        if self._held is not None or load(self._context, self._id).spec.isolation != "vm":
            yield self
            return
        with open_tree(self._context, self._id, read_only=False) as tree:
            files = Files(self._context, self._id)
            files._held = tree
            yield files

    @contextmanager
    def _tree(self, *, read_only: bool = True) -> Iterator[Tree]:
        if self._held is not None:
            yield self._held
            return
        with open_tree(self._context, self._id, read_only=read_only) as tree:
            yield tree

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        """Return a file's content; more than `limit` bytes are refused."""
        with self._tree() as tree:
            return tree.read(_path(path), limit=limit)

    def read_text(self, path: str, *, limit: int | None = None) -> str:
        """Return a file's content as text (UTF-8)."""
        return self.read(path, limit=limit).decode()

    def write(
        self,
        path: str,
        data: bytes | str | Iterator[bytes],
        *,
        mode: int | None = None,
        owner: tuple[int, int] | None = None,
        append: bool = False,
        parents: bool = True,
    ) -> None:
        """Write a file; parents are made unless told otherwise. An existing file keeps
        its owner, and its mode unless `mode` is given."""
        content = data.encode() if isinstance(data, str) else data
        if not isinstance(content, (bytes, bytearray, memoryview, Iterator)):
            raise InvalidArgument(f"expected bytes or text, got {content!r}", field="data")
        path = _path(path)
        with self._tree(read_only=False) as tree:
            tree.write(path, content, mode=mode, owner=owner, append=append, parents=parents)

    def list(self, path: str = "/") -> Sequence[Stat]:
        """Return what a directory holds, by name."""
        with self._tree() as tree:
            return tree.list(_path(path))

    def stat(self, path: str, *, follow: bool = True) -> Stat:
        """Return what a path is; raise `NotFound`."""
        with self._tree() as tree:
            return tree.stat(_path(path), follow=follow)

    def exists(self, path: str) -> bool:
        """Tell whether there is something at a path."""
        try:
            self.stat(path)
        except NotFound:
            return False
        return True

    def mkdir(self, path: str, *, mode: int = 0o755, owner: tuple[int, int] | None = None) -> None:
        """Make a directory with its parents; an existing one is left alone."""
        with self._tree(read_only=False) as tree:
            tree.mkdir(_path(path), mode=mode, owner=owner)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link, an empty directory, or with `recursive` a tree."""
        with self._tree(read_only=False) as tree:
            tree.remove(_path(path), recursive=recursive)

    # ---- trees --------------------------------------------------------------------------

    def copy_out_tar(
        self, path: str, *, follow: bool = False, name: str | None = None
    ) -> tuple[Stat, Iterator[bytes]]:
        """Return what a path is, and it (a tree for a directory) as a tar stream whose top
        entry is called `name` (its own name if None)."""
        with self._tree() as tree:
            found = tree.stat(path, follow=follow)
        contents_only = path.rstrip("/") in ("", ".")
        return found, self.packed(path, follow=follow, name=name, contents_only=contents_only)

    def packed(
        self,
        path: str,
        *,
        follow: bool = False,
        name: str | None = None,
        contents_only: bool = False,
    ) -> Iterator[bytes]:
        """Yield a file or a tree as a tar; with `contents_only` a directory's entries
        without the directory."""
        with self._tree() as tree:
            yield from tree.pack(
                path.rstrip("/") or "/", follow=follow, name=name, contents_only=contents_only
            )

    def copy_in_tar(
        self, path: str, stream: object, *, owner: tuple[int, int] | None = None
    ) -> int:
        """Unpack a tar (compressed or not; an object with `read`, or an iterable of bytes)
        into a directory that exists; return the number of entries."""
        reader = stream if hasattr(stream, "read") else ChunkReader(stream)  # type: ignore[arg-type]
        with self._tree(read_only=False) as tree:
            return tree.extract(path, reader, owner=owner)

    def copy_in(self, local: str | os.PathLike[str], path: str, *, follow: bool = False) -> None:
        """Copy a local file or tree in, as `docker cp` does: into `path` when that is a
        directory, else under that name. A link is copied as one, or what it leads to with
        `follow`."""
        from hutch.engine.copying import copy_in

        with self._for_copying() as files:
            copy_in(files, os.fspath(local), path, follow=follow)

    def copy_out(self, path: str, local: str | os.PathLike[str], *, follow: bool = False) -> None:
        """Copy a file or tree out, as `docker cp` does; `follow` as in `copy_in`."""
        from hutch.engine.copying import copy_out

        with self._for_copying() as files:
            copy_out(files, path, os.fspath(local), follow=follow)


class ChunkReader:
    """Makes a stream with `read` of an iterable of chunks."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            data, self._rest = self._rest + b"".join(self._chunks), b""
            return data
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = chunk
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
