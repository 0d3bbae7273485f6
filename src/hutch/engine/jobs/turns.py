"""Do what a policy has decided: pause jobs, start others or let them go on, each with the room and
the memory that it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from hutch.engine.context import Context
from hutch.engine.jobs.attempt import Attempt, Hear
from hutch.engine.jobs.book import Book, Entry
from hutch.engine.jobs.clock import Clock
from hutch.engine.jobs.policies import QueuePolicy
from hutch.engine.jobs.records import JobState
from hutch.engine.jobs.relief import Relief, frozen_usage
from hutch.engine.jobs.room import Room
from hutch.engine.jobs.threads import Threads
from hutch.engine.jobs.timers import Timers
from hutch.errors import HutchError
from hutch.ids import new_instance_id
from hutch.sched import Decisions

if TYPE_CHECKING:
    from hutch.resources.admission import Decision

__all__ = ["Parts", "Turns"]


class Parts(NamedTuple):
    """What a dispatcher is made of."""

    context: Context
    book: Book
    queues: QueuePolicy
    room: Room
    relief: Relief
    timers: Timers


class Turns:
    """The jobs that are about to be paused, started or resumed. `refuse` takes back one that was
    to start and has found no room."""

    def __init__(
        self,
        parts: Parts,
        *,
        hear: Hear,
        refuse: Callable[[Entry, Decision], None],
        clock: Clock,
    ) -> None:
        self._context, self._book, self._queues, self._room, self._relief, self._timers = parts
        self._hear, self._refuse, self._clock = hear, refuse, clock
        self._threads = Threads("hutch-job")
        self._pausing: set[int] = set()  # to be paused as soon as they have started
        self._deferred: list[Entry] = []  # to be started when those have been paused

    def close(self) -> None:
        """Let threads end as their jobs do."""
        self._threads.close()

    def clear(self) -> None:
        """Forget what was to be started: it will be decided anew."""
        self._deferred.clear()

    def forget(self, entry: Entry) -> None:
        """Let a job not be started that was to be."""
        if entry in self._deferred:
            self._deferred.remove(entry)

    def over(self, entry: Entry) -> None:
        """Note that an attempt has ended."""
        self._pausing.discard(entry.record.id)
        self._relief.gone(entry.record.id)

    def started(self, entry: Entry) -> None:
        """Note that a job runs; pause it if that was decided meanwhile."""
        if entry.record.id in self._pausing:
            self._pause(entry)

    def carry_out(self, decisions: Decisions) -> None:
        """Do what was decided, as far as it can be done now."""
        for job in decisions.pause:
            self._pause(self._book.entries[int(job.id)])
        self._deferred += [self._book.entries[int(job.id)] for job in decisions.start]
        # What is to be paused as soon as it has started has its cores until then; what is being
        # relieved of its memory has that.
        if self._deferred and not self._pausing and not self._relief.awaited:
            busy = self._relief.busy
            chosen = [entry for entry in self._deferred if entry.record.id not in busy]
            if chosen and not self._relieve_for(chosen):
                self._deferred = [entry for entry in self._deferred if entry.record.id in busy]
                self._begin_all(chosen)

    def _relieve_for(self, chosen: list[Entry]) -> bool:
        """Take memory back that jobs need which are to begin; tell whether they are to wait."""
        active = self._book.active.values()
        for victim in self._relief.victims(chosen, active, self._room.now.memory):
            self._relief.begin(victim, awaited=True)
        return bool(self._relief.awaited)

    def _begin_all(self, chosen: list[Entry]) -> None:
        """Start or resume jobs: those that find room."""
        begun: list[Entry] = []

        def prepare() -> None:
            for entry in list(chosen):
                if not entry.is_active and self._prepare(entry, chosen):
                    begun.append(entry)

        for entry in list(chosen):
            if entry.is_active and not self._resume(entry, chosen):
                chosen.remove(entry)
        if not all(entry.is_active for entry in chosen):
            # What was taken for them and that they start is on disk, or neither.
            self._book.flush(prepare)
        for entry in begun:
            self.launch(entry)

    def _prepare(self, entry: Entry, chosen: list[Entry]) -> bool:
        """Take what a job needs, and note that it starts; tell whether there was room."""
        identifier = new_instance_id()
        decision = self._short_of_memory(entry, chosen)
        decision = decision or self._room.take(identifier, entry.record)
        if decision is not None:
            self._refuse(entry, decision)
            chosen.remove(entry)
            return False
        entry.identifier = identifier
        self._book.change(
            entry,
            state=JobState.STARTING,
            attempt=entry.record.attempt + 1,
            boot_id=self._context.boot_id,
            reason="",
        )
        return True

    def _short_of_memory(self, entry: Entry, chosen: list[Entry]) -> Decision | None:
        active = self._book.active.values()
        return self._relief.refusal(entry, chosen, active, self._room.now.memory)

    def launch(self, entry: Entry) -> None:
        """Begin an attempt, or go on with the one that there is."""
        entry.attempt = Attempt(
            self._context, entry.record, self._hear, identifier=entry.identifier
        )
        entry.attempt.begin(self._threads)

    def _pause(self, entry: Entry) -> None:
        if entry in self._deferred:
            self._deferred.remove(entry)
            return
        attempt = entry.attempt
        if entry.record.state == JobState.STARTING or attempt is None:
            self._pausing.add(entry.record.id)
            return
        self._pausing.discard(entry.record.id)
        try:
            if not attempt.pause():
                return
        except HutchError as exc:  # it runs beside those that have its cores now
            print(f"hutch: job {entry.record.id} is not paused: {exc}", file=sys.stderr)
            return
        self._book.slice(entry, self._clock.now_ns(), "paused")
        self._book.change(entry, state=JobState.PREEMPTED, preemptions=entry.record.preemptions + 1)
        usage = frozen_usage(self._context, attempt.instance) if entry.record.memory else 0
        self._relief.paused(entry, usage)
        self._room.give_way(attempt.instance, entry.record, usage)
        after_s = self._queues.suspends_after(entry.record.queue)
        if after_s and entry.record.isolation == "vm":
            self._timers.set(self._clock.now() + after_s, entry)

    def _resume(self, entry: Entry, chosen: list[Entry]) -> bool:
        """Let a job go on, if there is room for it again; tell whether there was."""
        self._pausing.discard(entry.record.id)
        attempt = entry.attempt
        if entry.record.state != JobState.PREEMPTED or attempt is None:
            return True
        suspended = attempt.is_suspended()
        take = self._room.take if suspended else self._room.come_back
        if self._short_of_memory(entry, chosen) or take(attempt.instance, entry.record):
            self._stay(entry)
            return False
        if suspended:
            self._relief.gone(entry.record.id)
            self._book.change(entry, state=JobState.STARTING)
            attempt.start_again()
            return True
        try:
            goes_on = attempt.resume()
        except HutchError as exc:
            print(f"hutch: job {entry.record.id} does not go on: {exc}", file=sys.stderr)
            self._stay(entry)
            return False
        if goes_on:
            self._relief.gone(entry.record.id)
            self._book.change(entry, state=JobState.RUNNING, mark=self._clock.now_ns())
            if entry.job is not None:
                entry.job.since = self._clock.now()
            self._timers.bound(entry)
        return True

    def _stay(self, entry: Entry) -> None:
        """Tell the policy that a job is paused as before; it may decide so again."""
        if entry.job is not None:
            self._queues.put_back(entry.job, self._clock.now())
