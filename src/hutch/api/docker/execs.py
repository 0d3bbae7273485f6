"""Further programs in containers: made, started with their streams, inspected.

They are known to this daemon only, as in Docker: one that runs when the daemon is killed goes
on, but nobody can ask for its exit code any more.
"""

from __future__ import annotations

import functools
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from hutch.api.docker.errors import ApiError
from hutch.api.docker.feeds import Client, Feed, parse_keys
from hutch.api.docker.frames import frame, stream_type
from hutch.api.docker.http import Gone
from hutch.api.docker.naming import find_container
from hutch.api.docker.replies import Answer, empty, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.streams import size_of
from hutch.api.docker.wire import Wire
from hutch.drivers.users import resolve_user
from hutch.engine.exec import exec_process
from hutch.errors import Exhausted, HutchError, NotFound
from hutch.lifecycle import State
from hutch.process.supervisor import attach_flags

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.http import Hijacked
    from hutch.api.docker.requests import Request
    from hutch.engine import Instance
    from hutch.process.supervisor import Supervisor

__all__ = ["ROUTES", "Execs"]

_KEPT_S = 300.0
_MOST = 10_000
_MAX_USERS = 4 << 20
_MOST_CELLS = 65_535

_Cells = Annotated[int, msgspec.Meta(ge=0)]
ConsoleSize = tuple[_Cells, _Cells]
"""Rows and columns of a terminal."""


class ExecBody(Wire, frozen=True, kw_only=True):
    """A program to be run in a container."""

    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    detach_keys: str = ""
    tty: bool = False
    env: list[str] | None = None
    cmd: list[str] | None = None
    privileged: bool = False
    user: str = ""
    working_dir: str = ""
    console_size: ConsoleSize | None = None


class StartBody(Wire, frozen=True, kw_only=True):
    """How it is started."""

    detach: bool = False
    tty: bool = False
    console_size: ConsoleSize | None = None


class Exec:
    """One further program."""

    def __init__(self, container: str, body: ExecBody) -> None:
        self.id = secrets.token_hex(32)
        self.container = container
        self.body = body
        self.running = False
        self.begun = False
        self.exit_code: int | None = None
        self.pid = 0
        self.ended_at: float | None = None
        self.feed: Feed | None = None

    def end(self, code: int) -> None:
        """Note that it is over."""
        self.running = False
        self.exit_code = code
        self.ended_at = time.monotonic()
        self.feed = None


class Execs:
    """All of them, until some minutes after their end."""

    def __init__(self) -> None:
        self._known: dict[str, Exec] = {}

    def add(self, one: Exec) -> None:
        """Remember one; forget those that ended long ago."""
        now = time.monotonic()
        gone = [e.id for e in self._known.values() if e.ended_at and now - e.ended_at > _KEPT_S]
        for identifier in gone:
            del self._known[identifier]
        if len(self._known) >= _MOST:
            # Whoever made the oldest one that was never started has most likely left.
            idle = next((e.id for e in self._known.values() if not e.begun), None)
            if idle is None:
                raise ApiError(500, f"there are {_MOST} of them already")
            del self._known[idle]
        self._known[one.id] = one

    def get(self, identifier: str) -> Exec:
        """Return one by its identifier or a unique prefix of it."""
        found = self._known.get(identifier)
        if found is None and len(identifier) >= 4:
            matching = [e for key, e in self._known.items() if key.startswith(identifier)]
            found = matching[0] if len(matching) == 1 else None
        if found is None:
            raise ApiError(404, f"No such exec instance: {identifier}")
        return found

    def of(self, container: str) -> list[str]:
        """Return the identifiers of those of a container that are not over."""
        return [
            e.id for e in self._known.values() if e.container == container and e.ended_at is None
        ]


# ---- endpoints ----------------------------------------------------------------------------


