"""Let the instances that use a volume stand still while its files are read.

Who is paused for that is noted with who did it: were that process killed, `reconcile` lets them
go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from hutch.engine.context import Context
from hutch.engine.lookup import load
from hutch.engine.stop import pause, unpause
from hutch.errors import HutchError, NotFound
from hutch.lifecycle import State
from hutch.storage.leases import started

__all__ = ["awaken_abandoned", "quiet"]

_PAUSES = "volume_pauses"


class _Pause(msgspec.Struct, frozen=True, kw_only=True):
    """Who has paused an instance (its key): a process, by its id and start, in a boot."""

    pid: int
    started: int
    boot_id: str


@contextmanager
def quiet(context: Context, volume: str) -> Iterator[None]:
    """Pause the running instances that use a volume for the length of the block."""
    paused: list[str] = []
    try:
        for identifier in context.volumes.users(volume):
            with suppress(NotFound):
                if load(context, identifier).state == State.RUNNING:
                    _note(context, identifier)
                    paused.append(identifier)
                    pause(context, identifier)
        yield
    finally:
        for identifier in paused:
            _resume(context, identifier)


def _note(context: Context, identifier: str) -> None:
    mine = _Pause(pid=os.getpid(), started=started(os.getpid()) or 0, boot_id=context.boot_id)
    with context.store.write() as tx:
        tx.put(_PAUSES, identifier, mine)


def _resume(context: Context, identifier: str) -> None:
    with suppress(HutchError):  # it has ended, or somebody else let it go on
        unpause(context, identifier)
    with context.store.write() as tx:
        tx.delete(_PAUSES, identifier)


def awaken_abandoned(context: Context) -> None:
    """Let instances go on that a process paused which has been killed since."""
    with context.store.read() as tx:
        found = tx.items(_PAUSES, _Pause)
    for identifier, mark in found:
        if mark.boot_id != context.boot_id or started(mark.pid) != mark.started:
            _resume(context, identifier)
