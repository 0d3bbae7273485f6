"""An image as one read-only disk: what overlayfs would show, made once, gone with the image."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hutch.errors import IntegrityError, NotFound, Unsupported
from hutch.process import run
from hutch.records import Transaction
from hutch.storage import merging, rootdisk
from hutch.storage.content import ContentStore
from hutch.storage.gc import Collector
from hutch.storage.layers import Layers
from hutch.storage.leases import Leases
from hutch.storage.merged import open_merged
from hutch.storage.rootdisk import RootDisk, RootDisks, disk_key
from hutch.storage.snapshots import OverlayAssets, Snapshots
from hutch.storage.tarwrite import header
from hutch.storage.trash import Trash
from hutch.storage.volumes import Volumes
from hutch.store.database import Store
from tests.requires import requires
from tests.storage.tars import directory, end, file, hard_link, symlink

NOTE = {b"SCHILY.xattr.user.note": b"kept"}
LOW = (
    directory("etc")
    + file("etc/gone", b"x")
    + file("etc/kept", b"old", uid=7, gid=8, mode=0o640, mtime=1000)
    + directory("var", mode=0o1777, uid=3)
    + file("var/old", b"x")
    + file("bin/tool", b"tool" * 5000, mode=0o4755, pax=NOTE)
    + hard_link("bin/twin", "bin/tool")
    + symlink("lib", "usr/lib")
    + header(b"dev/null", b"3", mode=0o666, device=(1, 3))
    + header(b"dev/pipe", b"6", mode=0o600)
    + file("empty")
    + end()
)
HIGH = (
    file("etc/.wh.gone")
    + file("etc/kept", b"new", uid=7, gid=9, mtime=2000)
    + file("var/.wh..wh..opq")
    + file("var/new", b"x", mtime=3000)
    + symlink("link", "nowhere/at/all")
    + file("deep/" * 40 + "file", b"deep")
    + end()
)


class Stored:
    """Layers of an image of one and of two, and their disks."""

    def __init__(self, root: Path, low: bytes = LOW) -> None:
        self.root = root
        self.trash = Trash(root)
        self.layers = Layers(root, trash=self.trash)
        lowest = self.layers.unpack(io.BytesIO(low)).chain_id
        high = self.layers.unpack(io.BytesIO(HIGH), parent_chain_id=lowest).chain_id
        self.one, self.two = [lowest], [lowest, high]
        self.disks = RootDisks(root, self.layers, trash=self.trash)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.root / "rootdisks"))


@pytest.fixture
def stored(hutch_root: Path) -> Iterator[Stored]:
    stored = Stored(hutch_root)
    yield stored
    stored.trash.drain(10)


def tree(top: str) -> dict[str, Any]:
    """Describe everything beneath a directory; names of one file share its first name."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for at, directories, files in os.walk(top):
        directories.sort()
        for path in (at, *(os.path.join(at, n) for n in (*directories, *sorted(files)))):
            status = os.lstat(path)
            name = os.path.relpath(path, top)
            plain = stat.S_ISREG(status.st_mode)
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            found[name] = (
                *(status.st_mode, status.st_uid, status.st_gid, status.st_rdev),
                status.st_mtime_ns,
                status.st_nlink if plain else 0,
                first.setdefault(status.st_ino, name) if plain else "",
                hashlib.sha256(Path(path).read_bytes()).digest() if plain else b"",
                os.readlink(path) if stat.S_ISLNK(status.st_mode) else "",
                sorted(attributes.items()),
            )
    return found


@contextmanager
def mounted(path: str, target: Path) -> Iterator[str]:
    target.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", path, str(target)], check=True)
    try:
        yield str(target)
    finally:
        subprocess.run(["umount", str(target)], check=True)


@contextmanager
def merged(stored: Stored, chain_ids: list[str]) -> Iterator[str]:
    lower = stored.layers.lower(chain_ids)
    if len(lower) == 1:
        yield lower[0]
        return
    fd = open_merged(OverlayAssets(lower=lower[1:], upper=lower[0], work=""))
    try:
        yield f"/proc/self/fd/{fd}/."
    finally:
        os.close(fd)


def linked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "use_mounted", lambda *_: False)


