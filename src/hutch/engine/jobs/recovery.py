"""What became of a job whose dispatcher is gone: decided from what is on disk.

No job may run twice unless it asked for retries, and none may be forgotten. So one that
may have run, where nothing tells how it ended, is called unknown.
"""

from __future__ import annotations

import msgspec

from hutch.engine.context import Context
from hutch.engine.finish import refresh
from hutch.engine.jobs.attempt import remove_instance
from hutch.engine.jobs.records import (
    ACTIVE,
    DONE,
    LABEL,
    JobRecord,
    JobState,
    key_of,
    name_of_instance,
)
from hutch.engine.lookup import load
from hutch.engine.records import INSTANCES, NAMES, InstanceRecord, NameRecord
from hutch.errors import NotFound
from hutch.lifecycle import State

__all__ = ["Verdict", "is_frozen", "recover", "remove_leftovers"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`again`: it never ran, and may. `lost`: it may have run, and nobody knows how that ended.
    Neither: its instance is there, to be waited for or to be asked how it ended."""

    again: bool = False
    lost: bool = False
    reason: str = ""


def recover(context: Context, job: JobRecord) -> Verdict:
    """Judge a job that was starting, running or preempted."""
    instance = _instance(context, job)
    rebooted = job.boot_id != context.boot_id
    if instance is None:
        # Records of containers are written without syncing: after a power cut, one that ran
        # may be gone. While the host is up, a missing one was never made, or somebody removed it.
        if rebooted:
            return Verdict(lost=True, reason="the host was restarted")
        if job.instance:
            return Verdict(lost=True, reason="its instance was removed")
        return Verdict(again=True, reason="the dispatcher was killed before it started")
    if rebooted and instance.state in (State.CREATED, State.STARTING):
        return Verdict(lost=True, reason="the host was restarted")
    return Verdict()


def is_frozen(context: Context, job: JobRecord) -> bool:
    """Tell whether the instance of a job's present attempt is paused, or suspended to disk and
    meant to stay so."""
    instance = _instance(context, job)
    if instance is None:
        return False
    if instance.state == State.SUSPENDED:
        return job.state == JobState.PREEMPTED
    return instance.state == State.PAUSED


def remove_leftovers(context: Context) -> None:
    """Remove the instances of jobs that are over, or of attempts before the present one: the
    dispatcher that was to do it is gone, perhaps in the middle of that."""
    cut_short = False
    for instance in _leftovers(context):
        cut_short |= instance.state == State.REMOVING
        cut_short |= not context.directory(instance.id).exists()
        remove_instance(context, instance.id)
    if cut_short:
        from hutch.engine.reconcile import reconcile

        reconcile(context)


def _leftovers(context: Context) -> list[InstanceRecord]:
    found = []
    with context.store.read() as tx:
        for _, instance in tx.items(INSTANCES, InstanceRecord):
            number = instance.spec.labels.get(LABEL, "")
            if not number.isdecimal():
                continue
            active = tx.get(ACTIVE, key_of(int(number)), JobRecord)
            ended = tx.get(DONE, key_of(int(number)), JobRecord)
            if active is not None and instance.name == name_of_instance(active):
                continue
            if ended is None or not ended.keeps_instance:
                found.append(instance)
    return found


def _instance(context: Context, job: JobRecord) -> InstanceRecord | None:
    """Return the instance of the job's present attempt as it is now."""
    with context.store.read() as tx:
        named = tx.get(NAMES, name_of_instance(job), NameRecord)
    if named is None:
        return None
    try:
        record = refresh(context, load(context, named.id))
    except NotFound:
        return None
    return record if record.spec.labels.get(LABEL) == str(job.id) else None
