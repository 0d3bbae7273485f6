"""What follows an exit that no starter waited for: booking, restart policy, auto-remove."""

from __future__ import annotations

import time

import msgspec

from hutch.engine.builder.leftovers import is_step, sweep
from hutch.engine.context import Context
from hutch.engine.finish import finish
from hutch.engine.jobs.records import LABEL
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load, load_in
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.engine.start import start
from hutch.errors import HutchError, NotFound
from hutch.lifecycle import State
from hutch.process.supervisor import Supervisor

__all__ = ["Again", "after_exit", "plan_restart", "settle_exit", "start_again", "wants_restart"]

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 60.0
_STEADY_S = 10.0


def after_exit(context: Context, identifier: str) -> None:
    """Book the exit, and start again where the policy wants it, with growing delays.

    The delay doubles from 100 ms to a minute while the program keeps ending within 10 s.
    """
    again = settle_exit(context, identifier)
    while again is not None:
        time.sleep(again.delay_s)
        link, again = start_again(context, again)
        if link is not None:
            link.close()


class Again(msgspec.Struct, frozen=True):
    """An instance that is to be started again, unless somebody does something with it in the
    `delay_s` until then."""

    id: str
    generation: int
    delay_s: float


def settle_exit(context: Context, identifier: str) -> Again | None:
    """Book an exit; return what its restart policy wants, which is announced already."""
    record = finish(context, identifier)
    if record is not None and is_step(record):
        sweep(context)  # its build would have kept the link: it is gone, with all that it held
        return None
    if record is not None and LABEL in record.spec.labels:
        # Its dispatcher would have kept the link: it is gone, and somebody waits for the next.
        from hutch.engine.jobs.board import ensure_dispatcher

        ensure_dispatcher(context)
    return None if record is None else plan_restart(context, record)


def plan_restart(context: Context, record: InstanceRecord) -> Again | None:
    """Announce that an instance is started again where its policy says so."""
    if not wants_restart(record) or not _announce(context, record):
        return None
    return Again(record.id, record.generation, _delay(record))


def start_again(context: Context, again: Again) -> tuple[Supervisor | None, Again | None]:
    """Start it now, if nobody else has done anything with it; return the link to it, or when
    it failed what the policy wants then."""
    try:
        present = load(context, again.id)
        if present.state != State.RESTARTING or present.generation != again.generation:
            return None, None
        return start(context, again.id, restarting=True), None
    except NotFound:
        return None, None
    except HutchError:
        record = _failed(context, again.id)
        return None, None if record is None else plan_restart(context, record)


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
