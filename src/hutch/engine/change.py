"""Change an existing instance: its name, limits and restart policy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from hutch.drivers.base import Driver, Growable
from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import find_id, load, load_in, require_settled
from hutch.engine.records import INSTANCES, NAMES, InstanceRecord, NameRecord
from hutch.engine.reserve import resized
from hutch.errors import AlreadyExists, HutchError, InvalidArgument, Unsupported, WrongState
from hutch.lifecycle import State
from hutch.spec.build import check_name
from hutch.spec.build import update as update_spec
from hutch.spec.limits import lifted
from hutch.spec.model import InstanceSpec, Resources

__all__ = ["rename", "update"]


def rename(context: Context, identifier: str, name: str) -> None:
    """Give an instance another name; the old one is free afterwards."""
    name = check_name(name)
    with instance_lock(context, identifier):
        record = load(context, identifier)
        require_settled(record)
        if name == record.name:
            return
        try:
            with context.store.write(durable=True) as tx:
                tx.insert(NAMES, name, NameRecord(id=identifier))
                tx.delete(NAMES, record.name)
                present = load_in(tx, identifier)
                tx.put(INSTANCES, identifier, msgspec.structs.replace(present, name=name))
                tx.event("container", "rename", identifier, name=name, oldName=record.name)
        except AlreadyExists:
            holder = find_id(context, name)
            raise AlreadyExists(f"name: {name!r} is taken by instance {holder[:12]}") from None


def update(context: Context, identifier: str, options: Mapping[str, Any]) -> None:
    """Change limits, in the kernel when it runs, then in the record."""
    with instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        require_settled(record)
        spec = update_spec(record.spec, **options)
        driver = context.driver(spec.isolation)
        driver.check(spec)
        with resized(context, record, spec) as placed:
            runs = record.state in (State.RUNNING, State.PAUSED)
            if runs and spec.resources != record.spec.resources:
                _update_running(driver, record, placed.resources)
            if runs:
                _change_rates(context, record, spec)
            if spec.machine.disk != record.spec.machine.disk:
                _grow_disk(context, record, spec.machine.disk)
            _store(context, identifier, spec)


def _store(context: Context, identifier: str, spec: InstanceSpec) -> None:
    with context.store.write(durable=True) as tx:
        present = load_in(tx, identifier)
        tx.put(INSTANCES, identifier, msgspec.structs.replace(present, spec=spec))
        tx.event("container", "update", identifier, name=present.name, image=present.image_name)


def _update_running(driver: Driver, record: InstanceRecord, resources: Resources) -> None:
    """Change what runs; where only some of it succeeds, as a guest that does not let all its
    memory go, it has its former limits again."""
    before = record.spec.resources
    try:
        driver.update(record.id, lifted(before, resources))
    except BaseException:
        with suppress(HutchError):
            driver.update(record.id, lifted(resources, before))
        raise


def _change_rates(context: Context, record: InstanceRecord, spec: InstanceSpec) -> None:
    """Hold a running instance to the rates of networks that have changed."""
    for before, after in zip(record.spec.networks, spec.networks, strict=True):
        if after != before:
            context.networks.set_rates(
                record.id, after.name, rx_rate=after.rx_rate, tx_rate=after.tx_rate
            )


def _grow_disk(context: Context, record: InstanceRecord, size: int) -> None:
    """Grow a machine's writable disk: with its file system, in the guest where it runs; what
    is on a disk that it starts from is its own affair."""
    from hutch.engine.disk_keys import disk_key
    from hutch.storage.diskchain import ensure_one, virtual_size
    from hutch.storage.diskimages import disk_info, resize_disk
    from hutch.storage.disks import check_size
    from hutch.storage.snapshots import DISK_FILE, QCOW2_FILE

    size = check_size(size)
    of_image = record.spec.machine.from_disk is None
    path = str(context.directory(record.id) / (DISK_FILE if of_image else QCOW2_FILE))
    encrypted = record.spec.machine.disk_key is not None
    if record.state not in (State.RUNNING, State.PAUSED):
        if not of_image:
            resize_disk(path, size, format="qcow2", key=disk_key(context, record))
        elif encrypted:
            raise Unsupported(
                "disk: an encrypted one grows only while its machine runs", hint="start it first"
            )
        else:
            ensure_one(context.directory(record.id))
            context.disks.grow(path, size)
        return
    if record.state is State.PAUSED:
        raise WrongState(f"instance {record.name} is paused", hint="unpause it, then grow its disk")
    if not of_image:
        old = disk_info(path, format="qcow2").size
    elif encrypted:
        old = context.disks.get(path, encrypted=True).size
    else:
        old = virtual_size(context.directory(record.id))
    if size < old:
        raise InvalidArgument(f"a disk cannot shrink: it has {old} bytes, got {size}", field="disk")
    driver = context.driver(record.spec.isolation)
    if not isinstance(driver, Growable):
        raise Unsupported("disk: cannot be changed while it runs", hint="stop it first")
    driver.grow_disk(record.id, size)
