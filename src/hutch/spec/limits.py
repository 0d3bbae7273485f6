"""Limits and devices: memory, CPUs, block devices, `--ulimit`, `--sysctl`, `--device`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.model import DeviceNode, Resources, Throttle, Ulimit
from hutch.spec.parse import absolute_path, flag, integer, items, mapping, number, strings, text
from hutch.units import parse_bytes

__all__ = [
    "RATES",
    "RESOURCE_OPTIONS",
    "is_machine_disk",
    "lifted",
    "machine_disks",
    "parse_device",
    "parse_device_rules",
    "parse_ulimits",
    "read_resources",
    "read_sysctls",
]

MIN_MEMORY = 6 << 20
MIN_MACHINE = 96 << 20
"""What a guest's kernel with its initramfs needs to get to its end, in bytes."""
RESOURCE_OPTIONS = frozenset(
    """blkio_weight cpu_period cpu_quota cpu_shares cpus cpuset_cpus cpuset_mems device_read_bps
    device_read_iops device_write_bps device_write_iops memory memory_min memory_reservation
    memory_swap memory_swappiness oom_kill_disable pids_limit""".split()
)
RATES = ("device_read_bps", "device_write_bps", "device_read_iops", "device_write_iops")
_ULIMITS = frozenset(
    """as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime
    sigpending stack""".split()
)
_MAX_LIMIT = (1 << 63) - 1


# ---- resources --------------------------------------------------------------------------


def read_resources(
    given: Mapping[str, Any], base: Resources | None = None, *, machine: bool = False
) -> Resources:
    """Return the limits of the options over those of `base`, checked against each other and
    against what a container, or a `machine`, needs at least."""
    named = [name for name in given if name in RESOURCE_OPTIONS]
    if not named:
        return base or Resources()
    changes: dict[str, Any] = {}
    for name in named:
        field, read = _RESOURCES[name]
        changes[field] = read(given[name], name)
    if base is None:
        resources = Resources(**changes)
    else:
        from msgspec.structs import replace

        if changes.get("cpus") and not {"cpu_period_us", "cpu_quota_us"} & set(changes):
            changes |= {"cpu_period_us": 0, "cpu_quota_us": 0}
        if (changes.get("cpu_quota_us") or changes.get("cpu_period_us")) and "cpus" not in changes:
            changes["cpus"] = 0.0
        resources = replace(base, **changes)
    _check_memory(resources, least=MIN_MACHINE if machine else MIN_MEMORY)
    if resources.cpus and (resources.cpu_quota_us or resources.cpu_period_us):
        raise InvalidArgument(
            "cannot be combined with cpu_period or cpu_quota",
            field="cpus",
            hint="give either cpus, or period and quota",
        )
    return resources


def _check_memory(resources: Resources, *, least: int) -> None:
    memory, swap = resources.memory, resources.memory_swap
    for field in ("memory", "memory_reservation", "memory_min"):
        size = getattr(resources, field)
        low = least if field == "memory" else MIN_MEMORY
        if size and size < low:
            raise InvalidArgument(
                f"must be at least {low >> 20}M, got {size} bytes",
                field=field,
                hint="a virtual machine starts in no less" if low == MIN_MACHINE else None,
            )
        if memory and size > memory:
            raise InvalidArgument(
                f"must not be more than the memory limit of {memory} bytes", field=field
            )
    if swap is not None and swap > 0:
        if not memory:
            raise InvalidArgument(
                "needs a memory limit", field="memory_swap", hint="give --memory as well"
            )
        if swap < memory:
            raise InvalidArgument(
                f"must be at least the memory limit of {memory} bytes, got {swap}",
                field="memory_swap",
                hint="it is memory plus swap, in sum",
            )


def _size(value: Any, field: str) -> int:
    return parse_bytes(value, field=field)


def _swap(value: Any, field: str) -> int | None:
    if value in (-1, "-1"):
        return -1
    return parse_bytes(value, field=field) or None


def _swappiness(value: Any, field: str) -> int | None:
    result = integer(value, field, low=-1, high=100)
    return None if result == -1 else result


def _pids(value: Any, field: str) -> int:
    if value == "max":
        return 0
    return max(integer(value, field, low=-1, high=4_194_304), 0)


def _cpus(value: Any, field: str) -> float:
    result = number(value, field, low=0, high=1 << 20)
    if result and result < 0.01:
        raise InvalidArgument(f"must be at least 0.01, got {result:g}", field=field)
    return result


def _shares(value: Any, field: str) -> int:
    return integer(value, field, low=0, high=262_144)


def _period(value: Any, field: str) -> int:
    result = integer(value, field, low=0, high=1_000_000)
    if result and result < 1000:
        raise InvalidArgument("must be from 1000 to 1000000 microseconds", field=field)
    return result


def _quota(value: Any, field: str) -> int:
    result = integer(value, field, low=-1, high=1 << 44)
    if 0 < result < 1000:
        raise InvalidArgument("must be at least 1000 microseconds", field=field)
    return max(result, 0)


