"""Draw things at random by weight, in the logarithm of their number."""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["Drum"]

T = TypeVar("T")
_FIRST = 16


class Drum(Generic[T]):
    """Things with weights in a tree of sums: each inner node holds what is below it."""

    def __init__(self) -> None:
        self._size = _FIRST
        self._sums: list[float] = [0] * (2 * _FIRST)
        self._things: list[T | None] = [None] * _FIRST
        self._free = list(range(_FIRST - 1, -1, -1))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, thing: T, weight: float) -> int:
        """Put a thing in, of a weight above 0; return its slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._things[slot] = thing
        self._count += 1
        self._set(slot, weight)
        return slot

    def remove(self, slot: int) -> None:
        """Take out what is in a slot."""
        self._things[slot] = None
        self._free.append(slot)
        self._count -= 1
        self._set(slot, 0)

    def draw(self, lot: float) -> tuple[int, T]:
        """Return (slot, thing) for a lot in [0, 1), without taking it out."""
        sums, node = self._sums, 1
        lot *= sums[1]
        while node < self._size:
            node *= 2
            if lot >= sums[node] and sums[node + 1] > 0:
                lot -= sums[node]
                node += 1
        slot = node - self._size
        thing = self._things[slot]
        assert thing is not None
        return slot, thing

    def _set(self, slot: int, weight: float) -> None:
        # Sums are added up anew, not adjusted: rounding does not pile up.
        sums, node = self._sums, slot + self._size
        sums[node] = weight
        while node > 1:
            node //= 2
            sums[node] = sums[2 * node] + sums[2 * node + 1]

    def _grow(self) -> None:
        old, leaves = self._size, self._sums[self._size :]
        self._size = 2 * old
        self._things += [None] * old
        self._free = list(range(self._size - 1, old - 1, -1))
        self._sums = [0] * self._size + leaves + [0] * old
        for node in range(self._size - 1, 0, -1):
            self._sums[node] = self._sums[2 * node] + self._sums[2 * node + 1]
