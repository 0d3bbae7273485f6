"""Storage pools: kinds, sizes, growth, what a full one means to whom."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import AlreadyExists, Busy, Exhausted, InvalidArgument, NotFound, Unavailable
from hutch.linux import mount as linux
from hutch.storage.volumes import Volumes
from hutch.store.database import Store
from tests.requires import requires

MIB = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)

OF_FILE_SYSTEMS = [
    pytest.param("ext4", 256 * MIB, marks=requires("root", "loop")),
    pytest.param("xfs", 320 * MIB, marks=requires("root", "loop", "xfs")),
    pytest.param("btrfs", 256 * MIB, marks=requires("root", "loop", "btrfs")),
]
OF_IMAGES = pytest.param("qcow2", 0, marks=requires("root", "loop", "fuse", "qemu-img"))


@pytest.fixture
def volumes(hutch_root: Path) -> Iterator[Volumes]:
    """Volumes whose mounts and servers are gone at the end, whatever became of the test."""
    made = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
    yield made
    clear(made)


def clear(volumes: Volumes) -> None:
    for volume in volumes.list():
        for user in volumes.users(volume.name):
            volumes.release(volume.name, user)
        volumes.remove(volume.name)
    for pool in volumes.pools.list():
        volumes.pools.remove(pool.name)


def fill(path: str, amount: int) -> int:
    """Write so many bytes to a new file there; return how many there was room for."""
    written = 0
    fd = os.open(f"{path}/big-{os.urandom(4).hex()}", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while written < amount:
            written += os.write(fd, os.urandom(1 << 18) * 4)
            if written % (8 * MIB) == 0:
                os.fsync(fd)
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
    finally:
        os.close(fd)
    return written


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "size"), [("directory", 0), *OF_FILE_SYSTEMS, OF_IMAGES])
def test_a_full_volume_is_full_for_its_writer_only(volumes: Volumes, kind: str, size: int) -> None:
    pool = volumes.pools.create("p", kind, size=size)
    assert pool.kind == kind and (not size or pool.size == size)
    for name in ("hog", "other"):
        volumes.create(name, options={"pool": "p", "size": "64M"})
    hog, other = volumes.open("hog").path, volumes.open("other").path
    Path(other, "before").write_text("kept")
    assert 24 * MIB < fill(hog, 80 * MIB) <= 64 * MIB
    # What the other was promised is there, whatever the hog has tried.
    assert fill(other, 20 * MIB) >= 20 * MIB
    assert Path(other, "before").read_text() == "kept"
    for name in ("hog", "other"):
        volumes.close(name)
        volumes.remove(name)
    assert volumes.pools.get("p").volumes == ()
    volumes.pools.remove("p")


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "size"), OF_FILE_SYSTEMS)
def test_a_pool_is_thin_grows_and_survives_a_reboot(
    volumes: Volumes, hutch_root: Path, kind: str, size: int
) -> None:
    pool = volumes.pools.create("p", kind, size=size)
    assert pool.allocated < size // 2
    volumes.create("data", options={"pool": "p"})
    path = volumes.open("data").path
    Path(path, "f").write_text("kept")
    before = volumes.pools.get("p")
    after = volumes.pools.grow("p", size + 64 * MIB)
    assert after.size == size + 64 * MIB and after.free > before.free + 32 * MIB
    with pytest.raises(InvalidArgument, match="shrink"):
        volumes.pools.grow("p", size)
    linux.umount2(os.path.dirname(pool.path), linux.MNT_DETACH)
    assert not os.path.exists(path) and not volumes.pools.get("p").mounted
    again = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
    assert Path(again.open("data").path, "f").read_text() == "kept"
    linux.umount2(os.path.dirname(pool.path), linux.MNT_DETACH)
    again.reconcile([])
    assert Path(path, "f").read_text() == "kept"


@requires("root", "loop")
@pytest.mark.integration
def test_a_pool_is_never_cut_short(
    volumes: Volumes, hutch_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hutch.storage import limited
    from hutch.storage.pools import Pools

    volumes.pools.create("p", "ext4", size=64 * MIB, reserved=True)
    file = hutch_root / "pools/p/pool.raw"
    genuine = Pools.ensure

    def ensure(self: Pools, name: str) -> str:
        """Somebody else grows the pool further just before us."""
        monkeypatch.setattr(Pools, "ensure", genuine)
        volumes.pools.grow("p", 128 * MIB)
        return genuine(self, name)

    monkeypatch.setattr(Pools, "ensure", ensure)
    with pytest.raises(InvalidArgument, match="shrink"):
        volumes.pools.grow("p", 96 * MIB)
    assert file.stat().st_size == volumes.pools.get("p").size == 128 * MIB

    def refuse(path: str) -> None:
        raise Exhausted("full")

    monkeypatch.setattr(limited, "reserve", refuse)
    with pytest.raises(Exhausted):
        volumes.pools.grow("p", 192 * MIB)
    monkeypatch.undo()
    assert file.stat().st_size == 128 * MIB
    # Its grower was killed: the file system may have all of the file by now.
    os.truncate(file, 192 * MIB)
    with pytest.raises(InvalidArgument, match="shrink"):
        volumes.pools.grow("p", 160 * MIB)
    assert volumes.pools.grow("p", 192 * MIB).size == 192 * MIB


@requires("root", "loop")
@pytest.mark.integration
def test_what_is_deleted_goes_back_to_the_host(volumes: Volumes) -> None:
    volumes.pools.create("p", "ext4", size=128 * MIB)
    path = volumes.create("data", options={"pool": "p"}).path
    fill(path, 40 * MIB)
    full = volumes.pools.get("p")
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    volumes.pools.trim("p")
    assert volumes.pools.get("p").allocated < full.allocated - 30 * MIB


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "size"), [("directory", 0), OF_IMAGES])
@requires("root", "loop", "mke2fs")
def test_what_is_deleted_in_a_volume_of_a_size_goes_back_by_itself(
    volumes: Volumes, kind: str, size: int
) -> None:
    volumes.pools.create("p", kind, size=size)
    volumes.create("data", options={"pool": "p", "size": "64M"})
    path = volumes.open("data").path
    fill(path, 30 * MIB)
    full = _allocated(volumes)
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    # ext4 discards once the deletion is committed, and the commit waits for none of it.
    deadline = time.monotonic() + 200
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while _allocated(volumes) > full - 25 * MIB:
            assert time.monotonic() < deadline, "the host has not got its room back"
            os.fsync(fd)
            time.sleep(0.05)
    finally:
        os.close(fd)


def _allocated(volumes: Volumes) -> int:
    """Return what the files of the pool take on the host's disk."""
    home = Path(volumes.pools.get("p").path)
    found = {*home.rglob("disk.qcow2"), *home.rglob("limited.raw")}
    return sum(path.stat().st_blocks for path in found) * 512


