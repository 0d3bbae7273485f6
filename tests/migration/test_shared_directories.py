"""Machines with directories of the host that move while they run: a server of another host goes
on with the files that the guest has open."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import HutchError, WrongState
from tests.migration.conftest import Other
from tests.requires import live_qemu, moving_virtiofsd, requires

pytestmark = [
    requires("root", "qemu", "live-qemu", "moving-virtiofsd", "apt-mirror", "busybox", "cgroup"),
    requires("netns", "erofs", "mke2fs", "nftables", "seccomp"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]
WAIT_S = 200.0

# Counts into a file that it has open all the time.
COUNT = "cd /shared; exec 3>>open; i=0; while :; do i=$((i+1)); echo $i >&3; usleep 50000; done"


@pytest.fixture(autouse=True)
def newer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUTCH_QEMU", str(live_qemu()))
    monkeypatch.setenv("HUTCH_VIRTIOFSD", str(moving_virtiofsd()))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    (directory / "file").write_text("the host's")
    return directory


@pytest.fixture
def moved(source: Engine, shared: Path) -> Iterator[str]:
    box = source.start(
        "busybox",
        ["sh", "-c", COUNT],
        name="moved",
        isolation="vm",
        memory="128M",
        volumes=[f"{shared}:/shared"],
    )
    until_more(shared, 3)
    yield box.id
    if [info.name for info in source.list(all=True)]:
        source.get("moved").remove(force=True)


def until_more(shared: Path, count: int) -> None:
    """Wait for so many more lines; they have no gap."""
    wanted = len(_counted(shared)) + count
    deadline = time.monotonic() + WAIT_S
    while len(counted := _counted(shared)) < wanted:
        assert time.monotonic() < deadline, "no more lines"
        time.sleep(0.05)
    assert counted == list(range(1, len(counted) + 1))


def _counted(shared: Path) -> list[int]:
    path = shared / "open"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_a_file_that_is_open_in_a_shared_directory_goes_on_at_the_target_and_back(
    source: Engine, target: Other, moved: str, shared: Path, tmp_path: Path
) -> None:
    older = tmp_path / "virtiofsd"
    older.write_text("#!/bin/sh\n")
    older.chmod(0o755)
    without = target.destination.replace("exec:", f"exec:env HUTCH_VIRTIOFSD={older} ")
    with pytest.raises(WrongState, match="target's virtiofsd cannot take them over"):
        source.migrate("moved", without)
    with pytest.raises(WrongState, match="post-copy: virtiofsd"):
        source.migrate("moved", target.destination, post_copy=True)
    done = source.migrate("moved", target.destination)
    assert (done.way, done.problem) == ("pre-copy", "")
    until_more(shared, 3)
    assert target.hutch("exec", "moved", "cat", "/shared/file") == "the host's"
    target.hutch("exec", "moved", "sh", "-c", "echo guest > /shared/made")
    assert (shared / "made").read_text() == "guest\n"
    target.hutch("migrate", "moved", target.back(source.root))
    until_more(shared, 3)
    assert source.get("moved").exec(["cat", "/shared/made"]).stdout == b"guest\n"


def test_a_file_without_a_name_keeps_a_machine_here(
    source: Engine, target: Other, moved: str, shared: Path
) -> None:
    (shared / "open").rename(shared / "other")
    source.get("moved").exec(["rm", "/shared/other"], check=True)
    with pytest.raises(HutchError):
        source.migrate("moved", target.destination)
    assert source.get("moved").info().state == "running"
    assert source.get("moved").exec(["cat", "/shared/file"]).stdout == b"the host's"
