"""Versions of QEMU, and what differs between them for us."""

from __future__ import annotations

import re

import msgspec

from hutch.errors import Unsupported

__all__ = ["OLDEST", "QemuVersion", "parse_version"]

_VERSION = re.compile(r"(?:version\s+|^)(\d+)\.(\d+)(?:\.(\d+))?")


class QemuVersion(msgspec.Struct, frozen=True, order=True):
    """A version of QEMU; compares in order. The properties say what it can do."""

    major: int
    minor: int = 0
    micro: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"

    @property
    def migrates_to_files(self) -> bool:
        """Tell whether migration takes `file:`; before, a regular file goes through `fd:`.

        `fd:` with a regular file is deprecated since 9.1, and `file:` takes descriptor sets.
        """
        return self >= QemuVersion(8, 2)

    @property
    def maps_read_only_files(self) -> bool:
        """Tell whether private memory can come from a file that is opened only to read.

        Before `rom=off` (8.2) a memory-backend-file with `readonly=on` made the guest's
        memory read-only too.
        """
        return self >= QemuVersion(8, 2)

    @property
    def waits_for_switchover(self) -> bool:
        """Tell whether a migration waits for the target's leave to stop the machine (the
        capability `switchover-ack`)."""
        return self >= QemuVersion(8, 1)

    @property
    def names_channels(self) -> bool:
        """Tell whether an address of migration can be an abstract socket (`channels`)."""
        return self >= QemuVersion(8, 2)

    @property
    def opens_disks_late(self) -> bool:
        """Tell whether the disks of a loaded machine are inactive until it runs, and refuse to
        be resized (seen with 10.0)."""
        return self >= QemuVersion(9, 2)

    @property
    def moves_shares(self) -> bool:
        """Tell whether what a server of directories (virtiofsd) knows goes along with the
        machine (the device state of vhost-user, 8.2); it was proven with 10.0."""
        return self >= QemuVersion(9)

    @property
    def sees_emulated_writes(self) -> bool:
        """Tell whether memory can be saved while an emulated guest (TCG) runs.

        Before 9.0 the emulator did not hear that a page's dirty bit was cleared, and what was
        written to that page afterwards was missing in the saved memory (QEMU's commit "physmem:
        Fix migration dirty bitmap coherency with TCG memory access").
        """
        return self >= QemuVersion(9)

    @property
    def takes_opened_devices(self) -> bool:
        """Tell whether a device of the host can come as a descriptor (`iommufd` objects, and
        `fd=` of `vfio-pci`)."""
        return self >= QemuVersion(9)


OLDEST = QemuVersion(7, 2)


def parse_version(text: str) -> QemuVersion:
    """Return the version in `QEMU emulator version 7.2.22 (Debian …)` or in `7.2.22`.

    Raise `Unsupported` where there is none, or where it is older than `OLDEST`.
    """
    match = _VERSION.search(text)
    if match is None:
        raise Unsupported(f"qemu: no version in {text[:80]!r}")
    found = QemuVersion(int(match[1]), int(match[2]), int(match[3] or 0))
    if found < OLDEST:
        raise Unsupported(
            f"qemu: version {found} is too old", hint=f"install QEMU {OLDEST} or later"
        )
    return found
