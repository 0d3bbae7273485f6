"""Make layers: of files to be copied, and of what a command has written."""

from __future__ import annotations

import os
import posixpath
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.builder.tree import Item, Source, Tree
from hutch.errors import InvalidArgument, NotFound
from hutch.image.assemble import store_layer
from hutch.image.records import LayerRecord
from hutch.storage.leases import Lease
from hutch.storage.overlay import Found, Merged
from hutch.storage.pack import Attributes, Packer, pack_diff
from hutch.storage.snapshots import OverlayAssets
from hutch.storage.streams import ChunkStream
from hutch.storage.tarstream import DIR
from hutch.storage.tarwrite import END, header

if TYPE_CHECKING:
    from hutch.engine.context import Context
    from hutch.linux.idmap import IdMapping

__all__ = ["Chosen", "Placing", "commit_tar", "commit_tree", "commit_upper", "copy_tree"]
__all__ += ["extract_chunks", "pack_chosen"]


_TRIES = 1000
_MAX_LINKS = 40


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """A file or directory with the path it is to have in the layer. `tree` is where it is. With
    `plain` it is a directory that is made like those above it, whatever it is there."""

    name: bytes
    item: Item
    tree: Tree
    plain: bool = False


class Placing:
    """What is in the image where files are to go; without a base nothing is."""

    def __init__(self, base: Merged | None) -> None:
        self._base = base
        self._layers: dict[bytes, tuple[int, ...] | None] = {}
        if base is not None:
            self._layers[b""] = base.root().layers
        else:
            self._layers[b""] = None

    def destination(self, path: str) -> bytes:
        """Return where a path of the image leads, its symbolic links followed; what does not
        exist is taken as written."""
        parts = [os.fsencode(part) for part in path.split("/") if part]
        if self._base is None:
            return b"/".join(parts)
        return self._leads_to(self._base, parts, 0)

    def _leads_to(self, base: Merged, parts: list[bytes], links: int) -> bytes:
        at = b""
        for index, part in enumerate(parts):
            below = at + b"/" + part if at else part
            try:
                at, found = base.resolve(below)
            except NotFound:
                rest = parts[index + 1 :]
                target = self._dangling(base, below)
                if target is None or links >= _MAX_LINKS:
                    return b"/".join([below, *rest])
                return self._leads_to(base, [*target, *rest], links + 1)
            if index + 1 < len(parts) and not stat.S_ISDIR(found.status.st_mode):
                raise InvalidArgument(f"{os.fsdecode(below)}: is not a directory in the image")
        return at

    def _dangling(self, base: Merged, name: bytes) -> list[bytes] | None:
        """Return the parts of the path that a link leads to which nothing is at."""
        found = self.what(name)
        if found is None or not stat.S_ISLNK(found.status.st_mode):
            return None
        parent, _, last = name.rpartition(b"/")
        target = base.readlink(found.layer, parent, last)
        whole = posixpath.normpath(posixpath.join(b"/" + parent, target))
        return [part for part in whole.split(b"/") if part]

    def what(self, name: bytes) -> Found | None:
        """Return what the image has at exactly this path."""
        if self._base is None:
            return None
        if not name:
            return self._base.root()
        parent, _, base = name.rpartition(b"/")
        layers = self._directory(parent)
        return self._base.lookup(parent, layers, base) if layers else None

    def _directory(self, name: bytes) -> tuple[int, ...] | None:
        if name not in self._layers:
            found = self.what(name)
            is_directory = found is not None and stat.S_ISDIR(found.status.st_mode)
            self._layers[name] = found.layers if found is not None and is_directory else None
        return self._layers[name]

    def is_directory(self, name: bytes) -> bool:
        """Tell whether the image has a directory there."""
        found = self.what(name)
        return found is not None and stat.S_ISDIR(found.status.st_mode)


Adjust = Callable[[Item, Attributes], Attributes]


def pack_chosen(
    chosen: Iterator[Chosen], placing: Placing, adjust: Adjust, made: Attributes
) -> Iterator[bytes]:
    """Yield the layer that the chosen files are; `adjust` gives their attributes, and `made`
    those of directories that have to be made on the way.

    A directory that the image has keeps its attributes. Raises `InvalidArgument` where a file
    would replace a directory or the other way round.
    """
    current: list[Item] = []
    packer = Packer(rewrite=lambda _status, found: adjust(current[-1], found))
    there: set[bytes] = {b""}
    for one in chosen:
        if not one.name:
            continue
        yield from _parents(one.name, placing, made, there)
        status = one.item.found.status
        directory = stat.S_ISDIR(status.st_mode)
        if directory and one.name in there:
            continue
        before = placing.what(one.name)
        _refuse_clash(one.name, directory, before)
        if directory:
            there.add(one.name)
            if before is not None:
                continue
            if one.plain:
                yield _made_directory(one.name, made)
                continue
        parent, _, base = one.item.path.rpartition(b"/")
        current[:] = [one.item]
        if not one.item.relative:
            packer.forget_links()  # another source: what is one file there becomes two
        fd = one.tree.merged.open(one.item.found.layer, parent)
        try:
            yield from packer.entry(one.name, status, fd, base or b".")
        finally:
            os.close(fd)
    yield END


def _parents(name: bytes, placing: Placing, made: Attributes, there: set[bytes]) -> Iterator[bytes]:
    """Yield the directories above a name that neither the image nor the layer has."""
    at = name.find(b"/")
    while at >= 0:
        parent = name[:at]
        if parent not in there:
            there.add(parent)
            before = placing.what(parent)
            _refuse_clash(parent, True, before)
            if before is None:
                yield _made_directory(parent, made)
        at = name.find(b"/", at + 1)


