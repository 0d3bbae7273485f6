"""A hijacked connection that speaks WebSocket: messages in, binary messages out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    Request,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from hutch.api.docker.errors import ApiError
from hutch.api.docker.http import Gone, Hijacked

if TYPE_CHECKING:
    from hutch.api.docker.requests import Request as ApiRequest

__all__ = ["WebSocket", "accept"]

_MAX_MESSAGE = 1 << 20


class WebSocket:
    """The client's end of a stream, over WebSocket."""

    def __init__(self, stream: Hijacked, protocol: WSConnection, head: bytes) -> None:
        self._head = head
        self._stream = stream
        self._protocol = protocol
        self._gone = asyncio.Event()
        self._waiting: list[bytes] = []

    async def send_head(self) -> None:
        """Tell the client that it is connected."""
        await self._stream.write(self._head)

    async def read(self) -> bytes:
        """Return what the client sent, b"" when it sends no more."""
        while not self._waiting:
            if self._gone.is_set():
                return b""
            data = await self._stream.read()
            try:
                self._protocol.receive_data(data or None)
                for event in self._protocol.events():
                    await self._take(event)
            except (RemoteProtocolError, Gone):
                self._gone.set()
            if not data:
                self._gone.set()
        return self._waiting.pop(0)

    async def _take(self, event: object) -> None:
        match event:
            case Message():
                data = event.data
                if len(data) > _MAX_MESSAGE:
                    raise Gone
                self._waiting.append(data.encode() if isinstance(data, str) else bytes(data))
            case Ping():
                await self._stream.write(self._protocol.send(event.response()))
            case CloseConnection():
                await self._stream.write(self._protocol.send(event.response()))
                self._gone.set()

    async def write(self, data: bytes) -> None:
        """Send a binary message, as Docker does."""
        try:
            await self._stream.write(self._protocol.send(BytesMessage(data=data)))
        except LocalProtocolError as exc:
            raise Gone from exc

    async def wait_gone(self) -> None:
        """Return when the client has closed."""
        waits = {
            asyncio.ensure_future(self._gone.wait()),
            asyncio.ensure_future(self._stream.wait_gone()),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def close(self) -> None:
        """Say that nothing more comes."""
        try:
            await self._stream.write(self._protocol.send(CloseConnection(code=1000)))
        except (LocalProtocolError, Gone):
            pass


async def accept(request: ApiRequest) -> WebSocket:
    """Take the connection over for WebSocket; raise `ApiError` where none is asked for."""
    if request.headers.get("upgrade", "").lower() != "websocket":
        raise ApiError(400, "this endpoint speaks WebSocket only")
    await request.read()
    protocol = WSConnection(ConnectionType.SERVER)
    headers = [(name.encode(), value.encode("latin-1")) for name, value in request.headers.items()]
    try:
        protocol.initiate_upgrade_connection(headers, request.path)
        (event,) = protocol.events()
    except (RemoteProtocolError, ValueError) as exc:
        raise ApiError(400, f"bad handshake: {exc}") from exc
    assert isinstance(event, Request)
    stream = await request.connection.take_raw()
    return WebSocket(stream, protocol, protocol.send(AcceptConnection()))
