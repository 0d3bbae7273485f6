"""The options of a virtual machine: accelerator, kernel, machine type, disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.hardware import HARDWARE_READERS
from hutch.spec.model import DiskKeySource, MachineOptions, Resources
from hutch.spec.parse import absolute_path, flag, integer, one_of, text
from hutch.units import parse_bytes

__all__ = ["MACHINE_OPTIONS", "read_machine"]

MACHINE_OPTIONS = frozenset(
    """accel cpu_model cpu_pin cpu_topology cpus_max disk disk_aio disk_cache disk_key kernel
    machine memory_lock memory_max numa template tpm""".split()
)
MIN_DISK = 64 << 20
MAX_DISK = 16 << 40
MAX_VCPUS = 255
"""What the interrupt controllers of a machine without more ado can address."""
MAX_MEMORY = 4 << 40
_ACCELERATORS = ("auto", "kvm", "tcg")


def read_machine(given: Mapping[str, Any], isolation: str) -> MachineOptions:
    """Return the machine's options; refuse them where there is no machine."""
    named = [name for name in given if name in MACHINE_OPTIONS]
    if not named:
        return MachineOptions()
    if isolation == "container":
        raise InvalidArgument(
            "is an option of virtual machines",
            field=named[0],
            hint="add --vm (isolation='vm'), or leave it out",
        )
    values = {name: _READERS[name](given[name], name) for name in named}
    return MachineOptions(**values)


def read_disk(value: Any, machine: MachineOptions, isolation: str) -> MachineOptions:
    """Return a machine's options with another size of its disk."""
    from msgspec.structs import replace

    return replace(machine, disk=read_machine({"disk": value}, isolation).disk)


def check_room(resources: Resources, machine: MachineOptions) -> None:
    """Refuse more memory or processors than the machine is to have room for."""
    if machine.memory_max and resources.memory > machine.memory_max:
        raise InvalidArgument(
            f"is more than the {machine.memory_max} bytes of memory_max",
            field="memory",
            hint="give a larger --memory-max when the machine is created",
        )
    if machine.cpus_max and resources.cpus > machine.cpus_max:
        raise InvalidArgument(
            f"are more than the {machine.cpus_max} of cpus_max",
            field="cpus",
            hint="give a larger --cpus-max when the machine is created",
        )


def _accel(value: Any, field: str) -> str:
    return one_of(value, field, _ACCELERATORS)


def _word(value: Any, field: str) -> str:
    word = text(value, field, empty=False)
    plain = word.replace("-", "").replace(".", "").replace("_", "").replace("+", "")
    # Beyond these, QEMU would read further options (`,`) or a path from it.
    if not (plain.isascii() and plain.isalnum() and len(word) <= 128):
        raise InvalidArgument(
            f"invalid name {word[:80]!r}", field=field, hint="use letters, digits, `-`, `_`, `.`"
        )
    return word


def _model(value: Any, field: str) -> str:
    """Return a CPU model with features: `max`, `EPYC,+svm,-avx2`."""
    parts = text(value, field, empty=False).split(",")
    for part in parts:
        _word(part, field)
    if parts[0][:1] in "+-":
        raise InvalidArgument("a model comes before its features", field=field)
    return ",".join(parts)


def _disk(value: Any, field: str) -> int:
    size = parse_bytes(value, field=field)
    if not MIN_DISK <= size <= MAX_DISK:
        raise InvalidArgument(f"must be from 64M to 16T, got {size} bytes", field=field)
    return size


def _cpus_max(value: Any, field: str) -> int:
    return integer(value, field, low=1, high=MAX_VCPUS)


def _memory_max(value: Any, field: str) -> int:
    size = parse_bytes(value, field=field)
    if not 0 < size <= MAX_MEMORY:
        raise InvalidArgument(
            f"must be from 1 to {MAX_MEMORY >> 40}T, got {size} bytes", field=field
        )
    return size


def _disk_key(value: Any, field: str) -> DiskKeySource:
    """Return where the key comes from; the key itself is none of the specification's."""
    if isinstance(value, DiskKeySource):
        return value
    return DiskKeySource(file=absolute_path(value, field))


_READERS: dict[str, Any] = {
    **HARDWARE_READERS,
    "accel": _accel,
    "cpu_model": _model,
    "cpu_pin": flag,
    "cpus_max": _cpus_max,
    "disk": _disk,
    "disk_key": _disk_key,
    "kernel": _word,
    "machine": _word,
    "memory_lock": flag,
    "memory_max": _memory_max,
    "template": flag,
    "tpm": flag,
}
