"""Find out which control groups this process may use, from mountinfo and its own groups."""

from __future__ import annotations

import os

from hutch.linux.cgroup.protocol import Hierarchy
from hutch.linux.cgroup.v1 import TRACKING, V1Hierarchy

__all__ = ["bound_cpusets", "detect"]

_CONTROLLERS = {
    "cpu": "cpu",
    "cpuacct": "cpuacct",
    "cpuset": "cpuset",
    "memory": "memory",
    "blkio": "io",
    "pids": "pids",
    "freezer": "freezer",
    "devices": "devices",
    "hugetlb": "hugetlb",
    TRACKING: TRACKING,
}


def detect(
    cgroup_root: str | os.PathLike[str] = "/sys/fs/cgroup",
    *,
    proc: str | os.PathLike[str] = "/proc",
    parent: str = "hutch",
) -> Hierarchy:
    """Return the hierarchy in which this process may make groups beneath `parent`."""
    from hutch.linux.cgroup.hybrid import HybridHierarchy, NoHierarchy
    from hutch.linux.cgroup.v2 import find_v2

    v1_mounts, v2_mount = _mounts(os.fspath(cgroup_root), os.fspath(proc))
    track = os.path.isdir("/run/systemd/system")
    usable = {name: path for name, path in v1_mounts.items() if os.access(path, os.W_OK)}
    v2 = find_v2(v2_mount, os.fspath(proc), parent) if v2_mount else None
    if set(usable) - {TRACKING}:
        v1 = V1Hierarchy(usable, parent, track=track)
        return HybridHierarchy(v1, v2, track=track) if v2 else v1
    if v2 is not None:
        return v2
    return NoHierarchy()


def bound_cpusets(
    cgroup_root: str | os.PathLike[str] = "/sys/fs/cgroup",
    *,
    proc: str | os.PathLike[str] = "/proc",
) -> tuple[str | None, str | None]:
    """Return the lists of processors and of memory nodes that instances' groups are within;
    None where no cpuset says so, and this process's own are to be taken."""
    from hutch.linux.cgroup.files import read_text

    v1_mounts, v2_mount = _mounts(os.fspath(cgroup_root), os.fspath(proc))
    places = [f"{v1_mounts['cpuset']}/cpuset.effective_"] if "cpuset" in v1_mounts else []
    if v2_mount:
        places.append(f"{v2_mount}/cpuset.")
    for place in places:
        ending = "" if place.endswith("effective_") else ".effective"
        try:
            return read_text(f"{place}cpus{ending}"), read_text(f"{place}mems{ending}")
        except OSError:
            continue
    return None, None


def _mounts(cgroup_root: str, proc: str) -> tuple[dict[str, str], str | None]:
    """Return the v1 mount of each controller and the v2 mount beneath the root."""
    found: dict[str, str] = {}
    unified: str | None = None
    with open(f"{proc}/self/mountinfo", "rb") as file:
        lines = file.read().decode(errors="surrogateescape").splitlines()
    for line in lines:
        # 36 35 98:0 /root /mount/point options... - type source super-options
        if " - cgroup" not in line:
            continue
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        fstype, _, options = after.split(" ", 2)
        if point != cgroup_root and not point.startswith(cgroup_root + "/"):
            continue
        if fstype == "cgroup2":
            unified = point
        elif fstype == "cgroup":
            for option in options.split(","):
                if option in _CONTROLLERS:
                    found.setdefault(_CONTROLLERS[option], point)
    return found, unified
