"""Memory made ahead: there before it is asked for, given whole, emptied, kept for the next."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hutch.engine import Engine
from hutch.errors import Exhausted, InvalidArgument
from hutch.linux import mount as linux
from hutch.resources.memory_pool import MemoryPool, MemorySlots
from hutch.resources.settings import Settings, save_settings, with_values
from hutch.spec.build import ImageDefaults, build
from tests.requires import requires

MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[MemoryPool]:
    (tmp_path / "locks").mkdir()
    made = MemoryPool(tmp_path)
    yield made
    for name in made._names():
        made.give_back(name.split("-", 2)[2])
    made.prepare({})


def blocks(pool: MemoryPool) -> int:
    return sum(os.stat(f"{pool._directory}/{n}").st_blocks * 512 for n in pool._names())


def want(pool: MemoryPool, pieces: dict[int, int]) -> None:
    """Have the root's settings say so, and the pool be so."""
    save_settings(pool._root, msgspec.structs.replace(Settings(), memory_pool=pieces))
    pool.prepare(pieces)


@requires("root")
@pytest.mark.integration
def test_pieces_are_there_before_they_are_asked_for(pool: MemoryPool) -> None:
    want(pool, {4 * MIB: 2, 2 * MIB: 1})
    assert blocks(pool) == 10 * MIB
    assert pool.slots() == (
        MemorySlots(size=2 * MIB, total=1, free=1),
        MemorySlots(size=4 * MIB, total=2, free=2),
    )
    fd = pool.take(4 * MIB, "one")
    os.pwrite(fd, b"secret", 12345)
    assert pool.slots()[1].free == 1
    again = pool.take(4 * MIB, "one")  # a start that was cut short, done again
    assert os.pread(again, 6, 12345) == b"secret"
    os.close(pool.take(4 * MIB, "other"))
    with pytest.raises(Exhausted, match="no piece of 4MiB is free"):
        pool.take(4 * MIB, "third")
    with pytest.raises(Exhausted, match="no piece of 8MiB"):
        pool.take(8 * MIB, "third")
    os.close(again)
    os.close(fd)

    # Fewer are wanted: what is in use stays.
    want(pool, {4 * MIB: 1})
    assert pool.slots() == (MemorySlots(size=4 * MIB, total=2, free=0),)
    pool.give_back("one")
    pool.give_back("one")
    assert pool.slots() == (MemorySlots(size=4 * MIB, total=1, free=0),)
    want(pool, {4 * MIB: 2})
    fd = pool.take(4 * MIB, "fourth")
    assert os.pread(fd, 4 * MIB, 0) == bytes(4 * MIB) and blocks(pool) == 8 * MIB
    os.close(fd)
    pool.reconcile({4 * MIB: 2}, {"fourth"})
    assert pool.slots() == (MemorySlots(size=4 * MIB, total=2, free=1),)


@requires("root")
@pytest.mark.integration
def test_more_than_the_host_has_is_refused_before_it_is_taken(pool: MemoryPool) -> None:
    pool.prepare({2 * MIB: 1})
    for wanted in ({1 << 50: 1}, {2 * MIB: 1 << 30}):
        with pytest.raises(Exhausted, match="the host can spare"):
            pool.prepare(wanted)
    assert pool.slots() == (MemorySlots(size=2 * MIB, total=1, free=1),)


@requires("root")
@pytest.mark.integration
def test_what_a_killed_process_left_goes_with_the_next(pool: MemoryPool) -> None:
    pool.prepare({2 * MIB: 1})
    with open(f"{pool._directory}/.free-{2 * MIB}-cut", "wb") as left:
        left.write(bytes(MIB))
    pool.prepare({})
    assert not os.path.ismount(pool._directory)


@requires("root")
@pytest.mark.integration
def test_a_pool_given_up_goes_with_the_last_that_uses_it(pool: MemoryPool) -> None:
    want(pool, {4 * MIB: 2})
    os.close(pool.take(4 * MIB, "one"))
    want(pool, {})
    assert pool.slots() == (MemorySlots(size=4 * MIB, total=1, free=0),)
    pool.give_back("one")
    assert pool.slots() == () and not os.path.ismount(pool._directory)


@requires("root")
@pytest.mark.integration
def test_after_a_reboot_the_pool_is_made_anew(pool: MemoryPool) -> None:
    pool.prepare({2 * MIB: 2})
    linux.umount2(pool._directory, linux.MNT_DETACH)
    assert pool.slots() == ()
    pool.reconcile({2 * MIB: 2}, set())
    assert pool.slots() == (MemorySlots(size=2 * MIB, total=2, free=2),)
    pool.prepare({})
    assert not os.path.ismount(pool._directory)


@pytest.mark.parametrize("text", ["512M", "512M:x", "1M:1", "3M:1", "512M:5000", "x:1"])
def test_bad_pools_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="memory_pool"):
        with_values(Settings(), {"memory_pool": text})


def test_a_pool_is_read_and_put_back() -> None:
    settings = with_values(Settings(), {"memory_pool": "512M:4, 1G:2"})
    assert settings.memory_pool == {512 * MIB: 4, 1024 * MIB: 2}
    assert with_values(settings, {"memory_pool": "none"}).memory_pool == {}


@pytest.mark.parametrize(
    "options",
    [
        {"isolation": "container"},
        {"isolation": "vm", "placement": "memory=pool,huge=2M"},
        {"isolation": "vm", "placement": "memory=other"},
        {"isolation": "vm", "placement": "huge=2M,merge=on"},
    ],
)
def test_who_cannot_have_it_is_told(options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="placement"):
        build("i", ImageDefaults(), ["true"], **{"placement": "memory=pool", **options})  # type: ignore[arg-type]


@requires("root", "cgroup", "busybox", "qemu", "apt-mirror", "mkfs.erofs", "mke2fs")
@pytest.mark.integration
def test_a_machine_has_its_memory_from_the_pool(engine: Engine) -> None:
    engine.resources.configure({"memory_pool": "128M:1"})
    try:
        options: dict[str, object] = {
            "isolation": "vm",
            "memory": "128M",
            "network": "none",
            "placement": "memory=pool",
        }
        name = f"pooled-{uuid.uuid4().hex[:8]}"
        with engine.start("busybox", ["sleep", "1000"], name=name, **options) as box:  # type: ignore[arg-type]
            assert engine.resources.memory_pool()[0].free == 0
            total = box.exec(["sh", "-c", "head -1 /proc/meminfo"]).text.split()[1]
            assert 90_000 < int(total) < 131_072
            with pytest.raises(Exhausted, match="no piece of 128MiB"):
                engine.run("busybox", ["true"], **options)  # type: ignore[arg-type]
            # All of it is there, though the guest has used a part only.
            (used,) = (n for n in os.listdir(engine.root / "memory") if n.startswith("used-"))
            assert os.stat(engine.root / "memory" / used).st_blocks * 512 == 128 * MIB
            use = engine.resources.memory().instances[0]
            assert use.guest == 0  # no balloon is blown up in it
        assert engine.resources.memory_pool()[0].free == 1
    finally:
        engine.resources.configure({"memory_pool": "none"})
    assert not os.path.ismount(engine.root / "memory")
