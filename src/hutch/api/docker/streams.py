"""Containers' streams: attach, hijacked or over WebSocket, and the size of the terminal."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from hutch.api.docker.errors import ApiError
from hutch.api.docker.feeds import Client, Feed, parse_keys
from hutch.api.docker.frames import stream_type
from hutch.api.docker.http import Gone
from hutch.api.docker.naming import find_container
from hutch.api.docker.replies import Answer, empty
from hutch.api.docker.routing import Route
from hutch.engine.stop import connect, current
from hutch.errors import HutchError, NotFound, WrongState
from hutch.lifecycle import State

if TYPE_CHECKING:
    from hutch.api.docker.feeds import Pipe
    from hutch.api.docker.front import Front
    from hutch.api.docker.journal import Listener
    from hutch.api.docker.requests import Request
    from hutch.engine import Instance
    from hutch.engine.context import Context
    from hutch.engine.results import InstanceInfo
    from hutch.process.supervisor import Supervisor

__all__ = ["ROUTES", "detach_keys", "size_of"]

_LIVE = (State.RUNNING, State.PAUSED)


def detach_keys(request: Request) -> bytes:
    """Return the keys that leave the streams; the client's own, else ctrl-p ctrl-q."""
    try:
        return parse_keys(request.query.text("detachKeys") or None)
    except ValueError as exc:
        raise ApiError(400, f"invalid detach keys ({exc})") from None


def size_of(request: Request) -> tuple[int, int]:
    """Return rows and columns that the query gives."""
    rows, columns = request.query.integer("h"), request.query.integer("w")
    if not (0 <= rows < 65_536 and 0 <= columns < 65_536):
        raise ApiError(400, f"invalid size: {rows} x {columns}")
    return rows, columns


# ---- attach -------------------------------------------------------------------------------


async def _attach(request: Request) -> Answer:
    instance = await find_container(request)
    info = await request.front.call(instance.info)
    _check_attachable(info)
    keys = detach_keys(request)
    content = stream_type(
        tty=info.spec.process.tty, version=request.version, upgraded=request.upgrade
    )
    pipe = await request.hijack([("Content-Type", content)])
    await _join(request, instance, info, pipe, keys)
    pipe.write_eof()
    return None


async def _attach_websocket(request: Request) -> Answer:
    from hutch.api.docker.websocket import accept

    instance = await find_container(request)
    info = await request.front.call(instance.info)
    _check_attachable(info)
    keys = detach_keys(request)
    pipe = await accept(request)
    try:
        await _join(request, instance, info, pipe, keys, websocket=True)
    finally:
        await pipe.close()
    return None


def _check_attachable(info: InstanceInfo) -> None:
    if info.state == State.PAUSED:
        raise ApiError(409, f"Container {info.id} is paused, unpause the container before attach.")
    if info.state == State.RESTARTING:
        raise ApiError(
            409, f"Container {info.id} is restarting, wait until the container is running"
        )


async def _join(
    request: Request,
    instance: Instance,
    info: InstanceInfo,
    pipe: Pipe,
    keys: bytes,
    *,
    websocket: bool = False,
) -> None:
    """Let a client take part: of what was written, and of what is to come."""
    query, process = request.query, info.spec.process
    multiplexed = not process.tty and not websocket
    client = Client(
        pipe,
        stdin=query.flag("stdin") and process.stdin,
        stdout=query.flag("stdout"),
        stderr=query.flag("stderr") and not process.tty,
        multiplexed=multiplexed,
        ends_input=process.stdin_once and not process.tty,
        keys=keys if process.tty else b"",
    )
    front, identifier = request.front, str(instance.id)
    if query.flag("stream"):
        # Before the client hears that it is attached: what it starts then, it misses nothing of.
        front.lives.expect_start(identifier, client)
    try:
        await pipe.send_head()
        front.note(instance, "attach")
        if query.flag("logs"):
            await _replay(front, instance, client, multiplexed)
        if query.flag("stream"):
            once = process.stdin_once
            await _take_part(front, identifier, client, runs=info.state in _LIVE, once=once)
    except (Gone, NotFound):
        return
    except HutchError as exc:
        front.log.info("attach to %s: %s", info.name, exc)
    finally:
        front.lives.forget(identifier, client)


async def _replay(front: Front, instance: Instance, client: Client, multiplexed: bool) -> None:
    from hutch.api.docker.logs import LogForm, log_batches

    form = LogForm(stdout=client.stdout, stderr=client.stderr, multiplexed=multiplexed)
    async for batch in log_batches(front, instance, form):
        await client.pipe.write(batch)


async def _take_part(
    front: Front, identifier: str, client: Client, *, runs: bool, once: bool
) -> None:
    """Join a running program's streams; before its start, wait for that. One that was seen to
    run and does no more has ended meanwhile. `once`: the program's input ends with the first
    client that has it."""
    with front.journal.listen() as listener:
        feed = await _running_feed(front, identifier, client, once=once)
        if feed is None and runs and front.lives.forget(identifier, client):
            return
        if feed is None:
            feed = await _coming_feed(front, identifier, client, listener, once=once)
    if feed is not None:
        await client.attend(feed)


async def _running_feed(
    front: Front, identifier: str, client: Client, *, once: bool
) -> Feed | None:
    """Return the streams of a program that runs; None of one that does not, or whose starter
    has the client on its list."""
    if once and client.stdin:  # its connection is its own: the input ends with it
        feed = await _open_feed(front, identifier, client, stdin=True)
        if feed is not None:
            front.spawn(feed.run(), f"streams of {identifier[:12]}")
        return feed
    async with front.feeds.lock(identifier):
        feed = front.feeds.get(identifier)
        if feed is not None:
            if not front.lives.forget(identifier, client):
                return None
            feed.add(client)
            return feed
        feed = await _open_feed(front, identifier, client, stdin=not once)
        if feed is not None:
            front.feeds.add(identifier, feed)
            front.spawn(front.feeds.run(identifier, feed), f"streams of {identifier[:12]}")
        return feed


async def _open_feed(front: Front, identifier: str, client: Client, *, stdin: bool) -> Feed | None:
    """Connect to a program that runs, with its output and maybe its input."""
    context = front.engine.context
    try:
        link = await front.call_undoing(lambda: _connect(context, identifier), _close)
    except WrongState:
        return None
    # Attached only when it is sure that nobody else does it: letting go of a program's input
    # may end it.
    if not front.lives.forget(identifier, client):
        link.close()
        return None
    try:
        await front.call(functools.partial(link.attach, stdin=stdin, lossless=True))
    except BaseException as exc:
        link.close()
        if isinstance(exc, ProcessLookupError):
            raise WrongState("it has ended") from exc
        raise
    feed = Feed(front, link)
    feed.add(client)
    return feed


def _connect(context: Context, identifier: str) -> Supervisor:
    return connect(context, current(context, identifier))


def _close(link: Supervisor) -> None:
    link.close()


async def _coming_feed(
    front: Front, identifier: str, client: Client, listener: Listener, *, once: bool
) -> Feed | None:
    """Wait for the next start; None when the client leaves, or the container goes."""
    begun = asyncio.ensure_future(client.begun())
    elsewhere = asyncio.ensure_future(_next_event(listener, identifier))
    waits: set[asyncio.Future[Any]] = {
        begun,
        asyncio.ensure_future(client.pipe.wait_gone()),
        elsewhere,
    }
    try:
        while True:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if begun.done():
                return begun.result()
            if not elsewhere.done() or elsewhere.result() == "destroy":
                return None
            found = await _running_feed(front, identifier, client, once=once)
            if found is not None:
                return found
            waits.discard(elsewhere)
            elsewhere = asyncio.ensure_future(_next_event(listener, identifier))
            waits.add(elsewhere)
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _next_event(listener: Listener, identifier: str) -> str:
    """Return what happened next to a container, of its start and its removal."""
    while True:
        event = await listener.next()
        if event.subject == identifier and event.action in ("start", "destroy"):
            return event.action


# ---- resize -------------------------------------------------------------------------------


async def _resize(request: Request) -> Answer:
    instance = await find_container(request)
    rows, columns = size_of(request)
    front = request.front
    await front.call(_set_size, front.engine.context, instance.id, rows, columns)
    front.note(instance, "resize", height=str(rows), width=str(columns))
    return empty(200)


def _set_size(context: Context, identifier: str, rows: int, columns: int) -> None:
    record = current(context, identifier)
    try:
        link = connect(context, record)
    except WrongState:
        raise ApiError(409, f"Container {identifier} is not running") from None
    with link:
        try:
            link.resize(rows, columns)
        except ProcessLookupError:
            raise ApiError(409, f"Container {identifier} is not running") from None
        except OSError as exc:
            raise ApiError(500, f"the container has no terminal: {exc.strerror}") from exc


_STREAMS = {
    "stream": "works",
    "logs": "works",
    "stdin": "works",
    "stdout": "works",
    "stderr": "works",
    "detachKeys": "works, for containers with a terminal",
}
ROUTES = (
    Route(
        method="POST",
        path="/containers/{id}/attach",
        handler=_attach,
        summary="Take part in a container's streams, from before its start on",
        verdict="differs: a client that reads slowly makes the program wait, none loses output",
        options=_STREAMS,
    ),
    Route(
        method="GET",
        path="/containers/{id}/attach/ws",
        handler=_attach_websocket,
        summary="The same over WebSocket",
        options=_STREAMS,
    ),
    Route(
        method="POST",
        path="/containers/{id}/resize",
        handler=_resize,
        summary="Set the size of a container's terminal",
        options={"h": "works", "w": "works"},
    ),
)
