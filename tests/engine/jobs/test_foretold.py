"""What the simulator says of a workload is what the dispatcher does with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from hutch.engine import Engine
from hutch.engine.jobs.facade import Job
from hutch.engine.jobs.records import JobRecord, JobState
from hutch.sched import Capacity, SimJob, create, simulate
from hutch.sched.estimators import create_estimator
from tests.engine.jobs.queues import WAIT_S, cancel_all, submit, until, use_policy
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox")]

_REPOSITORY = Path(__file__).parents[3]
# Estimate and priority; far apart, so that nobody's running changes who is before whom. The
# last goes before all others by both.
_ASKED = [(4000, 5), (900, 7), (2500, 2), (400, 9), (1600, 1), (100, 0)]


class Order:
    """Hears from the simulator who ran."""

    def __init__(self) -> None:
        self.ran: list[tuple[float, int]] = []

    def slice(self, job: SimJob, began: float, ended: float) -> None:
        self.ran.append((began, int(job.id)))

    def done(self, jobs: list[SimJob]) -> None:
        pass


@pytest.fixture
def queue(engine: Engine) -> Iterator[Engine]:
    yield engine
    cancel_all(engine)
    engine.queues.update("default", predictor="average")


@pytest.mark.parametrize("policy", ["fcfs", "sjf", "srtf", "priority-preemptive", "hrrn"])
def test_the_live_order_is_the_simulated_one(queue: Engine, scratch: Path, policy: str) -> None:
    script = "while [ ! -e /s/$HUTCH_JOB_ID ]; do usleep 10000; done"
    with queue.jobs.dispatching(cores=1):
        use_policy(queue, policy, predictor="user")
        jobs: list[Job] = []
        for estimate, priority in _ASKED:
            jobs.append(
                submit(
                    queue, "sh", "-c", script, estimate=estimate, priority=priority,
                    volumes=[f"{scratch}:/s"],
                )
            )  # fmt: skip
            jobs[-1].set_priority(priority)  # who is answered has been decided upon
            until(lambda: _is_settled(jobs))
        while left := [job for job in jobs if not job.info().state.is_final]:
            (runs,) = [job for job in left if job.info().state == JobState.RUNNING]
            (scratch / str(runs.id)).touch()
            runs.wait(WAIT_S)
            until(lambda: _is_settled(jobs))
    ended = [job.info() for job in jobs]
    # In a simulation nothing takes time to start. With a minute more for each nobody ends there
    # before one has come that came before that end; estimates are further apart than that.
    trace = [msgspec.structs.replace(job, runtime=job.runtime + 60) for job in queue.jobs.history()]
    seen = Order()
    estimator = create_estimator("user")
    simulate(iter(trace), create(policy, Capacity(cores=1)), estimator=estimator, observer=seen)
    assert _live(ended) == _simulated(seen)
    if policy in ("srtf", "priority-preemptive"):
        assert any(record.preemptions for record in ended)


def _is_settled(jobs: Sequence[Job]) -> bool:
    """Whether what was decided is done: one runs, or all are over."""
    states = [job.info().state for job in jobs]
    over = all(state.is_final for state in states)
    return JobState.STARTING not in states and (over or states.count(JobState.RUNNING) == 1)


def _live(records: Sequence[JobRecord]) -> list[int]:
    slices = sorted((piece.begin, record.id) for record in records for piece in record.slices)
    return [number for _, number in slices]


def _simulated(seen: Order) -> list[int]:
    return [number for _, number in sorted(seen.ran)]


def test_the_tutorials_live_part_runs_as_it_stands(tmp_path: Path) -> None:
    page = (_REPOSITORY / "docs/tutorial/compare-policies.md").read_text()
    part = page[page.index("## Run the winner") :]
    (jobs,) = re.findall(r"```yaml\n(.*?)```", part, re.S)
    commands = re.findall(r"```sh\n(.*?)```", part, re.S)
    (tmp_path / "jobs.yaml").write_text(jobs)
    environment = {
        **os.environ,
        "HUTCH_ROOT": str(tmp_path / "root"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    try:
        done = subprocess.run(
            ["sh", "-e", "-c", "\n".join(commands)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert "srtf" in done.stdout and "rr:quantum=0.5" in done.stdout
        with Engine(tmp_path / "root") as engine:
            ended = engine.jobs.list(all=True)
        assert [record.state for record in ended] == [JobState.COMPLETED] * 4
    finally:
        with Engine(tmp_path / "root") as engine:
            cancel_all(engine)
            engine._context.networks.teardown()