def _made_directory(name: bytes, made: Attributes) -> bytes:
    return header(name + b"/", DIR, mode=made.mode, uid=made.uid, gid=made.gid, mtime=made.mtime)


def _refuse_clash(name: bytes, directory: bool, before: Found | None) -> None:
    if before is None:
        return
    was = stat.S_ISDIR(before.status.st_mode)
    shown = f"/{os.fsdecode(name)}"
    if directory and not was:
        link = " (a symbolic link)" if stat.S_ISLNK(before.status.st_mode) else ""
        raise InvalidArgument(
            f"cannot copy a directory to {shown}: it is a file in the image{link}",
            hint="copy to where the link leads" if link else None,
        )
    if was and not directory:
        raise InvalidArgument(f"cannot copy a file to {shown}: it is a directory in the image")


def commit_tar(
    context: Context, chunks: Iterator[bytes], chain_ids: Sequence[str], lease: Lease
) -> LayerRecord:
    """Store a tar as the layer upon others (lowest first) and return what it became."""
    try:
        made = store_layer(
            context.content,
            context.layers,
            ChunkStream(chunks),
            parent_chain_id=chain_ids[-1] if chain_ids else "",
        )
    finally:
        _close(chunks)
    layer, blob = made.layer, made.descriptor
    lease.add(blob.digest, layer.chain_id)
    context.layers.settle((*chain_ids, layer.chain_id))
    return LayerRecord(
        digest=blob.digest,
        size=blob.size,
        media_type=blob.media_type,
        diff_id=layer.diff_id,
        chain_id=layer.chain_id,
        unpacked_size=layer.size,
    )


def commit_upper(
    context: Context,
    assets: OverlayAssets,
    chain_ids: Sequence[str],
    lease: Lease,
    *,
    skip: Sequence[bytes],
    mapping: IdMapping | None,
    newest_s: float | None,
) -> LayerRecord:
    """Store what a command wrote as a layer. `skip` are paths that it did not write;
    `newest_s` is the latest time that a file may have."""
    from hutch.storage.owners import Owners

    def rewrite(_status: os.stat_result, found: Attributes) -> Attributes:
        if newest_s is not None and found.mtime > newest_s:
            return found._replace(mtime=int(newest_s))
        return found

    left_out = {*skip, *_only_passed(assets, skip)}
    chunks = pack_diff(
        assets.upper,
        skip=left_out,
        owners=Owners(mapping) if mapping is not None else None,
        rewrite=rewrite,
    )
    return commit_tar(context, chunks, chain_ids, lease)


def _only_passed(assets: OverlayAssets, skip: Sequence[bytes]) -> set[bytes]:
    """Return directories that only appear because a mount beneath them was made: they hold
    nothing but what is skipped, and are as they were in the image, or not there at all."""
    ours = set(skip)
    parents = {path[:at] for path in skip for at in range(len(path)) if path[at : at + 1] == b"/"}
    with Merged([assets.upper]) as upper, Merged(assets.lower) as lower:
        for path in sorted(parents, key=lambda p: p.count(b"/"), reverse=True):
            try:
                fd = upper.open(0, path)
            except OSError:
                continue
            try:
                names = [os.fsencode(name) for name in os.listdir(fd)]
                status = os.fstat(fd)
            finally:
                os.close(fd)
            if any(path + b"/" + name not in ours for name in names):
                continue
            try:
                _, found = lower.resolve(path)
            except NotFound:
                ours.add(path)
                continue
            was = found.status
            same = (was.st_mode, was.st_uid, was.st_gid) == (
                status.st_mode,
                status.st_uid,
                status.st_gid,
            )
            if same:
                ours.add(path)
    return ours


def _close(chunks: Iterator[bytes]) -> None:
    """Close what a failure left half read, with the files it has open. A thread that reads
    ahead may be in it still: that one stops at its next chunk."""
    close = getattr(chunks, "close", None)
    if close is None:
        return
    for _ in range(_TRIES):
        try:
            close()
            return
        except ValueError:  # it is executing
            time.sleep(0.01)


def extract_chunks(
    chunks: Iterator[bytes], directory: str, *, owner: tuple[int, int] | None = None
) -> None:
    """Extract a tar of ours into a directory, all of it for `owner` where one is given."""
    from hutch.storage import tree

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        tree.extract(fd, "/", ChunkStream(chunks), owner=owner)
    finally:
        _close(chunks)
        os.close(fd)


def copy_tree(
    tree: Tree, directory: str, path: str = ".", *, owner: tuple[int, int] | None = None
) -> bool:
    """Copy what a tree has at `path` into a directory, a single file as `file`; return whether
    it was one. With `owner` all is that user's and group's."""
    (source, *_) = tree.find(path)
    single = not stat.S_ISDIR(source.found.status.st_mode)
    extract_chunks(_pack_tree(tree, source, b"file" if single else b"", owner), directory)
    return single


def commit_tree(context: Context, tree: Tree, lease: Lease) -> LayerRecord:
    """Store all that a tree has as a first layer."""
    (source, *_) = tree.find(".")
    return commit_tar(context, _pack_tree(tree, source, b"", None), (), lease)


def _pack_tree(
    tree: Tree, source: Source, name: bytes, owner: tuple[int, int] | None
) -> Iterator[bytes]:
    def adjust(_item: Item, found: Attributes) -> Attributes:
        return found if owner is None else found._replace(uid=owner[0], gid=owner[1])

    chosen = (
        Chosen(name=item.relative or name, item=item, tree=tree) for item in tree.items(source)
    )
    return pack_chosen(chosen, Placing(None), adjust, Attributes(0o755, 0, 0, 0))
