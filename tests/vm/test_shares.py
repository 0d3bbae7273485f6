"""Directories, files and volumes of the host in virtual machines."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import Unsupported
from tests.leaks import local_leaks
from tests.requires import requires

pytestmark = [
    pytest.mark.integration,
    requires("root", "qemu", "virtiofsd", "busybox", "apt-mirror"),
]


class Shared(NamedTuple):
    """A running machine with all kinds of mounts, and the host's side of them."""

    machine: Instance
    directory: Path
    file: Path
    engine: Engine

    def sh(self, script: str) -> str:
        return self.machine.exec(["sh", "-c", script]).text


@pytest.fixture(scope="module")
def shared(machines: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    base = tmp_path_factory.mktemp("shared")
    directory, file = base / "dir", base / "file"
    directory.mkdir()
    (directory / "greeting").write_text("hello")
    file.write_text("one")
    (base / "other").mkdir()
    machines.volumes.create("part")
    part = Path(machines.volumes.get("part").path)
    (part / "inner").mkdir()
    (part / "inner/seen").write_text("")
    (part / "hidden").write_text("")
    box = machines.start(
        "busybox",
        ["sleep", "1000"],
        isolation="vm",
        memory="160M",
        volumes=[
            f"{directory}:/data",
            f"{directory}:/fixed:ro",
            f"{base}/other:/other",
            f"{file}:/etc/one",
            "named:/etc/network",
            "/anonymous",
        ],
        mounts=["type=volume,src=part,dst=/part,volume-subpath=inner"],
    )
    yield Shared(box, directory, file, machines)
    box.remove(force=True, volumes=True)
    for name in ("named", "part"):
        machines.volumes.remove(name)


@pytest.mark.versions
def test_a_directory_of_the_host_is_seen_and_written_by_the_machine(shared: Shared) -> None:
    assert shared.sh("cat /data/greeting; echo back >/data/answer") == "hello"
    assert (shared.directory / "answer").read_text() == "back\n"
    (shared.directory / "later").write_text("news")
    assert shared.sh("cat /data/later") == "news"


def test_owners_modes_and_links_are_those_of_the_guest(shared: Shared) -> None:
    shared.sh("cd /data && echo x >a && chown 12:34 a && chmod 4750 a && ln a b && ln -s a c")
    status = (shared.directory / "b").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12, 34, 0o4750)
    assert status.st_nlink == 2
    assert os.readlink(shared.directory / "c") == "a"


def test_another_user_of_the_guest_has_only_its_own_rights(shared: Shared) -> None:
    (shared.directory / "secret").write_text("x")
    (shared.directory / "secret").chmod(0o600)
    done = shared.machine.exec(["cat", "/data/secret"], user="1000")
    assert done.exit_code != 0


def test_a_read_only_share_cannot_be_written_not_even_by_remounting(shared: Shared) -> None:
    script = "mount -o remount,rw /fixed; echo x >/fixed/new"
    done = shared.machine.exec(["sh", "-c", script], privileged=True)
    assert done.exit_code != 0
    assert not (shared.directory / "new").exists()


def test_a_single_file_is_shared_without_its_directory(shared: Shared) -> None:
    assert shared.sh("cat /etc/one; echo two >/etc/one; cat /etc/passwd | head -c 4") == "oneroot"
    assert shared.file.read_text() == "two\n"


def test_a_file_system_of_its_own_number_for_each_share(shared: Shared) -> None:
    numbers = shared.sh("stat -c %d /data /other").split()
    assert len(set(numbers)) == 2


def test_a_volume_has_the_images_content_and_keeps_what_is_written(shared: Shared) -> None:
    shared.sh("echo kept >/etc/network/kept; echo x >/anonymous/x")
    assert (Path(shared.engine.volumes.get("named").path) / "kept").read_text() == "kept\n"


def test_a_part_of_a_volume_is_all_that_is_seen_of_it(shared: Shared) -> None:
    assert shared.sh("ls /part").split() == ["seen"]


def test_what_it_cannot_do_with_them_is_refused_with_the_cure(shared: Shared) -> None:
    """And it runs on with what it has."""
    for refused in (shared.machine.fork, shared.machine.suspend):
        with pytest.raises(Unsupported, match="directories of the host") as caught:
            refused()
        assert caught.value.hint and "hutch cp" in caught.value.hint
    assert shared.sh("cat /data/greeting") == "hello"


def test_no_device_node_comes_from_a_guest_to_the_host(shared: Shared) -> None:
    assert shared.machine.exec(["mknod", "/data/null", "c", "1", "3"]).exit_code != 0
    assert not (shared.directory / "null").exists()


def test_the_server_has_the_rights_on_files_alone_and_no_way_out(shared: Shared) -> None:
    server = _server(shared.machine)
    status = _status(server)
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP
    assert int(status["CapEff"], 16) & ~0x800000DB == 0
    assert status["NoNewPrivs"] == "1"
    mounts = Path(f"/proc/{server}/mountinfo").read_text()
    assert str(shared.engine.root) not in mounts.replace(str(shared.engine.root / "volumes"), "")
    assert os.readlink(f"/proc/{server}/ns/net") != os.readlink("/proc/self/ns/net")


def _server(machine: Instance) -> int:
    for pid in machine._context.driver("vm").processes(machine.id):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "virtiofsd":
            return pid
    raise AssertionError("no virtiofsd")


@pytest.mark.parametrize("victim", ["virtiofsd", "its supervisor", "qemu-system-x86", "hutch-vmm"])
def test_whoever_is_killed_nothing_of_a_share_stays(
    machines: Engine, tmp_path: Path, victim: str
) -> None:
    box = machines.start(
        "busybox",
        ["sleep", "1000"],
        isolation="vm",
        memory="160M",
        volumes=[f"{tmp_path}:/data"],
    )
    server = _server(box)
    found = box._context.driver("vm").processes(box.id)
    names = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in found}
    names["its supervisor"] = int(_status(server)["PPid"])
    os.kill(names[victim], signal.SIGKILL)
    box.remove(force=True)
    assert local_leaks(tmp_path) == set()


def test_without_its_server_a_machine_ends_and_says_why(machines: Engine, tmp_path: Path) -> None:
    """What waits for a share would wait for ever, and could not be killed."""
    with machines.start(
        "busybox",
        ["sh", "-c", "while :; do date >/data/x; sleep 0.1; done"],
        isolation="vm",
        memory="160M",
        volumes=[f"{tmp_path}:/data"],
        stop_timeout=2,
    ) as box:
        box.exec(["sh", "-c", "echo kept >/kept; sync"])
        os.kill(_server(box), signal.SIGKILL)
        assert box.wait() == 255
        reason = "the server of the shared directories (virtiofsd) has ended"
        assert box.info().error == reason
        assert f"hutch-vmm: {reason}\n".encode() in b"".join(e.data for e in box.logs())
        wanted: dict[str, list[str]] = {"container": [box.id], "event": ["die"]}
        [died] = machines.events(since=0, follow=False, filters=wanted)
        assert died.attributes["error"] == reason
        box.start()
        assert box.exec(["cat", "/kept", "/data/x"]).text.startswith("kept\n")
        assert box.info().error == ""


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value for key, _, value in (line.partition(":\t") for line in lines)}


def test_a_mount_that_is_to_lead_back_to_the_host_is_refused(machines: Engine) -> None:
    with pytest.raises(Unsupported, match=r"mounts\[0\].propagation"):
        machines.create("busybox", isolation="vm", volumes=["/tmp:/data:rshared"])
