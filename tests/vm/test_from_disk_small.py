"""A small Linux on a disk that BIOS starts: what its devices do to the host, and the other way."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.drivers.vm.kernel_packages import fetch_kernel, find_package
from hutch.engine import Engine, Instance
from hutch.engine.session import Session
from tests.requires import requires
from tests.vm.bootdisks import small_disk
from tests.vm.test_from_disk import engine, until

__all__ = ["engine"]

pytestmark = [
    pytest.mark.integration,
    requires("root", "qemu", "qemu-img", "grub", "apt-mirror", "busybox"),
]

BOOT_S = 200.0
SMALL: dict[str, Any] = {"memory": "160M", "network": "none"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("small")
    with fetch_kernel(find_package(), directory) as (image, modules):
        disk = small_disk(directory / "small.raw", image, modules)
    yield disk
    disk.unlink()


def boot(machine: Instance) -> Session:
    session = machine.start_attached()
    until(session, b"guest# ", BOOT_S)
    return session


def ask(session: Session, script: str) -> str:
    """Run a line in the guest's shell and return what it says."""
    # The echo has the quotes, the answer has not. A line sent before the prompt is echoed twice:
    # by the terminal when it comes, and by the shell when it reads it.
    session.send(f"{script}; echo 'do''ne'\n".encode())
    seen = until(session, b"\r\ndone\r\n", BOOT_S).decode()
    return seen.rpartition("'do''ne'\r\n")[2].partition("done\r\n")[0].strip()


def _allocated(machine: Instance) -> int:
    return os.stat(Path(machine.info().directory, "disk.qcow2")).st_blocks * 512


# TPM2_CreatePrimary of an ECC key for the owner: the same one as long as the TPM has its seed.
_CREATE_PRIMARY = (
    "800200000043000001314000000100000009400000090000000000000400000000001a0023000b00030472"
    "000000060080004300100003001000000000000000000000"
)


@requires("swtpm")
def test_a_tpm_is_there_and_stays_the_same(engine: Engine, system: Path) -> None:
    request = "".join(f"\\x{_CREATE_PRIMARY[at : at + 2]}" for at in range(0, 134, 2))
    script = f"exec 3<>/dev/tpm0; printf '{request}' >&3; head -c 150 <&3 | md5sum; exec 3>&-"
    with engine.machines.create(system, tpm=True, **SMALL) as machine:
        keys = []
        for _ in range(2):
            with boot(machine) as session:
                assert ask(session, "cat /sys/class/tpm/tpm0/tpm_version_major") == "2"
                keys.append(ask(session, script))
                _check_confined(engine, machine)
                machine.stop(timeout=BOOT_S)
        assert keys[0] == keys[1] != ""
        assert "tpm2-00.permall" in os.listdir(Path(machine.info().directory, "tpm"))


def _check_confined(engine: Engine, machine: Instance) -> None:
    (pid,) = (
        pid
        for pid in engine._context.machines.processes(machine.id)
        if Path(f"/proc/{pid}/comm").read_text() == "swtpm\n"
    )
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert int(status["Uid"].split()[0]) > 1 << 30
    assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    for kind in ("mnt", "net", "pid"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_what_the_guest_discards_the_host_gets_back(engine: Engine, system: Path) -> None:
    with engine.machines.create(system, **SMALL) as machine, boot(machine) as session:
        before = _allocated(machine)
        ask(session, "dd if=/dev/urandom of=/disk/big bs=1M count=32; sync")
        assert _allocated(machine) > before + 30 * MIB
        assert "trimmed" in ask(session, "rm /disk/big; sync; fstrim -v /disk")
        assert _allocated(machine) < before + 8 * MIB


def test_a_write_without_room_on_the_host_waits_for_it(system: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], check=True)
    try:
        with Engine(place / "root") as engine:
            (place / "fill").write_bytes(bytes(24 * MIB))
            with engine.machines.create(system, **SMALL) as machine, boot(machine) as session:
                session.send(b"dd if=/dev/urandom of=/disk/big bs=1M count=32 conv=fsync\n")
                until(session, b"the host has no room", BOOT_S)
                (place / "fill").unlink()
                until(session, b"32+0 records out", BOOT_S)
                assert ask(session, "dmesg | grep -c 'I/O error'") == "0"
            engine._context.networks.teardown()
    finally:
        subprocess.run(["umount", place], check=True)
