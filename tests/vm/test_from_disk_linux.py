"""A disk with a system on it: UEFI, Linux, a shell on the serial console, cloud-init's data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hutch.drivers.vm.kernel_packages import fetch_kernel, find_package
from hutch.engine import Engine
from hutch.storage.seed import Card, make_seed
from tests.requires import requires
from tests.vm.bootdisks import iso_file, linux_disk, run
from tests.vm.test_from_disk import engine, until

__all__ = ["engine"]

pytestmark = [
    pytest.mark.integration,
    requires("root", "qemu", "qemu-img", "genisoimage", "cc"),
]

# UEFI takes seconds of emulated processor time, which on a busy host is minutes.
BOOT_S = 400.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("system")
    with fetch_kernel(find_package(), directory) as (image, modules):
        disk = linux_disk(directory / "system.raw", image, modules)
    yield disk
    disk.unlink()


@requires("ovmf", "mtools", "efi-stub", "apt-mirror", "busybox")
def test_linux_starts_by_uefi_to_a_prompt(engine: Engine, system: Path) -> None:
    with engine.machines.create(
        system,
        uefi=True,
        memory="256M",
        network="user",
        hostname="full",
        ssh_keys=["ssh-ed25519 AAAA somebody"],
    ) as machine:
        with machine.start_attached() as session:
            seen = until(session, b"guest# ", BOOT_S)
            assert b'"local-hostname":"full"' in seen
            assert b"lease: bound 10.0.2.15" in seen
            session.send(b"echo $((6 * 7)) $(cat /sys/firmware/efi/fw_platform_size)\n")
            until(session, b"42 64")
            machine.stop(timeout=BOOT_S)
        assert machine.info().exit_code == 0


@requires("genisoimage")
def test_the_seed_is_a_volume_that_cloud_init_finds(tmp_path: Path) -> None:
    seed = tmp_path / "seed.iso"
    make_seed(
        str(seed),
        instance="i-1",
        hostname="box",
        user_data=b"#cloud-config\nhostname: box\n",
        cards=[
            Card(
                mac="52:54:00:00:00:01",
                addresses=("10.1.2.3/24", "fd00::3/64"),
                gateways=("10.1.2.1", "fd00::1"),
                nameservers=("10.1.2.1",),
            ),
            Card(mac="52:54:00:00:00:02", dhcp=True),
        ],
    )
    assert run("blkid", "-p", "-o", "value", "-s", "LABEL", seed) == b"CIDATA\n"
    names = run("isoinfo", "-R", "-f", "-i", seed).decode().split()
    assert sorted(names) == ["/meta-data", "/network-config", "/user-data", "/vendor-data"]
    meta = msgspec.json.decode(iso_file(seed, "meta-data"))
    assert meta == {"instance-id": "i-1", "local-hostname": "box"}
    assert iso_file(seed, "user-data") == b"#cloud-config\nhostname: box\n"
    config = msgspec.json.decode(iso_file(seed, "network-config"))
    assert config == {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": "52:54:00:00:00:01"},
                "set-name": "eth0",
                "addresses": ["10.1.2.3/24", "fd00::3/64"],
                "routes": [
                    {"to": "0.0.0.0/0", "via": "10.1.2.1"},
                    {"to": "::/0", "via": "fd00::1"},
                ],
                "nameservers": {"addresses": ["10.1.2.1"], "search": []},
            },
            "eth1": {
                "match": {"macaddress": "52:54:00:00:00:02"},
                "set-name": "eth1",
                "dhcp4": True,
            },
        },
    }
