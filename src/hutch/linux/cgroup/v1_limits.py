"""How each limit is written in version 1 of the control group interface."""

from __future__ import annotations

import os

from hutch.errors import InvalidArgument, Unsupported
from hutch.linux.cgroup import files
from hutch.linux.cgroup.limits import (
    ALL_DEVICES,
    DEFAULT_PERIOD_US,
    UNLIMITED,
    DeviceRate,
    DeviceRule,
    Limits,
    cpu_bandwidth,
    swap_total,
)

__all__ = ["apply_limits"]

_NO_LIMIT = 1 << 62


def apply_limits(directories: dict[str, str], limits: Limits, *, fresh: bool) -> None:
    """Write the limits that are set into the directories of their controllers.

    `fresh` says that the group is new: then defaults (swap) are written too, and values
    that a new group has anyway need not be read first.
    """
    if "cpu" in directories:
        _cpu(directories["cpu"], limits, fresh)
    if "cpuset" in directories:
        _text(directories["cpuset"], "cpuset.mems", limits.cpuset_mems, "cpuset_mems")
        _text(directories["cpuset"], "cpuset.cpus", limits.cpuset_cpus, "cpuset_cpus")
    if "memory" in directories:
        _memory(directories["memory"], limits, fresh)
    if limits.pids is not None:
        value = "max" if limits.pids == UNLIMITED else str(limits.pids)
        files.write_value(directories["pids"], "pids.max", value, "pids")
    if "io" in directories:
        _io(directories["io"], limits)
    if limits.devices is not None and not (fresh and limits.devices == ALL_DEVICES):
        _devices(directories["devices"], limits.devices)


def _text(directory: str, name: str, value: str | int | None, field: str) -> None:
    if value is not None:
        files.write_value(directory, name, str(value), field)


def _cpu(directory: str, limits: Limits, fresh: bool) -> None:
    quota, period = cpu_bandwidth(limits)
    field = "cpus" if limits.cpus is not None else "cpu_quota_us"
    _text(directory, "cpu.shares", limits.cpu_shares, "cpu_shares")
    # Reading the period costs 40 µs, and a new group has the default.
    if period is not None and not (fresh and period == DEFAULT_PERIOD_US):
        files.write_value(directory, "cpu.cfs_period_us", str(period), "cpu_period_us")
    if quota is not None:
        files.write_value(directory, "cpu.cfs_quota_us", str(quota), field)


def _memory(directory: str, limits: Limits, fresh: bool) -> None:
    if limits.memory_min:
        raise Unsupported(
            "memory_min: version 1 of control groups has nothing that holds against others' growth",
            hint="use memory_reservation, or boot with systemd.unified_cgroup_hierarchy=1",
        )
    _memory_and_swap(directory, limits, fresh)
    if limits.memory_reservation is not None:
        value = str(limits.memory_reservation)
        files.write_value(directory, "memory.soft_limit_in_bytes", value, "memory_reservation")
    _text(directory, "memory.swappiness", limits.memory_swappiness, "memory_swappiness")
    if limits.oom_kill_disable is not None and (limits.oom_kill_disable or not fresh):
        value = str(int(limits.oom_kill_disable))
        files.write_value(directory, "memory.oom_control", value, "oom_kill_disable")


def _memory_and_swap(directory: str, limits: Limits, fresh: bool) -> None:
    total = swap_total(limits) if fresh else limits.memory_swap or None
    if limits.memory is None and total is None:
        return
    accounted = os.path.exists(f"{directory}/memory.memsw.limit_in_bytes")
    if not accounted:
        if limits.memory_swap:
            raise Unsupported(
                "memory_swap: this kernel does not account swap",
                hint="boot with swapaccount=1",
            )
        total = None
    if fresh:
        _write_memory(directory, limits.memory)
        if total is not None and total != UNLIMITED:
            _write_swap(directory, total)
        return
    _change_memory(directory, limits.memory, total, accounted)


def _change_memory(directory: str, memory: int | None, total: int | None, accounted: bool) -> None:
    """Write both limits in the order in which memory never exceeds the total."""
    total_now = _current(directory, "memory.memsw.limit_in_bytes") if accounted else _NO_LIMIT
    if memory == UNLIMITED and total is None:
        total = UNLIMITED if accounted else None
    if memory is not None and total is None and memory > total_now:
        raise InvalidArgument(
            f"{memory} is above the present limit of memory and swap, {total_now}",
            field="memory",
            hint="set memory_swap too",
        )
    grows = total is not None and (total == UNLIMITED or total >= total_now)
    if total is not None and grows:
        _write_swap(directory, total)
    _write_memory(directory, memory)
    if total is not None and not grows:
        if memory is None and total < _current(directory, "memory.limit_in_bytes"):
            raise InvalidArgument("must not be below memory", field="memory_swap")
        _write_swap(directory, total)


def _current(directory: str, name: str) -> int:
    return files.read_int(f"{directory}/{name}", _NO_LIMIT) or 0


def _write_memory(directory: str, memory: int | None) -> None:
    _text(directory, "memory.limit_in_bytes", memory, "memory")


def _write_swap(directory: str, total: int) -> None:
    files.write_value(directory, "memory.memsw.limit_in_bytes", str(total), "memory_swap")


def _io(directory: str, limits: Limits) -> None:
    if limits.blkio_weight is not None:
        weight = str(limits.blkio_weight)
        name = "blkio.weight"
        if not os.path.exists(f"{directory}/{name}"):
            name = "blkio.bfq.weight"
        files.write_value(directory, name, weight, "blkio_weight")
    _rates(directory, "blkio.throttle.read_bps_device", limits.device_read_bps, "device_read_bps")
    _rates(
        directory, "blkio.throttle.write_bps_device", limits.device_write_bps, "device_write_bps"
    )
    _rates(
        directory, "blkio.throttle.read_iops_device", limits.device_read_iops, "device_read_iops"
    )
    _rates(
        directory,
        "blkio.throttle.write_iops_device",
        limits.device_write_iops,
        "device_write_iops",
    )


def _rates(directory: str, name: str, rates: tuple[DeviceRate, ...] | None, field: str) -> None:
    for index, (major, minor, rate) in enumerate(rates or ()):
        files.write_value(directory, name, f"{major}:{minor} {rate}", f"{field}[{index}]")


def _devices(directory: str, rules: tuple[DeviceRule, ...]) -> None:
    files.write_value(directory, "devices.deny", "a", "devices")
    if all(rule.allow for rule in rules):
        # The usual case, and on the way of every start: one open for all rules.
        lines = [_device_line(rule) for rule in rules]
        files.write_values(directory, "devices.allow", lines, "devices")
        return
    for index, rule in enumerate(rules):
        name = "devices.allow" if rule.allow else "devices.deny"
        files.write_value(directory, name, _device_line(rule), f"devices[{index}]")


def _device_line(rule: DeviceRule) -> str:
    if rule.kind == "a":
        return "a"
    major = "*" if rule.major < 0 else str(rule.major)
    minor = "*" if rule.minor < 0 else str(rule.minor)
    return f"{rule.kind} {major}:{minor} {rule.access}"
