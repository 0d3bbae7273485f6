"""What an instance was asked for, as Docker's HostConfig: told from its specification, so that
it is the same whoever made the instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.spec.model import BindMount, TmpfsMount, VolumeMount

if TYPE_CHECKING:
    from hutch.engine.results import InstanceInfo
    from hutch.spec.model import InstanceSpec, Throttle

__all__ = ["MASKED", "READ_ONLY", "host_config"]

MASKED = (
    *("/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys"),
    *("/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug"),
    *("/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"),
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_LEFT_OUT = frozenset("Annotations Init Mounts StorageOpt Sysctls Tmpfs".split())  # when empty


def host_config(info: InstanceInfo) -> dict[str, Any]:
    """Return the HostConfig of an instance."""
    spec = info.spec
    found = _resources(spec) | _storage(info) | _network(spec) | _isolation(spec) | _life(spec)
    return {name: value for name, value in found.items() if value or name not in _LEFT_OUT}


def _rates(throttles: tuple[Throttle, ...]) -> list[dict[str, Any]] | None:
    return [{"Path": t.path, "Rate": t.rate} for t in throttles] or None


def _resources(spec: InstanceSpec) -> dict[str, Any]:
    limits = spec.resources
    swap = limits.memory_swap
    if swap is None:
        swap = limits.memory * 2
    return {
        "CpuShares": limits.cpu_shares,
        "Memory": limits.memory,
        "NanoCpus": round(limits.cpus * 1e9),
        "CgroupParent": "",
        "BlkioWeight": limits.blkio_weight,
        "BlkioWeightDevice": None,
        "BlkioDeviceReadBps": _rates(limits.device_read_bps),
        "BlkioDeviceWriteBps": _rates(limits.device_write_bps),
        "BlkioDeviceReadIOps": _rates(limits.device_read_iops),
        "BlkioDeviceWriteIOps": _rates(limits.device_write_iops),
        "CpuPeriod": limits.cpu_period_us,
        "CpuQuota": limits.cpu_quota_us,
        "CpuRealtimePeriod": 0,
        "CpuRealtimeRuntime": 0,
        "CpusetCpus": limits.cpuset_cpus,
        "CpusetMems": limits.cpuset_mems,
        "Devices": [
            {
                "PathOnHost": device.source,
                "PathInContainer": device.target,
                "CgroupPermissions": device.permissions,
            }
            for device in spec.devices
        ],
        "DeviceCgroupRules": list(spec.device_rules) or None,
        "DeviceRequests": _device_requests(spec),
        "MemoryReservation": limits.memory_reservation,
        "MemorySwap": swap,
        "MemorySwappiness": limits.memory_swappiness,
        "OomKillDisable": limits.oom_kill_disable,
        "PidsLimit": limits.pids or None,
        "Ulimits": [{"Name": u.name, "Soft": u.soft, "Hard": u.hard} for u in spec.ulimits],
        "CpuCount": 0,
        "CpuPercent": 0,
        "IOMaximumIOps": 0,
        "IOMaximumBandwidth": 0,
    }


def _device_requests(spec: InstanceSpec) -> list[dict[str, Any]] | None:
    found = []
    if spec.device_names:
        found.append(
            {
                "Driver": "cdi",
                "Count": 0,
                "DeviceIDs": list(spec.device_names),
                "Capabilities": None,
                "Options": {},
            }
        )
    if spec.gpus:
        count = -1 if spec.gpus == "all" else int(spec.gpus) if spec.gpus.isdigit() else 0
        found.append(
            {
                "Driver": "",
                "Count": count,
                "DeviceIDs": None,
                "Capabilities": [["gpu"]],
                "Options": {},
            }
        )
    return found or None


def _storage(info: InstanceInfo) -> dict[str, Any]:
    binds: list[str] = []
    mounts: list[dict[str, Any]] = []
    tmpfs: dict[str, str] = {}
    for mount in info.spec.mounts:
        match mount:
            case BindMount(create_source=True, recursive=True):
                binds.append(_bind(mount))
            case VolumeMount(subpath="", driver_options={}) if mount.name:
                binds.append(f"{mount.name}:{mount.target}:{'ro' if mount.read_only else 'rw'}")
            case TmpfsMount():
                tmpfs[mount.target] = _tmpfs(mount)
            case BindMount():
                mounts.append(_bind_mount(mount))
            case VolumeMount() if mount.name:
                mounts.append(_volume_mount(mount))
    return {
        "Binds": binds or None,
        "Mounts": mounts,
        "Tmpfs": tmpfs,
        "VolumesFrom": list(info.spec.volumes_from) or None,
        "VolumeDriver": "",
        "ReadonlyRootfs": info.spec.read_only,
        "StorageOpt": info.spec.storage_options,
        "ShmSize": info.spec.shm_size,
        "ContainerIDFile": "",
    }


def _bind(mount: BindMount) -> str:
    options = ["ro" if mount.read_only else "rw"]
    if mount.propagation != "rprivate":
        options.append(mount.propagation)
    plain = options == ["rw"]
    text = f"{mount.source}:{mount.target}"
    return text if plain else f"{text}:{','.join(options)}"


def _tmpfs(mount: TmpfsMount) -> str:
    options = [option for option in mount.options if option not in ("nosuid", "nodev", "noexec")]
    if mount.size is not None:
        options.append(f"size={mount.size}")
    if mount.mode != 0o1777:
        options.append(f"mode={mount.mode:o}")
    return ",".join(options)


def _bind_mount(mount: BindMount) -> dict[str, Any]:
    entry: dict[str, Any] = {"Type": "bind", "Source": mount.source, "Target": mount.target}
    if mount.read_only:
        entry["ReadOnly"] = True
    options: dict[str, Any] = {}
    if mount.propagation != "rprivate":
        options["Propagation"] = mount.propagation
    if not mount.recursive:
        options["NonRecursive"] = True
    if options:
        entry["BindOptions"] = options
    return entry


def _volume_mount(mount: VolumeMount) -> dict[str, Any]:
    entry: dict[str, Any] = {"Type": "volume", "Source": mount.name, "Target": mount.target}
    if mount.read_only:
        entry["ReadOnly"] = True
    options: dict[str, Any] = {}
    if mount.subpath:
        options["Subpath"] = mount.subpath
    if mount.labels:
        options["Labels"] = mount.labels
    if mount.driver_options:
        options["DriverConfig"] = {"Name": mount.driver, "Options": mount.driver_options}
    if options:
        entry["VolumeOptions"] = options
    return entry


def _network(spec: InstanceSpec) -> dict[str, Any]:
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in spec.ports:
        asked = str(port.host_port) if port.host_port else ""
        if port.host_port_end:
            asked = f"{port.host_port}-{port.host_port_end}"
        bindings.setdefault(f"{port.container_port}/{port.protocol}", []).append(
            {"HostIp": port.host_ip, "HostPort": asked}
        )
    return {
        "NetworkMode": spec.network_mode,
        "PortBindings": bindings,
        "PublishAllPorts": spec.publish_all,
        "Dns": list(spec.dns),
        "DnsOptions": list(spec.dns_options),
        "DnsSearch": list(spec.dns_search),
        "ExtraHosts": list(spec.extra_hosts) or None,
        "Links": None,
    }


def _isolation(spec: InstanceSpec) -> dict[str, Any]:
    security = spec.security
    options = []
    if security.no_new_privileges:
        options.append("no-new-privileges")
    if security.seccomp != "default" and not security.privileged:
        options.append(f"seccomp={security.seccomp}")
    if security.apparmor and not security.privileged:
        options.append(f"apparmor={security.apparmor}")
    masked, read_only = security.masked_paths, security.readonly_paths
    return {
        "CapAdd": list(security.cap_add) or None,
        "CapDrop": list(security.cap_drop) or None,
        "CgroupnsMode": spec.cgroup_mode,
        "GroupAdd": list(spec.process.groups) or None,
        "IpcMode": spec.ipc_mode or "private",
        "Cgroup": "",
        "OomScoreAdj": spec.oom_score_adj,
        "PidMode": spec.pid_mode,
        "Privileged": security.privileged,
        "SecurityOpt": options or None,
        "UTSMode": spec.uts_mode,
        "UsernsMode": spec.userns,
        "Sysctls": spec.sysctls,
        "Runtime": "hutch-vm" if spec.isolation == "vm" else "hutch",
        "Isolation": "",
        "MaskedPaths": list(MASKED if masked is None else masked) or None,
        "ReadonlyPaths": list(READ_ONLY if read_only is None else read_only) or None,
        "Annotations": spec.annotations,
        "Init": spec.init,
    }


def _life(spec: InstanceSpec) -> dict[str, Any]:
    options = {}
    if spec.logs.max_bytes:
        options = {"max-size": str(spec.logs.max_bytes), "max-file": str(spec.logs.max_files)}
    return {
        "AutoRemove": spec.auto_remove,
        "RestartPolicy": {
            "Name": spec.restart.name,
            "MaximumRetryCount": spec.restart.max_retries,
        },
        "LogConfig": {
            "Type": "none" if spec.logs.driver == "none" else "json-file",
            "Config": options,
        },
        "ConsoleSize": [0, 0],
    }
