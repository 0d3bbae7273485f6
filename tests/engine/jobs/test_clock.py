"""A host whose clock is set while jobs run: nobody has run or waited for longer by that."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hutch.engine import Engine
from hutch.engine.jobs.clock import Clock
from hutch.engine.jobs.dispatcher import Dispatcher
from hutch.engine.jobs.facade import Job
from hutch.engine.jobs.records import JobState
from tests.engine.jobs.queues import WAIT_S, cancel_all, is_in, submit, until, use_policy
from tests.requires import requires

HOUR_NS = 3600 * 10**9


@pytest.fixture
def queue(engine: Engine) -> Iterator[None]:
    """The default queue, whose jobs take turns."""
    with engine.jobs.dispatching():
        use_policy(engine, "rr:quantum=0.1")
    yield
    cancel_all(engine)


def test_a_clock_goes_back_only_when_it_was_set() -> None:
    wall, steady = [50 * 10**9], [7 * 10**9]
    clock = Clock(lambda: wall[0], lambda: steady[0])
    assert (clock.now(), clock.moved()) == (50, 0)
    wall[0] -= 10**8  # slowed down
    assert (clock.now(), clock.moved()) == (50, 0)
    wall[0], steady[0] = wall[0] + 3 * 10**9, steady[0] + 3 * 10**9
    assert clock.moved() == 0
    wall[0] -= HOUR_NS
    assert clock.moved() == pytest.approx(-HOUR_NS, abs=10**9)
    assert clock.now() == wall[0] / 1e9 and clock.moved() == 0


@requires("root", "overlayfs", "cgroup", "busybox")
def test_jobs_take_turns_and_keep_their_time_when_the_clock_is_set(
    engine: Engine, queue: None
) -> None:
    shift = [0]
    clock = Clock(lambda: time.time_ns() + shift[0])
    dispatcher = Dispatcher(engine._context, cores=1, clock=clock)
    ready = threading.Event()
    thread = threading.Thread(target=dispatcher.run, kwargs={"ready": ready.set})
    thread.start()
    assert ready.wait(WAIT_S)
    try:
        jobs = [submit(engine, "sleep", "1000", timeout=1800) for _ in range(2)]
        for moved in (HOUR_NS, -HOUR_NS, 0):
            take_turns(jobs)
            shift[0] = moved
        take_turns(jobs)
        for job in jobs:
            job.cancel()
        ended = [job.wait(WAIT_S) for job in jobs]
    finally:
        dispatcher.stop()
        thread.join()
    assert {record.state for record in ended} == {JobState.CANCELLED}
    assert all(record.ran_ns < HOUR_NS / 2 for record in ended)


def take_turns(jobs: list[Job]) -> None:
    """Wait until each has been preempted twice more, and goes on."""
    before = [job.info().preemptions for job in jobs]
    for job, had in zip(jobs, before, strict=True):
        until(lambda job=job, had=had: job.info().preemptions >= had + 2)  # type: ignore[misc]
        until(is_in(job, JobState.RUNNING))
