"""How each limit is written in version 2 of the control group interface."""

from __future__ import annotations

import os

from hutch.errors import Denied, InvalidArgument, Unsupported
from hutch.linux.cgroup import files
from hutch.linux.cgroup.limits import (
    ALL_DEVICES,
    DEFAULT_PERIOD_US,
    UNLIMITED,
    DeviceRule,
    Limits,
    cpu_bandwidth,
    shares_to_weight,
    swap_total,
)

__all__ = ["apply_limits"]


def apply_limits(directory: str, limits: Limits, *, fresh: bool, devices: bool) -> None:
    """Write the limits that are set; `devices` says whether device rules can be attached."""
    _refuse_v1_only(limits)
    _cpu(directory, limits)
    for name, value in (("cpuset_cpus", limits.cpuset_cpus), ("cpuset_mems", limits.cpuset_mems)):
        if value is not None:
            files.write_value(directory, name.replace("_", "."), value, name)
    _memory(directory, limits, fresh)
    if limits.pids is not None:
        files.write_value(directory, "pids.max", _maximum(limits.pids), "pids")
    _io(directory, limits)
    wanted = limits.devices
    if devices and wanted is not None and not (fresh and wanted == ALL_DEVICES):
        _devices(directory, wanted)


def _maximum(value: int) -> str:
    return "max" if value == UNLIMITED else str(value)


def _refuse_v1_only(limits: Limits) -> None:
    if limits.memory_swappiness is not None:
        raise Unsupported("memory_swappiness: not available with cgroup v2")
    if limits.oom_kill_disable:
        raise Unsupported("oom_kill_disable: not available with cgroup v2")


def _cpu(directory: str, limits: Limits) -> None:
    if limits.cpu_shares is not None:
        weight = str(shares_to_weight(limits.cpu_shares))
        files.write_value(directory, "cpu.weight", weight, "cpu_shares")
    quota, period = cpu_bandwidth(limits)
    if quota is None and period is None:
        return
    field = "cpus" if limits.cpus is not None else "cpu_quota_us"
    if quota is None or period is None:
        now = _read_words(f"{directory}/cpu.max") or ["max", str(DEFAULT_PERIOD_US)]
        quota_text = now[0] if quota is None else _maximum(quota)
        period_text = now[1] if period is None else str(period)
    else:
        quota_text, period_text = _maximum(quota), str(period)
    files.write_value(directory, "cpu.max", f"{quota_text} {period_text}", field)


def _read_words(path: str) -> list[str]:
    try:
        return files.read_text(path).split()
    except FileNotFoundError:
        return []


def _memory(directory: str, limits: Limits, fresh: bool) -> None:
    swap = _swap(directory, limits, fresh)
    if limits.memory is not None:
        files.write_value(directory, "memory.max", _maximum(limits.memory), "memory")
    if swap is not None:
        files.write_value(directory, "memory.swap.max", _maximum(swap), "memory_swap")
    if limits.memory_reservation is not None:
        value = str(limits.memory_reservation)
        files.write_value(directory, "memory.low", value, "memory_reservation")
    if limits.memory_min is not None:
        files.write_value(directory, "memory.min", str(limits.memory_min), "memory_min")


def _swap(directory: str, limits: Limits, fresh: bool) -> int | None:
    """Return what memory.swap.max shall be: v2 counts swap alone. None leaves it."""
    total = swap_total(limits) if fresh else limits.memory_swap or None
    if limits.memory is None and total is None:
        return None
    if not os.path.exists(f"{directory}/memory.swap.max"):
        if limits.memory_swap:
            raise Unsupported("memory_swap: this kernel does not account swap")
        return None
    if total == UNLIMITED or (limits.memory == UNLIMITED and total is None):
        return UNLIMITED
    memory_now = files.read_int(f"{directory}/memory.max", None)
    if total is None:
        total = _present_total(directory, memory_now, limits.memory or 0)
        if total is None:
            return None
    memory = limits.memory if limits.memory is not None else memory_now
    if memory is None:
        raise InvalidArgument("needs memory, which is unlimited", field="memory_swap")
    if total < memory:
        raise InvalidArgument("must not be below memory", field="memory_swap")
    return total - memory


def _present_total(directory: str, memory_now: int | None, memory: int) -> int | None:
    swap_now = files.read_int(f"{directory}/memory.swap.max", None)
    if swap_now is None or memory_now is None:
        return None
    if memory > memory_now + swap_now:
        raise InvalidArgument(
            f"{memory} is above the present limit of memory and swap, {memory_now + swap_now}",
            field="memory",
            hint="set memory_swap too",
        )
    return memory_now + swap_now


def _io(directory: str, limits: Limits) -> None:
    if limits.blkio_weight is not None:
        if os.path.exists(f"{directory}/io.bfq.weight"):
            weight = limits.blkio_weight
            files.write_value(directory, "io.bfq.weight", str(weight), "blkio_weight")
        else:
            # 10..1000 of v1 laid linearly on 1..10000.
            weight = 1 + (limits.blkio_weight - 10) * 9999 // 990
            files.write_value(directory, "io.weight", f"default {weight}", "blkio_weight")
    for field, key in (
        ("device_read_bps", "rbps"),
        ("device_write_bps", "wbps"),
        ("device_read_iops", "riops"),
        ("device_write_iops", "wiops"),
    ):
        for index, (major, minor, rate) in enumerate(getattr(limits, field) or ()):
            line = f"{major}:{minor} {key}={rate or 'max'}"
            files.write_value(directory, "io.max", line, f"{field}[{index}]")


def _devices(directory: str, rules: tuple[DeviceRule, ...]) -> None:
    from hutch.linux.cgroup.device_bpf import attach_rules

    try:
        attach_rules(directory, rules)
    except PermissionError as exc:
        raise Denied(
            "devices: not allowed to load a device program",
            hint="it needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN",
        ) from exc
    except OSError as exc:
        raise Unsupported(f"devices: the kernel refused a device program: {exc}") from exc
