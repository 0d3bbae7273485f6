"""Hosts as sysfs and procfs show them, written beneath a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hutch.resources.cpulist import format_cpulist
from hutch.resources.inventory import Inventory, read_inventory

GIB = 1 << 30


def write(root: Path, path: str, text: object) -> None:
    """Write one file of the tree."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{text}\n")


def write_host(
    root: Path,
    *,
    cpus: int,
    nodes: int = 1,
    threads: int = 1,
    cache_cores: int = 0,
    packages: int = 0,
    split: bool = True,
    memory: int = 8 * GIB,
    huge: Sequence[tuple[int, int, int]] = (),
    online: str = "",
    allowed: str = "",
) -> Path:
    """Write a host with `cpus` processors. With `split` the second threads of the cores have the
    upper half of the numbers, as Linux numbers them on most servers, else they are neighbours.
    `cache_cores` is how many cores share the last cache (0: all of a package)."""
    cores = cpus // threads
    packages = packages or nodes
    per_core = [
        [core + t * cores for t in range(threads)]
        if split
        else [core * threads + t for t in range(threads)]
        for core in range(cores)
    ]
    base = "sys/devices/system"
    everything = format_cpulist(range(cpus))
    write(root, f"{base}/cpu/present", everything)
    write(root, f"{base}/cpu/possible", everything)
    write(root, f"{base}/cpu/online", online or everything)
    share = cache_cores or cores // packages
    for core, members in enumerate(per_core):
        first = core // share * share
        cached = [n for c in range(first, first + share) for n in per_core[c]]
        for number in members:
            at = f"{base}/cpu/cpu{number}"
            write(root, f"{at}/topology/physical_package_id", core * packages // cores)
            write(root, f"{at}/topology/thread_siblings_list", format_cpulist(members))
            for index, (level, shared) in enumerate(((1, members), (2, members), (3, cached))):
                write(root, f"{at}/cache/index{index}/level", level)
                write(root, f"{at}/cache/index{index}/shared_cpu_list", format_cpulist(shared))
    write(root, f"{base}/node/online", format_cpulist(range(nodes)))
    for node in range(nodes):
        own = [n for core in range(cores) if core * nodes // cores == node for n in per_core[core]]
        at = f"{base}/node/node{node}"
        kib = memory // nodes // 1024
        write(root, f"{at}/cpulist", format_cpulist(own))
        write(root, f"{at}/distance", " ".join("10" if n == node else "21" for n in range(nodes)))
        write(root, f"{at}/meminfo", f"Node {node} MemTotal: {kib} kB\nNode {node} MemFree: 9 kB")
    for size, total, free in huge:
        at = f"sys/kernel/mm/hugepages/hugepages-{size // 1024}kB"
        write(root, f"{at}/nr_hugepages", total)
        write(root, f"{at}/free_hugepages", free)
    kib = memory // 1024
    write(
        root,
        "proc/meminfo",
        f"MemTotal: {kib} kB\nMemFree: {kib // 2} kB\nMemAvailable: {kib // 2} kB\n"
        "SwapTotal: 0 kB\nSwapFree: 0 kB",
    )
    write(
        root,
        "proc/self/status",
        f"Name:\tpython3\nCpus_allowed_list:\t{allowed or everything}\n"
        f"Mems_allowed_list:\t{format_cpulist(range(nodes))}",
    )
    return root


def read_host(root: Path) -> Inventory:
    """Read the tree that was written."""
    return read_inventory(root / "sys", root / "proc")


def host(root: Path, **shape: object) -> Inventory:
    """Write a host and read it."""
    return read_host(write_host(root, **shape))  # type: ignore[arg-type]
