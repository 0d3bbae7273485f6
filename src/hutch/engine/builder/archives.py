"""Archives: told from other files by their first bytes, unpacked into scratch."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hutch.engine.builder.tree import Source, Tree
from hutch.errors import IntegrityError
from hutch.storage.overlay import Merged

if TYPE_CHECKING:
    from hutch.engine.builder.build import Build
    from hutch.storage.compression import Readable

__all__ = ["looks_like_tar", "unpack_archive", "unpack_file"]


def unpack_archive(
    build: Build, tree: Tree, source: Source, held: ExitStack, *, must: bool
) -> Tree | None:
    """Unpack a local archive of ADD into scratch; None where the file is none."""
    parent, _, base = source.path.rpartition(b"/")
    directory = tree.merged.open(source.found.layer, parent)
    try:
        fd = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                     dir_fd=directory)  # fmt: skip
    finally:
        os.close(directory)
    with open(fd, "rb", buffering=0) as file:
        if not must and not _is_tar(file):
            return None
        file.seek(0)
        target = held.enter_context(build.scratch("unpacked"))
        unpack_file(file, target, os.fsdecode(source.path))
    return Tree(held.enter_context(Merged([target])))


def unpack_file(file: Readable, target: str, what: str) -> None:
    """Extract an archive into a directory, and nowhere else."""
    from hutch.storage import tree as storage_tree

    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        storage_tree.extract(fd, "/", file)
    except IntegrityError as error:
        raise IntegrityError(f"{what}: {error.message}", hint=error.hint) from error
    finally:
        os.close(fd)


def looks_like_tar(head: bytes) -> bool:
    """Tell whether a stream that begins like this is compressed, or a tar."""
    from hutch.storage.compression import detect

    return detect(head) != "none" or (len(head) >= 512 and _is_header(head[:512]))


def _is_tar(file: Readable) -> bool:
    """Tell whether a file begins as a tar does, compressed or not."""
    from hutch.storage.compression import decompress

    chunks = decompress(file)
    head = b""
    try:
        while len(head) < 512:
            head += next(chunks)
    except (StopIteration, IntegrityError):
        return False
    return _is_header(head[:512])


def _is_header(block: bytes) -> bool:
    try:
        stated = int(block[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False
    return stated == sum(block[:148]) + 8 * 0x20 + sum(block[156:])
