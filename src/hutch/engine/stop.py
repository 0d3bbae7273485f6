"""Stop, kill, pause, restart and remove instances."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from hutch.drivers.base import Guests
from hutch.engine.context import Context
from hutch.engine.finish import (
    erase_ended,
    finish,
    has_ended,
    refresh,
    refresh_locked,
    remove_locked,
    with_room,
)
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load, load_in, require_settled
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.engine.start import start
from hutch.errors import Exhausted, NotFound, OperationTimeout, OutcomeUnknown, WrongState
from hutch.lifecycle import State
from hutch.process.supervisor import Supervisor
from hutch.spec.signals import parse_signal

__all__ = [
    "check_restartable",
    "connect",
    "current",
    "kill",
    "pause",
    "remove",
    "remove_ended",
    "restart",
]
__all__ += ["restart", "set_state", "stop", "unpause", "wait"]

_ATTEMPTS = 8
_KILL_TIMEOUT_S = 30.0
# For a guest that is to write out what its programs wrote; one that lives needs less.
_PUT_AWAY_S = 20.0
_LIVE = (State.RUNNING, State.PAUSED)


def connect(context: Context, record: InstanceRecord) -> Supervisor:
    """Return a new link to the supervisor of a running instance; the caller closes it."""
    if record.state not in _LIVE:
        raise WrongState(f"instance {record.name} is not running", hint="start it first")
    try:
        return Supervisor.connect(f"{context.directory(record.id)}/run")
    except (FileNotFoundError, ConnectionError) as exc:
        raise WrongState(f"instance {record.name} is not running") from exc


def current(context: Context, identifier: str) -> InstanceRecord:
    """Return the record with the truth about whether it runs."""
    return refresh(context, load(context, identifier))


def stop(
    context: Context,
    identifier: str,
    *,
    timeout_s: float | None = None,
    signal: str | int | None = None,
    by_user: bool = True,
) -> None:
    """Ask the program to end, and kill it after `timeout_s` (the instance's own if None).

    A virtual machine whose program had to be killed still writes out its file systems, for
    which it gets 20 s more; then it is ended as `kill` does. Stopping what does not run is no
    error, as in Docker. A negative time waits for ever. What is not stopped `by_user` may be
    started again by its restart policy, when somebody asks that.
    """
    record = current(context, identifier)
    if by_user:
        _mark_stopped(context, record)
    if record.state not in _LIVE:
        return
    signum = parse_signal(signal if signal is not None else record.spec.stop_signal)
    grace = record.spec.stop_timeout_s if timeout_s is None else timeout_s
    with instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        if record.state == State.PAUSED:
            _thaw(context, record)
    _end(context, record, signum, grace, orderly=True)


def _thaw(context: Context, record: InstanceRecord) -> None:
    context.driver(record.spec.isolation).unpause(record.id)
    set_state(context, record, State.RUNNING, "unpause")


def set_state(context: Context, record: InstanceRecord, state: State, event: str) -> None:
    """Record a state and its event. The lock is held."""
    with context.store.write() as tx:
        present = load_in(tx, record.id)
        tx.put(INSTANCES, record.id, msgspec.structs.replace(present, state=state))
        tx.event("container", event, record.id, name=record.name, image=record.image_name)


def _mark_stopped(context: Context, record: InstanceRecord) -> None:
    """Note that somebody stopped it, so that no restart policy starts it again."""
    with context.store.write(durable=not record.volatile) as tx:
        present = load_in(tx, record.id)
        state = State.EXITED if present.state == State.RESTARTING else present.state
        tx.put(
            INSTANCES,
            record.id,
            msgspec.structs.replace(present, stopped_by_user=True, state=state),
        )


def _end(
    context: Context, record: InstanceRecord, signum: int, grace: float, *, orderly: bool = False
) -> None:
    """Signal, wait, kill, wait, book. `orderly`: a guest may write out what it has first, and
    the journal tells of each signal."""
    try:
        link = connect(context, record)
    except WrongState:
        finish(context, record.id)
        return
    try:
        _claim(link)
        told = functools.partial(_tell_signal, context, record) if orderly else None
        ended = (
            (not (orderly and signum == 9) and _signal_and_wait(link, signum, grace, told))
            or (orderly and _put_away(context, record, link))
            or _signal_and_wait(link, 9, _KILL_TIMEOUT_S, told)
        )
    finally:
        finish(context, record.id)
        link.close()
    if not ended:
        raise OutcomeUnknown(
            f"instance {record.name} did not end {_KILL_TIMEOUT_S:.0f} s after SIGKILL",
            hint="a process may hang in the kernel; see `hutch top`",
        )
    if orderly:
        _event(context, record, "stop")


def _tell_signal(context: Context, record: InstanceRecord, signum: int) -> None:
    with suppress(Exhausted):  # its end is what matters
        _event(context, record, "kill", signal=str(signum))


def _put_away(context: Context, record: InstanceRecord, link: Supervisor) -> bool:
    """Let a guest kill its program and write out its file systems; tell whether it ended."""
    driver = context.driver(record.spec.isolation)
    if not isinstance(driver, Guests) or not driver.end_program(record.id):
        return False
    _tell_signal(context, record, 9)
    return _ended_within(link, _PUT_AWAY_S)


def _claim(link: Supervisor) -> None:
    """Take over from the supervisor's exit command, which would do the same again."""
    try:
        link.claim()
    except (ProcessLookupError, OutcomeUnknown):
        pass


def _signal_and_wait(
    link: Supervisor, signum: int, grace: float, told: Callable[[int], None] | None = None
) -> bool:
    """Signal the program; tell whether it ended in time. A lost supervisor is an end. `told` is
    called with the signal that was sent."""
    try:
        link.signal(signum)
    except (ProcessLookupError, OutcomeUnknown):
        return True
    if told is not None:
        told(signum)
    return _ended_within(link, None if grace < 0 else grace)


def _ended_within(link: Supervisor, timeout_s: float | None) -> bool:
    try:
        link.wait(timeout_s=timeout_s)
    except OperationTimeout:
        return False
    except (ProcessLookupError, OutcomeUnknown):
        pass
    return True


def _event(context: Context, record: InstanceRecord, action: str, **attributes: str) -> None:
    with context.store.write() as tx:
        tx.event(
            "container",
            action,
            record.id,
            name=record.name,
            image=record.image_name,
            **attributes,
        )


def kill(context: Context, identifier: str, signal: str | int = "SIGKILL") -> None:
    """Send a signal to the program; with SIGKILL, wait for the end and book it."""
    signum = parse_signal(signal)
    record = current(context, identifier)
    if record.state not in _LIVE:
        raise WrongState(f"instance {record.name} is not running")
    if signum == 9:
        with instance_lock(context, identifier):
            record = refresh_locked(context, load(context, identifier))
            if record.state == State.PAUSED:
                _thaw(context, record)
        _mark_stopped(context, record)
        _event(context, record, "kill", signal="9")
        _end(context, record, 9, _KILL_TIMEOUT_S)
        return
    link = connect(context, record)
    try:
        link.signal(signum)
    except ProcessLookupError as exc:
        raise WrongState(f"instance {record.name} is not running") from exc
    finally:
        link.close()
    _event(context, record, "kill", signal=str(signum))


def pause(context: Context, identifier: str, *, programs_only: bool = False) -> None:
    """Freeze a running instance; with `programs_only` what is beside them in a virtual
    machine still answers."""
    with instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        if record.state != State.RUNNING:
            raise WrongState(f"instance {record.name} is {record.state}: cannot be paused")
        driver = context.driver(record.spec.isolation)
        if programs_only and isinstance(driver, Guests):
            driver.freeze_programs(record.id)
        else:
            driver.pause(record.id)
        set_state(context, record, State.PAUSED, "pause")


def unpause(context: Context, identifier: str) -> None:
    """Let a paused instance go on."""
    with instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        if record.state != State.PAUSED:
            raise WrongState(f"instance {record.name} is not paused")
        _thaw(context, record)


def restart(
    context: Context,
    identifier: str,
    *,
    timeout_s: float | None = None,
    signal: str | int | None = None,
) -> None:
    """Stop it if it runs, then start it again."""
    check_restartable(context, identifier)
    stop(context, identifier, timeout_s=timeout_s, signal=signal)
    link = start(context, identifier)
    if link is not None:
        link.close()
    _event(context, load(context, identifier), "restart")


def check_restartable(context: Context, identifier: str) -> None:
    """Refuse to stop what could not be started again."""
    from hutch.engine.disk_keys import disk_key

    record = load(context, identifier)
    disk_key(context, record)
    if record.spec.auto_remove and record.state in (*_LIVE, State.STARTING):
        raise WrongState(
            f"instance {record.name} is removed when it ends (auto_remove): it cannot be restarted",
            hint="stop it, and run it anew",
        )


def wait(context: Context, identifier: str, timeout_s: float | None = None) -> int:
    """Wait until it does not run and return its exit code; raise `OperationTimeout`."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    record = current(context, identifier)
    while record.state in _LIVE or record.state == State.STARTING:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            link = connect(context, record)
        except WrongState:
            record = current(context, identifier)
            if record.state in (*_LIVE, State.STARTING):
                time.sleep(0.002)
            continue
        try:
            status = link.wait(timeout_s=left)
        except OutcomeUnknown:
            record = current(context, identifier)
            continue
        finally:
            link.close()
        return status.code
    return record.exit_code


def remove(
    context: Context, identifier: str, *, force: bool = False, remove_volumes: bool = False
) -> None:
    """Remove an instance; a running one only with `force`, which kills it first."""
    try:
        _remove(context, identifier, force=force, remove_volumes=remove_volumes)
    except Exhausted:
        record = load(context, identifier)
        if not force and record.state in (*_LIVE, State.STARTING):
            raise
        _remove_on_a_full_disk(context, record, remove_volumes=remove_volumes)


def remove_ended(context: Context, identifier: str, *, remove_volumes: bool) -> None:
    """Remove an instance that most likely has ended, and that is known to be of no use: in one
    look where it has, else as `remove` with `force`."""
    try:
        with instance_lock(context, identifier):
            record = load(context, identifier)
            if not has_ended(context, record) or not erase_ended(
                context, record, remove_volumes=remove_volumes
            ):
                _remove_ended(context, identifier, remove_volumes=remove_volumes)
    except (WrongState, Exhausted):
        remove(context, identifier, force=True, remove_volumes=remove_volumes)


def _remove_on_a_full_disk(
    context: Context, record: InstanceRecord, *, remove_volumes: bool
) -> None:
    """Remove an instance where not even its end can be recorded before its files are gone."""
    if record.state == State.PAUSED:
        context.driver(record.spec.isolation).unpause(record.id)
    if record.state in _LIVE:
        with suppress(WrongState):  # it has ended already
            _kill_unrecorded(context, record)
    with instance_lock(context, record.id):
        with_room(
            context,
            record,
            lambda: _remove_ended(context, record.id, remove_volumes=remove_volumes),
        )


def _kill_unrecorded(context: Context, record: InstanceRecord) -> None:
    link = connect(context, record)
    try:
        _claim(link)
        _signal_and_wait(link, 9, _KILL_TIMEOUT_S)
    finally:
        link.close()


def _remove_ended(context: Context, identifier: str, *, remove_volumes: bool) -> None:
    """Remove an instance that does not run; the lock is held."""
    record = refresh_locked(context, load(context, identifier))
    require_settled(record)
    if record.state in _LIVE:
        raise _StartedAgain(f"instance {record.name} was started again meanwhile")
    remove_locked(context, record, remove_volumes=remove_volumes)


class _StartedAgain(WrongState):
    """Its restart policy, or somebody, was quicker than its removal."""


def _remove(context: Context, identifier: str, *, force: bool, remove_volumes: bool) -> None:
    for _ in range(_ATTEMPTS if force else 1):
        try:
            _remove_once(context, identifier, force=force, remove_volumes=remove_volumes)
            return
        except _StartedAgain as exc:
            again = exc
    raise again


def _remove_once(context: Context, identifier: str, *, force: bool, remove_volumes: bool) -> None:
    record = current(context, identifier)
    if record.state in (*_LIVE, State.STARTING):
        if not force:
            raise WrongState(
                f"instance {record.name} is {record.state}", hint="stop it first, or use force"
            )
        try:
            kill(context, identifier)
        except (WrongState, NotFound):
            pass
    try:
        with instance_lock(context, identifier):
            _remove_ended(context, identifier, remove_volumes=remove_volumes)
    except NotFound:
        if not force and not record.spec.auto_remove:
            raise
