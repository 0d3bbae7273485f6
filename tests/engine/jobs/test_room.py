"""Jobs and plain instances share one ledger; a preempted job leaves what it does not need."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.engine.jobs.records import JobState
from hutch.resources.admission import NoRoom
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

MIB = 1 << 20


@pytest.fixture
def given(engine: Engine) -> Iterator[Engine]:
    """An engine that gives 192 MiB out, under a group of its own."""
    parent = f"hutch-test-{os.getpid()}-{time.monotonic_ns()}"
    engine.resources.configure({"parent": parent, "memory": "192M"})
    with engine.jobs.dispatching():
        use_policy(engine, "fcfs")
    groups = engine._context.groups.hierarchy.parent
    yield engine
    cancel_all(engine)
    for info in engine.list(all=True):
        engine.get(info.name).remove(force=True)
    (engine.root / "resources.json").unlink()
    for path in groups.values():
        if Path(path).is_dir():
            os.rmdir(path)


def test_a_job_waits_for_what_an_instance_holds_and_says_so(given: Engine) -> None:
    web = given.start("busybox", ["sleep", "1000"], name="web", memory="150M", network="none")
    with given.jobs.dispatching():
        wide, narrow = submit(given, "true", memory="100M"), submit(given, "true", memory="20M")
        assert narrow.wait(WAIT_S).state == JobState.COMPLETED
        until(lambda: wide.info().reason)
        assert wide.info().state == JobState.PENDING
        assert "held by web" in wide.info().reason
        web.remove(force=True)
        assert wide.wait(WAIT_S).state == JobState.COMPLETED
    assert wide.info().attempt == 1


def test_an_instance_is_refused_what_a_job_holds(given: Engine) -> None:
    with given.jobs.dispatching():
        job = submit(given, "sleep", "1000", memory="150M")
        until(is_in(job, JobState.RUNNING))
        with pytest.raises(NoRoom, match=f"held by job-{job.id}"):
            given.run("busybox", ["true"], memory="100M", network="none")
        assert {h.name: h.memory for h in given.resources.use().holdings} == {
            f"job-{job.id}": 150 * MIB
        }
        job.cancel()
        job.wait(WAIT_S)
        until(lambda: not given.resources.use().holdings)


@requires("two-cpus")  # one is always shared
def test_processors_of_ones_own_are_waited_for(engine: Engine) -> None:
    count = len(engine.resources.inventory().cpus) - 1
    with engine.jobs.dispatching(cores=4 * count):
        use_policy(engine, "fcfs")
        jobs = [
            submit(engine, "sleep", "0.3", cpus=count, placement="cpus=exclusive") for _ in range(3)
        ]
        shares = submit(engine, "sleep", "0.3")
        ended = [job.wait(WAIT_S) for job in jobs]
        assert shares.wait(WAIT_S).state == JobState.COMPLETED
    assert [record.state for record in ended] == [JobState.COMPLETED] * 3
    assert most_at_once(ended) == 1
    cancel_all(engine)


def test_overcommitted_processors_are_given_out_to_jobs(given: Engine, scratch: Path) -> None:
    cpus = len(given.resources.inventory().cpus)
    given.resources.configure({"overcommit.cpus": "2"})
    with given.jobs.dispatching():
        jobs = [submit_held_back(given, scratch, cpus=cpus) for _ in range(3)]
        until(run_at_once(jobs, 2))
        let_go(scratch)
        ended = [job.wait(WAIT_S) for job in jobs]
    assert most_at_once(ended) == 2


def test_a_preempted_job_leaves_its_processors_and_takes_them_again(
    given: Engine, scratch: Path
) -> None:
    cpus = len(given.resources.inventory().cpus)
    given.resources.configure({"overcommit.cpus": str(1 / cpus)})
    with given.jobs.dispatching():
        use_policy(given, "priority-preemptive")
        low = submit_held_back(given, scratch, priority=5, memory="20M")
        until(is_in(low, JobState.RUNNING))
        high = submit(given, "sleep", "60", priority=1, memory="20M")
        until(is_in(high, JobState.RUNNING))
        held = {h.name: h for h in given.resources.use().holdings}
        assert low.info().state == JobState.PREEMPTED
        assert held[f"job-{low.id}"].cpus == 0 and held[f"job-{high.id}"].cpus == 1
        assert 0 < held[f"job-{low.id}"].memory < 20 * MIB
        high.cancel()
        let_go(scratch)
        assert low.wait(WAIT_S).state == JobState.COMPLETED
        assert low.info().preemptions == 1


def _writes(mib: int, where: str) -> tuple[str, str, str]:
    wait = "while [ ! -e /go ]; do usleep 20000; done"
    return ("sh", "-c", f"dd if=/dev/zero of={where} bs=1M count={mib} && sync; : >/done; {wait}")


def test_memory_of_a_preempted_job_is_taken_back_when_another_needs_it(given: Engine) -> None:
    with given.jobs.dispatching(cores=1):
        use_policy(given, "priority-preemptive")
        low = submit(given, *_writes(100, "/file"), priority=5, memory="150M")
        until(is_in(low, JobState.RUNNING))
        until(lambda: given.get(f"job-{low.id}").files.exists("/done"))
        high = submit(given, "true", priority=1, memory="150M")
        assert high.wait(WAIT_S).state == JobState.COMPLETED
        until(is_in(low, JobState.RUNNING))
        given.get(f"job-{low.id}").files.write("/go", b"")
        ended = low.wait(WAIT_S)
    assert ended.state == JobState.COMPLETED
    assert ended.slices[0].then == "reclaimed" and ended.slices[0].given > 60 * MIB
    assert ended.slices[-1].then == ""


@requires("no-swap")  # what a container has would go there
def test_where_memory_cannot_be_taken_back_the_other_waits(given: Engine) -> None:
    with given.jobs.dispatching(cores=1):
        use_policy(given, "priority-preemptive")
        command = _writes(100, "/dev/shm/x")
        low = submit(given, *command, priority=5, memory="150M", shm_size="128M")
        until(is_in(low, JobState.RUNNING))
        until(lambda: given.get(f"job-{low.id}").files.exists("/done"))
        high = submit(given, "true", priority=1, memory="150M")
        until(lambda: high.info().reason)
        assert f"held by job {low.id}" in high.info().reason
        until(is_in(low, JobState.RUNNING))
        given.get(f"job-{low.id}").files.write("/go", b"")
        first, second = low.wait(WAIT_S), high.wait(WAIT_S)
    assert (first.state, second.state) == (JobState.COMPLETED, JobState.COMPLETED)
    assert second.started_ns >= first.finished_ns
