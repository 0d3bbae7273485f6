"""Describe an instance for people and programs from its record and what runs."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import msgspec

from hutch.decoding import decode_json
from hutch.engine.context import Context
from hutch.engine.records import InstanceRecord
from hutch.engine.results import HealthState, InstanceInfo, MachineInfo, MountInfo
from hutch.lifecycle import State
from hutch.spec.model import TmpfsMount
from hutch.units import format_duration

if TYPE_CHECKING:
    from hutch.network.model import Endpoint

__all__ = ["describe", "health_of", "status_text"]

_MAX_HEALTH_FILE = 1 << 20


def describe(context: Context, record: InstanceRecord) -> InstanceInfo:
    """Return the description of an instance whose record is fresh."""
    health = health_of(context, record)
    live = record.state in (State.RUNNING, State.PAUSED)
    endpoints = _endpoints(context, record) if live and record.endpoints else ()
    mounts = [
        MountInfo(
            type=mount.type,
            target=mount.target,
            source=mount.source,
            name=mount.name,
            read_only=mount.read_only,
            propagation=mount.propagation,
        )
        for mount in record.mounts
    ]
    mounts += [
        MountInfo(type="tmpfs", target=mount.target)
        for mount in record.spec.mounts
        if isinstance(mount, TmpfsMount)
    ]
    return InstanceInfo(
        id=record.id,
        name=record.name,
        state=record.state,
        status=status_text(record, health),
        image=record.image_name,
        image_id=record.image_id,
        command=record.spec.process.argv,
        created_ns=record.created_ns,
        started_ns=record.started_ns,
        finished_ns=record.finished_ns,
        exit_code=record.exit_code,
        pid=record.pid if live else 0,
        oom_killed=record.oom_killed,
        error=record.error,
        restart_count=record.restart_count,
        health=health,
        mounts=tuple(mounts),
        endpoints=tuple(endpoints),
        directory=str(context.directory(record.id)),
        spec=record.spec,
        chain_ids=record.chain_ids,
        isolation_reason=record.isolation_reason,
        machine=_machine(context, record),
    )


def _machine(context: Context, record: InstanceRecord) -> MachineInfo | None:
    if record.spec.isolation != "vm":
        return None
    found = context.machines.record(record.id)
    return None if found is None else msgspec.convert(found, MachineInfo, from_attributes=True)


def _endpoints(context: Context, record: InstanceRecord) -> tuple[Endpoint, ...]:
    found = tuple(context.networks.endpoints(record.id))
    if found:
        return found
    from hutch.network.user import load_endpoints

    return load_endpoints(context.directory(record.id) / "run")


def health_of(context: Context, record: InstanceRecord) -> HealthState | None:
    """Return what the supervisor's health check last wrote, None without a check."""
    if record.spec.health is None:
        return None
    try:
        fd = os.open(context.directory(record.id) / "run" / "health", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return HealthState(status="starting")
    try:
        return decode_json(os.read(fd, _MAX_HEALTH_FILE), HealthState)
    except msgspec.DecodeError:
        return HealthState(status="starting")
    finally:
        os.close(fd)


def status_text(record: InstanceRecord, health: HealthState | None) -> str:
    """Return the status as `docker ps` words it: `Up 5 minutes (healthy)`."""
    now = time.time_ns()
    since = format_duration((now - record.started_ns) / 1e9) if record.started_ns else ""
    match record.state:
        case State.RUNNING | State.PAUSED:
            extra = " (Paused)" if record.state == State.PAUSED else ""
            if health is not None:
                word = "health: starting" if health.status == "starting" else health.status
                extra += f" ({word})"
            return f"Up {since}{extra}"
        case State.EXITED | State.RESTARTING:
            ago = format_duration((now - record.finished_ns) / 1e9) if record.finished_ns else ""
            word = "Exited" if record.state == State.EXITED else "Restarting"
            return f"{word} ({record.exit_code}) {ago} ago"
        case State.SUSPENDED:
            ago = format_duration((now - record.finished_ns) / 1e9) if record.finished_ns else ""
            return f"Suspended {ago} ago"
        case State.CREATED:
            return "Created"
        case State.REMOVING:
            return "Removal In Progress"
    return record.state.value.capitalize()
