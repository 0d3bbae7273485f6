"""Look at the memory that instances have: what each uses, needs, was promised, and since when
it does nothing."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.context import Context
from hutch.engine.lookup import all_records
from hutch.engine.records import InstanceRecord
from hutch.errors import HutchError
from hutch.lifecycle import State
from hutch.linux.cgroup.reclaim import GroupMemory, is_precise, read_memory, read_pressure
from hutch.resources.inventory import read_inventory
from hutch.resources.ladder import Measure, Member, Situation, estimate, level_of
from hutch.resources.settings import Settings

if TYPE_CHECKING:
    from hutch.linux.cgroup import Group

__all__ = ["MEASURES", "MemoryReport", "MemoryUse", "View", "load_measures", "look_again"]
__all__ += ["observe", "report"]

MEASURES = "measures"
_SAMPLES = "memory_samples"
_LIVE = (State.RUNNING, State.PAUSED)
# Of one processor; a guest's clock ticks even when nothing runs in it.
_IDLE_SHARE = {"container": 0.005, "vm": 0.05}
_KSM = "/sys/kernel/mm/ksm"
_PAGE = 4096


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance was at the last look: its processor time, since when it is idle."""

    cpu_ns: int
    time_ns: int
    idle_since_ns: int
    working_set: int


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """One instance's memory in bytes. `usage` is what the host counts for it, `working_set` an
    estimate of what it needs, `guest` what a virtual machine's guest may use, `refaults` pages
    that came back soon after they had been taken; `measures` are the rungs in force."""

    id: str
    name: str
    kind: str
    state: str
    usage: int
    working_set: int
    cache: int
    swap: int
    guarantee: int
    limit: int | None
    guest: int
    idle_s: float
    refaults: int
    measures: tuple[str, ...] = ()


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """Who has the memory, how bad it is (`none`, `low`, `critical`), and what is in force.

    `available` can be had without taking anything from an instance; `some` and `full` are the
    kernel's percentages of stalls (None where it tells none, and watermarks alone count);
    `merged` are bytes that page merging saves.
    """

    level: str
    total: int
    available: int
    swap: int
    swap_free: int
    some: float | None
    full: float | None
    merged: int
    instances: tuple[MemoryUse, ...]
    measures: tuple[Measure, ...]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """One look: for the policy, and for people."""

    situation: Situation
    members: tuple[Member, ...]
    uses: tuple[MemoryUse, ...]
    swap: int
    groups: dict[str, dict[str, str]]


def load_measures(context: Context) -> list[Measure]:
    """Return what is in force, oldest first."""
    with context.store.read() as tx:
        found = [measure for _, measure in tx.items(MEASURES, Measure)]
    return sorted(found, key=lambda measure: measure.since_ns)


def report(context: Context, settings: Settings, view: View | None = None) -> MemoryReport:
    """Return the picture for people."""
    view = view or observe(context, settings)
    there = {record.id for record in all_records(context)}
    measures = [m for m in load_measures(context) if not m.id or m.id in there]
    in_force: dict[str, list[str]] = {}
    for measure in measures:
        in_force.setdefault(measure.id, []).append(measure.rung)
    now = view.situation
    return MemoryReport(
        level=level_of(now, settings.watermarks),
        total=now.total,
        available=now.available,
        swap=view.swap,
        swap_free=now.swap_free,
        some=now.some,
        full=now.full,
        merged=_merged(),
        instances=tuple(
            msgspec.structs.replace(use, measures=tuple(in_force.get(use.id, ())))
            for use in view.uses
        ),
        measures=tuple(measures),
    )


def _merged() -> int:
    with suppress(OSError, ValueError):
        return int(Path(f"{_KSM}/pages_sharing").read_text()) * _PAGE
    return 0


# ---- one look -----------------------------------------------------------------------------


def observe(context: Context, settings: Settings) -> View:
    """Look at every running instance and at what they share; take note for the next look."""
    with context.store.read() as tx:
        samples = dict(tx.items(_SAMPLES, Sample))
    members, uses, groups = [], [], {}
    mergeable = False
    fresh: dict[str, Sample] = {}
    for record in all_records(context):
        if record.state not in _LIVE or record.boot_id != context.boot_id:
            continue
        try:
            group = context.groups.hierarchy.load(record.id)
            member, use, fresh[record.id] = _look(context, record, group, samples.get(record.id))
        except (HutchError, OSError):
            continue  # it has just ended
        members.append(member)
        uses.append(use)
        groups[record.id] = group.directories
        mergeable = mergeable or record.spec.placement.merge
    with context.store.write() as tx:
        for key in samples.keys() - fresh.keys():
            tx.delete(_SAMPLES, key)
        for key, sample in fresh.items():
            tx.put(_SAMPLES, key, sample)
    situation, swap = _situation(context, settings, uses, mergeable=mergeable)
    return View(
        situation=situation, members=tuple(members), uses=tuple(uses), swap=swap, groups=groups
    )


