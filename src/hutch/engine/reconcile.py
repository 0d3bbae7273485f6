"""Put right what was cut short: records, control groups, directories, addresses.

Safe at any time and from several processes: whatever somebody works on is locked, and a
locked instance is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from hutch.drivers.base import Savable
from hutch.engine.after import wants_restart
from hutch.engine.builder.leftovers import sweep
from hutch.engine.context import BootRecord, Context
from hutch.engine.finish import dispose, refresh_locked, remove_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import all_records, load
from hutch.engine.mounts import release_mounts
from hutch.engine.records import INSTANCES, NAMES, SUSPENDED, InstanceRecord, NameRecord
from hutch.engine.results import ReconcileReport
from hutch.errors import Busy, HutchError, NotFound, WrongState
from hutch.lifecycle import State
from hutch.linux.files import set_topdir
from hutch.linux.locks import lock_file

__all__ = ["after_boot", "reconcile"]

_QUICK_S = 0.05
_BOOT_TIMEOUT_S = 600.0
_GROUP_AGE_S = 60.0


def after_boot(context: Context) -> None:
    """Put a root right that was made new or lived through a reboot of the host, once.

    Layers that may not have reached the disk go; instances that ran are booked as ended,
    and started again where their policy says so.
    """
    with lock_file(context.root / "locks" / "boot", timeout_s=_BOOT_TIMEOUT_S):
        if not context.was_rebooted():
            return
        _spread_instances(context)
        context.layers.reconcile()
        context.rootdisks.reconcile()
        if all_records(context):
            reconcile(context)
        with context.store.write(durable=True) as tx:
            tx.put("meta", "boot", BootRecord(boot_id=context.boot_id))


def _spread_instances(context: Context) -> None:
    """Keep ext4 from making all instances in one block group. It gives no inode out anew that
    was freed in the last minute, and looks at each of them whenever a file is made in the group
    (`recently_deleted` in fs/ext4/ialloc.c): where many instances come and go, that is a fourth
    of what a start costs."""
    with suppress(OSError):  # another file system
        set_topdir(context.root / "instances")


def reconcile(context: Context) -> ReconcileReport:
    """Return what was found out of order and put right."""
    booked: list[str] = []
    removed: list[str] = []
    from hutch.engine.migrate_settle import settle_migrations

    settled = settle_migrations(context)
    for record in all_records(context):
        _settle(context, record.id, booked, removed)
    removed += sweep(context)
    directories = _orphan_directories(context)
    known = {record.id for record in all_records(context)}
    groups = _orphan_groups(context, known)
    endpoints = context.networks.reconcile(lambda identifier: _is_live(context, identifier))
    _orphan_names(context, known)
    _settle_resources(context)
    from hutch.engine.system import collect_garbage

    reclaimed = collect_garbage(context)
    context.store.trim_events()
    return ReconcileReport(
        booked=tuple(booked),
        migrations=tuple(settled),
        removed=tuple(removed),
        groups=tuple(groups),
        directories=tuple(directories),
        endpoints=tuple(endpoints),
        reclaimed=reclaimed,
    )


def _is_live(context: Context, identifier: str) -> bool:
    try:
        return load(context, identifier).state in (State.STARTING, State.RUNNING, State.PAUSED)
    except NotFound:
        return False


def _settle(context: Context, identifier: str, booked: list[str], removed: list[str]) -> None:
    """Book one instance's end, finish its removal, or start it again after a reboot."""
    try:
        with instance_lock(context, identifier, timeout_s=_QUICK_S):
            before = load(context, identifier)
            record = refresh_locked(context, before)
            if record.state != before.state:
                booked.append(identifier)
            cut_short = record.state == State.REMOVING
            if cut_short or (record.spec.auto_remove and record.state == State.EXITED):
                remove_locked(context, record, remove_volumes=record.spec.auto_remove)
                removed.append(identifier)
                return
            if record.state == State.RUNNING:
                _awaken(context, record)
    except Busy:
        return
    except NotFound:
        if _forget(context, identifier):
            removed.append(identifier)
        return
    if record.state in (State.EXITED, State.RESTARTING) and _was_rebooted(context, before, record):
        _start_again(context, record)


