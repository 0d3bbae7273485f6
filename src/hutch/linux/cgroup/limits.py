"""What may be asked of a control group, in one vocabulary for v1 and v2, and its validation."""

from __future__ import annotations

import msgspec

from hutch.errors import InvalidArgument, Unsupported

__all__ = [
    "ALL_DEVICES",
    "CONTROLLER",
    "DEFAULT_DEVICES",
    "DEFAULT_PERIOD_US",
    "DeviceRate",
    "DeviceRule",
    "Limits",
    "check_supported",
    "cpu_bandwidth",
    "requested",
    "shares_to_weight",
    "swap_total",
    "validate",
    "without",
]

DEFAULT_PERIOD_US = 100_000
UNLIMITED = -1

DeviceRate = tuple[int, int, int]
"""(major, minor, bytes or operations per second)."""


class DeviceRule(msgspec.Struct, frozen=True, kw_only=True):
    """Allow or deny access to device nodes; -1 as a number stands for any.

    `kind` is `c`, `b` or `a` (both); `access` some of `r`, `w` and `m` (mknod).
    """

    allow: bool = True
    kind: str = "a"
    major: int = -1
    minor: int = -1
    access: str = "rwm"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a group. None leaves what is there, so that one type serves `update` too.

    Sizes in bytes. `cpus` is a number of CPUs and an alternative to `cpu_quota_us`; -1 as
    quota, memory, swap or pids takes the limit away. `memory_swap` is memory and swap
    together, as Docker counts; without it (or with 0), a new group gets as much swap again.
    `devices` is applied in order to "everything denied"; None allows everything.
    """

    cpus: float | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    cpu_shares: int | None = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    memory: int | None = None
    memory_reservation: int | None = None
    memory_min: int | None = None
    memory_swap: int | None = None
    memory_swappiness: int | None = None
    oom_kill_disable: bool | None = None
    pids: int | None = None
    blkio_weight: int | None = None
    device_read_bps: tuple[DeviceRate, ...] | None = None
    device_write_bps: tuple[DeviceRate, ...] | None = None
    device_read_iops: tuple[DeviceRate, ...] | None = None
    device_write_iops: tuple[DeviceRate, ...] | None = None
    devices: tuple[DeviceRule, ...] | None = None


def _char(major: int, minor: int, access: str = "rwm") -> DeviceRule:
    return DeviceRule(kind="c", major=major, minor=minor, access=access)


DEFAULT_DEVICES: tuple[DeviceRule, ...] = (
    DeviceRule(kind="c", access="m"),
    DeviceRule(kind="b", access="m"),
    _char(1, 3),  # null
    _char(1, 5),  # zero
    _char(1, 7),  # full
    _char(1, 8),  # random
    _char(1, 9),  # urandom
    _char(5, 0),  # tty
    _char(5, 1),  # console
    _char(5, 2),  # ptmx
    _char(136, -1),  # pts/*
)
ALL_DEVICES: tuple[DeviceRule, ...] = (DeviceRule(),)


CONTROLLER: dict[str, str] = {
    "cpus": "cpu",
    "cpu_quota_us": "cpu",
    "cpu_period_us": "cpu",
    "cpu_shares": "cpu",
    "cpuset_cpus": "cpuset",
    "cpuset_mems": "cpuset",
    "memory": "memory",
    "memory_reservation": "memory",
    "memory_min": "memory",
    "memory_swap": "memory",
    "memory_swappiness": "memory",
    "oom_kill_disable": "memory",
    "pids": "pids",
    "blkio_weight": "io",
    "device_read_bps": "io",
    "device_write_bps": "io",
    "device_read_iops": "io",
    "device_write_iops": "io",
    "devices": "devices",
}
"""The controller behind each field, by its v2 name (v1 calls `io` `blkio`)."""


def requested(limits: Limits) -> dict[str, str]:
    """Return the fields that are set, with their controller."""
    return {
        field: controller
        for field, controller in CONTROLLER.items()
        if getattr(limits, field) is not None
    }


def check_supported(limits: Limits, controllers: frozenset[str], hint: str | None) -> None:
    """Raise `Unsupported` for the first limit whose controller is not among `controllers`."""
    for field, controller in requested(limits).items():
        if controller not in controllers:
            raise Unsupported(f"{field}: this host has no {controller} controller", hint=hint)


def without(limits: Limits, controllers: frozenset[str]) -> Limits:
    """Return the limits less those of the given controllers."""
    gone = [field for field, owner in requested(limits).items() if owner in controllers]
    return msgspec.structs.replace(limits, **dict.fromkeys(gone))


def cpu_bandwidth(limits: Limits) -> tuple[int | None, int | None]:
    """Return (quota, period) in microseconds; `cpus` is turned into a quota."""
    if limits.cpus is None:
        return limits.cpu_quota_us, limits.cpu_period_us
    period = limits.cpu_period_us or DEFAULT_PERIOD_US
    return int(limits.cpus * period + 0.5), period


def shares_to_weight(shares: int) -> int:
    """Return the v2 cpu.weight for v1 shares: 2..262144 laid linearly on 1..10000."""
    bounded = min(max(shares, 2), 262144)
    return 1 + (bounded - 2) * 9999 // 262142


def swap_total(limits: Limits) -> int | None:
    """Return memory and swap together for a new group, with Docker's default of twice memory."""
    if limits.memory_swap:
        return limits.memory_swap
    if limits.memory is None:
        return None
    return UNLIMITED if limits.memory == UNLIMITED else 2 * limits.memory


