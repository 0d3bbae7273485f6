"""Suspend a machine: its memory to disk, QEMU ended; a start lets it go on."""

from __future__ import annotations

import os

from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load
from hutch.engine.records import SUSPENDED
from hutch.engine.saved import keep_addresses, require_running, savable, sync_assets
from hutch.engine.stop import connect
from hutch.errors import OutcomeUnknown, WrongState
from hutch.lifecycle import State, move
from hutch.storage.faults import disk_errors

__all__ = ["discard_suspended", "suspend"]

_END_S = 60.0


def suspend(context: Context, identifier: str) -> None:
    """Save a running machine's memory and end it. It comes back with the addresses it had, or
    with others where somebody has taken them meanwhile.

    Killed at any moment, the instance either runs or is suspended.
    """
    driver = savable(context, load(context, identifier), "suspend")
    sync_assets(context)
    with disk_errors(f"suspend of {identifier[:12]}"), instance_lock(context, identifier):
        record = require_running(context, identifier, "suspend")
        move(record.state, State.SUSPENDED, name=record.name)
        directory = context.directory(identifier)
        partial = directory / f".{SUSPENDED}"
        for leftover in (partial, directory / SUSPENDED):
            context.trash.discard(str(leftover))
        os.mkdir(partial, 0o700)
        keep_addresses(context, record, partial)
        with connect(context, record) as link:
            try:
                driver.save(
                    identifier,
                    str(partial),
                    cards=len(record.endpoints),
                    end_as=str(directory / SUSPENDED),
                )
            except BaseException:
                context.trash.discard(str(partial))
                raise
            try:
                link.wait(_END_S)
            except OutcomeUnknown:
                pass  # it has ended; its record tells how
        after = refresh_locked(context, load(context, identifier))
    if after.state != State.SUSPENDED:
        raise WrongState(f"instance {record.name} ended ({after.exit_code}) while it was saved")


def discard_suspended(context: Context, identifier: str) -> None:
    """Forget the memory of a suspended instance: its next start begins anew."""
    from hutch.engine.stop import set_state

    with instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        if record.state != State.SUSPENDED:
            return
        set_state(context, record, State.EXITED, "discard")
        context.trash.discard(str(context.directory(identifier) / SUSPENDED))
