"""Writable disks: sparse, whole, grown, and told when there is no room for them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.errors import InvalidArgument, NotFound, Unsupported, WrongState
from hutch.storage.disks import DEFAULT_SIZE, Disks, check_size
from hutch.storage.snapshots import DISK_FILE, Snapshots
from hutch.storage.sparse import copy_sparse
from hutch.store.database import Store
from tests.requires import requires

MIB = 1 << 20


@pytest.fixture
def disks(hutch_root: Path) -> Disks:
    return Disks(hutch_root)


def checked(path: str) -> str:
    """Have e2fsck look at a file system, and list its root."""
    subprocess.run(["/sbin/e2fsck", "-f", "-n", path], check=True, capture_output=True)
    listing = subprocess.run(
        ["/sbin/debugfs", "-R", "ls -l /", path], check=True, capture_output=True, text=True
    )
    return listing.stdout


@requires("mke2fs")
@pytest.mark.parametrize("size", [64 * MIB, 700 * MIB, DEFAULT_SIZE])
def test_a_disk_is_an_empty_file_system_with_upper_and_work(
    disks: Disks, tmp_path: Path, size: int
) -> None:
    made = disks.create(str(tmp_path / "disk"), size)
    assert made.size == size == os.path.getsize(made.path)
    assert made.allocated < 8 * MIB
    listing = [line.split() for line in checked(made.path).splitlines() if line.strip()]
    found = {words[-1]: words[1:5] for words in listing}
    assert {".", "..", "lost+found", "upper", "work"} == set(found)
    assert found["upper"] == ["40755", "(2)", "0", "0"]


@requires("mke2fs")
def test_disks_of_a_size_do_not_know_each_other(disks: Disks, tmp_path: Path) -> None:
    one, two = (disks.create(str(tmp_path / name), 64 * MIB) for name in "ab")
    subprocess.run(
        ["/sbin/debugfs", "-w", "-R", "mkdir upper/x", one.path], check=True, capture_output=True
    )
    assert Path(one.path).read_bytes() != Path(two.path).read_bytes()
    checked(two.path)


@requires("mke2fs")
def test_a_disk_that_is_there_is_left_alone(disks: Disks, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"precious")
    with pytest.raises(WrongState, match="is there already"):
        disks.create(str(tmp_path / "disk"), 64 * MIB)
    assert (tmp_path / "disk").read_bytes() == b"precious"


@pytest.mark.parametrize("size", [0, -1, 64 * MIB - 1, (16 << 40) + 1])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidArgument, match="disk: expected a size between"):
        check_size(size)


def test_a_size_is_rounded_up() -> None:
    assert check_size(64 * MIB + 1) == 65 * MIB


@requires("mke2fs")
def test_threads_that_make_the_first_disk_of_a_size(disks: Disks, tmp_path: Path) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(
            target=lambda n=n: found.append(disks.create(str(tmp_path / f"disk{n}"), 80 * MIB).size)
        )
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [80 * MIB] * 6


@requires("mke2fs")
def test_a_disk_grows_with_its_content(disks: Disks, tmp_path: Path) -> None:
    disk = disks.create(str(tmp_path / "disk"), 64 * MIB)
    subprocess.run(
        ["/sbin/debugfs", "-w", "-R", "mkdir upper/kept", disk.path],
        check=True,
        capture_output=True,
    )
    grown = disks.grow(disk.path, 300 * MIB)
    assert grown.size == 300 * MIB
    assert "upper" in checked(disk.path)
    header = subprocess.run(
        ["/sbin/dumpe2fs", "-h", disk.path], check=True, capture_output=True, text=True
    ).stdout
    fields = dict(line.split(":", 1) for line in header.splitlines() if ":" in line)
    assert int(fields["Block count"]) * int(fields["Block size"]) == 300 * MIB


@requires("mke2fs")
def test_a_disk_does_not_shrink(disks: Disks, tmp_path: Path) -> None:
    disk = disks.create(str(tmp_path / "disk"), 128 * MIB)
    with pytest.raises(InvalidArgument, match="disk: a disk cannot shrink"):
        disks.grow(disk.path, 64 * MIB)


def test_a_disk_that_is_not_there_is_told(disks: Disks, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        disks.grow(str(tmp_path / "none"), 64 * MIB)


def test_without_e2fsprogs_the_package_is_named(
    disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hutch.host.programs.find_program", lambda _: None)
    with pytest.raises(Unsupported) as told:
        disks.create(str(tmp_path / "disk"), 64 * MIB)
    assert told.value.hint == "apt-get install e2fsprogs"
    assert not (tmp_path / "disk").exists()


@requires("mke2fs")
def test_what_an_instance_wrote_to_its_disk_counts(disks: Disks, hutch_root: Path) -> None:
    store = Store.open(hutch_root / "hutch.db")
    snapshots = Snapshots(hutch_root, store)
    place = Path(snapshots.directory("box"))
    (place / "upper").mkdir(parents=True)
    disk = disks.create(str(place / DISK_FILE), 64 * MIB)
    assert snapshots.usage("box").bytes == disk.allocated
    store.close()


ON_A_FULL_DISK = """
import os, sys
from hutch.errors import Exhausted
from hutch.linux.mount import mount
from hutch.storage.disks import Disks
os.chdir(sys.argv[1])
for size, cache in (("100k", "root"), ("200k", ".")):
    mount("tmpfs", "full", "tmpfs", 0, f"size={size}")
    os.chdir("full")
    disks = Disks(os.path.abspath(cache) if cache == "root" else sys.argv[1] + "/warm")
    try:
        disks.create(os.path.abspath("disk.raw"), 64 << 20)
    except Exhausted as exc:
        print(exc.message)
    print([f for _, _, files in os.walk(".") for f in files])
    os.chdir(sys.argv[1])
