"""Snapshots of machines that start from a disk of their own: what they need besides the others."""

from __future__ import annotations

import os
import time

import msgspec

from hutch.drivers.vm.disk_state import put_back_files
from hutch.drivers.vm.fromdisk import SEED_FILE
from hutch.engine.context import Context
from hutch.engine.create import check_references, insert_record, new_directory
from hutch.engine.finish import dispose
from hutch.engine.instance import Instance
from hutch.engine.records import InstanceRecord, SnapshotRecord
from hutch.engine.reserve import reserve_at_create
from hutch.engine.saved import saved_directory, twin_spec
from hutch.errors import Unsupported
from hutch.ids import new_instance_id
from hutch.spec.build import check_name
from hutch.storage.faults import disk_errors

__all__ = ["check_whole", "restore_disk_machine"]


def check_whole(record: InstanceRecord) -> None:
    """Refuse to keep the memory of a machine without all the disks that belong to it."""
    wish = record.spec.machine.from_disk
    if wish is None:
        return
    for index, disk in enumerate(wish.disks):
        if not disk.read_only:
            raise Unsupported(
                f"snapshot of {record.name}: disk{index + 1} ({disk.path}) is written to and "
                "would not be in it",
                hint="stop it first: a snapshot then has its own disk, without its memory",
            )


def restore_disk_machine(context: Context, record: SnapshotRecord, name: str) -> Instance:
    """Make another machine with what a snapshot of one at rest has on its disk.

    Cloud-init takes it for a new machine, and gives it an identity of its own.
    """
    name = check_name(name)
    if record.memory:
        raise Unsupported(
            f"snapshot {record.source_name}/{record.tag}: has the memory of a machine without an "
            "agent, which cannot be made another one",
            hint="stop the machine and take another snapshot, or restore this one in its place",
        )
    identifier = new_instance_id()
    spec = twin_spec(record.spec, name=name, hostname=record.hostname)
    ports = tuple(port for port in spec.ports if not port.host_port)
    wish = spec.machine.from_disk
    assert wish is not None
    machine = msgspec.structs.replace(
        spec.machine, from_disk=msgspec.structs.replace(wish, identity="")
    )
    spec = msgspec.structs.replace(
        spec, ports=ports, hostname=spec.hostname or identifier[:12], machine=machine
    )
    context.machines.check(spec)
    spec = check_references(context, spec)
    directory = context.directory(identifier)
    what = f"instance {identifier[:12]}"
    with (
        reserve_at_create(context, identifier, spec, name),
        disk_errors(what),
        new_directory(context, identifier),
    ):
        try:
            os.mkdir(directory / "run", 0o700)
            put_back_files(str(saved_directory(context, record.id)), str(directory))
            (directory / SEED_FILE).unlink(missing_ok=True)  # written anew at its start
            made = insert_record(
                context,
                InstanceRecord(
                    id=identifier,
                    name=name,
                    spec=spec,
                    image_id="",
                    image_name=spec.image,
                    created_ns=time.time_ns(),
                ),
            )
        except BaseException:
            dispose(context, identifier)
            raise
    return Instance(context, made.id, made.name)
