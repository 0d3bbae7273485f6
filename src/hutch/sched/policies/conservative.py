"""Conservative backfilling: every job has a reservation, and none delays an earlier one's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import ClassVar

from hutch.sched.job import Job, Phase
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter
from hutch.sched.policies.profile import Profile
from hutch.sched.policy import NOTHING, Base, Decisions

__all__ = ["Conservative"]

# What is expected to take no time still needs its cores at that moment.
_LEAST = 1e-6


class Conservative(Base):
    """Every job gets, when it comes, the earliest time that moves no reservation made before.

    When a job ends earlier than expected the schedule is compressed: in order of submission
    each job is given the earliest time that is free now, never a later one than it had.
    When one outlives its estimate, it is expected to take `grace` longer, at least its
    estimate's tenth, and reservations are made anew. With `depth`, only so many of the
    first have reservations; with thousands waiting, compressing all of them is costly.

    Source: Mu'alem and Feitelson, "Utilization, predictability, workloads, and user runtime
    estimates in scheduling the IBM SP2 with backfilling", IEEE TPDS 12(6), 2001.
    """

    name: ClassVar[str] = "conservative"
    summary: ClassVar[str] = "backfilling with a reservation for every job"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "depth": Parameter(
            "count", 0, "how many of the first have reservations (0: all)", zero=True
        ),
        "grace": Parameter("seconds", 60, "by how much an estimate that was too short grows"),
    }

    def __init__(self, capacity: Capacity, depth: int = 0, grace: float = 60) -> None:
        super().__init__(capacity)
        self.depth = depth or math.inf
        self.grace = grace
        self._profile = Profile(self.ledger)
        self._waiting: dict[int, Job] = {}
        self._reserved: dict[int, tuple[float, float]] = {}
        self._due: list[tuple[float, int, Job]] = []
        self._ends: dict[int, float] = {}
        self._running: dict[int, Job] = {}
        self._late: list[tuple[float, int]] = []
        self._compress = False
        self._rebuild = False

    def reservations(self) -> dict[str | int, float]:
        """Return when each waiting job will start at the latest."""
        return {
            job.id: self._reserved[seq][0]
            for seq, job in self._waiting.items()
            if seq in self._reserved
        }

    def _enqueue(self, job: Job, now: float) -> None:
        self._waiting[job.seq] = job
        if len(self._reserved) < self.depth and not self._rebuild:
            self._reserve(job, now)

    def revise(self, job: Job, now: float) -> None:
        if job.phase is Phase.RUNNING:
            self._set_end(job, job.since + max(job.estimate - job.served, _LEAST))
        self._rebuild = True

    def _withdrawn(self, job: Job, now: float) -> None:
        del self._waiting[job.seq]
        if (had := self._reserved.pop(job.seq, None)) is not None:
            self._profile.give(job, *had)
            self._compress = True

    def resize(self, capacity: Capacity, now: float) -> None:
        super().resize(capacity, now)
        self._rebuild = True

    def adopt(self, job: Job, now: float) -> None:
        super().adopt(job, now)
        self._rebuild = True

    def _started(self, job: Job, now: float) -> None:
        self._running[job.seq] = job
        self._set_end(job, job.since + max(job.estimate - job.served, _LEAST))

    def _set_end(self, job: Job, end: float) -> None:
        self._ends[job.seq] = end
        if end < math.inf:
            heappush(self._late, (end, job.seq))

    def _ended(self, job: Job, now: float) -> None:
        del self._running[job.seq]
        end = self._ends.pop(job.seq)
        if end > now:
            self._profile.give(job, now, end)
            self._compress = True

    def _reserve(self, job: Job, now: float) -> None:
        seconds = max(job.estimate, _LEAST)
        start = self._profile.earliest(job, now, seconds)
        end = start + seconds
        if start < math.inf:
            self._profile.take(job, start, end)
        self._reserved[job.seq] = start, end
        heappush(self._due, (start, job.seq, job))

    def decide(self, now: float) -> Decisions:
        self._profile.forget(now)
        self._extend_late(now)
        if self._rebuild:
            self._plan_anew(now)
        elif self._compress:
            self._move_up(now)
        self._rebuild = self._compress = False
        started: list[Job] = []
        if not self._start_due(now, started):
            self._plan_anew(now)
            self._start_due(now, started)
        if started and len(self._reserved) < self.depth:
            self._deepen(now)
        self.wake = self._due[0][0] if self._due else math.inf
        return Decisions((), started) if started else NOTHING

    def _start_due(self, now: float, started: list[Job]) -> bool:
        """Start those whose time has come; tell whether the plan was true to what is free."""
        due = self._due
        while due:
            start, seq, job = due[0]
            had = self._reserved.get(seq)
            if had is None or had[0] != start:
                heappop(due)
            elif start > now:
                break
            elif self.ledger.fits(job):
                heappop(due)
                self._begin(job, now, started)
            else:
                return False
        return True

    def _begin(self, job: Job, now: float, started: list[Job]) -> None:
        del self._waiting[job.seq], self._reserved[job.seq]
        self._start(job, now)
        started.append(job)

    def _deepen(self, now: float) -> None:
        """Give reservations to those that had none, as far as they now may have one."""
        if len(self._waiting) == len(self._reserved):
            return
        for seq, job in self._waiting.items():
            if len(self._reserved) >= self.depth:
                break
            if seq not in self._reserved:
                self._reserve(job, now)

    def _extend_late(self, now: float) -> None:
        """Expect jobs that have outlived their estimates to go on for a while."""
        late = self._late
        while late and late[0][0] <= now:
            end, seq = heappop(late)
            job = self._running.get(seq)
            if job is not None and self._ends[seq] == end:
                self._set_end(job, now + max(self.grace, job.estimate / 10))
                self._rebuild = True

    def _plan_anew(self, now: float) -> None:
        """Make all reservations anew, in order."""
        profile = self._profile = Profile(self.ledger)
        for seq, job in self._running.items():
            if self._ends[seq] < math.inf:
                profile.give(job, self._ends[seq], math.inf)
        self._reserved.clear()
        self._due.clear()
        self._deepen(now)

    def _move_up(self, now: float) -> None:
        """Compress: give each the earliest time that is free now."""
        profile = self._profile
        for seq, job in self._waiting.items():
            had = self._reserved.get(seq)
            if had is None:
                break
            if had[0] <= now:
                continue
            profile.give(job, *had)
            seconds = max(job.estimate, _LEAST)
            start = min(profile.earliest(job, now, seconds), had[0])
            end = start + seconds
            profile.take(job, start, end)
            if start != had[0]:
                self._reserved[seq] = start, end
                heappush(self._due, (start, seq, job))
        self._deepen(now)
