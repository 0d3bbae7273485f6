"""The handle of one instance, for asyncio."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hutch import engine
from hutch.aio.calls import Pool, Proxy, settled, threaded
from hutch.aio.session import Session
from hutch.engine.files import Files as SyncFiles
from hutch.engine.results import CommandError, Completed
from hutch.engine.session import check_feed, end_program, join_command
from hutch.errors import NotFound, OperationTimeout
from hutch.records import Progress, silent

if TYPE_CHECKING:
    from typing import Self

    from hutch.ids import InstanceId
    from hutch.linux.cgroup import Stats
    from hutch.process.logfile import LogRecord
    from hutch.units import Moment

__all__ = ["Files", "Instance"]

T = TypeVar("T")
_COLLECT_LIMIT = 1 << 30
_SLICE_S = 0.5
_POLL_S = 0.1
_END = object()


class Files(Proxy):
    """The files of one instance."""

    read = threaded(SyncFiles.read)
    read_text = threaded(SyncFiles.read_text)
    write = threaded(SyncFiles.write)
    list = threaded(SyncFiles.list)
    stat = threaded(SyncFiles.stat)
    exists = threaded(SyncFiles.exists)
    mkdir = threaded(SyncFiles.mkdir)
    remove = threaded(SyncFiles.remove)
    copy_in = threaded(SyncFiles.copy_in)
    copy_out = threaded(SyncFiles.copy_out)
    copy_in_tar = threaded(SyncFiles.copy_in_tar)


def _end(session: engine.Session) -> None:
    """End a program that was begun for nobody; closing alone would not wait for it."""
    with session:
        end_program(session.link)


class Instance(Proxy):
    """One instance. In an `async with` block it is stopped and removed at the end."""

    _sync: engine.Instance

    def __repr__(self) -> str:
        return repr(self._sync)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await settled(self._pool.call(self._remove_if_there))

    def _remove_if_there(self) -> None:
        try:
            self._sync.remove(force=True, volumes=True)
        except NotFound:
            return

    @property
    def id(self) -> InstanceId:
        """The identifier."""
        return self._sync.id

    @property
    def name(self) -> str:
        """The present name."""
        return self._sync.name

    @property
    def sync(self) -> engine.Instance:
        """The same instance for synchronous code."""
        return self._sync

    @property
    def files(self) -> Files:
        """Its files: read, write, list, copy."""
        return Files(self._pool, self._sync.files)

    info = threaded(engine.Instance.info)
    start = threaded(engine.Instance.start)
    stop = threaded(engine.Instance.stop)
    kill = threaded(engine.Instance.kill)
    pause = threaded(engine.Instance.pause)
    unpause = threaded(engine.Instance.unpause)
    suspend = threaded(engine.Instance.suspend)
    resume = threaded(engine.Instance.resume)
    snapshot = threaded(engine.Instance.snapshot)
    restart = threaded(engine.Instance.restart)
    remove = threaded(engine.Instance.remove)
    rename = threaded(engine.Instance.rename)
    unlink = threaded(engine.Instance.unlink)
    update = threaded(engine.Instance.update)
    stats = threaded(engine.Instance.stats)
    disk_size = threaded(engine.Instance.disk_size)
    network_stats = threaded(engine.Instance.network_stats)
    top = threaded(engine.Instance.top)
    diff = threaded(engine.Instance.diff)
    commit = threaded(engine.Instance.commit)
    copy_in = threaded(engine.Instance.copy_in)

    async def fork(
        self, n: int = 1, *, name: str | None = None, publish: bool = True
    ) -> Instance | list[Instance]:
        """Return a running twin of a running virtual machine; with `n` above 1, a list."""
        made = await self._pool.call(
            functools.partial(self._sync.fork, n, name=name, publish=publish), undo=_discard
        )
        if isinstance(made, list):
            return [Instance(self._pool, twin) for twin in made]
        return Instance(self._pool, made)

    async def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code; raise `OperationTimeout`."""
        left = timeout
        while True:
            step = _SLICE_S if left is None else min(_SLICE_S, left)
            try:
                return await self._pool.abandon(functools.partial(self._sync.wait, step))
            except OperationTimeout:
                if left is not None:
                    left -= step
                    if left <= 0:
                        raise

    async def exec(
        self,
        command: Sequence[str] | str,
        *,
        input: bytes | str | None = None,
        timeout: float | None = None,
        check: bool = False,
        user: str | None = None,
        env: Mapping[str, str] | Sequence[str] | None = None,
        workdir: str | None = None,
        privileged: bool = False,
        tty: bool = False,
        limit: int = _COLLECT_LIMIT,
    ) -> Completed:
        """Run a program inside and collect its output; see `hutch.Instance.exec`."""
        data = check_feed(input, timeout)
        session = await self.exec_stream(
            command,
            stdin=input is not None,
            tty=tty,
            user=user,
            env=env,
            workdir=workdir,
            privileged=privileged,
        )
        async with session:  # left early, the program is killed
            code, out, err = await session.collect(input=data, timeout=timeout, limit=limit)
        completed = Completed(exit_code=code, stdout=out, stderr=err, id=str(self.id))
        if check and code != 0:
            raise CommandError(completed, join_command(command))
        return completed

    async def exec_stream(
        self,
        command: Sequence[str] | str,
        *,
        stdin: bool = False,
        tty: bool = False,
        user: str | None = None,
        env: Mapping[str, str] | Sequence[str] | None = None,
        workdir: str | None = None,
        privileged: bool = False,
        detach: bool = False,
    ) -> Session:
        """Run a program inside with its streams left open."""
        call = functools.partial(
            self._sync.exec_stream,
            command,
            stdin=stdin,
            tty=tty,
            user=user,
            env=env,
            workdir=workdir,
            privileged=privileged,
            detach=detach,
        )
        return await self._session(call, undo=engine.Session.close if detach else _end)

    async def attach(
        self, *, stdin: bool = True, stdout: bool = True, stderr: bool = True
    ) -> Session:
        """Join the streams of the main program."""
        call = functools.partial(self._sync.attach, stdin=stdin, stdout=stdout, stderr=stderr)
        return await self._session(call)

    async def start_attached(
        self, *, rows: int = 0, columns: int = 0, progress: Progress = silent
    ) -> Session:
        """Start it and attach before its first output: nothing is missed."""
        call = functools.partial(
            self._sync.start_attached, rows=rows, columns=columns, progress=progress
        )
        return await self._session(call)

    async def _session(
        self,
        call: Callable[[], engine.Session],
        undo: Callable[[engine.Session], None] = engine.Session.close,
    ) -> Session:
        session = await self._pool.call(call, undo=undo)
        return Session(self._pool, session)

    async def logs(
        self,
        *,
        follow: bool = False,
        since: Moment | None = None,
        until: Moment | None = None,
        tail: int | None = None,
        stdout: bool = True,
        stderr: bool = True,
    ) -> AsyncIterator[LogRecord]:
        """Yield what the program wrote; with `follow` until it has ended."""
        import asyncio

        streams = {"stdout": stdout, "stderr": stderr}
        last: LogRecord | None = None
        while True:
            running = follow and str((await self.info()).state) in _RUNNING
            fetch = functools.partial(
                self._sync.logs, since=since, until=until, tail=tail, **streams
            )
            records = await self._pool.abandon(lambda fetch=fetch: list(fetch()))  # type: ignore[misc]
            for record in _newer(records, last):
                last = record
                yield record
            if not running:
                return
            # From here on only what is new; records of the same moment are told apart.
            if last is not None:
                since, tail = last.time_ns / 1e9 - 1e-3, None
            await asyncio.sleep(_POLL_S)

    async def stats_stream(self, interval: float = 1.0) -> AsyncIterator[Stats]:
        """Yield a reading every `interval` seconds until it ends."""
        import asyncio

        from hutch.errors import WrongState

        while True:
            try:
                yield await self._pool.abandon(self._sync.stats)
            except (WrongState, NotFound):
                return
            await asyncio.sleep(interval)

    async def export(self) -> AsyncIterator[bytes]:
        """Yield its whole file system as a tar stream."""
        async for chunk in stream_of(self._pool, self._sync.export):
            yield chunk

    async def copy_out(self, path: str) -> tuple[Any, AsyncIterator[bytes]]:
        """Return what `path` is, and it (a tree for a directory) as a tar stream."""
        found, chunks = await self._pool.call(functools.partial(self._sync.copy_out, path))
        return found, stream_of(self._pool, lambda: chunks)


_RUNNING = frozenset({"starting", "running", "paused", "restarting"})


def _newer(records: list[LogRecord], last: LogRecord | None) -> list[LogRecord]:
    """Return the records after `last`, which the list holds too if it is not the first."""
    if last is None:
        return records
    for index in range(len(records) - 1, -1, -1):
        if records[index] == last:
            return records[index + 1 :]
    return [record for record in records if record.time_ns > last.time_ns]


async def stream_of(pool: Pool, make: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
    """Step a blocking iterator in threads; it is closed however the loop is left."""
    iterator = await pool.call(make)
    try:
        while True:
            item = await pool.call(lambda: next(iterator, _END))
            if item is _END:
                return
            yield item  # type: ignore[misc]
    finally:
        close: Callable[[], None] | None = getattr(iterator, "close", None)
        if close is not None:
            await _quietly(pool.call(close))


async def _quietly(work: Awaitable[object]) -> None:
    await settled(work)


def _discard(made: engine.Instance | list[engine.Instance]) -> None:
    """Remove twins that nobody waits for any more."""
    for twin in made if isinstance(made, list) else [made]:
        twin.remove(force=True, volumes=True)
