"""Take PCI devices from their drivers for a virtual machine, and give them back.

What a device was before is written down before it is changed, in a file of the instance's
directory. Whoever finds that file with the machine gone gives the devices back, so neither a
kill of the starter nor one of the machine leaves a device without its driver. After a reboot
of the host nothing needs to be given back, and nothing is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.errors import Busy, HutchError, NotFound, Unavailable
from hutch.host.facts import replace_file
from hutch.linux.boot import boot_id
from hutch.resources.vfio import DRIVER, driver_of

__all__ = ["LEDGER", "Lent", "VfioNodes", "give_back", "lend", "nodes_of"]

LEDGER = "devices.json"
_NO_OVERRIDE = "(null)"
_MODPROBE_S = 60.0
Write = Callable[[Path, str], None]


class Lent(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it was before: its driver ("" for none) and what had been set to override
    the choice of one."""

    address: str
    driver: str = ""
    override: str = ""


class _Ledger(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    devices: tuple[Lent, ...] = ()


class VfioNodes(msgspec.Struct, frozen=True, kw_only=True):
    """How a device's user reaches it: the group's node, and since Linux 6.6 that of the device
    (`character`, None where there is none). Numbers are (major, minor)."""

    group: int
    group_numbers: tuple[int, int]
    character: str | None = None


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def lend(
    addresses: Sequence[str],
    ledger: Path,
    *,
    sys: Path = Path("/sys"),
    write: Write = _write,
    load: Callable[[], None] | None = None,
) -> None:
    """Have vfio-pci take devices from their drivers; on failure each is as it was.

    Those that vfio-pci has already stay with it when they are given back. `write` is told what
    goes into which file of sysfs, `load` loads the driver.
    """
    # What an end that was cut short has left.
    give_back(ledger, sys=sys, write=write)
    devices = [sys / "bus/pci/devices" / address for address in addresses]
    before = tuple(_as_it_is(device) for device in devices)
    if all(lent.driver == DRIVER for lent in before):
        return
    replace_file(ledger, msgspec.json.encode(_Ledger(boot_id=boot_id(), devices=before)))
    if not ledger.exists():
        raise Unavailable(f"{ledger}: cannot be written")
    try:
        if not (sys / "bus/pci/drivers" / DRIVER).is_dir():
            (load or _load_driver)()
        for device, lent in zip(devices, before, strict=True):
            if lent.driver != DRIVER:
                _take(device, lent, sys, write)
    except BaseException:
        give_back(ledger, sys=sys, write=write)
        raise


def give_back(ledger: Path, *, sys: Path = Path("/sys"), write: Write = _write) -> tuple[str, ...]:
    """Return devices to the drivers they had; safe to repeat. Nobody may be using them.

    Returns the addresses of those that their driver did not take back; a device that is gone
    is none of them.
    """
    try:
        known = decode_json(ledger.read_bytes(), _Ledger)
    except FileNotFoundError:
        return ()
    except msgspec.DecodeError:
        known = _Ledger(boot_id="")
    failed: list[str] = []
    if known.boot_id == boot_id():
        for lent in known.devices:
            try:
                _return(sys / "bus/pci/devices" / lent.address, lent, sys, write)
            except OSError:
                failed.append(lent.address)
    ledger.unlink(missing_ok=True)
    return tuple(failed)


def nodes_of(address: str, *, sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> VfioNodes:
    """Return the nodes of a device that vfio-pci has."""
    device = sys / "bus/pci/devices" / address
    group = os.path.basename(os.readlink(device / "iommu_group"))
    try:
        major, minor = (sys / "class/vfio" / group / "dev").read_text().split(":")
    except OSError as exc:
        raise NotFound(
            f"device vfio={address}: the kernel has no node for its group {group}",
            hint="`modprobe vfio-pci`",
        ) from exc
    own = device / "vfio-dev"
    names = [entry.name for entry in own.iterdir()] if own.is_dir() else []
    paths = [dev / "vfio/devices" / name for name in names]
    character = next((str(path) for path in paths if path.exists()), None)
    return VfioNodes(group=int(group), group_numbers=(int(major), int(minor)), character=character)


def _as_it_is(device: Path) -> Lent:
    try:
        override = (device / "driver_override").read_text().strip()
    except FileNotFoundError as exc:
        raise NotFound(f"device vfio={device.name}: there is no such PCI device") from exc
    return Lent(
        address=device.name,
        driver=driver_of(device),
        override="" if override == _NO_OVERRIDE else override,
    )


def _load_driver() -> None:
    from hutch.process.run import run_command

    try:
        done = run_command(["modprobe", DRIVER], timeout_s=_MODPROBE_S)
        said = done.stderr.decode(errors="replace").strip()
        failed = done.returncode != 0
    except HutchError as exc:
        failed, said = True, exc.message
    if failed:
        raise Unavailable(
            f"devices: the kernel's driver {DRIVER} cannot be loaded: {said}",
            hint=f"`modprobe {DRIVER}`",
        )


def _take(device: Path, lent: Lent, sys: Path, write: Write) -> None:
    try:
        write(device / "driver_override", DRIVER)
        if lent.driver:
            write(device / "driver/unbind", device.name)
        write(sys / "bus/pci/drivers_probe", device.name)
    except OSError as exc:
        raise Unavailable(
            f"device vfio={device.name}: cannot be taken from {lent.driver or 'the host'}: "
            f"{(exc.strerror or str(exc)).lower()}"
        ) from exc
    found = driver_of(device)
    if found != DRIVER:
        raise Busy(
            f"device vfio={device.name}: {DRIVER} does not take it, and {found or 'no driver'} has "
            "it",
            hint="the kernel's log says why (`dmesg`)",
        )


def _return(device: Path, lent: Lent, sys: Path, write: Write) -> None:
    if not device.exists():
        return
    # An empty line takes the override away.
    write(device / "driver_override", lent.override or "\n")
    found = driver_of(device)
    if found == lent.driver:
        return
    if found == DRIVER:
        write(device / "driver/unbind", device.name)
    driver = sys / "bus/pci/drivers" / lent.driver
    if lent.driver and driver.is_dir():
        write(driver / "bind", device.name)
