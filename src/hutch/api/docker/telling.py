"""Long work in a thread that tells how far it is, as lines of JSON for one client.

Until the first line a failure is answered with a status of its own, as in Docker; later it is
the last line. A client that leaves ends the work.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hutch.api.docker.replies import Stream, encode

if TYPE_CHECKING:
    from hutch.api.docker.front import Front

__all__ = ["Teller", "Work", "tell_work"]

# Beyond this many unread lines, those that only count bytes are left out.
_MANY = 256


Work = Callable[["Teller"], None]


class Teller:
    """What the work is given: where it tells, and whether it is still wanted."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._lines: deque[dict[str, Any]] = deque()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def tell(self, line: dict[str, Any], *, counts: bool = False) -> None:
        """Add a line; one that only `counts` is dropped when the client reads too slowly."""
        if counts and len(self._lines) >= _MANY:
            return
        self._lines.append(line)
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:
            self.stop.set()  # the daemon is gone

    def wake(self) -> None:
        """Have who waits look again; in the loop."""
        self._changed.set()

    async def wait(self) -> None:
        """Return when there may be something new."""
        await self._changed.wait()
        self._changed.clear()

    def take(self) -> bytes:
        """Return the lines so far, b"" for none."""
        pieces = []
        while self._lines:
            pieces.append(encode(self._lines.popleft()) + b"\r\n")
        return b"".join(pieces)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._lines


class _Chunks:
    """The lines as the body of an answer; `aclose` ends the work, begun to be read or not."""

    def __init__(self, teller: Teller, task: asyncio.Task[None]) -> None:
        self._teller = teller
        self._task = task

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        while True:
            if data := self._teller.take():
                return data
            if self._task.done():
                self._task.result()
                raise StopAsyncIteration
            await self._teller.wait()

    async def aclose(self) -> None:
        """End the work and wait for its end."""
        self._teller.stop.set()
        if not self._task.done():
            await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # nobody is left to hear of it


async def tell_work(front: Front, work: Work) -> Stream:
    """Do work in a thread and return the answer that tells of it; raise what comes first."""
    teller = Teller()
    task = asyncio.ensure_future(front.call_slow(work, teller))
    task.add_done_callback(lambda _: teller.wake())
    chunks = _Chunks(teller, task)
    try:
        while teller.is_empty and not task.done():
            await teller.wait()
        if teller.is_empty:
            task.result()
    except BaseException:
        await chunks.aclose()
        raise
    return Stream(chunks, content_type="application/json", tells_errors=True)