def validate(limits: Limits) -> None:
    """Raise `InvalidArgument`, naming the field, for values that no kernel could take."""
    if limits.cpus is not None and limits.cpu_quota_us is not None:
        raise InvalidArgument("cannot be combined with cpu_quota_us", field="cpus")
    _at_least("cpus", limits.cpus, 0.01)
    _at_least("cpu_period_us", limits.cpu_period_us, 1000)
    if limits.cpu_quota_us != UNLIMITED:
        _at_least("cpu_quota_us", limits.cpu_quota_us, 1000)
    _at_least("cpu_shares", limits.cpu_shares, 2)
    for name, low in (("memory", 1), ("memory_swap", 0), ("pids", 1)):
        value: int | None = getattr(limits, name)
        if value != UNLIMITED:
            _at_least(name, value, low)
    _at_least("memory_reservation", limits.memory_reservation, 0)
    _at_least("memory_min", limits.memory_min, 0)
    _within("memory_swappiness", limits.memory_swappiness, 0, 100)
    _within("blkio_weight", limits.blkio_weight, 10, 1000)
    _check_swap(limits)
    for name in ("device_read_bps", "device_write_bps", "device_read_iops", "device_write_iops"):
        _check_rates(name, getattr(limits, name))
    for index, rule in enumerate(limits.devices or ()):
        _check_device(f"devices[{index}]", rule)


def _at_least(field: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise InvalidArgument(f"must be at least {low}, got {value!r}", field=field)


def _within(field: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidArgument(f"must be from {low} to {high}, got {value!r}", field=field)


def _check_swap(limits: Limits) -> None:
    memory, total = limits.memory, limits.memory_swap
    if memory is None or not total or total == UNLIMITED:
        return
    if memory == UNLIMITED or total < memory:
        raise InvalidArgument(
            f"must not be below memory, got {total}",
            field="memory_swap",
            hint="memory_swap counts memory and swap together; -1 is unlimited",
        )


def _check_rates(field: str, rates: tuple[DeviceRate, ...] | None) -> None:
    for index, (major, minor, rate) in enumerate(rates or ()):
        if min(major, minor, rate) < 0:
            raise InvalidArgument("numbers must not be negative", field=f"{field}[{index}]")


def _check_device(field: str, rule: DeviceRule) -> None:
    if rule.kind not in ("a", "b", "c"):
        raise InvalidArgument(f"expected a, b or c, got {rule.kind!r}", field=f"{field}.kind")
    if not rule.access or set(rule.access) - set("rwm"):
        raise InvalidArgument(f"expected some of rwm, got {rule.access!r}", field=f"{field}.access")
    if rule.major < -1 or rule.minor < -1:
        raise InvalidArgument("numbers must not be negative", field=field)
