"""Turn the resources of a specification into the limits of a control group."""

from __future__ import annotations

import os
import stat

from hutch.errors import InvalidArgument
from hutch.linux.cgroup import ALL_DEVICES, DEFAULT_DEVICES, DeviceRule, Limits
from hutch.plan.assets import ResolvedDevice
from hutch.spec.limits import is_machine_disk
from hutch.spec.model import DeviceNode, InstanceSpec, Resources, Throttle

__all__ = ["device_rules", "limits", "resolve_devices"]


def limits(resources: Resources, devices: tuple[DeviceRule, ...] | None = None) -> Limits:
    """Return the limits; what the specification leaves at nothing stays unset."""
    r = resources
    available = os.cpu_count() or 1
    if r.cpus > available:
        raise InvalidArgument(f"this host has {available}, got {r.cpus:g}", field="cpus")
    return Limits(
        cpus=r.cpus or None,
        cpu_quota_us=r.cpu_quota_us or None,
        cpu_period_us=r.cpu_period_us or None,
        cpu_shares=r.cpu_shares or None,
        cpuset_cpus=r.cpuset_cpus or None,
        cpuset_mems=r.cpuset_mems or None,
        memory=r.memory or None,
        memory_reservation=r.memory_reservation or None,
        memory_min=r.memory_min or None,
        memory_swap=r.memory_swap,
        memory_swappiness=r.memory_swappiness,
        oom_kill_disable=r.oom_kill_disable or None,
        pids=r.pids or None,
        blkio_weight=r.blkio_weight or None,
        device_read_bps=_rates("device_read_bps", r.device_read_bps),
        device_write_bps=_rates("device_write_bps", r.device_write_bps),
        device_read_iops=_rates("device_read_iops", r.device_read_iops),
        device_write_iops=_rates("device_write_iops", r.device_write_iops),
        devices=devices,
    )


def _rates(field: str, throttles: tuple[Throttle, ...]) -> tuple[tuple[int, int, int], ...] | None:
    """Return the rates of the host's devices; those of a machine's disks are QEMU's."""
    rates = []
    for index, throttle in enumerate(throttles):
        if is_machine_disk(throttle.path):
            continue
        try:
            status = os.stat(throttle.path)
        except OSError as exc:
            raise InvalidArgument(
                f"{throttle.path}: {exc.strerror}", field=f"{field}[{index}]"
            ) from exc
        if not stat.S_ISBLK(status.st_mode):
            raise InvalidArgument(f"{throttle.path}: not a block device", field=f"{field}[{index}]")
        rates.append((os.major(status.st_rdev), os.minor(status.st_rdev), throttle.rate))
    return tuple(rates) or None


def device_rules(spec: InstanceSpec, devices: tuple[ResolvedDevice, ...]) -> tuple[DeviceRule, ...]:
    """Return what may be opened: Docker's defaults, the devices asked for, further rules."""
    if spec.security.privileged:
        return ALL_DEVICES
    rules = list(DEFAULT_DEVICES)
    access = {device.target: device.permissions for device in spec.devices}
    for device in devices:
        rules.append(
            DeviceRule(
                kind="b" if stat.S_ISBLK(device.mode) else "c",
                major=device.major,
                minor=device.minor,
                access=access.get(device.target, "rwm"),
            )
        )
    rules += [_rule(index, text) for index, text in enumerate(spec.device_rules)]
    return tuple(rules)


def _rule(index: int, text: str) -> DeviceRule:
    """Parse `c 42:* rmw`, the form of --device-cgroup-rule."""
    field = f"device_cgroup_rules[{index}]"
    parts = text.split()
    if len(parts) != 3 or parts[1].count(":") != 1:
        raise InvalidArgument(f"expected 'TYPE MAJOR:MINOR ACCESS', got {text!r}", field=field)
    numbers = []
    for number in parts[1].split(":"):
        if number != "*" and not number.isdecimal():
            raise InvalidArgument(f"expected a number or *, got {number!r}", field=field)
        numbers.append(-1 if number == "*" else int(number))
    return DeviceRule(kind=parts[0], major=numbers[0], minor=numbers[1], access=parts[2])


def resolve_devices(spec: InstanceSpec) -> tuple[ResolvedDevice, ...]:
    """Return the nodes to make: those asked for, or all of the host when privileged."""
    nodes = list(spec.devices)
    if spec.security.privileged:
        nodes = [*_host_devices(), *nodes]
    found: dict[str, ResolvedDevice] = {}
    for index, node in enumerate(nodes):
        for device in _expand(node, index):
            found[device.target] = device
    return tuple(found.values())


def _expand(node: DeviceNode, index: int) -> list[ResolvedDevice]:
    """Return one device, or those beneath a directory such as /dev/snd."""
    field = f"devices[{index}]"
    try:
        status = os.stat(node.source)
        names = sorted(os.listdir(node.source)) if stat.S_ISDIR(status.st_mode) else []
    except OSError as exc:
        raise InvalidArgument(f"{node.source}: {exc.strerror}", field=field) from exc
    if stat.S_ISDIR(status.st_mode):
        children = [
            DeviceNode(
                source=f"{node.source}/{name}",
                target=f"{node.target}/{name}",
                permissions=node.permissions,
            )
            for name in names
        ]
        return [device for child in children for device in _expand(child, index)]
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise InvalidArgument(f"{node.source}: not a device", field=field)
    return [
        ResolvedDevice(
            source=node.source,
            target=node.target,
            mode=status.st_mode if node.mode is None else stat.S_IFMT(status.st_mode) | node.mode,
            major=os.major(status.st_rdev),
            minor=os.minor(status.st_rdev),
            uid=status.st_uid if node.uid is None else node.uid,
            gid=status.st_gid if node.gid is None else node.gid,
        )
    ]


_PRIVATE = {"pts", "shm", "mqueue", "fd", "stdin", "stdout", "stderr", "console", "ptmx", "core"}
_BASIC = {"null", "zero", "full", "random", "urandom", "tty"}


def _host_devices(directory: str = "/dev", depth: int = 3) -> list[DeviceNode]:
    nodes: list[DeviceNode] = []
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            if directory == "/dev" and entry.name in _PRIVATE | _BASIC:
                continue
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and depth:
                nodes += _host_devices(entry.path, depth - 1)
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                nodes.append(DeviceNode(source=entry.path, target=entry.path))
    return nodes
