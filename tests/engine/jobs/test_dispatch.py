"""Jobs on live containers: run to their end, in the order of a policy, preempted for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from hutch.engine.context import Context
from hutch.engine.jobs import attempt
from hutch.engine.jobs.facade import Job
from hutch.engine.jobs.records import JobState
from hutch.engine.start import start
from hutch.errors import Busy, InvalidArgument, NotFound, WrongState
from tests.engine.jobs.queues import (
    WAIT_S,
    cancel_all,
    is_in,
    let_go,
    most_at_once,
    run_at_once,
    submit,
    submit_held_back,
    until,
    use_policy,
)
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox")]


@pytest.fixture
def queue(engine: Engine) -> Iterator[str]:
    """The default queue, first come first served; jobs are forgotten afterwards."""
    with engine.jobs.dispatching():
        use_policy(engine, "fcfs")
    yield "default"
    cancel_all(engine)


def _begun(job: Job) -> int:
    return job.info().started_ns


def test_a_job_runs_and_its_log_and_exit_code_stay(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        good = submit(engine, "sh", "-c", "echo out; echo err >&2")
        bad = submit(engine, "sh", "-c", "exit 7")
        assert good.wait(WAIT_S).state == JobState.COMPLETED
        ended = bad.wait(WAIT_S)
    assert (ended.state, ended.exit_code) == (JobState.FAILED, 7)
    assert [(r.stream, r.data) for r in good.logs()] == [(1, b"out\n"), (2, b"err\n")]


def test_a_job_that_is_quicker_than_its_dispatcher_ends_after_it_began(
    engine: Engine, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(context: Context, identifier: str, **options: Any) -> Any:
        link = start(context, identifier, **options)
        assert link is not None
        link.wait()
        return link

    monkeypatch.setattr(attempt, "start", slowly)
    with engine.jobs.dispatching():
        ended = submit(engine, "true").wait(WAIT_S)
    assert ended.state == JobState.COMPLETED
    assert 0 < ended.started_ns <= ended.finished_ns
    assert ended.ran_ns > 0
    assert ended.id in {job.id for job in engine.jobs.history()}


def test_its_instance_has_the_limits_that_it_was_scheduled_with(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching(cores=4):
        job = submit(engine, "sleep", "60", cpus=0.5, memory="64m")
        until(is_in(job, JobState.RUNNING))
        info = engine.get(f"job-{job.id}").info()
        job.cancel()
        job.wait(WAIT_S)
    assert info.spec.resources.memory == 64 << 20
    assert info.labels["hutch.job"] == str(job.id)
    assert f"HUTCH_JOB_ID={job.id}" in info.spec.process.env


def test_no_more_cores_are_given_out_than_there_are(
    engine: Engine, queue: str, scratch: Path
) -> None:
    with engine.jobs.dispatching(cores=2):
        jobs = [submit_held_back(engine, scratch) for _ in range(5)]
        until(run_at_once(jobs, 2))
        let_go(scratch)
        ended = [job.wait(WAIT_S) for job in jobs]
    assert most_at_once(ended) == 2


def test_round_robin_takes_turns_on_live_containers(
    engine: Engine, queue: str, scratch: Path
) -> None:
    with engine.jobs.dispatching(cores=1):
        use_policy(engine, "rr:quantum=0.1")
        jobs = [submit_held_back(engine, scratch) for _ in range(2)]
        until(lambda: all(job.info().preemptions >= 2 for job in jobs))
        let_go(scratch)
        ended = [job.wait(WAIT_S) for job in jobs]
    assert all(record.state == JobState.COMPLETED for record in ended)
    assert most_at_once(ended) == 1
    for record in ended:
        assert sum(piece.end - piece.begin for piece in record.slices) == record.ran_ns
        assert {piece.then for piece in record.slices[:-1]} == {"paused"}


def test_a_preempted_container_is_frozen_and_goes_on(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching(cores=1):
        use_policy(engine, "rr:quantum=0.4")
        first, second = submit(engine, "sleep", "60"), submit(engine, "sleep", "60")
        until(is_in(first, JobState.PREEMPTED))
        # Its next turn may come before it is looked at, and then another pause.
        until(lambda: engine.get(f"job-{first.id}").info().state == "paused")
        until(is_in(first, JobState.RUNNING))
        for job in (first, second):
            job.cancel()
            assert job.wait(WAIT_S).state == JobState.CANCELLED


def test_a_dependency_decides_whether_a_job_runs(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        bad = submit(engine, "false")
        after_ok = submit(engine, "true", after=[bad.id])
        after_failure = submit(engine, "true", after=[f"{bad.id}:failed"])
        after_any = submit(engine, "true", after=[f"{after_ok.id}:any"])
        assert after_ok.wait(WAIT_S).state == JobState.CANCELLED
        assert after_failure.wait(WAIT_S).state == JobState.COMPLETED
        assert after_any.wait(WAIT_S).state == JobState.COMPLETED
    assert f"job {bad.id} is failed" in after_ok.info().reason


def test_a_held_job_waits_for_its_release(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        held = submit(engine, "true", hold=True)
        submit(engine, "true").wait(WAIT_S)
        assert held.info().state == JobState.HELD
        held.release()
        assert held.wait(WAIT_S).state == JobState.COMPLETED
        with pytest.raises(WrongState, match="completed"):
            held.cancel()


def test_a_job_that_waits_can_be_cancelled_and_one_that_runs(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching(cores=1):
        runs = submit(engine, "sleep", "60")
        waits = submit(engine, "sleep", "60")
        until(is_in(runs, JobState.RUNNING))
        waits.cancel()
        runs.cancel()
        assert waits.wait(WAIT_S).state == JobState.CANCELLED
        assert runs.wait(WAIT_S).state == JobState.CANCELLED
    assert waits.info().instance == ""


def test_a_failing_job_is_tried_again_as_often_as_it_asked(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        job = submit(engine, "sh", "-c", "exit $((HUTCH_JOB_ATTEMPT < 3))", retries=5)
        ended = job.wait(WAIT_S)
    assert (ended.state, ended.attempt) == (JobState.COMPLETED, 3)


def test_a_time_limit_ends_a_job(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        ended = submit(engine, "sleep", "60", timeout=0.2).wait(WAIT_S)
    assert ended.state == JobState.TIMEOUT


def test_a_program_that_cannot_be_started_fails_the_job(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        ended = submit(engine, "no-such-program").wait(WAIT_S)
    assert (ended.state, ended.exit_code) == (JobState.FAILED, 127)
    assert "no-such-program" in ended.reason


def test_an_array_tells_each_job_which_itis_in(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        jobs = engine.jobs.submit_array(
            "busybox", ["sh", "-c", "echo $HUTCH_ARRAY_INDEX"], array="3,5-9:2", network="none"
        )
        for job in jobs:
            job.wait(WAIT_S)
    assert [job.output() for job in jobs] == [b"3\n", b"5\n", b"7\n", b"9\n"]
    assert {job.info().array for job in jobs} == {jobs[0].id}


def test_outputs_are_kept_and_a_missing_one_is_named(
    engine: Engine, queue: str, scratch: object
) -> None:
    with engine.jobs.dispatching():
        job = submit(
            engine, "sh", "-c", "mkdir /data; echo 5 >/data/x", outputs=["/data", "/nowhere"]
        )
        assert job.wait(WAIT_S).state == JobState.COMPLETED
    with pytest.raises(NotFound, match="/nowhere"):
        job.save_outputs(f"{scratch}/not/there/yet")
    with open(f"{scratch}/not/there/yet/data/x") as file:
        assert file.read() == "5\n"
    with pytest.raises(InvalidArgument, match="data/x: not a directory"):
        job.save_outputs(f"{scratch}/not/there/yet/data/x")


def test_jobs_of_a_paused_queue_wait(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        engine.queues.create("nightly")
        engine.queues.pause("nightly")
        job = submit(engine, "true", queue="nightly")
        submit(engine, "true").wait(WAIT_S)
        assert job.info().state == JobState.PENDING
        with pytest.raises(Busy, match="1 job"):
            engine.queues.remove("nightly")
        engine.queues.resume("nightly")
        assert job.wait(WAIT_S).state == JobState.COMPLETED
    engine.queues.remove("nightly")


def test_a_priority_is_changed_while_a_job_waits(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching(cores=1):
        use_policy(engine, "priority")
        runs = submit(engine, "sleep", "60")
        until(is_in(runs, JobState.RUNNING))
        first, second = (submit(engine, "true") for _ in range(2))
        second.set_priority(-1)
        runs.cancel()
        for job in (first, second):
            job.wait(WAIT_S)
    assert _begun(second) < _begun(first)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"queue": "nowhere"}, "queue"),
        ({"after": ["x"]}, "after[0]"),
        ({"after": [999_999]}, "after"),
        ({"restart": "always"}, "restart"),
        ({"cpus": 0}, "cpus"),
        ({"estimate": "soon"}, "estimate"),
        ({"outputs": ["data"]}, "outputs[0]"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_a_bad_request_is_refused_and_stores_nothing(
    engine: Engine, queue: str, options: dict[str, object], field: str
) -> None:
    with pytest.raises((InvalidArgument, NotFound)) as caught:
        submit(engine, "true", **options)
    assert field in str(caught.value)
    assert engine.jobs.list(all=True) == []


def test_two_queues_share_the_cores_by_weight_and_cap(
    engine: Engine, queue: str, scratch: Path
) -> None:
    with engine.jobs.dispatching(cores=3):
        engine.queues.create("small", cpus=1)
        queues = ("small", queue)
        jobs = [submit_held_back(engine, scratch, queue=q) for q in queues for _ in "abc"]
        until(run_at_once(jobs, 3))
        let_go(scratch)
        ended = [job.wait(WAIT_S) for job in jobs]
    engine.queues.remove("small")
    assert most_at_once([r for r in ended if r.queue == "small"]) == 1
    assert most_at_once(ended) == 3


def test_a_policy_that_plans_the_whole_machine_is_refused_beside_others(
    engine: Engine, queue: str
) -> None:
    with pytest.raises(InvalidArgument, match="conservative"):
        engine.queues.create("planned", policy="conservative")
    assert [record.name for record in engine.queues.list()] == ["default"]


def test_run_times_are_foretold_from_what_ran_before(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        first = submit(engine, "sleep", "0.3").wait(WAIT_S)
        second = submit(engine, "sleep", "0.3").wait(WAIT_S)
    assert first.predicted_s == 0
    assert second.predicted_s == pytest.approx(first.ran_ns / 1e9)


def test_what_ran_is_a_workload_for_the_simulator(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching(cores=1):
        ended = [submit(engine, "sleep", "0.1", priority=i).wait(WAIT_S) for i in range(2)]
    trace = list(engine.jobs.history())
    assert [(job.id, job.priority, job.runtime) for job in trace] == [
        (record.id, record.priority, record.ran_ns / 1e9) for record in ended
    ]
    assert trace[0].submit == 0
    assert list(engine.jobs.history(["default"])) == trace
    with pytest.raises(NotFound, match="no such queue: nowhere"):
        engine.jobs.history(["default", "nowhere"])


def test_an_image_that_a_job_needs_is_not_removed(engine: Engine, queue: str) -> None:
    with engine.jobs.dispatching():
        held = submit(engine, "true", hold=True)
        with pytest.raises(Busy, match=f"job {held.id}"):
            engine.images.remove("busybox")


def test_a_job_that_takes_too_much_memory_hurts_itself_alone(engine: Engine, queue: str) -> None:
    kept = engine.start("busybox", ["sleep", "1000"], name="kept", network="none")
    with engine.jobs.dispatching():
        hog = submit(
            engine,
            *("sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=100"),
            memory="30M",
            shm_size="200M",
        )
        beside = submit(engine, "true", memory="30M")
        ended = hog.wait(WAIT_S)
        assert beside.wait(WAIT_S).state == JobState.COMPLETED
    assert (ended.state, ended.oom_killed) == (JobState.FAILED, True)
    assert kept.exec(["true"]).exit_code == 0
    kept.remove(force=True)
