"""The jobs that are not over, as their dispatcher has them, and the changes still to be written.

Only the dispatcher writes records of jobs once they are submitted, so what is in memory is the
truth, and many changes are written in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from hutch.engine.context import Context
from hutch.engine.jobs.attempt import Attempt
from hutch.engine.jobs.records import (
    ACTIVE,
    DONE,
    REQUESTS,
    SLICES_KEPT,
    SPECS,
    WAITING,
    Condition,
    JobRecord,
    JobRequest,
    JobState,
    Slice,
    key_of,
)
from hutch.engine.jobs.submit import last_number
from hutch.sched import Job

__all__ = ["Book", "Entry"]

_BATCH = 10_000
_IN_COMMON = ("queue", "image", "command", "owner", "group", "labels", "outputs", "after")


class Entry:
    """One job that is not over. `job` is what its policy sees of it, None while it may not run;
    `ending` is what its end will be called, where somebody has asked for it; `identifier` is
    what its instance is called, for which room was taken."""

    __slots__ = ("attempt", "blockers", "ending", "identifier", "job", "record")

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self.job: Job | None = None
        self.attempt: Attempt | None = None
        self.blockers: set[int] | None = None
        self.ending: JobState | None = None
        self.identifier = ""

    @property
    def is_active(self) -> bool:
        """Whether it has an instance, or is about to."""
        return self.record.state in (JobState.STARTING, JobState.RUNNING, JobState.PREEMPTED)


class Book:
    """The entries by number, and what waits to be written."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.entries: dict[int, Entry] = {}
        self.active: dict[int, Entry] = {}
        self.dependents: dict[int, list[int]] = {}
        self._last = ""
        self._first: tuple[int, JobRecord | None] = (0, None)
        self._puts: dict[tuple[str, str], JobRecord] = {}
        self._deletes: set[tuple[str, str]] = set()
        self._events: list[tuple[str, JobRecord]] = []
        self._durable = False

    # ---- reading --------------------------------------------------------------------------

    def load_active(self) -> list[Entry]:
        """Take in the jobs that had an instance when the dispatcher before this one ended."""
        with self._context.store.read() as tx:
            found = tx.items(ACTIVE, JobRecord)
        return [self._add(record) for _, record in found]

    def load_new(self) -> list[Entry]:
        """Take in the jobs that were submitted since this was last asked, in their order."""
        found: list[Entry] = []
        while True:
            with self._context.store.read() as tx:
                rows = tx.items_after(WAITING, JobRecord, self._last, _BATCH)
            found += [self._add(record) for _, record in rows if record.id not in self.entries]
            if rows:
                self._last = rows[-1][0]
            if len(rows) < _BATCH:
                return found

    def load_ended(self, count: int) -> list[JobRecord]:
        """Return jobs that are over, of the last `count` that were submitted."""
        with self._context.store.read() as tx:
            first = max(0, last_number(tx) - count)
            found = tx.items_after(DONE, JobRecord, key_of(first), count)
        return [record for _, record in found]

    def _add(self, record: JobRecord) -> Entry:
        entry = self.entries[record.id] = Entry(self._alike(record))
        if entry.is_active:
            self.active[record.id] = entry
        return entry

    def _alike(self, record: JobRecord) -> JobRecord:
        """Return a record that shares with others of its array what they have in common: a
        hundred thousand of them fit into memory."""
        if not record.array:
            return record
        number, first = self._first
        if number != record.array or first is None:
            self._first = record.array, record
            return record
        same = {
            name: value
            for name in _IN_COMMON
            if (value := getattr(first, name)) == getattr(record, name)
        }
        return msgspec.structs.replace(record, **same)

    def block(self, entry: Entry) -> str:
        """Note what the job waits for; return why it can never run, "" where it may."""
        for dependency in entry.record.after:
            if dependency.job in self.entries:
                entry.blockers = (entry.blockers or set()) | {dependency.job}
                self.dependents.setdefault(dependency.job, []).append(entry.record.id)
                continue
            with self._context.store.read() as tx:
                ended = tx.get(DONE, key_of(dependency.job), JobRecord)
            reason = unmet(entry.record, dependency.job, ended.state if ended else None)
            if reason:
                return reason
        return ""

    def take_requests(self) -> list[JobRequest]:
        """Return what was asked, in order; it is forgotten with the next `flush`."""
        with self._context.store.read() as tx:
            found = tx.items(REQUESTS, JobRequest)
        self._deletes.update((REQUESTS, key) for key, _ in found)
        return [request for _, request in found]

    # ---- writing --------------------------------------------------------------------------

    def change(self, entry: Entry, event: str = "", **changes: object) -> None:
        """Change a record; written by the next `flush`. A change of state may move it to
        another table; one that must outlast a power cut is on disk after that flush."""
        old = entry.record
        new = msgspec.structs.replace(old, **changes)
        entry.record = new
        key = key_of(new.id)
        before, after = _table(old.state), _table(new.state)
        if before != after:
            self._deletes.add((before, key))
            self._puts.pop((before, key), None)
            self._durable = True
            self.active.pop(new.id, None)
        if after == ACTIVE:
            self.active[new.id] = entry
        self._deletes.discard((after, key))
        self._puts[after, key] = new
        if event:
            self._events.append((event, new))
        if after == DONE:
            del self.entries[new.id]
            if not new.array:
                self._deletes.add((SPECS, key_of(new.spec)))

    def slice(self, entry: Entry, now_ns: int, then: str = "") -> None:
        """Book the time since the job last began or went on, and what is done to it now."""
        record = entry.record
        if not record.mark:
            return
        end = max(now_ns, record.mark)
        self.change(
            entry,
            mark=0,
            ran_ns=record.ran_ns + end - record.mark,
            slices=(*record.slices, Slice(record.mark, end, then))[-SLICES_KEPT:],
        )

    def amend(self, entry: Entry, then: str, given: int) -> None:
        """Book what was done besides to a job that has been paused."""
        *before, last = entry.record.slices
        last = Slice(last.begin, last.end, then, last.given + given)
        self.change(entry, slices=(*before, last))

    def flush(self, first: Callable[[], None] | None = None) -> None:
        """Write all changes in one transaction. What `first` writes and changes is of the same,
        and on disk with it."""
        if first is None and not (self._puts or self._deletes):
            return
        with self._context.store.write(durable=self._durable or first is not None) as tx:
            if first is not None:
                first()
            for table, key in self._deletes:
                tx.delete(table, key)
            for (table, key), record in self._puts.items():
                tx.put(table, key, record)
            for action, record in self._events:
                tx.event("job", action, str(record.id), name=record.name, queue=record.queue)
        self._puts.clear()
        self._deletes.clear()
        self._events.clear()
        self._durable = False


def unmet(record: JobRecord, number: int, state: JobState | None) -> str:
    """Return why a dependency that has ended keeps a job from running, "" where it does not."""
    wanted = next(d.condition for d in record.after if d.job == number)
    if state is None:
        return f"job {number}, which it waits for, is gone"
    if wanted == Condition.ANY or (wanted == Condition.OK) == (state == JobState.COMPLETED):
        return ""
    return f"job {number} is {state}, and {wanted} was asked for"


def _table(state: JobState) -> str:
    if state in (JobState.HELD, JobState.PENDING):
        return WAITING
    return DONE if state.is_final else ACTIVE
