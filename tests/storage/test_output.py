"""Archives written where a user says: whole or not at all, and devices left what they are."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from hutch.errors import Exhausted, InvalidArgument
from hutch.linux import mount
from hutch.storage.output import new_directory, open_output
from tests.requires import requires


def test_a_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    with open_output(target) as stream:
        stream.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), open_output(target) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_link_goes_on_leading_where_it_led(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with open_output(tmp_path / "link") as stream:
        stream.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@requires("root")
def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    device = tmp_path / "null"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with open_output(device) as stream:
        stream.write(b"new")
    assert stat.S_ISCHR(os.stat(device).st_mode)


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    with open_output(pipe) as stream:
        stream.write(b"new")
    reader.join()
    assert got == [b"new"]
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


@pytest.mark.parametrize("name", ["missing/a.tar", "directory", "file/a.tar"])
def test_a_path_that_cannot_be_written_is_named_as_given(name: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument) as caught, open_output(tmp_path / name):
        pass
    assert str(caught.value).startswith(f"output: {tmp_path / name}: ")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


@requires("root")
def test_a_full_disk_is_told_and_nothing_stays(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount.mount("tmpfs", str(small), "tmpfs", 0, "size=64k")
    try:
        with (
            pytest.raises(Exhausted, match=str(small / "a.tar")) as caught,
            open_output(small / "a.tar") as stream,
        ):
            stream.write(bytes(1 << 20))
        assert caught.value.hint is not None
        with pytest.raises(Exhausted), new_directory(small / "layout") as directory:
            Path(directory, "blob").write_bytes(bytes(1 << 20))
        assert os.listdir(small) == []
    finally:
        mount.umount2(str(small), 0)


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "layout"
    target.mkdir()
    with new_directory(target) as directory:
        Path(directory, "index.json").write_bytes(b"{}")
        assert os.listdir(target) == []
    assert os.listdir(target) == ["index.json"]
    assert os.listdir(tmp_path) == ["layout"]


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InvalidArgument, match="not an empty directory"), new_directory(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["mine"]
