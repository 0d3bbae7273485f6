"""The stages of a build in threads: begun in the order of the plan, each waited for by others.

`concurrent.futures` would do it too, but brings `logging`: a fifth of what a build takes that
finds every step done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.engine.builder.stage import StageState

__all__ = ["Stages"]


class Stages:
    """What became of each stage. A stage may only wait for ones that are begun before it, so
    that nobody waits for what no thread is left to build, or for what waits for it."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._waiting = list(indices)
        self._count = len(indices)
        self._places = {index: place for place, index in enumerate(indices)}
        self._built = threading.local()
        self._states: dict[int, StageState] = {}
        self._errors: dict[int, BaseException] = {}
        self._changed = threading.Condition()

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def is_before(self, index: int) -> bool:
        """Tell whether a stage was begun before the one that this thread builds."""
        return self._places[index] < getattr(self._built, "place", self._count)

    @contextmanager
    def built(self, build: Mapping[int, Callable[[], StageState]], threads: int) -> Iterator[None]:
        """Build them; the threads have ended when the block is left."""
        workers = [
            threading.Thread(target=self._work, args=(build,), name=f"hutch-build-{number}")
            for number in range(threads)
        ]
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            for worker in workers:
                worker.join()

    def _work(self, build: Mapping[int, Callable[[], StageState]]) -> None:
        while True:
            with self._changed:
                if not self._waiting or self._errors:
                    return
                index = self._waiting.pop(0)
            self._built.place = self._places[index]
            try:
                state = build[index]()
            except BaseException as error:
                with self._changed:
                    self._errors[index] = error
                    self._changed.notify_all()
            else:
                with self._changed:
                    self._states[index] = state
                    self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all are built or one has failed; tell whether it is so."""
        with self._changed:
            return self._changed.wait_for(
                lambda: bool(self._errors) or len(self._states) == self._count, timeout_s
            )

    def wait_for(self, index: int, timeout_s: float) -> bool:
        """Wait until a stage has ended; tell whether it has."""
        with self._changed:
            return self._changed.wait_for(
                lambda: index in self._states or index in self._errors, timeout_s
            )

    @property
    def all_done(self) -> bool:
        """Whether all are built."""
        return len(self._states) == self._count

    def has_failed(self, index: int) -> bool:
        """Tell whether a stage that has ended failed."""
        return index in self._errors

    def state(self, index: int) -> StageState:
        """Return a stage that is built."""
        return self._states[index]

    def errors(self) -> list[BaseException]:
        """Return the failures."""
        return list(self._errors.values())
