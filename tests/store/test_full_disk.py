"""A disk without any room: what runs is still listed, stopped and removed."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hutch.drivers.base import Launch, Started
from hutch.engine import Engine
from hutch.errors import Exhausted
from hutch.lifecycle import State
from hutch.store.database import Store
from hutch.store.reserve import Reserve
from tests.requires import requires

pytestmark = [pytest.mark.integration, requires("root")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(disk: Path) -> list[Path]:
    """Take all the room there is."""
    made = []
    for number, size in enumerate((1 << 20, 4096, 512)):
        path = disk / f"fill{number}"
        made.append(path)
        with suppress(OSError), open(path, "wb", buffering=0) as file:
            while file.write(bytes(size)) == size:
                pass
    return made


def test_a_store_on_a_full_disk_is_read_and_written_by_what_was_kept_for_it(disk: Path) -> None:
    path = disk / "hutch.db"
    first = Store.open(path)
    with first.write() as tx:
        tx.event("box", "create", "one")
    first.close()
    fill(disk)
    # The last one that closed took the log and the index along: there is no room for others.
    store = Store.open(path)
    try:
        assert store.last_event() == 1
        with store.write(durable=True) as tx:
            tx.event("box", "stop", "one")
        assert store.last_event() == 2
    finally:
        store.close()
    assert not Path(f"{path}-reserve").exists()


def test_without_a_reserve_a_full_disk_is_told(disk: Path) -> None:
    path = disk / "hutch.db"
    Store.open(path).close()
    assert Reserve(path).give_up()
    fill(disk)
    with pytest.raises(Exhausted, match=r"hutch\.db"):
        Store.open(path)


def test_the_reserve_is_made_again_when_there_is_plenty_of_room(disk: Path) -> None:
    path = disk / "hutch.db"
    Store.open(path).close()
    reserve = Path(f"{path}-reserve")
    assert reserve.stat().st_blocks * 512 == 1 << 20
    filled = fill(disk)
    assert Reserve(path).give_up()
    Store.open(path).close()
    assert not reserve.exists()
    for one in filled:
        one.unlink()
    Store.open(path).close()
    assert reserve.exists()


@requires("cgroup", "overlayfs", "seccomp", "busybox")
def test_instances_are_stopped_and_removed_on_a_full_disk(disk: Path) -> None:
    with Engine(disk / "root") as engine:
        engine.images.bootstrap("busybox")
        for name in ("kept", "gone"):
            engine.start("busybox", ["sleep", "1000"], network="none", name=name)
    filled = fill(disk)
    with Engine(disk / "root") as engine:
        assert {info.name for info in engine.list()} == {"kept", "gone"}
        engine.get("kept").stop(timeout=0)
        engine.get("gone").remove(force=True)
        assert [(i.name, i.state) for i in engine.list(all=True)] == [("kept", State.EXITED)]
        for one in filled:
            one.unlink()
        engine.get("kept").remove()


def test_a_commit_that_finds_no_room_is_not_lost(disk: Path) -> None:
    store = Store.open(disk / "hutch.db")
    try:
        with store.write() as tx:
            tx.event("box", "create", "one")
        fill(disk)
        for number in range(20):  # the log has to grow
            with store.write() as tx:
                tx.event("box", "stop", "x" * 1000, number=str(number))
        assert store.last_event() == 21
    finally:
        store.close()


def test_a_full_disk_without_a_reserve_is_told_by_a_commit(disk: Path) -> None:
    store = Store.open(disk / "hutch.db")
    try:
        assert Reserve(disk / "hutch.db").give_up()
        fill(disk)
        with pytest.raises(Exhausted, match="no space left"):
            for _ in range(1000):
                with store.write() as tx:
                    tx.event("box", "stop", "x" * 1000)
    finally:
        store.close()


@requires("cgroup", "overlayfs", "seccomp", "busybox")
def test_a_start_that_cannot_be_recorded_is_undone(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(disk / "root") as engine:
        engine.images.bootstrap("busybox")
        box = engine.create("busybox", ["sleep", "1000"], network="none")
        driver = engine.context.driver("container")
        start = driver.start
        begun: list[Started] = []
        filled: list[Path] = []

        def full(launch: Launch) -> Started:
            begun.append(start(launch))
            Reserve(disk / "root/hutch.db").give_up()
            filled.extend(fill(disk))
            return begun[0]

        monkeypatch.setattr(driver, "start", full)
        with pytest.raises(Exhausted):
            box.start()
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(begun[0].pid)
            assert select.select([pidfd], [], [], 60)[0]
            os.close(pidfd)
        assert [info.name for info in engine.list(all=True)] == [box.name]  # as it was last noted
        for one in filled:
            one.unlink()
        assert not engine.list()
        box.remove()


@requires("cgroup", "overlayfs", "seccomp", "busybox")
def test_nothing_new_takes_what_is_kept_to_stop_and_remove(disk: Path) -> None:
    reserve = disk / "root/hutch.db-reserve"
    with Engine(disk / "root") as engine:
        engine.images.bootstrap("busybox")
        box = engine.start("busybox", ["sleep", "1000"], network="none")
        filled = fill(disk)
        for number in range(3):
            with pytest.raises(Exhausted):
                engine.volumes.create(f"more{number}")
            with pytest.raises(Exhausted):
                engine.queues.create(f"more{number}")
            with pytest.raises(Exhausted):
                engine.networks.create(f"more{number}")
        assert reserve.exists()
        Reserve(disk / "root/hutch.db").give_up()  # as the end of another has
        with pytest.raises(Exhausted, match="kept to stop and remove"):
            engine.queues.create("more")
        box.remove(force=True)
        assert not engine.list(all=True)
        assert not engine.volumes.list()
        for one in filled:
            one.unlink()
        engine.volumes.create("more0")
