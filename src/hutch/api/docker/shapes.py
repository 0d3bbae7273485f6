"""How an instance looks in Docker's JSON: an entry of the list, and all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.api.docker.hostconfig import host_config
from hutch.api.docker.times import timestamp
from hutch.lifecycle import State
from hutch.spec.model import VolumeMount

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.engine.results import DiskSize, InstanceInfo, MountInfo
    from hutch.network.model import Endpoint
    from hutch.spec.model import InstanceSpec

__all__ = ["container_summary", "health_json", "inspect_container", "status_word"]

# What Docker has no word for is told as the nearest that it has.
_WORDS = {
    State.STARTING: "created",
    State.SUSPENDED: "exited",
    State.MIGRATING: "exited",
}
_LIVE = (State.RUNNING, State.PAUSED)
_WATCHED = (*_LIVE, State.STARTING, State.RESTARTING)


def status_word(state: State) -> str:
    """Return the state in Docker's word."""
    return _WORDS.get(state, state.value)


# ---- the list -----------------------------------------------------------------------------


def container_summary(
    info: InstanceInfo, size: DiskSize | None, network_ids: dict[str, str]
) -> dict[str, Any]:
    """Return an entry of the list of containers."""
    entry: dict[str, Any] = {
        "Id": info.id,
        "Names": [f"/{info.name}"],
        "Image": info.image,
        "ImageID": info.image_id,
        "Command": " ".join(_quoted(word) for word in info.command),
        "Created": info.created_ns // 10**9,
        "Ports": _ports(info),
        "Labels": info.labels,
        "State": status_word(info.state),
        "Status": info.status,
        "HostConfig": {"NetworkMode": _network_mode(info)},
        "NetworkSettings": {"Networks": endpoints(info, network_ids)},
        "Mounts": [_mount(mount) for mount in info.mounts if mount.type != "tmpfs"],
    }
    if size is not None:
        entry |= {"SizeRw": size.writable} if size.writable else {}
        entry["SizeRootFs"] = size.total
    return entry


def _quoted(word: str) -> str:
    return f"'{word}'" if word == "" or any(c.isspace() for c in word) else word


def _network_mode(info: InstanceInfo) -> str:
    return info.spec.network_mode


def _ports(info: InstanceInfo) -> list[dict[str, Any]]:
    """Return the ports as the list shows them: published ones with address, others without."""
    found: list[dict[str, Any]] = []
    seen: set[tuple[int, str]] = set()
    for port, where in _published(info).items():
        number, _, protocol = port.partition("/")
        seen.add((int(number), protocol))
        for binding in where:
            found.append(
                {
                    "IP": binding["HostIp"],
                    "PrivatePort": int(number),
                    "PublicPort": int(binding["HostPort"]),
                    "Type": protocol,
                }
            )
    if info.state in _LIVE and info.endpoints:
        for port in info.spec.exposed:
            number, _, protocol = port.partition("/")
            if (int(number), protocol) not in seen:
                found.append({"PrivatePort": int(number), "Type": protocol})
    return found


def _published(info: InstanceInfo) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for endpoint in info.endpoints:
        for port in getattr(endpoint, "ports", ()):
            bindings = found.setdefault(f"{port.container_port}/{port.protocol}", [])
            for address in (port.host_ip,) if port.host_ip else ("0.0.0.0", "::"):
                binding = {"HostIp": address, "HostPort": str(port.host_port)}
                if binding not in bindings:
                    bindings.append(binding)
    return found


def _mount(mount: MountInfo) -> dict[str, Any]:
    entry: dict[str, Any] = {"Type": mount.type}
    if mount.type == "volume":
        entry["Name"] = mount.name
    entry |= {"Source": mount.source, "Destination": mount.target}
    if mount.type == "volume":
        entry["Driver"] = "local"
    return entry | {
        "Mode": "ro" if mount.read_only else "",
        "RW": not mount.read_only,
        "Propagation": mount.propagation if mount.type == "bind" else "",
    }


# ---- all of it ------------------------------------------------------------------------------


