"""From Docker's words to the engine's options: what a client asks of a new container."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.api.docker.errors import ApiError
from hutch.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hutch.api.docker.front import FrontOptions
    from hutch.api.docker.wire import (
        ContainerBody,
        DeviceRequestBody,
        EndpointBody,
        HealthBody,
        HostBody,
        MountBody,
        RateBody,
        ResourceBody,
        RestartBody,
    )

__all__ = ["attachment_options", "options_of", "resource_options", "restart_text"]

_MACHINES = frozenset({"hutch-vm", "vm", "qemu", "kvm", "hyperv"})
_CONTAINERS = frozenset({"", "hutch", "runc", "io.containerd.runc.v2", "default", "process"})
_CONTAINERS_TOO = _CONTAINERS | {"container"}


def options_of(body: ContainerBody, defaults: FrontOptions) -> dict[str, Any]:
    """Return the engine's options; raise `InvalidArgument` naming Docker's field."""
    from hutch.api.docker.wire import HostBody

    host = body.host_config or HostBody()
    _refuse(host)
    options: dict[str, Any] = {}
    for part in (
        _process(body),
        _storage(body, host),
        _network(body, host, defaults),
        _isolation(host, defaults),
        _life(body, host, defaults),
        resource_options(host),
        _devices(host),
    ):
        options |= part
    return {name: value for name, value in options.items() if value is not None}


_GROUP = "/docker"


def _refuse(host: HostBody) -> None:
    """Refuse what is not possible and would not be noticed otherwise."""
    refused = (
        ("CgroupParent", _foreign_group(host), "groups are hutch's own; limits are per container"),
        ("Cgroup", host.cgroup, "a container has a group of its own"),
        (
            "Links",
            host.links and _is_lone(host.network_mode),
            "a network mode without a network of its own can't be used with links",
        ),
        ("CpuRealtimePeriod", host.cpu_realtime_period, "realtime groups are not supported"),
        ("CpuRealtimeRuntime", host.cpu_realtime_runtime, "realtime groups are not supported"),
        ("BlkioWeightDevice", host.blkio_weight_device, "use BlkioWeight, or rates of devices"),
        ("CpuCount", host.cpu_count, "is for Windows"),
        ("CpuPercent", host.cpu_percent, "is for Windows"),
        ("IOMaximumIOps", host.io_maximum_iops, "is for Windows"),
        ("IOMaximumBandwidth", host.io_maximum_bandwidth, "is for Windows"),
    )
    for name, value, why in refused:
        if value:
            raise InvalidArgument("is not supported", field=f"HostConfig.{name}", hint=why)
    if host.volume_driver not in ("", "local"):
        raise InvalidArgument(
            f"no such driver: {host.volume_driver[:40]!r}", field="HostConfig.VolumeDriver"
        )


def _foreign_group(host: HostBody) -> str:
    """Return the group that a container is to be beneath, "" where that is Docker's own: buildx
    asks for one there, which has no limits unless somebody gives it some."""
    parent = host.cgroup_parent
    return "" if parent == _GROUP or parent.startswith(f"{_GROUP}/") else parent


def create_warnings(body: ContainerBody) -> list[str]:
    """Tell of what is passed over."""
    host = body.host_config
    if host is None:
        return []
    told = []
    if host.cgroup_parent:
        told.append(f"CgroupParent {host.cgroup_parent[:80]}: groups are the engine's own")
    return told


# ---- the process --------------------------------------------------------------------------


def _words(value: list[str] | str | None) -> list[str] | None:
    if value is None:
        return None
    return [value] if isinstance(value, str) else value


def _process(body: ContainerBody) -> dict[str, Any]:
    entrypoint = _words(body.entrypoint)
    return {
        "entrypoint": entrypoint or None,
        "env": body.env,
        "user": body.user or None,
        "workdir": body.working_dir or None,
        "tty": body.tty or None,
        "interactive": body.open_stdin or None,
        "stdin_once": body.stdin_once or None,
        "hostname": body.hostname or None,
        "domainname": body.domainname or None,
        "labels": body.labels or None,
        "stop_signal": body.stop_signal or None,
        "stop_timeout": body.stop_timeout,
        **_health(body.healthcheck),
    }


def _health(given: HealthBody | None) -> dict[str, Any]:
    if given is None:
        return {}
    test = given.test or []
    if test[:1] == ["NONE"]:
        return {"no_healthcheck": True}
    options: dict[str, Any] = {}
    if test:
        if test[0] not in ("CMD", "CMD-SHELL") or len(test) < 2:
            raise InvalidArgument(
                "expected NONE, CMD with words, or CMD-SHELL with a line", field="Healthcheck.Test"
            )
        options["health_cmd"] = test[1] if test[0] == "CMD-SHELL" else test[1:]
    for name, value in (
        ("health_interval", given.interval),
        ("health_timeout", given.timeout),
        ("health_start_period", given.start_period),
        ("health_start_interval", given.start_interval),
    ):
        if value:
            options[name] = value / 1e9
    if given.retries:
        options["health_retries"] = given.retries
    return options


# ---- storage ------------------------------------------------------------------------------


def _storage(body: ContainerBody, host: HostBody) -> dict[str, Any]:
    mounts = [_mount(m, f"HostConfig.Mounts[{i}]") for i, m in enumerate(host.mounts or ())]
    taken = {mount.target for mount in host.mounts or ()}
    taken.update(_target(bind) for bind in host.binds or ())
    taken.update(host.tmpfs or ())
    anonymous = [path for path in body.volumes or () if path.rstrip("/") not in taken]
    shm = host.shm_size
    if shm < 0:
        raise InvalidArgument("must not be negative", field="HostConfig.ShmSize")
    return {
        "volumes": [*(host.binds or ()), *anonymous] or None,
        "mounts": mounts or None,
        "tmpfs": host.tmpfs or None,
        "volumes_from": host.volumes_from or None,
        "read_only": host.readonly_rootfs or None,
        "storage_opts": host.storage_opt or None,
        "shm_size": shm or None,
    }


def _target(bind: str) -> str:
    parts = bind.split(":")
    return (parts[1] if len(parts) > 1 else parts[0]).rstrip("/")


def _mount(given: MountBody, field: str) -> dict[str, Any]:
    """Return one of Docker's mounts as the engine's options of a mount."""
    nested = {
        "bind": given.bind_options,
        "volume": given.volume_options,
        "tmpfs": given.tmpfs_options,
    }
    if given.type not in nested:
        raise InvalidArgument(f"type {given.type[:20]!r} is not supported", field=f"{field}.Type")
    found: dict[str, Any] = {"type": given.type, "target": given.target}
    if given.source:
        found["source"] = given.source
    if given.read_only:
        found["readonly"] = True
    for key, value in _nested(nested[given.type] or {}, given.type, field):
        found[key] = value
    return found


def _nested(options: dict[str, Any], kind: str, field: str) -> Iterable[tuple[str, Any]]:
    names = _OPTIONS[kind]
    for key, value in options.items():
        if key not in names:
            raise InvalidArgument("is not supported", field=f"{field}.{key}")
        if value in (None, False, "", 0, {}, []):
            continue
        if key == "DriverConfig":
            if not isinstance(value, dict):
                raise InvalidArgument("expected an object", field=f"{field}.{key}")
            yield "volume-driver", value.get("Name") or "local"
            if value.get("Options"):
                yield "volume-opt", value["Options"]
        elif key == "Options" and kind == "tmpfs":
            raise InvalidArgument(
                "is not supported", field=f"{field}.TmpfsOptions.Options", hint="use Tmpfs"
            )
        elif names[key]:
            yield names[key], value


_OPTIONS: dict[str, dict[str, str]] = {
    "bind": {
        "Propagation": "bind-propagation",
        "NonRecursive": "bind-nonrecursive",
        "CreateMountpoint": "bind-create-src",
        # Where it is read-only, all beneath it is: what these ask for, or more.
        "ReadOnlyNonRecursive": "",
        "ReadOnlyForceRecursive": "",
    },
    "volume": {
        "NoCopy": "volume-nocopy",
        "Labels": "volume-label",
        "DriverConfig": "-",
        "Subpath": "volume-subpath",
    },
    "tmpfs": {"SizeBytes": "tmpfs-size", "Mode": "tmpfs-mode", "Options": "-"},
}


# ---- network ------------------------------------------------------------------------------


def _network(body: ContainerBody, host: HostBody, defaults: FrontOptions) -> dict[str, Any]:
    mode = "none" if body.network_disabled else host.network_mode
    mode = "bridge" if mode in ("", "default") else mode
    lone = _is_lone(mode)
    links = list(host.links or ())
    endpoints = {
        name if name != "default" else "bridge": endpoint
        for name, endpoint in (
            (body.networking_config and body.networking_config.endpoints_config) or {}
        ).items()
    }
    first = endpoints.pop(mode, None)
    if endpoints and mode == "bridge" and not host.network_mode:
        mode = next(iter(endpoints))
        first = endpoints.pop(mode)
    for endpoint in (first, *endpoints.values()):
        links += (endpoint.links if endpoint is not None else None) or ()
    networks = [attachment_options(mode, first, body.mac_address)]
    networks += [attachment_options(name, endpoint) for name, endpoint in endpoints.items()]
    shared = mode.startswith("container:")
    return {
        "network": [mode] if lone and not endpoints else networks,
        "publish": None if shared else _published(host, defaults.host_ip),
        "publish_all": host.publish_all_ports or None,
        "expose": list(body.exposed_ports or ()) or None,
        "dns": host.dns or ([] if shared else list(defaults.dns)) or None,
        "dns_options": host.dns_options or ([] if shared else list(defaults.dns_options)) or None,
        "dns_search": host.dns_search or ([] if shared else list(defaults.dns_search)) or None,
        "add_host": _extra_hosts(host, defaults) or None,
        "links": links or None,
    }


def _is_lone(mode: str) -> bool:
    return mode in ("none", "host") or mode.startswith("container:")


def attachment_options(name: str, given: EndpointBody | None, mac: str = "") -> dict[str, Any]:
    """Return what is asked of a place in a network as the engine's options."""
    found: dict[str, Any] = {"name": name}
    if given is not None:
        if given.ipam_config is not None:
            if given.ipam_config.ipv4_address:
                found["ip"] = given.ipam_config.ipv4_address
            if given.ipam_config.ipv6_address:
                found["ip6"] = given.ipam_config.ipv6_address
            if given.ipam_config.link_local_ips:
                raise InvalidArgument("is not supported", field=f"{name}.IPAMConfig.LinkLocalIPs")
        # Docker takes aliases on the default bridge and passes them over.
        if given.aliases and name != "bridge":
            found["alias"] = given.aliases
        mac = given.mac_address or mac
    if mac:
        found["mac-address"] = mac
    return found


