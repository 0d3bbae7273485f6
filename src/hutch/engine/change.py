"""Change an existing instance: its name, limits and restart policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import find_id, load, load_in
from hutch.engine.records import INSTANCES, NAMES, NameRecord
from hutch.errors import AlreadyExists
from hutch.lifecycle import State
from hutch.spec.build import check_name
from hutch.spec.build import update as update_spec

__all__ = ["rename", "update"]


def rename(context: Context, identifier: str, name: str) -> None:
    """Give an instance another name; the old one is free afterwards."""
    name = check_name(name)
    with instance_lock(context, identifier):
        record = load(context, identifier)
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
        spec = update_spec(record.spec, **options)
        driver = context.driver(spec.isolation)
        driver.check(spec)
        if record.state in (State.RUNNING, State.PAUSED):
            driver.update(identifier, spec.resources)
        with context.store.write(durable=True) as tx:
            present = load_in(tx, identifier)
            tx.put(INSTANCES, identifier, msgspec.structs.replace(present, spec=spec))
            tx.event("container", "update", identifier, name=present.name, image=present.image_name)
