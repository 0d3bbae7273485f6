"""The multi-level feedback queue: short jobs first without knowing which are short."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import ClassVar

from hutch.sched.job import Job, Phase
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter
from hutch.sched.policy import NOTHING, Base, Decisions, settled

__all__ = ["MLFQ"]


class MLFQ(Base):
    """Queues from high to low; a job begins in the highest and sinks as it uses its turns.

    A job that has used the quantum of its level goes to the end of the next lower one,
    where quanta are longer by `factor`; in the lowest, jobs take turns. A lower job is
    paused for a higher one, returns to the front of its queue and has the rest of its
    quantum left. Every `boost` seconds all go back to the highest, so that nobody starves.
    Source: Arpaci-Dusseau, "Operating Systems: Three Easy Pieces", chapter 8, rules 1 to 5.
    """

    name: ClassVar[str] = "mlfq"
    summary: ClassVar[str] = "multi-level feedback: jobs sink to lower queues as they run"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "levels": Parameter("count", 3, "how many queues", low=1, high=64),
        "quantum": Parameter("seconds", 10, "how long a turn in the highest is", low=0.001),
        "factor": Parameter(
            "number", 2, "how many times longer it is in each lower", low=1, high=1000
        ),
        "boost": Parameter(
            "seconds", math.inf, "after how long all go back to the highest", low=0.001
        ),
    }
    preemptive = True

    def __init__(
        self,
        capacity: Capacity,
        levels: int = 3,
        quantum: float = 10,
        factor: float = 2,
        boost: float = math.inf,
    ) -> None:
        super().__init__(capacity)
        self.quanta = [quantum * factor**level for level in range(levels)]
        self.boost = boost
        self._queues: list[deque[tuple[int, Job]]] = [deque() for _ in range(levels)]
        # Of jobs that have run: their level and how much of their quantum is left.
        self._level: dict[int, int] = {}
        self._left: dict[int, float] = {}
        self._ends: list[tuple[float, int, int, Job]] = []
        self._running: list[dict[int, Job]] = [{} for _ in range(levels)]
        self._boosted = math.nan

    def revise(self, job: Job, now: float) -> None:
        """Change nothing: levels depend on nothing that can be revised."""

    def _enqueue(self, job: Job, now: float) -> None:
        if math.isnan(self._boosted):
            self._boosted = now
        if self.pending == 1:
            self._catch_up(now)
        level = self._level.setdefault(job.seq, 0)
        self._left.setdefault(job.seq, self.quanta[level])
        self._queues[level].append((job.stamp, job))

    def _started(self, job: Job, now: float) -> None:
        level = self._level.setdefault(job.seq, 0)
        left = self._left.setdefault(job.seq, self.quanta[level])
        self._running[level][job.seq] = job
        heappush(self._ends, (job.since + left, job.seq, job.stamp, job))

    def _forget(self, job: Job) -> None:
        self._level.pop(job.seq, None)
        self._left.pop(job.seq, None)

    def _ended(self, job: Job, now: float) -> None:
        del self._running[self._level[job.seq]][job.seq]
        self._forget(job)

    def _withdrawn(self, job: Job, now: float) -> None:
        self._forget(job)

    def decide(self, now: float) -> Decisions:
        if now >= self._boosted + self.boost:
            self._raise_all(now)
        head = self._next()
        if head is None:
            self.wake = math.inf
            return NOTHING
        paused = self._expire(now) if self._ends and self._ends[0][0] <= now else []
        if paused:
            head = self._next()
        started: list[Job] = []
        while head is not None:
            level, job = head
            if not self.ledger.fits(job):
                victims = self._victims(level, job)
                if not victims:
                    break
                self._push_aside(victims, now)
                paused += victims
            self._queues[level].popleft()
            self._start(job, now)
            started.append(job)
            head = self._next()
        self._set_wake(head is not None)
        return settled(paused, started)

    def _set_wake(self, somebody_waits: bool) -> None:
        ends = self._ends
        while ends and ends[0][3].stamp != ends[0][2]:
            heappop(ends)
        self.wake = math.inf
        if somebody_waits:
            end = ends[0][0] if ends else math.inf
            self.wake = min(end, self._boosted + self.boost)

    def _next(self) -> tuple[int, Job] | None:
        for level, queue in enumerate(self._queues):
            while queue:
                stamp, job = queue[0]
                if job.stamp == stamp:
                    return level, job
                queue.popleft()
        return None

    def _sink(self, job: Job) -> None:
        level = min(self._level[job.seq] + 1, len(self.quanta) - 1)
        self._level[job.seq] = level
        self._left[job.seq] = self.quanta[level]

    def _expire(self, now: float) -> list[Job]:
        """Let those who have used their quantum sink and wait; return them."""
        ends = self._ends
        expired = []
        while ends and ends[0][0] <= now:
            end, _, stamp, job = heappop(ends)
            if job.stamp != stamp:
                continue
            really = job.since + self._left[job.seq]
            if really > end and really > now:  # it began later than was decided
                heappush(ends, (really, job.seq, stamp, job))
                continue
            del self._running[self._level[job.seq]][job.seq]
            self._pause(job, now)
            self._sink(job)
            self._queues[self._level[job.seq]].append((job.stamp, job))
            expired.append(job)
        return expired

    def _catch_up(self, now: float) -> None:
        """Sink those whose quanta ended while nobody waited: nobody woke us for them."""
        ends, last = self._ends, len(self.quanta) - 1
        while ends and ends[0][0] < now:
            end, seq, stamp, job = heappop(ends)
            if job.stamp != stamp:
                continue
            before = self._level[seq]
            self._sink(job)
            self._running[before].pop(seq)
            self._running[self._level[seq]][seq] = job
            quantum = self._left[seq]
            turns = math.ceil((now - end) / quantum) if before == last else 1
            end += turns * quantum
            self._left[seq] = end - job.since
            heappush(ends, (end, seq, stamp, job))

    def _victims(self, level: int, job: Job) -> list[Job]:
        """Return jobs of lower levels whose pause makes room, the last started first."""
        ledger = self.ledger
        cores, memory = ledger.cores, ledger.memory
        frees_memory = not ledger.capacity.paused_keep_memory
        if not ledger.fits_devices(job):
            return []
        victims = []
        for lower in reversed(self._running[level + 1 :]):
            for victim in reversed(lower.values()):
                victims.append(victim)
                cores += victim.cores
                if frees_memory:
                    memory += victim.memory
                if cores >= job.cores and memory >= job.memory:
                    return victims
        return []

    def _push_aside(self, victims: list[Job], now: float) -> None:
        for job in victims:
            level = self._level[job.seq]
            del self._running[level][job.seq]
            used = max(now - job.since, 0)
            self._left[job.seq] = max(self._left[job.seq] - used, 0) or self.quanta[level]
            self._pause(job, now)
            self._queues[level].appendleft((job.stamp, job))

    def _raise_all(self, now: float) -> None:
        """Put everybody back into the highest level."""
        periods = (now - self._boosted) // self.boost
        self._boosted += periods * self.boost
        top = self._queues[0]
        for queue in self._queues[1:]:
            top += queue
            queue.clear()
        self._level = dict.fromkeys(self._level, 0)
        self._left = dict.fromkeys(self._left, self.quanta[0])
        for lower in self._running[1:]:
            self._running[0] |= lower
            lower.clear()
        self._ends.clear()
        for job in self._running[0].values():
            if job.phase is Phase.RUNNING:
                left = now - job.since + self.quanta[0]
                self._left[job.seq] = left
                heappush(self._ends, (now + self.quanta[0], job.seq, job.stamp, job))
