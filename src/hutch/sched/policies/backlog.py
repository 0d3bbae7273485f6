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

    def has(self, job: Job) -> bool:
        """Tell whether a job is in."""
        return job.seq in self._where

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
    """Jobs alike, in slots by order. Trees over the slots have the least estimate below and,
    where jobs ask for memory, the least of that."""

    __slots__ = (
        "_jobs",
        "_memory",
        "_next",
        "_places",
        "_shortest",
        "_size",
        "cores",
        "devices",
        "least_memory",
    )

    def __init__(self, shape: Shape) -> None:
        self.cores, bits, self.devices = shape
        self.least_memory = 1 << (bits - 1) if bits else 0
        self._clear(_FIRST)

    def _clear(self, size: int) -> None:
        self._size = size
        self._shortest = [_GONE] * (2 * size)
        self._memory = [_GONE] * (2 * size) if self.least_memory else []
        self._jobs: list[Job | None] = [None] * size
        self._places = [0] * size
        self._next = 0

    @property
    def shortest(self) -> float:
        return self._shortest[1]

    def put(self, job: Job, place: int, where: dict[int, tuple[_Shelf, int]]) -> int:
        if self._next == self._size:
            self._compact(where)
        slot = self._next
        self._next += 1
        self._jobs[slot] = job
        self._places[slot] = place
        self._lower(self._shortest, slot, min(job.estimate, _UNKNOWN))
        if self._memory:
            self._lower(self._memory, slot, job.memory)
        return slot

    def remove(self, slot: int) -> None:
        self._jobs[slot] = None
        self._set(self._shortest, slot, _GONE)
        if self._memory:
            self._set(self._memory, slot, _GONE)

    def revise(self, slot: int, job: Job) -> None:
        self._set(self._shortest, slot, min(job.estimate, _UNKNOWN))

    def _lower(self, tree: list[float], slot: int, value: float) -> None:
        """Enter a value where there was none."""
        node = slot + self._size
        while node and value < tree[node]:
            tree[node] = value
            node >>= 1

    def _set(self, tree: list[float], slot: int, value: float) -> None:
        node = slot + self._size
        tree[node] = value
        node >>= 1
        while node:
            a, b = tree[2 * node], tree[2 * node + 1]
            low = a if a < b else b
            if tree[node] == low:
                break
            tree[node] = low
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
        """Return the first job that could fill the gap, if it is before a place.

        Its cores are known to be free.
        """
        if not self._has(ledger):
            return None
        slot = self._find(seconds, ledger.memory)
        if self.cores <= spare.cores and self._has(spare):
            other = self._find(_UNKNOWN, min(ledger.memory, spare.memory))
            if other >= 0 and (slot < 0 or other < slot):
                slot = other
        if slot < 0 or self._places[slot] >= before:
            return None
        job = self._jobs[slot]
        return None if job is None else (job, self._places[slot])

    def _has(self, ledger: Ledger) -> bool:
        """Tell whether there are the devices, and memory for the least of these jobs."""
        if self.least_memory > ledger.memory:
            return False
        free = ledger.devices
        return all(count <= free.get(name, 0) for name, count in self.devices)

    def _find(self, seconds: float, memory: float) -> int:
        """Return the first slot whose job is so short and asks for so little, or -1.

        Subtrees in which no job is short enough, or none asks for little enough, are left
        out.
        """
        shortest, least, size = self._shortest, self._memory, self._size
        node = 1
        while True:
            if shortest[node] <= seconds and (not least or least[node] <= memory):
                if node >= size:
                    return node - size
                node *= 2
                continue
            while node & 1:  # the next subtree on the right: up from a right child
                node >>= 1
                if not node:
                    return -1
            node += 1
