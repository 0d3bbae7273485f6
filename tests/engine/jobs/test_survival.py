"""Dispatchers are killed at any moment: no job is lost, none runs twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from hutch.engine import Engine, finish
from hutch.engine.context import Context
from hutch.engine.jobs.records import ACTIVE, JobRecord, JobState, key_of
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.errors import HutchError, NotFound
from tests.engine.jobs.queues import WAIT_S, cancel_all, let_go, submit_held_back, until
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox")]


@pytest.fixture
def dispatcher(engine: Engine) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a dispatcher in a process of its own, to be killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "hutch", "--root", str(engine.root), "queue", "run"]
        started.append(subprocess.Popen([*argv, "--cpus", "4"]))
        fifo = engine.root / "locks" / "dispatch.fifo"
        until(lambda: _is_read(fifo))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    cancel_all(engine)
    engine.reconcile()  # directories of instances that were being made


def _has_ended(engine: Engine, name: str) -> bool:
    try:
        return engine.get(name).info().state == "exited"
    except NotFound:  # and is removed already
        return True


def _is_read(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_a_job_outlives_its_dispatcher_and_is_taken_up(
    engine: Engine, dispatcher: Callable[[], subprocess.Popen[bytes]], scratch: Path
) -> None:
    first = dispatcher()
    flag = scratch / "go"
    script = "echo begun; while [ ! -e /s/go ]; do sleep 0.05; done; echo ended"
    job = engine.jobs.submit(
        "busybox", ["sh", "-c", script], network="none", volumes=[f"{scratch}:/s"]
    )
    until(lambda: job.info().state == JobState.RUNNING)
    first.kill()
    first.wait()
    dispatcher()
    flag.touch()
    ended = job.wait(WAIT_S)
    assert (ended.state, ended.attempt) == (JobState.COMPLETED, 1)
    assert job.output() == b"begun\nended\n"


def _records(engine: Engine) -> list[object]:
    with engine._context.store.read() as tx:
        return [record for _, record in tx.items(INSTANCES, InstanceRecord)]


def test_a_removal_that_was_cut_short_is_ended_by_the_next_dispatcher(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finish.dispose

    def cut_short(context: Context, identifier: str) -> None:
        real(context, identifier)
        raise HutchError("as if killed between the files and the record")

    with monkeypatch.context() as patch, engine.jobs.dispatching():
        patch.setattr(finish, "dispose", cut_short)
        job = engine.jobs.submit("busybox", ["true"], network="none")
        assert job.wait(WAIT_S).state == JobState.COMPLETED
    assert len(_records(engine)) == 1 and not list((engine.root / "instances").iterdir())
    with engine.jobs.dispatching():
        until(lambda: not _records(engine))


def test_a_job_that_ended_without_a_dispatcher_is_booked_by_the_next(
    engine: Engine, dispatcher: Callable[[], subprocess.Popen[bytes]], scratch: Path
) -> None:
    first = dispatcher()
    job = submit_held_back(engine, scratch, exit=9)
    until(lambda: job.info().state == JobState.RUNNING)
    first.kill()
    first.wait()
    let_go(scratch)
    until(lambda: _has_ended(engine, f"job-{job.id}"))
    ended = job.wait(WAIT_S)  # who waits starts a dispatcher
    assert (ended.state, ended.exit_code, ended.attempt) == (JobState.FAILED, 9, 1)


def test_killed_at_random_moments_every_job_runs_exactly_once(
    engine: Engine, dispatcher: Callable[[], subprocess.Popen[bytes]], scratch: Path
) -> None:
    count = 40
    process = dispatcher()
    jobs = engine.jobs.submit_array(
        "busybox",
        ["sh", "-c", "echo $HUTCH_ARRAY_INDEX >>/s/ran"],
        array=count,
        network="none",
        volumes=[f"{scratch}:/s"],
    )
    for i in range(8):
        time.sleep(0.05 * (i % 4 + 1))  # a moment like any other: nothing is waited for
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = dispatcher()
    ended = [job.wait(WAIT_S) for job in jobs]
    assert [(r.index, r.state, r.reason) for r in ended if r.state != JobState.COMPLETED] == []
    ran = sorted(int(line) for line in (scratch / "ran").read_text().split())
    assert ran == list(range(count))


@pytest.mark.parametrize(("retries", "state"), [(0, JobState.UNKNOWN), (1, JobState.COMPLETED)])
def test_after_a_reboot_a_job_that_may_have_run_is_unknown_or_tried_again(
    engine: Engine,
    dispatcher: Callable[[], subprocess.Popen[bytes]],
    retries: int,
    state: JobState,
) -> None:
    with engine.jobs.dispatching():
        job = engine.jobs.submit("busybox", ["true"], network="none", hold=True, retries=retries)
    _forge(engine, job.info(), boot_id="another boot")
    dispatcher()
    ended = job.wait(WAIT_S)
    assert ended.state == state
    assert "restarted" in ended.reason or ended.attempt == 2


def test_one_that_was_about_to_start_is_started(
    engine: Engine, dispatcher: Callable[[], subprocess.Popen[bytes]]
) -> None:
    with engine.jobs.dispatching():
        job = engine.jobs.submit("busybox", ["true"], network="none", hold=True)
    _forge(engine, job.info(), boot_id=engine._context.boot_id)
    dispatcher()
    ended = job.wait(WAIT_S)
    assert (ended.state, ended.attempt) == (JobState.COMPLETED, 1)


def test_one_that_was_frozen_when_its_dispatcher_was_killed_goes_on(
    engine: Engine, scratch: Path
) -> None:
    with engine.jobs.dispatching():
        job = submit_held_back(engine, scratch)
        until(lambda: job.info().state == JobState.RUNNING)
    engine.get(f"job-{job.id}").pause()  # what came to no record
    let_go(scratch)
    with engine.jobs.dispatching():
        ended = job.wait(WAIT_S)
    assert (ended.state, ended.attempt) == (JobState.COMPLETED, 1)
    assert [piece.then for piece in ended.slices] == ["paused", ""]
    cancel_all(engine)


def test_one_that_went_on_when_its_dispatcher_was_killed_has_its_cores(
    engine: Engine, scratch: Path
) -> None:
    with engine.jobs.dispatching(cores=1):
        job = submit_held_back(engine, scratch)
        until(lambda: job.info().state == JobState.RUNNING)
    forged = msgspec.structs.replace(job.info(), state=JobState.PREEMPTED, mark=0)
    with engine._context.store.write() as tx:
        tx.put(ACTIVE, key_of(job.id), forged)
    with engine.jobs.dispatching(cores=1):
        other = engine.jobs.submit("busybox", ["true"], network="none")
        until(lambda: job.info().state == JobState.RUNNING)
        assert other.info().state == JobState.PENDING
        let_go(scratch)
        first, second = job.wait(WAIT_S), other.wait(WAIT_S)
    assert (first.state, second.state) == (JobState.COMPLETED, JobState.COMPLETED)
    assert second.started_ns >= first.finished_ns
    cancel_all(engine)


def _forge(engine: Engine, record: JobRecord, *, boot_id: str) -> None:
    """Write what a dispatcher leaves that dies before it has made the instance."""
    starting = msgspec.structs.replace(record, state=JobState.STARTING, attempt=1, boot_id=boot_id)
    with engine._context.store.write() as tx:
        tx.delete("jobs_waiting", key_of(record.id))
        tx.put(ACTIVE, key_of(record.id), starting)