def look_again(context: Context, settings: Settings, view: View) -> View:
    """Return what has become of a view a moment later, without asking the guests: they take
    long to answer when there is a storm."""
    records = {record.id: record for record in all_records(context)}
    members, uses = [], []
    for member, use in zip(view.members, view.uses, strict=True):
        record = records.get(member.id)
        if record is None or record.state not in _LIVE:
            continue
        had = read_memory(view.groups[member.id])
        now = {"usage": had.usage, "cache": had.cache, "limit": had.limit, "state": record.state}
        members.append(msgspec.structs.replace(member, **now))
        uses.append(msgspec.structs.replace(use, **now))
    mergeable = any(records[m.id].spec.placement.merge for m in members)
    situation, swap = _situation(context, settings, uses, mergeable=mergeable)
    return msgspec.structs.replace(
        view, situation=situation, members=tuple(members), uses=tuple(uses), swap=swap
    )


def _look(
    context: Context, record: InstanceRecord, group: Group, before: Sample | None
) -> tuple[Member, MemoryUse, Sample]:
    had = read_memory(group.directories)
    now_ns, cpu_ns = time.time_ns(), group.stats().cpu.total_ns
    guest, used = _guest(context, record)
    # A guest's cache is its own affair; what its disks' files take here goes without asking it.
    busy = used if guest else had.usage - had.idle_cache
    working = busy
    if before is not None:
        working = estimate(before.working_set, busy, (now_ns - before.time_ns) / 1e9)
    working = min(working, guest or had.usage)
    idle_since = _idle_since(record, before, now_ns, cpu_ns)
    member = _member(record, had, working, guest, (now_ns - idle_since) / 1e9)
    use = MemoryUse(
        id=record.id,
        name=record.name,
        kind=member.kind,
        state=member.state,
        usage=had.usage,
        working_set=working,
        cache=had.cache,
        swap=had.swap,
        guarantee=member.guarantee,
        limit=had.limit,
        guest=guest,
        idle_s=member.idle_s,
        refaults=had.refaults,
    )
    sample = Sample(cpu_ns=cpu_ns, time_ns=now_ns, idle_since_ns=idle_since, working_set=working)
    return member, use, sample


def _member(
    record: InstanceRecord, had: GroupMemory, working: int, guest: int, idle_s: float
) -> Member:
    spec = record.spec
    is_machine = spec.isolation == "vm"
    return Member(
        id=record.id,
        name=record.name,
        kind=spec.isolation,
        state=record.state,
        usage=had.usage,
        cache=had.cache,
        working_set=working,
        guarantee=spec.resources.guarantee,
        limit=had.limit,
        balloon=guest,
        idle_s=idle_s,
        may_suspend=is_machine and spec.machine.from_disk is None and not spec.auto_remove,
        order=spec.oom_score_adj,
        started_ns=record.started_ns,
    )


def _idle_since(record: InstanceRecord, before: Sample | None, now_ns: int, cpu_ns: int) -> int:
    """Return since when it has done next to nothing; now, for one that works or is new."""
    if before is None or cpu_ns < before.cpu_ns:
        return now_ns
    allowed = (now_ns - before.time_ns) * _IDLE_SHARE[record.spec.isolation]
    return before.idle_since_ns if cpu_ns - before.cpu_ns <= allowed else now_ns


def _guest(context: Context, record: InstanceRecord) -> tuple[int, int]:
    """Return what a running guest may use, and what it uses; zeros where it is not known.

    A guest counts the pages of a balloon that may shrink by itself as used; see
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM in Linux' drivers/virtio/virtio_balloon.c.
    """
    if record.spec.isolation != "vm" or record.state != State.RUNNING:
        return 0, 0
    # What is given back of a huge page is nothing until all of it is, and what was made ahead
    # is kept.
    if (
        record.spec.machine.from_disk is not None
        or record.spec.placement.huge
        or record.spec.placement.prealloc
        or record.spec.placement.memory == "pool"
    ):
        return 0, 0
    from hutch.drivers.vm.limits import memory_of
    from hutch.qmp import conversation
    from hutch.qmp.devices import query_balloon, query_plugged

    with suppress(HutchError, OSError):
        with conversation(f"{context.directory(record.id)}/run/qmp.sock") as monitor:
            size = query_balloon(monitor) + query_plugged(monitor)
        in_balloon = max(0, memory_of(record.spec) - size)
        used = context.machines.stats(record.id).memory.usage
        return size, max(0, used - in_balloon)
    return 0, 0


def _situation(
    context: Context, settings: Settings, uses: list[MemoryUse], *, mergeable: bool
) -> tuple[Situation, int]:
    """Return what all share: the host's memory, or the part of it that this root has."""
    host = read_inventory()
    parent = context.groups.hierarchy.parent
    taken = sum(use.cache for use in uses)
    total, available = host.memory, max(0, host.available - taken)
    pressure = read_pressure("/proc/pressure/memory")
    own = settings.parent != Settings().parent
    if own and settings.memory and settings.memory < total:
        total = settings.memory
        available = min(available, max(0, total - read_memory(parent).usage))
        path = f"{parent['']}/memory.pressure" if is_precise(parent) else ""
        pressure = read_pressure(path) if path else None
    situation = Situation(
        total=total,
        available=available,
        swap_free=host.swap_free,
        some=None if pressure is None else pressure.some,
        full=None if pressure is None else pressure.full,
        precise=is_precise(parent),
        merging=_merging() if mergeable else None,
    )
    return situation, host.swap


def _merging() -> bool | None:
    """Tell whether equal pages are merged; None where this kernel cannot."""
    with suppress(OSError):
        return Path(f"{_KSM}/run").read_text().strip() == "1"
    return None