def inspect_container(
    info: InstanceInfo,
    *,
    size: DiskSize | None,
    network_ids: dict[str, str],
    execs: list[str],
    volumes_of_image: tuple[str, ...] = (),
    links: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Return all that Docker tells of a container. `links` are names and aliases."""
    argv = info.command
    found: dict[str, Any] = {
        "Id": info.id,
        "Created": timestamp(info.created_ns),
        "Path": argv[0] if argv else "",
        "Args": list(argv[1:]),
        "State": _state(info),
        "Image": info.image_id,
        "ResolvConfPath": f"{info.directory}/resolv.conf",
        "HostnamePath": f"{info.directory}/hostname",
        "HostsPath": f"{info.directory}/hosts",
        "LogPath": f"{info.directory}/log" if info.spec.logs.driver != "none" else "",
        "Name": f"/{info.name}",
        "RestartCount": info.restart_count,
        "Driver": "overlay2",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": info.spec.security.apparmor,
        "ExecIDs": execs or None,
        "HostConfig": host_config(info),
        "GraphDriver": {
            "Name": "overlay2",
            "Data": {"UpperDir": f"{info.directory}/upper"},
        },
        "Mounts": [_mount(mount) for mount in info.mounts if mount.type != "tmpfs"],
        "Config": _config(info, volumes_of_image),
        "NetworkSettings": _network_settings(info, network_ids),
    }
    if size is not None:
        found |= {"SizeRw": size.writable, "SizeRootFs": size.total}
    if links:
        _tell_links(found, info, links)
    return found


def _tell_links(
    found: dict[str, Any], info: InstanceInfo, links: Sequence[tuple[str, str]]
) -> None:
    """Put the links where Docker tells them: of the default network, or of one's own."""
    if info.spec.network_mode == "bridge":
        told = [f"/{name}:/{info.name}/{alias}" for name, alias in links]
        found["HostConfig"]["Links"] = told
        return
    endpoint = found["NetworkSettings"]["Networks"].get(info.spec.network_mode)
    if endpoint is not None:
        endpoint["Links"] = [f"{name}:{alias}" for name, alias in links]


def health_json(info: InstanceInfo) -> dict[str, Any] | None:
    """Return what the health check says, None without one."""
    if info.health is None or info.state == State.CREATED:
        return None
    log = []
    for probe in info.health.log:
        log.append(
            {
                "Start": timestamp(_number(probe.get("start_ns"))),
                "End": timestamp(_number(probe.get("end_ns"))),
                "ExitCode": _number(probe.get("exit_code")),
                "Output": str(probe.get("output", "")),
            }
        )
    return {
        # Nobody looks after it any more: it is not well, as Docker has it.
        "Status": info.health.status if info.state in _WATCHED else "unhealthy",
        "FailingStreak": info.health.failing_streak,
        "Log": log,
    }


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _state(info: InstanceInfo) -> dict[str, Any]:
    state = info.state
    found = {
        "Status": status_word(state),
        "Running": state in (*_LIVE, State.RESTARTING),
        "Paused": state == State.PAUSED,
        "Restarting": state == State.RESTARTING,
        "OOMKilled": info.oom_killed,
        "Dead": state == State.DEAD,
        "Pid": info.pid,
        "ExitCode": info.exit_code,
        "Error": info.error,
        "StartedAt": timestamp(info.started_ns),
        "FinishedAt": timestamp(info.finished_ns),
    }
    health = health_json(info)
    if health is not None:
        found["Health"] = health
    return found


def _config(info: InstanceInfo, volumes_of_image: tuple[str, ...]) -> dict[str, Any]:
    spec = info.spec
    process = spec.process
    found: dict[str, Any] = {
        "Hostname": spec.hostname,
        "Domainname": spec.domainname,
        "User": process.user,
        "AttachStdin": process.stdin_once,
        "AttachStdout": True,
        "AttachStderr": True,
        "ExposedPorts": {port: {} for port in _exposed(info)} or None,
        "Tty": process.tty,
        "OpenStdin": process.stdin,
        "StdinOnce": process.stdin_once,
        "Env": list(process.env),
        "Cmd": list(spec.command) or None,
        "Image": info.image,
        "Volumes": {path: {} for path in (*volumes_of_image, *_anonymous(spec))} or None,
        "WorkingDir": process.cwd if process.cwd != "/" else "",
        "Entrypoint": list(spec.entrypoint) or None,
        "OnBuild": None,
        "Labels": info.labels,
        "StopSignal": spec.stop_signal,
        "StopTimeout": int(spec.stop_timeout_s),
    }
    if not found["ExposedPorts"]:
        del found["ExposedPorts"]
    if spec.health is not None:
        health = spec.health
        command = list(health.command)
        told = {
            "Test": _test(command),
            "Interval": int(health.interval_s * 1e9),
            "Timeout": int(health.timeout_s * 1e9),
            "StartPeriod": int(health.start_period_s * 1e9),
            "StartInterval": int(health.start_interval_s * 1e9),
            "Retries": health.retries,
        }
        found["Healthcheck"] = {name: value for name, value in told.items() if value}
    return found


def _anonymous(spec: InstanceSpec) -> list[str]:
    return [m.target for m in spec.mounts if isinstance(m, VolumeMount) and not m.name]


def _test(command: list[str]) -> list[str]:
    if len(command) == 3 and command[:2] == ["/bin/sh", "-c"]:
        return ["CMD-SHELL", command[2]]
    return ["CMD", *command]


def _exposed(info: InstanceInfo) -> list[str]:
    published = [f"{port.container_port}/{port.protocol}" for port in info.spec.ports]
    return sorted({*info.spec.exposed, *published})


# ---- networks -------------------------------------------------------------------------------


def endpoints(info: InstanceInfo, network_ids: dict[str, str]) -> dict[str, Any]:
    """Return the place in each network, those that are only asked for included."""
    live: dict[str, Any] = {getattr(e, "network", ""): e for e in info.endpoints}
    asked = {attachment.name: attachment for attachment in info.spec.networks}
    names = list(asked) or [info.spec.network_mode]
    found = {}
    for name in dict.fromkeys([*names, *(n for n in live if n)]):
        if name.startswith("container:"):
            continue
        attachment = asked.get(name)
        found[name] = _endpoint(
            info,
            live.get(name),
            network_id=network_ids.get(name, ""),
            aliases=list(attachment.aliases) if attachment else [],
            wanted=(attachment.ipv4, attachment.ipv6, attachment.mac)
            if attachment
            else ("", "", ""),
        )
    return found


def _endpoint(
    info: InstanceInfo,
    live: Endpoint | None,
    *,
    network_id: str,
    aliases: list[str],
    wanted: tuple[str, str, str],
) -> dict[str, Any]:
    ipv4, ipv6, mac = wanted
    ipam = {"IPv4Address": ipv4, "IPv6Address": ipv6}
    first4 = next((a for a in live.addresses if ":" not in a.address), None) if live else None
    first6 = next((a for a in live.addresses if ":" in a.address), None) if live else None
    return {
        "IPAMConfig": {k: v for k, v in ipam.items() if v} or None,
        "Links": None,
        "Aliases": aliases or None,
        "MacAddress": live.mac if live else mac,
        "DriverOpts": None,
        "GwPriority": 0,
        "NetworkID": live.network_id if live else network_id,
        "EndpointID": live.id if live else "",
        "Gateway": first4.gateway if first4 else "",
        "IPAddress": first4.address if first4 else "",
        "IPPrefixLen": first4.prefix if first4 else 0,
        "IPv6Gateway": first6.gateway if first6 else "",
        "GlobalIPv6Address": first6.address if first6 else "",
        "GlobalIPv6PrefixLen": first6.prefix if first6 else 0,
        "DNSNames": [*dict.fromkeys([info.name, *aliases, info.id[:12]])],
    }


def _network_settings(info: InstanceInfo, network_ids: dict[str, str]) -> dict[str, Any]:
    networks = endpoints(info, network_ids)
    default = networks.get("bridge", {})
    ports: dict[str, Any] = {}
    if info.state in _LIVE and info.endpoints:
        ports = dict.fromkeys(_exposed(info))
        ports |= _published(info)
    copied = (
        *("EndpointID", "Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen"),
        *("IPAddress", "IPPrefixLen", "IPv6Gateway", "MacAddress"),
    )
    return {
        "Bridge": "",
        "SandboxID": info.id if info.state in _LIVE else "",
        "SandboxKey": f"/proc/{info.pid}/ns/net" if info.pid else "",
        "Ports": ports,
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        **{name: default.get(name, 0 if name.endswith("Len") else "") for name in copied},
        "Networks": networks,
    }
