"""Frames on a migration's link: messages, and byte streams in turn with them.

A frame is u8 kind, three zero bytes, u32 length (little endian), payload. Each side begins
with the eight bytes `HUTCHMG1`, so that whatever else answers is told from a hutch.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec

from hutch.decoding import decode_json
from hutch.errors import HutchError, IntegrityError, OperationTimeout, Unavailable
from hutch.migration.messages import ERRORS, Failed, Message
from hutch.migration.pace import Pace

__all__ = ["DATA_LIMIT", "MESSAGE_LIMIT", "VERSION", "Ended", "Wire"]

VERSION = 3
MESSAGE_LIMIT = 8 << 20
DATA_LIMIT = 256 << 10
_MAGIC = b"HUTCHMG1"
_HEAD = struct.Struct("<B3sI")
_MESSAGE, _DATA, _END = 1, 2, 3
_ZERO = b"\0\0\0"

M = TypeVar("M", bound=Message)


class Ended(Unavailable):
    """The other side has closed the link between two frames."""


class Wire:
    """One side of a link; `peer` names the other in messages, `bandwidth` (bytes a second)
    bounds what is sent. Descriptors are the caller's. `timeout_s` bounds every wait for the
    other side's next bytes, in either direction."""

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        peer: str,
        timeout_s: float,
        bandwidth: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._peer = peer
        self.timeout_s = timeout_s
        self._pace = Pace(bandwidth, clock=clock, sleep=sleep)
        os.set_blocking(write_fd, False)

    # ---- sending --------------------------------------------------------------------------

    def greet(self) -> None:
        """Say that this is a hutch."""
        self._write(_MAGIC)

    def send(self, message: Message) -> None:
        """Send a message."""
        payload = msgspec.json.encode(message)
        if len(payload) > MESSAGE_LIMIT:
            raise IntegrityError(f"a message of {len(payload)} bytes is more than may be sent")
        self._write(_HEAD.pack(_MESSAGE, _ZERO, len(payload)) + payload)

    def send_stream(self, pieces: Iterable[bytes | memoryview]) -> int:
        """Send a byte stream with its end; return its length."""
        total = 0
        for piece in pieces:
            view = memoryview(piece)
            for at in range(0, len(view), DATA_LIMIT):
                part = view[at : at + DATA_LIMIT]
                self._pace.wait(len(part))
                self._write(_HEAD.pack(_DATA, _ZERO, len(part)) + part)
                total += len(part)
        self._write(_HEAD.pack(_END, _ZERO, 0))
        return total

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._write_fd, view) :]
            except BlockingIOError:
                self._wait(self._write_fd, select.POLLOUT)
            except OSError as exc:
                raise self._last_word(exc) from exc

    def _last_word(self, exc: OSError) -> HutchError:
        """Return why the other side no longer listens, as it said itself if it did."""
        try:
            while True:
                kind, length = self._head()
                payload = self._take(length)
                if kind == _MESSAGE:
                    message = _decode(payload)
                    if isinstance(message, Failed):
                        return _failure(message, self._peer)
        except (HutchError, msgspec.DecodeError):
            return self._lost(exc.strerror or str(exc))

    # ---- receiving ------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the other side has said something."""
        return self._read_fd

    @property
    def descriptors(self) -> tuple[int, int]:
        """The link's descriptors, to read from and to write to."""
        return self._read_fd, self._write_fd

    def meet(self) -> None:
        """Take the other side's greeting, or raise `Unavailable`."""
        try:
            found = self._take(len(_MAGIC), between=True)
        except Ended:
            raise Unavailable(
                f"{self._peer}: is no hutch, or one that cannot migrate",
                hint="what the command says is above; `hutch --version` must run there",
            ) from None
        if found != _MAGIC:
            raise Unavailable(
                f"{self._peer}: does not speak the migration protocol (it said {found!r})",
                hint="the command must write nothing else to its output",
            )

    def receive(self) -> Message:
        """Return the next message; raise what the other side failed with."""
        kind, length = self._head()
        if kind != _MESSAGE:
            raise self._bad(f"frame of kind {kind} where a message was due")
        payload = self._take(length)
        try:
            message = _decode(payload)
        except msgspec.DecodeError as exc:
            raise self._bad(f"message: {exc}") from exc
        if isinstance(message, Failed):
            raise _failure(message, self._peer)
        return message

    def expect(self, kind: type[M]) -> M:
        """Return the next message, which is one of this kind."""
        message = self.receive()
        if not isinstance(message, kind):
            raise self._bad(f"{type(message).__name__} where {kind.__name__} was due")
        return message

    def stream(self) -> Iterator[bytes]:
        """Yield the pieces of a byte stream up to its end."""
        while True:
            kind, length = self._head()
            if kind == _END and length == 0:
                return
            if kind == _MESSAGE:
                self._failed(length)
            if kind != _DATA or length == 0:
                raise self._bad(f"frame of kind {kind} in a stream")
            yield self._take(length)

    def _failed(self, length: int) -> None:
        """A message within a stream says why the stream is not ended."""
        try:
            message = _decode(self._take(length))
        except msgspec.DecodeError as exc:
            raise self._bad(f"message: {exc}") from exc
        if isinstance(message, Failed):
            raise _failure(message, self._peer)

    def _head(self) -> tuple[int, int]:
        kind, zero, length = _HEAD.unpack(self._take(_HEAD.size, between=True))
        limit = MESSAGE_LIMIT if kind == _MESSAGE else DATA_LIMIT
        if zero != _ZERO or length > limit:
            raise self._bad(f"frame of kind {kind} and {length} bytes")
        return kind, length

    def _take(self, count: int, *, between: bool = False) -> bytes:
        pieces: list[bytes] = []
        while count:
            self._wait(self._read_fd, select.POLLIN)
            try:
                piece = os.read(self._read_fd, min(count, 1 << 20))
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._lost(exc.strerror or str(exc)) from exc
            if not piece:
                if between and not pieces:
                    raise Ended(f"{self._peer}: closed the link")
                raise self._lost("closed the link within a frame")
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _wait(self, fd: int, events: int) -> None:
        poll = select.poll()
        poll.register(fd, events)
        if not poll.poll(self.timeout_s * 1000):
            raise OperationTimeout(f"{self._peer}: nothing came for {self.timeout_s:g} s")

    def _lost(self, reason: str) -> Unavailable:
        return Unavailable(f"{self._peer}: {reason.lower()}")

    def _bad(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self._peer}: broke the migration protocol: {what}")


def _decode(payload: bytes) -> Message:
    message: Message = decode_json(payload, Message.union())
    return message


def _failure(message: Failed, peer: str) -> HutchError:
    kind = ERRORS.get(message.kind, Unavailable)
    return kind(f"{peer}: {message.message}", hint=message.hint or None)
