"""Snapshots, clones and growth of volumes, in every form that a volume has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import AlreadyExists, Busy, Denied, InvalidArgument, NotFound, WrongState
from hutch.storage import diskimages
from hutch.storage.diskkeys import DiskKey
from hutch.storage.volume_copies import VolumeCopies
from hutch.storage.volumes import Volumes
from hutch.store.database import Store
from tests.requires import requires
from tests.storage.test_pools import OF_FILE_SYSTEMS, clear, fill

MIB = 1 << 20
_IMAGES = requires("root", "loop", "fuse", "qemu-img")
# kind and size of the pool ("" for none), options of the volume
FORMS = [
    pytest.param("", 0, {}, id="tree"),
    pytest.param("", 0, {"size": "64M"}, id="file", marks=requires("root", "loop")),
    pytest.param("", 0, {"encrypted": "true", "size": "64M"}, id="encrypted", marks=_IMAGES),
    pytest.param("qcow2", 0, {"size": "64M"}, id="qcow2", marks=_IMAGES),
    *(
        pytest.param(p.values[0], p.values[1], {"size": "64M"}, id=str(p.values[0]), marks=p.marks)
        for p in OF_FILE_SYSTEMS
    ),
]


@pytest.fixture(autouse=True)
def _keys_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskimages, "_GUESS_MS", 10)


class Rig:
    """A volume `data` of one form, and what makes copies of it."""

    def __init__(self, root: Path, kind: str, size: int, options: dict[str, str]) -> None:
        self.records = Store.open(root / "hutch.db")
        self.volumes = Volumes(root, self.records)
        self.copies = VolumeCopies(self.volumes, self.records)
        if kind:
            self.volumes.pools.create("p", kind, size=size)
            options = {**options, "pool": "p"}
        self.options = dict(options)
        if "encrypted" in options:
            (root / "key").write_text("correct horse battery staple\n")
            self.options["key-file"] = str(root / "key")
        self.volumes.create("data", options=self.options)


@pytest.fixture
def rig(hutch_root: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(hutch_root, *request.param)
    yield made
    clear(made.volumes)


_PARAMETERS = [pytest.param(p.values, id=p.id, marks=p.marks) for p in FORMS]
forms = pytest.mark.parametrize("rig", _PARAMETERS, indirect=True)
# A key takes seconds to be made hard to guess.
quick_forms = pytest.mark.parametrize(
    "rig", [p for p in _PARAMETERS if p.id != "encrypted"], indirect=True
)


@forms
@pytest.mark.integration
def test_a_snapshot_is_the_volume_as_it_was(rig: Rig) -> None:
    volumes, copies = rig.volumes, rig.copies
    path = Path(volumes.open("data").path)
    (path / "f").write_text("one")
    os.setxattr(path / "f", "user.colour", b"red")
    (path / "sparse").touch()
    os.truncate(path / "sparse", 8 * MIB)
    os.link(path / "f", path / "same")
    copies.snapshot("data", "monday")
    (path / "f").write_text("two")
    with pytest.raises(AlreadyExists, match="monday"):
        copies.snapshot("data", "monday")
    copies.clone("data", "now")
    copies.clone("data", "then", snapshot="monday")
    volumes.close("data")
    for name, text in (("now", "two"), ("then", "one"), ("data", "two")):
        found = Path(volumes.open(name).path)
        assert (found / "f").read_text() == text
        assert os.getxattr(found / "f", "user.colour") == b"red"
        assert os.stat(found / "f").st_ino == os.stat(found / "same").st_ino
        assert os.stat(found / "sparse").st_blocks * 512 < MIB
        volumes.close(name)
    assert [snapshot.name for snapshot in copies.list("data")] == ["monday"]
    assert copies.list("then") == []
    copies.remove("data", "monday")
    for act in (copies.remove, lambda v, s: copies.clone(v, "x", snapshot=s)):
        with pytest.raises(NotFound, match="monday"):
            act("data", "monday")
    assert Path(volumes.open("data").path, "f").read_text() == "two"
    volumes.close("data")


@quick_forms
@pytest.mark.integration
def test_a_volume_grows(rig: Rig) -> None:
    volumes = rig.volumes
    if "size" not in rig.options:
        with pytest.raises(InvalidArgument, match="no size to grow"):
            volumes.grow("data", 96 * MIB)
        return
    Path(volumes.open("data").path, "f").write_text("kept")
    volumes.close("data")
    with pytest.raises(InvalidArgument, match="shrink"):
        volumes.grow("data", 64 * MIB)
    grown = volumes.grow("data", 96 * MIB)
    assert grown.options["size"] == str(96 * MIB)
    path = volumes.open("data").path
    assert Path(path, "f").read_text() == "kept"
    assert fill(path, 70 * MIB) >= 70 * MIB
    volumes.close("data")


@_IMAGES
@pytest.mark.integration
def test_an_encrypted_volume_opens_with_its_key_only(hutch_root: Path) -> None:
    volumes = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
    try:
        options = {"encrypted": "", "size": "64M"}
        with pytest.raises(InvalidArgument, match="key"):
            volumes.create("s", options=options)
        key = DiskKey(b"correct horse battery staple")
        volume = volumes.create("s", options=options, key=key)
        path = Path(volumes.open("s").path)
        (path / "f").write_text("plain text that nobody may read" * 100)
        volumes.close("s")
        assert not path.exists()
        holder = Path(volume.path).parent.parent
        stored = b"".join(p.read_bytes() for p in holder.rglob("*") if p.is_file())
        assert b"nobody may read" not in stored and b"battery" not in stored
        assert b"battery" not in (hutch_root / "hutch.db").read_bytes()
        again = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
        with pytest.raises(WrongState, match="key is not at hand"):
            again.open("s")
        with pytest.raises(Denied, match="does not open it"):
            again.open("s", key=DiskKey(b"wrong"))
        assert not path.exists()
        assert Path(again.open("s", key=key).path, "f").read_text().startswith("plain text")
        again.close("s")
        again.grow("s", 80 * MIB)
        assert Path(again.open("s").path, "f").read_text().startswith("plain text")
        assert os.statvfs(path).f_blocks * os.statvfs(path).f_frsize > 64 * MIB
        again.close("s")
    finally:
        clear(volumes)


@_IMAGES
@pytest.mark.integration
def test_an_image_is_closed_after_its_last_use(hutch_root: Path) -> None:
    volumes = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
    try:
        volumes.pools.create("p", "qcow2")
        volumes.create("v", options={"pool": "p", "size": "64M"})
        path = Path(volumes.open("v", "one").path)
        volumes.open("v", "two")
        volumes.open("v")
        volumes.close("v", "one")
        assert path.is_dir()
        volumes.close("v")  # by hand: the other goes on
        assert path.is_dir()
        volumes.open("v")
        volumes.close("v", "two")  # the last instance
        assert not path.exists()
        volumes.open("v", "gone")
        volumes.reconcile(["gone"], running=[])
        assert not path.exists()
    finally:
        clear(volumes)


@_IMAGES
@pytest.mark.integration
def test_an_image_whose_server_was_killed_opens_again(hutch_root: Path) -> None:
    import select
    import signal

    volumes = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
    try:
        volumes.pools.create("p", "qcow2")
        volumes.create("v", options={"pool": "p", "size": "64M"})
        path = Path(volumes.open("v").path)
        (path / "f").write_text("kept")
        fd = os.open(path / "f", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue  # it has ended meanwhile
            if b"qemu-storage-daemon" in command and str(hutch_root).encode() in command:
                pidfd = os.pidfd_open(int(process.name))
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                assert select.select([pidfd], [], [], 60)[0]
                os.close(pidfd)
        assert Path(volumes.open("v").path, "f").read_text() == "kept"
        volumes.close("v")
    finally:
        clear(volumes)


@requires("root", "loop")
@pytest.mark.integration
def test_a_file_that_is_mounted_elsewhere_is_not_grown(hutch_root: Path) -> None:
    volumes = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
    try:
        path = volumes.create("v", options={"size": "64M"}).path
        fd = os.open(path, os.O_RDONLY)
        try:
            with pytest.raises(Busy, match="in use"):
                volumes.grow("v", 96 * MIB)
        finally:
            os.close(fd)
        Path(volumes.open("v").path, "f").write_text("x")
        assert volumes.grow("v", 96 * MIB).options["size"] == str(96 * MIB)
    finally:
        clear(volumes)


@requires("root", "loop", "fuse", "qemu-img")
@pytest.mark.integration
def test_an_image_in_use_is_not_grown_and_goes_on_for_who_uses_it(hutch_root: Path) -> None:
    volumes = Volumes(hutch_root, Store.open(hutch_root / "hutch.db"))
    try:
        volumes.pools.create("p", "qcow2")
        volumes.create("v", options={"pool": "p", "size": "64M"})
        with open(f"{volumes.open('v').path}/f", "wb", buffering=0) as file:
            with pytest.raises(Busy, match="in use"):
                volumes.grow("v", 96 * MIB)
            file.write(b"still there")
            os.fsync(file.fileno())
        assert Path(volumes.open("v").path, "f").read_bytes() == b"still there"
        assert volumes.grow("v", 96 * MIB).options["size"] == str(96 * MIB)
        assert Path(volumes.open("v").path, "f").read_bytes() == b"still there"
        volumes.close("v")
    finally:
        clear(volumes)


@quick_forms
@pytest.mark.integration
def test_a_copy_that_fails_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    volumes, copies = rig.volumes, rig.copies

    @contextmanager
    def fail(**_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(rig.records, "write", fail)
        for act in (
            lambda: copies.snapshot("data", "s"),
            lambda: copies.clone("data", "twin"),
        ):
            with pytest.raises(Exception, match="space"):
                act()
    assert copies.list("data") == [] and [v.name for v in volumes.list()] == ["data"]
    copies.snapshot("data", "s")
    copies.clone("data", "twin", snapshot="s")
