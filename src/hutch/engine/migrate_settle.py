"""Finish migrations that were cut short, from what each side has written down.

The source's record decides. `sending`: the instance stays, and the target forgets what it
has. `committed`: it is the target's, and goes here once the target has confirmed. A target
that has everything but has not heard the decision keeps it inert until the source tells it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from hutch.drivers.base import Driver, Savable
from hutch.drivers.moving import Movable
from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked, remove_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import find_id, load, load_in
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.errors import Busy, HutchError, NotFound, OutcomeUnknown, WrongState
from hutch.lifecycle import State
from hutch.migration.links import open_wire, parse_destination
from hutch.migration.messages import (
    Abort,
    Aborted,
    Ask,
    Commit,
    Committed,
    Forget,
    Forgotten,
    Status,
)
from hutch.migration.records import MIGRATIONS, MigrationRecord, Phase
from hutch.migration.wire import Wire
from hutch.records import Transaction
from hutch.storage.locking import file_lock

__all__ = [
    "Declined",
    "abandon",
    "activate",
    "claim",
    "clear",
    "complete",
    "discard",
    "driver_of",
    "find",
]
__all__ += ["find_prepared", "forget", "migration_lock", "put", "retake", "settle_migrations"]
__all__ += ["take_back", "tell_commit"]

# A target that is not there is asked again at the next reconcile.
_ASK_S = 90.0
_END_S = 30.0
_LOCK = "migration-"


class Declined(WrongState):
    """The target has not let a machine run that was given to it, and never will."""


@contextmanager
def migration_lock(context: Context, token: str, *, timeout_s: float | None = 0) -> Iterator[None]:
    """Hold a migration: who works on it, or settles it, is alone."""
    with file_lock(f"{context.root}/locks/{_LOCK}{token}", timeout_s=timeout_s):
        yield


def put(
    context: Context,
    migration: MigrationRecord,
    *,
    phase: Phase | None = None,
    tx: Transaction | None = None,
) -> MigrationRecord:
    """Write down how far it is, safe on the disk."""
    if phase is not None:
        migration = msgspec.structs.replace(migration, phase=phase)
    if tx is not None:
        tx.put(MIGRATIONS, migration.token, migration)
        return migration
    with context.store.write(durable=True) as own:
        own.put(MIGRATIONS, migration.token, migration)
    return migration


def find(context: Context, token: str) -> MigrationRecord | None:
    """Return what is written down of a migration."""
    with context.store.read() as tx:
        return tx.get(MIGRATIONS, token, MigrationRecord)


def find_prepared(context: Context, token: str) -> MigrationRecord:
    """Return what is written down of a migration that is known."""
    migration = find(context, token)
    if migration is None:
        raise NotFound(f"migration {token[:12]}: not known here")
    return migration


def forget(context: Context, token: str) -> None:
    """Drop what is written down."""
    with context.store.write(durable=True) as tx:
        tx.delete(MIGRATIONS, token)


# ---- the source ---------------------------------------------------------------------------


def abandon(context: Context, migration: MigrationRecord) -> None:
    """Make the instance startable here again, let it run on if it ran, and tell the target.

    The order is safe: until it is told to, the target does not let anybody start its copy.
    """
    present = find(context, migration.token)
    if present is not None and present.phase == Phase.COMMITTED:
        raise OutcomeUnknown(f"instance {migration.name} has been given away already")
    try:
        _restore(context, migration)
    except NotFound:
        pass
    else:
        if migration.live:
            _run_on(context, migration)
        elif migration.resume:
            _resume(context, migration)
    try:
        with _asked(context, migration) as wire:
            wire.send(Abort(token=migration.token))
            wire.expect(Aborted)
    except HutchError:
        return  # it stays written down, and the target is told at the next reconcile
    forget(context, migration.token)


def _restore(context: Context, migration: MigrationRecord) -> None:
    """Give the instance its state back, and note that the target is yet to be told."""
    with instance_lock(context, migration.instance), context.store.write(durable=True) as tx:
        put(context, migration, phase=Phase.ABORTED, tx=tx)
        record = load_in(tx, migration.instance)
        if record.state == State.MIGRATING:
            back = msgspec.structs.replace(record, state=State(migration.previous))
            tx.put(INSTANCES, record.id, back)


def _run_on(context: Context, migration: MigrationRecord) -> None:
    """Let an instance that never went away run on, unless it has ended meanwhile."""
    identifier = migration.instance
    driver = driver_of(context, migration)
    with instance_lock(context, identifier):
        if refresh_locked(context, load(context, identifier)).state != State.RUNNING:
            return
        if isinstance(driver, Movable):
            driver.run_on(identifier)
        elif isinstance(driver, Savable):
            driver.awaken(identifier)


def _resume(context: Context, migration: MigrationRecord) -> None:
    """Take back what was suspended, once: the target may be told much later, and what its user
    has done with it by then stands."""
    if load(context, migration.instance).state == State(migration.previous):
        take_back(context, migration.instance)
    put(context, msgspec.structs.replace(migration, resume=False), phase=Phase.ABORTED)


def driver_of(context: Context, migration: MigrationRecord) -> Driver:
    """Return the driver of an instance under way."""
    return context.driver("vm" if migration.isolation == "vm" else "container")


def retake(context: Context, migration: MigrationRecord) -> None:
    """Take a machine back that was given away and that the target has declined."""
    _restore(context, put(context, migration, phase=Phase.SENDING))
    abandon(context, migration)


def take_back(context: Context, identifier: str) -> None:
    """Let a machine that was suspended for its migration run on here."""
    from hutch.engine.start import start

    link = start(context, identifier)
    if link is not None:
        link.close()


@contextmanager
def _asked(context: Context, migration: MigrationRecord) -> Iterator[Wire]:
    """Open a link of its own to the target of a migration."""
    from hutch.engine.migrate import hello

    with open_wire(
        parse_destination(migration.destination, context.root), timeout_s=_ASK_S
    ) as wire:
        hello(wire)
        yield wire


def tell_commit(context: Context, migration: MigrationRecord) -> str:
    """Tell the target that the instance is its own; return its problem with starting it."""
    with _asked(context, migration) as wire:
        wire.send(Ask(token=migration.token))
        phase = wire.expect(Status).phase
        if phase == Phase.DECLINED:
            raise Declined(f"{migration.name} never ran at {migration.destination}")
        if phase == "unknown":
            raise OutcomeUnknown(
                f"{migration.destination} does not know instance {migration.name} any more",
                hint=f"`hutch migrate --claim {migration.name}` makes it this root's again",
            )
        wire.send(Commit(token=migration.token))
        try:
            return wire.expect(Committed).problem
        except WrongState as exc:
            if migration.live:
                raise Declined(exc.message) from exc
            raise


def complete(context: Context, migration: MigrationRecord, wire: Wire | None = None) -> None:
    """Remove what was given away, and let the target forget how it came."""
    if migration.live:
        _end_here(context, migration)
    try:
        with instance_lock(context, migration.instance):
            record = load(context, migration.instance)
            with context.store.write() as tx:
                attributes = {"name": record.name, "destination": migration.destination}
                tx.event("container", "migrate", record.id, **attributes)
            remove_locked(context, record, remove_volumes=True)
    except NotFound:
        pass
    try:
        if wire is not None:
            _tell_forget(wire, migration)
        else:
            with _asked(context, migration) as own:
                _tell_forget(own, migration)
    except HutchError:
        if wire is None:
            return  # asked for again at the next reconcile
        complete(context, migration)
        return
    forget(context, migration.token)


def _end_here(context: Context, migration: MigrationRecord) -> None:
    """End what stands still of an instance that runs elsewhere now."""
    from hutch.process.supervisor import Supervisor

    identifier, driver = migration.instance, driver_of(context, migration)
    try:
        link = Supervisor.connect(f"{context.directory(identifier)}/run")
    except (FileNotFoundError, ConnectionError):
        driver.kill_all(identifier)
        return
    with link:
        try:
            link.claim()
        except (ProcessLookupError, OutcomeUnknown):
            pass  # it has ended already
        driver.kill_all(identifier)
        try:
            link.wait(timeout_s=_END_S)
        except OutcomeUnknown:
            pass


def _tell_forget(wire: Wire, migration: MigrationRecord) -> None:
    wire.send(Forget(token=migration.token))
    wire.expect(Forgotten)


# ---- the target ---------------------------------------------------------------------------


def activate(context: Context, migration: MigrationRecord) -> MigrationRecord:
    """Let an instance that was prepared be started; safe to repeat."""
    if migration.phase != Phase.PREPARED:
        return migration
    with instance_lock(context, migration.instance), context.store.write(durable=True) as tx:
        record = load_in(tx, migration.instance)
        active = msgspec.structs.replace(record, state=State(migration.previous))
        tx.put(INSTANCES, record.id, active)
        tx.event("container", "create", record.id, name=record.name, image=record.image_name)
        return put(context, migration, phase=Phase.ACTIVE, tx=tx)


def discard(context: Context, migration: MigrationRecord) -> None:
    """Remove what was prepared or half received; safe to repeat."""
    clear(context, migration)
    forget(context, migration.token)


def clear(context: Context, migration: MigrationRecord) -> None:
    """Remove the instance that was prepared or half received, with what runs of it."""
    if migration.live:
        _end_here(context, migration)
    try:
        with instance_lock(context, migration.instance):
            remove_locked(context, load(context, migration.instance), remove_volumes=True)
    except NotFound:
        # There was no record yet: the directory is not an instance's.
        context.trash.discard(str(context.directory(migration.instance)))
    for name in migration.volumes:
        context.volumes.release(name, migration.instance)
        context.volumes.remove_arrived(name, migration.token)


# ---- both ---------------------------------------------------------------------------------


def settle_migrations(context: Context) -> list[str]:
    """Settle what nobody works on; return the instances concerned."""
    with context.store.read() as tx:
        tokens = {token for token, _ in tx.items(MIGRATIONS, MigrationRecord)}
    # Who was killed has left its lock, perhaps before there was anything to write down.
    names = os.listdir(context.root / "locks")
    tokens |= {name.removeprefix(_LOCK) for name in names if name.startswith(_LOCK)}
    settled = []
    for token in sorted(tokens):
        try:
            with migration_lock(context, token):
                migration = find(context, token)
                if migration is not None and _settle(context, migration):
                    settled.append(migration.instance)
        except Busy:
            continue
    return settled


def _settle(context: Context, migration: MigrationRecord) -> bool:
    """Settle one, its lock held; tell whether there was something to do."""
    match migration.phase:
        case Phase.SENDING | Phase.ABORTED:
            try:
                abandon(context, migration)
            except HutchError:
                return False  # it cannot be started now, say: others are settled all the same
        case Phase.COMMITTED:
            try:
                if _is_here(context, migration):
                    tell_commit(context, migration)
            except Declined:
                retake(context, migration)
                return True
            except HutchError:
                return False
            complete(context, migration)
        case Phase.PREPARING:
            discard(context, migration)
        case _:
            return False
    return True


def _is_here(context: Context, migration: MigrationRecord) -> bool:
    try:
        return load(context, migration.instance).state == State.MIGRATING
    except NotFound:
        return False


def claim(context: Context, name_or_id: str) -> InstanceRecord:
    """Make an instance this root's without asking the other side: for when that is lost.

    Where the other side is not lost, there may be two of it afterwards.
    """
    identifier = find_id(context, name_or_id)
    record = load(context, identifier)
    _require_migrating(record)
    with context.store.read() as tx:
        found = [
            one for _, one in tx.items(MIGRATIONS, MigrationRecord) if one.instance == identifier
        ]
    for migration in found:
        with (
            migration_lock(context, migration.token),
            instance_lock(context, identifier),
            context.store.write(durable=True) as tx,
        ):
            record = load_in(tx, identifier)
            _require_migrating(record)  # it may have been settled meanwhile
            record = msgspec.structs.replace(record, state=State(migration.previous))
            tx.put(INSTANCES, identifier, record)
            tx.delete(MIGRATIONS, migration.token)
            tx.event("container", "claim", identifier, name=record.name, role=migration.role)
    return record


def _require_migrating(record: InstanceRecord) -> None:
    if record.state != State.MIGRATING:
        raise WrongState(f"instance {record.name} is {record.state}: there is nothing to claim")
