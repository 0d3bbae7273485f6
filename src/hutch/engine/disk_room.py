"""Room on the root's disk for volumes and pools of a size: held while they are made or grown,
and by themselves from then on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hutch.engine.records import RESERVATIONS
from hutch.resources.settings import FILE
from hutch.storage.promises import Promise, is_beside, promises

if TYPE_CHECKING:
    from hutch.engine.context import Context
    from hutch.records import Transaction
    from hutch.resources.demand import Holding

__all__ = ["admit_promise", "promised_disk"]


@contextmanager
def admit_promise(context: Context, promise: Promise) -> Iterator[None]:
    """Hold room for what a volume or pool may come to take while the block makes it; its record
    counts afterwards. Raises `NoRoom`, and nothing was made."""
    root = str(context.root)
    if not promise.size or not os.path.exists(f"{root}/{FILE}"):
        yield
        return
    from hutch.resources.settings import load_settings

    if not load_settings(context.root).limits_disk or not is_beside(root, promise.place):
        yield
        return
    _take(context, promise)
    try:
        yield
    finally:
        with context.store.write() as tx:
            tx.delete(RESERVATIONS, promise.key)


def _take(context: Context, promise: Promise) -> None:
    from hutch.engine.admitting import holdings, inventory
    from hutch.resources.admission import NoRoom, decide
    from hutch.resources.demand import Demand
    from hutch.resources.reservations import Reservation, new_lease
    from hutch.resources.settings import load_settings

    settings, host = load_settings(context.root), inventory(context)
    demand = Demand(disk=promise.size)
    with context.store.write() as tx:
        others = holdings(context, tx, settings, without=promise.key)
        decision = decide(host, settings, others, demand)
        if not decision.fits:
            raise NoRoom(promise.name, decision)
        taken = Reservation(
            id=promise.key,
            name=promise.name,
            boot_id=context.boot_id,
            demand=demand,
            lease=new_lease(),
        )
        tx.put(RESERVATIONS, promise.key, taken)


def promised_disk(context: Context, tx: Transaction) -> list[Holding]:
    """Return what volumes and pools hold of the root's disk."""
    from hutch.resources.demand import Holding

    return [
        Holding(id=promise.key, name=promise.name, disk=promise.size)
        for promise in promises(tx, str(context.root))
    ]