@requires("root", "loop")
@pytest.mark.integration
def test_a_reserved_pool_has_its_room_on_the_host(volumes: Volumes) -> None:
    pool = volumes.pools.create("p", "ext4", size=64 * MIB, reserved=True)
    assert pool.allocated >= 64 * MIB
    path = volumes.create("data", options={"pool": "p"}).path
    fill(path, 10 * MIB)
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    assert volumes.pools.trim("p") == 0
    assert volumes.pools.get("p").allocated >= 64 * MIB


@requires("root", "loop")
@pytest.mark.integration
def test_a_volume_that_does_not_fit_into_its_pool_is_not_made(volumes: Volumes) -> None:
    volumes.pools.create("p", "ext4", size=96 * MIB)
    volumes.create("one", options={"pool": "p", "size": "64M"})
    if volumes.pools.get("p").limits == "project":
        # With quotas sizes are bounds, not room.
        volumes.create("two", options={"pool": "p", "size": "64M"})
        return
    with pytest.raises(Exhausted) as caught:
        volumes.create("two", options={"pool": "p", "size": "64M"})
    assert "hutch pool grow" in str(caught.value.hint)
    assert [volume.name for volume in volumes.list()] == ["one"]
    pool = volumes.pools.get("p")
    assert sorted(os.listdir(pool.path)) == ["one"]


