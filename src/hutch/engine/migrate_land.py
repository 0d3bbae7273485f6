"""Migrate a machine while it runs: the target's side, from its QEMU that waits to the running one.

The instance has a record by now, and is inert. The machine runs here only once the source
has decided; whoever is killed before that leaves nothing that runs, and what was told of it
(`declined`) lets the source take it back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from hutch.drivers.base import Started
from hutch.drivers.moving import Arrival, Landing, Movable
from hutch.drivers.vm.landing import connect_stream
from hutch.engine.context import Context
from hutch.engine.finish import refresh, refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load, load_in
from hutch.engine.migrate_settle import clear, driver_of, find, put
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.engine.start import attachments
from hutch.engine.start import land as start_here
from hutch.errors import HutchError, IntegrityError, NotFound, WrongState
from hutch.lifecycle import State
from hutch.migration import messages as say
from hutch.migration.pump import carry
from hutch.migration.records import MigrationRecord, Phase
from hutch.migration.wire import Wire
from hutch.network.model import Endpoint
from hutch.process.supervisor import Supervisor
from hutch.spec.model import NetworkAttachment

__all__ = ["activate_started", "carry_stream", "confirm", "decline", "kept", "land", "take_tail"]


_END_S = 30.0


def land(context: Context, wire: Wire, migration: MigrationRecord, live: say.Live) -> None:
    """Take a machine over; when it returns, it runs here and the source knows. The instance's
    lock is held."""
    driver = context.driver("vm")
    assert isinstance(driver, Movable)
    record = load(context, migration.instance)
    taking = _Taking(wire, migration, f"{context.directory(record.id)}")
    arrival = Arrival(
        cards=migration.cards,
        machine=live.machine.encode(),
        accelerator="kvm" if live.accelerator == "kvm" else "tcg",
        streams=live.streams,
        receive=taking.receive,
    )
    had = kept(attachments(record), live.addresses)
    started, endpoints = start_here(context, record, had, arrival)
    with started.supervisor:
        activate_started(context, migration, started, endpoints)
        problem = _plug_in(driver, migration)
        with suppress(HutchError, OSError):  # it may have ended already
            # What came along has made the log longer than its supervisor knows.
            started.supervisor.log_reopen()
    wire.send(taking.committed(problem))
    if live.streams.post_copy:
        _wait_for_memory(context, wire, record)


def _plug_in(driver: Movable, migration: MigrationRecord) -> str:
    """Let it into its networks; return why that cannot be. It runs already."""
    try:
        driver.plug_in(migration.instance, cards=migration.cards)
    except HutchError as exc:
        return exc.message
    return ""


def kept(
    wanted: Sequence[NetworkAttachment], had: Sequence[say.Address]
) -> list[NetworkAttachment]:
    known = {address.network: address for address in had}
    made = []
    for network in wanted:
        before = known.get(network.name)
        if before is not None:
            network = msgspec.structs.replace(
                network, ipv4=before.ipv4, ipv6=before.ipv6, mac=before.mac
            )
        made.append(network)
    return made


def activate_started(
    context: Context,
    migration: MigrationRecord,
    started: Started,
    endpoints: Sequence[Endpoint],
) -> None:
    """Record that what was started here runs, and that it is this root's."""
    _activate_running(
        context,
        migration,
        pid=started.pid,
        start_time=started.start_time,
        supervisor=started.supervisor.supervisor_pid or 0,
        endpoints=tuple(endpoint.network for endpoint in endpoints),
    )


def _activate_running(context: Context, migration: MigrationRecord, **started: object) -> None:
    """Record that it runs, and that it is this root's."""
    with context.store.write(durable=True) as tx:
        present = load_in(tx, migration.instance)
        running = msgspec.structs.replace(
            present,
            state=State.RUNNING,
            boot_id=context.boot_id,
            started_ns=present.started_ns or time.time_ns(),
            generation=present.generation + 1,
            **started,
        )
        tx.put(INSTANCES, running.id, running)
        attributes = {"name": running.name, "image": running.image_name}
        tx.event("container", "create", running.id, **attributes)
        tx.event("container", "start", running.id, **attributes)
        put(context, migration, phase=Phase.ACTIVE, tx=tx)


def _wait_for_memory(context: Context, wire: Wire, record: InstanceRecord) -> None:
    """See its memory come. Without the rest of it the machine is lost, as by a power failure:
    it has run here, and what was left of it at the source is of before."""
    driver = context.driver("vm")
    assert isinstance(driver, Movable)
    try:
        driver.wait_arrived(record.id, wire.fileno())
    except HutchError:
        with Supervisor.connect(f"{context.directory(record.id)}/run") as link:
            driver.kill_all(record.id)
            link.wait(_END_S)  # whoever asks from now on is told that it has ended
        raise


