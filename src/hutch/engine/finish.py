"""What follows an exit: the truth into the store, kernel state removed, instances disposed of.

Every reader of a record goes through `refresh`: a supervisor writes down how its program
ended, and whoever looks first (the starter, another process, the supervisor's exit
command) books it. Booking twice is harmless.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from hutch.drivers.base import Losable
from hutch.engine.context import Context
from hutch.engine.gc import note_use
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load, load_in
from hutch.engine.mounts import close_volumes, note_volumes, release_mounts
from hutch.engine.records import INSTANCES, NAMES, RESERVATIONS, SUSPENDED, InstanceRecord
from hutch.errors import Busy, Exhausted, HutchError, NotFound
from hutch.lifecycle import State
from hutch.process.frames import ExitStatus
from hutch.process.records import (
    EXIT_LOST,
    EXIT_SAVED,
    is_child,
    is_supervised,
    read_exit,
    read_pid,
)
from hutch.records import Transaction
from hutch.storage.snapshots import is_limited

__all__ = [
    "CUT_SHORT",
    "dispose",
    "erase_ended",
    "finish",
    "has_ended",
    "refresh",
    "refresh_locked",
    "remove_locked",
    "with_room",
]

T = TypeVar("T")

# The error of one whose start was undone before its program began: it never ran.
CUT_SHORT = "the start was cut short"
_DRAIN_S = 60.0
_ROOM_S = 5.0
_LIVE = (State.STARTING, State.RUNNING, State.PAUSED)


def refresh(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Return the record as it is now, booking an exit that nobody has booked yet."""
    if record.state not in _LIVE:
        return record
    # Who starts it holds the lock: then it is starting, and need not be waited for.
    timeout_s = 0.0 if record.state == State.STARTING else 10.0
    if record.state != State.STARTING and _is_running(context, record):
        return record
    try:
        with instance_lock(context, record.id, timeout_s=timeout_s):
            return refresh_locked(context, load(context, record.id))
    except Busy:
        return record


def refresh_locked(context: Context, record: InstanceRecord) -> InstanceRecord:
    """The same for a caller that holds the instance's lock."""
    if record.state not in _LIVE:
        return record
    if not _is_running(context, record):
        return _book_exit(context, record)
    if record.state == State.STARTING:
        return _book_start(context, record)
    return record


