"""Migrate an instance to another hutch: the source's side.

The source decides. Its record goes from `sending` to `committed` in one durable write, when
the target has everything on disk: before it the instance is the source's, afterwards the
target's, whoever is killed when. `hutch.engine.migrate_settle` finishes what was cut short.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import msgspec

import hutch
from hutch.drivers.base import Savable
from hutch.drivers.moving import Streams
from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load, load_in
from hutch.engine.migrate_live import LiveOptions, LiveResult, move_live
from hutch.engine.migrate_send import Sender
from hutch.engine.migrate_settle import abandon, complete, find, migration_lock, put, take_back
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.engine.stop import current
from hutch.errors import HutchError, OutcomeUnknown, Unavailable, Unsupported, WrongState
from hutch.ids import new_id
from hutch.lifecycle import State, move
from hutch.migration.links import Destination, open_wire, parse_destination
from hutch.migration.messages import Answer, Commit, Committed, Hello, Prepare, Prepared, Ready
from hutch.migration.records import MigrationRecord, Phase, Role
from hutch.migration.wire import VERSION, Wire
from hutch.plan.machine.version import parse_version
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.diskchain import is_chain

__all__ = ["LiveOptions", "Migrated", "hello", "migrate"]

_LINK_S = 600.0
_AT_REST = (State.CREATED, State.EXITED, State.SUSPENDED)


class Migrated(msgspec.Struct, frozen=True, kw_only=True):
    """A migration that is done. `id` is the instance's at the target; `sent` counts bytes;
    `way` is how: `cold`, `stop-and-copy`, `pre-copy` or `post-copy`, or of a container that
    ran `checkpoint`.

    `downtime_s` is how long a running machine stood still, `offline_s` until it was back in
    its networks (with `stop-and-copy` one is the other); both are 0 for one at rest.
    `total_s` is the whole, `passes` how often its memory was gone through. `problem` says why
    it does not run there although it ran here."""

    name: str
    id: str
    destination: str
    sent: int
    way: str
    downtime_s: float = 0.0
    offline_s: float = 0.0
    total_s: float = 0.0
    passes: int = 0
    problem: str = ""


def hello(wire: Wire) -> None:
    """Exchange versions with the other side."""
    wire.send(Hello(version=VERSION, hutch=hutch.__version__))
    there = wire.expect(Hello)
    if there.version != VERSION:
        raise Unsupported(
            f"the other side speaks version {there.version} of the migration protocol "
            f"(hutch {there.hutch}), this one version {VERSION}",
            hint="install the same hutch on both sides",
        )


def migrate(
    context: Context,
    identifier: str,
    destination: str,
    *,
    with_volumes: bool = False,
    live: LiveOptions | None = None,
    required: str = "",
    progress: Progress = silent,
) -> Migrated:
    """Move an instance to another hutch; on any failure it stays here as it was.

    A machine that runs is copied as `live` says, while it runs where its QEMU can do that.
    `required` names what was asked for that only such a copy has.

    Where the link is lost after the decision, `OutcomeUnknown`: it is the target's then, and
    `reconcile` finishes the removal here.
    """
    since = time.monotonic()
    there = parse_destination(destination, context.root)
    live = live or LiveOptions()
    record = current(context, identifier)
    _check_state(context, record)
    _check_options(record, live)
    obstacle = _why_not_live(context, record)
    if obstacle and required:
        raise Unsupported(f"{required}: {obstacle}")
    if obstacle and record.state == State.RUNNING:
        progress(ProgressEvent(item=record.name, phase=f"stops while it is copied: {obstacle}"))
    token = new_id()
    progress(ProgressEvent(item=record.name, phase="checking"))
    with migration_lock(context, token):
        try:
            with open_wire(there, timeout_s=_LINK_S, bandwidth=live.bandwidth) as wire:
                hello(wire)
                sender = Sender(context, wire, record, progress=progress)
                _offer(sender, token, with_volumes, None if obstacle else live.streams)
                with context.leases.hold(*sender.references, purpose="migration"):
                    sender.send_assets()
                    wire.expect(Ready)
                if not obstacle:
                    done = _live(context, there, wire, sender, token, live)
                else:
                    if record.state == State.RUNNING:
                        sender.send_ahead()
                    done = _move(context, there, wire, sender, token)
                return msgspec.structs.replace(done, total_s=time.monotonic() - since)
        except BaseException as exc:
            # The link is closed by now, which lets the target put away what it was at.
            migration = find(context, token)
            if migration is not None and migration.phase == Phase.SENDING:
                _stay(context, migration, exc)
            raise


def _why_not_live(context: Context, record: InstanceRecord) -> str:
    """Return why an instance cannot be copied while it runs; nothing if it can."""
    if record.state != State.RUNNING:
        return "it does not run"
    if record.spec.isolation != "vm":
        return ""  # by CRIU, which was asked before
    machine = context.machines.record(record.id)
    if machine is None:
        return "it is no machine"
    if record.spec.machine.from_disk is not None:
        return "it starts from a disk of its own"
    if machine.plugged > 0:
        return "memory was plugged into it while it ran"
    if machine.accelerator == "tcg" and machine.shape is not None and machine.shape.numa:
        # Emulated, the writes to other blocks than the first are missed: `misses_writes`.
        return "it is emulated, and its memory is on several nodes"
    if is_chain(context.directory(record.id)):
        return "it shares its disk with its twins"
    if record.spec.machine.disk_key is not None:
        return "its disk is encrypted"
    if machine.accelerator == "tcg":
        version = parse_version(machine.qemu_version)
        if not version.sees_emulated_writes:
            return f"QEMU {version} cannot copy an emulated machine that runs (9.0 can)"
    return ""


def _live(
    context: Context,
    there: Destination,
    wire: Wire,
    sender: Sender,
    token: str,
    options: LiveOptions,
) -> Migrated:
    """Copy it while it runs, and settle what comes after the decision."""
    if sender.record.spec.isolation == "vm":
        result = move_live(context, there, wire, sender, token, options)
    else:
        from hutch.engine.migrate_container import move_container

        result = move_container(context, there, wire, sender, token)
    problem = ""
    if result.lost is None:
        complete(context, result.migration, wire)
    else:
        problem = _commit_again(context, result.migration)
        complete(context, result.migration)
    sender.progress(ProgressEvent(item=sender.record.name, phase="done", done=result.sent))
    return Migrated(
        name=sender.record.name,
        id=result.id,
        destination=there.text,
        sent=result.sent,
        way=_way(sender, result),
        downtime_s=result.downtime_s,
        offline_s=result.offline_s,
        passes=result.passes,
        problem=problem,
    )


def _way(sender: Sender, result: LiveResult) -> str:
    if sender.record.spec.isolation != "vm":
        return "checkpoint"
    return "post-copy" if result.post_copied else "pre-copy"


def _check_state(context: Context, record: InstanceRecord) -> None:
    wish = record.spec.machine.from_disk
    if wish is not None and (wish.encrypted or record.spec.machine.disk_key is not None):
        raise Unsupported(
            f"migration of {record.name}: its disk is encrypted, and it starts from it",
            hint="`hutch export --disk`, and `hutch vm run --disk-key` there",
        )
    if record.state == State.RUNNING and record.spec.machine.disk_key is not None:
        raise Unsupported(
            f"live migration of {record.name}: its disk is encrypted, and the target has no key",
            hint="stop it first; the target needs the key's file, or the key at its start",
        )
    if record.state == State.RUNNING and record.spec.isolation != "vm":
        driver = context.containers
        assert isinstance(driver, Savable)
        try:
            driver.check_savable(record.spec)
        except Unsupported as exc:
            raise Unsupported(
                f"live migration of container {record.name}: {exc.message}",
                hint=f"stop it first; {exc.hint}" if exc.hint else "stop it first",
            ) from exc
    if record.state not in (*_AT_REST, State.RUNNING):
        hint = "unpause it first" if record.state == State.PAUSED else None
        raise WrongState(f"instance {record.name} is {record.state}: cannot be migrated", hint=hint)


def _check_options(record: InstanceRecord, live: LiveOptions) -> None:
    """Refuse what only a machine's memory has."""
    streams = live.streams
    if record.spec.isolation != "vm" and (streams.post_copy or streams.channels):
        option = "post-copy" if streams.post_copy else "parallel"
        raise Unsupported(
            f"--{option} of container {record.name}: CRIU saves its memory as a whole",
            hint="leave the option out, or run it with --vm",
        )


