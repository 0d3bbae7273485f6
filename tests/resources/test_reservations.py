"""Reservations on real instances: taken before anything is made, given back on every path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine, Instance
from hutch.engine.lookup import load
from hutch.errors import Busy, HutchError
from hutch.lifecycle import State
from hutch.process.records import read_stat
from hutch.resources.admission import NoRoom
from hutch.storage.diskimages import create_disk
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox"),
    pytest.mark.integration,
]

MIB = 1 << 20
DEADLINE_S = 60.0
TWO = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def start(engine: Engine, **options: object) -> Instance:
    options.setdefault("network", "none")
    return engine.start("busybox", ["sleep", "1000"], **options)  # type: ignore[arg-type]


def allowed(box: Instance) -> str:
    """Where a program in it may run, as the kernel has it."""
    text = box.exec(["grep", "Cpus_allowed_list", "/proc/1/status"]).text
    return text.split(":")[1].strip()


def held(engine: Engine) -> dict[str, int]:
    return {holding.name: holding.memory for holding in engine.resources.use().holdings}


def limit(engine: Engine, memory: str) -> None:
    engine.resources.configure({"memory": memory, "overcommit.memory": "1"})


# ---- disks ----------------------------------------------------------------------------------


@requires("qemu", "qemu-img")
def test_a_machine_from_a_disk_that_does_not_fit_is_not_made(
    engine: Engine, tmp_path: Path
) -> None:
    create_disk(str(tmp_path / "disk.raw"), MIB, format="raw")
    engine.resources.configure({"overcommit.disk": "1"})
    room = engine.resources.inventory().rooms[0].total
    options: dict[str, Any] = {"memory": "128M", "network": "none"}
    with engine.machines.create(
        tmp_path / "disk.raw", name="first", size="64M", **options
    ) as first:
        with pytest.raises(NoRoom, match=r"no room for second: disk: .*held by first"):
            engine.machines.create(tmp_path / "disk.raw", name="second", size=room, **options)
        assert [info.name for info in engine.list(all=True)] == ["first"]
        assert list(Path(engine.root, "instances").iterdir()) == [Path(first.info().directory)]
        held = engine.resources.use().holdings
        assert [(one.name, one.disk) for one in held] == [("first", 64 * MIB)]
        first.snapshot("rest")
        with engine.snapshots.restore("first/rest", name="twin"):
            pass
        engine.resources.configure({"reserved.disk": str(room - 100 * MIB)})
        with pytest.raises(NoRoom, match="no room for twin: disk: "):
            engine.snapshots.restore("first/rest", name="twin")
        assert [info.name for info in engine.list(all=True)] == ["first"]
        engine.snapshots.remove("first/rest")


# ---- memory ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_nothing_is_made(engine: Engine) -> None:
    limit(engine, "100M")
    with start(engine, name="first", memory="64M"):
        with pytest.raises(NoRoom) as caught:
            start(engine, name="second", memory="48M")
        assert caught.value.message == (
            "no room for second: memory: needs 48MiB; 36MiB free of 100MiB: 64MiB held by first"
        )
        assert caught.value.hint == "fits if first ends or --memory is at most 36MiB"
        assert [info.name for info in engine.list(all=True)] == ["first"]
        assert len(os.listdir(engine.root / "instances")) == 1
        decision = engine.resources.decide(memory="48M")
        assert not decision.fits and decision.shortages[0].free == 36 * MIB
        assert engine.resources.decide(memory="36M").fits
    assert engine.resources.decide(memory="100M").fits


def test_what_ran_before_anything_was_configured_counts(engine: Engine) -> None:
    with start(engine, name="early", memory="64M"):
        limit(engine, "100M")
        assert held(engine) == {"early": 64 * MIB}
        with pytest.raises(NoRoom):
            start(engine, memory="64M")


def test_a_stop_gives_back_and_a_start_takes_again(engine: Engine) -> None:
    limit(engine, "100M")
    with start(engine, name="first", memory="64M") as first:
        first.stop(timeout=0)
        with start(engine, name="second", memory="64M") as second:
            with pytest.raises(NoRoom):
                first.start()
            assert first.info().state == State.EXITED
            second.stop(timeout=0)
            first.start()
            assert held(engine) == {"first": 64 * MIB}


def test_an_exit_that_nobody_saw_gives_back(engine: Engine) -> None:
    limit(engine, "100M")
    options: dict[str, object] = {"network": "none", "memory": "64M"}
    box = engine.create("busybox", ["sleep", "1000"], **options)  # type: ignore[arg-type]
    box.start()
    supervisor = load(engine._context, box.id).supervisor
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: (stat := read_stat(supervisor)) is None or stat.ended, "not killed")
    with start(engine, name="next", memory="64M"):
        assert box.info().state == State.EXITED
    box.remove()


def test_what_a_killed_creator_took_is_free_again(engine: Engine) -> None:
    limit(engine, "100M")
    program = (
        "import os, signal, sys\n"
        "import hutch.engine.create as create\n"
        "from hutch.engine import Engine\n"
        "create._make = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Engine({str(engine.root)!r}).create('busybox', ['true'], memory='64M')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=DEADLINE_S)
    assert done.returncode == -signal.SIGKILL
    assert engine.resources.decide(memory="100M").fits
    assert held(engine) == {}


def test_a_creation_that_fails_gives_back(engine: Engine) -> None:
    limit(engine, "100M")
    with pytest.raises(HutchError):
        start(engine, memory="64M", mounts="type=bind,source=/no/such/source,target=/x")
    with pytest.raises(HutchError):
        engine.run("busybox", ["no-such-program"], memory="64M", network="none")
    assert held(engine) == {}


def test_a_creators_lease_holds_until_it_starts(engine: Engine) -> None:
    limit(engine, "100M")
    options: dict[str, object] = {"network": "none", "memory": "64M"}
    box = engine.create("busybox", ["sleep", "1000"], **options)  # type: ignore[arg-type]
    with pytest.raises(NoRoom):
        start(engine, memory="64M")
    box.start()
    assert list(held(engine).values()) == [64 * MIB]
    box.remove(force=True)


def test_what_is_made_and_not_started_is_free_after_a_while(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(engine, "100M")
    monkeypatch.setattr("hutch.resources.reservations._MADE_S", 0.0)
    options: dict[str, object] = {"network": "none", "memory": "64M"}
    box = engine.create("busybox", ["true"], **options)  # type: ignore[arg-type]
    assert engine.resources.decide(memory="100M").fits
    box.remove()


def test_of_many_at_once_as_many_start_as_fit(engine: Engine) -> None:
    limit(engine, "100M")
    started: list[Instance] = []
    refused: list[NoRoom] = []

    def one() -> None:
        try:
            started.append(start(engine, memory="24M"))
        except NoRoom as exc:
            refused.append(exc)

    threads = [threading.Thread(target=one) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(started), len(refused)) == (4, 5)
    for box in started:
        box.remove(force=True)


def test_limits_change_through_the_reservation(engine: Engine) -> None:
    limit(engine, "100M")
    with start(engine, name="a", memory="32M") as a, start(engine, name="b", memory="32M"):
        a.update(memory="64M", memory_swap="64M")
        assert held(engine) == {"a": 64 * MIB, "b": 32 * MIB}
        with pytest.raises(NoRoom) as caught:
            a.update(memory="80M", memory_swap="80M")
        assert "32MiB held by b" in caught.value.message
        assert held(engine)["a"] == 64 * MIB and a.info().spec.resources.memory == 64 * MIB
        a.update(memory="16M")
        assert engine.resources.decide(memory="52M").fits


# ---- processors -----------------------------------------------------------------------------


@TWO
def test_processors_of_ones_own_are_taken_from_those_who_share(engine: Engine) -> None:
    with start(engine, name="shares") as shares:
        everything = allowed(shares)
        with start(engine, name="own", cpus=1, placement="cpus=exclusive") as own:
            mine = allowed(own)
            assert mine.isdigit() and allowed(shares) != everything
            use = engine.resources.use()
            assert use.exclusive == {int(mine): "own"}
            with start(engine) as later:
                assert allowed(later) == allowed(shares)
                assert later.exec(["grep", "Cpus_allowed_list", "/proc/self/status"]).text
                with pytest.raises(Busy):
                    start(engine, cpuset_cpus=mine)
        assert allowed(shares) == everything


@TWO
def test_processors_come_back_from_an_instance_whose_supervisor_was_killed(engine: Engine) -> None:
    with start(engine) as shares:
        everything = allowed(shares)
        own = start(engine, cpus=1, placement="cpus=exclusive", remove=True)
        info = own.info()
        own.kill()
        until(lambda: allowed(shares) == everything, "not shared again")
        assert info.spec.placement.cpus == "exclusive"


@TWO
def test_the_static_policy_narrows_and_updates_move_processors(engine: Engine) -> None:
    engine.resources.configure({"cpu_policy": "static"})
    with start(engine) as shares, start(engine, cpus=1, memory="32M") as own:
        assert allowed(own).isdigit() and allowed(own) not in allowed(shares)
        own.update(cpus=0.5)
        assert allowed(shares) == allowed(own)
        own.update(cpus=1)
        assert allowed(own) not in allowed(shares)


@TWO
def test_reconcile_gives_back_what_a_crash_left(engine: Engine) -> None:
    (engine.root / "shared-cpus").write_text("0\n")
    with start(engine) as shares:
        assert allowed(shares) == "0"
        engine.reconcile()
        assert allowed(shares) != "0"


def test_huge_pages_are_counted_even_where_nothing_else_is(engine: Engine) -> None:
    with pytest.raises(NoRoom) as caught:
        start(engine, placement="huge=2M:1T")
    assert "huge pages of 2MiB: needs 1TiB" in caught.value.message
