"""Threads that are used again: to start one costs a wait for it to run, which a dispatcher that
starts a hundred programs a second feels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["Threads"]


class Threads:
    """As many threads as there is to do at once. They keep no program from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._guard = threading.Lock()
        self._idle = 0
        self._closed = False
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def run(self, act: Callable[[], None]) -> None:
        """Do something on a thread that has nothing to do, or on a new one."""
        with self._guard:
            fresh = self._idle == 0
            self._idle -= not fresh
        if fresh:
            threading.Thread(target=self._work, args=(act,), name=self._name, daemon=True).start()
        else:
            self._waiting.put(act)

    def close(self) -> None:
        """Let threads end as soon as they have nothing to do."""
        with self._guard:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._waiting.put(None)

    def _work(self, act: Callable[[], None] | None) -> None:
        while act is not None:
            act()
            with self._guard:
                if self._closed:
                    return
                self._idle += 1
            act = self._waiting.get()
