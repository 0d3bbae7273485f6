"""The memory of preempted jobs: counted while they are frozen, and taken back when somebody
needs it.

A policy believes that a paused job gives its memory back. That is made true here before another
job begins: what can go of a frozen container's memory is reclaimed (its files, and where there is
swap the rest), a machine is suspended to disk. What is left of it then counts against whoever is
to start, who is refused if it is too much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.headroom import headroom
from hutch.engine.jobs.book import Entry
from hutch.engine.jobs.records import JobState
from hutch.errors import HutchError
from hutch.linux.cgroup.reclaim import usage_of

if TYPE_CHECKING:
    from hutch.resources.admission import Decision

__all__ = ["Relief", "frozen_usage"]


def frozen_usage(context: Context, identifier: str) -> int:
    """Return the bytes that an instance has now, 0 for one that is not there."""
    with suppress(HutchError, OSError):
        return usage_of(context.groups.hierarchy.load(identifier).directories)
    return 0


class Relief:
    """What is known of preempted jobs' memory. `busy` are those that are being relieved, and
    `awaited` those of them for which a start waits."""

    def __init__(self, context: Context, workers: Executor) -> None:
        self._context = context
        self._workers = workers
        self._kept: dict[int, int] = {}
        self._done: set[int] = set()
        self.busy: set[int] = set()
        self.awaited: set[int] = set()

    def paused(self, entry: Entry, usage: int) -> None:
        """Note what a job has that was just frozen."""
        self._kept[entry.record.id] = usage
        self._done.discard(entry.record.id)

    def gone(self, number: int) -> None:
        """Forget a job that runs again, or has ended."""
        self._kept.pop(number, None)
        self._done.discard(number)

    def relieved(self, number: int, kept: int) -> None:
        """Note that a job has been relieved, and what it has yet."""
        self.busy.discard(number)
        self.awaited.discard(number)
        if number in self._kept:
            self._kept[number] = kept
            self._done.add(number)

    def begin(self, entry: Entry, *, awaited: bool) -> None:
        """Relieve a job on another thread; its attempt reports when that is done."""
        number = entry.record.id
        if number in self.busy or number in self._done or entry.attempt is None:
            return
        self.busy.add(number)
        if awaited:
            self.awaited.add(number)
        self._workers.submit(entry.attempt.relieve)

    def victims(
        self, chosen: Collection[Entry], active: Iterable[Entry], memory: int | None
    ) -> list[Entry]:
        """Return whom to relieve so that the chosen have their memory: who has been frozen for
        longest first, and no more than are needed."""
        asked = sum(entry.record.memory for entry in chosen)
        if not asked or not self._kept:
            return []
        everybody = list(active)
        frozen = [
            entry
            for entry in everybody
            if self._is_frozen(entry) and entry not in chosen and self._kept[entry.record.id]
        ]
        short = self._nominal(everybody, chosen) + asked - (memory or 0)
        short = max(short, asked - headroom(self._context))
        found: list[Entry] = []
        for entry in sorted(
            frozen, key=lambda e: e.record.slices[-1].end if e.record.slices else 0
        ):
            if short <= 0:
                break
            if entry.record.id not in self._done:
                found.append(entry)
                short -= self._kept[entry.record.id]
        return found

    def refusal(
        self, entry: Entry, chosen: Collection[Entry], active: Iterable[Entry], memory: int | None
    ) -> Decision | None:
        """Return why a job cannot start beside what runs and what is frozen, None if it can."""
        needed = entry.record.memory
        if not needed or memory is None or not self._kept:
            return None
        everybody = list(active)
        others = [e for e in everybody if e is not entry and e not in chosen]
        used = self._nominal(others, ()) + sum(e.record.memory for e in chosen if e is not entry)
        if used + needed <= memory:
            return None
        from hutch.resources.admission import Decision, Held, shortage_of
        from hutch.resources.demand import Demand

        held = [
            Held(id=str(e.record.id), name=f"job {e.record.id}", amount=amount)
            for e in {*others, *chosen} - {entry}
            if (amount := self._amount(e))
        ]
        shortage = shortage_of("memory", needed, memory, held, "memory")
        if shortage is None:
            return None
        return Decision(fits=False, demand=Demand(memory=needed), shortages=(shortage,))

    def _is_frozen(self, entry: Entry) -> bool:
        return entry.record.state == JobState.PREEMPTED and entry.record.id in self._kept

    def _nominal(self, entries: Iterable[Entry], without: Collection[Entry]) -> int:
        return sum(self._amount(entry) for entry in entries if entry not in without)

    def _amount(self, entry: Entry) -> int:
        """Return what a job counts for: what it asked for, or as long as it is frozen, has."""
        if not self._is_frozen(entry):
            return entry.record.memory
        return min(entry.record.memory, self._kept[entry.record.id])
