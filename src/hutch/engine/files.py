"""The files of an instance: read, write, list, copy in and out, running or not.

A running instance is reached through its own root, so its volumes and tmpfs are seen; a
stopped one through its layers, mounted for the moment and attached nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.finish import refresh
from hutch.engine.lookup import load
from hutch.errors import Denied, NotFound
from hutch.lifecycle import State

if TYPE_CHECKING:
    from hutch.linux.idmap import IdMapping
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
        from hutch.storage.snapshots import open_merged

        fd = open_merged(context.snapshots.load(identifier, record.chain_ids), read_only=read_only)
    try:
        yield fd
    finally:
        os.close(fd)


class Files:
    """The files of one instance; paths are absolute inside it, and stay inside it: links
    are followed as the instance's own processes would."""

    def __init__(self, context: Context, identifier: str) -> None:
        self._context = context
        self._id = identifier

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        """Return a file's content; more than `limit` bytes are refused."""
        from hutch.storage import tree

        with open_root(self._context, self._id) as root:
            return tree.read(root, path, limit=limit)

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
        from hutch.storage import tree

        content = data.encode() if isinstance(data, str) else data
        with open_root(self._context, self._id, read_only=False) as root:
            tree.write(root, path, content, mode=mode, owner=owner, append=append, parents=parents)

    def list(self, path: str = "/") -> Sequence[Stat]:
        """Return what a directory holds, by name."""
        from hutch.storage import tree

        with open_root(self._context, self._id) as root:
            return tree.list_directory(root, path)

    def stat(self, path: str, *, follow: bool = True) -> Stat:
        """Return what a path is; raise `NotFound`."""
        from hutch.storage import tree

        with open_root(self._context, self._id) as root:
            return tree.stat(root, path, follow=follow)

    def exists(self, path: str) -> bool:
        """Tell whether there is something at a path."""
        try:
            self.stat(path)
        except NotFound:
            return False
        return True

    def mkdir(self, path: str, *, mode: int = 0o755, owner: tuple[int, int] | None = None) -> None:
        """Make a directory with its parents; an existing one is left alone."""
        from hutch.storage import tree

        with open_root(self._context, self._id, read_only=False) as root:
            tree.make_directory(root, path, mode=mode, owner=owner)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link, an empty directory, or with `recursive` a tree."""
        from hutch.storage import tree

        with open_root(self._context, self._id, read_only=False) as root:
            tree.remove(root, path, recursive=recursive)

    # ---- trees --------------------------------------------------------------------------

    def copy_out_tar(
        self, path: str, *, follow: bool = False, name: str | None = None
    ) -> tuple[Stat, Iterator[bytes]]:
        """Return what a path is, and it (a tree for a directory) as a tar stream whose top
        entry is called `name` (its own name if None)."""
        from hutch.storage import tree

        with open_root(self._context, self._id) as root:
            found = tree.stat(root, path, follow=follow)
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
        from hutch.storage import tree

        with open_root(self._context, self._id) as root:
            yield from tree.pack(
                root,
                path.rstrip("/") or "/",
                follow=follow,
                name=name,
                contents_only=contents_only,
                mapping=self._mapping(),
            )

    def _mapping(self) -> IdMapping | None:
        """Return the map by which owners inside differ from those on the host."""
        spec = load(self._context, self._id).spec
        if spec.userns in ("", "host"):
            return None
        from hutch.drivers.container.idmaps import mapping_of

        return mapping_of(spec)

    def copy_in_tar(
        self, path: str, stream: object, *, owner: tuple[int, int] | None = None
    ) -> int:
        """Unpack a tar (compressed or not; an object with `read`, or an iterable of bytes)
        into a directory that exists; return the number of entries."""
        from hutch.storage import tree

        reader = stream if hasattr(stream, "read") else ChunkReader(stream)  # type: ignore[arg-type]
        with open_root(self._context, self._id, read_only=False) as root:
            return tree.extract(root, path, reader, owner=owner, mapping=self._mapping())

    def copy_in(self, local: str | os.PathLike[str], path: str) -> None:
        """Copy a local file or tree in, as `docker cp` does: into `path` when that is a
        directory, else under that name."""
        from hutch.engine.copying import copy_in

        copy_in(self, os.fspath(local), path)

    def copy_out(self, path: str, local: str | os.PathLike[str]) -> None:
        """Copy a file or tree out, as `docker cp` does."""
        from hutch.engine.copying import copy_out

        copy_out(self, path, os.fspath(local))


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