class _Taking:
    """The conversation with the source while QEMU waits here."""

    def __init__(self, wire: Wire, migration: MigrationRecord, directory: str) -> None:
        self._wire = wire
        self._migration = migration
        self._directory = directory
        self._told = self._resumed = 0.0

    def receive(self, landing: Landing) -> int:
        """See `hutch.drivers.moving.Arrival`."""
        wire = self._wire
        landing.listen()
        wire.send(say.Prepared(id=self._migration.instance))
        landing.watch(wire.fileno())
        wire.expect(say.Begin)
        landing.begin()
        wire.send(say.Begun())
        unacked = self._switch(landing)
        landing.end_disk()
        wire.send(say.Switched())
        landing.wait_loaded()
        wire.send(say.Loaded())
        landing.watch(wire.fileno())
        if wire.expect(say.Commit).token != self._migration.token:
            raise IntegrityError("the source decides about another migration")
        self._told = time.monotonic()
        landing.go()
        self._resumed = time.monotonic()
        return unacked

    def committed(self, problem: str) -> say.Committed:
        """Return what the source is told now that it runs here."""
        return say.Committed(
            problem=problem,
            resumed_s=self._resumed - self._told,
            answered_s=time.monotonic() - self._told,
        )

    def _switch(self, landing: Landing) -> int:
        while True:
            landing.watch(self._wire.fileno())
            message = self._wire.receive()
            if isinstance(message, say.Switch):
                return message.unacked
            if not isinstance(message, say.Stream) or message.kind != "tail":
                raise IntegrityError(f"unexpected message {type(message).__name__}")
            take_tail(self._wire, self._directory, message)


def take_tail(wire: Wire, directory: str, head: say.Stream) -> None:
    """Take what belongs behind the first bytes of a log; from 0 it is a new one."""
    if head.name != "log" and not head.name.removeprefix("log.").isdigit():
        raise IntegrityError(f"unexpected log {head.name[:80]!r}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(f"{directory}/{head.name}", flags, 0o600)
    with open(fd, "wb") as file:
        # Cut in place: a supervisor may have it open already.
        os.ftruncate(fd, head.size)
        file.seek(head.size)
        for piece in wire.stream():
            file.write(piece)


def carry_stream(context: Context, wire: Wire, message: say.Channel) -> None:
    """Be a stream between the source and the QEMU that waits here, until it ends."""
    migration = find(context, message.token)
    if migration is None or message.name not in ("disk", "memory"):
        raise NotFound(f"migration {message.token[:12]}: no stream {message.name[:20]!r}")
    directory = str(context.directory(migration.instance))
    with connect_stream(directory, message.name) as local:
        wire.send(say.Opened())
        carry(*wire.descriptors, local)


# ---- on a later link ------------------------------------------------------------------------


def confirm(context: Context, migration: MigrationRecord) -> str:
    """Make a machine this root's whose starter was killed while it let it run; return why it
    does not run any more. Raise `WrongState` for one that never ran, which is declined then."""
    if migration.phase == Phase.ACTIVE:
        state = refresh(context, load(context, migration.instance)).state
        return "" if state == State.RUNNING else "it has ended there, as by a power failure"
    driver = driver_of(context, migration)
    runs = migration.phase == Phase.PREPARED and _runs(context, migration)
    if not runs:
        if migration.phase != Phase.DECLINED:
            decline(context, migration)
        raise WrongState(f"instance {migration.name} never ran here")
    endpoints = context.networks.endpoints(migration.instance) if migration.cards else ()
    networks = tuple(endpoint.network for endpoint in endpoints)
    _activate_running(context, migration, endpoints=networks)
    return _plug_in(driver, migration) if isinstance(driver, Movable) else ""


def _runs(context: Context, migration: MigrationRecord) -> bool:
    """Tell whether its program answers; what is known of its process is recorded then."""
    driver = driver_of(context, migration)
    if isinstance(driver, Movable) and not driver.answers(migration.instance):
        return False
    with instance_lock(context, migration.instance):
        record = load(context, migration.instance)
        with context.store.write() as tx:
            starting = msgspec.structs.replace(
                record, state=State.STARTING, boot_id=context.boot_id
            )
            tx.put(INSTANCES, record.id, starting)
        return refresh_locked(context, starting).state == State.RUNNING


def decline(context: Context, migration: MigrationRecord) -> None:
    """End and remove an instance that never ran here, and keep it written down that it did not
    until the source has heard of it."""
    driver_of(context, migration).kill_all(migration.instance)
    clear(context, put(context, migration, phase=Phase.DECLINED))
