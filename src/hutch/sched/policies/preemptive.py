"""Policies that pause a running job for a more urgent one: SRTF, priority, EDF.

The most urgent that waits is given room by pausing those that run and are less urgent than
it, the least urgent first, but only if that makes room enough; ties pause nobody. Where no
room can be made, nobody passes it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import ClassVar

from hutch.sched.job import Job
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter
from hutch.sched.policies.ordered import AGEING
from hutch.sched.policy import NOTHING, Base, Decisions, settled

__all__ = ["EDF", "SRTF", "PreemptivePriority", "Ranked"]


class Ranked(Base):
    """Jobs by a key. Lower is more urgent.

    While a job waits its key stays as it is. While it runs, `_running_key` is what orders
    those that run among each other, and `_urgency` what it is worth now.
    """

    preemptive = True

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self._queue: list[tuple[float, int, int, Job]] = []
        self._running: list[tuple[float, int, Job]] = []
        self._keys: dict[int, float] = {}

    def _key(self, job: Job, now: float) -> float:
        raise NotImplementedError

    def _running_key(self, job: Job, now: float) -> float:
        return self._key(job, now)

    def _urgency(self, running_key: float, now: float) -> float:
        return running_key

    def _enqueue(self, job: Job, now: float) -> None:
        heappush(self._queue, (self._key(job, now), job.seq, job.stamp, job))

    def _started(self, job: Job, now: float) -> None:
        key = self._running_key(job, now)
        self._keys[job.seq] = key
        insort(self._running, (key, job.seq, job))

    def _forget(self, job: Job) -> None:
        place = bisect_left(self._running, (self._keys.pop(job.seq), job.seq))
        del self._running[place]

    def _ended(self, job: Job, now: float) -> None:
        self._forget(job)

    def _revised(self, job: Job, now: float) -> None:
        self._forget(job)
        self._started(job, now)

    def decide(self, now: float) -> Decisions:
        queue = self._queue
        if not queue:
            return NOTHING
        fits = self.ledger.fits
        paused: list[Job] = []
        started: list[Job] = []
        while queue:
            key, _, stamp, job = queue[0]
            if job.stamp != stamp:
                heappop(queue)
                continue
            if not fits(job):
                victims = self._victims(job, key, now)
                if not victims:
                    break
                for victim in victims:
                    self._forget(victim)
                    self._pause(victim, now)
                    self._enqueue(victim, now)
                paused += victims
            heappop(queue)
            self._start(job, now)
            started.append(job)
        return settled(paused, started)

    def _victims(self, job: Job, key: float, now: float) -> list[Job]:
        """Return whom to pause for a job to fit; nobody if it would not fit even so."""
        ledger = self.ledger
        cores, memory = ledger.cores, ledger.memory
        frees_memory = not ledger.capacity.paused_keep_memory
        victims = []
        for running_key, _, victim in reversed(self._running):
            if self._urgency(running_key, now) <= key:
                break
            victims.append(victim)
            cores += victim.cores
            if frees_memory:
                memory += victim.memory
            if cores >= job.cores and memory >= job.memory and ledger.fits_devices(job):
                return victims
        return []


# Seconds since the epoch are exact to a quarter of a microsecond: remaining times that are equal
# may come out so far apart, and a tie pauses nobody.
_TICK = 1e-6


class SRTF(Ranked):
    """Shortest remaining time first, by estimate."""

    name: ClassVar[str] = "srtf"
    summary: ClassVar[str] = "shortest remaining time first; pauses longer ones"

    def _key(self, job: Job, now: float) -> float:
        return job.remaining_at(now)

    def _running_key(self, job: Job, now: float) -> float:
        # When it is expected to end: that does not change while it runs.
        return job.since + job.estimate - job.served

    def _urgency(self, running_key: float, now: float) -> float:
        return running_key - now - _TICK


class PreemptivePriority(Ranked):
    """The most urgent first, also before those that run. Ageing as in `Priority`."""

    name: ClassVar[str] = "priority-preemptive"
    summary: ClassVar[str] = "lowest priority number first; pauses less urgent ones"
    parameters: ClassVar[Mapping[str, Parameter]] = {"ageing": AGEING}

    def __init__(self, capacity: Capacity, ageing: float = 0) -> None:
        super().__init__(capacity)
        self.ageing = ageing

    def _key(self, job: Job, now: float) -> float:
        return job.priority + self.ageing * job.arrival if self.ageing else job.priority


class EDF(Ranked):
    """Earliest deadline first.

    A job without a deadline comes after all that have one, or with `slack` is due when that
    many times its estimate has passed since it came.
    """

    name: ClassVar[str] = "edf"
    summary: ClassVar[str] = "earliest deadline first; pauses those due later"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "slack": Parameter(
            "number", 0, "a job without a deadline is due after so many estimates", zero=True
        ),
    }

    def __init__(self, capacity: Capacity, slack: float = 0) -> None:
        super().__init__(capacity)
        self.slack = slack

    def _key(self, job: Job, now: float) -> float:
        if self.slack and job.deadline == math.inf:
            return job.arrival + self.slack * job.estimate
        return job.deadline
