"""Threads that are used again."""

from __future__ import annotations

import threading

import pytest

from hutch.engine.jobs.threads import Threads
from tests.engine.jobs.queues import until

pytestmark = pytest.mark.unit


def test_a_thread_is_used_again_and_more_are_made_as_needed() -> None:
    threads = Threads("test")
    seen: set[int] = set()

    def once() -> None:
        done = threading.Event()

        def act() -> None:
            seen.add(threading.get_ident())
            done.set()

        threads.run(act)
        assert done.wait(30)

    for _ in range(20):
        once()
        until(lambda: threads._idle == 1)
    assert len(seen) == 1
    barrier = threading.Barrier(4)

    def meet() -> None:
        barrier.wait(30)

    for _ in range(3):
        threads.run(meet)
    barrier.wait(30)  # three at once
    threads.close()
    once()  # one that was not idle when it was closed, or a new one


def test_all_that_is_asked_for_is_done() -> None:
    threads = Threads("test")
    count = 500
    left = threading.Semaphore(0)
    for _ in range(count):
        threads.run(lambda: left.release())
    for _ in range(count):
        assert left.acquire(timeout=30)
    threads.close()
