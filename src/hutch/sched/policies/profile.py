"""What will be free when: a plan of resources over time, for reservations."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

from hutch.sched.job import Job
from hutch.sched.ledger import Ledger

__all__ = ["Profile"]


class Profile:
    """Free resources as steps: from `times[i]` to `times[i + 1]`, `free[k][i]` of kind k.

    Kinds are cores, memory and each kind of device. The first step begins at any time
    before all else, the last one never ends.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._kinds = sorted({*ledger.capacity.devices, *ledger.devices})
        self._counts_memory = ledger.capacity.memory is not None
        self.times: list[float] = [-math.inf]
        self.free: list[list[float]] = [[ledger.cores]]
        if self._counts_memory:
            self.free.append([ledger.memory])
        self.free += [[ledger.devices.get(kind, 0)] for kind in self._kinds]

    def demand(self, job: Job) -> list[tuple[list[float], float]]:
        """Return what a job asks for, beside the steps of that kind; nothing of 0."""
        asked = [(self.free[0], job.cores)]
        if self._counts_memory and job.memory:
            asked.append((self.free[1], job.memory))
        if job.devices:
            wanted = dict(job.devices)
            offset = 2 if self._counts_memory else 1
            asked += [
                (self.free[offset + n], wanted[kind])
                for n, kind in enumerate(self._kinds)
                if kind in wanted
            ]
        return asked

    def earliest(self, job: Job, after: float, seconds: float) -> float:
        """Return the first time from `after` on when the job fits for so many seconds.

        Infinite if it never does.
        """
        times = self.times
        asked = self.demand(job)
        cores, wanted = asked[0]
        others = asked[1:]
        count = len(times)
        step = bisect_right(times, after) - 1
        start = after
        while True:
            end = start + seconds
            while step < count and times[step] < end:
                if cores[step] < wanted or any(f[step] < w for f, w in others):
                    break
                step += 1
            else:
                return start
            # This step is too full: begin after it, where there is enough again.
            step += 1
            while step < count and (cores[step] < wanted or any(f[step] < w for f, w in others)):
                step += 1
            if step == count:
                return math.inf
            start = times[step]

    def take(self, job: Job, start: float, end: float) -> None:
        """Take what a job needs from one time to another."""
        self._change(job, start, end, -1)

    def give(self, job: Job, start: float, end: float) -> None:
        """Give back what `take` took, or what will be free from a time on."""
        self._change(job, start, end, 1)

    def _change(self, job: Job, start: float, end: float, sign: int) -> None:
        if end <= start:
            return
        first = self._cut(start)
        last = self._cut(end) if end < math.inf else len(self.times)
        for free, wanted in self.demand(job):
            change = sign * wanted
            for step in range(first, last):
                value = free[step] + change
                free[step] = value if value.__class__ is int else round(value, 6)
        self._join(last)
        self._join(first)

    def _cut(self, time: float) -> int:
        """Let a step begin at a time; return its number."""
        step = bisect_left(self.times, time)
        if step == len(self.times) or self.times[step] != time:
            self.times.insert(step, time)
            for free in self.free:
                free.insert(step, free[step - 1])
        return step

    def _join(self, step: int) -> None:
        """Make one of a step and the one before it where they are alike."""
        if 0 < step < len(self.times) and all(f[step - 1] == f[step] for f in self.free):
            del self.times[step]
            for free in self.free:
                del free[step]

    def forget(self, now: float) -> None:
        """Drop the steps that are over."""
        step = bisect_right(self.times, now) - 1
        if step > 0:
            del self.times[:step]
            for free in self.free:
                del free[:step]
            self.times[0] = -math.inf
