"""Control groups: one interface for version 1, version 2 and hosts that mount both."""

from __future__ import annotations

from hutch.linux.cgroup.detect import bound_cpusets, detect
from hutch.linux.cgroup.limits import ALL_DEVICES, DEFAULT_DEVICES, DeviceRate, DeviceRule, Limits
from hutch.linux.cgroup.protocol import Group, Hierarchy
from hutch.linux.cgroup.stats import BlockDevice, CpuStats, MemoryStats, PidsStats, Stats

__all__ = [
    "detect",
    "bound_cpusets",
    "Hierarchy",
    "Group",
    "Limits",
    "DeviceRule",
    "DeviceRate",
    "DEFAULT_DEVICES",
    "ALL_DEVICES",
    "Stats",
    "CpuStats",
    "MemoryStats",
    "PidsStats",
    "BlockDevice",
]