def _offer(sender: Sender, token: str, with_volumes: bool, streams: Streams | None) -> None:
    """Ask the target; raise with everything that stands in the way, there and here."""
    own = sender.prepare(token, with_volumes=with_volumes, streams=streams)
    sender.wire.send(sender.offer)
    sender.answer = sender.wire.expect(Answer)
    obstacles = [*own, *sender.answer.obstacles]
    if obstacles:
        raise WrongState(f"{sender.record.name} cannot be migrated: " + "; ".join(obstacles))


def _move(context: Context, there: Destination, wire: Wire, sender: Sender, token: str) -> Migrated:
    """Stop it, send what is its own, decide, and let go of it."""
    since = time.monotonic()
    migration, record = _claim(context, there, sender.record.id, token)
    sender.send_instance(record, migration.previous)
    wire.send(
        Prepare(
            instance=msgspec.Raw(msgspec.json.encode(record)),
            previous=migration.previous,
            resume=migration.resume,
        )
    )
    identifier = wire.expect(Prepared).id
    migration = _decide(context, migration)
    try:
        wire.send(Commit(token=token))
        done = wire.expect(Committed)
        problem = done.problem
    except (HutchError, KeyboardInterrupt):
        problem = _commit_again(context, migration)
    stood_still = time.monotonic() - since if migration.resume else 0.0
    complete(context, migration, wire)
    sender.progress(ProgressEvent(item=record.name, phase="done", done=sender.sent))
    return Migrated(
        name=record.name,
        id=identifier,
        destination=there.text,
        sent=sender.sent,
        way="stop-and-copy" if migration.resume else "cold",
        downtime_s=stood_still,
        offline_s=stood_still,
        problem=problem,
    )


