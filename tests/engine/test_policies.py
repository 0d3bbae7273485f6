"""What goes on by itself: restarts, health checks, rotation of logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hutch.engine import Engine, Instance, stop
from hutch.engine.context import Context
from hutch.lifecycle import State
from tests.requires import requires

pytestmark = requires("root", "cgroup", "overlayfs", "seccomp", "busybox")

DEADLINE_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def start(engine: Engine, script: str, **options: object) -> Instance:
    options.setdefault("network", "none")
    return engine.start("busybox", ["sh", "-c", script], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["always", "unless-stopped"])
def test_a_program_is_started_again_until_somebody_stops_it(engine: Engine, policy: str) -> None:
    with start(engine, "exit 4", restart=policy) as box:
        until(lambda: box.info().restart_count >= 2, "not started again")
        box.stop(timeout=0)
        count = box.info().restart_count
        assert box.info().state == State.EXITED
        # The longest pause between its restarts so far, and more.
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            assert box.info().state == State.EXITED
            time.sleep(0.05)
        assert box.info().restart_count == count


def test_on_failure_counts(engine: Engine) -> None:
    with start(engine, "exit 3", restart="on-failure:2") as box:
        until(lambda: box.info().restart_count == 2, "not started twice")
        until(lambda: box.info().state == State.EXITED, "still going")
        assert box.info().exit_code == 3
        wanted: dict[str, list[str]] = {"container": [box.id], "event": ["die"]}
        assert len(list(engine.events(since=0, follow=False, filters=wanted))) == 3


def test_on_failure_leaves_success_alone(engine: Engine) -> None:
    with start(engine, "exit 0", restart="on-failure") as box:
        assert box.wait(timeout=DEADLINE_S) == 0
        until(lambda: box.info().state == State.EXITED, "still going")
        assert box.info().restart_count == 0


def test_health_follows_the_check(engine: Engine) -> None:
    with start(
        engine,
        "sleep 1000",
        health_cmd="test -e /healthy",
        health_interval="50ms",
        health_retries=2,
    ) as box:

        def status() -> str:
            health = box.info().health
            return health.status if health else "none"

        until(lambda: status() == "unhealthy", "not found unhealthy")
        box.exec(["touch", "/healthy"])
        until(lambda: status() == "healthy", "not found healthy")
        health = box.info().health
        assert health is not None and health.failing_streak == 0
        assert 1 <= len(health.log) <= 5


def test_logs_are_rotated_and_read_as_one(engine: Engine) -> None:
    script = "for i in $(seq 400); do echo line $i; done; touch /done; sleep 1000"
    options = {"max-size": "2k", "max-file": "2"}
    with start(engine, script, log_opts=options) as box:
        until(lambda: box.files.exists("/done"), "not written")
        until(lambda: [r.data for r in box.logs(tail=1)] == [b"line 400\n"], "not logged")
        directory = Path(engine.root) / "instances" / box.id
        files = sorted(path.name for path in directory.glob("log*"))
        assert files == ["log", "log.1"]
        assert all((directory / name).stat().st_size <= 4096 for name in files)
        lines = [record.data for record in box.logs()]
        first = int(lines[0].split()[1])
        assert first > 1 and lines == [b"line %d\n" % i for i in range(first, 401)]


@pytest.mark.skipif(not Path("/sys/fs/cgroup/memory").is_dir(), reason="needs cgroup v1")
def test_limits_are_changed_in_the_kernel(engine: Engine) -> None:
    with start(engine, "sleep 1000", memory="32m") as box:
        box.update(memory="48m", memory_swap="64m", cpus=0.25, pids_limit=9)

        def inside(path: str) -> str:
            return box.exec(["cat", f"/sys/fs/cgroup/{path}"]).text.strip()

        assert inside("memory/memory.limit_in_bytes") == str(48 << 20)
        assert inside("cpu/cpu.cfs_quota_us") == "25000"
        assert inside("pids/pids.max") == "9"


@pytest.mark.skipif(not Path("/sys/fs/cgroup/blkio").is_dir(), reason="needs cgroup v1")
@pytest.mark.parametrize("later", [["{}:0"], []], ids=["by zero", "by its absence"])
def test_a_rate_of_a_device_is_lifted_while_it_runs(engine: Engine, later: list[str]) -> None:
    nodes = (Path("/dev", entry.name) for entry in sorted(Path("/sys/block").iterdir()))
    device = next(node for node in nodes if node.is_block_device())
    with start(engine, "sleep 1000", device_write_bps=[f"{device}:1mb"]) as box:

        def limits() -> str:
            shown = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device"
            return box.exec(["cat", shown]).text.strip()

        assert limits().endswith(f" {1 << 20}")
        box.update(device_write_bps=[one.format(device) for one in later])
        assert limits() == ""


def test_a_hundred_programs_at_once_in_one_instance(engine: Engine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with start(engine, "sleep 1000") as box, ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda n: box.exec(["sh", "-c", f"exit {n % 100}"]).exit_code, range(100))
        assert list(found) == list(range(100))


def test_one_that_is_started_again_meanwhile_is_removed_by_force(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = start(engine, "sleep 1000")
    killed: list[str] = []

    def kill_and_start_again(context: Context, identifier: str) -> None:
        kill(context, identifier)
        if not killed:
            box.start()
        killed.append(identifier)

    kill = stop.kill
    monkeypatch.setattr(stop, "kill", kill_and_start_again)
    box.remove(force=True)
    assert len(killed) == 2
    assert engine.list(all=True) == []