def _weight(value: Any, field: str) -> int:
    result = integer(value, field, low=0, high=1000)
    if result and result < 10:
        raise InvalidArgument("must be from 10 to 1000", field=field)
    return result


def _cpuset(value: Any, field: str) -> str:
    given = text(value, field).replace(" ", "")
    for part in given.split(",") if given else ():
        first, dash, last = part.partition("-")
        for digits in (first, last if dash else first):
            if not (digits.isascii() and digits.isdigit() and len(digits) < 6):
                raise InvalidArgument(
                    f"expected a list such as 0-3,7, got {given[:80]!r}", field=field
                )
        if dash and int(first) > int(last):
            raise InvalidArgument(f"range runs backwards: {part}", field=field)
    return given


def _throttles(bytes_: bool) -> Any:
    def read(value: Any, field: str) -> tuple[Throttle, ...]:
        if isinstance(value, Mapping):
            value = [f"{path}:{rate}" for path, rate in value.items()]
        return tuple(
            _throttle(entry, f"{field}[{i}]", bytes_) for i, entry in enumerate(items(value, field))
        )

    return read


def _throttle(value: Any, field: str, bytes_: bool) -> Throttle:
    if isinstance(value, Throttle):
        path, amount = value.path, value.rate
    else:
        path, colon, rate = text(value, field).rpartition(":")
        if not colon:
            raise InvalidArgument(
                "expected DEVICE:RATE", field=field, hint="for example /dev/sda:10mb"
            )
        amount = parse_bytes(rate, field=field) if bytes_ else integer(rate, field)
    return Throttle(
        path=path if is_machine_disk(path) else absolute_path(path, field),
        rate=integer(amount, field, low=0, high=_MAX_LIMIT),
    )


def lifted(before: Resources, after: Resources) -> Resources:
    """Return `after` with a rate of 0, which is none, for each device limited only `before`:
    what is not named the kernel leaves as it is."""
    from msgspec.structs import replace

    changes = {}
    for field in RATES:
        named = {throttle.path for throttle in getattr(after, field)}
        gone = [t.path for t in getattr(before, field) if t.path not in named]
        if gone:
            freed = tuple(Throttle(path=path, rate=0) for path in gone)
            changes[field] = getattr(after, field) + freed
    return replace(after, **changes) if changes else after


def is_machine_disk(name: str) -> bool:
    """Tell whether a device is a disk of a virtual machine (`disk`, `disk1`, …), not a path."""
    number = name.removeprefix("disk")
    return name.startswith("disk") and (not number or (number.isascii() and number.isdecimal()))


def machine_disks(resources: Resources) -> Iterator[tuple[str, str]]:
    """Yield the disks of a virtual machine whose rates are limited, with the field and index."""
    for field in RATES:
        for index, throttle in enumerate(getattr(resources, field)):
            if is_machine_disk(throttle.path):
                yield throttle.path, f"{field}[{index}]"


_RESOURCES: dict[str, tuple[str, Any]] = {
    "blkio_weight": ("blkio_weight", _weight),
    "cpu_period": ("cpu_period_us", _period),
    "cpu_quota": ("cpu_quota_us", _quota),
    "cpu_shares": ("cpu_shares", _shares),
    "cpus": ("cpus", _cpus),
    "cpuset_cpus": ("cpuset_cpus", _cpuset),
    "cpuset_mems": ("cpuset_mems", _cpuset),
    "device_read_bps": ("device_read_bps", _throttles(True)),
    "device_read_iops": ("device_read_iops", _throttles(False)),
    "device_write_bps": ("device_write_bps", _throttles(True)),
    "device_write_iops": ("device_write_iops", _throttles(False)),
    "memory": ("memory", _size),
    "memory_min": ("memory_min", _size),
    "memory_reservation": ("memory_reservation", _size),
    "memory_swap": ("memory_swap", _swap),
    "memory_swappiness": ("memory_swappiness", _swappiness),
    "oom_kill_disable": ("oom_kill_disable", flag),
    "pids_limit": ("pids", _pids),
}


# ---- ulimits, sysctls -------------------------------------------------------------------


def parse_ulimits(value: object, field: str = "ulimits") -> tuple[Ulimit, ...]:
    """Read `NAME=SOFT[:HARD]` entries, or a mapping of them; -1 means unlimited."""
    if isinstance(value, Mapping):
        entries = []
        for name, limit in value.items():
            pair = isinstance(limit, (tuple, list)) and len(limit) == 2
            entries.append(f"{name}={limit[0]}:{limit[1]}" if pair else f"{name}={limit}")
        value = entries
    found: dict[str, Ulimit] = {}
    for i, entry in enumerate(items(value, field)):
        limit = _ulimit(entry, f"{field}[{i}]")
        found[limit.name] = limit
    return tuple(found.values())


