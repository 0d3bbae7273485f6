"""The streams of a program, read and written by the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from hutch.aio.calls import settled
from hutch.engine.session import end_program
from hutch.errors import Exhausted, OperationTimeout
from hutch.process.frames import Gap, Output

if TYPE_CHECKING:
    from typing import Self

    from hutch import engine
    from hutch.aio.calls import Pool

__all__ = ["Session"]

_QUEUE_BYTES = 1 << 20


class Session:
    """An open connection to a program's streams; use it in an `async with` block.

    While more than a megabyte waits to be read, nothing more is taken from the program,
    which then waits in its writes.
    """

    def __init__(self, pool: Pool, session: engine.Session) -> None:
        self._pool = pool
        self._session = session
        self._link = session.link
        self._pieces: deque[Output | Gap] = deque()
        self._waiting_bytes = 0
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._listening = False
        self._closed = False
        self._receive()  # what came with the start is read already

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # ---- the event loop's side ----------------------------------------------------------

    def _listen(self) -> None:
        wanted = not self._closed and not self._over and self._waiting_bytes < _QUEUE_BYTES
        if wanted and not self._listening:
            self._loop.add_reader(self._link.fileno(), self._receive)
        elif self._listening and not wanted:
            self._loop.remove_reader(self._link.fileno())
        self._listening = wanted

    @property
    def oom_killed(self) -> bool:
        """Whether the kernel killed the main program for want of memory; known after its end."""
        return self._session.oom_killed

    @property
    def _over(self) -> bool:
        return self._link.exit_status is not None or self._link.is_over

    def _receive(self) -> None:
        """Take what has arrived; the loop calls this when the connection is readable."""
        while (event := self._link.next_event(0.0)) is not None:
            if isinstance(event, (Output, Gap)):
                self._pieces.append(event)
                self._waiting_bytes += len(event.data) if isinstance(event, Output) else 0
        self._changed.set()
        self._listen()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    # ---- for the caller -------------------------------------------------------------------

    async def output(self) -> AsyncIterator[Output | Gap]:
        """Yield output (`stream` 1 or 2, `data`) until the program has ended."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._waiting_bytes -= len(piece.data) if isinstance(piece, Output) else 0
                self._listen()
                yield piece
            if self._over or self._closed:
                return
            await self._change()

    async def send(self, data: bytes) -> None:
        """Send input; waits while the program does not read."""
        view = memoryview(data)
        while view and not self._over:
            room = self._link.stdin_room
            if not room:
                await self._change()
                continue
            self._session.send(bytes(view[:room]))
            view = view[room:]

    async def close_stdin(self) -> None:
        """End the input."""
        self._session.close_stdin()

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the terminal."""
        self._session.resize(rows, columns)
        self._receive()

    async def signal(self, signum: int) -> None:
        """Send a signal to the program; nothing happens when it has ended."""
        self._session.signal(signum)
        self._receive()

    async def wait(self) -> int:
        """Wait for the end; return the exit code. Output not read by then is kept."""
        while not self._over:
            if self._waiting_bytes >= _QUEUE_BYTES:
                raise Exhausted(
                    "the program waits for its output to be read",
                    hint="read output() before or beside wait()",
                )
            await self._change()
        return await self._pool.call(self._session.wait)

    async def collect(
        self, *, input: bytes | None, timeout: float | None, limit: int
    ) -> tuple[int, bytes, bytes]:
        """Feed the input, gather both streams, wait for the end."""
        streams: tuple[list[bytes], list[bytes]] = ([], [])
        total = [0, 0]
        feeding = asyncio.ensure_future(self._feed(input))
        try:
            async with asyncio.timeout(timeout):
                async for piece in self.output():
                    if isinstance(piece, Output):
                        index = 1 if piece.stream == 2 else 0
                        total[index] += len(piece.data)
                        streams[index].append(piece.data)
                        if total[index] > limit:
                            raise Exhausted(
                                f"the program wrote more than {limit} bytes",
                                hint="raise limit=, or read the output as a stream",
                            )
                code = await self.wait()
        except TimeoutError:
            await self._end()
            late = OperationTimeout(f"the program did not end within {timeout:g} s")
            late.stdout, late.stderr = (b"".join(stream) for stream in streams)
            raise late from None
        except Exhausted as exc:
            exc.stdout, exc.stderr = (b"".join(stream)[:limit] for stream in streams)
            await self._end()
            raise
        except BaseException:
            await self._end()
            raise
        finally:
            feeding.cancel()
        return code, b"".join(streams[0]), b"".join(streams[1])

    async def _feed(self, input: bytes | None) -> None:
        try:
            if input:
                await self.send(input)
            await self.close_stdin()
        except OSError:
            return  # it has ended without reading all of it

    async def _end(self) -> None:
        """Kill a program whose output nobody wants any more, and wait until it is gone."""
        if self._listening:
            self._loop.remove_reader(self._link.fileno())
            self._listening = False
        self._closed = True
        try:
            await settled(self._pool.call(lambda: end_program(self._link)))
        finally:
            self._session.close()

    def close(self) -> None:
        """Leave the streams; safe to repeat."""
        if self._closed:
            return
        self._closed = True
        self._listen()
        self._changed.set()
        self._session.close()
