"""Instances in the JSON shape that `docker inspect` has, for scripts that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.cli.output import stamp
from hutch.spec.model import BindMount, TmpfsMount

if TYPE_CHECKING:
    from hutch.engine.results import InstanceInfo
    from hutch.spec.model import InstanceSpec

__all__ = ["instance_shape"]


def instance_shape(info: InstanceInfo) -> dict[str, Any]:
    """Return an instance as `docker inspect` shows a container."""
    spec = info.spec
    argv = list(spec.process.argv)
    return {
        "Id": info.id,
        "Created": stamp(info.created_ns),
        "Path": argv[0] if argv else "",
        "Args": argv[1:],
        "State": _state(info),
        "Image": info.image_id,
        "ResolvConfPath": f"{info.directory}/resolv.conf",
        "HostnamePath": f"{info.directory}/hostname",
        "HostsPath": f"{info.directory}/hosts",
        "LogPath": f"{info.directory}/log",
        "Name": f"/{info.name}",
        "RestartCount": info.restart_count,
        "Driver": "overlay",
        "Platform": "linux",
        "AppArmorProfile": spec.security.apparmor,
        "HostConfig": _host_config(spec),
        "Mounts": [
            {
                "Type": mount.type,
                **({"Name": mount.name, "Driver": "local"} if mount.type == "volume" else {}),
                "Source": mount.source,
                "Destination": mount.target,
                "Mode": "",
                "RW": not mount.read_only,
                "Propagation": mount.propagation,
            }
            for mount in info.mounts
        ],
        "Config": _config(info),
        "NetworkSettings": _network_settings(info),
        "Isolation": spec.isolation,
        "IsolationReason": info.isolation_reason,
        "Machine": _machine(info),
        "FromDisk": _from_disk(info),
    }


def _machine(info: InstanceInfo) -> dict[str, Any] | None:
    """Return what the last start of a virtual machine decided; None for a container."""
    found = info.machine
    if found is None:
        return None
    return {
        "Accelerator": found.accelerator,
        "AcceleratorReason": found.accelerator_reason,
        "Qemu": found.qemu,
        "QemuVersion": found.qemu_version,
        "Kernel": found.kernel,
        "Type": found.machine,
        "CpuModel": found.cpu,
        "Memory": found.memory,
        "MemoryMax": found.memory_max,
        "Vcpus": found.vcpus,
        "VcpusMax": found.vcpus_max,
        "Template": found.template,
    }


def _from_disk(info: InstanceInfo) -> dict[str, Any] | None:
    """Return what a machine starts from that brings its own kernel; None for an image's."""
    wish = info.spec.machine.from_disk
    if wish is None:
        return None
    unix = f"{info.directory}/run/vnc.sock"
    return {
        "Path": wish.path,
        "Format": wish.format if wish.path else "",
        "Size": info.spec.machine.disk,
        "Encrypted": wish.encrypted,
        "Firmware": wish.firmware,
        "Cdroms": list(wish.cdroms),
        "Disks": [
            {"Path": disk.path, "Format": disk.format, "ReadOnly": disk.read_only}
            for disk in wish.disks
        ],
        "CloudInit": wish.seed,
        "Tpm": info.spec.machine.tpm,
        "Screen": unix if wish.screen == "unix" else wish.screen,
    }


def _state(info: InstanceInfo) -> dict[str, Any]:
    name = str(info.state)
    state: dict[str, Any] = {
        "Status": name,
        "Running": name in ("running", "paused", "restarting"),
        "Paused": name == "paused",
        "Restarting": name == "restarting",
        "OOMKilled": info.oom_killed,
        "Dead": name == "dead",
        "Pid": info.pid,
        "ExitCode": info.exit_code,
        "Error": info.error,
        "StartedAt": stamp(info.started_ns),
        "FinishedAt": stamp(info.finished_ns),
    }
    if info.health is not None:
        state["Health"] = {
            "Status": info.health.status,
            "FailingStreak": info.health.failing_streak,
            "Log": list(info.health.log),
        }
    return state


