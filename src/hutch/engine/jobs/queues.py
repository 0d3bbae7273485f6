"""Make, change and remove queues."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from hutch.engine.context import Context
from hutch.engine.jobs.board import ensure_dispatcher, list_jobs
from hutch.engine.jobs.policies import build_policy
from hutch.engine.jobs.records import QUEUES, QueueRecord
from hutch.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from hutch.records import Transaction
from hutch.sched import Capacity
from hutch.sched.estimators import create_estimator
from hutch.spec.build import check_name
from hutch.spec.parse import flag, number, text
from hutch.units import parse_duration

__all__ = ["create", "get", "list_queues", "remove", "update"]


def create(context: Context, name: str, **values: Any) -> QueueRecord:
    """Make a queue; raise `AlreadyExists`."""
    record = _changed(QueueRecord(name=check_name(name), created_ns=time.time_ns()), values)
    with context.store.write(durable=True) as tx:
        try:
            tx.insert(QUEUES, record.name, record)
            _check_together(tx)
        except AlreadyExists:
            raise AlreadyExists(
                f"name: there is a queue {name!r}", hint=f"`hutch queue update {name}` changes it"
            ) from None
        tx.event("queue", "create", record.name, policy=record.policy)
    return record


def update(context: Context, name: str, values: Mapping[str, Any]) -> QueueRecord:
    """Change a queue; its dispatcher begins with the new policy at once."""
    with context.store.write(durable=True) as tx:
        old = tx.get(QUEUES, name, QueueRecord)
        if old is None:
            raise _unknown(name)
        record = _changed(old, values)
        tx.put(QUEUES, name, record)
        _check_together(tx)
        tx.event("queue", "update", name, policy=record.policy)
    ensure_dispatcher(context)
    return record


def _changed(record: QueueRecord, values: Mapping[str, Any]) -> QueueRecord:
    """Return the record with checked values; None is no change."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        match name:
            case "policy":
                changes[name] = text(value, name, empty=False)
            case "weight":
                changes[name] = number(value, name, low=0.001, high=1e6)
            case "cpus":
                changes["cores"] = number(value, name, low=0, high=65536)
            case "suspend_after":
                changes["suspend_s"] = float(parse_duration(value, field=name))
            case "predictor":
                changes[name] = text(value, name, empty=False)
                create_estimator(changes[name])
            case "paused":
                changes[name] = flag(value, name)
            case _:
                raise InvalidArgument(
                    "no such option",
                    field=name,
                    hint="policy, weight, cpus, predictor, suspend_after",
                )
    return msgspec.structs.replace(record, **changes)


def _check_together(tx: Transaction) -> None:
    """Raise `InvalidArgument` for queues that cannot share a machine."""
    records = [record for _, record in tx.items(QUEUES, QueueRecord)]
    build_policy(records, Capacity(cores=65536))


def get(context: Context, name: str) -> QueueRecord:
    """Return a queue; raise `NotFound`."""
    with context.store.read() as tx:
        found = tx.get(QUEUES, name, QueueRecord)
    if found is None:
        raise _unknown(name)
    return found


def list_queues(context: Context) -> list[QueueRecord]:
    """Return the queues by name."""
    with context.store.read() as tx:
        return [record for _, record in tx.items(QUEUES, QueueRecord)]


def remove(context: Context, name: str) -> None:
    """Remove a queue without jobs that are not over."""
    get(context, name)
    left = list_jobs(context, queue=name)
    if left:
        raise Busy(
            f"queue {name} has {len(left)} jobs that are not over",
            hint=f"`hutch job cancel` them, or wait; the first is job {left[0].id}",
        )
    with context.store.write(durable=True) as tx:
        tx.delete(QUEUES, name)
        tx.event("queue", "remove", name)


def _unknown(name: str) -> NotFound:
    return NotFound(f"no such queue: {name}", hint="`hutch queue ls` lists them")
