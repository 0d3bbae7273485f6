"""Files of /etc that a running instance has mounted: written anew, and never lost."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import etc
from hutch.engine.etc import write_in_place
from tests.requires import requires

OLD = b"127.0.0.1\tlocalhost\n"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.unit
@pytest.mark.parametrize("new", [OLD + b"172.18.0.2\tweb\n", b"::1\n", OLD, b"", bytes(10000)])
def test_a_file_stays_the_same_one_with_another_content(tmp_path: Path, new: bytes) -> None:
    hosts = tmp_path / "hosts"
    write_in_place(str(hosts), OLD)
    before = hosts.stat()
    write_in_place(str(hosts), new)
    assert (hosts.read_bytes(), hosts.stat().st_ino) == (new, before.st_ino)
    assert hosts.stat().st_mode & 0o777 == 0o644


@pytest.mark.unit
def test_a_file_system_that_promises_no_room_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(etc, "fallocate", refuse)
    for content in (OLD, OLD * 2):
        write_in_place(str(tmp_path / "hosts"), content)
        assert (tmp_path / "hosts").read_bytes() == content


@requires("root")
@pytest.mark.integration
def test_a_full_disk_leaves_the_file_as_it_was(small: Path) -> None:
    hosts = small / "hosts"
    write_in_place(str(hosts), OLD)
    with pytest.raises(OSError, match="No space"):
        (small / "rest").write_bytes(bytes(1 << 20))
    new = OLD * 1000
    with pytest.raises(OSError, match="No space"):
        write_in_place(str(hosts), new)
    assert hosts.read_bytes() == OLD
    write_in_place(str(hosts), OLD * 2)  # for which there is room in what it has
    (small / "rest").unlink()
    write_in_place(str(hosts), new)
    assert hosts.read_bytes() == new


@pytest.mark.unit
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "hosts").symlink_to("other")
    with pytest.raises(OSError, match="symbolic links"):
        write_in_place(str(tmp_path / "hosts"), OLD)
    assert not (tmp_path / "other").exists()
