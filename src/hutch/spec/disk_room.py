"""How much an instance may write to its own disk, or to its layer. Pure."""

from __future__ import annotations

from hutch.spec.model import InstanceSpec
from hutch.units import parse_bytes

__all__ = ["DEFAULT_DISK", "disk_room"]

DEFAULT_DISK = 10 << 30
"""What a virtual machine sees as its disk when nothing is said, in bytes."""


def disk_room(spec: InstanceSpec) -> int:
    """Return the bytes that an instance may have of its own, 0 for a container without a
    limit."""
    asked = spec.storage_options.get("size")
    stated = parse_bytes(asked, field="storage_opts.size") if asked else 0
    if spec.isolation != "vm":
        return stated
    return spec.machine.disk or stated or DEFAULT_DISK
