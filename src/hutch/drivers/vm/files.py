"""The files of a running machine's program, through the guest's helper for files.

Paths are resolved by the guest beneath the program's root. What comes from there is not
trusted: sizes are bounded, and a listing's names are checked (`hutch.plan.guest`).
"""

from __future__ import annotations

import errno
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
    OperationTimeout,
    OutcomeUnknown,
)
from hutch.plan import guest as protocol
from hutch.plan import guest_answers as answers
from hutch.process.errors import reason
from hutch.process.guest import SILENCE_S, Channel, Guest
from hutch.storage.tree import Stat

if TYPE_CHECKING:
    from hutch.storage.compression import Readable

__all__ = ["GuestTree"]

_PIECE = 64 << 10
_ASK_S = 300.0
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
        deadline = time.monotonic() + _ASK_S
        with self._stream(request, path) as chunks:
            parts, size = [], 0
            for chunk in chunks:
                parts.append(chunk)
                size += len(chunk)
                if size > _LISTING_MAX or time.monotonic() > deadline:
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
            sender = _Sender(channel, chunks)
            sender.start()
            try:
                answer = b"".join(_answer(channel, path, sender))
            except BaseException:
                channel.abort()  # it may still wait for the guest to read
                sender.join()
                if sender.failure is not None:
                    raise sender.failure from None
                raise
            channel.abort()
            sender.join()
            return answer


class _Sender(Thread):
    """Sends a stream while its answer is waited for. `sent` grows as the guest reads; `waits`
    says that there is nothing to send yet."""

    def __init__(self, channel: Channel, chunks: Iterator[bytes]) -> None:
        super().__init__(name="hutch-files", daemon=True)
        self._channel = channel
        self._chunks = chunks
        self.sent = 0
        self.waits = True
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while True:
                self.waits = True
                chunk = next(self._chunks, None)
                self.waits = False
                if chunk is None:
                    break
                for at in range(0, len(chunk), _PIECE):
                    if not self._channel.send(memoryview(chunk)[at : at + _PIECE]):
                        return
                    self.sent += 1
            self._channel.end()
        except BaseException as exc:  # raised in the caller's thread
            self.failure = exc
            self._channel.abort()


def _head(channel: Channel, path: str, sender: _Sender | None) -> tuple[answers.FilesHead, bytes]:
    """Return the head of an answer, and what came with it. The guest may take as long as
    it reads what is sent; then its answer is due."""
    data = b""
    seen = -1
    deadline = time.monotonic() + SILENCE_S
    while True:
        try:
            piece = channel.receive(deadline=deadline)
        except OperationTimeout:
            if sender is None or not (sender.waits or sender.sent != seen):
                raise
            seen = sender.sent
            deadline = time.monotonic() + SILENCE_S
            continue
        if not piece or len(data) > _HEAD_MAX:
            raise OutcomeUnknown(f"{path}: the machine ended, or its helper for files did")
        data += piece
        head = answers.decode_files_head(data)
        if head is not None:
            return head, data


def _answer(channel: Channel, path: str, sender: _Sender | None = None) -> Iterator[bytes]:
    """Yield what follows the head of an answer; raise what the head says."""
    head, data = _head(channel, path, sender)
    if head.errno:
        raise _failure(head.errno, head.detail or path)
    if len(data) > head.size:
        yield data[head.size :]
    while piece := channel.receive():
        yield piece


def _failure(number: int, subject: str) -> HutchError:
    said = reason(number)
    match number:
        case errno.ENOENT:
            return NotFound(f"{subject}: no such file or directory")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Denied(f"{subject}: {said}")
        case errno.ENOSPC | errno.EDQUOT:
            return Exhausted(f"{subject}: {said}", hint="start it with a larger --disk")
    return InvalidArgument(f"{subject}: {said}")


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
