"""Decide what instances get of the host, and note it: the part of `hutch.engine.reserve` that is
loaded only where there is something to decide.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.records import INSTANCES, RESERVATIONS, InstanceRecord
from hutch.engine.reserve import SHARED_CPUS, within
from hutch.lifecycle import State
from hutch.spec.model import InstanceSpec

if TYPE_CHECKING:
    from hutch.engine.context import Context
    from hutch.records import Transaction
    from hutch.resources.admission import Decision
    from hutch.resources.demand import Demand, Holding
    from hutch.resources.inventory import Inventory
    from hutch.resources.reservations import Reservation
    from hutch.resources.settings import Settings

__all__ = ["bound_parent", "decide_for", "grow", "holdings", "inventory", "is_live", "settle_cpus"]
__all__ += ["shorten_lease", "shrink", "take", "take_again", "try_take"]

_HOLDING = (State.STARTING, State.RUNNING, State.PAUSED, State.RESTARTING)
_SETTLE_S = 30.0


def inventory(context: Context) -> Inventory:
    """Return what the host has for instances of this root."""
    from hutch.linux.cgroup import bound_cpusets
    from hutch.resources.inventory import read_inventory

    cpus, mems = bound_cpusets()
    return read_inventory(cpuset=cpus, mems=mems, rooms=(str(context.root),))


def holdings(
    context: Context,
    tx: Transaction,
    settings: Settings,
    *,
    without: str = "",
    volumes: bool = False,
) -> list[Holding]:
    """Return what everybody but `without` holds (a write transaction: what is void goes);
    volumes and pools where disk is given out up to a limit, or they are asked for."""
    from hutch.linux.boot import boot_time
    from hutch.resources.reservations import drop_void, holding_of

    records = dict(tx.items(INSTANCES, InstanceRecord))
    live = {key for key, record in records.items() if is_live(context, record)}
    kept, _ = drop_void(tx, boot_id=context.boot_id, live=live, now=boot_time())
    reserved = {reservation.id: reservation for reservation in kept}
    found = [holding_of(r) for r in kept if r.id != without]
    for key, record in records.items():
        if key != without and key not in reserved:
            found.append(_unreserved(record, settings, live=key in live))
    if volumes or settings.limits_disk:
        from hutch.engine.disk_room import promised_disk

        promised = promised_disk(context, tx)
        found += [one for one in promised if one.id != without and one.id not in reserved]
    return found


def is_live(context: Context, record: InstanceRecord) -> bool:
    return record.state in _HOLDING and record.boot_id == context.boot_id


def _unreserved(record: InstanceRecord, settings: Settings, *, live: bool) -> Holding:
    """Return what an instance holds that was started when nothing was given out by amount."""
    from hutch.resources.demand import Holding, demand_of

    demand = demand_of(record.spec, settings)
    if not live:
        return Holding(id=record.id, name=record.name, disk=demand.disk)
    return Holding(
        id=record.id,
        name=record.name,
        memory=demand.memory,
        cpus=demand.cpus or demand.exclusive,
        pinned=demand.pinned,
        disk=demand.disk,
    )


def decide_for(context: Context, demand: Demand, *, without: str = "") -> Decision:
    """Say whether a demand would fit now; nothing is taken."""
    from hutch.resources.admission import decide
    from hutch.resources.settings import load_settings

    settings = load_settings(context.root)
    host = inventory(context)
    with context.store.write() as tx:
        return decide(host, settings, holdings(context, tx, settings, without=without), demand)


def take(
    context: Context, identifier: str, spec: InstanceSpec, name: str, *, leased: bool
) -> Reservation | None:
    """Decide and note it, in one transaction. An instance that ended and that nobody has booked
    may be in the way, so that a refusal is looked at twice."""
    from hutch.resources.admission import NoRoom

    decision, taken = _try(context, identifier, spec, name, leased=leased)
    if not decision.fits and _book_ended(context):
        decision, taken = _try(context, identifier, spec, name, leased=leased)
    if not decision.fits:
        raise NoRoom(name, decision)
    return taken


def try_take(context: Context, identifier: str, spec: InstanceSpec, name: str) -> Decision:
    """Take what an instance will need that is not made yet, under a lease of this process, in
    the caller's transaction if there is one; where it does not fit, nothing is taken."""
    return _try(context, identifier, spec, name, leased=True)[0]


