"""The context of a build: a directory, a tar, a URL, a repository; and the Dockerfile."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from hutch.decoding import decode_json
from hutch.dockerfile.ignore import Ignore, read_ignore
from hutch.dockerfile.keys import content_key
from hutch.dockerfile.lines import MAX_BYTES
from hutch.engine.builder.archives import looks_like_tar, unpack_file
from hutch.engine.builder.remotes import parse_git, refuse_scheme
from hutch.engine.builder.tree import Digests, Tree, clean
from hutch.errors import HutchError, InvalidArgument, NotFound
from hutch.image.assemble import open_archive
from hutch.storage.overlay import Merged
from hutch.storage.streams import Rewound

if TYPE_CHECKING:
    from hutch.engine.builder.build import Build

__all__ = ["BuildSource", "Context", "open_source", "read_dockerfile"]

_NAMES = ("Dockerfile", "Containerfile", "dockerfile")
_IGNORES = (".dockerignore", ".containerignore")
_MAX_IGNORE = 1 << 20
_MAX_STDIN = MAX_BYTES

Context = str | os.PathLike[str] | bytes | BinaryIO


class BuildSource:
    """A context that is at hand: a directory of which some files may be left out."""

    def __init__(self, directory: str, merged: Merged, ignore: Ignore, digests: Digests) -> None:
        self.directory = directory
        self.is_filtered = bool(ignore)
        self.digests = digests
        self.tree = Tree(
            merged,
            ignores=ignore.ignores if ignore else None,
            enter=ignore.may_keep_beneath if ignore else None,
            digests=digests,
        )

    def digest(self, path: str) -> str:
        """Return a digest over everything beneath a path."""
        parts: dict[str, str] = {}
        for source in self.tree.find(path or "."):
            for item in self.tree.items(source):
                parts[os.fsdecode(item.path)] = self.tree.digest(item)
        return content_key(parts)


@contextmanager
def open_source(
    build: Build, context: Context, *, dockerfile: str | None, data: bytes | None
) -> Iterator[tuple[BuildSource, str, bytes]]:
    """Yield the context, and the Dockerfile's name and content.

    `dockerfile` names it: for a directory of this host from here or else from the context,
    for others in the context. `data` is its content, given apart. What was fetched or
    unpacked is gone afterwards.
    """
    with ExitStack() as held:
        directory, text = _at_hand(build, context, held)
        merged = held.enter_context(Merged([directory]))
        plain = Tree(merged)
        is_local = text is None and _is_local(context)
        if data is not None:
            name, content = dockerfile or "Dockerfile", data
        elif text is not None:
            name, content = "Dockerfile", text
        else:
            name, content = _dockerfile(plain, dockerfile, directory if is_local else "")
        ignore = _ignore(plain, name, directory if is_local else "")
        kept = _digests_path(build, directory) if is_local else ""
        source = BuildSource(directory, merged, ignore, _load_digests(kept))
        yield source, name, content
        if kept:
            _keep_digests(kept, source.digests)


def _is_local(context: Context) -> bool:
    return isinstance(context, str | os.PathLike) and os.path.isdir(os.fspath(context))


def _at_hand(build: Build, context: Context, held: ExitStack) -> tuple[str, bytes | None]:
    """Return the directory of a context; or an empty one and a Dockerfile, where that is all."""
    if isinstance(context, bytes | bytearray):
        import io

        context = io.BytesIO(context)
    if isinstance(context, str | os.PathLike):
        path = os.fspath(context)
        if path.startswith(("http://", "https://")) or parse_git(path) is not None:
            return _remote(build, path, held)
        if not os.path.exists(path):
            refuse_scheme(path, "context")
        try:
            status = os.stat(path)
        except OSError as error:
            raise NotFound(
                f"context {path}: {(error.strerror or '').lower()}",
                hint="name a directory, a tar archive, a URL, or - for stdin",
            ) from None
        if stat.S_ISDIR(status.st_mode):
            return os.path.abspath(path), None
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument(f"{path}: is no directory and no archive", field="context")
        context = held.enter_context(open_archive(path))
    return _stream(build, context, held)


def _remote(build: Build, url: str, held: ExitStack) -> tuple[str, bytes | None]:
    from hutch.engine.builder.fetching import download, fetch_git, inside

    directory = held.enter_context(build.scratch("context"))
    git = parse_git(url)
    if git is not None:
        fetch_git(build, git, directory, keep_git_dir=build.keep_git_dir)
        return inside(directory, git.directory), None
    name = download(build.check, url, directory)
    file = held.enter_context(open_archive(f"{directory}/{name}"))
    return _stream(build, file, held)


def _stream(build: Build, stream: BinaryIO, held: ExitStack) -> tuple[str, bytes | None]:
    """Unpack a context that comes as a tar; a text is a Dockerfile without a context."""
    head = b""
    while len(head) < 512 and (more := stream.read(512 - len(head))):
        head += more
    if not head:
        raise InvalidArgument("is empty", field="context")
    directory = held.enter_context(build.scratch("context"))
    again = Rewound(head, stream)
    if not looks_like_tar(head):
        text = bytearray()
        while data := again.read(1 << 16):
            text += data
            if len(text) > _MAX_STDIN:
                raise InvalidArgument("is neither a tar archive nor a Dockerfile", field="context")
        return directory, bytes(text)
    unpack_file(again, directory, "context")
    return directory, None


# ---- the Dockerfile and what it ignores ---------------------------------------------------


def read_dockerfile(directory: str, given: str | None) -> tuple[str, bytes]:
    """Return the name and content of the Dockerfile of a directory of this host."""
    with Merged([directory]) as merged:
        return _dockerfile(Tree(merged), given, directory)


def _dockerfile(tree: Tree, given: str | None, directory: str) -> tuple[str, bytes]:
    if given:
        if directory and os.path.isfile(given):
            with open(given, "rb") as file:
                return given, file.read(MAX_BYTES + 1)
        try:
            return given, tree.read(given, limit=MAX_BYTES)
        except NotFound:
            raise NotFound(
                f"Dockerfile {given}: not found",
                hint="--file counts from here, or from the top of the context",
            ) from None
    for name in _NAMES:
        try:
            return name, tree.read(name, limit=MAX_BYTES)
        except NotFound:
            continue
    raise NotFound(
        "no Dockerfile in the context", hint="name it with --file, or build in its directory"
    )


def _ignore(tree: Tree, dockerfile: str, directory: str) -> Ignore:
    """Return the patterns beside the Dockerfile, or else those of the context."""
    if directory and os.path.isfile(dockerfile):
        try:
            with open(f"{dockerfile}.dockerignore", "rb") as file:
                return read_ignore(file.read(_MAX_IGNORE), f"{dockerfile}.dockerignore")
        except OSError:
            pass
    for name in (f"{clean(dockerfile)}.dockerignore", *_IGNORES):
        try:
            return read_ignore(tree.read(name, limit=_MAX_IGNORE), name)
        except NotFound:
            continue
    return Ignore([])


# ---- digests kept between builds ----------------------------------------------------------


def _digests_path(build: Build, directory: str) -> str:
    name = sha256(os.fsencode(directory)).hexdigest()[:32]
    return f"{build.context.root}/cache/build-context-{name}"


def _load_digests(path: str) -> Digests:
    if not path:
        return Digests()
    try:
        with open(path, "rb") as file:
            return Digests(decode_json(file.read(64 << 20), dict[str, str]))
    except (OSError, msgspec.DecodeError):
        return Digests()


def _keep_digests(path: str, digests: Digests) -> None:
    if not digests.seen or not digests.is_changed:
        return
    part = f"{path}.{os.urandom(6).hex()}"
    try:
        with open(part, "wb") as file:
            file.write(msgspec.json.encode(digests.seen))
        os.replace(part, path)
    except (OSError, HutchError):
        try:
            os.unlink(part)
        except OSError:
            pass
