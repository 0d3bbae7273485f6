"""Quantiles of a stream: exact while it is short, within a tenth of a per cent when it is long.

Long streams go into buckets that grow geometrically (the DDSketch of Masson, Rim and Lee,
VLDB 2019), so that memory does not grow with the number of values.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Quantiles"]

_EXACT = 50_000
_ACCURACY = 0.0005
_LOG_GAMMA = math.log((1 + _ACCURACY) / (1 - _ACCURACY))
# Below this a value counts as 0: a nanosecond of waiting.
_ZERO = 1e-9


class Quantiles:
    """Values of one kind, none negative."""

    __slots__ = ("_buckets", "_highest", "_lowest", "_values", "count")

    def __init__(self) -> None:
        self.count = 0
        self._values: array[float] | None = array("d")
        self._buckets: Counter[int] = Counter()
        self._lowest = math.inf
        self._highest = -math.inf

    @property
    def exact(self) -> bool:
        """Whether the quantiles are those of the values themselves."""
        return self._values is not None

    def add(self, values: Sequence[float]) -> None:
        """Count these values."""
        if not values:
            return
        self.count += len(values)
        self._lowest = min(self._lowest, min(values))
        self._highest = max(self._highest, max(values))
        if self._values is None:
            self._count(values)
            return
        self._values.extend(values)
        if len(self._values) > _EXACT:
            self._count(self._values)
            self._values = None

    def _count(self, values: Iterable[float]) -> None:
        log, scale, zero = math.log, 1 / _LOG_GAMMA, _ZERO
        floor = int(log(zero) * scale)
        self._buckets.update([int(log(v) * scale) - floor + 1 if v > zero else 0 for v in values])

    def at(self, *fractions: float) -> list[float]:
        """Return the quantiles, interpolated linearly between neighbours; NaN of nothing."""
        if not self.count:
            return [math.nan] * len(fractions)
        if self._values is not None:
            return _interpolate(sorted(self._values), fractions)
        return [self._bucketed(fraction) for fraction in fractions]

    def _bucketed(self, fraction: float) -> float:
        rank = fraction * (self.count - 1)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen > rank:
                return self._value(bucket)
        return self._highest

    def _value(self, bucket: int) -> float:
        """Return the value that stands for those of a bucket."""
        floor = int(math.log(_ZERO) / _LOG_GAMMA)
        value = math.exp((bucket - 1 + floor + 0.5) * _LOG_GAMMA) if bucket else 0.0
        return min(max(value, self._lowest), self._highest)

    def curve(self, points: int = 200) -> list[tuple[float, float]]:
        """Return points (value, share of values up to it) of the distribution, rising: the
        corners of its stairs, of very many about so many, the lowest and the highest too."""
        step = 1 / max(points, 1)
        found: list[tuple[float, float]] = []
        for value, seen in self._steps():
            share = seen / self.count
            if not found or seen == self.count or share - found[-1][1] >= step * (1 - 1e-9):
                found.append((value, share))
        return found

    def _steps(self) -> Iterator[tuple[float, int]]:
        """Yield each value once, rising, and how many are not above it."""
        if self._values is not None:
            ordered = sorted(self._values)
            last = len(ordered) - 1
            for rank, value in enumerate(ordered):
                if rank == last or ordered[rank + 1] != value:
                    yield value, rank + 1
            return
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            yield self._value(bucket), seen


def _interpolate(ordered: Sequence[float], fractions: Iterable[float]) -> list[float]:
    last = len(ordered) - 1
    result = []
    for fraction in fractions:
        rank = fraction * last
        below = min(int(rank), last)
        above = min(below + 1, last)
        part = rank - below
        low, high = ordered[below], ordered[above]
        result.append(low + (high - low) * part)
    return result