def _try(
    context: Context, identifier: str, spec: InstanceSpec, name: str, *, leased: bool
) -> tuple[Decision, Reservation | None]:
    from hutch.resources.admission import decide
    from hutch.resources.demand import demand_of
    from hutch.resources.reservations import Reservation, new_lease
    from hutch.resources.settings import load_settings

    settings = load_settings(context.root)
    demand = demand_of(spec, settings)
    host = inventory(context)
    if settings.memory and not leased:
        # After a boot of the host the group is a new one.
        bound_parent(context, settings)
    with context.store.write() as tx:
        others = holdings(context, tx, settings, without=identifier)
        before = tx.get(RESERVATIONS, identifier, Reservation)
        own = before.cpus if before is not None else ()
        decision = decide(host, settings, others, demand, own=own)
        if not decision.fits or not (settings.admits or demand.is_special):
            return decision, None
        taken = Reservation(
            id=identifier,
            name=name,
            boot_id=context.boot_id,
            demand=demand,
            cpus=decision.cpus,
            nodes=decision.nodes,
            lease=new_lease() if leased else None,
        )
        tx.put(RESERVATIONS, identifier, taken)
        if not leased:
            # From here on the instance holds it, were this process killed at once.
            _note_starting(context, tx, identifier)
    return decision, taken


def _note_starting(context: Context, tx: Transaction, identifier: str) -> None:
    record = tx.get(INSTANCES, identifier, InstanceRecord)
    if record is not None:
        started = msgspec.structs.replace(record, state=State.STARTING, boot_id=context.boot_id)
        tx.put(INSTANCES, identifier, started)


def _book_ended(context: Context) -> bool:
    """Book the exits that nobody has; tell whether there were any."""
    from hutch.engine.finish import refresh
    from hutch.engine.lookup import all_records
    from hutch.errors import HutchError

    found = False
    for record in all_records(context):
        if record.state in (State.RUNNING, State.PAUSED):
            try:
                found = refresh(context, record).state != record.state or found
            except HutchError:
                continue
    return found


def shorten_lease(context: Context, identifier: str) -> None:
    """Let what was taken for an instance that is made now wait for its start, but not for ever."""
    from hutch.resources.reservations import Reservation, new_lease

    with context.store.write() as tx:
        held = tx.get(RESERVATIONS, identifier, Reservation)
        if held is not None and held.lease is not None:
            lease = new_lease(made=True)
            tx.put(RESERVATIONS, identifier, msgspec.structs.replace(held, lease=lease))


def bound_parent(context: Context, settings: Settings) -> None:
    """Hold the group above all instances to what this root has, where it is the root's own:
    the usual one is that of every root on the host."""
    from contextlib import suppress

    from hutch.linux.cgroup.reclaim import set_hard_limit
    from hutch.resources.settings import Settings

    if settings.parent == Settings().parent:
        return
    groups = context.groups.hierarchy
    with suppress(FileNotFoundError):
        directories = groups.ensure_parent() if settings.memory else groups.parent
        if directories:
            set_hard_limit(directories, settings.memory or None)


def settle_cpus(context: Context, *, always: bool = False) -> None:
    """Narrow or widen the instances that share processors to those that nobody has alone.

    Who starts meanwhile looks at the file before and after: it comes before the groups.
    `always` looks at the groups even where nobody has any alone.
    """
    from hutch.linux.boot import boot_time
    from hutch.linux.locks import lock_file
    from hutch.resources.cpulist import format_cpulist
    from hutch.resources.cpus import shared_pool
    from hutch.resources.reservations import drop_void

    path = context.root / SHARED_CPUS
    with lock_file(context.root / "locks" / "cpus", timeout_s=_SETTLE_S):
        with context.store.write() as tx:
            records = dict(tx.items(INSTANCES, InstanceRecord))
            live = {key for key, record in records.items() if is_live(context, record)}
            kept, _ = drop_void(tx, boot_id=context.boot_id, live=live, now=boot_time())
        exclusive = {cpu for reservation in kept for cpu in reservation.cpus}
        if not (exclusive or always or path.exists()):
            return
        host = inventory(context)
        pool = format_cpulist(shared_pool(host, exclusive))
        if exclusive:
            _replace(path, pool)
        else:
            path.unlink(missing_ok=True)
        own = {reservation.id for reservation in kept if reservation.cpus}
        for key in live - own:
            _give_cpus(context, records[key], pool)


