"""Migrate a container with its memory: both sides, from the offer's answer to the decision.

What can be sent while it runs is; then it is frozen, CRIU saves it, and the target brings it
back up to where nothing runs yet. Only then does the source decide: until then it goes on here
whatever fails, and afterwards there, or nowhere if the target declines.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import msgspec

from hutch.drivers.base import Savable, SavedState
from hutch.drivers.moving import Holdable
from hutch.engine.context import Context
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load
from hutch.engine.migrate_land import activate_started, kept
from hutch.engine.migrate_live import LiveResult, decide, let_run, sending
from hutch.engine.migrate_send import Sender, addresses_of
from hutch.engine.migrate_settle import put
from hutch.engine.records import SUSPENDED, InstanceRecord
from hutch.engine.saved import require_running
from hutch.engine.start import attachments
from hutch.engine.start import land as start_here
from hutch.errors import IntegrityError, Unsupported
from hutch.host.criu import load_criu
from hutch.lifecycle import State
from hutch.migration import messages as say
from hutch.migration.links import Destination
from hutch.migration.records import MigrationRecord
from hutch.migration.wire import Wire
from hutch.records import ProgressEvent
from hutch.storage.faults import disk_errors

__all__ = ["criu_obstacles", "land_container", "move_container", "offer_criu"]

_LEAVING = ".leaving"


# ---- the source -----------------------------------------------------------------------------


def offer_criu(context: Context, record: InstanceRecord) -> say.Criu:
    """Return what the target must know of a container that comes with its memory."""
    return say.Criu(
        version=load_criu(context.root / "cache").version,
        kernel=os.uname().release,
        addresses=addresses_of(context, record),
    )


def move_container(
    context: Context, there: Destination, wire: Wire, sender: Sender, token: str
) -> LiveResult:
    """Save it, have it brought back there, decide; the rest is the caller's to complete."""
    identifier = sender.record.id
    directory = context.directory(identifier)
    leaving = directory / _LEAVING
    with ExitStack() as stack:
        stack.enter_context(instance_lock(context, identifier))
        record = require_running(context, identifier, "migration")
        migration = put(context, sending(record, there, token))
        sender.send_logs()
        sender.send_files_ahead()
        context.trash.discard(str(leaving))
        stack.callback(context.trash.discard, str(leaving))
        with disk_errors(f"migration of {record.name}"):
            os.mkdir(leaving, 0o700)
        driver = context.containers
        assert isinstance(driver, Holdable)
        held = stack.enter_context(driver.hold_still(identifier))
        stopped = time.monotonic()
        sender.progress(ProgressEvent(item=record.name, phase="saving its memory"))
        held.save_memory(str(leaving))
        sender.send_container(str(leaving))
        sender.progress(ProgressEvent(item=record.name, phase="switching over"))
        instance = msgspec.Raw(msgspec.json.encode(record))
        wire.send(say.Prepare(instance=instance, previous=State.RUNNING, resume=True))
        arrived = wire.expect(say.Prepared).id
        migration = decide(context, migration)
        held.let_go()
    downtime_s, offline_s, lost = let_run(wire, token, stopped)
    return LiveResult(
        id=arrived,
        migration=migration,
        sent=sender.sent,
        downtime_s=downtime_s,
        offline_s=offline_s,
        passes=1,
        post_copied=False,
        lost=lost,
    )


# ---- the target -----------------------------------------------------------------------------


def criu_obstacles(context: Context, offer: say.Criu, record: InstanceRecord) -> list[str]:
    """Return why CRIU cannot bring the container back here."""
    driver = context.containers
    assert isinstance(driver, Savable)
    try:
        driver.check_savable(record.spec)
        here = load_criu(context.root / "cache").version
    except Unsupported as exc:
        return [f"target: {exc.message}" + (f" ({exc.hint})" if exc.hint else "")]
    if _numbers(here) < _numbers(offer.version):
        return [f"CRIU {offer.version} saves it, and the target has {here}, which is older"]
    return []


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def land_container(
    context: Context, wire: Wire, migration: MigrationRecord, offer: say.Criu
) -> None:
    """Bring a container back; when it returns, it runs here and the source knows. The
    instance's lock is held."""
    record = load(context, migration.instance)
    saved = context.directory(record.id) / SUSPENDED
    told = 0.0

    def wait_for_decision() -> None:
        nonlocal told
        wire.send(say.Prepared(id=record.id))
        if wire.expect(say.Commit).token != migration.token:
            raise IntegrityError("the source decides about another migration")
        told = time.monotonic()

    started, endpoints = start_here(
        context,
        record,
        kept(attachments(record), offer.addresses),
        saved=SavedState(directory=str(saved)),
        before_go=wait_for_decision,
    )
    resumed = time.monotonic() - told
    with started.supervisor:
        activate_started(context, migration, started, endpoints)
    context.trash.discard(str(saved))
    wire.send(say.Committed(resumed_s=resumed, answered_s=time.monotonic() - told))
