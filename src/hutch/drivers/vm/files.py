"""The files of a running machine's program, through the guest's helper for files.

Paths are resolved by the guest beneath the program's root. What comes from there is not
trusted: sizes are bounded, and a listing's names are checked (`hutch.plan.guest`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING

from hutch.errors import (
    Denied,
    Exhausted,
    HutchError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    OutcomeUnknown,
)
from hutch.plan import guest as protocol
from hutch.plan import guest_answers as answers
from hutch.process.guest import Channel, Guest
from hutch.storage.tree import Stat

if TYPE_CHECKING:
    from hutch.storage.compression import Readable

__all__ = ["GuestTree"]

_HEAD_S = 60.0
_HEAD_MAX = 80 << 10
_LISTING_MAX = 256 << 20


class GuestTree:
    """See `hutch.drivers.base.Tree`."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def stat(self, path: str, *, follow: bool) -> Stat:
        """Return what a path is."""
        body = self._ask(protocol.StatFile(path=path, follow=follow), path)
        return _stat(answers.decode_stat(body))

    def list(self, path: str) -> Sequence[Stat]:
        """Return what a directory holds, by name."""
        found = answers.decode_listing(self._ask(protocol.ListFiles(path=path), path))
        return sorted((_stat(entry) for entry in found), key=lambda entry: entry.name)

    def read(self, path: str, *, limit: int | None) -> bytes:
        """Return a file's content; more than `limit` bytes are refused."""
        asked = 0 if limit is None else limit + 1
        parts: list[bytes] = []
        size = 0
        with self._stream(protocol.ReadFile(path=path, limit=asked), path) as chunks:
            for chunk in chunks:
                parts.append(chunk)
                size += len(chunk)
                if limit is not None and size > limit:
                    raise Exhausted(
                        f"{path}: larger than {limit} bytes", hint="raise limit=, or copy it out"
                    )
        return b"".join(parts)

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
        uid, gid = owner or (protocol.KEEP, protocol.KEEP)
        request = protocol.WriteContent(
            path=path,
            mode=protocol.KEEP if mode is None else mode,
            uid=uid,
            gid=gid,
            flags=append | parents << 1,
        )
        self._feed(request, path, iter([data]) if isinstance(data, bytes) else data)

    def mkdir(self, path: str, *, mode: int, owner: tuple[int, int] | None) -> None:
        """Make a directory with its parents."""
        uid, gid = owner or (protocol.KEEP, protocol.KEEP)
        self._ask(protocol.MakeDirectory(path=path, mode=mode, uid=uid, gid=gid), path)

    def remove(self, path: str, *, recursive: bool) -> None:
        """Remove what is at a path."""
        self._ask(protocol.RemoveFile(path=path, recursive=recursive), path)

    def pack(
        self, path: str, *, follow: bool, name: str | None, contents_only: bool
    ) -> Iterator[bytes]:
        """Yield a file or a tree as a tar."""
        own = path.rstrip("/").rpartition("/")[2]
        request = protocol.PackFiles(
            path=path, flags=follow | contents_only << 1, name=own if name is None else name
        )
        with self._stream(request, path) as chunks:
            yield from chunks

    def pack_upper(self) -> Iterator[bytes]:
        """Yield what the program has changed, as a layer of an image."""
        with self._stream(protocol.PackUpper(), "the writable layer") as chunks:
            yield from chunks

    def extract(self, path: str, stream: Readable, *, owner: tuple[int, int] | None) -> int:
        """Unpack a tar, compressed or not, into a directory; return the number of entries."""
        from hutch.storage.compression import decompress

        uid, gid = owner or (protocol.KEEP, protocol.KEEP)
        request = protocol.UnpackFiles(path=path, uid=uid, gid=gid)
        return answers.decode_count(self._feed(request, path, decompress(stream)))

    # ---- the channel --------------------------------------------------------------------

    def _ask(self, request: protocol.Files, path: str) -> bytes:
        """Return the whole answer to a request that has no stream."""
        with self._stream(request, path) as chunks:
            parts, size = [], 0
            for chunk in chunks:
                parts.append(chunk)
                size += len(chunk)
                if size > _LISTING_MAX:
                    raise IntegrityError(f"the guest's answer about {path} does not end")
        return b"".join(parts)

    @contextmanager
    def _stream(self, request: protocol.Files, path: str) -> Iterator[Iterator[bytes]]:
        """Send a request without a stream; yield the chunks of the answer."""
        with self._guest.files() as channel:
            channel.send(protocol.encode_files(request))
            channel.end()
            yield _answer(channel, path)

    def _feed(self, request: protocol.Files, path: str, chunks: Iterator[bytes]) -> bytes:
        """Send a request with its stream and return the answer.

        The answer is read meanwhile: a helper that fails early says why, and leaves the
        rest of the stream unread.
        """
        with self._guest.files() as channel:
            channel.send(protocol.encode_files(request))
            failures: list[BaseException] = []

            def send() -> None:
                try:
                    for chunk in chunks:
                        if not channel.send(chunk):
                            return
                    channel.end()
                except BaseException as exc:  # raised in the caller's thread, below
                    failures.append(exc)
                    channel.close()

            sender = Thread(target=send, daemon=True)
            sender.start()
            try:
                answer = b"".join(_answer(channel, path))
            except BaseException:
                sender.join()
                if failures:
                    raise failures[0] from None
                raise
            sender.join()
            return answer


def _answer(channel: Channel, path: str) -> Iterator[bytes]:
    """Yield what follows the head of an answer; raise what the head says."""
    data = b""
    deadline = time.monotonic() + _HEAD_S
    head = None
    while head is None:
        piece = channel.receive(deadline=deadline)
        if not piece or len(data) > _HEAD_MAX:
            raise OutcomeUnknown(f"{path}: the machine ended, or its helper for files did")
        data += piece
        head = answers.decode_files_head(data)
    if head.errno:
        raise _failure(head.errno, head.detail or path)
    if len(data) > head.size:
        yield data[head.size :]
    while piece := channel.receive():
        yield piece


def _failure(number: int, subject: str) -> HutchError:
    reason = os.strerror(number).lower()
    match number:
        case errno.ENOENT:
            return NotFound(f"{subject}: no such file or directory")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Denied(f"{subject}: {reason}")
        case errno.ENOSPC | errno.EDQUOT:
            return Exhausted(f"{subject}: {reason}", hint="start it with a larger --disk")
    return InvalidArgument(f"{subject}: {reason}")


def _stat(found: answers.FileStat) -> Stat:
    return Stat(
        name=found.name,
        mode=found.mode,
        size=found.size,
        mtime_ns=found.mtime_ns,
        uid=found.uid,
        gid=found.gid,
        link_target=found.target,
    )