@requires("root", "overlayfs", "erofs")
@pytest.mark.integration
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("way", ["mounted", "linked"])
def test_the_disk_holds_what_overlayfs_shows(
    stored: Stored, tmp_path: Path, layers: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "linked":
        linked(monkeypatch)
    chain = stored.two[:layers]
    path = stored.disks.ensure(chain)
    stored.trash.drain(10)  # or the links that it made would count
    with mounted(path, tmp_path / "disk") as disk, merged(stored, chain) as shown:
        found = tree(disk)
        assert found == tree(shown)
    assert ("etc/gone" in found) == (layers == 1)
    assert ("var/old" in found) == (layers == 1)
    assert found["bin/twin"][6] == "bin/tool"
    assert found["bin/tool"][9] == [("user.note", b"kept")]
    assert stored.names() == [chain[-1].removeprefix("sha256:")]


@requires("root", "overlayfs", "erofs")
@pytest.mark.integration
@pytest.mark.parametrize("layers", [1, 2])
def test_layers_without_attributes_are_not_asked_for_them(
    hutch_root: Path, tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = file("etc/gone", b"x") + file("bin/tool", b"tool", mode=0o755, uid=5) + end()
    stored = Stored(hutch_root, low)
    commands = []
    real = run.run_command

    def noted(argv: list[str], **options: Any) -> Any:
        commands.append(argv)
        return real(argv, **options)

    monkeypatch.setattr(run, "run_command", noted)
    chain = stored.two[:layers]
    path = stored.disks.ensure(chain)
    stored.trash.drain(10)
    assert "-x-1" in commands[0]
    with mounted(path, tmp_path / "disk") as disk, merged(stored, chain) as shown:
        assert tree(disk) == tree(shown)


@requires("root", "overlayfs", "erofs")
@pytest.mark.integration
def test_what_is_taken_away_and_was_never_there_is_not_there(
    hutch_root: Path, tmp_path: Path
) -> None:
    stored = Stored(hutch_root, file("bin/tool", b"tool") + end())
    path = stored.disks.ensure(stored.two)
    stored.trash.drain(10)
    with mounted(path, tmp_path / "disk") as disk:
        assert os.listdir(f"{disk}/etc") == ["kept"]
        assert sorted(os.listdir(disk)) == ["bin", "deep", "etc", "link", "var"]


@requires("root", "overlayfs", "mkfs.erofs")
@pytest.mark.parametrize("layers", [1, 2])
def test_the_same_layers_give_the_same_bytes(stored: Stored, layers: int) -> None:
    chain = stored.two[:layers]
    digests = []
    for _ in range(2):
        digests.append(hashlib.sha256(Path(stored.disks.ensure(chain)).read_bytes()).digest())
        stored.disks.remove(chain[-1])
    assert digests[0] == digests[1]


@requires("root", "overlayfs", "mkfs.erofs")
def test_a_disk_is_made_once_by_whoever_comes_first(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real: Callable[..., None] = rootdisk._mkfs

    def counted(*arguments: str) -> None:
        made.append(arguments[-1])
        real(*arguments)

    monkeypatch.setattr(rootdisk, "_mkfs", counted)
    paths: list[str] = []
    threads = [
        threading.Thread(target=lambda: paths.append(stored.disks.ensure(stored.two)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [stored.disks.path(stored.two)] * 5
    assert len(made) == 1


RACE = """
import sys
from hutch.storage.layers import Layers
from hutch.storage.rootdisk import RootDisks
disks = RootDisks(sys.argv[1], Layers(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(disks.ensure(sys.argv[2:]))
"""


@requires("mkfs.erofs", "root", "overlayfs")
def test_processes_that_race_get_the_same_disk(stored: Stored) -> None:
    argv = [sys.executable, "-c", RACE, str(stored.root), *stored.two]
    running = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n", timeout=60)[0].strip() for process in running]
    assert outputs == [stored.disks.path(stored.two)] * 3
    assert stored.names() == [stored.two[-1].removeprefix("sha256:")]


IN_NAMESPACE = """
import sys
from hutch.storage.layers import Layers
from hutch.storage.rootdisk import RootDisks
layers = Layers(sys.argv[1])
low = layers.unpack(open(sys.argv[2], "rb")).chain_id
high = layers.unpack(open(sys.argv[3], "rb"), parent_chain_id=low).chain_id
print(RootDisks(sys.argv[1], layers).ensure([low, high]))
"""


@requires("root", "userns", "overlayfs", "erofs")
@pytest.mark.integration
def test_root_of_a_user_namespace_makes_a_disk(tmp_path: Path) -> None:
    high = file("var/.wh..wh..opq") + file("var/new") + file("etc/.wh.gone") + end()
    low = directory("var") + file("var/old") + file("etc/gone") + file("etc/kept") + end()
    (tmp_path / "low").write_bytes(low)
    (tmp_path / "high").write_bytes(high)
    (tmp_path / "root").mkdir()
    arguments = [str(tmp_path / name) for name in ("root", "low", "high")]
    done = subprocess.run(
        ["unshare", "-U", "-r", sys.executable, "-c", IN_NAMESPACE, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with mounted(done.stdout.strip(), tmp_path / "disk") as disk:
        assert sorted(tree(disk)) == [".", "etc", "etc/kept", "var", "var/new"]


def test_without_erofs_utils_the_package_is_named(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hutch.host.programs.find_program", lambda _: None)
    with pytest.raises(Unsupported) as told:
        stored.disks.ensure(stored.one)
    assert told.value.hint == "apt-get install erofs-utils"


@requires("mkfs.erofs")
def test_a_layer_that_is_not_there_is_told(stored: Stored) -> None:
    with pytest.raises(NotFound, match="not unpacked"):
        stored.disks.ensure(["sha256:" + "1" * 64])


@requires("mkfs.erofs")
def test_a_disk_that_was_changed_is_not_used(stored: Stored) -> None:
    path = stored.disks.ensure(stored.two)
    os.utime(path)
    assert stored.disks.ensure(stored.two) == path
    with open(path, "r+b") as changed:
        changed.seek(2048)
        changed.write(b"X")
    with pytest.raises(IntegrityError, match="content has changed"):
        stored.disks.ensure(stored.two)
    stored.disks.remove(stored.two[-1])
    assert stored.disks.ensure(stored.two) == path


def test_an_image_of_no_layers_has_a_disk(stored: Stored) -> None:
    assert os.path.getsize(stored.disks.ensure([])) > 0


ON_A_FULL_DISK = """
import io, os, sys
from hutch.errors import Exhausted
from hutch.linux.mount import mount
from hutch.storage.layers import Layers
from hutch.storage.rootdisk import RootDisks
from tests.storage.tars import end, file
mount("tmpfs", sys.argv[1], "tmpfs", 0, "size=12m")
layers = Layers(sys.argv[1])
layer = layers.unpack(io.BytesIO(file("big", os.urandom(8 << 20)) + end()))
disks = RootDisks(sys.argv[1], layers)
try:
    disks.ensure([layer.chain_id])
except Exhausted as exc:
    print(exc.message)
disks._trash.drain()
print(os.listdir(sys.argv[1] + "/rootdisks"), os.listdir(sys.argv[1] + "/trash"))
"""


@requires("root", "mkfs.erofs")
@pytest.mark.integration
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert "no space left on device" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("[] []\n")


@requires("mkfs.erofs")
def test_what_a_killed_process_left_goes(stored: Stored) -> None:
    place = Path(stored.disks.ensure(stored.one)).parent
    unfinished = place.parent / f".{'2' * 64}.tmp"
    shutil.copytree(place, unfinished)
    assert stored.disks.reconcile() == ()
    assert stored.names() == [place.name]


@requires("mkfs.erofs")
def test_a_disk_not_safe_before_a_reboot_is_made_again(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.disks.ensure(stored.one)
    monkeypatch.setattr(rootdisk, "boot_id", lambda: "another")
    assert stored.disks.reconcile() == (stored.one[-1],)
    stored.disks.ensure(stored.one)
    assert stored.disks.sync() == 1
    assert stored.disks.sync() == 0
    monkeypatch.undo()
    assert stored.disks.reconcile() == ()
    assert isinstance(stored.disks.get(stored.one[-1]), RootDisk)


@requires("mkfs.erofs")
def test_a_disk_lives_as_long_as_something_names_it(stored: Stored) -> None:
    store = Store.open(stored.root / "hutch.db")
    named: set[str] = set()

    def roots(_: Transaction) -> set[str]:
        return named

    content = ContentStore(stored.root, durable=False)
    collector = Collector(store, content, stored.layers, stored.trash, roots, disks=stored.disks)
    snapshots = Snapshots(stored.root, store, layers=stored.layers, trash=stored.trash)
    chain = stored.one
    stored.disks.ensure(chain)
    os.utime(stored.disks.path(chain))
    named |= {chain[-1], disk_key(chain)}
    assert collector.collect().disks == ()
    usage = collector.usage(snapshots, Volumes(stored.root, store, trash=stored.trash))
    assert usage.disks.total == usage.disks.active == 1
    named.clear()
    snapshots.prepare("box", chain)
    assert collector.collect().disks == ()
    snapshots.remove("box")
    with Leases(store).hold(chain[-1]):
        assert collector.collect().disks == ()
    freed = collector.collect()
    assert freed.disks == (chain[-1],)
    assert freed.bytes > 0
    assert not stored.disks.has(chain)
    store.close()