"""


@requires("root", "mke2fs")
@pytest.mark.integration
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    Disks(tmp_path / "warm").create(str(tmp_path / "first"), 64 * MIB)
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "disk of 67108864 bytes: no space left on device",
        "[]",
        f"disk {tmp_path}/full/disk.raw: no space left on device",
        "[]",
    ], done.stderr


# ---- sparse copies ---------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64), st.binary(min_size=1, max_size=9)), max_size=8))
def test_a_copy_has_the_same_bytes_and_holes(pieces: list[tuple[int, bytes]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        source, target = f"{directory}/source", f"{directory}/target"
        with open(source, "wb") as file:
            file.truncate(80 * 65536)
            for block, data in pieces:
                file.seek(block * 65536)
                file.write(data)
        assert copy_sparse(source, target) == 80 * 65536
        assert Path(source).read_bytes() == Path(target).read_bytes()
        assert os.stat(target).st_blocks <= os.stat(source).st_blocks


def test_a_copy_takes_no_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        copy_sparse(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b"b"


@requires("mke2fs")
def test_empty_disks_that_nobody_uses_any_more_are_forgotten(disks: Disks, tmp_path: Path) -> None:
    used, old = disks.empty(64 * MIB), disks.empty(65 * MIB)
    abandoned = f"{disks.empty(66 * MIB)}.tmp"
    os.rename(abandoned.removesuffix(".tmp"), abandoned)
    other = Path(used).with_name("facts.json")
    other.write_text("{}")
    for path, days in ((used, 1), (old, 8), (abandoned, 8), (str(other), 8)):
        status = os.stat(path)
        os.utime(path, ns=(status.st_atime_ns - days * 86400 * 10**9, status.st_mtime_ns))
    assert disks.forget() > 0
    assert os.path.exists(used)
    assert not os.path.exists(old)
    assert not os.path.exists(abandoned)
    assert other.exists()
    changed = os.stat(used).st_mtime_ns
    disks.empty(64 * MIB)
    assert disks.forget(all_sizes=True) == 0  # somebody may be about to copy it
    assert os.stat(used).st_mtime_ns == changed
    os.utime(used, ns=(0, changed))
    assert disks.forget(all_sizes=True) > 0
    assert not os.path.exists(used)
    disks.create(str(tmp_path / "disk"), 64 * MIB)