async def _create(request: Request) -> Answer:
    instance = await find_container(request)
    body = await request.json(ExecBody)
    if not body.cmd:
        raise ApiError(400, "No exec command specified")
    info = await request.front.call(instance.info)
    if info.state == State.PAUSED:
        named = request.params["id"]
        raise ApiError(409, f"Container {named} is paused, unpause the container before exec")
    if info.state == State.RESTARTING:
        raise ApiError(
            409, f"Container {info.id} is restarting, wait until the container is running"
        )
    if info.state != State.RUNNING:
        raise ApiError(409, f"container {info.id} is not running")
    _keys(body)
    if not all(part.isdecimal() for part in body.user.split(":") if part):
        await request.front.call_slow(_check_user, instance, body.user)
    made = Exec(info.id, body)
    request.front.execs.add(made)
    with suppress(Exhausted):  # whoever is to make room on a full disk may have to come this way
        await request.front.call(instance.note, f"exec_create: {_line(body)}", execID=made.id)
    request.front.journal.poke()
    return json_reply({"Id": made.id}, 201)


def _check_user(instance: Instance, user: str) -> None:
    """Refuse who is not in the container; the start looks again."""

    def read(path: str) -> bytes | None:
        try:
            return instance.files.read(path, limit=_MAX_USERS)
        except NotFound:
            return None

    try:
        resolve_user(user, (), read)
    except NotFound as exc:
        name, _, group = user.partition(":")
        what, missing, file = ("user", name, "passwd")
        if "no group" in exc.message:
            what, missing, file = ("group", group, "group")
        raise ApiError(
            400, f"unable to find {what} {missing[:80]}: no matching entries in {file} file"
        ) from None


def _line(body: ExecBody) -> str:
    """Return the program and its arguments as Docker's events have them."""
    words = body.cmd or [""]
    return f"{words[0]} {' '.join(words[1:])}"


def _keys(body: ExecBody) -> bytes:
    try:
        return parse_keys(body.detach_keys or None)
    except ValueError as exc:
        raise ApiError(400, f"invalid detach keys ({exc})") from None


async def _start(request: Request) -> Answer:
    one = request.front.execs.get(request.params["id"])
    given = await request.optional_json(StartBody) or StartBody()
    if one.begun:
        if one.ended_at is not None:
            raise ApiError(409, f"exec {one.id} has already run")
        raise ApiError(409, f"exec {one.id} is already running")
    one.begun = True
    size = given.console_size or one.body.console_size or (0, 0)
    rows, columns = (min(cells, _MOST_CELLS) for cells in size)
    if given.detach:
        link = await _launch(request.front, one, 0, rows, columns)
        request.front.spawn(
            _follow(request.front, one, Feed(request.front, link, keep=True)), f"exec {one.id[:12]}"
        )
        return empty(200)
    content = stream_type(tty=one.body.tty, version=request.version, upgraded=request.upgrade)
    try:
        pipe = await request.hijack([("Content-Type", content)])
        await pipe.send_head()
    except BaseException:
        one.end(126)  # the client has left before it could begin
        raise
    await _attached(request.front, one, pipe, rows, columns)
    pipe.write_eof()
    return None


async def _attached(front: Front, one: Exec, pipe: Hijacked, rows: int, columns: int) -> None:
    body = one.body
    client = Client(
        pipe,
        stdin=body.attach_stdin,
        stdout=body.attach_stdout,
        stderr=body.attach_stderr and not body.tty,
        multiplexed=not body.tty,
        ends_input=not body.tty,
        keys=_keys(body) if body.tty else b"",
    )
    flags = attach_flags(
        stdin=body.attach_stdin, stdout=body.attach_stdout, stderr=body.attach_stderr, lossless=True
    )
    try:
        link = await _launch(front, one, flags, rows, columns)
    except (HutchError, OSError) as exc:
        # The connection is a stream already: that is where Docker tells it too.
        text = f"{exc}\r\n".encode()
        try:
            await pipe.write(text if body.tty else frame(1, text))
        except Gone:
            pass
        return
    feed = Feed(front, link, keep=True)
    feed.add(client)
    front.spawn(_follow(front, one, feed), f"exec {one.id[:12]}")
    await client.attend(feed)


