"""Snapshots of machines: named, listed, exported, gone back to or started as another instance."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import msgspec

from hutch.drivers.base import SavedState
from hutch.drivers.vm.disk_state import copy_files, put_back_files
from hutch.engine.context import Context
from hutch.engine.create import create_from_spec
from hutch.engine.disk_snapshots import check_whole, restore_disk_machine
from hutch.engine.finish import refresh_locked
from hutch.engine.instance import Instance
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import find_id, load, load_in
from hutch.engine.records import (
    INSTANCES,
    MACHINE_SNAPSHOTS,
    SUSPENDED,
    InstanceRecord,
    SnapshotRecord,
)
from hutch.engine.saved import (
    keep_addresses,
    new_saved,
    savable,
    saved_directory,
    sync_assets,
    twin_spec,
)
from hutch.engine.snapshot_names import check_tag, sync_all, taken
from hutch.engine.start import start
from hutch.errors import AlreadyExists, NotFound, Unsupported, WrongState
from hutch.lifecycle import State
from hutch.records import Transaction
from hutch.storage.copying import copy_tree
from hutch.storage.diskchain import copy_disk, freeze_disk, replace_disk
from hutch.storage.faults import disk_errors
from hutch.storage.snapshots import DISK_FILE, measure
from hutch.storage.sparse import copy_sparse

__all__ = ["Snapshots", "take_snapshot"]

_AT_REST = (State.CREATED, State.EXITED, State.SUSPENDED)
# A method named `list` hides the type from the annotations after it.
SnapshotRecords = list[SnapshotRecord]


def take_snapshot(
    context: Context, identifier: str, tag: str | None = None, *, disk_only: bool = False
) -> SnapshotRecord:
    """Keep an instance as it is now: a running one with its memory unless its files alone are
    asked for, one at rest by its files.

    A running instance goes on, and so it does after any failure.
    """
    record = load(context, identifier)
    memory = record.state == State.RUNNING and not disk_only
    driver = savable(context, record, "snapshot", memory=memory)
    _check_new(context, record.name, tag)
    sync_assets(context)
    with new_saved(context, keep=True) as saved, instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        directory = saved_directory(context, saved)
        if record.state == State.RUNNING and disk_only:
            driver.save_disk(identifier, str(directory))
        elif record.state == State.RUNNING:
            check_whole(record)
            keep_addresses(context, record, directory)
            driver.save(identifier, str(directory), cards=len(record.endpoints))
        elif record.state in _AT_REST and not (disk_only and record.state == State.SUSPENDED):
            _copy_at_rest(context, record, str(directory))
        else:
            raise WrongState(
                f"instance {record.name} is {record.state}: no snapshot",
                hint="unpause or stop it first",
            )
        memory = record.state in (State.RUNNING, State.SUSPENDED) and not disk_only
        return _record(context, record, saved, tag, memory=memory)


def _check_new(context: Context, name: str, tag: str | None) -> None:
    """Refuse a bad or a taken tag before the machine is touched."""
    if tag is None:
        return
    check_tag(tag)
    with context.store.read() as tx:
        if tx.get(MACHINE_SNAPSHOTS, f"{name}/{tag}", SnapshotRecord) is not None:
            raise taken(f"{name}/{tag}")


def _copy_at_rest(context: Context, record: InstanceRecord, target: str) -> None:
    directory = context.directory(record.id)
    with disk_errors(f"snapshot of {record.name}"):
        if record.spec.isolation != "vm":
            from hutch.engine.container_states import copy_files as copy_container

            copy_container(context, record, target)
        elif record.spec.machine.from_disk is None:
            freeze_disk(directory, target, context.disks)
        else:
            copy_files(str(directory), target)
        if record.state == State.SUSPENDED:
            _copy_memory(f"{directory}/{SUSPENDED}", target)


def _copy_memory(suspended: str, target: str) -> None:
    for entry in os.scandir(suspended):
        if entry.is_dir():
            copy_tree(entry.path, f"{target}/{entry.name}")
        else:
            copy_sparse(entry.path, f"{target}/{entry.name}")


def _record(
    context: Context, record: InstanceRecord, saved: str, tag: str | None, *, memory: bool
) -> SnapshotRecord:
    directory = saved_directory(context, saved)
    with disk_errors(f"snapshot of {record.name}"):
        size = measure(str(directory)).bytes
        sync_all(str(directory))
    with context.store.write(durable=True) as tx:
        tag = tag or _next_tag(tx, record.name)
        kept = SnapshotRecord(
            id=saved,
            source=record.id,
            source_name=record.name,
            tag=tag,
            created_ns=time.time_ns(),
            size=size,
            memory=memory,
            spec=record.spec,
            image_id=record.image_id,
            image_name=record.image_name,
            chain_ids=record.chain_ids,
            hostname=record.spec.hostname != record.id[:12],
            volatile=record.volatile,
            anonymous_volumes=record.spec.isolation != "vm"
            and any(mount.anonymous for mount in record.mounts),
        )
        try:
            tx.insert(MACHINE_SNAPSHOTS, f"{record.name}/{tag}", kept)
        except AlreadyExists:
            raise taken(f"{record.name}/{tag}") from None
        if record.spec.machine.kernel:
            context.kernels.note(tx, saved, record.spec.machine.kernel)
        tx.event("container", "snapshot", record.id, name=record.name, tag=tag)
    return kept


def _next_tag(tx: Transaction, name: str) -> str:
    """Return the first of snap0, snap1, … that is free."""
    taken = {key for key, _ in tx.items(MACHINE_SNAPSHOTS, SnapshotRecord, f"{name}/")}
    number = 0
    while f"{name}/snap{number}" in taken:
        number += 1
    return f"snap{number}"


class Snapshots:
    """The snapshots of instances in one root, by `INSTANCE/TAG`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def create(
        self, instance: str, tag: str | None = None, *, disk_only: bool = False
    ) -> SnapshotRecord:
        """Keep an instance as it is now: a running one with its memory and programs, one that
        does not run by its files. The tag is snap0, snap1, … unless it is given.

        With `disk_only` a running one is kept by its files too, with what its programs have
        written so far. A machine stands still for some milliseconds only, a container until its
        memory and its files are written.
        """
        identifier = find_id(self._context, instance)
        return take_snapshot(self._context, identifier, tag, disk_only=disk_only)

    def get(self, name: str) -> SnapshotRecord:
        """Return a snapshot by `INSTANCE/TAG`; raise `NotFound`."""
        with self._context.store.read() as tx:
            return _require(tx, name)

    def list(self, instance: str | None = None) -> SnapshotRecords:
        """Return the snapshots, those of one instance's name only if one is named, oldest
        first. They outlive their instance."""
        with self._context.store.read() as tx:
            found = [record for _, record in tx.items(MACHINE_SNAPSHOTS, SnapshotRecord)]
        found = [r for r in found if instance in (None, r.source_name, r.source)]
        return sorted(found, key=lambda record: record.created_ns)

    def remove(self, name: str) -> None:
        """Remove a snapshot. Instances that were made from it have all they need."""
        with self._context.store.write(durable=True) as tx:
            record = _require(tx, name)
            tx.delete(MACHINE_SNAPSHOTS, f"{record.source_name}/{record.tag}")
            self._context.kernels.forget(tx, record.id)
            self._context.trash.discard(str(saved_directory(self._context, record.id)))

    def restore(self, snapshot: str, *, name: str | None = None) -> Instance:
        """Go back to a snapshot: the instance itself, which must not run; with `name` a new
        instance of that name, which needs neither the old one nor its disk.

        One that was taken of a running machine runs again, where it was; the new one under
        its own identity, and without fixed ports and addresses. The other is left stopped.
        """
        record = self.get(snapshot)
        if name is None:
            return self._restore_in_place(record)
        if record.spec.machine.from_disk is not None:
            return restore_disk_machine(self._context, record, name)
        return self._restore_new(record, name)

    def _restore_new(self, record: SnapshotRecord, name: str) -> Instance:
        directory = str(saved_directory(self._context, record.id))
        if record.anonymous_volumes:
            raise Unsupported(
                f"snapshot {record.source_name}/{record.tag}: of a container with a volume that "
                "has no name; another one would have an empty one in its place",
                hint="restore the container itself, or give its volumes names",
            )
        spec = twin_spec(record.spec, name=name, hostname=record.hostname)
        ports = tuple(port for port in spec.ports if not port.host_port)
        made = create_from_spec(
            self._context,
            msgspec.structs.replace(spec, ports=ports),
            self._context.images.get(record.image_id),
            name=name,
            volatile=record.volatile,
            disk=str(directory),
        )
        instance = Instance(self._context, made.id, made.name)
        with ExitStack() as undo:
            undo.callback(instance.remove, force=True, volumes=True)
            self._go_on(made.id, record)
            undo.pop_all()
        return instance

    def _restore_in_place(self, record: SnapshotRecord) -> Instance:
        context = self._context
        try:
            present = load(context, record.source)
        except NotFound:
            raise NotFound(
                f"instance {record.source_name} is {'gone' if record.source else 'not here'}",
                hint="restore it as another one: --name NEW",
            ) from None
        directory = context.directory(present.id)
        with disk_errors(f"restore of {present.name}"), instance_lock(context, present.id):
            present = refresh_locked(context, load(context, present.id))
            if present.state not in _AT_REST:
                raise WrongState(
                    f"instance {present.name} is {present.state}",
                    hint="stop it first, or restore the snapshot with --name NEW",
                )
            source = saved_directory(context, record.id)
            partial = files = ""
            if record.spec.isolation != "vm":
                from hutch.engine.container_states import exchange_files, put_back

                files = put_back(context, present.id, str(source))
            elif record.spec.machine.from_disk is None:
                partial = f"{directory}/.{DISK_FILE}"
                context.trash.discard(partial)
                copy_disk(source, partial)
            else:
                put_back_files(str(source), str(directory))
            with context.store.write(durable=True) as tx:
                state = State.EXITED if present.state == State.SUSPENDED else present.state
                fresh = msgspec.structs.replace(
                    load_in(tx, present.id), spec=record.spec, state=state
                )
                tx.put(INSTANCES, present.id, fresh)
                tx.event("container", "restore", present.id, name=present.name, tag=record.tag)
                if partial:
                    replace_disk(directory, partial)
                if files:
                    exchange_files(context, present.id, files)
            context.trash.discard(str(directory / SUSPENDED))
        self._go_on(present.id, record)
        return Instance(context, present.id, present.name)

    def _go_on(self, identifier: str, record: SnapshotRecord) -> None:
        """Start an instance where the snapshot has a running machine."""
        if not record.memory:
            return
        saved = SavedState(directory=str(saved_directory(self._context, record.id)))
        link = start(self._context, identifier, saved=saved)
        if link is not None:
            link.close()

    def export(self, name: str) -> Iterator[bytes]:
        """Yield a snapshot as a tar stream: `snapshot.json`, and the files of its directory
        with their holes (GNU sparse)."""
        from hutch.engine.snapshot_export import export_snapshot

        record = self.get(name)
        if record.spec.isolation != "vm":
            raise Unsupported(
                f"snapshot {name}: of a container; its memory goes into the kernel as it is, and "
                "an archive of it could not be trusted",
                hint="`hutch migrate` moves the container; `hutch commit` keeps its files",
            )
        return export_snapshot(record, str(saved_directory(self._context, record.id)))

    def import_(self, pieces: Iterable[bytes], name: str | None = None) -> SnapshotRecord:
        """Store a snapshot that `export` wrote, under its name or as `INSTANCE/TAG`.

        The image and the guest kernel must be here (`NotFound`). What is no snapshot, or
        reaches for something of this host, is refused. It is restored as another instance.
        """
        from hutch.engine.snapshot_import import import_snapshot

        return import_snapshot(self._context, pieces, name)


def _require(tx: Transaction, name: str) -> SnapshotRecord:
    record = tx.get(MACHINE_SNAPSHOTS, name, SnapshotRecord)
    if record is None:
        hint = "name it INSTANCE/TAG; `hutch snapshot ls` lists them"
        raise NotFound(f"snapshot {name}: not found", hint=hint)
    return record
