"""What tests of jobs have in common: the default queue, waiting, how many ran at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hutch.engine import Engine
from hutch.engine.jobs.facade import Job
from hutch.engine.jobs.records import LABEL, JobRecord, JobState
from hutch.errors import AlreadyExists

__all__ = ["WAIT_S", "cancel_all", "is_in", "let_go", "most_at_once", "run_at_once", "submit"]
__all__ += ["submit_held_back", "until", "use_policy"]

WAIT_S = 200.0


def use_policy(engine: Engine, policy: str, **values: Any) -> None:
    """Give the default queue a policy; one that is the same changes nothing."""
    try:
        engine.queues.create("default", policy=policy, **values)
    except AlreadyExists:
        engine.queues.update("default", policy=policy, **values)


def until(condition: Callable[[], object], wait_s: float = WAIT_S) -> None:
    """Wait until something is true; fail the test if it does not become so."""
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def submit(engine: Engine, *command: str, **options: Any) -> Job:
    """Submit a job that can be ended at once."""
    return engine.jobs.submit("busybox", command, network="none", stop_timeout=0, **options)


def submit_held_back(engine: Engine, scratch: Path, *, exit: int = 0, **options: Any) -> Job:
    """Submit a job that ends when it is let go, and not by a clock."""
    script = f"while [ ! -e /scratch/go ]; do usleep 10000; done; exit {exit}"
    return submit(engine, "sh", "-c", script, volumes=[f"{scratch}:/scratch"], **options)


def let_go(scratch: Path) -> None:
    """Let all jobs end that were held back by this directory."""
    (scratch / "go").touch()


def run_at_once(jobs: Sequence[Job], count: int) -> Callable[[], bool]:
    """Return the question whether so many jobs run now."""
    return lambda: sum(job.info().state == JobState.RUNNING for job in jobs) == count


def is_in(job: Job, state: JobState) -> Callable[[], bool]:
    """Return the question whether a job is in a state."""
    return lambda: job.info().state == state


def most_at_once(records: Sequence[JobRecord]) -> int:
    """Return how many jobs ran at the same time at most."""
    moments = sorted(
        moment
        for record in records
        for piece in record.slices
        for moment in ((piece.begin, 1), (piece.end, -1))
    )
    running = most = 0
    for _, change in moments:
        running += change
        most = max(most, running)
    return most


def cancel_all(engine: Engine) -> None:
    """End what a test has left in the queues, and forget what ran."""
    with engine.jobs.dispatching():
        engine.jobs.cancel()
        until(lambda: not engine.jobs.list())
        until(lambda: not any(LABEL in info.labels for info in engine.list(all=True)))
    engine.jobs.prune()