async def _launch(front: Front, one: Exec, flags: int, rows: int, columns: int) -> Supervisor:
    """Start the program; it goes on without us."""
    body = one.body
    call = functools.partial(
        exec_process,
        front.engine.context,
        one.container,
        body.cmd or [],
        user=body.user or None,
        env=body.env or None,
        workdir=body.working_dir or None,
        privileged=body.privileged,
        tty=body.tty,
        stdin=body.attach_stdin,
        linger=True,
        attach=flags,
        rows=rows,
        columns=columns,
    )
    try:
        link = await front.call_undoing(call, _close)
    except BaseException as exc:
        one.end(_code_of(exc))
        raise
    one.running, one.pid = True, link.pid or 0
    with suppress(NotFound):
        front.note(front.engine.get(one.container), f"exec_start: {_line(body)}", execID=one.id)
    return link


def _close(link: Supervisor) -> None:
    link.close()


def _code_of(exc: BaseException) -> int:
    """Return the exit code that Docker gives a program that could not be started."""
    code = getattr(exc, "exit_code", None)
    return code if isinstance(code, int) else 126


async def _follow(front: Front, one: Exec, feed: Feed) -> None:
    """See it to its end."""
    one.feed = feed
    code = None
    try:
        code = await feed.run()
    finally:
        one.end(137 if code is None else code)
    try:
        instance = front.engine.get(one.container)
        await front.call(instance.note, "exec_die", execID=one.id, exitCode=str(one.exit_code))
    except (NotFound, Exhausted):
        return
    front.journal.poke()


async def _resize(request: Request) -> Answer:
    one = request.front.execs.get(request.params["id"])
    rows, columns = size_of(request)
    if one.feed is None:
        raise ApiError(409, f"exec process {one.id} is not running")
    try:
        await one.feed.session.resize(rows, columns)
    except (HutchError, OSError) as exc:
        raise ApiError(500, f"the program has no terminal: {exc}") from exc
    return empty(200)


async def _inspect(request: Request) -> Answer:
    one = request.front.execs.get(request.params["id"])
    body = one.body
    words = body.cmd or [""]
    found: dict[str, Any] = {
        "ID": one.id,
        "Running": one.running,
        "ExitCode": one.exit_code,
        "ProcessConfig": {
            "tty": body.tty,
            "entrypoint": words[0],
            "arguments": words[1:],
            "privileged": body.privileged,
            **({"user": body.user} if body.user else {}),
        },
        "OpenStdin": body.attach_stdin,
        "OpenStderr": body.attach_stderr,
        "OpenStdout": body.attach_stdout,
        "CanRemove": False,
        "ContainerID": one.container,
        "DetachKeys": body.detach_keys,
        "Pid": one.pid,
    }
    return json_reply(found)


ROUTES = (
    Route(
        method="POST",
        path="/containers/{id}/exec",
        handler=_create,
        summary="Make a further program in a container that runs",
        options={
            "AttachStdin, AttachStdout, AttachStderr, Tty, ConsoleSize, DetachKeys": "works",
            "Env, Cmd, Privileged, User, WorkingDir": "works",
        },
    ),
    Route(
        method="POST",
        path="/exec/{id}/start",
        handler=_start,
        summary="Start it, with its streams or without",
        options={"Detach, Tty, ConsoleSize": "works"},
    ),
    Route(
        method="POST",
        path="/exec/{id}/resize",
        handler=_resize,
        summary="Set the size of its terminal",
        options={"h": "works", "w": "works"},
    ),
    Route(
        method="GET",
        path="/exec/{id}/json",
        handler=_inspect,
        summary="Tell about it",
        verdict="works; as with Docker, a restart of the daemon forgets those made before: what "
        "runs goes on, and nobody can ask for its exit code",
    ),
)
