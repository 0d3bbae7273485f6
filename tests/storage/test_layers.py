"""Unpacked layers: whole or not at all, whoever dies; snapshots over them."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hutch.errors import IntegrityError, NotFound
from hutch.storage import tree
from hutch.storage.layers import Layer, Layers, chain_id_of
from hutch.storage.merged import open_merged
from hutch.storage.snapshots import Snapshots
from hutch.storage.trash import Trash
from hutch.store.database import Store
from tests.requires import requires
from tests.storage.tars import directory, end, file


def diff_id(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


ONE = directory("tmp", mode=0o1777) + file("tmp/a", b"one") + file("etc/x", b"x") + end()
TWO = file("tmp/b", b"two") + file(".wh.etc") + end()


@pytest.fixture
def layers(hutch_root: Path) -> Layers:
    return Layers(hutch_root)


def both(layers: Layers) -> tuple[Layer, Layer]:
    first = layers.unpack(io.BytesIO(ONE), diff_id=diff_id(ONE))
    second = layers.unpack(io.BytesIO(TWO), diff_id=diff_id(TWO), parent_chain_id=first.chain_id)
    return first, second


def test_a_layer_appears_under_its_chain_id(layers: Layers) -> None:
    first, second = both(layers)
    assert first.chain_id == first.diff_id == diff_id(ONE)
    assert second.chain_id == chain_id_of(first.chain_id, diff_id(TWO))
    assert Path(layers.path(first.chain_id), "tmp/a").read_bytes() == b"one"
    assert [layer.chain_id for layer in layers.list()] == sorted([first.chain_id, second.chain_id])
    assert layers.lower([first.chain_id, second.chain_id]) == (
        layers.path(second.chain_id),
        layers.path(first.chain_id),
    )


def test_a_layer_there_already_is_not_unpacked_but_its_stream_is_read(layers: Layers) -> None:
    both(layers)
    stream = io.BytesIO(b"this would be no tar at all")
    layers.unpack(stream, diff_id=diff_id(ONE))
    assert stream.read() == b""


def test_a_bad_layer_leaves_nothing(layers: Layers, hutch_root: Path) -> None:
    with pytest.raises(IntegrityError):
        layers.unpack(io.BytesIO(TWO), diff_id=diff_id(ONE))
    assert list(layers.list()) == []
    assert os.listdir(hutch_root / "layers") == []


def test_a_missing_layer_is_not_found_by_a_start(layers: Layers) -> None:
    with pytest.raises(NotFound, match="not unpacked"):
        layers.lower([diff_id(ONE)])


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@requires("root")
def test_a_directory_not_described_looks_as_below_whichever_comes_first(
    layers: Layers, hutch_root: Path
) -> None:
    chain = [diff_id(ONE), chain_id_of(diff_id(ONE), diff_id(TWO))]
    layers.unpack(io.BytesIO(TWO), diff_id=diff_id(TWO), parent_chain_id=chain[0])
    assert mode(layers.path(chain[1]) + "/tmp") == 0o755
    layers.unpack(io.BytesIO(ONE), diff_id=diff_id(ONE))
    layers.settle(chain)
    assert mode(layers.path(chain[1]) + "/tmp") == 0o1777
    layers.settle(chain)
    other = Layers(hutch_root / "other")
    both(other)
    assert mode(other.path(chain[1]) + "/tmp") == 0o1777


def test_layers_unpack_in_parallel(layers: Layers) -> None:
    tars = [file(f"f{i}", os.urandom(200_000)) + end() for i in range(8)]
    threads = [
        threading.Thread(
            target=layers.unpack, args=(io.BytesIO(tar),), kwargs={"diff_id": diff_id(tar)}
        )
        for tar in tars * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {layer.diff_id for layer in layers.list()} == {diff_id(tar) for tar in tars}


def test_a_removed_layer_is_gone_at_once(layers: Layers, hutch_root: Path) -> None:
    first, _ = both(layers)
    assert layers.remove(first.chain_id) and not layers.has(first.chain_id)
    assert not layers.remove(first.chain_id)
    trash = Trash(hutch_root)
    trash.empty()


def test_layers_of_an_earlier_boot_that_may_be_incomplete_go(
    layers: Layers, hutch_root: Path
) -> None:
    first, second = both(layers)
    assert layers.sync() == 2 and layers.sync() == 0
    for layer in (first, second):
        description = Path(layers.path(layer.chain_id)).parent / "layer.json"
        text = description.read_text().replace(layer.boot_id, "another-boot")
        description.write_text(text)
    (Path(layers.path(second.chain_id)).parent / "synced").unlink()
    assert layers.reconcile() == (second.chain_id,)
    assert layers.has(first.chain_id) and not layers.has(second.chain_id)


UNPACK = """
import sys, io
from hutch.storage import tree
from hutch.storage.layers import Layers
print("start", flush=True)
layer = Layers(sys.argv[1]).unpack(open(sys.argv[2], "rb"), diff_id=sys.argv[3])
print(layer.entries, flush=True)
"""


def start_unpack(root: Path, tar: Path, diff: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", UNPACK, str(root), str(tar), diff],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_two_processes_unpack_one_layer_once(hutch_root: Path, tmp_path: Path) -> None:
    data = b"".join(file(f"d{i % 50}/f{i}", b"x" * 100) for i in range(500)) + end()
    tar = tmp_path / "layer.tar"
    tar.write_bytes(data)
    running = [start_unpack(hutch_root, tar, diff_id(data)) for _ in range(2)]
    assert [process.communicate()[0] for process in running] == [b"start\n500\n"] * 2
    assert len(list(Layers(hutch_root).list())) == 1
    assert [n for n in os.listdir(hutch_root / "layers") if n.startswith(".")] == []


HALF = """
import sys
from hutch.storage.layers import Layers
class Half:
    left = int(sys.argv[2])
    def read(self, size):
        if not self.left:
            print("half", flush=True)
            sys.stdin.read()
        data = sys.stdin.buffer.read(min(size, self.left))
        self.left -= len(data)
        return data
