"""Whether a PCI device can be given to a virtual machine whole (VFIO), and if not, why.

See the kernel's Documentation/driver-api/vfio.rst: the unit is the IOMMU group, all of whose
devices must be in the hands of vfio-pci, or of nobody.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from hutch.errors import Busy, Denied, InvalidArgument, NotFound, Unsupported

__all__ = ["VfioDevice", "check_vfio"]

_BRIDGE = "0x06"


class VfioDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is ready: its address, its group's number and the group's other devices."""

    address: str
    group: int
    companions: tuple[str, ...] = ()


def check_vfio(
    address: str, *, sys: str | os.PathLike[str] = "/sys", dev: str | os.PathLike[str] = "/dev"
) -> VfioDevice:
    """Return a device that a machine may have; raise naming the first thing in the way."""
    name = f"vfio={address}"
    device = Path(sys) / "bus/pci/devices" / address
    if not device.exists():
        raise NotFound(f"device {name}: there is no such PCI device", hint="`lspci -D` lists them")
    if _text(device / "class").startswith(_BRIDGE):
        raise InvalidArgument(
            f"{name} is a bridge: the devices behind it can be given", field="devices"
        )
    group = _group(device, name, Path(sys))
    members = sorted(p.name for p in (group / "devices").iterdir()) if group.exists() else [address]
    for member in members:
        _check_driver(Path(sys) / "bus/pci/devices" / member, name, itself=member == address)
    number = int(group.name)
    _check_node(Path(dev) / "vfio/vfio", name)
    _check_node(Path(dev) / f"vfio/{number}", name)
    companions = tuple(member for member in members if member != address)
    return VfioDevice(address=address, group=number, companions=companions)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _group(device: Path, name: str, sys: Path) -> Path:
    link = device / "iommu_group"
    if not link.exists():
        groups = sys / "kernel/iommu_groups"
        known = groups.is_dir() and any(groups.iterdir())
        why = "the device is behind no IOMMU" if known else "this host has no IOMMU in use"
        raise Unsupported(
            f"device {name}: {why}",
            hint="switch VT-d or AMD-Vi on in the firmware, and boot with intel_iommu=on "
            "(AMD: amd_iommu=on); in a virtual machine its host must give it an IOMMU",
        )
    return link.resolve()


def _check_driver(device: Path, name: str, *, itself: bool) -> None:
    if not itself and _text(device / "class").startswith(_BRIDGE):
        return
    link = device / "driver"
    driver = os.path.basename(os.readlink(link)) if link.is_symlink() else ""
    if driver == "vfio-pci" or (not itself and driver in ("", "pci-stub", "pcieport")):
        return
    whose = f"device {name}" if itself else f"device {name}: {device.name} of its IOMMU group"
    bound = f"is in the hands of {driver}" if driver else "has no driver"
    raise Busy(
        f"{whose} {bound}, not of vfio-pci",
        hint=f"`driverctl set-override {device.name} vfio-pci`, or write vfio-pci to "
        f"{device}/driver_override and the address to /sys/bus/pci/drivers_probe",
    )


def _check_node(path: Path, name: str) -> None:
    if not path.exists():
        raise NotFound(f"device {name}: {path} is missing", hint="`modprobe vfio-pci`")
    if not os.access(path, os.R_OK | os.W_OK):
        raise Denied(f"device {name}: {path} may not be opened", hint="run as root")
