"""EASY backfilling: the first that waits gets a reservation, others may fill the gap."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from typing import ClassVar

from hutch.sched.job import Job, Phase
from hutch.sched.ledger import Capacity, Ledger
from hutch.sched.parameters import Parameter
from hutch.sched.policies.backlog import Backlog
from hutch.sched.policy import NOTHING, Base, Decisions

__all__ = ["EASY"]

_FRESH = 64


class EASY(Base):
    """First come, first served; later jobs run early where that delays not the first.

    When the first does not fit, it gets a reservation: the shadow time, when enough will be
    free by the estimates of those that run. What is then left over are the spare resources.
    A later job that fits now is started if it is expected to end before the shadow time, or
    if it takes only what is spare. Only the first has a reservation; others may be delayed.
    A job that outlives its estimate is expected to end at any moment. One without an
    estimate is started early on spare resources only.

    Sources: Lifka, "The ANL/IBM SP scheduling system", JSSPP 1995; Mu'alem and Feitelson,
    "Utilization, predictability, workloads, and user runtime estimates in scheduling the
    IBM SP2 with backfilling", IEEE TPDS 12(6), 2001.
    """

    name: ClassVar[str] = "easy"
    summary: ClassVar[str] = "FCFS with EASY backfilling: gaps are filled, the first not delayed"
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self._queue: deque[tuple[int, Job]] = deque()
        self._backlog = Backlog()
        self._running: list[tuple[float, int, Job]] = []
        self._ends: dict[int, float] = {}
        self._place = 0
        # The reservation of the first in the queue, as long as nothing has ended since.
        self._reserved: Job | None = None
        self._shadow = math.inf
        self._spare = Ledger(capacity)
        self._fresh: list[tuple[int, Job]] = []

    def reservation(self) -> tuple[Job, float] | None:
        """Return the job that has the reservation, and when it will start at the latest."""
        return None if self._reserved is None else (self._reserved, self._shadow)

    def _enqueue(self, job: Job, now: float) -> None:
        self._backlog.remove(job)
        self._queue.append((job.stamp, job))
        if len(self._fresh) < _FRESH:
            self._fresh.append((job.stamp, job))
            return
        # So many at once are not tried one by one at the next decision.
        self._shelve_all()
        self._place += 1
        self._backlog.put(job, self._place)
        self._reserved = None

    def _shelve_all(self) -> None:
        for stamp, job in self._fresh:
            if job.stamp == stamp and not self._backlog.has(job):
                self._place += 1
                self._backlog.put(job, self._place)

    def revise(self, job: Job, now: float) -> None:
        if job.phase is Phase.RUNNING:
            self._revised(job, now)
        elif job.phase is not Phase.OUTSIDE:
            self._backlog.revise(job)
            self._reserved = None

    def _withdrawn(self, job: Job, now: float) -> None:
        self._backlog.remove(job)
        if job is self._reserved:
            self._reserved = None

    def _started(self, job: Job, now: float) -> None:
        end = job.since + job.estimate - job.served
        self._ends[job.seq] = end
        insort(self._running, (end, job.seq, job))

    def _ended(self, job: Job, now: float) -> None:
        place = bisect_left(self._running, (self._ends.pop(job.seq), job.seq))
        del self._running[place]
        self._reserved = None

    def _revised(self, job: Job, now: float) -> None:
        self._ended(job, now)
        self._started(job, now)

    def resize(self, capacity: Capacity, now: float) -> None:
        super().resize(capacity, now)
        self._reserved = None

    def decide(self, now: float) -> Decisions:
        if not self.pending:
            self._fresh.clear()
            return NOTHING
        started: list[Job] = []
        head: Job | None = self._head()
        assert head is not None
        if head is not self._reserved or self.ledger.fits(head):
            head = self._start_in_order(head, now, started)
        if head is not None:
            known = head is self._reserved
            if not known:
                self._reserve(head, now)
            self._shelve(head, now, started, try_them=known)
            if not known:
                self._fill(now, started)
        self._fresh.clear()
        return Decisions((), started) if started else NOTHING

    def _head(self) -> Job:
        queue = self._queue
        while queue[0][1].stamp != queue[0][0]:
            queue.popleft()
        return queue[0][1]

    def _start_in_order(self, head: Job, now: float, started: list[Job]) -> Job | None:
        """Start from the front what fits; return the first that does not."""
        while self.ledger.fits(head):
            self._queue.popleft()
            self._backlog.remove(head)
            self._start(head, now)
            self._reserved = None
            started.append(head)
            if not self.pending:
                return None
            head = self._head()
        return head

    def _reserve(self, head: Job, now: float) -> None:
        """Find the shadow time, and what will be spare then."""
        ledger = self.ledger
        spare = self._spare
        spare.capacity = ledger.capacity
        spare.cores, spare.memory = ledger.cores, ledger.memory
        spare.devices = dict(ledger.devices)
        self._shadow = math.inf
        for end, _, job in self._running:
            if end > self._shadow:
                break
            # What ends at the very moment that is enough is free then, too.
            spare.give(job)
            if self._shadow == math.inf and spare.fits(head):
                self._shadow = max(end, now)
        spare.take(head)
        self._reserved = head

    def _seconds(self, now: float) -> float:
        """Return how long a job may take that is to end before the reservation; -1 where there
        is no end of those that run. One that outlives its estimate ends at any moment, but not
        in the past."""
        return max(0.0, self._shadow - now) if self._shadow < math.inf else -1.0

    def _fill(self, now: float, started: list[Job]) -> None:
        """Start what may pass the first, in order."""
        ledger, spare = self.ledger, self._spare
        seconds = self._seconds(now)
        while ledger.cores > 0:
            job = self._backlog.first(ledger, spare, seconds)
            if job is None:
                return
            self._backlog.remove(job)
            self._pass(job, now, seconds, started)

    def _pass(self, job: Job, now: float, seconds: float, started: list[Job]) -> None:
        if job.estimate > seconds:
            self._spare.take(job)
        self._start(job, now)
        started.append(job)

    def _shelve(self, head: Job, now: float, started: list[Job], *, try_them: bool) -> None:
        """Put those that came since the last decision among those that wait.

        With `try_them` they are the only ones that may start: the reservation is the same
        as before, less time is left until then, and all others were tried.
        """
        ledger, spare = self.ledger, self._spare
        seconds = self._seconds(now)
        for stamp, job in self._fresh:
            if job.stamp != stamp or self._backlog.has(job):
                continue
            self._place += 1
            if (
                try_them
                and job is not head
                and ledger.fits(job)
                and (job.estimate <= seconds or spare.fits(job))
            ):
                self._pass(job, now, seconds, started)
            else:
                self._backlog.put(job, self._place)