Layers(sys.argv[1]).unpack(Half(), diff_id=sys.argv[3])
"""


def test_a_killed_unpack_leaves_no_layer_and_reconcile_cleans(hutch_root: Path) -> None:
    data = b"".join(file(f"f{i}", b"x" * 1000) for i in range(2000)) + end()
    half = data[: len(data) // 2]
    command = [sys.executable, "-c", HALF, str(hutch_root), str(len(half)), diff_id(data)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(half)
        process.stdin.flush()
        assert process.stdout.readline() == b"half\n"
        process.kill()
    directory = hutch_root / "layers"
    assert len(list(directory.glob(".*.tmp"))) == 1
    layers = Layers(hutch_root)
    assert list(layers.list()) == []
    layers.reconcile()
    assert os.listdir(directory) == []
    layers.unpack(io.BytesIO(data), diff_id=diff_id(data))


# ---- snapshots ---------------------------------------------------------------------------


@pytest.fixture
def store(hutch_root: Path) -> Store:
    return Store.open(hutch_root / "hutch.db")


@requires("root", "overlayfs")
@pytest.mark.integration
def test_a_snapshot_mounts_over_its_layers(layers: Layers, hutch_root: Path, store: Store) -> None:
    chain = [layer.chain_id for layer in both(layers)]
    snapshots = Snapshots(hutch_root, store, layers=layers)
    assets = snapshots.prepare("one", chain)
    assert snapshots.get("one") == snapshots.load("one", chain) == assets
    fd = open_merged(assets, read_only=False)
    try:
        assert [entry.name for entry in tree.list_directory(fd, "/")] == ["tmp"]
        inside = os.open("tmp/new", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd)
        os.write(inside, b"x" * 10_000)
        os.close(inside)
    finally:
        os.close(fd)
    assert os.listdir(Path(assets.upper, "tmp")) == ["new"]
    usage = snapshots.usage("one")
    assert usage.inodes == 2 and usage.bytes >= 10_000
    again = open_merged(assets)
    assert [entry.name for entry in tree.list_directory(again, "/tmp")] == ["a", "b", "new"]
    os.close(again)
    snapshots.remove("one")
    snapshots.remove("one")
    assert not os.path.exists(assets.upper)
    with pytest.raises(NotFound):
        snapshots.get("one")


@requires("root")
def test_the_merged_root_looks_as_the_image_has_it(
    layers: Layers, hutch_root: Path, store: Store
) -> None:
    tar = directory("./", mode=0o700, uid=7, gid=8) + end()
    layer = layers.unpack(io.BytesIO(tar))
    assets = Snapshots(hutch_root, store).prepare("x", [layer.chain_id])
    found = os.stat(assets.upper)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o700, 7, 8)


def test_an_image_without_layers_has_an_empty_root(hutch_root: Path, store: Store) -> None:
    assets = Snapshots(hutch_root, store).prepare("x", ())
    assert os.listdir(assets.lower[0]) == []


def test_a_failed_prepare_records_nothing(hutch_root: Path, store: Store) -> None:
    snapshots = Snapshots(hutch_root, store)
    with pytest.raises(NotFound):
        snapshots.prepare("x", [diff_id(ONE)])
    with pytest.raises(NotFound, match="snapshot"):
        snapshots.get("x")


# ---- trash -------------------------------------------------------------------------------


def test_trash_goes_whatever_is_in_it(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    (victim / "link").symlink_to(outside)
    (victim / "closed").mkdir(mode=0)
    os.mkfifo(victim / "fifo")
    fd = os.open(victim, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("deep", dir_fd=fd)
        child = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(fd)
    trash = Trash(tmp_path)
    assert trash.discard(str(victim))
    assert trash.drain(30)
    assert os.listdir(tmp_path / "trash") == []
    assert os.listdir(outside) == ["keep"]
    assert not trash.discard(str(victim))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_where_nothing_can_be_moved_trees_are_removed_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(number, os.strerror(number), source)

    (tmp_path / "volumes/data/_data").mkdir(parents=True)
    (tmp_path / "volumes/data/_data/file").touch()
    trash = Trash(tmp_path)
    monkeypatch.setattr(os, "rename", full)
    assert trash.discard(str(tmp_path / "volumes/data"))
    assert os.listdir(tmp_path / "volumes") == []
    assert not trash.discard(str(tmp_path / "volumes/data"))


def test_leftover_trash_is_emptied_later(tmp_path: Path) -> None:
    (tmp_path / "trash/old/x").mkdir(parents=True)
    (tmp_path / "trash/file").touch()
    assert Trash(tmp_path).empty() == 2
    assert os.listdir(tmp_path / "trash") == []
