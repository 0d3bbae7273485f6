"""Virtual machines as jobs: one that waits long is written to disk, and goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.engine.jobs.records import JobState
from hutch.lifecycle import State
from tests.engine.jobs.queues import cancel_all, is_in, until, use_policy
from tests.requires import requires

pytestmark = [
    requires("root", "qemu", "apt-mirror", "busybox", "cgroup", "netns", "erofs", "mke2fs"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]

_WAIT_S = 300.0


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Engine]:
    with Engine(tmp_path / "root") as engine:
        engine.images.bootstrap("busybox")
        yield engine
        cancel_all(engine)
        engine._context.machines.prune_templates()
        engine._context.networks.teardown()


def test_a_preempted_machine_is_suspended_and_goes_on(machines: Engine) -> None:
    with machines.jobs.dispatching(cores=1):
        use_policy(machines, "priority-preemptive", suspend_after=0.05)
        low = machines.jobs.submit(
            "busybox",
            ["sh", "-c", "echo begun; while [ ! -e /go ]; do sleep 0.2; done; echo ended"],
            isolation="vm",
            memory="192M",
            priority=5,
            network="none",
        )
        until(is_in(low, JobState.RUNNING), _WAIT_S)
        assert low.info().memory > 192 << 20  # with what QEMU takes
        until(lambda: b"begun" in low.output(), _WAIT_S)
        high = machines.jobs.submit("busybox", ["sleep", "1000"], network="none", stop_timeout=0)
        until(lambda: low.info().slices and low.info().slices[-1].then == "suspended", _WAIT_S)
        assert machines.get(f"job-{low.id}").info().state == State.SUSPENDED
        assert high.info().state == JobState.RUNNING
        high.cancel()
        until(is_in(low, JobState.RUNNING), _WAIT_S)
        machines.get(f"job-{low.id}").files.write("/go", b"")
        ended = low.wait(_WAIT_S)
    assert (ended.state, ended.attempt, ended.preemptions) == (JobState.COMPLETED, 1, 1)
    assert low.output() == b"begun\nended\n"
    assert ended.slices[0].given > 32 << 20
