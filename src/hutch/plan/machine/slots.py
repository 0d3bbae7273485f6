"""Where each device sits, fixed, so that a template and its clones agree on every address.

q35: the root complex, slots 0x01 to 0x1e (0x00 and 0x1f are the chipset's). microvm: the
transports of virtio-mmio, of which there are 24 with ACPI; the first is of no use.
"""

from __future__ import annotations

import msgspec

from hutch.errors import InvalidArgument, Unsupported
from hutch.plan.machine.model import MICROVM

__all__ = ["AGENT", "BALLOON", "Places", "RNG"]

VIDEO, AGENT, RNG, BALLOON, USB = 0x01, 0x02, 0x03, 0x04, 0x06
ROOT_PORTS_MAX = 16


class _Range(msgspec.Struct, frozen=True):
    first: int
    count: int
    functions: int = 8


_PCI = {
    "disks": _Range(0x08, 8),
    "nics": _Range(0x10, 8),
    "shares": _Range(0x18, 4),
    "host_devices": _Range(0x1E, 1),
}
_ROOT_PORTS = _Range(0x1C, 2)
# Not 0: QEMU takes the first input of any I/O APIC for the timer's, which arrives at the third.
_MMIO_SINGLE = {AGENT: 1, RNG: 2, BALLOON: 3}
_MMIO = {"disks": _Range(4, 10, 1), "nics": _Range(14, 5, 1), "shares": _Range(19, 5, 1)}


class Places:
    """The addresses of one machine type, and how its virtio devices are called."""

    def __init__(self, machine: str) -> None:
        self.micro = machine.split(",")[0] == MICROVM

    def virtio(self, device: str) -> str:
        """Return the full name of a virtio device: `virtio-blk` is `virtio-blk-pci`."""
        return f"{device}-{'device' if self.micro else 'pci'}"

    def single(self, slot: int) -> dict[str, str | int | bool | None]:
        """Return the keys that place a device of which there is one."""
        if self.micro:
            return {"bus": f"virtio-mmio-bus.{_MMIO_SINGLE[slot]}"}
        return {"bus": "pcie.0", "addr": f"{slot:#x}"}

    def many(self, what: str, index: int, total: int) -> dict[str, str | int | bool | None]:
        """Return the keys that place the `index`-th of `total` disks, nics, shares, ….

        First each gets a slot of its own, then the slots' further functions fill.
        """
        places = _MMIO if self.micro else _PCI
        if what not in places:
            raise Unsupported(f"{what}: a machine of type {MICROVM} has none")
        room = places[what]
        if total > room.count * room.functions:
            raise InvalidArgument(
                f"at most {room.count * room.functions}, got {total}", field=f"machine.{what}"
            )
        if self.micro:
            return {"bus": f"virtio-mmio-bus.{room.first + index}"}
        return _function(room, index % room.count, index // room.count, total > room.count)

    def root_port(self, index: int, total: int) -> dict[str, str | int | bool | None]:
        """Return the keys that place the `index`-th of `total` ports for hot-plug."""
        if self.micro:
            raise Unsupported(f"root_ports: a machine of type {MICROVM} has no hot-plug")
        if total > ROOT_PORTS_MAX:
            raise InvalidArgument(
                f"at most {ROOT_PORTS_MAX}, got {total}", field="machine.root_ports"
            )
        return _function(_ROOT_PORTS, index // 8, index % 8, total > 1)


def _function(
    room: _Range, slot: int, function: int, shared: bool
) -> dict[str, str | int | bool | None]:
    return {
        "bus": "pcie.0",
        "addr": f"{room.first + slot:#x}.{function:#x}",
        "multifunction": True if shared and function == 0 else None,
    }