def test_a_pool_of_a_directory_elsewhere(volumes: Volumes, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (elsewhere / "foreign").touch()
    with pytest.raises(InvalidArgument, match="not empty"):
        volumes.pools.create("p", source=str(elsewhere))
    (elsewhere / "foreign").unlink()
    volumes.pools.create("p", source=str(elsewhere))
    volume = volumes.create("data", options={"pool": "p"})
    assert volume.path.startswith(f"{elsewhere}/")
    Path(volume.path, "f").touch()
    with pytest.raises(Busy, match="data"):
        volumes.pools.remove("p")
    with pytest.raises(AlreadyExists):
        volumes.pools.create("p")
    volumes.remove("data")
    volumes.pools.remove("p")
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize(
    ("kind", "size"),
    [("directory", 0), pytest.param("ext4", 64 * MIB, marks=requires("root", "loop"))],
)
def test_a_pool_whose_disk_is_not_mounted_is_told_and_stops_nothing_else(
    volumes: Volumes, tmp_path: Path, kind: str, size: int
) -> None:
    disk, away = tmp_path / "disk", tmp_path / "away"
    disk.mkdir()
    volumes.pools.create("p", kind, size=size, source=str(disk))
    if size:
        linux.umount2(f"{disk}/mounted", linux.MNT_DETACH)
    volumes.create("elsewhere")
    disk.rename(away)
    for place in ("missing", "empty"):
        with pytest.raises(Unavailable, match="does not have its files"):
            volumes.create("data", options={"pool": "p"})
        assert [(pool.name, pool.mounted) for pool in volumes.pools.list()] == [("p", False)]
        volumes.reconcile([])
        assert [volume.name for volume in volumes.list()] == ["elsewhere"]
        assert disk.exists() == (place == "empty") and _names(disk) == []
        disk.mkdir(exist_ok=True)
    disk.rmdir()
    away.rename(disk)
    assert volumes.create("data", options={"pool": "p"}).path.startswith(str(disk))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"name": "../x"}, "name"),
        ({"name": "p", "kind": "zfs"}, "kind"),
        ({"name": "p", "kind": "ext4"}, "size"),
        ({"name": "p", "kind": "ext4", "size": 1 * MIB}, "size"),
        ({"name": "p", "kind": "directory", "size": 64 * MIB}, "size"),
        ({"name": "p", "kind": "qcow2", "reserved": True}, "reserved"),
        ({"name": "p", "source": "relative"}, "source"),
        ({"name": "p", "source": "/nosuch/disk"}, "source"),
    ],
)
def test_bad_pools_are_refused(
    volumes: Volumes, hutch_root: Path, arguments: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgument, match=field):
        volumes.pools.create(**arguments)  # type: ignore[arg-type]
    assert volumes.pools.list() == []
    assert not [n for n in _names(hutch_root / "pools") if not n.startswith(".")]


def _names(path: Path) -> list[str]:
    return os.listdir(path) if path.exists() else []


def test_missing_pools_are_told(volumes: Volumes) -> None:
    with pytest.raises(NotFound, match="pool none"):
        volumes.create("v", options={"pool": "none"})
    for act in (volumes.pools.get, volumes.pools.remove):
        with pytest.raises(NotFound):
            act("none")
    assert volumes.list() == []


@requires("root", "loop")
@pytest.mark.integration
@pytest.mark.parametrize("step", ["make_and_mount", "_make_file", "os.makedirs"])
def test_a_pool_whose_making_fails_leaves_nothing(
    volumes: Volumes, hutch_root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    from hutch.errors import HutchError
    from hutch.storage import pools

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if step == "os.makedirs":
        genuine = os.makedirs

        def makedirs(path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
            if path.endswith("/volumes"):
                fail()
            genuine(path, mode, exist_ok)

        monkeypatch.setattr(os, "makedirs", makedirs)
    else:
        monkeypatch.setattr(pools, step, fail)
    with pytest.raises(HutchError):
        volumes.pools.create("p", "ext4", size=64 * MIB)
    monkeypatch.undo()
    assert not [n for n in os.listdir(hutch_root / "pools") if not n.startswith(".")]
    assert volumes.pools.list() == []


@requires("root", "loop")
@pytest.mark.integration
def test_what_a_killed_creator_left_is_taken_away(volumes: Volumes, hutch_root: Path) -> None:
    pool = volumes.pools.create("p", "ext4", size=64 * MIB)
    with volumes._records.write() as transaction:
        transaction.delete("pools", "p")
    volumes.reconcile([])
    assert not os.path.exists(pool.path)
    assert not (hutch_root / "pools/p").exists()
    assert volumes.pools.create("p", "ext4", size=64 * MIB).volumes == ()
