"""A PCI device for a machine: what is in the way of it, and that it is given back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.errors import Busy, Denied, HutchError, InvalidArgument, NotFound, Unavailable
from hutch.resources.vfio import VfioDevice, check_vfio, devices_of_nodes, driver_of
from hutch.resources.vfio_binding import VfioNodes, give_back, lend, nodes_of
from tests.requires import requires

CARD = "0000:01:00.0"
SECOND = "0000:01:00.1"


def pci(
    root: Path, address: str, *, driver: str = "", group: int = -1, kind: str = "0x030000"
) -> Path:
    device = root / "sys/bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "class").write_text(f"{kind}\n")
    (device / "driver_override").write_text("(null)\n")
    if driver:
        (root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(f"../../drivers/{driver}")
    if group >= 0:
        place = root / f"sys/kernel/iommu_groups/{group}/devices"
        place.mkdir(parents=True, exist_ok=True)
        (place / address).symlink_to(device)
        (device / "iommu_group").symlink_to(place.parent)
        (root / f"sys/class/vfio/{group}").mkdir(parents=True, exist_ok=True)
        (root / f"sys/class/vfio/{group}/dev").write_text(f"240:{group}\n")
    return device


def check(root: Path, *together: str) -> VfioDevice:
    return check_vfio(CARD, together=together, sys=root / "sys", proc=root / "proc")


def refusal(root: Path, *together: str) -> HutchError:
    with pytest.raises(HutchError) as caught:
        check(root, *together)
    assert caught.value.hint or isinstance(caught.value, InvalidArgument)
    return caught.value


def test_a_device_that_is_ready(tmp_path: Path) -> None:
    pci(tmp_path, CARD, driver="vfio-pci", group=7)
    pci(tmp_path, SECOND, driver="vfio-pci", group=7)
    pci(tmp_path, "0000:00:01.0", driver="pcieport", group=7, kind="0x060400")
    companions = ("0000:00:01.0", SECOND)
    wanted = VfioDevice(address=CARD, group=7, companions=companions, driver="vfio-pci")
    assert check(tmp_path) == wanted


@requires("root")
def test_a_device_that_a_driver_has_can_be_taken_from_it(tmp_path: Path) -> None:
    pci(tmp_path, CARD, driver="nvidia", group=7)
    assert check(tmp_path).driver == "nvidia"


def test_what_is_in_the_way_of_a_device_is_named_one_by_one(tmp_path: Path) -> None:
    assert "no such PCI device" in refusal(tmp_path).message
    pci(tmp_path, CARD, driver="nvidia")
    assert "no IOMMU in use" in refusal(tmp_path).message
    pci(tmp_path, "0000:02:00.0", group=1)
    assert "behind no IOMMU" in refusal(tmp_path).message
    pci(tmp_path / "d", CARD, driver="vfio-pci", group=7, kind="0x060400")
    assert "bridge" in refusal(tmp_path / "d").message


def test_an_ordinary_user_is_told_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pci(tmp_path, CARD, driver="nvidia", group=7)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = refusal(tmp_path)
    assert isinstance(found, Denied) and "in the hands of nvidia" in found.message


def test_a_companion_comes_along_or_is_nobodys(tmp_path: Path) -> None:
    pci(tmp_path, CARD, driver="vfio-pci", group=7)
    pci(tmp_path, SECOND, driver="snd_hda", group=7)
    found = refusal(tmp_path)
    assert f"{SECOND} of its IOMMU group is in the hands of snd_hda" in found.message
    assert f"--device vfio={SECOND}" in (found.hint or "")
    assert check(tmp_path, CARD, SECOND).group == 7


@requires("root")
def test_what_the_host_uses_is_not_taken_from_it(tmp_path: Path) -> None:
    card = pci(tmp_path, CARD, driver="e1000e", group=7)
    (card / "net/eth3").mkdir(parents=True)
    (card / "net/eth3/flags").write_text("0x1003\n")
    assert "network interface eth3, which is up" in refusal(tmp_path).message
    (card / "net/eth3/flags").write_text("0x1002\n")
    assert check(tmp_path).driver == "e1000e"

    partition = card / "nvme/nvme0/block/nvme0n1/nvme0n1p1"
    partition.mkdir(parents=True)
    (partition / "partition").write_text("1\n")
    (partition / "dev").write_text("259:1\n")
    assert check(tmp_path).driver == "e1000e"
    (tmp_path / "proc/self").mkdir(parents=True)
    line = "24 1 259:1 / / rw,relatime - ext4 /dev/nvme0n1p1 rw\n"
    (tmp_path / "proc/self/mountinfo").write_text(line)
    assert "disk nvme0n1p1, which is in use" in refusal(tmp_path).message


def test_nodes_of_a_vendor_stand_for_the_devices_behind_them(tmp_path: Path) -> None:
    pci(tmp_path, CARD, driver="vfio-pci", group=7)
    pci(tmp_path, SECOND, driver="vfio-pci", group=7)
    pci(tmp_path, "0000:00:01.0", group=7, kind="0x060400")
    sys = tmp_path / "sys"
    nodes = ["/dev/vfio/vfio", "/dev/vfio/7"]
    assert devices_of_nodes(nodes, sys=sys) == (CARD, SECOND)
    own = sys / "class/vfio-dev/vfio3"
    own.mkdir(parents=True)
    (own / "device").symlink_to(sys / "bus/pci/devices" / SECOND)
    assert devices_of_nodes(["/dev/iommu", "/dev/vfio/devices/vfio3"], sys=sys) == (SECOND,)
    assert devices_of_nodes(["/dev/vfio/8"], sys=sys) == ()
    assert devices_of_nodes(["/dev/vfio/7", "/dev/nvidia0"], sys=sys) is None


def test_how_qemu_reaches_a_device(tmp_path: Path) -> None:
    device = pci(tmp_path, CARD, driver="vfio-pci", group=7)
    sys, dev = tmp_path / "sys", tmp_path / "dev"
    plain = VfioNodes(group=7, group_numbers=(240, 7))
    assert nodes_of(CARD, sys=sys, dev=dev) == plain
    (device / "vfio-dev/vfio3").mkdir(parents=True)
    assert nodes_of(CARD, sys=sys, dev=dev) == plain
    (dev / "vfio/devices").mkdir(parents=True)
    (dev / "vfio/devices/vfio3").touch()
    assert nodes_of(CARD, sys=sys, dev=dev).character == str(dev / "vfio/devices/vfio3")


# ---- taken and given back --------------------------------------------------------------------


class Kernel:
    """What sysfs does when it is written to; `refuses` are the drivers that take nothing, and
    `fails_at` is the number of the write that fails."""

    def __init__(self, root: Path, *, refuses: str = "", fails_at: int = -1) -> None:
        self.sys = root / "sys"
        self._refuses = refuses
        self.left = fails_at

    def load(self) -> None:
        (self.sys / "bus/pci/drivers/vfio-pci").mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, text: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(5, "Input/output error")
        if path.name == "driver_override":
            path.write_text(f"{text.strip() or '(null)'}\n")
            return
        device = self.sys / "bus/pci/devices" / text
        link = device / "driver"
        if path.name == "unbind":
            link.unlink()
            return
        driver = path.parent.name if path.name == "bind" else ""
        if path.name == "drivers_probe" and not link.is_symlink():
            driver = (device / "driver_override").read_text().strip()
        if driver and driver != self._refuses:
            link.symlink_to(f"../../drivers/{driver}")


def two(root: Path) -> list[Path]:
    second = pci(root, SECOND, group=7)
    (second / "driver_override").write_text("pci-stub\n")
    return [pci(root, CARD, driver="nvidia", group=7), second]


def as_before(devices: list[Path]) -> None:
    assert [driver_of(device) for device in devices] == ["nvidia", ""]
    overrides = [(device / "driver_override").read_text() for device in devices]
    assert overrides == ["(null)\n", "pci-stub\n"]


def test_devices_are_taken_from_their_drivers_and_given_back(tmp_path: Path) -> None:
    devices, kernel = two(tmp_path), Kernel(tmp_path)
    ledger = tmp_path / "devices.json"
    lend([CARD, SECOND], ledger, sys=kernel.sys, write=kernel.write, load=kernel.load)
    assert [driver_of(device) for device in devices] == ["vfio-pci", "vfio-pci"]
    assert ledger.exists()
    # As somebody else does it who finds the file: nothing but it is known.
    assert give_back(ledger, sys=kernel.sys, write=kernel.write) == ()
    as_before(devices)
    assert not ledger.exists()
    assert give_back(ledger, sys=kernel.sys, write=kernel.write) == ()


@pytest.mark.parametrize("step", range(1, 6))
def test_a_failure_at_any_step_leaves_devices_as_they_were(tmp_path: Path, step: int) -> None:
    devices, kernel = two(tmp_path), Kernel(tmp_path, fails_at=step)
    ledger = tmp_path / "devices.json"
    with pytest.raises(Unavailable, match="cannot be taken"):
        lend([CARD, SECOND], ledger, sys=kernel.sys, write=kernel.write, load=kernel.load)
    as_before(devices)
    assert not ledger.exists()


def test_a_driver_that_does_not_take_it(tmp_path: Path) -> None:
    devices, kernel = two(tmp_path), Kernel(tmp_path, refuses="vfio-pci")
    with pytest.raises(Busy, match="does not take it"):
        lend([CARD], tmp_path / "l", sys=kernel.sys, write=kernel.write, load=kernel.load)
    as_before(devices)


def test_what_vfio_had_before_stays_with_it(tmp_path: Path) -> None:
    device, kernel = pci(tmp_path, CARD, driver="vfio-pci", group=7), Kernel(tmp_path, fails_at=1)
    lend([CARD], tmp_path / "l", sys=kernel.sys, write=kernel.write)
    assert not (tmp_path / "l").exists() and driver_of(device) == "vfio-pci"


def test_what_a_killed_start_has_taken_is_given_back_before_the_next(tmp_path: Path) -> None:
    devices, kernel = two(tmp_path), Kernel(tmp_path)
    ledger = tmp_path / "devices.json"
    lend([CARD], ledger, sys=kernel.sys, write=kernel.write, load=kernel.load)
    lend([CARD, SECOND], ledger, sys=kernel.sys, write=kernel.write, load=kernel.load)
    give_back(ledger, sys=kernel.sys, write=kernel.write)
    as_before(devices)


def test_after_a_reboot_nothing_is_given_back(tmp_path: Path) -> None:
    devices, kernel = two(tmp_path), Kernel(tmp_path)
    ledger = tmp_path / "devices.json"
    lend([CARD], ledger, sys=kernel.sys, write=kernel.write, load=kernel.load)
    text = ledger.read_text()
    ledger.write_text(text.replace(text.split('"boot_id":"')[1].split('"')[0], "another"))
    give_back(ledger, sys=kernel.sys, write=kernel.write)
    assert driver_of(devices[0]) == "vfio-pci" and not ledger.exists()


def test_a_device_that_is_gone_is_not_given_back(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    two(tmp_path)
    ledger = tmp_path / "devices.json"
    lend([CARD], ledger, sys=kernel.sys, write=kernel.write, load=kernel.load)
    (kernel.sys / "bus/pci/devices" / CARD).rename(tmp_path / "pulled")
    assert give_back(ledger, sys=kernel.sys, write=kernel.write) == ()
    with pytest.raises(NotFound):
        lend([CARD], ledger, sys=kernel.sys, write=kernel.write)