def _ulimit(value: object, field: str) -> Ulimit:
    if isinstance(value, Ulimit):
        name, soft, hard = value.name, str(value.soft), str(value.hard)
    else:
        name, equals, limits = text(value, field).partition("=")
        soft, colon, hard = limits.partition(":")
        if not equals:
            raise InvalidArgument(
                "expected NAME=SOFT[:HARD]", field=field, hint="for example nofile=1024:4096"
            )
        hard = hard if colon else soft
    name = name.lower().removeprefix("rlimit_")
    if name not in _ULIMITS:
        raise InvalidArgument(
            f"unknown limit {name[:40]!r}",
            field=field,
            hint=f"one of {', '.join(sorted(_ULIMITS))}",
        )
    low = -1 if soft == "unlimited" else integer(soft, field, low=-1, high=_MAX_LIMIT)
    high = -1 if hard == "unlimited" else integer(hard, field, low=-1, high=_MAX_LIMIT)
    if high != -1 and (low == -1 or low > high):
        raise InvalidArgument(f"soft limit {low} is above the hard limit {high}", field=field)
    return Ulimit(name=name, soft=low, hard=high)


_IPC_SYSCTLS = frozenset(
    "kernel.msgmax kernel.msgmnb kernel.msgmni kernel.sem kernel.shmall kernel.shmmax "
    "kernel.shmmni kernel.shm_rmid_forced".split()
)


def read_sysctls(
    value: object, *, network_mode: str, ipc_mode: str, uts_mode: str, field: str = "sysctls"
) -> dict[str, str]:
    """Read kernel parameters; only those that a namespace of the instance's own holds."""
    result = {}
    for key, setting in mapping(value, field).items():
        name = key.replace("/", ".")
        where = f"{field}.{name}"
        if ".." in name or not name.replace(".", "").replace("_", "").replace("-", "").isalnum():
            raise InvalidArgument(f"bad kernel parameter {name[:80]!r}", field=field)
        if name.startswith("net."):
            shared = network_mode if network_mode.startswith(("host", "container:")) else ""
        elif name in _IPC_SYSCTLS or name.startswith("fs.mqueue."):
            shared = ipc_mode if ipc_mode.startswith(("host", "container:")) else ""
        elif name == "kernel.domainname":
            shared = uts_mode if uts_mode == "host" else ""
        else:
            raise InvalidArgument(
                "belongs to the whole host, not to a namespace",
                field=where,
                hint=f"set it on the host with `sysctl -w {name}=…`",
            )
        if shared:
            raise InvalidArgument(f"is not possible in the namespace of {shared!r}", field=where)
        result[name] = setting
    return result


# ---- devices ----------------------------------------------------------------------------


def parse_device(value: object, field: str = "devices") -> DeviceNode:
    """Read `SOURCE[:TARGET][:PERMISSIONS]`."""
    if isinstance(value, DeviceNode):
        parts = [value.source, value.target, value.permissions]
    else:
        given = text(value, field, empty=False)
        if not given.startswith("/") and "=" in given:
            raise InvalidArgument(
                f"neither a path nor a device's name: {given[:80]!r}",
                field=field,
                hint="/dev/dri/renderD128, vendor.com/class=name, or vfio=0000:01:00.0",
            )
        parts = given.split(":")
    if len(parts) == 2 and not parts[1].startswith("/"):
        parts = [parts[0], parts[0], parts[1]]
    if len(parts) > 3:
        raise InvalidArgument("expected SOURCE[:TARGET][:PERMISSIONS]", field=field)
    source = absolute_path(parts[0], f"{field}.source")
    target = absolute_path(parts[1], f"{field}.target") if len(parts) > 1 else source
    permissions = parts[2] if len(parts) > 2 else "rwm"
    if not permissions or set(permissions) - set("rwm") or len(set(permissions)) < len(permissions):
        raise InvalidArgument(
            f"permissions are out of r, w and m, got {permissions[:20]!r}", field=field
        )
    return DeviceNode(source=source, target=target, permissions=permissions)


def parse_device_rules(value: object, field: str = "device_cgroup_rules") -> tuple[str, ...]:
    """Check `TYPE MAJOR:MINOR ACCESS` rules of the device controller."""
    rules = strings(value, field)
    for i, rule in enumerate(rules):
        if not _is_device_rule(rule):
            raise InvalidArgument(
                f"expected TYPE MAJOR:MINOR ACCESS, got {rule[:80]!r}",
                field=f"{field}[{i}]",
                hint="for example `c 42:* rmw`",
            )
    return rules


def _is_device_rule(rule: str) -> bool:
    words = rule.split(" ")
    if len(words) != 3 or words[0] not in ("a", "b", "c"):
        return False
    numbers = words[1].split(":")
    access = set(words[2])
    return (
        len(numbers) == 2
        and all(n == "*" or (n.isascii() and n.isdigit() and len(n) < 8) for n in numbers)
        and bool(access)
        and access <= set("rwm")
    )
