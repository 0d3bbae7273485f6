"""Highest response ratio next, and the tree that finds it without looking at every job."""

from __future__ import annotations

import math
from typing import ClassVar

from hutch.sched.job import Job
from hutch.sched.ledger import Capacity
from hutch.sched.policy import NOTHING, Base, Decisions

__all__ = ["HRRN", "Contest"]

_FIRST = 16
_CATCH_UP = 128


class HRRN(Base):
    """The job with the highest (waiting + estimate) / estimate runs next, to its end.

    Short jobs first, as SJF, but a long one gains as it waits and does not starve. Source:
    Brinch Hansen, "An analysis of response ratio scheduling", IFIP 1971.
    """

    name: ClassVar[str] = "hrrn"
    summary: ClassVar[str] = "highest response ratio next: short first, long in the end"

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self._contest = Contest()
        self._slots: dict[int, int] = {}

    def _enqueue(self, job: Job, now: float) -> None:
        if (slot := self._slots.pop(job.seq, None)) is not None:
            self._contest.remove(slot, now)
        self._slots[job.seq] = self._contest.put(job, now)
        if self.pending % _CATCH_UP == 0:
            # Between decisions far apart much would change at once.
            self._contest.winner(now)

    def _withdrawn(self, job: Job, now: float) -> None:
        self._contest.remove(self._slots.pop(job.seq), now)

    def decide(self, now: float) -> Decisions:
        ledger = self.ledger
        started: list[Job] = []
        while self.pending and ledger.cores > 0:
            job = self._contest.winner(now)
            if job is None or not ledger.fits(job):
                break
            self._contest.remove(self._slots.pop(job.seq), now)
            self._start(job, now)
            started.append(job)
        return Decisions((), started) if started else NOTHING


class Contest:
    """Who of many jobs has the highest response ratio, as time goes on.

    A kinetic tournament (Basch, Guibas and Hershberger, "Data structures for mobile data",
    SODA 1997): each inner node keeps the winner below it and until when it stays that; as a
    ratio is a straight line in time, the moment when a loser overtakes is known. A look
    costs only the nodes whose winner has changed, an insertion or a removal one path.
    """

    def __init__(self) -> None:
        self._size = _FIRST
        self._winner: list[Job | None] = [None] * (2 * _FIRST)
        self._until: list[float] = [math.inf] * (2 * _FIRST)
        self._free = list(range(_FIRST - 1, -1, -1))

    def put(self, job: Job, now: float) -> int:
        """Let a job take part; return its slot."""
        if not self._free:
            self._grow(now)
        slot = self._free.pop()
        self._set(slot, job, now)
        return slot

    def remove(self, slot: int, now: float) -> None:
        """Take the job in a slot out."""
        self._set(slot, None, now)
        self._free.append(slot)

    def winner(self, now: float) -> Job | None:
        """Return the job with the highest ratio now; ties go to the one submitted first."""
        if self._until[1] <= now:
            self._renew(1, now)
        return self._winner[1]

    def _set(self, slot: int, job: Job | None, now: float) -> None:
        node = slot + self._size
        self._winner[node] = job
        node //= 2
        while node:
            self._play(node, now)
            node //= 2

    def _renew(self, node: int, now: float) -> None:
        if node >= self._size:
            return
        for child in (2 * node, 2 * node + 1):
            if self._until[child] <= now:
                self._renew(child, now)
        self._play(node, now)

    def _play(self, node: int, now: float) -> None:
        left, right = 2 * node, 2 * node + 1
        a, b = self._winner[left], self._winner[right]
        until = min(self._until[left], self._until[right])
        if a is None or b is None:
            self._winner[node] = b if a is None else a
            self._until[node] = until
            return
        if not _is_ahead(a, b, now):
            a, b = b, a
        self._winner[node] = a
        # The lines (t - arrival) / estimate cross at most once more, if b's is the steeper.
        if b.estimate < a.estimate:
            crossing = (
                (b.arrival * a.estimate - a.arrival * b.estimate) / (a.estimate - b.estimate)
                if a.estimate < math.inf
                else b.arrival
            )
            until = min(until, crossing)
        self._until[node] = until

    def _grow(self, now: float) -> None:
        old, leaves = self._size, self._winner[self._size :]
        self._size = 2 * old
        self._free = list(range(self._size - 1, old - 1, -1))
        self._winner = [None] * self._size + leaves + [None] * old
        self._until = [math.inf] * (2 * self._size)
        for node in range(self._size - 1, 0, -1):
            self._play(node, now)


def _is_ahead(a: Job, b: Job, now: float) -> bool:
    # (now - arrival) / estimate, without dividing by an estimate of 0.
    ours, theirs = _gain(a, now), _gain(b, now)
    return ours > theirs or (ours == theirs and a.seq < b.seq)


def _gain(job: Job, now: float) -> float:
    waited = now - job.arrival
    if waited <= 0:
        return 0
    return waited / job.estimate if job.estimate > 0 else math.inf
