"""What follows an exit that no starter waited for: booking, restart policy, auto-remove."""

from __future__ import annotations

import time

import msgspec

from hutch.engine.context import Context
from hutch.engine.finish import finish
from hutch.engine.jobs.records import LABEL
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load, load_in
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.engine.start import start
from hutch.errors import HutchError, NotFound
from hutch.lifecycle import State

__all__ = ["after_exit", "wants_restart"]

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 60.0
_STEADY_S = 10.0


def after_exit(context: Context, identifier: str) -> None:
    """Book the exit, and start again where the policy wants it, with growing delays.

    The delay doubles from 100 ms to a minute while the program keeps ending within 10 s.
    """
    record = finish(context, identifier)
    if record is not None and LABEL in record.spec.labels:
        # Its dispatcher would have kept the link: it is gone, and somebody waits for the next.
        from hutch.engine.jobs.board import ensure_dispatcher

        ensure_dispatcher(context)
    while record is not None and wants_restart(record):
        generation = record.generation
        if not _announce(context, record):
            return
        time.sleep(_delay(record))
        try:
            present = load(context, identifier)
            if present.state != State.RESTARTING or present.generation != generation:
                return
            link = start(context, identifier, restarting=True)
            if link is not None:
                link.close()
            return
        except NotFound:
            return
        except HutchError:
            record = _failed(context, identifier)


def wants_restart(record: InstanceRecord) -> bool:
    """Tell whether the restart policy starts an exited instance again."""
    policy = record.spec.restart
    if record.state not in (State.EXITED, State.RESTARTING) or record.stopped_by_user:
        return False
    if policy.name == "on-failure":
        enough = policy.max_retries and record.restart_count >= policy.max_retries
        return record.exit_code != 0 and not enough
    return policy.name in ("always", "unless-stopped")


def _announce(context: Context, record: InstanceRecord) -> bool:
    """Move to restarting unless somebody was faster."""
    with instance_lock(context, record.id), context.store.write() as tx:
        present = load_in(tx, record.id)
        if present.generation != record.generation or not wants_restart(present):
            return False
        tx.put(
            INSTANCES,
            record.id,
            msgspec.structs.replace(
                present, state=State.RESTARTING, restart_count=present.restart_count + 1
            ),
        )
    return True


def _delay(record: InstanceRecord) -> float:
    if record.finished_ns - record.started_ns > _STEADY_S * 1e9:
        return _FIRST_DELAY_S
    return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(record.restart_count, 16))


def _failed(context: Context, identifier: str) -> InstanceRecord | None:
    """A start failed: the instance is exited again, and the policy is asked again."""
    try:
        with instance_lock(context, identifier), context.store.write() as tx:
            present = load_in(tx, identifier)
            exited = msgspec.structs.replace(
                present, state=State.EXITED, finished_ns=time.time_ns()
            )
            tx.put(INSTANCES, identifier, exited)
            return exited
    except NotFound:
        return None
