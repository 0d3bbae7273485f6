"""Jobs and queues from the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import wait_until
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox"), pytest.mark.integration]


@pytest.fixture
def jobs(cli: Any, name: str) -> Iterator[Any]:
    """The command line, and a queue of the test's name. The dispatcher in the background makes
    room at the end."""
    cli.out("queue", "create", name, "--policy", "sjf", "--suspend-after", "90s")
    yield cli
    cli.out("job", "cancel", "--queue", name)
    cli.out("queue", "run", "--idle", "0.01s")
    cli.out("queue", "rm", name)


def submit(cli: Any, queue: str, *args: str) -> list[str]:
    options = ("--queue", queue, "--network", "none")
    return str(cli.out("job", "submit", *options, *args)).split()


def test_a_job_is_submitted_waited_for_and_shown(jobs: Any, name: str) -> None:
    (number,) = submit(jobs, name, "--estimate", "2s", "busybox", "sh", "-c", "echo hi; exit 3")
    done = jobs("job", "wait", number)
    assert (done.returncode, done.stdout.decode()) == (3, f"{number} failed 3\n")
    assert jobs.out("job", "logs", number) == "hi\n"
    (shown,) = json.loads(jobs.out("job", "show", number))
    assert (shown["State"], shown["ExitCode"], shown["Predicted"]) == ("failed", 3, 2.0)
    assert shown["Why"].startswith("it is failed") and shown["PredictionError"] is None
    assert [set(piece) for piece in shown["Slices"]] == [{"Begin", "End"}]
    (well,) = submit(jobs, name, "--estimate", "100s", "--wait", "busybox", "true")
    (shown,) = json.loads(jobs.out("job", "show", well))
    assert 0 < shown["PredictionError"] < 100
    (queue,) = json.loads(jobs.out("queue", "show", name))
    assert (queue["Policy"], queue["SuspendAfter"]) == ("sjf", 90.0)
    assert (queue["Weight"], queue["Cpus"]) == (1, "all")
    assert queue["Estimates"]["Jobs"] == 1 and queue["Estimates"]["Bias"] > 0
    assert queue["Estimates"]["Keys"][0]["Command"] == ["true"]


def test_who_waits_hears_of_a_time_limit_and_not_of_what_it_ended(jobs: Any, name: str) -> None:
    script = "trap 'exit 7' TERM; while :; do usleep 20000; done"
    (late,) = submit(jobs, name, "--timeout", "4s", "busybox", "sh", "-c", script)
    assert jobs("job", "wait", late).returncode == 124
    (shown,) = json.loads(jobs.out("job", "show", late))
    assert (shown["State"], shown["ExitCode"]) == ("timeout", 7)
    assert shown["Why"] == "it ran out of time"


def test_the_log_of_a_job_that_never_began_says_why(jobs: Any, name: str) -> None:
    (number,) = submit(jobs, name, "busybox", "no-such-program")
    assert jobs("job", "wait", number).returncode == 127
    done = jobs("job", "logs", number)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"wrote nothing: " in done.stderr and b"no-such-program" in done.stderr


def test_the_daemon_dispatches_too(jobs: Any, name: str, tmp_path: Path) -> None:
    jobs.out("queue", "run", "--idle", "0.01s")  # nobody else does
    daemon = jobs.spawn("serve", "--docker", f"unix://{tmp_path}/socket", "--jobs")
    try:
        fifo = jobs.root / "locks" / "dispatch.fifo"
        wait_until(lambda: is_read(fifo))
        (number,) = submit(jobs, name, "busybox", "true")
        assert jobs("job", "wait", number).returncode == 0
        assert jobs("queue", "run").returncode != 0  # it makes no room
    finally:
        daemon.terminate()
        daemon.communicate(timeout=60)
    assert daemon.returncode == 0


def is_read(fifo: Path) -> bool:
    """Whether somebody holds the reading end of a pipe."""
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_jobs_say_why_they_wait_and_are_cancelled_together(jobs: Any, name: str) -> None:
    numbers = submit(jobs, name, "--array", "0-2", "--hold", "busybox", "true")
    assert "it is held" in jobs.out("job", "why", numbers[0])
    assert jobs.out("job", "release", "--array", numbers[0]) == "3\n"
    assert jobs("job", "wait", *numbers).returncode == 0
    (held,) = submit(jobs, name, "--hold", "busybox", "true")
    (after,) = submit(jobs, name, "--after", held, "busybox", "true")
    (answer,) = json.loads(jobs.out("job", "why", after, "-o", "json"))
    assert (answer["cause"], answer["job"]) == ("dependencies", int(after))
    listed = json.loads(jobs.out("job", "ls", "-n", "1", "--queue", name, "-o", "json"))
    assert [row["ID"] for row in listed] == [int(after)]
    assert jobs.out("job", "cancel", "--queue", name) == "2\n"
    assert jobs("job", "wait", held).returncode == 130
    for wrong in (("job", "cancel"), ("job", "hold", "1", "--all"), ("job", "why", "x")):
        assert jobs(*wrong).returncode == 1