def _extra_hosts(host: HostBody, defaults: FrontOptions) -> list[str]:
    """Return the names that `/etc/hosts` is to have, with the configured address in the place
    of the word that stands for the host's."""
    given = host.extra_hosts or []
    if not defaults.host_gateway:
        return given
    return [
        one.removesuffix("host-gateway") + defaults.host_gateway
        if one.endswith((":host-gateway", "=host-gateway"))
        else one
        for one in given
    ]


def _published(host: HostBody, default_ip: str) -> list[str] | None:
    """Return the ports to publish; those that name no address of the host are at `default_ip`,
    "" for all of them."""
    at = f"[{default_ip}]" if ":" in default_ip else default_ip
    anywhere = f"{at}::" if at else ""
    found = []
    for port, bindings in (host.port_bindings or {}).items():
        if not bindings:
            found.append(f"{anywhere}{port}")
        for binding in bindings or ():
            ip = f"[{binding.host_ip}]" if ":" in binding.host_ip else binding.host_ip
            if ip in ("0.0.0.0", "[::]"):
                ip = ""
            elif not ip:
                ip = at
            if ip:
                found.append(f"{ip}:{binding.host_port}:{port}")
            elif binding.host_port:
                found.append(f"{binding.host_port}:{port}")
            else:
                found.append(port)
    return list(dict.fromkeys(found)) or None


