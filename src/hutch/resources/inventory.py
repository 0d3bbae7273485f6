"""What the host has: processors with their cores, caches and memory nodes, memory, huge pages.

Everything is read from sysfs and procfs, whose places are arguments; nothing is assumed where
a file is missing (a kernel without NUMA has one node, one without topology one thread a core).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from hutch.resources.cpulist import parse_cpulist

__all__ = ["Cpu", "HugePages", "Inventory", "Node", "Room", "read_inventory"]


class HugePages(msgspec.Struct, frozen=True, kw_only=True):
    """Huge pages of one size: `size` in bytes, `total` and `free` in pages."""

    size: int
    total: int
    free: int


class Cpu(msgspec.Struct, frozen=True, kw_only=True):
    """One logical processor that may be used. `core` is the lowest number among the threads of
    its core, `cache` that among the processors of its last-level cache."""

    id: int
    core: int
    cache: int
    node: int
    package: int


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One memory node; memory in bytes. `distances` are those of its table, to each node."""

    id: int
    cpus: tuple[int, ...]
    memory: int
    free: int
    huge: tuple[HugePages, ...] = ()
    distances: tuple[int, ...] = ()


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """A file system on which something is kept; bytes."""

    path: str
    total: int
    free: int


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """The host as far as instances may use it. `offline` are processors that are switched off,
    `forbidden` those that a cpuset keeps from us. Memory in bytes."""

    cpus: tuple[Cpu, ...]
    nodes: tuple[Node, ...]
    memory: int
    available: int
    swap: int = 0
    swap_free: int = 0
    huge: tuple[HugePages, ...] = ()
    offline: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()
    rooms: tuple[Room, ...] = ()

    @property
    def cpu_ids(self) -> frozenset[int]:
        """The numbers of the processors."""
        return frozenset(cpu.id for cpu in self.cpus)

    @property
    def threads_per_core(self) -> int:
        """The most threads that a core has here, those that are forbidden left out."""
        counts: dict[int, int] = {}
        for cpu in self.cpus:
            counts[cpu.core] = counts.get(cpu.core, 0) + 1
        return max(counts.values(), default=1)


def read_inventory(
    sys: str | os.PathLike[str] = "/sys",
    proc: str | os.PathLike[str] = "/proc",
    *,
    cpuset: str | None = None,
    mems: str | None = None,
    rooms: Sequence[str] = (),
) -> Inventory:
    """Return what there is. `cpuset` and `mems` are the lists that instances are bound to;
    None takes those of this process."""
    sysfs, procfs = os.fspath(sys), os.fspath(proc)
    status = _status(f"{procfs}/self/status")
    allowed_text = status.get("Cpus_allowed_list") if cpuset is None else cpuset
    mems_text = status.get("Mems_allowed_list") if mems is None else mems
    base = f"{sysfs}/devices/system/cpu"
    present = parse_cpulist(_text(f"{base}/present") or "0")
    online = parse_cpulist(_text(f"{base}/online") or _text(f"{base}/present") or "0")
    allowed = set(parse_cpulist(allowed_text)) if allowed_text else set(online)
    usable = [number for number in online if number in allowed]
    nodes = _nodes(sysfs, set(usable), set(parse_cpulist(mems_text)) if mems_text else None)
    meminfo = _meminfo(_text(f"{procfs}/meminfo"))
    if not nodes:
        nodes = [
            Node(id=0, cpus=tuple(usable), memory=meminfo["MemTotal"], free=meminfo["MemFree"])
        ]
    node_of = {cpu: node.id for node in nodes for cpu in node.cpus}
    return Inventory(
        cpus=tuple(_cpu(base, number, set(usable), node_of) for number in usable),
        nodes=tuple(nodes),
        memory=meminfo["MemTotal"],
        available=meminfo["MemAvailable"],
        swap=meminfo["SwapTotal"],
        swap_free=meminfo["SwapFree"],
        huge=_huge(f"{sysfs}/kernel/mm/hugepages"),
        offline=tuple(sorted(set(present) - set(online))),
        forbidden=tuple(sorted(set(online) - set(usable))),
        rooms=tuple(_room(path) for path in rooms),
    )


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _integer(path: str, default: int = 0) -> int:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else default


def _status(path: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in _text(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _meminfo(text: str) -> dict[str, int]:
    """Return the lines of a meminfo file in bytes; what is missing is 0."""
    found = dict.fromkeys(("MemTotal", "MemFree", "MemAvailable", "SwapTotal", "SwapFree"), 0)
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if words[:1] == ["Node"]:  # as the files of nodes have it
            words = words[2:]
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1]) * (1024 if words[-1] == "kB" else 1)
    if not found["MemAvailable"]:
        found["MemAvailable"] = found["MemFree"]
    return found


def _cpu(base: str, number: int, usable: set[int], node_of: dict[int, int]) -> Cpu:
    topology = f"{base}/cpu{number}/topology"
    threads = _text(f"{topology}/core_cpus_list") or _text(f"{topology}/thread_siblings_list")
    siblings = {n for n in parse_cpulist(threads) if n in usable} or {number}
    return Cpu(
        id=number,
        core=min(siblings),
        cache=_last_cache(f"{base}/cpu{number}/cache", number, usable),
        node=node_of.get(number, 0),
        package=max(0, _integer(f"{topology}/physical_package_id")),
    )


def _last_cache(directory: str, number: int, usable: set[int]) -> int:
    """Return the lowest processor that shares the cache of the highest level with this one."""
    best, shared = -1, {number}
    try:
        names = os.listdir(directory)
    except OSError:
        return number
    for name in names:
        if not name.startswith("index"):
            continue
        level = _integer(f"{directory}/{name}/level")
        if level > best:
            best = level
            listed = parse_cpulist(_text(f"{directory}/{name}/shared_cpu_list"))
            shared = {n for n in listed if n in usable} or {number}
    return min(shared)


def _nodes(sysfs: str, usable: set[int], mems: set[int] | None) -> list[Node]:
    base = f"{sysfs}/devices/system/node"
    found = []
    for number in parse_cpulist(_text(f"{base}/online")):
        if mems is not None and number not in mems:
            continue
        directory = f"{base}/node{number}"
        meminfo = _meminfo(_text(f"{directory}/meminfo"))
        found.append(
            Node(
                id=number,
                cpus=tuple(n for n in parse_cpulist(_text(f"{directory}/cpulist")) if n in usable),
                memory=meminfo["MemTotal"],
                free=meminfo["MemFree"],
                huge=_huge(f"{directory}/hugepages"),
                distances=tuple(int(n) for n in _text(f"{directory}/distance").split()),
            )
        )
    return found


def _huge(directory: str) -> tuple[HugePages, ...]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return ()
    found = []
    for name in names:
        kib = name.removeprefix("hugepages-").removesuffix("kB")
        if kib.isdigit():
            total = _integer(f"{directory}/{name}/nr_hugepages")
            free = _integer(f"{directory}/{name}/free_hugepages")
            found.append(HugePages(size=int(kib) * 1024, total=total, free=free))
    return tuple(sorted(found, key=lambda pages: pages.size))


def _room(path: str) -> Room:
    status = os.statvfs(path)
    block = status.f_frsize
    return Room(path=path, total=status.f_blocks * block, free=status.f_bavail * block)
