"""Policies that share by turns: round robin, lottery, stride.

A job runs for a quantum and then waits again; they differ in who is next. A job whose
quantum ends while nobody waits goes on without a pause. The next one that does not fit
keeps the others back until enough quanta have ended: wide jobs do not starve.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import ClassVar

from hutch.sched.job import Job
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter
from hutch.sched.policies.drum import Drum
from hutch.sched.policy import NOTHING, Base, Decisions, settled

__all__ = ["Lottery", "RoundRobin", "Sliced", "Stride"]

QUANTUM = Parameter("seconds", 10, "how long a turn is", low=0.001)


class Sliced(Base):
    """Turns of one quantum. Subclasses keep those that wait and say who is next."""

    preemptive = True

    def __init__(self, capacity: Capacity, quantum: float = 10) -> None:
        super().__init__(capacity)
        self.quantum = quantum
        self._ends: list[tuple[float, int, int, Job]] = []

    def _next(self) -> Job | None:
        """Return who is next, without taking it out; the same until something changes."""
        raise NotImplementedError

    def _take(self, job: Job) -> None:
        """Take out the one that `_next` returned."""
        raise NotImplementedError

    def _wait(self, job: Job, now: float) -> None:
        """Keep a job that waits: new, or paused at the end of its turn."""
        raise NotImplementedError

    def _ran(self, job: Job, seconds: float) -> None:
        """A running job has used part of its turn or all of it."""

    def _enqueue(self, job: Job, now: float) -> None:
        if self.pending == 1:
            self._catch_up(now)
        self._wait(job, now)

    def _started(self, job: Job, now: float) -> None:
        heappush(self._ends, (job.since + self.quantum, job.seq, job.stamp, job))

    def _ended(self, job: Job, now: float) -> None:
        self._ran(job, now - job.since)

    def _catch_up(self, now: float) -> None:
        """Renew the quanta that ended while nobody waited: nobody woke us for them."""
        ends = self._ends
        while ends and ends[0][0] < now:
            end, seq, stamp, job = heappop(ends)
            if job.stamp == stamp:
                missed = math.ceil((now - end) / self.quantum)
                heappush(ends, (end + missed * self.quantum, seq, stamp, job))

    def decide(self, now: float) -> Decisions:
        if not self.pending:
            self.wake = math.inf
            return NOTHING
        paused = self._expire(now) if self._ends and self._ends[0][0] <= now else []
        ledger = self.ledger
        started: list[Job] = []
        while self.pending and ledger.cores > 0:
            job = self._next()
            if job is None or not ledger.fits(job):
                break
            self._take(job)
            self._start(job, now)
            started.append(job)
        self.wake = self._next_end() if self.pending else math.inf
        return settled(paused, started)

    def _next_end(self) -> float:
        ends = self._ends
        while ends and ends[0][3].stamp != ends[0][2]:
            heappop(ends)
        return ends[0][0] if ends else math.inf

    def _expire(self, now: float) -> list[Job]:
        """Let those whose quantum has ended wait again; return them."""
        ends = self._ends
        expired = []
        while ends and ends[0][0] <= now:
            end, _, stamp, job = heappop(ends)
            if job.stamp != stamp:
                continue
            if job.since + self.quantum > end and job.since + self.quantum > now:
                # It began later than the decision to start it.
                heappush(ends, (job.since + self.quantum, job.seq, stamp, job))
                continue
            self._ran(job, now - job.since)
            self._pause(job, now)
            self._wait(job, now)
            expired.append(job)
        return expired


class RoundRobin(Sliced):
    """Every job in turn for one quantum, on as many cores as it asks for.

    One that arrives when a quantum ends is before the job that was running.
    """

    name: ClassVar[str] = "rr"
    summary: ClassVar[str] = "round robin: every job in turn for a quantum"
    parameters: ClassVar[Mapping[str, Parameter]] = {"quantum": QUANTUM}

    def __init__(self, capacity: Capacity, quantum: float = 10) -> None:
        super().__init__(capacity, quantum)
        self._queue: deque[tuple[int, Job]] = deque()

    def revise(self, job: Job, now: float) -> None:
        """Change nothing: turns depend on nothing that can be revised."""

    def _wait(self, job: Job, now: float) -> None:
        self._queue.append((job.stamp, job))

    def _next(self) -> Job | None:
        queue = self._queue
        while queue:
            stamp, job = queue[0]
            if job.stamp == stamp:
                return job
            queue.popleft()
        return None

    def _take(self, job: Job) -> None:
        self._queue.popleft()


class Lottery(Sliced):
    """Each turn goes to the winner of a draw in which a job's weight is its tickets.

    Shares of the machine follow the tickets in the long run, and nobody starves. The
    winner that does not fit stays the winner until it does. Source: Waldspurger and Weihl,
    "Lottery scheduling", OSDI 1994.
    """

    name: ClassVar[str] = "lottery"
    summary: ClassVar[str] = "each turn to the winner of a draw; weights are tickets"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "quantum": QUANTUM,
        "seed": Parameter("count", 1, "the same draws for the same seed", zero=True),
    }

    def __init__(self, capacity: Capacity, quantum: float = 10, seed: int = 1) -> None:
        super().__init__(capacity, quantum)
        self._random = random.Random(seed)
        self._drum: Drum[tuple[int, Job]] = Drum()
        self._winner: tuple[int, int, Job] | None = None

    def _wait(self, job: Job, now: float) -> None:
        self._drum.put((job.stamp, job), job.weight)

    def _next(self) -> Job | None:
        if self._winner is not None:
            slot, stamp, job = self._winner
            if job.stamp == stamp:
                return job
            self._drum.remove(slot)
            self._winner = None
        drum = self._drum
        while drum:
            slot, (stamp, job) = drum.draw(self._random.random())
            if job.stamp == stamp:
                self._winner = slot, stamp, job
                return job
            drum.remove(slot)
        return None

    def _take(self, job: Job) -> None:
        assert self._winner is not None
        self._drum.remove(self._winner[0])
        self._winner = None


class Stride(Sliced):
    """Each turn to the job that is furthest behind its share; weights are tickets.

    What the lottery gives on average, this gives in every stretch of time. A job's pass
    goes on by core-seconds used / weight; the lowest pass is next, and one that arrives
    begins where the last one chosen stood. Source: Waldspurger, "Lottery and stride
    scheduling", MIT 1995.
    """

    name: ClassVar[str] = "stride"
    summary: ClassVar[str] = "each turn to who is furthest behind the share of its weight"
    parameters: ClassVar[Mapping[str, Parameter]] = {"quantum": QUANTUM}

    def __init__(self, capacity: Capacity, quantum: float = 10) -> None:
        super().__init__(capacity, quantum)
        self._queue: list[tuple[float, int, int, Job]] = []
        self._passes: dict[int, float] = {}
        self._floor: float = 0

    def _ran(self, job: Job, seconds: float) -> None:
        if seconds > 0:
            self._passes[job.seq] += seconds * job.cores / job.weight

    def _wait(self, job: Job, now: float) -> None:
        start = self._passes.setdefault(job.seq, self._floor)
        heappush(self._queue, (start, job.seq, job.stamp, job))

    def _started(self, job: Job, now: float) -> None:
        self._floor = max(self._floor, self._passes.setdefault(job.seq, self._floor))
        super()._started(job, now)

    def _ended(self, job: Job, now: float) -> None:
        self._passes.pop(job.seq, None)

    def _withdrawn(self, job: Job, now: float) -> None:
        self._passes.pop(job.seq, None)

    def _next(self) -> Job | None:
        queue = self._queue
        while queue:
            _, _, stamp, job = queue[0]
            if job.stamp == stamp:
                return job
            heappop(queue)
        return None

    def _take(self, job: Job) -> None:
        heappop(self._queue)
