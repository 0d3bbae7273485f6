"""Round robin: each job runs for a quantum, then goes to the end of the queue."""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from typing import ClassVar

from hutch.sched.job import Job, Phase
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter
from hutch.sched.policy import NOTHING, Base, Decisions

__all__ = ["RoundRobin"]


class RoundRobin(Base):
    """Every job in turn for one quantum, on as many cores as it asks for.

    A job whose quantum ends while nobody waits goes on without a pause. One that arrives
    at that instant is before it in the queue. The first in the queue that does not fit
    keeps the others back until enough quanta have ended.
    """

    name: ClassVar[str] = "rr"
    summary: ClassVar[str] = "round robin: every job in turn for a quantum"
    parameters: ClassVar[dict[str, Parameter]] = {
        "quantum": Parameter("seconds", 1, "how long a turn is"),
    }
    preemptive = True

    def __init__(self, capacity: Capacity, quantum: float = 1) -> None:
        super().__init__(capacity)
        self.quantum = quantum
        self._queue: deque[tuple[int, Job]] = deque()
        self._ends: list[tuple[float, int, int, Job]] = []

    def _enqueue(self, job: Job, now: float) -> None:
        if not self._queue:
            self._catch_up(now)
        self._queue.append((job.stamp, job))

    def _catch_up(self, now: float) -> None:
        """Renew the quanta that ended while nobody waited: nobody woke us for them."""
        ends = self._ends
        while ends and ends[0][0] < now:
            end, seq, stamp, job = heappop(ends)
            if job.stamp == stamp:
                missed = math.ceil((now - end) / self.quantum)
                heappush(ends, (end + missed * self.quantum, seq, stamp, job))

    def revise(self, job: Job, now: float) -> None:
        """Change nothing: turns depend on nothing that can be revised."""

    def _started(self, job: Job, now: float) -> None:
        heappush(self._ends, (job.since + self.quantum, job.seq, job.stamp, job))

    def decide(self, now: float) -> Decisions:
        expired = self._expire(now) if self._ends and self._ends[0][0] <= now else []
        queue = self._queue
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
        self.wake = self._next_end() if queue else math.inf
        if not expired:
            return Decisions((), started) if started else NOTHING
        paused = [job for job in expired if job.phase == Phase.PAUSED]
        if len(paused) < len(expired):
            again = {id(job) for job in expired}
            started = [job for job in started if id(job) not in again]
        return Decisions(paused, started) if paused or started else NOTHING

    def _next_end(self) -> float:
        ends = self._ends
        while ends and ends[0][3].stamp != ends[0][2]:
            heappop(ends)
        return ends[0][0] if ends else math.inf

    def _expire(self, now: float) -> list[Job]:
        """Send those whose quantum has ended to the end of the queue; return them."""
        ends, queue = self._ends, self._queue
        expired = []
        while ends and ends[0][0] <= now:
            _, _, stamp, job = heappop(ends)
            if job.stamp != stamp:
                continue
            end = job.since + self.quantum
            if end > now:  # it began later than the decision to start it
                heappush(ends, (end, job.seq, stamp, job))
                continue
            self._pause(job, now)
            queue.append((job.stamp, job))
            expired.append(job)
        return expired
