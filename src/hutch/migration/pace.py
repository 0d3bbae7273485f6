"""Bound how many bytes a second are sent."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pace"]


class Pace:
    """Makes a sender wait; `bandwidth` is bytes a second, 0 is no bound. For one thread."""

    def __init__(
        self,
        bandwidth: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.bandwidth = bandwidth
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0

    def wait(self, count: int) -> None:
        """Wait until what went before has had its time; `count` bytes go next."""
        if not self.bandwidth:
            return
        now = self._clock()
        if self._free_at > now:
            self._sleep(self._free_at - now)
        self._free_at = max(now, self._free_at) + count / self.bandwidth
