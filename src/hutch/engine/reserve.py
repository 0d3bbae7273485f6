"""Take and give back what an instance needs of the host: before it is made, at every start,
at a change of its limits, at its end.

An instance that asks for nothing special, under a root that limits nothing, passes by here
with a look at two files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.records import RESERVATIONS, InstanceRecord
from hutch.lifecycle import State
from hutch.spec.model import InstanceSpec, Placement

if TYPE_CHECKING:
    from contextlib import ExitStack

    from hutch.engine.context import Context
    from hutch.resources.reservations import Reservation

__all__ = ["SHARED_CPUS", "effective", "follow_settled", "release", "reserve_at_create"]
__all__ += ["reserve_at_start", "resized", "settled_cpus", "within"]

SHARED_CPUS = "shared-cpus"
_SETTINGS = "resources.json"
_PLAIN = Placement()
_RUNS = (State.RUNNING, State.PAUSED)


def _passes_by(context: Context, spec: InstanceSpec) -> bool:
    """Tell whether there is nothing to decide: the usual case."""
    special = spec.placement != _PLAIN or spec.device_names or spec.gpus
    return not special and not os.path.exists(f"{context.root}/{_SETTINGS}")


@contextmanager
def reserve_at_create(
    context: Context, identifier: str, spec: InstanceSpec, name: str
) -> Iterator[None]:
    """Take what an instance in the making needs, under a lease of this process; given back
    where the block fails. Raises `NoRoom`, and nothing was made."""
    if _passes_by(context, spec):
        yield
        return
    from hutch.engine.admitting import shorten_lease, take

    spec = _with_whole_devices(context, spec)
    take(context, identifier, spec, name or identifier[:12], leased=True)
    try:
        yield
        shorten_lease(context, identifier)
    except BaseException:
        release(context, identifier)
        raise


def reserve_at_start(context: Context, record: InstanceRecord, undo: ExitStack) -> InstanceRecord:
    """Take what a start needs, or make what `create` took the instance's own; return the record
    with the processors it is to run on. `undo` gives it back."""
    if not _passes_by(context, record.spec):
        from hutch.engine.admitting import settle_cpus, take

        wanted = _with_whole_devices(context, record.spec)
        taken = take(context, record.id, wanted, record.name, leased=False)
        undo.callback(release, context, record.id)
        if taken is not None and taken.cpus:
            settle_cpus(context)
        if record.spec.device_names or record.spec.gpus:
            from hutch.engine.devices import with_devices

            record = with_devices(context, record)
        return msgspec.structs.replace(record, spec=effective(context, record.spec, taken))
    return msgspec.structs.replace(record, spec=effective(context, record.spec, None))


def _with_whole_devices(context: Context, spec: InstanceSpec) -> InstanceSpec:
    """Check the devices; return the specification with those that a machine gets whole by their
    addresses, which only one may have."""
    if not (spec.device_names or spec.gpus):
        return spec
    from hutch.engine.devices import check_devices, machine_devices

    check_devices(context, spec)
    if spec.isolation != "vm":
        return spec
    names = tuple(f"vfio={address}" for address in machine_devices(context, spec))
    return msgspec.structs.replace(spec, device_names=names)


def release(context: Context, identifier: str) -> None:
    """Give back what an instance holds; processors of its own are shared again."""
    with context.store.write() as tx:
        held = tx.delete(RESERVATIONS, identifier)
    if held:
        from hutch.engine.admitting import settle_cpus

        settle_cpus(context)


def effective(context: Context, spec: InstanceSpec, taken: Reservation | None) -> InstanceSpec:
    """Return the specification with the processors that its control group is given."""
    if taken is not None and taken.cpus:
        from hutch.resources.cpulist import format_cpulist

        changes: dict[str, object] = {"cpuset_cpus": format_cpulist(taken.cpus)}
        # Preferred memory may come from elsewhere; the kernel takes the near one first.
        if taken.demand.numa == "single" and not spec.resources.cpuset_mems:
            changes["cpuset_mems"] = format_cpulist(taken.nodes)
        if spec.isolation != "vm":
            # A quota would only throttle what nobody else can use.
            changes["cpus"] = 0.0
    else:
        pool = settled_cpus(context)
        if not pool:
            return spec
        changes = {"cpuset_cpus": within(spec.resources.cpuset_cpus, pool)}
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
        from hutch.engine.admitting import settle_cpus

        settle_cpus(context, always=True)


def within(pinned: str, pool: str) -> str:
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


@contextmanager
def resized(context: Context, record: InstanceRecord, spec: InstanceSpec) -> Iterator[InstanceSpec]:
    """Hold what an instance is to have from now on while it is given that; what it had before
    is its own again where the block fails. Yields the specification as the kernel gets it."""
    runs = record.state in _RUNS
    if not runs or _passes_by(context, spec):
        yield effective(context, spec, None) if runs else spec
        return
    from hutch.engine.admitting import settle_cpus, take_again
    from hutch.resources.reservations import Reservation

    with context.store.read() as tx:
        before = tx.get(RESERVATIONS, record.id, Reservation)
    taken = take_again(context, record, spec, before)
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
