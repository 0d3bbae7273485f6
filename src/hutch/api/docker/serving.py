"""Serve one client: read a request, find its route, call the handler, send what it returns."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

import h11

from hutch.api.docker.errors import error_body, message_of, status_of
from hutch.api.docker.front import Served
from hutch.api.docker.http import Connection, Gone
from hutch.api.docker.replies import Answer, Reply, Stream, encode
from hutch.api.docker.requests import Query, Request
from hutch.api.docker.routing import NEWEST, Route, Router, parse_version, show
from hutch.errors import HutchError

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from hutch.api.docker.front import Front

__all__ = ["serve_client"]

T = TypeVar("T")

_LOOK_S = 0.25


async def serve_client(
    front: Front, reader: StreamReader, writer: StreamWriter, router: Router | None = None
) -> None:
    """Answer a client's requests until it leaves; all that the API has, or what `router` has."""
    connection = Connection(reader, writer)
    try:
        await _serve(front, connection, router or front.router)
    except Gone:
        pass
    except h11.RemoteProtocolError as exc:
        await _refuse(front, connection, exc)
    finally:
        await connection.close()


async def _refuse(front: Front, connection: Connection, exc: h11.RemoteProtocolError) -> None:
    """Tell a client that what it sent is no HTTP."""
    if connection.replied:
        return
    body = error_body(f"bad request: {exc}")
    head = _headers(front, Reply(), len(body))
    try:
        await connection.send_whole(exc.error_status_hint, head, body)
    except (Gone, h11.LocalProtocolError):
        pass


async def _serve(front: Front, connection: Connection, router: Router) -> None:
    while (head := await connection.next_request()) is not None:
        begun = time.monotonic()
        route, status = await _answer(front, connection, head, router)
        parent = next((value for name, value in head.headers if name == b"traceparent"), b"")
        front.observe(
            Served(
                method=head.method.decode("ascii", "replace"),
                route=route,
                status=status,
                seconds=time.monotonic() - begun,
                traceparent=parent.decode("latin-1"),
            )
        )
        if connection.hijacked:
            return
        if not connection.body_ended:
            # A refused upload: what is left of it is not worth reading, but for a little.
            await _drain(connection)
        if not connection.reusable:
            return


async def _drain(connection: Connection) -> None:
    left = 1 << 20
    while left > 0 and (piece := await connection.body()):
        left -= len(piece)


async def _answer(
    front: Front, connection: Connection, head: h11.Request, router: Router
) -> tuple[Route | None, int]:
    """Answer one request; return its route and the status sent."""
    route: Route | None = None
    method = head.method.decode("ascii", "replace")
    try:
        target, _, query = _origin_form(head.target.decode("ascii", "replace")).partition("?")
        version, path = parse_version(unquote(target), front.options.min_api_version)
        route, params = router.find(method, path, version)
        request = Request(
            front,
            connection,
            method=method,
            path=path,
            query=Query(query),
            version=version,
            headers={
                name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers
            },
            params=params,
        )
        answer = await _handle(front, connection, route, request)
    except Gone:
        raise
    except (HutchError, OSError) as exc:
        answer = _error(front, exc, method)
    except Exception as exc:
        front.log.exception("%s %s", method, head.target.decode("ascii", "replace"))
        answer = Reply(500, error_body(message_of(exc)))
    if answer is None or connection.hijacked:
        return route, 101
    if connection.replied:
        raise Gone  # an error in the middle of a stream: only an early end can tell
    await _send(front, connection, answer, method)
    return route, answer.status


def _origin_form(target: str) -> str:
    """Return a request's target without scheme and host, which a client may write (RFC 9112,
    3.2.2)."""
    scheme, separator, rest = target.partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        return target
    return f"/{rest.partition('/')[2]}"


def _error(front: Front, exc: Exception, method: str) -> Reply:
    status = status_of(exc)
    if status == 304:
        return Reply(status)
    if status >= 500:
        front.log.info("answered with %d: %s", status, exc)
    return Reply(status, error_body(message_of(exc)))


async def _handle(front: Front, connection: Connection, route: Route, request: Request) -> Answer:
    """Run the handler; it is cancelled when the client leaves, once its request is read."""
    task = asyncio.ensure_future(route.handler(request))
    try:
        # Most handlers are done within milliseconds: only for others it is worth looking.
        while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
            if connection.body_ended:
                break
        if not task.done() and not connection.hijacked:
            connection.watch(task.cancel)
        return await _result(connection, task)
    finally:
        await _settle(connection, task)


async def _result(connection: Connection, task: asyncio.Future[T]) -> T:
    try:
        return await task
    except asyncio.CancelledError:
        if connection.gone:
            raise Gone from None
        raise


async def _settle(connection: Connection, task: asyncio.Future[T]) -> None:
    await connection.unwatch()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


def _headers(front: Front, answer: Reply | Stream, length: int | None) -> list[tuple[str, str]]:
    found = [
        ("Api-Version", show(NEWEST)),
        ("Docker-Experimental", "false"),
        ("Ostype", "linux"),
        ("Server", front.server_header),
        ("Date", front.date()),
    ]
    if length is not None:
        found.append(("Content-Length", str(length)))
    if length != 0 or isinstance(answer, Stream):
        found.append(("Content-Type", answer.content_type))
    found += answer.headers.items()
    return found


async def _send(front: Front, connection: Connection, answer: Reply | Stream, method: str) -> None:
    if isinstance(answer, Reply):
        length = None if answer.status in (204, 304) else len(answer.body)
        body = b"" if method == "HEAD" or length is None else answer.body
        head = _headers(front, answer, length)
        if length is None:
            head = [(name, value) for name, value in head if name != "Content-Type"]
        await connection.send_whole(answer.status, head, body)
        return
    await _send_stream(front, connection, answer)


async def _send_stream(front: Front, connection: Connection, answer: Stream) -> None:
    """Send a stream; when the client leaves meanwhile, its source is closed."""
    sending = asyncio.ensure_future(_pump(front, connection, answer))
    connection.watch(sending.cancel)
    try:
        await _result(connection, sending)
    finally:
        await _settle(connection, sending)
        # Also of what was never begun to be read, as the client left before.
        close = getattr(answer.chunks, "aclose", None)
        if close is not None:
            await close()


async def _pump(front: Front, connection: Connection, answer: Stream) -> None:
    await connection.send_head(answer.status, _headers(front, answer, None))
    chunks = answer.chunks
    try:
        async for chunk in chunks:
            if chunk:
                await connection.send_data(chunk)
    except (HutchError, OSError) as exc:
        if not answer.tells_errors:
            front.log.info("a stream was cut short: %s", exc)
            raise Gone from exc
        message = message_of(exc)
        told = {"errorDetail": {"message": message}, "error": message}
        await connection.send_data(encode(told) + b"\r\n")
    await connection.send_end()