def _book_start(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Record the start of an instance whose starter died before it could. The lock is held,
    so nobody is about to."""
    started = read_pid(f"{context.directory(record.id)}/run")
    if started is None or not _has_started(f"{context.directory(record.id)}/run"):
        return record
    with context.store.write() as tx:
        updated = msgspec.structs.replace(
            load_in(tx, record.id),
            state=State.RUNNING,
            pid=started.pid,
            start_time=started.start_time,
            supervisor=started.supervisor,
            started_ns=time.time_ns(),
            finished_ns=0,
            exit_code=0,
            error="",
            oom_killed=False,
            generation=record.generation + 1,
        )
        tx.put(INSTANCES, record.id, updated)
        note_volumes(tx, updated, "mount")
        tx.event("container", "start", record.id, name=record.name, image=record.image_name)
    return updated


def _has_started(directory: str) -> bool:
    """Ask the supervisor whether the program runs: it may be undoing the launch."""
    from hutch.process.supervisor import Supervisor

    try:
        with Supervisor.connect(directory) as link:
            return link.query().phase != "launching"
    except (OSError, HutchError):
        return False


def _is_running(context: Context, record: InstanceRecord) -> bool:
    if record.boot_id != context.boot_id:
        return False
    if record.supervisor and is_child(record.pid, record.start_time, record.supervisor):
        return True
    directory = f"{context.directory(record.id)}/run"
    # A set-user-id program may outlive its supervisor: nobody holds its streams then. One that
    # has ended before its supervisor has told how is about to be told of.
    return read_exit(directory) is None and is_supervised(directory)


def finish(context: Context, identifier: str) -> InstanceRecord | None:
    """Book the exit of an instance whose program has ended, and remove it if it asked for
    that. Return the record as booked, or None when somebody else has removed it."""
    try:
        with instance_lock(context, identifier, patient=True):
            record = load(context, identifier)
            if not record.spec.auto_remove:
                return refresh_locked(context, record)
            try:
                return _finish_and_remove(context, record)
            except Exhausted:
                return with_room(context, record, lambda: _finish_and_remove(context, record))
    except NotFound:
        return None


def with_room(context: Context, record: InstanceRecord, act: Callable[[], T]) -> T:
    """Do something on a full disk, where what an instance wrote is to go in any case: that
    may be what filled it. The lock is held, and the program has ended.

    The space of deleted files comes back when the supervisor has let go of the overlay,
    a moment after it has told the exit.
    """
    context.trash.discard(f"{context.directory(record.id)}/upper")
    context.trash.drain(_DRAIN_S)
    deadline = time.monotonic() + _ROOM_S
    while True:
        try:
            return act()
        except Exhausted:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _finish_and_remove(context: Context, record: InstanceRecord) -> InstanceRecord:
    if record.state in _LIVE:
        if _is_running(context, record):
            return record
        return erase_ended(context, record) or _book_exit(context, record)
    if record.state == State.EXITED:
        _erase(context, record)
    return record


def erase_ended(
    context: Context, record: InstanceRecord, *, remove_volumes: bool = True
) -> InstanceRecord | None:
    """Remove an instance whose program has ended, which nobody has booked: one transaction does
    both. Return how it ended, None for one that is suspended and stays. The lock is held.

    Cut short, it leaves a record without a directory, which `reconcile` drops.
    """
    seen = _observe(context, record)
    if seen.state == State.SUSPENDED:
        return None
    _erase(context, seen, died=True, remove_volumes=remove_volumes)
    return seen


def has_ended(context: Context, record: InstanceRecord) -> bool:
    """Tell whether the program of an instance has ended and nobody has booked that."""
    return record.state in _LIVE and not _is_running(context, record)


def _observe(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Return the record with how the program ended, and remove what the kernel still holds.

    The lock is held. Nothing is stored yet: done again, it has the same result.
    """
    directory = f"{context.directory(record.id)}/run"
    same_boot = record.boot_id == context.boot_id
    status = read_exit(directory) if same_boot else None
    begun = not same_boot or record.state != State.STARTING or _has_begun(directory)
    driver = context.driver(record.spec.isolation)
    if status is None and same_boot:
        # The supervisor was killed: its program dies with it, but that may take a moment.
        driver.kill_all(record.id)
    oom = same_boot and driver.oom_kills(record.id) > 0
    driver.cleanup(record.id)
    _leave_networks(context, record)
    close_volumes(context, record)
    if record.spec.placement.memory == "pool":
        context.memory_pool.give_back(record.id)
    if _was_suspended(context, record, status):
        return _as_suspended(record, status.time_ns if status else time.time_ns())
    error = record.error
    if status is None and begun:
        error = "the supervisor was killed" if same_boot else "the host was restarted"
    elif status is None:
        error = CUT_SHORT
    elif status.code == EXIT_LOST and isinstance(driver, Losable):
        error = driver.why_lost(record.id)
    return msgspec.structs.replace(
        record,
        state=State.EXITED,
        pid=0,
        exit_code=status.code if status is not None else 137,
        oom_killed=oom,
        # A starter notes the start when it hears of it: by then a quick program has ended.
        finished_ns=max(
            status.time_ns if status is not None else time.time_ns(), record.started_ns
        ),
        error=error,
    )


def _has_begun(directory: str) -> bool:
    """Tell whether a program may have run whose starter is dead. The supervisor writes its
    `pid` before it lets the program begin; one that finds its starter dead then undoes it."""
    return read_pid(directory) is not None and not is_supervised(directory)


def _was_suspended(context: Context, record: InstanceRecord, status: ExitStatus | None) -> bool:
    directory = context.directory(record.id) / SUSPENDED
    if not directory.is_dir():
        return False
    if record.spec.isolation == "vm":
        return status is not None and status.code == EXIT_SAVED
    # It has its name only once the memory is on disk; then the processes are killed.
    from hutch.engine.container_states import holds_memory_of

    return holds_memory_of(directory, record)


def _as_suspended(record: InstanceRecord, time_ns: int) -> InstanceRecord:
    return msgspec.structs.replace(
        record, state=State.SUSPENDED, pid=0, exit_code=0, finished_ns=time_ns, error=""
    )


def _leave_networks(context: Context, record: InstanceRecord) -> None:
    if context.rootless:
        from hutch.network import user

        user.stop(context.directory(record.id) / "run")
    else:
        context.networks.detach(record.id)


def _book_exit(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Record the exit of an instance that stays. The lock is held."""
    seen = _observe(context, record)
    if seen.state != State.SUSPENDED:
        context.trash.discard(str(context.directory(record.id) / SUSPENDED))
    with context.store.write() as tx:
        updated = msgspec.structs.replace(
            load_in(tx, record.id),
            state=seen.state,
            pid=0,
            exit_code=seen.exit_code,
            oom_killed=seen.oom_killed,
            finished_ns=seen.finished_ns,
            error=seen.error,
        )
        tx.put(INSTANCES, record.id, updated)
        held = tx.delete(RESERVATIONS, record.id)
        if updated.state == State.SUSPENDED:
            _say(tx, updated, "suspend")
        else:
            _died(tx, updated)
    # Not before it is in the store: whoever is killed here has told how it ended.
    for name in ("exit", "pid", "ctl.sock"):
        _unlink(f"{context.directory(record.id)}/run/{name}")
    if held:
        _settle(context)
    return updated


def _settle(context: Context) -> None:
    """Share again what processors the instance had to itself."""
    from hutch.engine.admitting import settle_cpus

    settle_cpus(context)


def _say(tx: Transaction, record: InstanceRecord, action: str) -> None:
    tx.event("container", action, record.id, name=record.name, image=record.image_name)


def _died(tx: Transaction, record: InstanceRecord) -> None:
    ran_s = max(record.finished_ns - record.started_ns, 0) // 1_000_000_000
    attributes = {"name": record.name, "image": record.image_name}
    if record.error:
        attributes["error"] = record.error
    if record.oom_killed:
        tx.event("container", "oom", record.id, **attributes)
    ended = {"exitCode": str(record.exit_code), "execDuration": str(ran_s)}
    tx.event("container", "die", record.id, **ended, **attributes)
    note_volumes(tx, record, "unmount")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_locked(context: Context, record: InstanceRecord, *, remove_volumes: bool) -> None:
    """Remove an instance that is not running: marked first, then what it had on disk.

    A removal cut short is taken up by `reconcile`: the record stays in state removing
    until the rest is gone.
    """
    with context.store.write() as tx:
        tx.put(INSTANCES, record.id, msgspec.structs.replace(record, state=State.REMOVING))
    _leave_networks(context, record)
    context.driver(record.spec.isolation).cleanup(record.id)
    _erase(context, record, remove_volumes=remove_volumes)


def _erase(
    context: Context,
    record: InstanceRecord,
    *,
    died: bool = False,
    remove_volumes: bool = True,
) -> None:
    """Remove files and record of an instance that the kernel no longer knows."""
    release_mounts(context, record, remove_anonymous=remove_volumes)
    dispose(context, record.id)
    with context.store.write() as tx:
        context.snapshots.forget(tx, record.id)
        if record.spec.isolation == "vm":
            context.kernels.forget(tx, record.id)
        tx.delete(INSTANCES, record.id)
        tx.delete(NAMES, record.name)
        note_use(tx, record.image_id)
        held = tx.delete(RESERVATIONS, record.id)
        if died:
            _died(tx, record)
        tx.event("container", "destroy", record.id, name=record.name, image=record.image_name)
    if held:
        _settle(context)


def dispose(context: Context, identifier: str) -> None:
    """Remove an instance's directory with its writable layer; safe to repeat."""
    directory = str(context.directory(identifier))
    try:
        if is_limited(directory):
            from hutch.storage.limited import release_limited

            release_limited(directory)
        context.trash.discard(directory)
    except OSError as exc:
        raise HutchError(f"{context.directory(identifier)}: {exc.strerror}") from exc
