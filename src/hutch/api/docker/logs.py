"""Containers' logs: read in threads by the megabyte, followed without one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from hutch.api.docker.errors import ApiError
from hutch.api.docker.frames import pack_head, stream_type
from hutch.api.docker.naming import find_container
from hutch.api.docker.replies import Answer, Stream
from hutch.api.docker.routing import Route
from hutch.engine.logs import open_cursor, writes_log
from hutch.linux.inotify import IN_MODIFY, Inotify
from hutch.units import parse_time_ns

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.engine import Instance
    from hutch.process.logcursor import LogCursor

__all__ = ["ROUTES", "LogForm", "log_batches"]

_IDLE_S = 1.0
_SHORT = 16 << 10


async def _logs(request: Request) -> Answer:
    query = request.query
    instance = await find_container(request)
    info = await request.front.call(instance.info)
    stdout, stderr = query.flag("stdout"), query.flag("stderr")
    if not (stdout or stderr):
        raise ApiError(400, "Bad parameters: you must choose at least one stream")
    if info.spec.logs.driver == "none":
        raise ApiError(501, "configured logging driver does not support reading")
    tty = info.spec.process.tty
    since, until = _moment(request, "since"), _moment(request, "until")
    form = LogForm(
        stdout=stdout,
        stderr=stderr,
        multiplexed=not tty,
        since_ns=since,
        until_ns=until,
        tail=_tail(query.text("tail")),
        timestamps=query.flag("timestamps"),
    )
    batches = log_batches(request.front, instance, form, follow=query.flag("follow"))
    return Stream(batches, stream_type(tty=tty, version=request.version))


def _moment(request: Request, name: str) -> int | None:
    given = request.query.text(name)
    if not given:
        return None
    return parse_time_ns(given, name) or None


def _tail(text: str) -> int | None:
    """Return how many lines; all for what is no number, as Docker has it."""
    try:
        count = int(text)
    except ValueError:
        return None
    return count if count >= 0 else None


async def log_batches(
    front: Front, instance: Instance, form: LogForm, *, follow: bool = False
) -> AsyncIterator[bytes]:
    """Yield what a container wrote in pieces of some 256 KiB; with `follow` also what it
    writes, until it ends."""
    context, identifier = front.engine.context, str(instance.id)
    cursor = await front.call_slow(open_cursor, context, identifier, tail=form.tail)
    try:
        async for batch in _read(front, cursor, form):
            yield batch
        if not follow:
            return
        with _Writes(str(context.directory(identifier))) as writes:
            running = True
            while running and not form.is_over():
                # Asked first: what was written until it ended is then read.
                running = await front.call(writes_log, context, identifier)
                count = 0
                async for batch in _read(front, cursor, form):
                    count += 1
                    yield batch
                if running and not count:
                    await writes.wait()
    finally:
        cursor.close()


async def _read(front: Front, cursor: LogCursor, form: LogForm) -> AsyncIterator[bytes]:
    """Yield what is there now. A thread is worth it only for much."""
    while not form.is_past():
        if cursor.waiting() < _SHORT:
            batch = _batch(cursor, form)
        else:
            batch = await front.call_slow(_batch, cursor, form)
        if batch is None:
            return
        if batch:
            yield batch


def _batch(cursor: LogCursor, form: LogForm) -> bytes | None:
    lines = cursor.lines()
    return None if lines is None else form.render(lines)


class LogForm:
    """Which records of a log are wanted, and how they are sent."""

    def __init__(
        self,
        *,
        stdout: bool,
        stderr: bool,
        multiplexed: bool,
        since_ns: int | None = None,
        until_ns: int | None = None,
        tail: int | None = None,
        timestamps: bool = False,
    ) -> None:
        self.tail = tail
        self._streams: dict[int, int] = {}
        if stdout:
            self._streams |= {ord("o"): 1, ord("O"): 1}
        if stderr:
            self._streams |= {ord("e"): 2, ord("E"): 2}
        self._multiplexed = multiplexed
        self._since = since_ns
        self._until = until_ns
        self._timestamps = timestamps
        self._second = (-1, b"")
        self._begins = {1: True, 2: True}
        self._past = False

    def is_past(self) -> bool:
        """Tell whether what was written last is after the wanted span."""
        return self._past

    def is_over(self) -> bool:
        """Tell whether nothing more can be written within the wanted span."""
        return self._past or (self._until is not None and time.time_ns() > self._until + 10**9)

    def render(self, lines: list[bytes]) -> bytes:
        """Return the wanted ones of some lines of the log as they are sent."""
        out: list[bytes] = []
        streams, plain = self._streams, not (self._timestamps or self._since or self._until)
        for line in lines:
            at = line.find(b" ")
            # A line that a crash has cut short is none.
            if at <= 0 or len(line) < at + 3 or line[at + 2] != 0x20:
                continue
            kind = line[at + 1]
            stream = streams.get(kind)
            if stream is None:
                continue
            # A small letter says that the program ended the line.
            data = line[at + 3 :] + b"\n" if kind > 0x60 else line[at + 3 :]
            if not plain:
                wanted = self._timed(line[:at], stream, kind, data)
                if wanted is None:
                    if self._past:
                        break
                    continue
                data = wanted
            if self._multiplexed:
                out.append(pack_head(stream, len(data)))
            out.append(data)
        return b"".join(out)

    def _timed(self, digits: bytes, stream: int, kind: int, data: bytes) -> bytes | None:
        """Return a record with its time where that is wanted; None for one out of the span."""
        if not digits.isdigit():
            return None
        time_ns = int(digits)
        if self._until is not None and time_ns > self._until:
            self._past = True
            return None
        begins, self._begins[stream] = self._begins[stream], kind > 0x60
        if self._since is not None and time_ns < self._since:
            return None
        return self._stamp(time_ns) + data if self._timestamps and begins else data

    def _stamp(self, time_ns: int) -> bytes:
        second, rest = divmod(time_ns, 10**9)
        if second != self._second[0]:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, text.encode())
        return b"%s.%09dZ " % (self._second[1], rest)


class _Writes:
    """Waits until something is written in a directory, or somebody should look anyhow."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._changed = asyncio.Event()
        self._inotify: Inotify | None = None

    def __enter__(self) -> _Writes:
        try:
            self._inotify = Inotify()
            self._inotify.add(self._directory, IN_MODIFY)
            asyncio.get_running_loop().add_reader(self._inotify.fd, self._written)
        except OSError:  # no more watches: looked at by the clock
            self._close()
        return self

    def _written(self) -> None:
        if self._inotify is not None:
            self._inotify.read(0)
        self._changed.set()

    async def wait(self) -> None:
        """Return after a write, or after a second."""
        pause = _IDLE_S if self._inotify is not None else _IDLE_S / 10
        try:
            async with asyncio.timeout(pause):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _close(self) -> None:
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None

    def __exit__(self, *_: object) -> None:
        self._close()


ROUTES = (
    Route(
        method="GET",
        path="/containers/{id}/logs",
        handler=_logs,
        summary="Read what a container wrote",
        options={
            "follow": "works",
            "stdout": "works",
            "stderr": "works",
            "since": "works",
            "until": "works",
            "timestamps": "works",
            "tail": "works",
            "details": "ignored: logs have no attributes",
        },
    ),
)