def _config(info: InstanceInfo) -> dict[str, Any]:
    spec, process = info.spec, info.spec.process
    config: dict[str, Any] = {
        "Hostname": spec.hostname,
        "Domainname": spec.domainname,
        "User": process.user,
        "AttachStdin": process.stdin and process.stdin_once,
        "AttachStdout": True,
        "AttachStderr": True,
        "ExposedPorts": {port: {} for port in spec.exposed},
        "Tty": process.tty,
        "OpenStdin": process.stdin,
        "StdinOnce": process.stdin_once,
        "Env": list(process.env),
        "Cmd": list(spec.command),
        "Image": info.image,
        "Volumes": {m.target: {} for m in info.mounts if m.type == "volume"} or None,
        "WorkingDir": process.cwd,
        "Entrypoint": list(spec.entrypoint) or None,
        "Labels": spec.labels,
        "StopSignal": spec.stop_signal,
        "StopTimeout": int(spec.stop_timeout_s),
    }
    if spec.health is not None:
        config["Healthcheck"] = {
            "Test": ["CMD", *spec.health.command],
            "Interval": int(spec.health.interval_s * 1e9),
            "Timeout": int(spec.health.timeout_s * 1e9),
            "StartPeriod": int(spec.health.start_period_s * 1e9),
            "StartInterval": int(spec.health.start_interval_s * 1e9),
            "Retries": spec.health.retries,
        }
    return config


def _host_config(spec: InstanceSpec) -> dict[str, Any]:
    security = spec.security
    return {
        "Binds": [_bind(m) for m in spec.mounts if isinstance(m, BindMount)] or None,
        "Tmpfs": {m.target: _tmpfs(m) for m in spec.mounts if isinstance(m, TmpfsMount)},
        "VolumesFrom": list(spec.volumes_from) or None,
        "LogConfig": {"Type": spec.logs.driver, "Config": _log_options(spec)},
        "NetworkMode": spec.network_mode,
        "PortBindings": _port_bindings(spec),
        "PublishAllPorts": spec.publish_all,
        "RestartPolicy": {
            "Name": spec.restart.name,
            "MaximumRetryCount": spec.restart.max_retries,
        },
        "AutoRemove": spec.auto_remove,
        "CapAdd": list(security.cap_add) or None,
        "CapDrop": list(security.cap_drop) or None,
        "CgroupnsMode": spec.cgroup_mode,
        "Dns": list(spec.dns),
        "DnsOptions": list(spec.dns_options),
        "DnsSearch": list(spec.dns_search),
        "ExtraHosts": list(spec.extra_hosts) or None,
        "GroupAdd": list(spec.process.groups) or None,
        "IpcMode": spec.ipc_mode or "private",
        "PidMode": spec.pid_mode,
        "UTSMode": spec.uts_mode,
        "UsernsMode": spec.userns,
        "OomScoreAdj": spec.oom_score_adj,
        "Privileged": security.privileged,
        "ReadonlyRootfs": spec.read_only,
        "SecurityOpt": _security_options(spec) or None,
        "ShmSize": spec.shm_size,
        "Sysctls": spec.sysctls,
        "StorageOpt": spec.storage_options,
        "Init": spec.init,
        "Ulimits": [{"Name": u.name, "Hard": u.hard, "Soft": u.soft} for u in spec.ulimits],
        "Devices": [
            {
                "PathOnHost": d.source,
                "PathInContainer": d.target,
                "CgroupPermissions": d.permissions,
            }
            for d in spec.devices
        ],
        "DeviceRequests": _device_requests(spec) or None,
        "DeviceCgroupRules": list(spec.device_rules) or None,
        "MaskedPaths": None if security.masked_paths is None else list(security.masked_paths),
        "ReadonlyPaths": (
            None if security.readonly_paths is None else list(security.readonly_paths)
        ),
        **_limits(spec),
    }


def _limits(spec: InstanceSpec) -> dict[str, Any]:
    limits = spec.resources
    swap = limits.memory_swap
    if swap is None:
        swap = limits.memory * 2
    return {
        "CpuShares": limits.cpu_shares,
        "Memory": limits.memory,
        "NanoCpus": round(limits.cpus * 1e9),
        "BlkioWeight": limits.blkio_weight,
        "BlkioDeviceReadBps": [{"Path": t.path, "Rate": t.rate} for t in limits.device_read_bps],
        "BlkioDeviceWriteBps": [{"Path": t.path, "Rate": t.rate} for t in limits.device_write_bps],
        "BlkioDeviceReadIOps": [{"Path": t.path, "Rate": t.rate} for t in limits.device_read_iops],
        "BlkioDeviceWriteIOps": [
            {"Path": t.path, "Rate": t.rate} for t in limits.device_write_iops
        ],
        "CpuPeriod": limits.cpu_period_us,
        "CpuQuota": limits.cpu_quota_us,
        "CpusetCpus": limits.cpuset_cpus,
        "CpusetMems": limits.cpuset_mems,
        "MemoryReservation": limits.memory_reservation,
        "MemorySwap": swap,
        "MemorySwappiness": limits.memory_swappiness,
        "OomKillDisable": limits.oom_kill_disable,
        "PidsLimit": limits.pids or None,
    }


