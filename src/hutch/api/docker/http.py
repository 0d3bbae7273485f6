"""One client's HTTP/1.1 connection: h11 over asyncio streams, until somebody takes it over."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

import h11

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

__all__ = ["Connection", "Gone", "Headers", "Hijacked"]

Headers = Sequence[tuple[str, str]]

_READ = 256 << 10
_MAX_HEAD = 64 << 10
_LOOK_S = 5.0


def _has_body(request: h11.Request) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in request.headers
    )


def _response(status: int, headers: Headers) -> h11.Response:
    encoded = [(name.encode(), value.encode("utf-8", "replace")) for name, value in headers]
    return h11.Response(
        status_code=status, headers=encoded, reason=HTTPStatus(status).phrase.encode()
    )


class Gone(Exception):
    """The client has left, or does not speak HTTP any more."""


class Hijacked:
    """A connection that is a plain stream now. Closing one direction leaves the other."""

    def __init__(
        self, reader: StreamReader, writer: StreamWriter, early: bytes, head: bytes = b""
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._early = early
        self._head = head

    async def send_head(self) -> None:
        """Tell the client that the connection is a stream; the bytes are on their way before
        anything else can happen."""
        head, self._head = self._head, b""
        await self.write(head)

    async def read(self) -> bytes:
        """Return what the client sent, b"" when it sends no more."""
        if self._early:
            early, self._early = self._early, b""
            return early
        try:
            return await self._reader.read(_READ)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        """Send; waits while the client does not read. Raise `Gone` when it has left."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as exc:
            raise Gone from exc

    def write_eof(self) -> None:
        """Tell the client that nothing more comes, and go on listening to it."""
        try:
            if self._writer.can_write_eof():
                self._writer.write_eof()
        except OSError:
            pass  # it has left

    async def wait_gone(self) -> None:
        """Return when the client has closed both directions, not only its own."""
        sock = self._writer.get_extra_info("socket")
        poll = select.poll()
        poll.register(sock.fileno(), 0)  # POLLHUP and POLLERR are always reported
        while not self._writer.is_closing():
            if poll.poll(0):
                return
            await asyncio.sleep(_LOOK_S)


class Connection:
    """Requests in, replies out. One task at a time uses it."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._watcher: asyncio.Task[None] | None = None
        self.hijacked = False
        self.replied = False
        self.gone = False

    # ---- the request ----------------------------------------------------------------------

    async def next_request(self) -> h11.Request | None:
        """Return the next request's head, None when the client has no more."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        self.replied = False
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                await self._receive()
            elif isinstance(event, h11.Request):
                if not _has_body(event):
                    self._http.next_event()  # its end, which is known already
                return event
            elif isinstance(event, h11.ConnectionClosed):
                return None
            else:
                raise Gone

    async def _receive(self) -> None:
        try:
            self._http.receive_data(await self._reader.read(_READ))
        except OSError as exc:
            raise Gone from exc

    async def body(self) -> bytes:
        """Return the next piece of the request's body, b"" at its end."""
        while True:
            if self._http.their_state is not h11.SEND_BODY:
                return b""
            if self._http.they_are_waiting_for_100_continue:
                await self._write(h11.InformationalResponse(status_code=100, headers=[]))
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as exc:
                raise Gone from exc  # it left in the middle, or sends no chunks
            if event is h11.NEED_DATA:
                await self._receive()
            elif isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return b""
            else:
                raise Gone

    @property
    def body_ended(self) -> bool:
        """Whether the whole request has been read."""
        return self._http.their_state is not h11.SEND_BODY

    def watch(self, on_gone: Callable[[], object]) -> None:
        """Call `on_gone` when the client closes its side while a reply is made. What it sends
        ahead is kept, up to a bound."""
        self._watcher = asyncio.ensure_future(self._watch(on_gone))

    async def unwatch(self) -> None:
        """Look no more for the client's end."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait({watcher})

    async def _watch(self, on_gone: Callable[[], object]) -> None:
        while len(self._http.trailing_data[0]) < _READ:
            try:
                data = await self._reader.read(_READ)
            except OSError:
                data = b""
            if not data:
                self.gone = True
                on_gone()
                return
            self._http.receive_data(data)

    # ---- the reply --------------------------------------------------------------------------

    async def _write(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if not data:
            return
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as exc:
            raise Gone from exc

    async def send_head(self, status: int, headers: Headers) -> None:
        """Send status and headers at once, so that a client sees them while it waits."""
        self.replied = True
        await self._write(_response(status, headers))

    async def send_data(self, data: bytes) -> None:
        """Send a piece of the body; waits while the client does not read."""
        await self._write(h11.Data(data=data))

    async def send_end(self) -> None:
        """End the body."""
        await self._write(h11.EndOfMessage())

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a reply in one piece."""
        self.replied = True
        pieces = [self._http.send(_response(status, headers))]
        if body:
            pieces.append(self._http.send(h11.Data(data=body)))
        pieces.append(self._http.send(h11.EndOfMessage()))
        try:
            self._writer.write(b"".join(piece for piece in pieces if piece))
            await self._writer.drain()
        except OSError as exc:
            raise Gone from exc

    @property
    def reusable(self) -> bool:
        """Whether a further request may come on this connection."""
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    # ---- taken over -------------------------------------------------------------------------

    async def hijack(self, *, upgrade: bool, headers: Headers) -> Hijacked:
        """Make the connection a plain stream: by 101 where the client asked to upgrade, else
        as Docker's older clients expect it, by a 200 that has no end. Its head is sent by
        `send_head`."""
        await self.unwatch()
        self.hijacked = self.replied = True
        early = bytes(self._http.trailing_data[0])
        first = b"HTTP/1.1 101 UPGRADED\r\n" if upgrade else b"HTTP/1.1 200 OK\r\n"
        lines = [f"{name}: {value}\r\n".encode() for name, value in headers]
        if upgrade:
            lines += [b"Connection: Upgrade\r\n", b"Upgrade: tcp\r\n"]
        head = first + b"".join(lines) + b"\r\n"
        return Hijacked(self._reader, self._writer, early, head)

    async def take_raw(self) -> Hijacked:
        """Hand the stream over with nothing sent yet, for another protocol's handshake."""
        await self.unwatch()
        self.hijacked = self.replied = True
        return Hijacked(self._reader, self._writer, bytes(self._http.trailing_data[0]))

    async def close(self) -> None:
        """Close; what was sent and not yet taken is still delivered."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass
