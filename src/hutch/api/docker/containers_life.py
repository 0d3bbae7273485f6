"""Containers: started, stopped, signalled, frozen, waited for."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from hutch.api.docker.errors import ApiError, NotModified
from hutch.api.docker.naming import find_container
from hutch.api.docker.replies import Answer, Stream, empty, encode
from hutch.api.docker.routing import Route
from hutch.engine.stop import check_restartable
from hutch.errors import AlreadyExists, Busy, InvalidArgument, NotFound, WrongState
from hutch.lifecycle import State

if TYPE_CHECKING:
    from hutch.api.docker.journal import Listener
    from hutch.api.docker.requests import Request
    from hutch.engine import Instance

__all__ = ["ROUTES"]

_LIVE = (State.RUNNING, State.PAUSED)
_PUBLISHED = re.compile(r"(\S+):(\d+)/\w+ is already published")
_CONDITIONS = ("not-running", "next-exit", "removed")


async def _start(request: Request) -> Answer:
    instance = await find_container(request)
    await request.read()  # clients before 1.24 sent a HostConfig
    if request.query.text("checkpoint"):
        raise ApiError(501, "checkpoints are not supported")
    if not await _begin(request, instance):
        raise NotModified
    return empty()


async def _begin(request: Request, instance: Instance) -> bool:
    try:
        return await request.front.lives.start(instance.id)
    except (AlreadyExists, Busy) as exc:
        taken = _PUBLISHED.search(exc.message)
        if taken is None:
            raise
        where = taken[1] if taken[1] != "*" else "0.0.0.0"
        raise ApiError(
            500,
            f"driver failed programming external connectivity on endpoint {instance.name}: "
            f"Bind for {where}:{taken[2]} failed: port is already allocated",
        ) from exc


async def _stop(request: Request) -> Answer:
    instance = await find_container(request)
    info = await request.front.call(instance.info)
    if info.state not in (*_LIVE, State.RESTARTING, State.STARTING):
        raise NotModified
    await _slowly(request, functools.partial(instance.stop, *_stop_options(request)))
    return empty()


def _stop_options(request: Request) -> tuple[float | None, str | None]:
    timeout = request.query.optional_integer("t")
    return (None if timeout is None else float(timeout)), request.query.text("signal") or None


async def _slowly(request: Request, call: functools.partial[None]) -> None:
    try:
        await request.front.call_slow(call)
    finally:
        request.front.journal.poke()


async def _restart(request: Request) -> Answer:
    instance = await find_container(request)
    front = request.front
    await front.call(check_restartable, front.engine.context, instance.id)
    await _slowly(request, functools.partial(instance.stop, *_stop_options(request)))
    await _begin(request, instance)
    await request.front.call(_note_restart, instance)
    request.front.journal.poke()
    return empty()


def _note_restart(instance: Instance) -> None:
    instance.note("restart")


async def _kill(request: Request) -> Answer:
    instance = await find_container(request)
    signal = request.query.text("signal") or "SIGKILL"
    try:
        await _slowly(request, functools.partial(instance.kill, signal))
    except WrongState:
        info = await request.front.call(instance.info)
        raise ApiError(
            409,
            f"cannot kill container: {request.params['id']}: container {info.id} is not running",
        ) from None
    except InvalidArgument:
        raise ApiError(400, f"invalid signal: {signal[:40]}") from None
    return empty()


async def _pause(request: Request) -> Answer:
    instance = await find_container(request)
    info = await request.front.call(instance.info)
    if info.state == State.PAUSED:
        raise ApiError(409, f"Container {info.id} is already paused")
    if info.state != State.RUNNING:
        raise ApiError(409, f"Container {info.id} is not running")
    await _slowly(request, functools.partial(instance.pause))
    return empty()


async def _unpause(request: Request) -> Answer:
    instance = await find_container(request)
    info = await request.front.call(instance.info)
    if info.state != State.PAUSED:
        raise ApiError(409, f"Container {info.id} is not paused")
    await _slowly(request, functools.partial(instance.unpause))
    return empty()


# ---- wait ---------------------------------------------------------------------------------


async def _wait(request: Request) -> Answer:
    condition = request.query.text("condition") or "not-running"
    if condition not in _CONDITIONS:
        raise ApiError(400, f'invalid condition: "{condition[:40]}"')
    instance = await find_container(request)
    return Stream(_waiting(request, instance, condition), "application/json")


async def _waiting(request: Request, instance: Instance, condition: str) -> AsyncIterator[bytes]:
    """Yield the exit code, once the condition holds. The head of the answer is sent before."""
    front = request.front
    with front.journal.listen() as listener:
        code = 0
        try:
            info = await front.call(instance.info)
            code = info.exit_code
            ended = info.state not in (*_LIVE, State.STARTING, State.RESTARTING)
            if condition != "not-running" or not ended:
                code = await _until(listener, str(instance.id), condition, code)
        except NotFound:
            pass  # it was removed between the two looks
        answer: dict[str, Any] = {"StatusCode": code}
        yield encode(answer) + b"\n"


async def _until(listener: Listener, identifier: str, condition: str, code: int) -> int:
    """Wait for an exit, or the removal, of one container; return the exit code."""
    while True:
        event = await listener.next()
        if event.kind != "container" or event.subject != identifier:
            continue
        if event.action == "die":
            code = int(event.attributes.get("exitCode", "0"))
            if condition != "removed":
                return code
        elif event.action == "destroy":
            return code


ROUTES = (
    Route(
        method="POST",
        path="/containers/{id}/start",
        handler=_start,
        summary="Start a container",
        options={"detachKeys": "ignored: `attach` has them", "checkpoint": "refused"},
    ),
    Route(
        method="POST",
        path="/containers/{id}/stop",
        handler=_stop,
        summary="Ask a container to end, then kill it",
        options={"t": "works", "signal": "works"},
    ),
    Route(
        method="POST",
        path="/containers/{id}/restart",
        handler=_restart,
        summary="Stop and start a container",
        verdict="works; one that is removed when it ends (`--rm`) is refused, and goes on: Docker "
        "keeps it for that once",
        options={"t": "works", "signal": "works"},
    ),
    Route(
        method="POST",
        path="/containers/{id}/kill",
        handler=_kill,
        summary="Send a signal to a container",
        options={"signal": "works"},
    ),
    Route(
        method="POST",
        path="/containers/{id}/pause",
        handler=_pause,
        summary="Freeze a container; a virtual machine stands still as a whole",
    ),
    Route(
        method="POST",
        path="/containers/{id}/unpause",
        handler=_unpause,
        summary="Let it go on",
    ),
    Route(
        method="POST",
        path="/containers/{id}/wait",
        handler=_wait,
        summary="Wait for a container; the answer's head is sent at once",
        options={"condition": "works: `not-running`, `next-exit`, `removed`"},
    ),
)
