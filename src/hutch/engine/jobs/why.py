"""Why a job does not run (yet): as a sentence, and as the decision behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from hutch.engine.context import Context
from hutch.engine.jobs.board import load_job
from hutch.engine.jobs.book import unmet
from hutch.engine.jobs.records import (
    ACTIVE,
    DONE,
    META,
    QUEUES,
    WAITING,
    JobRecord,
    JobState,
    Limits,
    QueueRecord,
    key_of,
)
from hutch.engine.jobs.room import demand_of_job
from hutch.engine.jobs.wakeup import poke
from hutch.errors import NotFound
from hutch.records import Transaction
from hutch.resources.admission import Decision, Held, Shortage, shortage_of
from hutch.resources.demand import Demand

__all__ = ["Why", "why"]

Cause = Literal[
    "over", "runs", "preempted", "held", "dependencies", "paused queue", "queue's cpus",
    "no room", "turn", "no dispatcher",
]  # fmt: skip


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """The cause, the same as a sentence, how many pending jobs of its queue came before, and
    where it is a matter of room, the decision: what is short, who holds it, what would help."""

    job: int
    state: JobState
    cause: Cause
    text: str
    ahead: int = 0
    decision: Decision | None = None


class _Brief(msgspec.Struct, frozen=True, gc=False):
    """What is counted of jobs that wait."""

    id: int
    queue: str
    state: JobState = JobState.PENDING


def why(context: Context, number: int) -> Why:
    """Explain where a job stands; raise `NotFound`. It is looked up now, by whoever asks."""
    record = load_job(context, number)
    state = record.state
    if state.is_final:
        ended = "it ran out of time" if state == JobState.TIMEOUT else f"it is {state}"
        return _answer(record, "over", ended + _because(record))
    if state == JobState.HELD:
        return _answer(record, "held", f"it is held{_because(record)}: {_cure(record)}")
    if state in (JobState.STARTING, JobState.RUNNING):
        return _answer(record, "runs", f"it is {state}")
    with context.store.read() as tx:
        waits = _dependencies(tx, record)
        queue = tx.get(QUEUES, record.queue, QueueRecord)
        active = [found for _, found in tx.items(ACTIVE, JobRecord)]
        limits = tx.get(META, "limits", Limits)
        ahead = _ahead(tx, record)
    if waits:
        return _answer(record, "dependencies", "it waits for " + ", ".join(waits))
    if queue is None or queue.paused:
        return _answer(record, "paused queue", f"queue {record.queue} is paused", ahead)
    if not poke(context.root):
        return _answer(record, "no dispatcher", "no dispatcher runs: `hutch queue run`", ahead)
    decision = _decision(context, record, active, limits)
    if not decision.fits:
        cause: Cause = "preempted" if state == JobState.PREEMPTED else "no room"
        return _answer(record, cause, f"no room: {decision.explain()}", ahead, decision)
    return _turn(record, queue, active, ahead, decision)


def _cure(record: JobRecord) -> str:
    """Return what helps a job that is held: by somebody who gave no reason, or because it is more
    than jobs can have."""
    release = f"`hutch job release {record.id}`"
    if not record.reason:
        return release
    return f"submit it again with less, or {release} when there is more"


def _because(record: JobRecord) -> str:
    return f" ({record.reason})" if record.reason else ""


def _answer(
    record: JobRecord, cause: Cause, text: str, ahead: int = 0, decision: Decision | None = None
) -> Why:
    return Why(
        job=record.id, state=record.state, cause=cause, text=text, ahead=ahead, decision=decision
    )


def _turn(
    record: JobRecord,
    queue: QueueRecord,
    active: Sequence[JobRecord],
    ahead: int,
    decision: Decision,
) -> Why:
    """Answer for a job for which there is room, were it its turn."""
    used = sum(r.cores for r in active if r.queue == queue.name and _runs(r))
    if queue.cores and used + record.cores > queue.cores:
        text = f"jobs of queue {queue.name} have {used:g} of the {queue.cores:g} cpus it may have"
        return _answer(record, "queue's cpus", text, ahead, decision)
    if record.state == JobState.PREEMPTED:
        text = f"others go first by {queue.policy}"
        return _answer(record, "preempted", text, ahead, decision)
    before = f"; {ahead} pending jobs came before it" if ahead else ""
    return _answer(
        record, "turn", f"its turn has not come by {queue.policy}{before}", ahead, decision
    )


def _runs(record: JobRecord) -> bool:
    return record.state in (JobState.STARTING, JobState.RUNNING)


def _dependencies(tx: Transaction, record: JobRecord) -> list[str]:
    """Return the jobs that it waits for, each with how it must end."""
    found = []
    for dependency in record.after:
        ended = tx.get(DONE, key_of(dependency.job), JobRecord)
        if ended is None or unmet(record, dependency.job, ended.state):
            found.append(f"job {dependency.job} ({dependency.condition})")
    return found


def _ahead(tx: Transaction, record: JobRecord) -> int:
    return sum(
        brief.queue == record.queue and brief.state == JobState.PENDING and brief.id < record.id
        for _, brief in tx.items(WAITING, _Brief)
    )


def _decision(
    context: Context, record: JobRecord, active: Sequence[JobRecord], limits: Limits | None
) -> Decision:
    """Return the admission decision on a job now: by what instances and jobs hold of the host,
    then by what the dispatcher gives out to jobs."""
    from hutch.engine.admitting import decide_for

    try:
        demand = demand_of_job(context, record)
    except NotFound:
        demand = Demand(cpus=record.cores, memory=record.memory)
    decision = decide_for(context, demand, without=record.instance)
    if not decision.fits or limits is None:
        return decision
    running = [r for r in active if _runs(r) and r.id != record.id]
    shortages = [
        shortage
        for shortage in (
            _short("cpus", record.cores, limits.cores, limits.cores_now, running),
            _short("memory", record.memory, limits.memory, limits.memory_now, running),
        )
        if shortage is not None
    ]
    return Decision(fits=not shortages, demand=demand, shortages=tuple(shortages))


def _short(
    resource: str, needed: float, whole: float, now: float, running: Sequence[JobRecord]
) -> Shortage | None:
    held = [
        Held(id=str(r.id), name=f"job {r.id}", amount=r.cores if resource == "cpus" else r.memory)
        for r in running
    ]
    held = [holder for holder in held if holder.amount]
    if whole > now:
        held.append(Held(id="", name="instances", amount=whole - now))
    return shortage_of(resource, needed, whole, held, resource)