def _replace(path: os.PathLike[str], text: str) -> None:
    partial = f"{os.fspath(path)}.{os.getpid()}"
    with open(partial, "w") as file:
        file.write(text + "\n")
    os.replace(partial, path)


def _give_cpus(context: Context, record: InstanceRecord, pool: str) -> None:
    """Let a running instance's group have the pool, and of that what it named."""
    from contextlib import suppress

    from hutch.errors import HutchError
    from hutch.linux.cgroup import Limits

    # One that ends or has not yet got its group sees to itself.
    with suppress(HutchError, OSError):
        group = context.groups.hierarchy.load(record.id)
        group.update(Limits(cpuset_cpus=within(record.spec.resources.cpuset_cpus, pool)))


def take_again(
    context: Context, record: InstanceRecord, spec: InstanceSpec, before: Reservation | None
) -> Reservation | None:
    """Take a reservation of another size; processors it has already stay with it."""
    from hutch.resources.admission import NoRoom, decide
    from hutch.resources.demand import demand_of
    from hutch.resources.reservations import Reservation
    from hutch.resources.settings import load_settings

    settings = load_settings(context.root)
    demand = demand_of(spec, settings)
    host = inventory(context)
    own = before.cpus if before is not None else ()
    with context.store.write() as tx:
        others = holdings(context, tx, settings, without=record.id)
        decision = decide(host, settings, others, demand, own=own)
        if not decision.fits:
            raise NoRoom(record.name, decision)
        if before is None and not (settings.admits or demand.is_special):
            return None
        taken = Reservation(
            id=record.id,
            name=record.name,
            boot_id=context.boot_id,
            demand=demand,
            cpus=decision.cpus,
            nodes=decision.nodes,
        )
        tx.put(RESERVATIONS, record.id, taken)
    return taken


def shrink(context: Context, identifier: str, usage: int) -> None:
    """Let a paused instance hold only what it has while it is frozen: the memory in use, no more
    than it reserved, and no processors. `grow` is the way back."""
    from hutch.resources.demand import demand_of
    from hutch.resources.reservations import Reservation
    from hutch.resources.settings import load_settings

    settings = load_settings(context.root)
    with context.store.write() as tx:
        record = tx.get(INSTANCES, identifier, InstanceRecord)
        before = tx.get(RESERVATIONS, identifier, Reservation)
        if record is None or record.state != State.PAUSED:
            return
        demand = before.demand if before is not None else demand_of(record.spec, settings)
        kept = msgspec.structs.replace(
            demand, memory=min(demand.memory, usage), cpus=0.0, exclusive=0, pinned=()
        )
        left = Reservation(id=identifier, name=record.name, boot_id=context.boot_id, demand=kept)
        tx.put(RESERVATIONS, identifier, left)
    if before is not None and before.cpus:
        settle_cpus(context)


def grow(context: Context, identifier: str) -> Decision | None:
    """Take for an instance that `shrink` made small what its specification needs. None where
    that went well, else why it did not, and it stays small."""
    from contextlib import suppress

    from hutch.errors import HutchError
    from hutch.linux.cgroup import Limits
    from hutch.resources.admission import NoRoom
    from hutch.resources.cpulist import format_cpulist
    from hutch.resources.reservations import Reservation

    with context.store.read() as tx:
        record = tx.get(INSTANCES, identifier, InstanceRecord)
        before = tx.get(RESERVATIONS, identifier, Reservation)
    if record is None:
        return None
    try:
        taken = take_again(context, record, record.spec, before)
    except NoRoom as exc:
        return exc.decision
    if taken is not None and taken.cpus:
        settle_cpus(context)
        with suppress(HutchError, OSError):  # it has just ended
            group = context.groups.hierarchy.load(identifier)
            group.update(Limits(cpuset_cpus=format_cpulist(taken.cpus)))
    return None
