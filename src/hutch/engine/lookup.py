"""Find instances: by full identifier, unique prefix, or name; and read their records."""

from __future__ import annotations

import re

from hutch.engine.context import Context
from hutch.engine.records import INSTANCES, NAMES, InstanceRecord, NameRecord
from hutch.errors import InvalidArgument, NotFound, WrongState
from hutch.lifecycle import State
from hutch.records import Transaction

__all__ = ["all_records", "find_id", "load", "load_in", "require_settled"]

_HEX = re.compile(r"[0-9a-f]{1,64}")


def find_id(context: Context, name_or_id: str) -> str:
    """Return the identifier that a name or a unique prefix of an identifier stands for."""
    if not isinstance(name_or_id, str):
        raise InvalidArgument(f"expected a name, got {name_or_id!r}", field="name")
    wanted = name_or_id.removeprefix("/")
    with context.store.read() as tx:
        if len(wanted) == 64 and tx.get(INSTANCES, wanted, InstanceRecord) is not None:
            return wanted
        named = tx.get(NAMES, wanted, NameRecord)
        if named is not None:
            return named.id
        matches = (
            [key for key, _ in tx.items(INSTANCES, InstanceRecord, wanted)]
            if _HEX.fullmatch(wanted)
            else []
        )
    if not matches:
        raise NotFound(
            f"no such instance: {name_or_id}", hint="`hutch ps -a` lists the instances there are"
        )
    if len(matches) > 1:
        raise InvalidArgument(
            f"{name_or_id!r} stands for {len(matches)} instances", hint="give more digits"
        )
    return matches[0]


def load_in(tx: Transaction, identifier: str) -> InstanceRecord:
    """Return a record within a transaction; raise `NotFound` when it is gone."""
    record = tx.get(INSTANCES, identifier, InstanceRecord)
    if record is None:
        raise NotFound(f"no such instance: {identifier[:12]}")
    return record


def load(context: Context, identifier: str) -> InstanceRecord:
    """Return the record as stored; see `hutch.engine.finish.refresh` for the truth."""
    with context.store.read() as tx:
        return load_in(tx, identifier)


def all_records(context: Context) -> list[InstanceRecord]:
    """Return all records, newest first."""
    with context.store.read() as tx:
        records = [record for _, record in tx.items(INSTANCES, InstanceRecord)]
    return sorted(records, key=lambda record: record.created_ns, reverse=True)


def require_settled(record: InstanceRecord) -> None:
    """Raise for an instance that another hutch has or is about to have."""
    if record.state == State.MIGRATING:
        raise WrongState(
            f"instance {record.name} is migrating",
            hint="`hutch system reconcile` settles a migration that was cut short; when the "
            f"other side is lost for good, `hutch migrate --claim {record.name}`",
        )
