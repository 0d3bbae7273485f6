"""Take and give back what an instance needs of the host: before it is made, at every start,
at a change of its limits, at its end.

An instance that asks for nothing special, under a root that limits nothing, passes by here
with a look at two files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.records import INSTANCES, RESERVATIONS, InstanceRecord
from hutch.lifecycle import State
from hutch.spec.model import InstanceSpec, Placement

if TYPE_CHECKING:
    from contextlib import ExitStack

    from hutch.engine.context import Context
    from hutch.records import Transaction
    from hutch.resources.admission import Decision
    from hutch.resources.demand import Demand, Holding
    from hutch.resources.inventory import Inventory
    from hutch.resources.reservations import Reservation
    from hutch.resources.settings import Settings

__all__ = [
    "decide_for",
    "effective",
    "follow_settled",
    "holdings",
    "inventory",
    "release",
    "reserve_at_create",
]
__all__ += ["reserve_at_start", "resized", "settle_cpus", "settled_cpus"]

SHARED_CPUS = "shared-cpus"
_SETTINGS = "resources.json"
_PLAIN = Placement()
_HOLDING = (State.STARTING, State.RUNNING, State.PAUSED, State.RESTARTING)
_SETTLE_S = 30.0


def _passes_by(context: Context, spec: InstanceSpec) -> bool:
    """Tell whether there is nothing to decide: the usual case."""
    special = spec.placement != _PLAIN or spec.device_names or spec.gpus
    return not special and not os.path.exists(f"{context.root}/{_SETTINGS}")


# ---- what there is, and who has it ------------------------------------------------------


def inventory(context: Context) -> Inventory:
    """Return what the host has for instances of this root."""
    from hutch.linux.cgroup import bound_cpusets
    from hutch.resources.inventory import read_inventory

    cpus, mems = bound_cpusets()
    return read_inventory(cpuset=cpus, mems=mems, rooms=(str(context.root),))


def holdings(
    context: Context, tx: Transaction, settings: Settings, *, without: str = ""
) -> list[Holding]:
    """Return what everybody but `without` holds (a write transaction: what is void goes)."""
    from hutch.resources.reservations import drop_void, holding_of

    records = dict(tx.items(INSTANCES, InstanceRecord))
    live = {key for key, record in records.items() if _is_live(context, record)}
    kept, _ = drop_void(tx, boot_id=context.boot_id, live=live, now=time.time())
    reserved = {reservation.id: reservation for reservation in kept}
    found = [holding_of(r) for r in kept if r.id != without]
    for key, record in records.items():
        if key != without and key not in reserved:
            found.append(_unreserved(record, settings, live=key in live))
    return found


def _is_live(context: Context, record: InstanceRecord) -> bool:
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


# ---- taking -----------------------------------------------------------------------------


@contextmanager
def reserve_at_create(
    context: Context, identifier: str, spec: InstanceSpec, name: str
) -> Iterator[None]:
    """Take what an instance in the making needs, under a lease of this process; given back
    where the block fails. Raises `NoRoom`, and nothing was made."""
    if _passes_by(context, spec):
        yield
        return
    _check_devices(context, spec)
    _take(context, identifier, spec, name or identifier[:12], leased=True)
    try:
        yield
    except BaseException:
        release(context, identifier)
        raise


def reserve_at_start(context: Context, record: InstanceRecord, undo: ExitStack) -> InstanceRecord:
    """Take what a start needs, or make what `create` took the instance's own; return the record
    with the processors it is to run on. `undo` gives it back."""
    if not _passes_by(context, record.spec):
        _check_devices(context, record.spec)
        taken = _take(context, record.id, record.spec, record.name, leased=False)
        undo.callback(release, context, record.id)
        if taken is not None and taken.cpus:
            settle_cpus(context)
        if record.spec.device_names or record.spec.gpus:
            from hutch.engine.devices import with_devices

            record = with_devices(context, record)
        return msgspec.structs.replace(record, spec=effective(context, record.spec, taken))
    return msgspec.structs.replace(record, spec=effective(context, record.spec, None))


def _check_devices(context: Context, spec: InstanceSpec) -> None:
    if spec.device_names or spec.gpus:
        from hutch.engine.devices import check_devices

        check_devices(context, spec)


def _take(
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


def release(context: Context, identifier: str) -> None:
    """Give back what an instance holds; processors of its own are shared again."""
    with context.store.write() as tx:
        held = tx.delete(RESERVATIONS, identifier)
    if held:
        settle_cpus(context)


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


# ---- processors -------------------------------------------------------------------------


def effective(context: Context, spec: InstanceSpec, taken: Reservation | None) -> InstanceSpec:
    """Return the specification with the processors that its control group is given."""
    if taken is not None and taken.cpus:
        from hutch.resources.cpulist import format_cpulist

        changes: dict[str, object] = {"cpuset_cpus": format_cpulist(taken.cpus)}
        if taken.demand.numa != "any" and taken.nodes and not spec.resources.cpuset_mems:
            changes["cpuset_mems"] = format_cpulist(taken.nodes)
        if spec.isolation != "vm":
            # A quota would only throttle what nobody else can use.
            changes["cpus"] = 0.0
    else:
        pool = settled_cpus(context)
        if not pool:
            return spec
        changes = {"cpuset_cpus": _within(spec.resources.cpuset_cpus, pool)}
    resources = msgspec.structs.replace(spec.resources, **changes)
    return msgspec.structs.replace(spec, resources=resources)


def settled_cpus(context: Context) -> str:
    """Return the list of processors that are left to share; empty where all are."""
    try:
        with open(f"{context.root}/{SHARED_CPUS}") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def follow_settled(context: Context, record: InstanceRecord, placed: InstanceRecord) -> None:
    """Settle once more where processors were given out or back between the look that `placed`
    has and the time when the instance had its group."""
    now = effective(context, record.spec, None).resources.cpuset_cpus
    if now != placed.spec.resources.cpuset_cpus:
        settle_cpus(context, always=True)


def _within(pinned: str, pool: str) -> str:
    """Return what of the processors somebody named is left to share."""
    if not pinned:
        return pool
    from hutch.errors import Busy
    from hutch.resources.cpulist import format_cpulist, parse_cpulist

    left = set(parse_cpulist(pinned)) & set(parse_cpulist(pool))
    if not left:
        raise Busy(
            f"cpuset_cpus: {pinned} belongs to instances that have it to themselves",
            hint=f"name some of {pool}, or see `hutch system resources`",
        )
    return format_cpulist(left)


def settle_cpus(context: Context, *, always: bool = False) -> None:
    """Narrow or widen the instances that share processors to those that nobody has alone.

    Who starts meanwhile looks at the file before and after: it comes before the groups.
    `always` looks at the groups even where nobody has any alone.
    """
    from hutch.linux.locks import lock_file
    from hutch.resources.cpulist import format_cpulist
    from hutch.resources.cpus import shared_pool
    from hutch.resources.reservations import drop_void

    path = context.root / SHARED_CPUS
    with lock_file(context.root / "locks" / "cpus", timeout_s=_SETTLE_S):
        with context.store.write() as tx:
            records = dict(tx.items(INSTANCES, InstanceRecord))
            live = {key for key, record in records.items() if _is_live(context, record)}
            kept, _ = drop_void(tx, boot_id=context.boot_id, live=live, now=time.time())
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
        group.update(Limits(cpuset_cpus=_within(record.spec.resources.cpuset_cpus, pool)))


# ---- changes ----------------------------------------------------------------------------


@contextmanager
def resized(context: Context, record: InstanceRecord, spec: InstanceSpec) -> Iterator[InstanceSpec]:
    """Hold what an instance is to have from now on while it is given that; what it had before
    is its own again where the block fails. Yields the specification as the kernel gets it."""
    from hutch.resources.reservations import Reservation

    if not _is_live(context, record) or _passes_by(context, spec):
        yield effective(context, spec, None) if _is_live(context, record) else spec
        return
    with context.store.read() as tx:
        before = tx.get(RESERVATIONS, record.id, Reservation)
    taken = _take_again(context, record, spec, before)
    if taken is not None and taken.cpus:
        settle_cpus(context)
    try:
        yield effective(context, spec, taken)
    except BaseException:
        with context.store.write() as tx:
            if before is None:
                tx.delete(RESERVATIONS, record.id)
            else:
                tx.put(RESERVATIONS, record.id, before)
        settle_cpus(context)
        raise
    settle_cpus(context)


def _take_again(
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
