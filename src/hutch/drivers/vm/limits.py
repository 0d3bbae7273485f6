"""What a virtual machine cannot have, and the limits of its control group on the host."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import msgspec

from hutch.drivers.limits import limits as resource_limits
from hutch.errors import InvalidArgument, Unsupported
from hutch.host.facts import has_capability, misc_minor
from hutch.host.isolation import is_privileged
from hutch.linux.cgroup import DEFAULT_DEVICES, DeviceRule, Limits
from hutch.plan.machine.argv import translated_code
from hutch.spec.machine import MAX_MEMORY, MAX_VCPUS
from hutch.spec.model import BindMount, CpuTopology, InstanceSpec, Resources

__all__ = [
    "DEFAULT_MEMORY",
    "check_spec",
    "disk_in_memory",
    "group_limits",
    "max_memory_of",
    "max_vcpus_of",
]
__all__ += ["memory_of", "memory_wanted", "vcpus_of", "vcpus_wanted"]

DEFAULT_MEMORY = 512 << 20
# QEMU's own, beyond the guest's memory: 96-109 MB were measured under emulation, without
# the translated code.
_OVERHEAD = 192 << 20
# How far a machine may grow where nothing is said: as far as the host, within bounds that cost
# next to nothing. A processor that may come takes 0.2 MB of the guest's memory, and memory
# must be within what every processor can address beside the machine's holes (2^39 bytes).
_ROOM_VCPUS = (8, 32)
_ROOM_MEMORY = 256 << 30
_CAP_IPC_LOCK = 14
_KVM = DeviceRule(kind="c", major=10, minor=232)


def memory_wanted(resources: Resources) -> int:
    """Return the bytes of memory that the guest is to have, whole MiB."""
    return -(-(resources.memory or DEFAULT_MEMORY) >> 20) << 20


def vcpus_wanted(resources: Resources) -> int:
    """Return how many processors the guest is to have: `cpus` rounded up, one by default."""
    return max(1, math.ceil(resources.cpus))


def memory_of(spec: InstanceSpec) -> int:
    """Return the bytes of memory that the guest has at its start."""
    return memory_wanted(spec.resources)


def vcpus_of(spec: InstanceSpec) -> int:
    """Return how many processors the guest has at its start."""
    return vcpus_wanted(spec.resources)


def max_memory_of(spec: InstanceSpec, host: int) -> int:
    """Return the bytes up to which the guest's memory may grow while it runs; `host` is the
    host's memory."""
    own = memory_of(spec)
    asked = spec.machine.memory_max
    if asked:
        return max(own, -(-asked >> 20) << 20)
    return max(own, min(-(-host >> 30) << 30, _ROOM_MEMORY))


def max_vcpus_of(spec: InstanceSpec, host: int) -> int:
    """Return how many processors the guest may have while it runs; `host` is the host's
    number, 0 where none can come. The sockets of its topology are full."""
    own, machine = vcpus_of(spec), spec.machine
    if machine.numa:
        return max(own, sum(len(node.cpus) for node in machine.numa))
    topology = machine.cpu_topology or CpuTopology()
    socket = topology.cores * topology.threads
    if topology.sockets:
        return topology.sockets * socket
    low, high = _ROOM_VCPUS
    most = own
    if machine.cpus_max:
        most = max(own, machine.cpus_max)
    elif host:
        most = max(own, min(max(host, low), high))
    return -(-most // socket) * socket


def group_limits(
    resources: Resources,
    memory: int,
    *,
    disk: int = 0,
    userfaultfd: bool = False,
    nodes: Sequence[tuple[int, int]] = (),
) -> Limits:
    """Return the limits of QEMU's control group; `userfaultfd` lets it have that device, `nodes`
    those of these numbers. `disk` is what its disks may take of memory (see `disk_in_memory`).

    The guest's memory bounds what the program has; the group holds QEMU's own besides. A
    limit of processes is the guest's, not that of QEMU's threads. A guest may have more
    processors than the host, to try what a program does with them.
    """
    cpus = min(resources.cpus, float(os.cpu_count() or 1))
    asked = resource_limits(
        msgspec.structs.replace(resources, cpus=cpus, memory=0, pids=0, memory_swap=None)
    )
    own = memory + translated_code(memory) + _OVERHEAD + disk
    ceiling = own if resources.memory else None
    devices = [*DEFAULT_DEVICES, _KVM]
    if userfaultfd:
        devices.append(msgspec.structs.replace(_KVM, minor=misc_minor("userfaultfd")))
    for major, minor in nodes:
        devices.append(msgspec.structs.replace(_KVM, major=major, minor=minor))
    return msgspec.structs.replace(
        asked,
        memory=ceiling,
        # Stated, so that both follow when the memory is changed.
        memory_swap=ceiling and 2 * ceiling,
        devices=tuple(devices),
    )


def disk_in_memory(directory: str) -> int:
    """Return how many bytes of memory the writable disk of a machine can take: as many as it
    has where the root is in memory (tmpfs), else none.

    What a guest writes to it there counts in QEMU's control group, and nothing can be written
    out: without that room the machine would be killed for filling its own disk.
    """
    from hutch.linux.files import is_in_memory
    from hutch.storage.diskchain import chain, virtual_size
    from hutch.storage.disks import disk_size
    from hutch.storage.snapshots import QCOW2_FILE

    if not is_in_memory(directory):
        return 0
    if chain(directory):
        return virtual_size(directory)
    return disk_size(f"{directory}/{QCOW2_FILE}", encrypted=True)


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
    if spec.resources.memory > MAX_MEMORY:
        raise InvalidArgument(
            f"must be at most {MAX_MEMORY >> 40}T, got {spec.resources.memory} bytes",
            field="memory",
        )
    _check_memory(spec)
    if vcpus_of(spec) > MAX_VCPUS:
        raise InvalidArgument(f"must be at most {MAX_VCPUS}", field="cpus")
    for index, mount in enumerate(spec.mounts):
        if isinstance(mount, BindMount) and mount.propagation.endswith("shared"):
            raise _only_container(f"mounts[{index}].propagation")


def _check_memory(spec: InstanceSpec) -> None:
    """Refuse ways to hold the memory that this host does not have."""
    machine = spec.machine
    if machine.memory_lock and not (is_privileged() and has_capability(_CAP_IPC_LOCK)):
        raise Unsupported(
            "memory_lock: to lock memory takes the capability CAP_IPC_LOCK",
            hint="run hutch as root, or leave out --memory-lock",
        )
    for index, node in enumerate(machine.numa):
        for number in node.host_nodes:
            if not os.path.isdir(f"/sys/devices/system/node/node{number}"):
                raise InvalidArgument(
                    f"this host has no node {number}", field=f"numa[{index}].host"
                )


def _only_container(field: str) -> Unsupported:
    return Unsupported(
        f"{field}: is not possible with a virtual machine",
        hint="leave it out, or run it as a container",
    )
