"""Why a job waits, how good the estimates are, and what is asked of many jobs at once."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from hutch.engine import Engine
from hutch.engine.jobs import accuracy
from hutch.engine.jobs.records import JobRecord, JobState
from hutch.errors import NotFound
from tests.engine.jobs.queues import WAIT_S, cancel_all, is_in, submit, until, use_policy
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox")]


@pytest.fixture
def jobs(engine: Engine) -> Iterator[Engine]:
    with engine.jobs.dispatching():
        use_policy(engine, "fcfs", predictor="average")
    yield engine
    cancel_all(engine)


def test_every_cause_is_told(jobs: Engine) -> None:
    with jobs.jobs.dispatching(cores=2):
        held = submit(jobs, "true", hold=True)
        runs = submit(jobs, "sleep", "1000", cpus=1.5)
        until(is_in(runs, JobState.RUNNING))
        wide = submit(jobs, "true", cpus=2)
        narrow = submit(jobs, "true", cpus=0.5)
        after = submit(jobs, "true", after=[runs.id])
        until(lambda: narrow.why().ahead == 1)
        assert held.why().cause == "held" and "job release" in held.why().text
        assert runs.why().cause == "runs"
        assert after.why().cause == "dependencies" and f"job {runs.id} (ok)" in after.why().text
        waits = wide.why()
        assert waits.cause == "no room" and waits.decision is not None
        (shortage,) = waits.decision.shortages
        assert (shortage.resource, shortage.needed, shortage.free) == ("cpus", 2, 0.5)
        assert [h.name for h in shortage.held] == [f"job {runs.id}"]
        assert f"job {runs.id} ends" in shortage.cures
        behind = narrow.why()
        assert behind.cause == "turn" and "fcfs" in behind.text and behind.decision is not None
        assert behind.decision.fits
        jobs.queues.pause("default")
        assert narrow.why().cause == "paused queue"
        jobs.queues.resume("default")
        runs.cancel()
        assert wide.wait(WAIT_S).state == JobState.COMPLETED
        assert wide.why().cause == "over"


def test_a_job_that_can_never_run_is_held_and_told_what_helps(jobs: Engine) -> None:
    with jobs.jobs.dispatching(cores=2, memory=1 << 30):
        job = submit(jobs, "true", memory="900G")
        until(is_in(job, JobState.HELD))
        assert f"job {job.id} needs 900GiB, there are 1GiB" in job.info().reason
        assert "with less" in job.why().text and "when there is more" in job.why().text


def test_an_instance_that_is_in_the_way_is_named(jobs: Engine) -> None:
    cpus = len(jobs.resources.inventory().cpus)
    jobs.resources.configure({"overcommit.cpus": "1"})
    web = jobs.start("busybox", ["sleep", "1000"], name="web", cpus=cpus, network="none")
    try:
        with jobs.jobs.dispatching():
            job = submit(jobs, "true")
            until(lambda: "web" in job.why().text)
            answer = job.why()
            assert answer.cause == "no room" and answer.decision is not None
            assert answer.decision.shortages[0].held[0].name == "web"
            until(lambda: job.info().reason)
            job.hold()
            assert job.why().text == f"it is held: `hutch job release {job.id}`"
            job.release()
            web.remove(force=True)
            assert job.wait(WAIT_S).state == JobState.COMPLETED
    finally:
        (jobs.root / "resources.json").unlink()
        if any(info.name == "web" for info in jobs.list(all=True)):
            web.remove(force=True)


def test_all_jobs_of_a_queue_are_held_released_and_cancelled_at_once(jobs: Engine) -> None:
    with jobs.jobs.dispatching(cores=1):
        jobs.queues.create("other")
        runs = submit(jobs, "sleep", "1000")
        until(is_in(runs, JobState.RUNNING))
        array = jobs.jobs.submit_array("busybox", ["true"], array=5, network="none")
        other = submit(jobs, "true", queue="other", hold=True)
        assert jobs.jobs.hold(array=array[0].id) == 5
        assert jobs.jobs.counts()["default", JobState.HELD] == 5
        assert jobs.jobs.release(queue="default") == 5
        assert jobs.jobs.cancel(queue="default") == 6
        assert {job.wait(WAIT_S).state for job in [*array, runs]} == {JobState.CANCELLED}
        assert other.info().state == JobState.HELD
        assert jobs.jobs.cancel(owner="nobody") == 0
        assert jobs.jobs.cancel() == 1
    jobs.queues.remove("other")


def test_the_error_of_estimates_is_measured_by_key(jobs: Engine) -> None:
    with jobs.jobs.dispatching():
        for _ in range(3):
            submit(jobs, "sleep", "0.1").wait(WAIT_S)
        submit(jobs, "false").wait(WAIT_S)
    found = jobs.queues.accuracy("default")
    assert (found.jobs, found.unknown) == (2, 1)
    assert found.mean_absolute_s is not None and found.bias_s is not None
    assert found.mean_absolute_s >= abs(found.bias_s)
    (key,) = found.keys
    assert (key.image, key.command, key.jobs) == ("busybox", ("sleep", "0.1"), 2)
    with pytest.raises(NotFound):
        jobs.queues.accuracy("nowhere")


def test_errors_are_those_of_the_definition() -> None:
    def ended(predicted: float, ran: float, command: str) -> JobRecord:
        return JobRecord(
            id=1, name="x", queue="q", image="i", command=(command,), submitted_ns=0,
            state=JobState.COMPLETED, predicted_s=predicted, ran_ns=round(ran * 1e9),
        )  # fmt: skip

    records = [ended(2, 1, "a"), ended(1, 4, "a"), ended(3, 3, "b"), ended(0, 1, "c")]
    found = accuracy._measured(records, 1)
    assert (found.jobs, found.unknown) == (3, 1)
    assert found.mean_absolute_s == pytest.approx(4 / 3)
    assert found.bias_s == pytest.approx(-2 / 3)
    assert found.accuracy == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert [(k.command, k.jobs, k.bias_s) for k in found.keys] == [(("a",), 2, -1.0)]
    failed = msgspec.structs.replace(records[0], state=JobState.FAILED)
    assert accuracy.error_of(failed) is None
