"""The guest's memory: its size, where it is, NUMA, and locking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hutch.errors import InvalidArgument
from hutch.plan.machine.model import Memory, PluggedMemory, Shape
from hutch.plan.machine.quoting import options
from hutch.plan.machine.version import QemuVersion

__all__ = ["MEMORY_DEVICE", "MEMORY_MIN", "memory_arguments", "plugged_memory"]

MEMORY_MIN = 16 << 20
MEMORY_DEVICE = "plugged-dev"
"""What the device is called that gives memory while the machine runs."""
_MEMORY_OBJECT = "plugged"
_UNIT = 1 << 20
_OBJECTS = {
    "plain": "memory-backend-ram",
    "file": "memory-backend-file",
    "memfd": "memory-backend-memfd",
}


def memory_arguments(shape: Shape, version: QemuVersion) -> Iterator[str]:
    """Yield `-m`, the memory's objects, NUMA nodes and locking.

    The machine takes the object `ram`, or each NUMA node its own (`ram0`, …).
    """
    _check(shape)
    size = f"size={shape.memory // _UNIT}M"
    if shape.max_memory > shape.memory:
        size += f",slots={shape.memory_slots},maxmem={shape.max_memory // _UNIT}M"
    yield from ("-m", size)
    if not shape.numa:
        nodes = shape.backend.host_nodes
        yield from ("-object", _object("ram", shape.memory, shape.backend, nodes, version))
    for number, node in enumerate(shape.numa):
        name = f"ram{number}"
        yield from ("-object", _object(name, node.memory, shape.backend, node.host_nodes, version))
        processors = ",".join(f"cpus={vcpu}" for vcpu in node.vcpus)
        yield from ("-numa", f"node,nodeid={number},{processors},memdev={name}")
    if shape.lock_memory:
        yield from ("-overcommit", "mem-lock=on")


def _check(shape: Shape) -> None:
    field = "machine.shape.memory"
    for value in (shape.memory, shape.max_memory, *(node.memory for node in shape.numa)):
        if value % _UNIT:
            raise InvalidArgument(f"a multiple of 1 MiB, got {value}", field=field)
    if shape.memory < MEMORY_MIN:
        raise InvalidArgument(f"at least {MEMORY_MIN} bytes, got {shape.memory}", field=field)
    if shape.max_memory > shape.memory and shape.memory_slots < 1:
        raise InvalidArgument("room for memory needs slots", field="machine.shape.memory_slots")
    if shape.backend.kind == "file" and not shape.backend.path:
        raise InvalidArgument("a file needs a path", field="machine.shape.backend.path")
    _check_numa(shape)


def _check_numa(shape: Shape) -> None:
    if not shape.numa:
        return
    field = "machine.shape.numa"
    if sum(node.memory for node in shape.numa) != shape.memory:
        raise InvalidArgument("the nodes' memory is not the machine's", field=field)
    placed = sorted(vcpu for node in shape.numa for vcpu in node.vcpus)
    if placed != list(range(max(shape.vcpus, shape.max_vcpus))):
        raise InvalidArgument("each processor is in one node", field=field)
    if shape.backend.kind == "file":
        raise InvalidArgument("memory in one file has no nodes", field=field)


def _object(
    name: str, size: int, memory: Memory, host_nodes: tuple[int, ...], version: QemuVersion
) -> str:
    # Huge pages without a hugetlbfs come from a memory file.
    kind = "memfd" if memory.kind == "plain" and memory.huge_page else memory.kind
    private = kind == "file" and not memory.share and not memory.sealed
    read_only = private and version.maps_read_only_files
    text = options(
        _OBJECTS[kind],
        id=name,
        size=size,
        mem_path=memory.path if kind == "file" else None,
        share=memory.kind == "memfd" or memory.share,
        # A clone that was taken over cannot write to its template where it cannot open it so.
        readonly=True if read_only else None,
        rom=False if read_only else None,
        hugetlb=True if kind == "memfd" and memory.huge_page else None,
        hugetlbsize=memory.huge_page if kind == "memfd" and memory.huge_page else None,
        prealloc=True if memory.preallocate else None,
        merge=memory.merge,
        dump=False,
    )
    if host_nodes:
        text += "".join(f",host-nodes={node}" for node in host_nodes) + ",policy=bind"
    return text


def plugged_memory(
    shape: Shape, plugged: PluggedMemory, *, shared: bool
) -> tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]:
    """Return the object and the device that give a machine memory while it runs, each as
    its type and its properties.

    The object has all the room there is; the host gives what the guest takes of it. `shared`
    says that a device process must see the memory.
    """
    huge = shape.backend.huge_page
    backend: dict[str, Any] = {
        "id": _MEMORY_OBJECT,
        "size": shape.max_memory - shape.memory,
        "share": shared,
        "merge": shape.backend.merge,
        "dump": False,
        # Most of it is never used: the host need not be able to give it all.
        "reserve": False,
    }
    if huge:
        backend |= {"hugetlb": True, "hugetlbsize": huge}
    device: dict[str, Any] = {
        "id": MEMORY_DEVICE,
        "bus": plugged.port,
        "memdev": _MEMORY_OBJECT,
        "requested-size": plugged.requested,
    }
    if huge:
        # The guest is refused what the host has no page for; else it would die of using it.
        device["prealloc"] = True
    kind = _OBJECTS["memfd" if huge or shared else "plain"]
    return (kind, backend), ("virtio-mem-pci", device)
