"""Reservations in the store: what only one can have, and what is given out up to a limit.

A reservation is under its instance's identifier. It begins as a lease of the process that
makes the instance and ends with it, or after a while; a start turns it into the instance's
own, which ends with the instance's run or with this boot of the host.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import msgspec

from hutch.linux.boot import boot_time
from hutch.process.records import read_stat
from hutch.records import Transaction
from hutch.resources.demand import Demand, Holding

__all__ = ["RESERVATIONS", "Lease", "Reservation", "drop_void", "holding_of", "is_in_force"]
__all__ += ["new_lease"]

RESERVATIONS = "reservations"
# Making one may take long: a kernel is fetched, a disk made. It ends with the process anyway.
_MAKING_S = 24 * 3600.0
# Between the end of `create` and its start there is rarely more than this.
_MADE_S = 60.0


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds it until the start: a process by its start time, at most until a time by
    `boot_time`."""

    pid: int
    started: int
    expires_at: float


class Reservation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one instance has. `cpus` are processors of its own, `nodes` the memory nodes they
    are on; `lease` is empty once the instance itself holds it."""

    id: str
    name: str
    boot_id: str
    demand: Demand
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    lease: Lease | None = None


def new_lease(*, made: bool = False) -> Lease:
    """Return a lease of this process that begins now: for the time of making an instance, or,
    once it is `made`, for that until it is started."""
    own = read_stat(os.getpid())
    started = 0 if own is None else own.start_time
    expires_at = boot_time() + (_MADE_S if made else _MAKING_S)
    return Lease(pid=os.getpid(), started=started, expires_at=expires_at)


def is_in_force(
    reservation: Reservation, *, boot_id: str, live: Collection[str], now: float
) -> bool:
    """Tell whether a reservation counts; `live` are the instances that run or start,
    `now` the time by `boot_time`."""
    if reservation.boot_id != boot_id:
        return False
    if reservation.id in live:
        return True
    lease = reservation.lease
    if lease is None or lease.expires_at <= now:
        return False
    stat = read_stat(lease.pid)
    return stat is not None and not stat.ended and stat.start_time == lease.started


def drop_void(
    tx: Transaction, *, boot_id: str, live: Collection[str], now: float
) -> tuple[list[Reservation], bool]:
    """Return the reservations in force, the others deleted (a write transaction), and whether
    processors became free by that."""
    kept, freed = [], False
    for key, reservation in tx.items(RESERVATIONS, Reservation):
        if is_in_force(reservation, boot_id=boot_id, live=live, now=now):
            kept.append(reservation)
        else:
            tx.delete(RESERVATIONS, key)
            freed = freed or bool(reservation.cpus)
    return kept, freed


def holding_of(reservation: Reservation) -> Holding:
    """Return what a reservation takes from the others."""
    demand = reservation.demand
    return Holding(
        id=reservation.id,
        name=reservation.name,
        memory=demand.memory,
        cpus=demand.cpus,
        exclusive=reservation.cpus,
        pinned=demand.pinned,
        huge=demand.huge,
        devices=demand.devices,
        disk=demand.disk,
    )
