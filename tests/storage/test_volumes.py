"""Volumes: names, users, first content, driver options."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from hutch.errors import AlreadyExists, Busy, InvalidArgument, NotFound, Unsupported
from hutch.storage import homes
from hutch.storage.volumes import Volumes
from hutch.store.database import Store
from tests.requires import requires


@pytest.fixture
def volumes(hutch_root: Path) -> Volumes:
    return Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))


def test_a_volume_is_made_found_and_removed(volumes: Volumes) -> None:
    made = volumes.create("data", labels={"a": "1"})
    assert made == volumes.get("data") == volumes.create("data")
    assert os.path.isdir(made.path) and not made.anonymous
    Path(made.path, "f").write_text("x")
    assert volumes.remove("data")
    assert not os.path.exists(made.path)
    with pytest.raises(NotFound):
        volumes.get("data")


def test_a_volume_without_a_name_is_anonymous(volumes: Volumes) -> None:
    made = volumes.create()
    assert made.anonymous and len(made.name) == 64


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a" * 300, "ü", "-x", "a b"])
def test_bad_names_are_refused(volumes: Volumes, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        volumes.create(name)


def test_one_of_other_options_exists(volumes: Volumes, tmp_path: Path) -> None:
    volumes.create("data")
    with pytest.raises(AlreadyExists):
        volumes.create("data", options={"type": "none", "o": "bind", "device": str(tmp_path)})


def test_a_volume_in_use_is_busy(volumes: Volumes) -> None:
    volumes.create("data")
    volumes.acquire("data", "i1")
    volumes.acquire("data", "i2")
    assert list(volumes.users("data")) == ["i1", "i2"]
    for force in (False, True):
        with pytest.raises(Busy, match="i1"):
            volumes.remove("data", force=force)
    volumes.release("data", "i1")
    volumes.release("data", "i1")
    assert volumes.reconcile([]) == 1
    volumes.remove("data")


def test_a_missing_volume(volumes: Volumes) -> None:
    for call in (volumes.get, volumes.remove):
        with pytest.raises(NotFound):
            call("no")
    with pytest.raises(NotFound):
        volumes.acquire("no", "i")
    assert volumes.remove("no", force=True) is False
    assert volumes.remove("no", missing_ok=True) is False


def test_users_of_a_longer_name_do_not_count(volumes: Volumes) -> None:
    volumes.create("a")
    volumes.create("ab")
    volumes.acquire("ab", "i")
    assert list(volumes.users("a")) == []


def test_volumes_are_filtered_as_docker_does(volumes: Volumes) -> None:
    volumes.create("one", labels={"k": "1"})
    volumes.create("two", labels={"k": "2"})
    volumes.acquire("two", "i")

    def names(**filters: list[str]) -> list[str]:
        return [volume.name for volume in volumes.list(filters)]

    assert names() == ["one", "two"]
    assert names(name=["n"]) == ["one"]
    assert names(label=["k"]) == ["one", "two"]
    assert names(label=["k=2"]) == ["two"]
    assert names(dangling=["true"]) == ["one"]
    assert names(driver=["other"]) == []
    with pytest.raises(InvalidArgument, match="colour"):
        names(colour=["red"])


def test_prune_takes_what_is_not_used(volumes: Volumes) -> None:
    named, anonymous, used = volumes.create("named"), volumes.create(), volumes.create()
    Path(anonymous.path, "f").write_bytes(b"x" * 5000)
    volumes.acquire(used.name, "i")
    removed, freed = volumes.prune()
    assert list(removed) == [anonymous.name] and freed >= 5000
    assert list(volumes.prune(all_volumes=True)[0]) == [named.name]
    assert [volume.name for volume in volumes.list()] == [used.name]


def test_directories_without_a_record_are_thrown_away(volumes: Volumes, hutch_root: Path) -> None:
    volumes.create("kept")
    (hutch_root / "volumes/stray/_data").mkdir(parents=True)
    volumes.reconcile([])
    assert os.listdir(hutch_root / "volumes") == ["kept"]


# ---- first content -----------------------------------------------------------------------


@pytest.fixture
def lowers(tmp_path: Path) -> list[str]:
    """Two layers, the upper one first: a file deleted, one replaced, one added."""
    low, high = tmp_path / "low", tmp_path / "high"
    (low / "srv/data/sub").mkdir(parents=True)
    (low / "srv/data").chmod(0o2750)
    for name in ("old", "gone", "sub/deep"):
        (low / "srv/data" / name).write_text(f"low {name}")
    os.link(low / "srv/data/old", low / "srv/data/same")
    (low / "var").symlink_to("/srv")
    (high / "srv/data").mkdir(parents=True)
    (high / "srv/data").chmod(0o2750)
    (high / "srv/data/new").write_text("high")
    (high / "srv/data/link").symlink_to("/etc/passwd")
    os.mknod(high / "srv/data/gone", stat.S_IFCHR, 0)
    return [str(high), str(low)]


@requires("root")
@pytest.mark.parametrize("target", ["/srv/data", "/var/data", "srv/../srv/data/"])
def test_a_new_volume_gets_what_the_image_shows(
    volumes: Volumes, lowers: list[str], target: str
) -> None:
    path = Path(volumes.create("data").path)
    assert volumes.populate("data", lowers, target)
    assert sorted(p.name for p in path.iterdir()) == ["link", "new", "old", "same", "sub"]
    assert (path / "old").read_text() == "low old"
    assert (path / "old").stat().st_ino == (path / "same").stat().st_ino
    assert (path / "sub/deep").read_text() == "low sub/deep"
    assert os.readlink(path / "link") == "/etc/passwd"
    assert stat.S_IMODE(path.stat().st_mode) == 0o2750


@requires("root")
def test_only_an_empty_volume_is_filled_and_only_once(volumes: Volumes, lowers: list[str]) -> None:
    kept = Path(volumes.create("kept").path)
    (kept / "mine").touch()
    assert not volumes.populate("kept", lowers, "/srv/data")
    assert os.listdir(kept) == ["mine"]
    emptied = Path(volumes.create("emptied").path)
    volumes.populate("emptied", lowers, "/nothing/there")
    assert not volumes.populate("emptied", lowers, "/srv/data")
    assert os.listdir(emptied) == []


def test_a_subpath_stays_inside(volumes: Volumes, tmp_path: Path) -> None:
    path = Path(volumes.create("data").path)
    (path / "in/side").mkdir(parents=True)
    (path / "out").symlink_to("/")
    (path / "rel").symlink_to("../../..")
    fd = volumes.open_subpath("data", "in/side")
    assert os.path.samestat(os.fstat(fd), (path / "in/side").stat())
    os.close(fd)
    for name in ("out", "rel"):
        fd = volumes.open_subpath("data", name)
        assert os.path.samestat(os.fstat(fd), path.stat())
        os.close(fd)
    for bad in ("../x", "/etc", "in/../../x", "missing"):
        with pytest.raises(InvalidArgument, match="subpath"):
            volumes.open_subpath("data", bad)


# ---- driver options ------------------------------------------------------------------------


def test_a_bind_volume_is_its_device(volumes: Volumes, tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.mkdir()
    (device / "f").touch()
    options = {"type": "none", "o": "bind", "device": str(device)}
    assert volumes.create("b", options=options).path == str(device)
    assert not volumes.populate("b", [str(tmp_path)], "/")
    volumes.remove("b")
    assert (device / "f").exists()


@requires("root")
@pytest.mark.integration
def test_a_tmpfs_volume_is_mounted_while_it_lives(volumes: Volumes) -> None:
    options = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,noexec"}
    path = volumes.create("t", options=options).path
    volumes.acquire("t", "i")
    volumes.open("t")
    assert os.path.ismount(path) and os.statvfs(path).f_flag & os.ST_NOEXEC
    volumes.release("t", "i")
    volumes.remove("t")
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"colour": "red"}, InvalidArgument),
        ({"type": "ext4"}, InvalidArgument),
        ({"type": "none", "o": "bind", "device": "relative"}, InvalidArgument),
        ({"type": "nfs", "o": "addr=10.0.0.1", "device": ":/x"}, Unsupported),
    ],
)
def test_bad_options_are_refused(
    volumes: Volumes, options: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        volumes.create("x", options=options)
    with pytest.raises(NotFound):
        volumes.get("x")


def test_other_drivers_are_not_known(volumes: Volumes) -> None:
    with pytest.raises(Unsupported, match="rexray"):
        volumes.create("x", driver="rexray")


@requires("root", "mke2fs")
def test_a_disk_is_written_back_though_another_namespace_holds_its_mount(volumes: Volumes) -> None:
    made = volumes.create("db", options={"type": "disk", "size": "64M"})
    volumes.acquire("db", "i1")
    homes.ensure(volumes.home("db"))
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        with open(f"{made.path}/f", "w") as writer:
            writer.write("whole")
            with pytest.raises(Busy, match="is being written to"):
                volumes.as_disk("db")
        file = volumes.as_disk("db")
        argv = ["debugfs", "-R", "cat upper/f", file]
        assert subprocess.run(argv, capture_output=True, check=True).stdout == b"whole"
        holder.stdin.close()
    volumes.release("db", "i1")
    volumes.remove("db")
