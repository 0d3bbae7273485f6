"""Containers of an ordinary user: the same commands, without root."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.requires import requires
from tests.rootless.conftest import UID, Hutch, installed_with_range

pytestmark = requires("root", "userns", "overlayfs", "busybox")


@contextmanager
def with_busybox(python: Hutch) -> Iterator[Hutch]:
    """Run `hutch` as that user, with the image busybox."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return python("-m", "hutch", *arguments)

    done = run("image", "bootstrap", "busybox")
    assert done.returncode == 0, done.stderr
    yield run
    assert run("ps", "-aq").stdout == ""


@pytest.fixture
def hutch(python: Hutch) -> Iterator[Hutch]:
    """Run `hutch` as a user without subordinate ids."""
    with with_busybox(python) as run:
        yield run


@pytest.fixture
def hutch_with_range(tmp_path: Path) -> Iterator[Hutch]:
    """Run `hutch` as a user with 65,536 subordinate ids."""
    with installed_with_range(tmp_path) as python, with_busybox(python) as run:
        yield run


@requires("mmdebstrap")
def test_a_user_without_ids_for_packages_is_told_how_to_get_some(hutch: Hutch) -> None:
    done = hutch("image", "bootstrap", "-q", "--mirror", "file:/nowhere", "debian:bookworm")
    assert done.returncode == 1
    assert "no ids for them" in done.stderr and "--add-subuids" in done.stderr


def test_a_user_runs_a_container_as_root_of_their_own(hutch: Hutch) -> None:
    script = "id -u; cat /proc/self/uid_map; touch /made; grep Seccomp: /proc/self/status"
    done = hutch("run", "--rm", "--network", "none", "busybox", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:4] == ["0", "0", str(UID), "1"] and words[-1] == "2"


def test_the_life_of_a_container_without_root(hutch: Hutch, tmp_path: Path) -> None:
    def ok(*arguments: str) -> str:
        done = hutch(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    ok("run", "-d", "--name", "box", "--network", "none", "busybox", "sh", "-c",
       "echo up; sleep 1000")  # fmt: skip
    assert ok("exec", "box", "sh", "-c", "echo $(id -u) > /f; cat /f") == "0"
    assert ok("logs", "box") == "up"
    # An ordinary user's test has no control group to count in.
    titles, *rows = ok("top", "box").splitlines()
    assert titles.startswith("UID") and any(row.endswith("sleep 1000") for row in rows)
    assert ok("stats", "--no-stream", "--format", "{{.PIDs}}", "box") in ("1", "2")
    refused = hutch("commit", "box", "kept")
    assert refused.returncode == 1 and "--pause=false" in refused.stderr
    ok("commit", "--pause=false", "box", "kept")
    ok("stop", "-t", "0", "box")
    ok("start", "box")
    assert ok("exec", "box", "cat", "/f") == "0"
    ok("rm", "-f", "box")


def test_what_a_user_cannot_have_is_told_with_the_cure(hutch: Hutch) -> None:
    none = ("run", "--rm", "--network", "none")
    for arguments, word in (
        ((*none, "--memory", "64m", "busybox", "true"), "memory"),
        ((*none, "--user", "5", "busybox", "true"), "subordinate ids"),
        (("run", "--rm", "--network", "other", "busybox", "true"), "network"),
        (("network", "create", "other"), "need root"),
    ):
        done = hutch(*arguments)
        assert done.returncode in (1, 125)
        assert word in done.stderr and "hint:" in done.stderr


def test_files_are_copied_of_and_into_a_stopped_container(hutch: Hutch, tmp_path: Path) -> None:
    def ok(*arguments: str) -> str:
        done = hutch(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ok("create", "--name", "box", "--network", "none", "busybox", "cat", "/etc/passwd", "/in/f")
    ok("cp", "/etc/hostname", "box:/copied")
    assert ok("cp", "box:/copied", "-").count(Path("/etc/hostname").read_text()) == 1
    ok("start", "box")
    assert ok("wait", "box") == "1\n"  # there is no /in/f
    assert "box" in ok("ps", "-a")
    ok("rm", "box")


def test_what_belongs_to_subordinate_ids_is_removed_too(hutch_with_range: Hutch) -> None:
    script = "mkdir -m 700 /d && echo secret > /d/f && chown -R 1000:1000 /d && id -u nobody"
    done = hutch_with_range("run", "--name", "box", "--network", "none", "busybox", "sh", "-c",
                            script)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "65534\n"), done.stderr
    done = hutch_with_range("rm", "box")
    assert done.returncode == 0, done.stderr
    directory = hutch_with_range("info", "-o", "json")
    root = Path(json.loads(directory.stdout)["root"])
    assert os.listdir(root / "trash") == []


def test_the_doctor_speaks_of_what_that_user_can_do(hutch: Hutch) -> None:
    done = hutch("doctor")
    assert done.returncode == 0, done.stdout
    assert "\nthis host can run containers as this user\n" in done.stdout
    assert "user-mode network" in done.stdout


def test_the_hosts_network_can_be_used(hutch: Hutch) -> None:
    done = hutch("run", "--rm", "--network", "host", "busybox", "readlink", "/proc/self/ns/net")
    assert done.stdout.strip() == os.readlink("/proc/self/ns/net"), done.stderr


@requires("apt-mirror")
def test_a_user_adds_a_guest_kernel(hutch: Hutch) -> None:
    added = hutch("vm", "kernel", "add", "-q")
    assert added.returncode == 0, added.stderr
    assert added.stdout.strip() in hutch("vm", "kernel", "ls").stdout
    assert hutch("vm", "kernel", "rm", added.stdout.strip()).returncode == 0


ROOT_DISK = """
import io, os, tarfile
from hutch.storage.layers import Layers
from hutch.storage.rootdisk import RootDisks
root = os.environ["HUTCH_ROOT"]
os.mkdir(root)
layers = Layers(root)
chain = []
for names in (["etc/kept", "etc/gone", "var/old"], ["etc/.wh.gone", "var/.wh..wh..opq", "var/new"]):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.uid, entry.mode = 33, 0o640
            archive.addfile(entry)
    buffer.seek(0)
    chain.append(layers.unpack(buffer, parent_chain_id="".join(chain)).chain_id)
print(RootDisks(root, layers).ensure(chain))
"""


@requires("erofs")
@pytest.mark.integration
def test_a_user_makes_a_root_disk_that_belongs_to_root(python: Hutch, tmp_path: Path) -> None:
    done = python("-c", ROOT_DISK)
    assert done.returncode == 0, done.stderr
    subprocess.run(
        ["mount", "-t", "erofs", "-o", "loop,ro", done.stdout.strip(), str(tmp_path)], check=True
    )
    try:
        found = {str(p.relative_to(tmp_path)): p.stat() for p in tmp_path.rglob("*")}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert sorted(found) == ["etc", "etc/kept", "var", "var/new"]
    assert {(status.st_uid, status.st_gid) for status in found.values()} == {(0, 0)}
    assert found["var/new"].st_mode & 0o7777 == 0o640
