"""Run the synchronous engine's methods in threads, so that cancelling leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["Pool", "Proxy", "threaded"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


class Pool:
    """A bounded pool of threads in which blocking calls are made."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="hutch-aio")

    def close(self) -> None:
        """Let go of the threads; calls under way end first."""
        self._executor.shutdown(wait=False)

    async def call(self, call: Callable[[], R], *, undo: Callable[[R], object] | None = None) -> R:
        """Make a blocking call in a thread and return its result.

        A thread cannot be interrupted: when the task is cancelled, the call is waited for,
        its result handed to `undo`, and only then the cancellation goes on.
        """
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await settled(self._finish(future, undo))
            raise

    async def _finish(self, future: asyncio.Future[R], undo: Callable[[R], object] | None) -> None:
        try:
            result = await future
        except Exception:
            return  # nothing was made
        if undo is not None:
            loop = asyncio.get_running_loop()
            with contextlib.suppress(Exception):
                await loop.run_in_executor(self._executor, undo, result)

    async def abandon(self, call: Callable[[], R]) -> R:
        """Make a call that only looks: when the task is cancelled nobody waits for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, call)


async def settled(work: Awaitable[R]) -> R:
    """Wait for `work` to its end, however often this task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()


class Proxy:
    """The async face of one object of the engine."""

    def __init__(self, pool: Pool, sync: Any) -> None:
        self._pool = pool
        self._sync = sync


def threaded(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """Return a coroutine method of a `Proxy` that makes the same call in a thread."""

    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        pool: Pool = self._pool
        return await pool.call(functools.partial(method, self._sync, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call
