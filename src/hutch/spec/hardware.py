"""How a machine's processors and memory are arranged: topology, NUMA nodes, pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.model import CpuTopology, MachineOptions, NumaNode, Resources
from hutch.spec.parse import integer, items, one_of, split_csv, text
from hutch.units import parse_bytes

__all__ = ["HARDWARE_READERS", "arranged", "check_hardware", "cpu_list"]

_MIB = 1 << 20
_MOST = 255
_CACHES = ("writeback", "none", "unsafe")
_AIO = ("threads", "native", "io_uring")


def arranged(resources: Resources, machine: MachineOptions) -> Resources:
    """Return the resources with the processors and the memory that an arrangement states."""
    from msgspec.structs import replace

    topology = machine.cpu_topology
    if not resources.cpus and not (resources.cpu_quota_us or resources.cpu_period_us):
        if machine.numa:
            placed = sum(len(node.cpus) for node in machine.numa)
            resources = replace(resources, cpus=float(placed))
        elif topology is not None and topology.sockets:
            number = topology.sockets * topology.cores * topology.threads
            resources = replace(resources, cpus=float(number))
    if machine.numa and not resources.memory:
        resources = replace(resources, memory=sum(node.memory for node in machine.numa))
    return resources


def check_hardware(resources: Resources, machine: MachineOptions) -> None:
    """Check what concerns processors, memory and their arrangement at once."""
    _check_topology(resources, machine)
    if machine.numa:
        _check_numa(resources, machine)
    if machine.memory_lock and machine.memory_max > resources.memory:
        raise InvalidArgument(
            "memory that is locked cannot grow while the machine runs",
            field="memory_max",
            hint="leave out --memory-max or --memory-lock",
        )
    if machine.disk_aio == "native" and machine.disk_cache != "none":
        raise InvalidArgument(
            "native needs a disk that is not cached", field="disk_aio", hint="--disk-cache none"
        )
    if machine.cpu_pin and resources.cpuset_cpus:
        listed = len(cpu_list(resources.cpuset_cpus, "cpuset_cpus"))
        if listed < resources.cpus:
            raise InvalidArgument(
                f"{listed} processors of the host for {resources.cpus:g}",
                field="cpuset_cpus",
                hint="with --cpu-pin each of the machine's has one to itself",
            )


def _check_topology(resources: Resources, machine: MachineOptions) -> None:
    wanted = machine.cpu_topology
    if wanted is None or not wanted.sockets:
        return
    most = wanted.sockets * wanted.cores * wanted.threads
    asked = max(resources.cpus, machine.cpus_max)
    if asked > most:
        raise InvalidArgument(
            f"{wanted.sockets} sockets of {wanted.cores} × {wanted.threads} are {most} "
            f"processors, not {asked:g}",
            field="cpu_topology",
        )


def _check_numa(resources: Resources, machine: MachineOptions) -> None:
    total = sum(node.memory for node in machine.numa)
    if total != resources.memory:
        raise InvalidArgument(
            f"the nodes have {total} bytes of memory, the machine {resources.memory}",
            field="numa",
            hint="what a machine with nodes has is what they have",
        )
    placed = sorted(cpu for node in machine.numa for cpu in node.cpus)
    if placed != list(range(len(placed))):
        raise InvalidArgument("each processor, counted from 0, is in one node", field="numa")
    wanted = max(resources.cpus, machine.cpus_max, 1)
    if len(placed) < wanted:
        raise InvalidArgument(
            f"the nodes have {len(placed)} processors, the machine {wanted:g}", field="numa"
        )


def _fields(value: Any, field: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of `key=value,…` or of a mapping; a comma may be in a quoted value."""
    if isinstance(value, Mapping):
        found = {str(key): entry for key, entry in value.items()}
    else:
        found = {}
        for part in split_csv(text(value, field, empty=False), field):
            key, equals, entry = part.partition("=")
            if not equals:
                # The rest of a list, as in `cpus=0,2,memory=1G`.
                last = next(reversed(found), None)
                if last is None:
                    raise InvalidArgument(f"expected KEY=VALUE, got {part[:40]!r}", field=field)
                found[last] += f",{part}"
            else:
                found[key.strip()] = entry
    for key in found:
        if key not in known:
            raise InvalidArgument(
                f"unknown key {key[:40]!r}", field=field, hint=f"known are {', '.join(known)}"
            )
    return found


def _topology(value: Any, field: str) -> CpuTopology:
    if isinstance(value, CpuTopology):
        value = {"sockets": value.sockets, "cores": value.cores, "threads": value.threads}
    found = _fields(value, field, ("sockets", "cores", "threads"))
    numbers = {
        key: integer(entry, f"{field}.{key}", low=0 if key == "sockets" else 1, high=_MOST)
        for key, entry in found.items()
    }
    made = CpuTopology(**numbers)
    if max(made.sockets, 1) * made.cores * made.threads > _MOST:
        raise InvalidArgument(f"more than {_MOST} processors", field=field)
    return made


def _numa(value: Any, field: str) -> tuple[NumaNode, ...]:
    entries = [value] if isinstance(value, (str, Mapping, NumaNode)) else items(value, field)
    return tuple(_node(entry, f"{field}[{index}]") for index, entry in enumerate(entries))


def _node(value: Any, field: str) -> NumaNode:
    if isinstance(value, NumaNode):
        value = {"cpus": value.cpus, "memory": value.memory, "host": value.host_nodes}
    found = _fields(value, field, ("cpus", "memory", "host"))
    for key in ("cpus", "memory"):
        if key not in found:
            raise InvalidArgument(f"{key} is missing", field=field, hint="cpus=0-1,memory=512M")
    memory = parse_bytes(found["memory"], field=f"{field}.memory")
    if not memory or memory % _MIB:
        raise InvalidArgument(f"must be whole MiB, got {memory} bytes", field=f"{field}.memory")
    return NumaNode(
        cpus=_numbers(found["cpus"], f"{field}.cpus"),
        memory=memory,
        host_nodes=_numbers(found.get("host", ()), f"{field}.host"),
    )


def _numbers(value: Any, field: str) -> tuple[int, ...]:
    if isinstance(value, (str, int)):
        return cpu_list(str(value), field)
    return tuple(integer(entry, field, low=0, high=_MOST * 4) for entry in value)


def cpu_list(given: str, field: str) -> tuple[int, ...]:
    """Return the numbers of a list as the kernel writes it: `0-2,5`."""
    found: list[int] = []
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        low = integer(first, field, low=0, high=_MOST * 4)
        high = integer(last, field, low=low, high=_MOST * 4) if dash else low
        found += range(low, high + 1)
    if len(set(found)) < len(found):
        raise InvalidArgument(f"a number is there twice: {given[:80]}", field=field)
    return tuple(found)


def _cache(value: Any, field: str) -> str:
    return one_of(value, field, _CACHES)


def _aio(value: Any, field: str) -> str:
    return one_of(value, field, _AIO)


HARDWARE_READERS: dict[str, Any] = {
    "cpu_topology": _topology,
    "disk_aio": _aio,
    "disk_cache": _cache,
    "numa": _numa,
}
