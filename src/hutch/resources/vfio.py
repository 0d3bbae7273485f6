"""Whether a PCI device can be given to a virtual machine whole (VFIO), and if not, why.

See the kernel's Documentation/driver-api/vfio.rst: the unit is the IOMMU group, all of whose
devices must be in the hands of vfio-pci, or of nobody. `hutch.resources.vfio_binding` takes a
device from its driver and gives it back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from hutch.errors import Busy, Denied, InvalidArgument, NotFound, Unsupported

__all__ = ["DRIVER", "VfioDevice", "check_vfio", "devices_of_nodes", "driver_of"]

DRIVER = "vfio-pci"
_BRIDGE = "0x06"
_IFF_UP = 1
_DEPTH = 6
_NODE = re.compile(r"/dev/vfio/(?:(?P<group>[0-9]+)|devices/(?P<device>vfio[0-9]+))")


class VfioDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that a machine can have: its address, its group's number, the group's other
    devices, and the driver that has it now, "" for none."""

    address: str
    group: int
    companions: tuple[str, ...] = ()
    driver: str = ""


def check_vfio(
    address: str,
    *,
    together: Sequence[str] = (),
    sys: str | os.PathLike[str] = "/sys",
    proc: str | os.PathLike[str] = "/proc",
) -> VfioDevice:
    """Return a device that a machine may have; raise naming the first thing in the way.

    `together` are the addresses of all devices that the machine gets: those of one group.
    """
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
        if member not in (address, *together):
            _check_companion(Path(sys) / "bus/pci/devices" / member, name)
    driver = driver_of(device)
    if driver != DRIVER:
        if os.geteuid() != 0:
            raise Denied(
                f"device {name}: is in the hands of {driver or 'no driver'}, and taking it takes "
                "root",
                hint=f"run hutch as root, or bind the device to {DRIVER} yourself and let this "
                f"user open /dev/vfio/{group.name}",
            )
        _check_unused(device, name, Path(sys), Path(proc))
    companions = tuple(member for member in members if member != address)
    return VfioDevice(address=address, group=int(group.name), companions=companions, driver=driver)


def devices_of_nodes(
    nodes: Sequence[str], *, sys: str | os.PathLike[str] = "/sys"
) -> tuple[str, ...] | None:
    """Return the addresses of the PCI devices that nodes of VFIO stand for, as vendors list them
    for their devices; None where another node is among them."""
    found: list[str] = []
    for node in nodes:
        match = _NODE.fullmatch(node)
        if match is None:
            if node in ("/dev/vfio/vfio", "/dev/iommu"):
                continue
            return None
        found += _behind(match, Path(sys))
    return tuple(dict.fromkeys(found))


def _behind(match: re.Match[str], sys: Path) -> list[str]:
    if match["device"]:
        link = sys / "class/vfio-dev" / match["device"] / "device"
        return [link.resolve().name] if link.exists() else []
    members = sys / "kernel/iommu_groups" / match["group"] / "devices"
    if not members.is_dir():
        return []
    return sorted(
        member.name
        for member in members.iterdir()
        if not _text(sys / "bus/pci/devices" / member.name / "class").startswith(_BRIDGE)
    )


def driver_of(device: Path) -> str:
    """Return the name of the driver that has a device, "" for none."""
    try:
        return os.path.basename(os.readlink(device / "driver"))
    except OSError:
        return ""


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


def _check_companion(device: Path, name: str) -> None:
    """A companion must be given to the same machine, or be nobody's."""
    if _text(device / "class").startswith(_BRIDGE):
        return
    driver = driver_of(device)
    if driver in ("", DRIVER, "pci-stub", "pcieport"):
        return
    raise Busy(
        f"device {name}: {device.name} of its IOMMU group is in the hands of {driver}",
        hint=f"a group is given whole: add --device vfio={device.name}, or take it from its "
        f"driver: echo {device.name} >{device}/driver/unbind",
    )


# ---- what the host still uses ---------------------------------------------------------------


def _check_unused(device: Path, name: str, sys: Path, proc: Path) -> None:
    """Refuse to take a network card that is up, or a disk that somebody has open."""
    mounted = _mounted(proc)
    swapping = _text(proc / "swaps")
    for kind, entry in _functions(device.resolve()):
        if kind == "net" and int(_text(entry / "flags") or "0", 16) & _IFF_UP:
            raise Busy(
                f"device {name}: is the host's network interface {entry.name}, which is up",
                hint=f"`ip link set {entry.name} down`, when nobody needs it",
            )
        if kind == "block":
            for disk in (entry, *(p.parent for p in entry.glob("*/partition"))):
                holders = disk / "holders"
                held = holders.is_dir() and any(holders.iterdir())
                used = _text(disk / "dev") in mounted or f"/dev/{disk.name} " in swapping
                if held or used:
                    raise Busy(
                        f"device {name}: is the host's disk {disk.name}, which is in use",
                        hint="unmount its file systems first",
                    )


def _functions(device: Path, depth: int = _DEPTH) -> Iterator[tuple[str, Path]]:
    """Yield ("net" or "block", directory) of what drivers have made of a device, and of what
    is behind it."""
    try:
        entries = [e for e in os.scandir(device) if e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for entry in entries:
        if entry.name in ("net", "block"):
            for found in os.scandir(entry.path):
                yield entry.name, Path(found.path)
        elif depth:
            yield from _functions(Path(entry.path), depth - 1)


def _mounted(proc: Path) -> set[str]:
    """Return the numbers of all devices that this mount namespace has file systems of."""
    lines = _text(proc / "self/mountinfo").splitlines()
    return {line.split()[2] for line in lines if len(line.split()) > 2}
