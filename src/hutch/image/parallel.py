"""Several transfers at a time: the first failure, Ctrl-C or the caller's stop ends them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from hutch.image.transport import Cancelled

__all__ = ["Halt", "run_all"]

_LOOK_EVERY_S = 0.1

T = TypeVar("T")


class Halt:
    """Stops one piece of work: `event` is set from within, or because `outer` was."""

    def __init__(self, outer: threading.Event | None = None) -> None:
        self.event = threading.Event()
        self._outer = outer

    @property
    def asked(self) -> bool:
        """Whether the caller wants the work to end."""
        return self._outer is not None and self._outer.is_set()

    @property
    def slice_s(self) -> float | None:
        """How long to wait before looking whether the caller asks again."""
        return None if self._outer is None else _LOOK_EVERY_S


def run_all(
    calls: Sequence[Callable[[], T]], *, parallel: int, halt: Halt, abort: Callable[[], None]
) -> list[T]:
    """Call all, `parallel` at a time, and return their results in order.

    On a failure `halt.event` is set, `abort` called, the threads waited for, and the error
    raised that came of itself rather than from the stop.
    """
    if not calls:
        return []
    pool = ThreadPoolExecutor(
        max_workers=max(1, min(parallel, len(calls))), thread_name_prefix="hutch-transfer"
    )
    futures: list[Future[T]] = []
    failed: list[BaseException] = []
    try:
        futures.extend(pool.submit(call) for call in calls)
        failed = _wait(futures, halt)
        if failed or halt.asked:
            halt.event.set()
            abort()
    except BaseException:
        halt.event.set()
        abort()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    late = [e for f in futures if not f.cancelled() and (e := f.exception()) is not None]
    # What failed after the stop may well have failed of the stop.
    for failure in (*failed, *late):
        if not isinstance(failure, Cancelled):
            raise failure
    if late or any(future.cancelled() for future in futures):
        raise Cancelled("stopped before it was finished")
    return [future.result() for future in futures]


def _wait(futures: Sequence[Future[T]], halt: Halt) -> list[BaseException]:
    """Wait for all, or for the first failures, which are returned, or for the caller's stop."""
    left: set[Future[T]] = set(futures)
    while left and not halt.asked:
        done, left = wait(left, halt.slice_s, return_when=FIRST_EXCEPTION)
        if failures := [e for future in done if (e := future.exception()) is not None]:
            return failures
    return []
