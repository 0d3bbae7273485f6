"""Which memory QEMU can copy while an emulated machine writes to it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hutch.drivers.vm.state import misses_writes
from hutch.plan.machine.version import QemuVersion

HEAD = (
    "              Block Name    PSize              Offset               Used              Total\n"
)
FIRMWARE = ("pc.bios", "pc.rom", "/rom@etc/acpi/tables", "system.flash0", "0000:00:02.0/virtio.rom")


class Blocks:
    """A monitor that knows of these blocks."""

    def __init__(self, version: QemuVersion, *names: str) -> None:
        self.version = version
        self._names = names

    def execute(self, command: str) -> dict[str, str]:
        assert command == "x-query-ramblock"
        lines = (f"{name:>24}  4 KiB  0x0000 0x8000000 0x8000000\n" for name in self._names)
        return {"human-readable-text": HEAD + "".join(lines)}


@pytest.mark.parametrize(
    ("version", "names", "misses"),
    [
        (QemuVersion(7, 2), ("ram",), True),
        (QemuVersion(10), ("ram", *FIRMWARE), False),
        (QemuVersion(10), ("ram", "plugged"), True),
        (QemuVersion(11, 1), ("node0", "node1", *FIRMWARE), True),
        (QemuVersion(11, 1), ("ram", "0000:00:01.0/vga.vram"), True),
    ],
)
def test_only_the_first_block_can_be_written_to_meanwhile(
    version: QemuVersion, names: tuple[str, ...], misses: bool
) -> None:
    assert misses_writes(cast(Any, Blocks(version, *names))) == misses
