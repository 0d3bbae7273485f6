"""A disk that is several files: whole at every moment, shared without being written to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hutch.errors import IntegrityError
from hutch.storage.diskchain import (
    FEW,
    allocated,
    chain,
    copy_disk,
    ensure_one,
    freeze_disk,
    is_chain,
    link_disk,
    next_overlay,
    place_disk,
    virtual_size,
)
from hutch.storage.disks import Disks
from tests.requires import requires

pytestmark = requires("qemu-img")

MIB = 1 << 20
SIZE = 64 * MIB


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def disks(hutch_root: Path) -> Disks:
    return Disks(hutch_root)


@pytest.fixture
def place(hutch_root: Path) -> Path:
    """A directory with a disk: a letter for every MiB that was written, in three files."""
    directory = hutch_root / "disk"
    directory.mkdir()
    with open(directory / "disk.raw", "wb") as file:
        file.truncate(SIZE)
        file.write(b"a" * 20 * MIB)
    for number, letter in ((1, "b"), (12, "c")):
        path = directory / f"disk.{number}.qcow2"
        Disks(hutch_root).create_overlay(str(path), SIZE + number * MIB)
        write(directory, letter, number % 10)
    return directory


def node(files: list[str]) -> str:
    made: dict[str, object] = {}
    for path in files:
        file = {"driver": "file", "filename": path}
        made = {"driver": "qcow2", "file": file, "backing": made} if made else {"driver": "raw"}
        made["file"] = file
    return "json:" + json.dumps(made)


def write(directory: Path, letter: str, mib: int) -> None:
    """Write a MiB to the disk's topmost file."""
    command = f"write -P {ord(letter)} {mib}M 1M"
    subprocess.run(["qemu-io", "-c", command, node(chain(directory))], check=True)


def content(directory: Path) -> str:
    """Return the letters of the first MiBs of a disk."""
    target = directory / "content"
    target.unlink(missing_ok=True)
    copy_disk(directory, str(target))
    with open(target, "rb") as file:
        letters = "".join(chr(file.read(MIB)[0] or ord(".")) for _ in range(22))
    target.unlink()
    return letters


ALL = "abc" + "a" * 17 + ".."


def test_the_files_are_in_order_of_their_numbers(place: Path) -> None:
    assert [os.path.basename(path) for path in chain(place)] == [
        "disk.raw",
        "disk.1.qcow2",
        "disk.12.qcow2",
    ]
    assert is_chain(place)
    assert next_overlay(place) == f"{place}/disk.13.qcow2"
    assert virtual_size(place) == SIZE + 12 * MIB
    assert content(place) == ALL
    assert chain(place / "none") == []


def test_one_file_is_made_of_them(place: Path) -> None:
    os.link(place / "disk.raw", place.parent / "shared")
    ensure_one(place)
    assert os.listdir(place) == ["disk.raw"]
    assert virtual_size(place) == SIZE + 12 * MIB
    assert content(place) == ALL
    assert (place.parent / "shared").read_bytes()[:MIB] == b"a" * MIB
    ensure_one(place)
    assert content(place) == ALL


def failing_at(number: int, real: Callable[..., None], calls: list[str]) -> Callable[..., None]:
    """Return a call that ends the process when it is the one of that number."""

    def call(*args: str) -> None:
        if len(calls) == number:
            raise Crash
        calls.append(args[0])
        real(*args)

    return call


def test_a_process_that_ends_meanwhile_leaves_the_same_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        calls: list[str] = []
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink"):
                patch.setattr(os, name, failing_at(number, vars(os)[name], calls))
            try:
                ensure_one(place)
                done = True
            except Crash:
                done = False
        assert content(place) == ALL, number
        if done:
            break
    assert done and number > 3
    assert os.listdir(place) == ["disk.raw"]


def test_a_large_disk_is_shared_and_written_to_apart(place: Path, disks: Disks) -> None:
    twin = place.parent / "twin"
    twin.mkdir()
    place_disk(place, twin, disks)
    assert os.path.samefile(chain(twin)[0], chain(place)[0])
    assert [os.path.basename(path) for path in chain(twin)][-1] == "disk.13.qcow2"
    assert virtual_size(twin) == virtual_size(place)
    write(twin, "d", 4)
    assert (content(twin), content(place)) == ("abcad" + ALL[5:], ALL)
    assert allocated(twin) + allocated(place) < 35 * MIB  # the shared 23 MiB count once


def test_a_disk_at_rest_is_frozen_and_goes_on_on_an_overlay(place: Path, disks: Disks) -> None:
    ensure_one(place)
    kept = place.parent / "kept"
    kept.mkdir()
    freeze_disk(place, kept, disks)
    assert len(chain(place)) == 2 and os.path.samefile(chain(place)[0], chain(kept)[0])
    write(place, "e", 0)
    assert (content(place)[0], content(kept)[0]) == ("e", "a")


def test_a_small_disk_is_copied(hutch_root: Path, disks: Disks) -> None:
    for name in ("one", "two"):
        (hutch_root / name).mkdir()
    with open(hutch_root / "one" / "disk.raw", "wb") as file:
        file.truncate(SIZE)
        file.write(b"x" * (FEW // 2))
    place_disk(hutch_root / "one", hutch_root / "two", disks)
    freeze_disk(hutch_root / "two", hutch_root, disks)
    for name in ("one", "two", "."):
        assert os.stat(hutch_root / name / "disk.raw").st_nlink == 1


def test_an_overlay_that_names_another_file_is_not_read(place: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    top = chain(place)[-1]
    os.unlink(top)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", top],
        check=True,
    )
    with pytest.raises(IntegrityError, match="names another"):
        ensure_one(place)
    assert len(chain(place)) == 3


def test_links_that_cannot_all_be_made_are_taken_back(place: Path) -> None:
    target = place.parent / "target"
    target.mkdir()
    (target / "disk.12.qcow2").touch()
    with pytest.raises(FileExistsError):
        link_disk(chain(place), target)
    assert os.listdir(target) == ["disk.12.qcow2"]