# ---- isolation ----------------------------------------------------------------------------


def _isolation(host: HostBody, defaults: FrontOptions) -> dict[str, Any]:
    security = list(host.security_opt or ())
    for name, given in (("MaskedPaths", host.masked_paths), ("ReadonlyPaths", host.readonly_paths)):
        if given:
            raise InvalidArgument(
                "is not supported", field=f"HostConfig.{name}", hint="an empty list lifts it"
            )
    if host.masked_paths == [] and host.readonly_paths == [] and not host.privileged:
        security.append("systempaths=unconfined")
    own = host.privileged or any(one.startswith(("seccomp=", "seccomp:")) for one in security)
    if defaults.seccomp and not own:
        security.append(f"seccomp={defaults.seccomp}")
    return {
        "isolation": _kind(host, defaults),
        "cap_add": host.cap_add or None,
        "cap_drop": host.cap_drop or None,
        "privileged": host.privileged or None,
        # As Docker: programs may gain privileges unless somebody says that they must not.
        "no_new_privileges": defaults.no_new_privileges,
        "security_opt": security or None,
        "cgroupns": host.cgroupns_mode or ("" if host.privileged else defaults.cgroupns) or None,
        "group_add": host.group_add or None,
        "ipc": host.ipc_mode or defaults.ipc or None,
        "pid": host.pid_mode or None,
        "uts": host.uts_mode or None,
        "userns": host.userns_mode or None,
        "sysctls": host.sysctls or None,
        "oom_score_adj": host.oom_score_adj or None,
        "annotations": host.annotations or None,
    }


