"""Jobs that wait, so that the first which could fill a gap is found without trying them all."""

from __future__ import annotations

import math
from bisect import insort

from hutch.sched.job import Job
from hutch.sched.ledger import Ledger

__all__ = ["Backlog"]

_FIRST = 8
_GONE = math.inf
_UNKNOWN = 1e300
"""The estimate of a job nobody knows the length of: long, but not gone."""

Shape = tuple[float, int, tuple[tuple[str, int], ...]]


class Backlog:
    """Jobs in order of submission, apart by what they ask for.

    Jobs alike in cores, devices and (to a power of two) memory share a shelf. A shelf finds
    its first job that is short enough in the logarithm of its length, by a tree of minima.
    So a search costs the shelves whose jobs might fit, not the jobs.
    """

    def __init__(self) -> None:
        self._shelves: dict[Shape, _Shelf] = {}
        self._order: list[tuple[float, Shape]] = []
        self._where: dict[int, tuple[_Shelf, int]] = {}

    def put(self, job: Job, place: int) -> None:
        """Add a job; `place` is its place in the order and grows from call to call."""
        shape = (job.cores, job.memory.bit_length(), job.devices)
        shelf = self._shelves.get(shape)
        if shelf is None:
            shelf = self._shelves[shape] = _Shelf(shape)
            insort(self._order, (job.cores, shape), key=lambda entry: entry[0])
        slot = shelf.put(job, place, self._where)
        self._where[job.seq] = shelf, slot

    def remove(self, job: Job) -> None:
        """Take a job out, if it is in."""
        found = self._where.pop(job.seq, None)
        if found is not None:
            found[0].remove(found[1])

    def revise(self, job: Job) -> None:
        """Note that the estimate of a job that is in has changed."""
        found = self._where.get(job.seq)
        if found is not None:
            found[0].revise(found[1], job)

    def first(self, ledger: Ledger, spare: Ledger, seconds: float) -> Job | None:
        """Return the first job that fits `ledger` and either is expected to run for at most
        `seconds` or fits `spare` too."""
        best: Job | None = None
        best_place = math.inf
        for cores, shape in self._order:
            if cores > ledger.cores:
                break
            shelf = self._shelves[shape]
            if shelf.shortest == _GONE:
                continue
            found = shelf.first(ledger, spare, seconds, best_place)
            if found is not None:
                best, best_place = found
        return best


class _Shelf:
    """Jobs alike, in slots by order; a tree over the slots has the least estimate below."""

    __slots__ = ("_jobs", "_least", "_next", "_places", "_size", "cores", "plain")

    def __init__(self, shape: Shape) -> None:
        self.cores = shape[0]
        self.plain = not shape[1] and not shape[2]
        self._clear(_FIRST)

    def _clear(self, size: int) -> None:
        self._size = size
        self._least = [_GONE] * (2 * size)
        self._jobs: list[Job | None] = [None] * size
        self._places = [0] * size
        self._next = 0

    @property
    def shortest(self) -> float:
        return self._least[1]

    def put(self, job: Job, place: int, where: dict[int, tuple[_Shelf, int]]) -> int:
        if self._next == self._size:
            self._compact(where)
        slot = self._next
        self._next += 1
        self._jobs[slot] = job
        self._places[slot] = place
        estimate = job.estimate if job.estimate < _UNKNOWN else _UNKNOWN
        least, node = self._least, slot + self._size
        while node and estimate < least[node]:
            least[node] = estimate
            node >>= 1
        return slot

    def remove(self, slot: int) -> None:
        self._jobs[slot] = None
        self._set(slot, _GONE)

    def revise(self, slot: int, job: Job) -> None:
        self._set(slot, min(job.estimate, _UNKNOWN))

    def _set(self, slot: int, estimate: float) -> None:
        least, node = self._least, slot + self._size
        least[node] = estimate
        node >>= 1
        while node:
            a, b = least[2 * node], least[2 * node + 1]
            low = a if a < b else b
            if least[node] == low:
                break
            least[node] = low
            node >>= 1

    def _compact(self, where: dict[int, tuple[_Shelf, int]]) -> None:
        """Close the gaps; double the slots where that is not enough."""
        kept = [(job, place) for job, place in zip(self._jobs, self._places, strict=True) if job]
        self._clear(max(_FIRST, 1 << (2 * len(kept)).bit_length()))
        for job, place in kept:
            where[job.seq] = self, self.put(job, place, where)

    def first(
        self, ledger: Ledger, spare: Ledger, seconds: float, before: float
    ) -> tuple[Job, int] | None:
        """Return the first job that could fill the gap, if it is before a place."""
        if self.plain:
            # All here ask for the same cores: whether it fits the spare ones is one question.
            limit = _UNKNOWN if self.cores <= spare.cores else seconds
            slot = self._find(limit, 0)
            if slot < 0 or self._places[slot] >= before:
                return None
            job = self._jobs[slot]
            return None if job is None else (job, self._places[slot])
        slot = self._find(_UNKNOWN, 0)
        while slot >= 0 and self._places[slot] < before:
            job = self._jobs[slot]
            assert job is not None
            if ledger.fits(job) and (job.estimate <= seconds or spare.fits(job)):
                return job, self._places[slot]
            slot = self._find(_UNKNOWN, slot + 1)
        return None

    def _find(self, limit: float, start: int) -> int:
        """Return the first slot from `start` on whose estimate is at most `limit`, or -1."""
        least, size = self._least, self._size
        if start >= size or not least[1] <= limit:
            return -1
        node = start + size
        while not least[node] <= limit:
            # To the next subtree on the right: up while this is a right child.
            while node & 1:
                node >>= 1
                if node <= 1:
                    return -1
            node += 1
        while node < size:
            node *= 2
            if not least[node] <= limit:
                node += 1
        return node - size
