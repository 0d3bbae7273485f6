"""When a dispatcher looks at a job again: it has run as long as it may, or as it was expected to;
it has waited in memory for as long as a machine may."""

from __future__ import annotations

import math
from heapq import heappop, heappush

from hutch.engine.jobs.book import Entry

__all__ = ["Timers"]


class Timers:
    """Times by attempt of a job, in seconds since the epoch. One that is void goes by itself:
    whoever it is for looks whether it is true."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []

    @property
    def next(self) -> float:
        """The next of them; infinite where there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def set(self, at: float, entry: Entry) -> None:
        """Look at a job at a time, if it is in the same attempt then."""
        heappush(self._heap, (at, entry.record.id, entry.record.attempt))

    def bound(self, entry: Entry) -> None:
        """Look again when a job that runs has used up its time limit, or its estimate."""
        record = entry.record
        bounds = [record.timeout_s]
        if entry.job is not None and math.isfinite(entry.job.estimate):
            bounds.append(entry.job.estimate)
        for bound_s in bounds:
            if bound_s and record.mark:
                self.set((record.mark - record.ran_ns) / 1e9 + bound_s, entry)

    def shift(self, by_s: float) -> None:
        """Go by a clock that was set by so much."""
        self._heap = [(at + by_s, number, attempt) for at, number, attempt in self._heap]

    def due(self, now: float) -> list[tuple[int, int]]:
        """Return the jobs and attempts whose time has come; what is set meanwhile comes next."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            _, number, attempt = heappop(self._heap)
            found.append((number, attempt))
        return found
