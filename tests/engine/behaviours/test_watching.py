"""What can be seen of a running instance: processes, figures, health."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.engine import Instance
from tests.engine.behaviours.conftest import Maker, Sh
from tests.engine.behaviours.differences import DIFFERENCES
from tests.engine.behaviours.waiting import until


def test_top_lists_the_programs_with_their_users(box: Instance) -> None:
    with box.exec_stream(["sleep", "3210"], user="4242") as session:
        table = box.top()
        column = table.titles.index("CMD")
        commands = [row[column] for row in table.rows]
        assert any("sleep 1000" in command for command in commands)
        row = next(row for row in table.rows if row[column] == "sleep 3210")
        assert row[table.titles.index("UID")] == "4242"
        session.signal(9)


def test_top_takes_the_arguments_of_ps(box: Instance) -> None:
    table = box.top(["-eo", "pid,comm"])
    assert "sleep" in [row[1] for row in table.rows]


def test_the_host_sees_the_programs_of_an_instance(box: Instance) -> None:
    with open(f"/proc/{box.info().pid}/cmdline", "rb") as file:
        assert file.read() == b"sleep\0001000\0"


def test_figures_tell_of_memory_processes_and_work(box: Instance, inside: Sh) -> None:
    before = box.stats()
    inside("i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done")
    after = box.stats()
    assert after.cpu.total_ns > before.cpu.total_ns
    assert after.memory.usage > 0
    assert after.pids.current >= 1


def test_figures_go_on_until_it_ends(make: Maker) -> None:
    with make.start() as one:
        readings = one.stats_stream(interval=0.05)
        assert next(readings).pids.current >= 1
        one.kill()
        assert list(readings) == []


def test_health_follows_the_check(make: Maker) -> None:
    with make.start(
        health_cmd="test -e /healthy", health_interval="200ms", health_retries=2
    ) as one:

        def status() -> str:
            health = one.info().health
            return health.status if health else "none"

        until(lambda: status() == "unhealthy", "not found unhealthy")
        one.exec(["touch", "/healthy"])
        until(lambda: status() == "healthy", "not found healthy")


def test_a_description_says_what_it_is(box: Instance, kind: str) -> None:
    info = box.info()
    assert info.spec.isolation == kind
    assert info.image.endswith("busybox:latest") or info.image == "busybox"
    assert info.command[:2] == ("sh", "-c")
    assert os.path.exists(f"/proc/{info.pid}")


@pytest.mark.parametrize(("kind_of", "behaviour"), sorted(DIFFERENCES))
def test_every_difference_is_a_behaviour(kind_of: str, behaviour: str) -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert kind_of in ("container", "vm") and f"def {behaviour}(" in text
