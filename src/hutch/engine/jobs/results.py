"""What is kept of a job: its log and its outputs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.jobs.attempt import directory_of
from hutch.engine.jobs.board import load_job
from hutch.engine.jobs.records import JobRecord
from hutch.errors import InvalidArgument, NotFound, WrongState

if TYPE_CHECKING:
    from hutch.process.logfile import LogRecord

__all__ = ["job_logs", "save_outputs"]

_POLL_S = 0.05


def job_logs(
    context: Context, number: int, *, follow: bool, tail: int | None
) -> Iterator[LogRecord]:
    """Yield what a job's program wrote, from its instance while there is one."""
    from hutch.engine.logs import logs
    from hutch.process.logfile import read_log

    record = load_job(context, number)
    if follow:
        record = _wait_begun(context, number)
    if record.instance and not record.state.is_final:
        try:
            yield from logs(
                context,
                record.instance,
                follow=follow,
                since=None,
                until=None,
                tail=tail,
                stdout=True,
                stderr=True,
            )
            return
        except NotFound:
            pass  # it has ended meanwhile
    yield from read_log(str(directory_of(context, number) / "log"), tail=tail)


def _wait_begun(context: Context, number: int) -> JobRecord:
    while True:
        record = load_job(context, number)
        if record.instance or record.state.is_final:
            return record
        time.sleep(_POLL_S)


def save_outputs(context: Context, number: int, directory: str | os.PathLike[str]) -> list[str]:
    """Unpack what was kept of a job into a directory, made if there is none; return the names
    there.

    Raises `WrongState` for a job that is not over, `NotFound` where a path was not there,
    `InvalidArgument` for what is no directory.
    """
    record = load_job(context, number)
    if not record.state.is_final:
        raise WrongState(f"job {number} is {record.state}: nothing is kept of it yet")
    try:
        with suppress(FileExistsError):
            os.makedirs(directory)
        root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise InvalidArgument(
            f"{os.fspath(directory)}: {(exc.strerror or '').lower()}", field="directory"
        ) from exc
    try:
        return [_unpack(context, record, i, root) for i in range(len(record.outputs))]
    finally:
        os.close(root)


def _unpack(context: Context, record: JobRecord, i: int, root: int) -> str:
    from hutch.storage import tree

    path = record.outputs[i]
    owner = None if os.geteuid() == 0 else (os.getuid(), os.getgid())
    try:
        with open(directory_of(context, record.id) / f"output-{i}.tar", "rb") as stream:
            # A machine's guest made it.
            tree.extract(root, "/", stream, owner=owner, within=_own_name(path))
    except FileNotFoundError:
        raise NotFound(
            f"job {record.id}: there was no {path} when it ended",
            hint=f"`hutch job logs {record.id}` may tell why",
        ) from None
    return _own_name(path) or "/"


def _own_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