def _claim(
    context: Context, there: Destination, identifier: str, token: str
) -> tuple[MigrationRecord, InstanceRecord]:
    """Suspend it if it runs, and mark it: from here on nothing but this migration moves it."""
    resume = False
    if current(context, identifier).state == State.RUNNING:
        from hutch.engine.suspend import suspend

        suspend(context, identifier)
        resume = True
    with ExitStack() as undo:
        if resume:
            undo.callback(take_back, context, identifier)
        with instance_lock(context, identifier):
            record = refresh_locked(context, load(context, identifier))
            if record.state not in _AT_REST:
                raise WrongState(f"instance {record.name} is {record.state}: was used meanwhile")
            move(record.state, State.MIGRATING, name=record.name)
            migration = MigrationRecord(
                token=token,
                role=Role.SOURCE,
                phase=Phase.SENDING,
                instance=identifier,
                name=record.name,
                destination=there.text,
                previous=record.state,
                resume=resume,
            )
            with context.store.write(durable=True) as tx:
                present = load_in(tx, identifier)
                marked = msgspec.structs.replace(present, state=State.MIGRATING)
                tx.put(INSTANCES, identifier, marked)
                put(context, migration, tx=tx)
        undo.pop_all()
    return migration, record


def _decide(context: Context, migration: MigrationRecord) -> MigrationRecord:
    """Give the instance to the target: the one write that says whose it is."""
    return put(context, migration, phase=Phase.COMMITTED)


def _stay(context: Context, migration: MigrationRecord, exc: BaseException) -> None:
    """Make it an instance of this root again; a failure of that is told beside the first."""
    try:
        abandon(context, migration)
    except HutchError as second:
        exc.add_note(f"{migration.name} is not back as it was: {second.message}")


def _commit_again(context: Context, migration: MigrationRecord) -> str:
    """The link was lost with the decision made: tell it over another one."""
    from hutch.engine.migrate_settle import Declined, retake, tell_commit

    try:
        return tell_commit(context, migration)
    except Declined as exc:
        retake(context, migration)
        raise Unavailable(f"{exc.message}; it runs on here") from exc
    except HutchError as exc:
        raise OutcomeUnknown(
            f"{migration.name} has been given to {migration.destination}, which does not "
            f"answer any more: {exc.message}",
            hint="`hutch system reconcile` finishes it when the target is back",
        ) from exc
