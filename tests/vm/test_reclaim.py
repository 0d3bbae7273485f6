"""Memory taken back from virtual machines, and given back: balloon and suspension."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.lifecycle import State
from hutch.resources.admission import NoRoom
from tests.requires import requires

pytestmark = [pytest.mark.integration, requires("root", "qemu", "busybox", "apt-mirror")]

MIB = 1 << 20
# As if all of the host's memory were short.
SHORT = {"watermarks.low": "0.998", "watermarks.high": "0.999", "watermarks.critical": "0"}
ROOM = {"watermarks.low": "none", "watermarks.high": "none", "watermarks.critical": "none"}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 200.0
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def guest(engine: Engine) -> int:
    return engine.resources.memory().instances[0].guest


def test_an_idle_machine_gives_by_its_balloon_then_by_going_to_disk(machines: Engine) -> None:
    resources = machines.resources
    options: dict[str, object] = {"isolation": "vm", "memory": "256M", "network": "none"}
    with machines.start("busybox", ["sleep", "1000"], name="idle", **options) as box:  # type: ignore[arg-type]
        try:
            resources.configure({"ladder": "balloon", **SHORT})
            assert guest(machines) == 256 * MIB
            done = resources.reclaim()
            assert [(s.rung, s.name, s.error) for s in done.steps] == [("balloon", "idle", "")]
            until(lambda: guest(machines) < 200 * MIB, "the balloon did not grow")
            assert box.exec(["true"]).exit_code == 0
            resources.configure({**ROOM, "ladder": "none"})
            assert [(s.rung, s.undone) for s in resources.reclaim().steps] == [("balloon", True)]
            until(lambda: guest(machines) == 256 * MIB, "the balloon did not shrink")

            resources.configure({"ladder": "suspend", "idle_s": "0", **SHORT})
            resources.memory()
            done = resources.reclaim()
            assert [(s.rung, s.name, s.error) for s in done.steps] == [("suspend", "idle", "")]
            assert box.info().state == State.SUSPENDED and done.steps[0].given > 20 * MIB
            resources.configure(ROOM)
            assert [(s.rung, s.error) for s in resources.reclaim().steps] == [("suspend", "")]
            assert box.info().state == State.RUNNING
            assert box.exec(["true"]).exit_code == 0
        finally:
            (machines.root / "resources.json").unlink()


def test_a_machine_keeps_what_it_was_promised(machines: Engine) -> None:
    options: dict[str, object] = {"isolation": "vm", "memory": "256M", "network": "none"}
    with machines.start("busybox", ["sleep", "9"], memory_reservation="256M", **options):  # type: ignore[arg-type]
        try:
            machines.resources.configure({"ladder": "balloon,suspend,kill", "idle_s": "0", **SHORT})
            machines.resources.memory()
            assert machines.resources.reclaim().steps == ()
        finally:
            (machines.root / "resources.json").unlink()


def test_three_times_the_memory_for_idle_machines(machines: Engine) -> None:
    parent = f"hutch-test-{os.getpid()}-{time.monotonic_ns()}"
    settings = {"parent": parent, "memory": "640M", "overcommit.memory": "3", "ladder": "balloon"}
    marks = {"watermarks.low": "0.9", "watermarks.high": "0.95", "watermarks.critical": "0"}
    options: dict[str, object] = {"isolation": "vm", "memory": "512M", "network": "none"}
    machines.resources.configure({**settings, **marks})
    boxes = []
    try:
        for number in range(3):
            name = f"idle{number}"
            boxes.append(machines.start("busybox", ["sleep", "1000"], name=name, **options))  # type: ignore[arg-type]
        with pytest.raises(NoRoom, match=r"held by idle0, idle1 and idle2"):
            machines.start("busybox", ["true"], **options)  # type: ignore[arg-type]
        done = machines.resources.reclaim()
        assert {(s.rung, s.error) for s in done.steps} == {("balloon", "")}
        assert sum(use.usage for use in done.after.instances) < 640 * MIB
        # Nobody was hurt: a guest with a full balloon does its work.
        script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=16 2>/dev/null; wc -c < /dev/shm/x"
        assert [box.exec(["sh", "-c", script]).text.strip() for box in boxes] == ["16777216"] * 3
        machines.resources.configure(dict.fromkeys(marks, "none"))
        assert all(step.undone and not step.error for step in machines.resources.reclaim().steps)
    finally:
        for box in boxes:
            box.remove(force=True)
        directories = set(machines._context.groups.hierarchy.parent.values())
        (machines.root / "resources.json").unlink()
        for path in directories:
            if Path(path).is_dir():
                os.rmdir(path)