def _bind(mount: BindMount) -> str:
    options = [word for word in ("ro" if mount.read_only else "",) if word]
    if mount.propagation != "rprivate":
        options.append(mount.propagation)
    return ":".join([mount.source, mount.target, *([",".join(options)] if options else [])])


def _tmpfs(mount: TmpfsMount) -> str:
    size = [] if mount.size is None else [f"size={mount.size}"]
    return ",".join([*mount.options, f"mode={mount.mode:o}", *size])


def _log_options(spec: InstanceSpec) -> dict[str, str]:
    if not spec.logs.max_bytes:
        return {}
    return {"max-size": str(spec.logs.max_bytes), "max-file": str(spec.logs.max_files)}


def _device_requests(spec: InstanceSpec) -> list[dict[str, Any]]:
    """Return devices by name and --gpus as Docker's inspection has them."""
    requests: list[dict[str, Any]] = []
    if spec.device_names:
        requests.append({"Driver": "cdi", "Count": 0, "DeviceIDs": list(spec.device_names)})
    if spec.gpus:
        names = spec.gpus.removeprefix("device=").split(",") if "=" in spec.gpus else []
        count = -1 if spec.gpus == "all" else 0 if names else int(spec.gpus)
        request = {"Driver": "", "Count": count, "DeviceIDs": names or None}
        requests.append({**request, "Capabilities": [["gpu"]]})
    return requests


def _security_options(spec: InstanceSpec) -> list[str]:
    options = []
    if spec.security.seccomp != "default":
        options.append(f"seccomp={spec.security.seccomp}")
    if spec.security.no_new_privileges:
        options.append("no-new-privileges")
    return options


def _port_bindings(spec: InstanceSpec) -> dict[str, list[dict[str, str]]]:
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in spec.ports:
        host_port = str(port.host_port) if port.host_port else ""
        if port.host_port_end:
            host_port += f"-{port.host_port_end}"
        bindings.setdefault(f"{port.container_port}/{port.protocol}", []).append(
            {"HostIp": port.host_ip, "HostPort": host_port}
        )
    return bindings


def _network_settings(info: InstanceInfo) -> dict[str, Any]:
    ports: dict[str, list[dict[str, str]] | None] = dict.fromkeys(info.spec.exposed)
    networks = {a.name: _endpoint(None, a.aliases) for a in info.spec.networks}
    rates = {a.name: (a.rx_rate, a.tx_rate) for a in info.spec.networks}
    for endpoint in info.endpoints:
        networks[endpoint.network] = _endpoint(endpoint, endpoint.aliases)  # type: ignore[attr-defined]
        for port in endpoint.ports:  # type: ignore[attr-defined]
            entries = ports.get(f"{port.container_port}/{port.protocol}") or []
            for address in [port.host_ip] if port.host_ip else ["0.0.0.0", "::"]:
                entries.append({"HostIp": address, "HostPort": str(port.host_port)})
            ports[f"{port.container_port}/{port.protocol}"] = entries
    for name, shape in networks.items():
        shape["RxRate"], shape["TxRate"] = rates.get(name, (0, 0))
    first = next(iter(networks.values()), _endpoint(None, ()))
    sandbox = f"/proc/{info.pid}/ns/net" if info.pid else ""
    return {
        "SandboxKey": sandbox,
        "Ports": ports,
        **{k: first[k] for k in (
            "EndpointID", "Gateway", "IPAddress", "IPPrefixLen", "IPv6Gateway",
            "GlobalIPv6Address", "GlobalIPv6PrefixLen", "MacAddress",
        )},
        "Networks": networks,
    }  # fmt: skip


def _endpoint(endpoint: Any, aliases: tuple[str, ...]) -> dict[str, Any]:
    v4: Any = None
    v6: Any = None
    for address in endpoint.addresses if endpoint is not None else ():
        if ":" in address.address:
            v6 = v6 or address
        else:
            v4 = v4 or address
    return {
        "Aliases": list(aliases) or None,
        "MacAddress": endpoint.mac if endpoint is not None else "",
        "NetworkID": endpoint.network_id if endpoint is not None else "",
        "EndpointID": endpoint.id if endpoint is not None else "",
        "Gateway": v4.gateway if v4 else "",
        "IPAddress": v4.address if v4 else "",
        "IPPrefixLen": v4.prefix if v4 else 0,
        "IPv6Gateway": v6.gateway if v6 else "",
        "GlobalIPv6Address": v6.address if v6 else "",
        "GlobalIPv6PrefixLen": v6.prefix if v6 else 0,
        "DNSNames": list(endpoint.names) if endpoint is not None else None,
    }
