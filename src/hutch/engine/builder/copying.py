"""COPY and ADD: from a context, a stage, an image, a document, an archive, a URL or git."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from hutch.dockerfile import model
from hutch.dockerfile.ignore import compile_pattern, has_wildcard
from hutch.dockerfile.keys import step_key
from hutch.dockerfile.modes import parse_mode
from hutch.dockerfile.source import SourceError
from hutch.engine.builder.archives import unpack_archive
from hutch.engine.builder.layering import Chosen, Placing, commit_tar, pack_chosen
from hutch.engine.builder.remotes import is_remote, refuse_scheme
from hutch.engine.builder.tree import Item, Source, Tree, clean
from hutch.errors import HutchError, NotFound
from hutch.image.records import LayerRecord
from hutch.storage.overlay import Merged
from hutch.storage.pack import Attributes

if TYPE_CHECKING:
    from hutch.engine.builder.build import Build
    from hutch.engine.builder.stage import StageState

__all__ = ["CopyStep", "owner_of"]


class _Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Files from one place; `key` names their content where that is known without reading
    them, and `keeps_owner` says that owners are those of the place."""

    tree: Tree
    sources: list[Source]
    keeps_owner: bool = False
    spread: bool = False
    parents_of: str = ""


class CopyStep:
    """One COPY or ADD, its variables put in; a context manager over what it fetched."""

    def __init__(self, build: Build, state: StageState, copy: model.Copy) -> None:
        self._build = build
        self._state = state
        self._copy = copy
        self._held = ExitStack()
        self._origins: list[_Origin] = []
        self._chmod = parse_mode(copy.chmod) if copy.chmod else None
        self._owner: tuple[int, int] | None = None
        self._leave = [compile_pattern(clean(text), "--exclude") for text in copy.exclude]

    def __enter__(self) -> CopyStep:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    # ---- keys -------------------------------------------------------------------------

    def quick_key(self) -> str:
        """Return a key that needs no look at the files, "" where there is none: that of a copy
        from a stage, which is known by its chainID."""
        copy = self._copy
        if not copy.source:
            return ""
        chain = self._build.stage_files(copy.source).chain_id
        return step_key("copy-from", self._parent(), [*self._settings(), ("from", chain)])

    def key(self) -> str:
        """Look at the files and return the key made of their content."""
        self._gather()
        parts = self._settings()
        for number, origin in enumerate(self._origins):
            for chosen in self._chosen(origin):
                name = f"{number}:{os.fsdecode(chosen.name)}"
                content = "directory" if chosen.plain else origin.tree.digest(chosen.item)
                parts.append((name, content))
        return step_key("copy", self._parent(), parts)

    def _parent(self) -> str:
        return "" if self._copy.link else self._state.chain_id

    def _settings(self) -> list[tuple[str, str]]:
        copy = self._copy
        epoch = self._build.options.epoch_s
        return [
            ("sources", "\0".join(copy.sources)),
            ("destination", self._destination()),
            ("chown", self._owner_in_key()),
            ("chmod", copy.chmod),
            ("exclude", "\0".join(copy.exclude)),
            ("flags", f"{copy.add} {copy.link} {copy.parents} {copy.unpack} {copy.keep_git_dir}"),
            ("epoch", "" if epoch is None else str(int(epoch))),
        ]

    def _owner_in_key(self) -> str:
        """Return --chown as the key has it. A layer of --link may go upon any image, and each
        has numbers of its own for a name."""
        if not (self._copy.link and self._copy.chown):
            return self._copy.chown
        return str(self._chown(self._state))

    def _destination(self) -> str:
        """Return the destination as an absolute path; its last slash stays."""
        written = self._copy.destination
        joined = posixpath.join(self._state.workdir, written)
        path = "/" + clean(joined)
        directory = written.endswith(("/", "/.", "/..")) or written in (".", "..")
        return f"{path}/" if directory and path != "/" else path

    # ---- sources ----------------------------------------------------------------------

    def _gather(self) -> None:
        if self._origins:
            return
        copy = self._copy
        if copy.source:
            files = self._build.stage_files(copy.source)
            merged = self._held.enter_context(Merged(files.lower))
            for text in copy.sources:
                self._local(Tree(merged), text, keeps_owner=True)
        else:
            for text in copy.sources:
                if copy.add and is_remote(text):
                    self._fetched(text)
                else:
                    self._local(self._build.source.tree, text, keeps_owner=False)
        if copy.heredocs:
            self._documents()
        if not any(origin.sources for origin in self._origins):
            raise SourceError("no source files were named")

    def _local(self, tree: Tree, text: str, *, keeps_owner: bool) -> None:
        pivot, rest = "", text
        if self._copy.parents:
            before, dot, after = text.rpartition("/./")
            pivot, rest = (before, after) if dot else ("", text)
        try:
            found = tree.find(f"{pivot}/{rest}" if pivot else rest)
        except NotFound:
            if self._copy.add:
                refuse_scheme(text)
            raise
        archives = self._copy.add and self._copy.unpack is not False
        plain: list[Source] = []
        for source in found:
            if archives and stat.S_ISREG(source.found.status.st_mode):
                unpacked = unpack_archive(
                    self._build, tree, source, self._held, must=bool(self._copy.unpack)
                )
                if unpacked is not None:
                    self._origins.append(
                        _Origin(tree=unpacked, sources=unpacked.find("."), keeps_owner=True)
                    )
                    continue
            plain.append(source)
        if plain:
            self._origins.append(
                _Origin(
                    tree=tree,
                    sources=plain,
                    keeps_owner=keeps_owner,
                    spread=len(plain) > 1 or has_wildcard(text),
                    parents_of=pivot,
                )
            )

    def _fetched(self, text: str) -> None:
        from hutch.engine.builder.fetching import fetch_source

        tree, is_tree = fetch_source(self._build, text, self._copy, self._held)
        if is_tree:
            self._origins.append(_Origin(tree=tree, sources=tree.find(".")))
            return
        self._origins.append(_Origin(tree=tree, sources=tree.top()))

    def _documents(self) -> None:
        directory = self._held.enter_context(self._build.scratch("documents"))
        for document in self._copy.heredocs:
            if "/" in document.name or document.name in (".", ".."):
                raise SourceError(f"heredoc {document.name!r}: the name of a file has no slash")
            path = f"{directory}/{document.name}"
            with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.write(document.content)
            os.chmod(path, 0o644)
            epoch = self._build.options.epoch_s
            os.utime(path, (epoch or 0, epoch or 0))
        merged = self._held.enter_context(Merged([directory]))
        tree = Tree(merged)
        self._origins.append(_Origin(tree=tree, sources=tree.top()))

    # ---- where they go ----------------------------------------------------------------

    def _chosen(self, origin: _Origin, destination: bytes | None = None) -> Iterator[Chosen]:
        """Yield the files with the paths they get, relative to the destination without one."""
        for source in origin.sources:
            directory = stat.S_ISDIR(source.found.status.st_mode)
            base = self._base_of(origin, source, destination, directory)
            if self._copy.parents:
                yield from self._ancestors(origin, source, destination)
            for item in origin.tree.items(source, self._leaves if self._leave else None):
                if item.relative:
                    name = base + b"/" + item.relative if base else item.relative
                else:
                    name = base
                if not item.relative and not directory and self._leaves(source.name):
                    continue
                # Where the content of a directory goes is made, and has nothing of the source.
                plain = directory and not item.relative and not self._copy.parents
                yield Chosen(name=name, item=item, tree=origin.tree, plain=plain)

    def _base_of(
        self, origin: _Origin, source: Source, destination: bytes | None, directory: bool
    ) -> bytes:
        prefix = destination or b""
        if self._copy.parents:
            return _join(prefix, self._below_pivot(origin, source))
        if directory:
            return prefix
        if destination is None or self._into_directory:
            return _join(prefix, source.name)
        return prefix

    def _below_pivot(self, origin: _Origin, source: Source) -> bytes:
        pivot = os.fsencode(clean(origin.parents_of))
        if pivot and source.path.startswith(pivot + b"/"):
            return source.path[len(pivot) + 1 :]
        return source.path if source.path != pivot else b""

    def _ancestors(
        self, origin: _Origin, source: Source, destination: bytes | None
    ) -> Iterator[Chosen]:
        """Yield the directories above a source that --parents keeps, as they are there."""
        below = self._below_pivot(origin, source)
        above = source.path[: len(source.path) - len(below)]
        at = below.find(b"/")
        while at >= 0:
            where, found = origin.tree.merged.resolve(above + below[:at])
            yield Chosen(
                name=_join(destination or b"", below[:at]),
                item=Item(where, found, b""),
                tree=origin.tree,
            )
            at = below.find(b"/", at + 1)

    def _leaves(self, relative: bytes) -> bool:
        path = os.fsdecode(relative)
        return any(rule.fullmatch(path) for rule in self._leave)

    # ---- the layer --------------------------------------------------------------------

    def make(self) -> LayerRecord:
        """Write the layer; raise `InvalidArgument` or `SourceError` for what cannot be copied."""
        self._gather()
        state = self._state
        with Merged(self._build.context.layers.lower(state.chain_ids)) as base:
            placing = Placing(None if self._copy.link else base)
            self._owner = self._chown(state)
            written = self._destination()
            target = placing.destination(written)
            self._into_directory = self._is_directory(written, target, placing)
            before = placing.what(target)
            if self._into_directory and before is not None and not placing.is_directory(target):
                raise SourceError(f"{written}: is not a directory in the image")
            chosen = (one for origin in self._origins for one in self._numbered(origin, target))
            return commit_tar(
                self._build.context,
                pack_chosen(chosen, placing, self._adjust, self._made()),
                state.chain_ids,
                self._build.lease,
            )

    def _numbered(self, origin: _Origin, target: bytes) -> Iterator[Chosen]:
        self._keeps_owner = origin.keeps_owner
        yield from self._chosen(origin, target)

    _into_directory = True
    _keeps_owner = False

    def _is_directory(self, written: str, target: bytes, placing: Placing) -> bool:
        count = sum(len(origin.sources) for origin in self._origins)
        named = written.endswith("/") or placing.is_directory(target) or self._copy.parents
        several = count > 1 or any(origin.spread for origin in self._origins)
        if several and count > 1 and not named:
            raise SourceError(
                f"several files need a directory to go to: {written} must end with '/'"
            )
        if any(
            stat.S_ISDIR(source.found.status.st_mode)
            for origin in self._origins
            for source in origin.sources
        ):
            return True
        return named

    def _made(self) -> Attributes:
        uid, gid = self._owner or (0, 0)
        return Attributes(0o755, uid, gid, int(self._build.now_s))

    def _adjust(self, item: Item, found: Attributes) -> Attributes:
        if self._owner is not None:
            found = found._replace(uid=self._owner[0], gid=self._owner[1])
        elif not self._keeps_owner:
            found = found._replace(uid=0, gid=0)
        status = item.found.status
        if self._chmod is not None and not stat.S_ISLNK(status.st_mode):
            found = found._replace(mode=self._chmod(found.mode, stat.S_ISDIR(status.st_mode)))
        epoch = self._build.options.epoch_s
        if epoch is not None and found.mtime > epoch:
            found = found._replace(mtime=int(epoch))
        return found

    def _chown(self, state: StageState) -> tuple[int, int] | None:
        """Return the owner that --chown names, looked up in the image."""
        text = self._copy.chown
        if not text:
            return None
        return owner_of(self._build, state, text, f"--chown={text[:60]}")


def owner_of(build: Build, state: StageState, user: str, what: str) -> tuple[int, int]:
    """Return the numbers of a user (`name[:group]`), looked up in the image so far; a number
    without a group is that of its group too."""
    from hutch.drivers.users import LayeredReader, resolve_user

    name, _, group = user.partition(":")
    name = name or "0"
    if not group and name.isascii() and name.isdigit():
        group = name
    reader = LayeredReader(build.context.layers.lower(state.chain_ids))
    try:
        found = resolve_user(f"{name}:{group}" if group else name, (), reader)
    except HutchError as error:
        raise SourceError(f"{what}: {error.message}", hint=error.hint) from None
    return found.uid, found.gid


def _join(prefix: bytes, name: bytes) -> bytes:
    if not prefix or not name:
        return prefix or name
    return prefix + b"/" + name
