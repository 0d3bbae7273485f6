"""Volumes and pools of a size are counted like instances: refused where there is no room, and
nothing of them is left."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from hutch.errors import HutchError
from hutch.resources.admission import NoRoom
from hutch.resources.demand import demand_of
from hutch.resources.settings import Settings
from hutch.spec.build import build
from hutch.spec.defaults import ImageDefaults
from hutch.storage import homes
from tests.requires import requires

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def engine(root: Path) -> Iterator[Engine]:
    with Engine(root) as engine:
        yield engine
        for volume in engine.volumes.list():
            engine.volumes.remove(volume.name)
        for pool in engine.pools.list():
            engine.pools.remove(pool.name)
        assert engine.resources.use().holdings == ()


def leave(engine: Engine, room: int) -> None:
    """Let so much of the disk be given out in all."""
    total = engine.resources.inventory().rooms[0].total
    engine.resources.configure({"reserved.disk": str(total - room)})


def held(engine: Engine) -> dict[str, int]:
    return {holding.name: holding.disk for holding in engine.resources.use().holdings}


def make_disk(engine: Engine, name: str, size: str) -> None:
    # A disk is no file system of the host's to mount, and needs no root.
    engine.volumes.create(name, options={"type": "disk"}, size=size)


@pytest.mark.parametrize(
    ("isolation", "options", "room"),
    [
        ("container", {}, 0),
        ("container", {"storage_opts": {"size": "1G"}}, GIB),
        ("vm", {}, 10 * GIB),
        ("vm", {"disk": "2G"}, 2 * GIB),
        ("vm", {"storage_opts": {"size": "1G"}}, GIB),
    ],
)
def test_an_instance_needs_what_it_may_write(
    isolation: str, options: dict[str, Any], room: int
) -> None:
    spec = build("x", ImageDefaults(), ["true"], isolation=isolation, **options)
    assert demand_of(spec, Settings()).disk == room


def test_a_volume_that_does_not_fit_is_not_made(engine: Engine, root: Path) -> None:
    leave(engine, 200 * MIB)
    make_disk(engine, "first", "128M")
    with pytest.raises(NoRoom) as caught:
        make_disk(engine, "second", "128M")
    assert caught.value.message == (
        "no room for volume second: disk: needs 128MiB; 72MiB free of 200MiB: "
        "128MiB held by volume first"
    )
    assert caught.value.hint == "fits if volume first is removed or the size is at most 72MiB"
    assert held(engine) == {"volume first": 128 * MIB}
    assert sorted(p.name for p in (root / "volumes").iterdir() if p.is_dir()) == ["first"]
    make_disk(engine, "second", "72M")
    engine.volumes.create("plain")
    engine.volumes.remove("first")
    make_disk(engine, "third", "128M")
    assert held(engine) == {"volume second": 72 * MIB, "volume third": 128 * MIB}


def test_a_volume_grows_and_is_cloned_within_what_is_given_out(engine: Engine) -> None:
    leave(engine, 300 * MIB)
    make_disk(engine, "data", "64M")
    with pytest.raises(NoRoom, match="no room for volume data: disk: needs 400MiB; 300MiB free"):
        engine.volumes.resize("data", "400M")
    assert held(engine) == {"volume data": 64 * MIB}
    engine.volumes.resize("data", "192M")
    assert held(engine) == {"volume data": 192 * MIB}
    with pytest.raises(NoRoom, match=r"no room for volume twin: .* 192MiB held by volume data"):
        engine.volumes.clone("data", "twin")
    assert [volume.name for volume in engine.volumes.list()] == ["data"]


def test_a_failure_gives_the_room_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(engine, 100 * MIB)

    def fail(*args: object, **named: object) -> None:
        assert held(engine) == {"volume data": 100 * MIB}
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patched:
        patched.setattr(homes, "make", fail)
        with pytest.raises(HutchError):
            make_disk(engine, "data", "100M")
    assert held(engine) == {}
    make_disk(engine, "data", "100M")


def test_of_several_at_once_as_many_are_made_as_fit(engine: Engine) -> None:
    leave(engine, 200 * MIB)
    failures: list[BaseException] = []

    def create(number: int) -> None:
        try:
            make_disk(engine, f"v{number}", "64M")
        except NoRoom as exc:
            failures.append(exc)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engine.volumes.list()) == 3
    assert len(failures) == 3


def test_nothing_is_counted_where_nothing_is_limited_but_all_is_shown(engine: Engine) -> None:
    make_disk(engine, "huge", "1T")
    assert held(engine) == {"volume huge": 1 << 40}


@requires("root")
@pytest.mark.integration
def test_a_restored_volume_needs_room_too(engine: Engine) -> None:
    leave(engine, 200 * MIB)
    engine.volumes.create("data", size="128M")
    stream = io.BytesIO()
    engine.volumes.backup("data", stream)
    stream.seek(0)
    with pytest.raises(NoRoom, match="no room for volume again"):
        engine.volumes.restore(stream, "again")
    stream.seek(0)
    engine.volumes.restore(stream, "again", size="64M")
    assert held(engine) == {"volume again": 64 * MIB, "volume data": 128 * MIB}


@requires("root")
@pytest.mark.integration
def test_a_pool_holds_its_size_and_its_volumes_nothing_more(engine: Engine) -> None:
    leave(engine, 400 * MIB)
    engine.pools.create("fast", "ext4", size="256M")
    engine.volumes.create("inside", pool="fast", size="64M")
    assert held(engine) == {"pool fast": 256 * MIB}
    with pytest.raises(NoRoom, match=r"no room for pool slow: .* 256MiB held by pool fast"):
        engine.pools.create("slow", "ext4", size="256M")
    assert [pool.name for pool in engine.pools.list()] == ["fast"]
    with pytest.raises(NoRoom, match="no room for pool fast: disk: needs 512MiB; 400MiB free"):
        engine.pools.grow("fast", "512M")
    engine.pools.grow("fast", "400M")
    assert held(engine) == {"pool fast": 400 * MIB}
    engine.pools.create("plain")
    with pytest.raises(NoRoom, match="no room for volume beside"):
        engine.volumes.create("beside", pool="plain", size="64M")


@requires("root")
@pytest.mark.integration
def test_what_lies_on_another_disk_takes_nothing_of_this_one(
    engine: Engine, tmp_path: Path
) -> None:
    from hutch.linux.mount import mount, umount2

    other = tmp_path / "other"
    other.mkdir()
    mount("tmpfs", str(other), "tmpfs", 0, "size=16m")
    try:
        leave(engine, 100 * MIB)
        engine.pools.create("elsewhere", source=str(other))
        engine.volumes.create("data", pool="elsewhere", options={"type": "disk"}, size="1G")
        assert held(engine) == {}
        engine.volumes.remove("data")
        engine.pools.remove("elsewhere")
    finally:
        umount2(str(other), 2)
