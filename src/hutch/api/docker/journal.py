"""The journal of the root as a stream for any number of listeners, within milliseconds.

Other processes write to it too: the store's log file is watched, and looked at again shortly
after, for a commit is visible a moment after its bytes are written.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from typing import TYPE_CHECKING

from hutch.linux.inotify import IN_MODIFY, Inotify

if TYPE_CHECKING:
    from typing import Self

    from hutch.engine.context import Context
    from hutch.store.database import EventRow

__all__ = ["Journal", "Listener"]

_LATER_S = (0.001, 0.004, 0.02, 0.1)
_SELDOM_S = 2.0
_BATCH = 500
_MOST = 10_000


class Listener:
    """One who is told of events from the moment it was made; use it in a `with` block."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._events: deque[EventRow] = deque()
        self._changed = asyncio.Event()
        self.lost = False

    def __enter__(self) -> Self:
        self._journal.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.discard(self)

    def tell(self, event: EventRow) -> None:
        """Take an event; who does not listen for long loses the oldest ones, and is told."""
        if len(self._events) >= _MOST:
            self._events.popleft()
            self.lost = True
        self._events.append(event)
        self._changed.set()

    async def next(self) -> EventRow:
        """Return the next event, waiting for it."""
        while not self._events:
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()


class Journal:
    """Reads the journal while somebody listens."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._root = context.root
        self._listeners: set[Listener] = set()
        self._last = 0
        self._inotify: Inotify | None = None
        self._later: asyncio.TimerHandle | None = None
        self._step = 0

    def __len__(self) -> int:
        return len(self._listeners)

    def listen(self) -> Listener:
        """Return a listener; it hears what comes from its `with` block's begin on."""
        return Listener(self)

    def add(self, listener: Listener) -> None:
        """Tell this one of events from now on."""
        if not self._listeners:
            self._last = self._store.last_event()
            self._watch()
        self._listeners.add(listener)

    def discard(self, listener: Listener) -> None:
        """Tell this one no more."""
        self._listeners.discard(listener)
        if not self._listeners:
            self.close()

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._inotify = Inotify()
            # The directory, for the file is made anew when it was folded into the database.
            self._inotify.add(self._root, IN_MODIFY)
            loop.add_reader(self._inotify.fd, self._written)
        except OSError:  # no more watches: then it is looked at by the clock alone
            self._unwatch()
        self._schedule(_SELDOM_S)

    def _written(self) -> None:
        assert self._inotify is not None
        try:
            os.read(self._inotify.fd, 1 << 16)
        except BlockingIOError:
            pass
        self.poke()

    def poke(self) -> None:
        """Look now: something was written."""
        if self._listeners:
            self._step = 0
            self._look()

    def _look(self) -> None:
        rows = self._store.events(self._last, _BATCH)
        for row in rows:
            self._last = row.seq
            for listener in self._listeners:
                listener.tell(row)
        if len(rows) == _BATCH:
            self._schedule(0.0)
        elif self._step < len(_LATER_S):
            self._step += 1
            self._schedule(_LATER_S[self._step - 1])
        else:
            self._schedule(_SELDOM_S if self._inotify is not None else _LATER_S[-1])

    def _schedule(self, delay_s: float) -> None:
        if self._later is not None:
            self._later.cancel()
        self._later = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _unwatch(self) -> None:
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None

    def close(self) -> None:
        """Look no more."""
        self._unwatch()
        if self._later is not None:
            self._later.cancel()
            self._later = None
