"""Policies that run the jobs in some order, each to its end: FCFS, SJF, priority.

The first in order starts as soon as it fits, and nobody passes it (blocking, as in the
textbooks and as a batch system without backfilling does).
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from operator import attrgetter
from typing import ClassVar

from hutch.sched.job import Job
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter
from hutch.sched.policy import NOTHING, Base, Decisions

__all__ = ["AGEING", "FCFS", "SJF", "Ordered", "Priority"]

AGEING = Parameter(
    "number", 0, "points of priority that a job gains for each second since it came", zero=True
)


class Ordered(Base):
    """Jobs by a key that does not change while they wait; ties by order of submission."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self._queue: list[tuple[float, int, int, Job]] = []

    _key: Callable[[Job], float]

    def _enqueue(self, job: Job, now: float) -> None:
        heappush(self._queue, (self._key(job), job.seq, job.stamp, job))

    def decide(self, now: float) -> Decisions:
        queue = self._queue
        if not queue:
            return NOTHING
        fits = self.ledger.fits
        started: list[Job] = []
        while queue:
            _, _, stamp, job = queue[0]
            if job.stamp != stamp:
                heappop(queue)
            elif fits(job):
                heappop(queue)
                self._start(job, now)
                started.append(job)
            else:
                break
        return Decisions((), started) if started else NOTHING


class FCFS(Base):
    """First come, first served."""

    name: ClassVar[str] = "fcfs"
    summary: ClassVar[str] = "first come, first served"

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self._queue: deque[tuple[int, Job]] = deque()

    def revise(self, job: Job, now: float) -> None:
        """Change nothing: the order depends on nothing that can be revised."""

    def _enqueue(self, job: Job, now: float) -> None:
        queue = self._queue
        if not queue or (queue[-1][1].arrival, queue[-1][1].seq) < (job.arrival, job.seq):
            queue.append((job.stamp, job))
            return
        # It came before others that were told earlier: released, or found after a restart.
        place = bisect(queue, (job.arrival, job.seq), key=lambda e: (e[1].arrival, e[1].seq))
        queue.insert(place, (job.stamp, job))

    def decide(self, now: float) -> Decisions:
        queue = self._queue
        if not queue:
            return NOTHING
        fits = self.ledger.fits
        started: list[Job] = []
        while queue:
            stamp, job = queue[0]
            if job.stamp == stamp:
                if not fits(job):
                    break
                self._start(job, now)
                started.append(job)
            queue.popleft()
        return Decisions((), started) if started else NOTHING


class SJF(Ordered):
    """Shortest job first: the shortest estimate of those that wait."""

    name: ClassVar[str] = "sjf"
    summary: ClassVar[str] = "shortest job first, by estimate"

    _key = attrgetter("estimate")


class Priority(Ordered):
    """The most urgent first, which is the one with the lowest number.

    With ageing a job's number falls by so much a second from its arrival on. All fall
    alike, so their order stays as it is and need not be looked at again.
    """

    name: ClassVar[str] = "priority"
    summary: ClassVar[str] = "lowest priority number first, each to its end"
    parameters: ClassVar[Mapping[str, Parameter]] = {"ageing": AGEING}

    def __init__(self, capacity: Capacity, ageing: float = 0) -> None:
        super().__init__(capacity)
        self.ageing = ageing

    def _key(self, job: Job) -> float:
        return job.priority + self.ageing * job.arrival if self.ageing else job.priority