def _kind(host: HostBody, defaults: FrontOptions) -> str | None:
    """Return the kind of instance that runtime and isolation ask for."""
    isolation = host.isolation.lower()
    if isolation in _MACHINES:
        return "vm"
    if isolation == "auto":
        return "auto"
    if isolation not in _CONTAINERS_TOO:
        raise InvalidArgument(
            f"expected default, container, vm or auto, got {host.isolation[:40]!r}",
            field="HostConfig.Isolation",
        )
    runtime = host.runtime or defaults.default_runtime
    if runtime in _MACHINES:
        return "vm"
    if runtime in _CONTAINERS:
        return None
    raise ApiError(400, f'unknown or invalid runtime name: "{runtime[:80]}"')


def _devices(host: HostBody) -> dict[str, Any]:
    devices = [
        f"{d.path_on_host}:{d.path_in_container or d.path_on_host}:{d.cgroup_permissions or 'rwm'}"
        for d in host.devices or ()
    ]
    gpus: str | None = None
    for i, request in enumerate(host.device_requests or ()):
        names, asked = _device_request(request, f"HostConfig.DeviceRequests[{i}]")
        devices += names
        gpus = asked or gpus
    return {
        "devices": devices or None,
        "device_cgroup_rules": host.device_cgroup_rules or None,
        "gpus": gpus,
        "ulimits": [f"{u.name}={u.soft}:{u.hard}" for u in host.ulimits or ()] or None,
    }


def _device_request(request: DeviceRequestBody, field: str) -> tuple[list[str], str | None]:
    if request.driver == "cdi":
        return list(request.device_ids or ()), None
    capabilities = {word for group in request.capabilities or () for word in group}
    if "gpu" not in capabilities:
        raise InvalidArgument(
            "no driver has these capabilities", field=field, hint="cdi, or the capability gpu"
        )
    if request.device_ids:
        return [], "device=" + ",".join(request.device_ids)
    return [], "all" if request.count < 0 else str(request.count)


# ---- life ---------------------------------------------------------------------------------


def _life(body: ContainerBody, host: HostBody, defaults: FrontOptions) -> dict[str, Any]:
    log = host.log_config
    driver = (log.type if log else "") or defaults.log_driver
    log_opts = dict((log and log.config) or {})
    if not (log and log.type):
        log_opts = defaults.log_opts | log_opts
    found: dict[str, Any] = {
        "remove": host.auto_remove or None,
        "log_driver": driver,
        "log_opts": log_opts or None,
        "init": host.init if host.init is not None else defaults.init or None,
        "restart": restart_text(host.restart_policy),
    }
    if not host.ulimits and defaults.default_ulimits:
        found["ulimits"] = list(defaults.default_ulimits)
    if not host.shm_size and defaults.default_shm_size:
        found["shm_size"] = defaults.default_shm_size
    return found


def restart_text(policy: RestartBody | None) -> str | None:
    """Return a restart policy as the engine reads it."""
    if policy is None or policy.name in ("", "no"):
        return None if policy is None or not policy.name else "no"
    if policy.maximum_retry_count < 0:
        raise InvalidArgument("must not be negative", field="RestartPolicy.MaximumRetryCount")
    if policy.maximum_retry_count and policy.name == "on-failure":
        return f"{policy.name}:{policy.maximum_retry_count}"
    if policy.maximum_retry_count:
        raise InvalidArgument(
            "a number of retries goes with on-failure only",
            field="RestartPolicy.MaximumRetryCount",
        )
    return policy.name


def _throttles(rates: list[RateBody] | None) -> list[str] | None:
    return [f"{rate.path}:{rate.rate}" for rate in rates or ()] or None


def resource_options(given: ResourceBody) -> dict[str, Any]:
    """Return limits as the engine's options; 0 is not limited, as in Docker."""
    if given.nano_cpus and (given.cpu_period or given.cpu_quota):
        raise ApiError(400, "Conflicting options: Nano CPUs and CPU Period cannot both be set.")
    return {
        "cpu_shares": given.cpu_shares or None,
        "memory": given.memory or None,
        "cpus": given.nano_cpus / 1e9 or None,
        "blkio_weight": given.blkio_weight or None,
        "device_read_bps": _throttles(given.blkio_device_read_bps),
        "device_write_bps": _throttles(given.blkio_device_write_bps),
        "device_read_iops": _throttles(given.blkio_device_read_iops),
        "device_write_iops": _throttles(given.blkio_device_write_iops),
        "cpu_period": given.cpu_period or None,
        "cpu_quota": given.cpu_quota or None,
        "cpuset_cpus": given.cpuset_cpus or None,
        "cpuset_mems": given.cpuset_mems or None,
        "memory_reservation": given.memory_reservation or None,
        "memory_swap": given.memory_swap or None,
        "memory_swappiness": given.memory_swappiness,
        "oom_kill_disable": given.oom_kill_disable or None,
        "pids_limit": given.pids_limit or None,
    }
