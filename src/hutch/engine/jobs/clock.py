"""The host's clock as a dispatcher uses it: it never goes back by itself, and it is noticed when
somebody has set it."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock"]

_SET_NS = 1_000_000_000  # less is what clocks are slowed and hurried by


class Clock:
    """Time since the epoch. `wall` and `steady` (which nobody sets, and which stands still while
    the host sleeps) return nanoseconds."""

    def __init__(
        self,
        wall: Callable[[], int] = time.time_ns,
        steady: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall, self._steady = wall, steady
        self._between = wall() - steady()
        self._latest = 0.0

    def now(self) -> float:
        """Return seconds, never fewer than before, unless the clock was `moved`."""
        self._latest = max(self._latest, self._wall() / 1e9)
        return self._latest

    def now_ns(self) -> int:
        """Return what goes into records."""
        return self._wall()

    def moved(self) -> int:
        """Return by how many nanoseconds the clock was set since this was last asked."""
        between = self._wall() - self._steady()
        by_ns = between - self._between
        if abs(by_ns) < _SET_NS:
            return 0
        self._between = between
        self._latest = self._wall() / 1e9
        return by_ns