def _awaken(context: Context, record: InstanceRecord) -> None:
    """Let a machine go on whose saver was killed; nobody saves it now, as its lock is ours."""
    driver = context.driver(record.spec.isolation)
    if isinstance(driver, Savable):
        if record.spec.isolation != "vm":
            # It was saved, but not ended: it goes on, and what was saved is of the past.
            context.trash.discard(str(context.directory(record.id) / SUSPENDED))
        with suppress(HutchError):  # it may end at any moment
            driver.awaken(record.id)


def _forget(context: Context, identifier: str) -> bool:
    """Drop the record of an instance whose directory is gone: a removal was cut short."""
    if context.directory(identifier).exists():
        return False
    with context.store.write() as tx:
        record = tx.get(INSTANCES, identifier, InstanceRecord)
        if record is None:
            return False
        context.snapshots.forget(tx, identifier)
        context.kernels.forget(tx, identifier)
        tx.delete(INSTANCES, identifier)
        tx.delete(NAMES, record.name)
    release_mounts(context, record, remove_anonymous=record.spec.auto_remove)
    return True


def _was_rebooted(context: Context, before: InstanceRecord, record: InstanceRecord) -> bool:
    lost = before.state != record.state or before.state == State.RESTARTING
    return lost and before.boot_id != context.boot_id and wants_restart(record)


def _start_again(context: Context, record: InstanceRecord) -> None:
    from hutch.engine.start import start

    try:
        link = start(context, record.id, restarting=True)
    except HutchError:
        return
    if link is not None:
        link.close()


def _orphan_directories(context: Context) -> list[str]:
    """Remove instance directories that no record knows and nobody holds locked."""
    found = []
    for name in os.listdir(context.root / "instances"):
        try:
            with instance_lock(context, name, timeout_s=_QUICK_S):
                try:
                    load(context, name)
                except NotFound:
                    context.driver("container").kill_all(name)
                    _quietly(lambda: context.driver("container").cleanup(name))  # noqa: B023
                    dispose(context, name)
                    found.append(name)
        except (Busy, NotFound):
            continue
    return found


def _orphan_groups(context: Context, known: set[str]) -> list[str]:
    """Remove control groups of this root's instances that are no more.

    Groups of other roots look alike, so only those whose directory is gone and that are
    empty are taken.
    """
    removed: list[str] = []
    groups = getattr(context.containers, "groups", None)
    if groups is None:
        return removed
    for name in groups():
        if name in known or context.directory(name).exists() or _is_young(context, name):
            continue
        try:
            if context.containers.processes(name):
                continue
            context.containers.cleanup(name)
        except (Busy, WrongState, NotFound):
            continue
        removed.append(name)
    return removed


def _is_young(context: Context, name: str) -> bool:
    """Tell whether a group was made a moment ago: another root may be about to fill it."""
    age = getattr(context.containers, "group_age_s", None)
    return age is not None and age(name) < _GROUP_AGE_S


def _orphan_names(context: Context, known: set[str]) -> None:
    with context.store.write() as tx:
        for name, record in tx.items(NAMES, NameRecord):
            if record.id not in known and tx.get(INSTANCES, record.id, InstanceRecord) is None:
                tx.delete(NAMES, name)


def _settle_resources(context: Context) -> None:
    """Drop reservations of instances and processes that are no more."""
    from hutch.engine.admitting import settle_cpus
    from hutch.engine.reserve import SHARED_CPUS
    from hutch.resources.reservations import RESERVATIONS, Reservation

    with context.store.read() as tx:
        held = tx.items(RESERVATIONS, Reservation)
    if held or (context.root / SHARED_CPUS).exists():
        settle_cpus(context, always=True)


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except HutchError:
        pass
