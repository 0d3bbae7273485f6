"""Run further programs in a running instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hutch.drivers.base import ExecRequest
from hutch.engine.context import Context
from hutch.engine.finish import refresh
from hutch.engine.lookup import load
from hutch.engine.records import InstanceRecord
from hutch.errors import WrongState
from hutch.lifecycle import State
from hutch.process.supervisor import Supervisor
from hutch.spec.process import build_exec

__all__ = ["exec_process", "running"]


def running(context: Context, identifier: str) -> InstanceRecord:
    """Return the record of an instance that runs; raise `WrongState` for any other."""
    record = refresh(context, load(context, identifier))
    if record.state == State.PAUSED:
        raise WrongState(f"instance {record.name} is paused", hint="unpause it first")
    if record.state != State.RUNNING:
        raise WrongState(f"instance {record.name} is not running", hint="start it first")
    return record


def exec_process(
    context: Context,
    identifier: str,
    command: Sequence[str] | str,
    *,
    user: str | None = None,
    env: Mapping[str, str] | Sequence[str] | None = None,
    workdir: str | None = None,
    privileged: bool = False,
    tty: bool = False,
    stdin: bool = False,
    linger: bool = False,
    attach: int = 0,
    rows: int = 0,
    columns: int = 0,
) -> Supervisor:
    """Start a program inside and return the link to its supervisor; the caller closes it.

    Without `linger` the program is killed when the link is closed before its end. The
    environment is the instance's own with `env` on top, as in Docker.
    """
    record = running(context, identifier)
    spec = record.spec
    if spec.links:
        from hutch.engine.links import with_links

        spec = with_links(context, record)
    process = build_exec(
        spec.process,
        command,
        user=user,
        env=env,
        workdir=workdir,
        tty=tty,
        stdin=stdin,
    )
    request = ExecRequest(
        id=record.id,
        pid=record.pid,
        start_time=record.start_time,
        spec=record.spec,
        process=process,
        privileged=privileged,
        linger=linger,
        attach=attach,
        rows=rows,
        columns=columns,
    )
    return context.driver(record.spec.isolation).exec(request)
