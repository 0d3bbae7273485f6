"""What a virtual machine cannot have, and the limits of its control group on the host."""

from __future__ import annotations

import math

import msgspec

from hutch.drivers.limits import limits as resource_limits
from hutch.errors import InvalidArgument, Unsupported
from hutch.linux.cgroup import DEFAULT_DEVICES, DeviceRule, Limits
from hutch.spec.model import BindMount, InstanceSpec, Resources

__all__ = ["DEFAULT_MEMORY", "check_spec", "group_limits", "memory_of", "vcpus_of"]

DEFAULT_MEMORY = 512 << 20
# A kernel with its initramfs does not get to its end in less.
MIN_MEMORY = 96 << 20
# QEMU's own, beyond the guest's memory: 96-109 MB were measured under emulation, whose
# translated code may grow to a quarter of the memory besides.
_OVERHEAD = 192 << 20
_MAX_VCPUS = 255
_KVM = DeviceRule(kind="c", major=10, minor=232)


def memory_of(spec: InstanceSpec) -> int:
    """Return the bytes of memory that the guest has, whole MiB."""
    wanted = spec.resources.memory or DEFAULT_MEMORY
    return -(-wanted >> 20) << 20


def vcpus_of(spec: InstanceSpec) -> int:
    """Return how many processors the guest has: `cpus` rounded up, one by default."""
    return max(1, math.ceil(spec.resources.cpus))


def group_limits(resources: Resources, memory: int) -> Limits:
    """Return the limits of QEMU's control group.

    The guest's memory bounds what the program has; the group holds QEMU's own besides. A
    limit of processes is the guest's, not that of QEMU's threads.
    """
    asked = resource_limits(msgspec.structs.replace(resources, memory=0, pids=0, memory_swap=None))
    ceiling = memory + memory // 4 + _OVERHEAD if resources.memory else None
    return msgspec.structs.replace(asked, memory=ceiling, devices=(*DEFAULT_DEVICES, _KVM))


def check_spec(spec: InstanceSpec) -> None:
    """Raise for what only a container can have, naming the option and the cure."""
    for field, mode in (("pid", spec.pid_mode), ("ipc", spec.ipc_mode), ("uts", spec.uts_mode)):
        if mode == "host" or mode.startswith("container:"):
            raise _only_container(field)
    if spec.network_mode == "host" or spec.network_mode.startswith("container:"):
        raise _only_container("network")
    for field, given in (
        ("devices", bool(spec.devices)),
        ("device_cgroup_rules", bool(spec.device_rules)),
        ("userns", spec.userns not in ("", "host")),
        ("cgroupns", spec.cgroup_mode == "host"),
        ("security_opt.apparmor", spec.security.apparmor not in ("", "unconfined")),
        ("oom_kill_disable", spec.resources.oom_kill_disable),
    ):
        if given:
            raise _only_container(field)
    if spec.resources.memory and spec.resources.memory < MIN_MEMORY:
        raise InvalidArgument(
            f"a virtual machine needs at least {MIN_MEMORY >> 20}M, got {spec.resources.memory} "
            "bytes",
            field="memory",
        )
    if vcpus_of(spec) > _MAX_VCPUS:
        raise InvalidArgument(f"must be at most {_MAX_VCPUS}", field="cpus")
    for index, mount in enumerate(spec.mounts):
        if isinstance(mount, BindMount) and mount.propagation.endswith("shared"):
            raise _only_container(f"mounts[{index}].propagation")


def _only_container(field: str) -> Unsupported:
    return Unsupported(
        f"{field}: is not possible with a virtual machine",
        hint="leave it out, or run it as a container",
    )
