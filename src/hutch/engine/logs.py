"""Read what an instance's program wrote, past and to come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.stop import current
from hutch.errors import NotFound, Unsupported
from hutch.lifecycle import State
from hutch.units import to_ns

if TYPE_CHECKING:
    from hutch.process.logcursor import LogCursor
    from hutch.process.logfile import LogRecord
    from hutch.units import Moment

__all__ = ["logs", "open_cursor", "writes_log"]

_RUNS = (State.STARTING, State.RUNNING, State.PAUSED)


def logs(
    context: Context,
    identifier: str,
    *,
    follow: bool,
    since: Moment | None,
    until: Moment | None,
    tail: int | None,
    stdout: bool,
    stderr: bool,
) -> Iterator[LogRecord]:
    """Yield records of the wanted streams; with `follow`, until the instance has ended."""
    from hutch.process.logfile import read_log

    record = current(context, identifier)
    if record.spec.logs.driver == "none":
        raise Unsupported(
            f"instance {record.name} keeps no logs", hint="create it without --log-driver none"
        )
    wanted = {number for number, take in ((1, stdout), (2, stderr)) if take}
    records = read_log(
        f"{context.directory(identifier)}/log",
        follow=follow and record.state in _RUNS,
        since_ns=None if since is None else to_ns(since),
        until_ns=None if until is None else to_ns(until),
        tail=tail,
        stop=lambda: not _runs(context, identifier),
    )
    return (item for item in records if item.stream in wanted)


def open_cursor(context: Context, identifier: str, *, tail: int | None = None) -> LogCursor:
    """Return a place in an instance's log, for who waits by other means; close it."""
    from hutch.process.logcursor import LogCursor

    return LogCursor(f"{context.directory(identifier)}/log", tail=tail)


def writes_log(context: Context, identifier: str) -> bool:
    """Tell whether more may come: it runs, or is about to be started again."""
    try:
        return current(context, identifier).state in (*_RUNS, State.RESTARTING)
    except NotFound:
        return False


def _runs(context: Context, identifier: str) -> bool:
    try:
        return current(context, identifier).state in _RUNS
    except NotFound:
        return False
