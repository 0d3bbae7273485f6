"""Seals: a file that was changed is told before it is used, by its digest or by the kernel."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import IntegrityError
from hutch.storage import sealing
from hutch.storage.filemounts import mount_file, unmount_file
from hutch.storage.sealing import Seal, check_seal, is_as_sealed, make_seal
from tests.requires import requires

PIECE = 4 << 20
CONTENT = b"one block of many " * 40_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


def check(path: Path, seal: Seal) -> Seal:
    return check_seal(str(path), seal, what="disk", hint="make it anew")


def test_a_file_that_nobody_touched_is_not_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = make_seal(str(file))

    def fail(_: int) -> str:
        raise AssertionError("it was read")

    monkeypatch.setattr(sealing, "_pieces", fail)
    assert check(file, seal) == seal


def test_a_changed_byte_is_told(file: Path) -> None:
    seal = make_seal(str(file))
    times = file.stat()
    with open(file, "r+b") as changed:
        changed.seek(12345)
        changed.write(b"X")
    # Whoever sets the times back changes another one.
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(IntegrityError, match="disk: its content has changed") as caught:
        check(file, seal)
    assert caught.value.hint == "make it anew"


def test_a_file_that_was_touched_only_gets_a_new_stamp(file: Path) -> None:
    seal = make_seal(str(file))
    os.utime(file)
    again = check(file, seal)
    assert again.pieces == seal.pieces and again.stamp != seal.stamp
    assert check(file, again) == again
    unstamped = Seal(pieces=seal.pieces)
    assert check(file, unstamped).stamp == again.stamp


def test_a_seal_of_the_whole_files_digest_still_counts(file: Path) -> None:
    seal = Seal(sha256=hashlib.sha256(CONTENT).hexdigest())
    assert check(file, seal).stamp and is_as_sealed(str(file), seal)
    with open(file, "ab") as changed:
        changed.write(b"X")
    assert not is_as_sealed(str(file), seal)
    with pytest.raises(IntegrityError):
        check(file, seal)


@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE, 2 * PIECE, 2 * PIECE + 4])
def test_a_byte_of_any_piece_counts(tmp_path: Path, at: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"piece" * (2 * PIECE // 5 + 2))
    seal = make_seal(str(path))
    assert is_as_sealed(str(path), seal)
    with open(path, "r+b") as changed:
        changed.seek(at)
        changed.write(b"X")
    assert not is_as_sealed(str(path), seal)


def test_pieces_that_change_places_count(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * PIECE + b"b" * PIECE)
    seal = make_seal(str(path))
    path.write_bytes(b"b" * PIECE + b"a" * PIECE)
    assert not is_as_sealed(str(path), seal)


def test_one_processor_makes_the_same_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(3 * PIECE + 5))
    seal = make_seal(str(path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert make_seal(str(path)).pieces == seal.pieces
    content = path.read_bytes()
    pieces = (content[at : at + PIECE] for at in range(0, len(content), PIECE))
    whole = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert seal.pieces == hashlib.sha256(whole).hexdigest()


@pytest.fixture
def checked_file_system(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system whose kernel checks files, mounted, and the file that it is in."""
    image, point = tmp_path / "ext4.raw", tmp_path / "mounted"
    image.touch()
    os.truncate(image, 64 << 20)
    make = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "verity", str(image)]
    subprocess.run(make, check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    point.mkdir()
    mount_file(str(image), str(point), "ext4")
    yield point, image
    unmount_file(str(point))


@requires("root", "loop", "mke2fs", "fs-verity")
@pytest.mark.integration
def test_where_the_kernel_checks_a_changed_block_cannot_be_read(
    checked_file_system: tuple[Path, Path],
) -> None:
    point, image = checked_file_system
    path = point / "disk"
    path.write_bytes(CONTENT)
    seal = make_seal(str(path))
    assert seal.verity.startswith("sha256:")
    with pytest.raises(OSError):
        path.open("r+b")
    assert check(path, seal) == seal

    # Another file in its place is told at once.
    path.rename(point / "kept")
    path.write_bytes(CONTENT.replace(b"many", b"MANY"))
    with pytest.raises(IntegrityError, match="kernel measures nothing"):
        check(path, seal)
    path.unlink()
    (point / "kept").rename(path)

    # A byte that turns on the disk, behind the kernel's back.
    unmount_file(str(point))
    stored = image.read_bytes()
    at = stored.index(CONTENT[:4096])
    with open(image, "r+b") as changed:
        changed.seek(at + 4096 * 3)
        changed.write(b"X")
    mount_file(str(image), str(point), "ext4")
    assert check(path, seal) == seal
    with pytest.raises(OSError, match="Input/output"):
        path.read_bytes()
