"""Look at jobs and ask for changes: for every process, whoever dispatches."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from hutch.engine.context import Context
from hutch.engine.jobs.attempt import directory_of
from hutch.engine.jobs.records import (
    ACTIVE,
    DONE,
    REQUESTS,
    SPECS,
    WAITING,
    JobRecord,
    JobRequest,
    JobState,
    RequestKind,
    Selection,
    key_of,
)
from hutch.engine.jobs.submit import find_job
from hutch.engine.jobs.wakeup import poke
from hutch.errors import OperationTimeout, WrongState
from hutch.ids import new_id
from hutch.records import Transaction

__all__ = ["count_jobs", "ensure_dispatcher", "has_work", "list_jobs", "load_ended"]
__all__ += ["load_job", "prune", "request", "request_all"]

_ANSWER_S = 30.0
_POLL_S = 0.005


class _Brief(msgspec.Struct, frozen=True, gc=False):
    """What a job is found by: a tenth of the cost of its record."""

    id: int
    queue: str
    owner: str = ""
    array: int = 0
    state: JobState = JobState.PENDING


def load_job(context: Context, number: int) -> JobRecord:
    """Return a job's record; raise `NotFound`."""
    with context.store.read() as tx:
        return find_job(tx, number)


def load_ended(context: Context, number: int) -> JobRecord | None:
    """Return the record of a job that is over, None for any other."""
    with context.store.read() as tx:
        return tx.get(DONE, key_of(number), JobRecord)


def list_jobs(
    context: Context,
    *,
    all_states: bool = False,
    queue: str | None = None,
    owner: str | None = None,
    states: Sequence[JobState] = (),
    last: int = 0,
) -> list[JobRecord]:
    """Return records in the order of submission; with `last` no more than so many."""
    tables = [WAITING, ACTIVE]
    if all_states or any(state.is_final for state in states):
        tables.append(DONE)
    of = Selection(queue=queue or "", owner=owner or "", states=tuple(states))
    with context.store.read() as tx:
        if last:
            briefs = [(b.id, t) for t in tables for _, b in tx.items(t, _Brief) if of.has(b)]
            rows = [tx.get(t, key_of(number), JobRecord) for number, t in sorted(briefs)[-last:]]
            return [record for record in rows if record is not None]
        found = [record for table in tables for _, record in tx.items(table, JobRecord)]
    return sorted(filter(of.has, found), key=lambda record: record.id)


def count_jobs(context: Context) -> dict[tuple[str, JobState], int]:
    """Return how many jobs that are not over each queue has, by state."""
    counts: dict[tuple[str, JobState], int] = {}
    with context.store.read() as tx:
        for table in (WAITING, ACTIVE):
            for _, brief in tx.items(table, _Brief):
                key = (brief.queue, brief.state)
                counts[key] = counts.get(key, 0) + 1
    return counts


def has_work(context: Context) -> bool:
    """Tell whether there is anything for a dispatcher to do."""
    with context.store.read() as tx:
        return bool(
            tx.count(ACTIVE) or tx.count(REQUESTS) or tx.items_after(WAITING, JobRecord, "", 1)
        )


def ensure_dispatcher(context: Context) -> None:
    """Wake the dispatcher of the root; start one in the background where there is none."""
    if poke(context.root):
        return
    from hutch.engine.jobs.background import start_process

    start_process(context)


_POSSIBLE: dict[RequestKind, frozenset[JobState]] = {
    RequestKind.HOLD: frozenset({JobState.PENDING}),
    RequestKind.RELEASE: frozenset({JobState.HELD}),
    RequestKind.PRIORITY: frozenset(s for s in JobState if not s.is_final),
    RequestKind.CANCEL: frozenset(s for s in JobState if not s.is_final),
}


def request(context: Context, number: int, kind: RequestKind, *, priority: int = 0) -> None:
    """Ask the dispatcher for a change and wait until it has taken it up.

    Raises `WrongState` for a job that is not in a state for it, and `OperationTimeout` where
    no dispatcher answers: the request then stays, and is done when there is one.
    """
    with context.store.write(durable=True) as tx:
        record = find_job(tx, number)
        if record.state not in _POSSIBLE[kind]:
            raise WrongState(f"job {number} is {record.state}: no {kind} is possible")
        key = _put(tx, JobRequest(job=number, kind=kind, priority=priority))
    _wait_taken(context, key, f"job {number}: the {kind}")


def request_all(context: Context, kind: RequestKind, of: Selection) -> int:
    """Ask the same for all jobs that are meant, and that it is possible for; return how many
    those were. Raises `OperationTimeout` as `request` does."""
    with context.store.write(durable=True) as tx:
        count = sum(
            record.state in _POSSIBLE[kind] and of.has(record)
            for table in (WAITING, ACTIVE)
            for _, record in tx.items(table, JobRecord)
        )
        if not count:
            return 0
        key = _put(tx, JobRequest(kind=kind, of=of))
    _wait_taken(context, key, f"the {kind} of {count} jobs")
    return count


def _put(tx: Transaction, wanted: JobRequest) -> str:
    key = f"{time.time_ns():020d}-{new_id()[:8]}"
    tx.put(REQUESTS, key, wanted)  # no insert: a cancellation makes room on a full disk
    return key


def _wait_taken(context: Context, key: str, what: str) -> None:
    ensure_dispatcher(context)
    deadline = time.monotonic() + _ANSWER_S
    while True:
        with context.store.read() as tx:
            if tx.get(REQUESTS, key, JobRequest) is None:
                return
        if time.monotonic() > deadline:
            raise OperationTimeout(f"{what}: no dispatcher has taken it up in {_ANSWER_S:g} s")
        time.sleep(_POLL_S)


def prune(context: Context, older_than_s: float) -> int:
    """Forget jobs that ended long enough ago, and specifications that no job has any more."""
    before = time.time_ns() - int(older_than_s * 1e9)
    with context.store.write() as tx:
        ended = [record for _, record in tx.items(DONE, JobRecord)]
        gone = [record for record in ended if record.finished_ns <= before]
        needed = {record.spec for record in ended if record.finished_ns > before}
        for table in (WAITING, ACTIVE):
            needed.update(record.spec for _, record in tx.items(table, JobRecord))
        for record in gone:
            tx.delete(DONE, key_of(record.id))
        for number in {record.spec for record in gone} - needed:
            tx.delete(SPECS, key_of(number))
    for record in gone:
        directory = directory_of(context, record.id)
        if directory.is_dir():
            context.trash.discard(str(directory))
    return len(gone)
