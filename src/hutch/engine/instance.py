"""The handle of one instance: everything that can be done with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hutch.engine import stop as stopping
from hutch.engine.context import Context
from hutch.engine.results import (
    Change,
    CommandError,
    Completed,
    DiskSize,
    InstanceInfo,
    NetworkUsage,
    ProcessTable,
)
from hutch.engine.session import (
    Session,
    check_feed,
    collect,
    collect_flags,
    join_command,
    session_flags,
)
from hutch.errors import NotFound
from hutch.ids import InstanceId, short_id
from hutch.records import Progress, silent

if TYPE_CHECKING:
    from typing import Self, Unpack

    from hutch.engine.console import Console
    from hutch.engine.files import Files
    from hutch.engine.records import SnapshotRecord
    from hutch.image.records import ImageRecord
    from hutch.linux.cgroup import Stats
    from hutch.process.logfile import LogRecord
    from hutch.spec.options import UpdateOptions
    from hutch.storage.tree import Stat
    from hutch.units import Moment

__all__ = ["Instance"]

_COLLECT_LIMIT = 1 << 30


class Instance:
    """One instance of an engine. The handle holds nothing open; as a context manager it
    stops and removes the instance at the end of the block."""

    def __init__(self, context: Context, identifier: str, name: str) -> None:
        self._context = context
        self.id = InstanceId(identifier)
        self._name = name

    def __repr__(self) -> str:
        return f"<Instance {self._name} {short_id(self.id)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.remove(force=True, volumes=True)
        except NotFound:
            pass

    @property
    def name(self) -> str:
        """The present name."""
        from hutch.engine.lookup import load

        try:
            self._name = load(self._context, self.id).name
        except NotFound:
            pass
        return self._name

    def info(self) -> InstanceInfo:
        """Describe the instance as it is now."""
        from hutch.engine.describe import describe

        return describe(self._context, stopping.current(self._context, self.id))

    # ---- life -----------------------------------------------------------------------------

    def start(self, *, discard: bool = False, progress: Progress = silent) -> None:
        """Start it; one that runs already is left alone, and a suspended one goes on where it
        was. With `discard` that begins anew: its memory is forgotten. `progress` is told of
        what takes seconds: a template that is booted for the first of its kind."""
        from hutch.engine.start import start

        if discard:
            from hutch.engine.suspend import discard_suspended

            discard_suspended(self._context, self.id)
        link = start(self._context, self.id, progress=progress)
        if link is not None:
            link.close()

    def unlock(self, key: bytes | str | None) -> None:
        """Hold the key of its encrypted disk for starts by this process: the key itself, or
        as text the path of its file."""
        from hutch.engine.disk_keys import unlock

        unlock(self._context, self.id, key)

    def start_attached(
        self, *, rows: int = 0, columns: int = 0, progress: Progress = silent
    ) -> Session:
        """Start it and attach before its first output: nothing is missed."""
        from hutch.engine.session import start_session

        return start_session(self._context, self.id, rows=rows, columns=columns, progress=progress)

    def stop(self, timeout: float | None = None, signal: str | int | None = None) -> None:
        """Ask the program to end; kill it after `timeout` seconds (its own if None)."""
        stopping.stop(self._context, self.id, timeout_s=timeout, signal=signal)

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal to the program."""
        stopping.kill(self._context, self.id, signal)

    def pause(self) -> None:
        """Freeze all its processes."""
        stopping.pause(self._context, self.id)

    def unpause(self) -> None:
        """Let them go on."""
        stopping.unpause(self._context, self.id)

    def suspend(self) -> None:
        """Write its memory to disk and end it; `resume` goes on from there."""
        from hutch.engine.suspend import suspend

        suspend(self._context, self.id)

    def resume(self) -> None:
        """Let a suspended machine go on where it was; the same as `start`."""
        self.start()

    def snapshot(self, tag: str | None = None, *, disk_only: bool = False) -> SnapshotRecord:
        """Keep a virtual machine as it is now: a running one with its memory and programs,
        unless its disk alone is asked for, one that does not run by its disk. See
        `Engine.snapshots`."""
        from hutch.engine.snapshots import take_snapshot

        return take_snapshot(self._context, self.id, tag, disk_only=disk_only)

    def fork(
        self, n: int = 1, *, name: str | None = None, publish: bool = True
    ) -> Instance | list[Instance]:
        """Return a running twin of a running instance: its memory, its files and its
        programs as they are now, under another identity. With `n` above 1, a list of them.

        `name` becomes NAME-1, NAME-2, … for several. A port published under a number is
        refused, for the machine has it itself; `publish=False` leaves ports out.
        """
        from hutch.engine.fork import fork

        made = fork(self._context, self.id, count=n, name=name, publish=publish)
        twins = [Instance(self._context, record.id, record.name) for record in made]
        return twins[0] if n == 1 else twins

    def restart(self, timeout: float | None = None, signal: str | int | None = None) -> None:
        """Stop it if it runs, then start it; `timeout` and `signal` are those of `stop`."""
        stopping.restart(self._context, self.id, timeout_s=timeout, signal=signal)

    def remove(self, force: bool = False, volumes: bool = False) -> None:
        """Remove it; `force` kills it first, `volumes` removes its anonymous volumes."""
        stopping.remove(self._context, self.id, force=force, remove_volumes=volumes)

    def rename(self, name: str) -> None:
        """Give it another name."""
        from hutch.engine.change import rename

        rename(self._context, self.id, name)

    def unlink(self, alias: str) -> None:
        """Take away the name that it has for another (`links`). Raises `NotFound`."""
        from hutch.engine.links import remove_link

        remove_link(self._context, self.id, alias)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code; raise `OperationTimeout`."""
        return stopping.wait(self._context, self.id, timeout)

    def update(self, **options: Unpack[UpdateOptions]) -> None:
        """Change limits or the restart policy, live."""
        from hutch.engine.change import update

        update(self._context, self.id, options)

    def note(self, action: str, **attributes: str) -> None:
        """Put into the journal that something was done with it; for front ends."""
        from hutch.engine.lookup import load

        record = load(self._context, self.id)
        with self._context.store.write() as tx:
            tx.event(
                "container",
                action,
                self.id,
                name=record.name,
                image=record.image_name,
                **attributes,
            )

    # ---- programs and streams ---------------------------------------------------------------

    def exec(
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
        """Run a program inside and collect its output.

        `timeout` in seconds: then the program is killed and `OperationTimeout` raised.
        `check` raises `CommandError` for an exit code other than 0. At most `limit` bytes
        are collected; more raises `Exhausted`.
        """
        from hutch.engine.exec import exec_process

        data = check_feed(input, timeout)
        link = exec_process(
            self._context,
            self.id,
            command,
            user=user,
            env=env,
            workdir=workdir,
            privileged=privileged,
            tty=tty,
            stdin=input is not None,
            attach=collect_flags(stdin=input is not None),
        )
        completed = collect(link, input=data, timeout_s=timeout, limit=limit, identifier=self.id)
        if check and completed.exit_code != 0:
            raise CommandError(completed, join_command(command))
        return completed

    def exec_stream(
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
        rows: int = 0,
        columns: int = 0,
    ) -> Session:
        """Run a program inside with its streams left open; the caller closes the session.

        With `detach` the program goes on when the session is closed.
        """
        from hutch.engine.exec import exec_process

        link = exec_process(
            self._context,
            self.id,
            command,
            user=user,
            env=env,
            workdir=workdir,
            privileged=privileged,
            tty=tty,
            stdin=stdin,
            linger=detach,
            attach=0 if detach else session_flags(stdin=stdin),
            rows=rows,
            columns=columns,
        )
        return Session(link)

    def attach(self, *, stdin: bool = True, stdout: bool = True, stderr: bool = True) -> Session:
        """Join the streams of the main program; the caller closes the session."""
        from hutch.engine.session import attach_session

        return attach_session(self._context, self.id, stdin=stdin, stdout=stdout, stderr=stderr)

    def logs(
        self,
        *,
        follow: bool = False,
        since: Moment | None = None,
        until: Moment | None = None,
        tail: int | None = None,
        stdout: bool = True,
        stderr: bool = True,
    ) -> Iterator[LogRecord]:
        """Yield what the program wrote; times are seconds since the epoch."""
        from hutch.engine.logs import logs

        return logs(
            self._context,
            self.id,
            follow=follow,
            since=since,
            until=until,
            tail=tail,
            stdout=stdout,
            stderr=stderr,
        )

    def console(self) -> Console:
        """Join the serial console of a virtual machine, where its kernel writes."""
        from hutch.engine.console import open_console

        return open_console(self._context, self.id)

    def console_log(self, limit: int = 1 << 20) -> bytes:
        """Return the end of what was written to that console in this start and the one
        before, at most `limit` bytes."""
        from hutch.engine.console import console_log

        return console_log(self._context, self.id, limit)

    # ---- looking inside -----------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return one reading of its counters."""
        from hutch.engine.usage import stats

        return stats(self._context, self.id)

    def disk_size(self) -> DiskSize:
        """Return what its files take."""
        from hutch.engine.usage import disk_size

        return disk_size(self._context, self.id)

    def network_stats(self) -> tuple[NetworkUsage, ...]:
        """Return the traffic of its network interfaces."""
        from hutch.engine.usage import network_stats

        return network_stats(self._context, self.id)

    def stats_stream(self, interval: float = 1.0) -> Iterator[Stats]:
        """Yield a reading every `interval` seconds until it ends."""
        from hutch.engine.usage import stats_stream

        return stats_stream(self._context, self.id, interval)

    def top(self, ps_args: Sequence[str] = ()) -> ProcessTable:
        """List its processes, with the host's `ps` where arguments are given."""
        from hutch.engine.usage import top

        return top(self._context, self.id, ps_args)

    def diff(self) -> list[Change]:
        """List what differs from the image."""
        from hutch.engine.filesystem import diff

        return diff(self._context, self.id)

    def commit(
        self,
        reference: str | None = None,
        *,
        author: str = "",
        message: str = "",
        changes: Sequence[str] = (),
        pause: bool = True,
    ) -> ImageRecord:
        """Make an image of it as it is now."""
        from hutch.engine.filesystem import commit

        return commit(
            self._context,
            self.id,
            reference,
            author=author,
            message=message,
            changes=changes,
            pause=pause,
        )

    def export(self) -> Iterator[bytes]:
        """Yield its whole file system as a tar stream."""
        from hutch.engine.filesystem import export

        return export(self._context, self.id)

    @property
    def files(self) -> Files:
        """Its files: read, write, list, copy."""
        from hutch.engine.files import Files

        return Files(self._context, self.id)

    def copy_out(self, path: str) -> tuple[Stat, Iterator[bytes]]:
        """Return what `path` is, and it (a tree for a directory) as a tar stream."""
        return self.files.copy_out_tar(path)

    def copy_in(self, path: str, stream: Any) -> None:
        """Unpack a tar stream into the directory `path`."""
        self.files.copy_in_tar(path, stream)
