"""What follows an exit: the truth into the store, kernel state removed, instances disposed of.

Every reader of a record goes through `refresh`: a supervisor writes down how its program
ended, and whoever looks first (the starter, another process, the supervisor's exit
command) books it. Booking twice is harmless.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence

import msgspec

from hutch.engine.context import Context
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load, load_in
from hutch.engine.mounts import release_mounts
from hutch.engine.records import INSTANCES, NAMES, InstanceRecord
from hutch.errors import Busy, HutchError, NotFound
from hutch.lifecycle import State
from hutch.process.records import is_alive, read_exit

__all__ = ["dispose", "finish", "refresh", "refresh_locked", "remove_locked"]

_LIVE = (State.STARTING, State.RUNNING, State.PAUSED)
_UNKNOWN_EXIT = 255


def refresh(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Return the record as it is now, booking an exit that nobody has booked yet."""
    if record.state not in _LIVE or _is_running(context, record):
        return record
    try:
        with instance_lock(context, record.id, timeout_s=10):
            return refresh_locked(context, load(context, record.id))
    except Busy:
        return record


def refresh_locked(context: Context, record: InstanceRecord) -> InstanceRecord:
    """The same for a caller that holds the instance's lock."""
    if record.state not in _LIVE or _is_running(context, record):
        return record
    return _book_exit(context, record)


def _is_running(context: Context, record: InstanceRecord) -> bool:
    if record.boot_id != context.boot_id:
        return False
    directory = f"{context.directory(record.id)}/run"
    return read_exit(directory) is None and is_alive(directory)


def finish(context: Context, identifier: str) -> InstanceRecord | None:
    """Book the exit of an instance whose program has ended, and remove it if it asked for
    that. Return the record as booked, or None when somebody else has removed it."""
    try:
        with instance_lock(context, identifier):
            record = refresh_locked(context, load(context, identifier))
            if record.spec.auto_remove and record.state == State.EXITED:
                remove_locked(context, record, remove_volumes=True)
            return record
    except NotFound:
        return None


def _book_exit(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Record the exit and remove what the kernel still holds. The lock is held."""
    directory = f"{context.directory(record.id)}/run"
    status = read_exit(directory) if record.boot_id == context.boot_id else None
    driver = context.driver(record.spec.isolation)
    if status is None and record.boot_id == context.boot_id:
        # The supervisor was killed: its program dies with it, but that may take a moment.
        driver.kill_all(record.id)
    code = status.code if status is not None else 137
    oom = driver.oom_kills(record.id) > 0 if record.boot_id == context.boot_id else False
    finished_ns = status.time_ns if status is not None else time.time_ns()
    error = record.error
    if status is None:
        error = (
            "the supervisor was killed"
            if record.boot_id == context.boot_id
            else ("the host was restarted")
        )
    driver.cleanup(record.id)
    context.networks.detach(record.id)
    for name in ("exit", "pid", "ctl.sock"):
        _unlink(f"{directory}/{name}")
    with context.store.write() as tx:
        updated = msgspec.structs.replace(
            load_in(tx, record.id),
            state=State.EXITED,
            pid=0,
            exit_code=code,
            oom_killed=oom,
            finished_ns=finished_ns,
            error=error,
        )
        tx.put(INSTANCES, record.id, updated)
        attributes = {"name": record.name, "image": record.image_name, "exitCode": str(code)}
        if oom:
            tx.event("container", "oom", record.id, name=record.name, image=record.image_name)
        tx.event("container", "die", record.id, **attributes)
    return updated


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_locked(context: Context, record: InstanceRecord, *, remove_volumes: bool) -> None:
    """Remove an instance that is not running: record first, then what it had on disk.

    A removal cut short is taken up by `reconcile`: the record stays in state removing
    until the rest is gone.
    """
    with context.store.write() as tx:
        tx.put(INSTANCES, record.id, msgspec.structs.replace(record, state=State.REMOVING))
    release_mounts(context, record, remove_anonymous=remove_volumes)
    context.networks.detach(record.id)
    context.driver(record.spec.isolation).cleanup(record.id)
    dispose(context, record.id, ())
    with context.store.write() as tx:
        tx.delete(INSTANCES, record.id)
        tx.delete(NAMES, record.name)
        tx.event("container", "destroy", record.id, name=record.name, image=record.image_name)


def dispose(context: Context, identifier: str, volumes: Sequence[str]) -> None:
    """Remove an instance's directory and writable layer; safe to repeat."""
    context.snapshots.remove(identifier)
    directory = context.directory(identifier)
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise HutchError(f"{directory}: {exc.strerror}") from exc
