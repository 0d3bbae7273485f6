"""What the server is: ping, version, info."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

from hutch.api.docker.replies import Answer, Reply, json_reply
from hutch.api.docker.routing import NEWEST, Route, show

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.engine.results import SystemInfo
    from hutch.image.registry_config import RegistryConfig

__all__ = ["ROUTES"]

_PING = {
    "Builder-Version": "1",
    "Swarm": "inactive",
    "Cache-Control": "no-cache, no-store, must-revalidate",
    "Pragma": "no-cache",
}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


async def _ping(request: Request) -> Answer:
    return Reply(200, b"OK", "text/plain; charset=utf-8", _PING)


async def _version(request: Request) -> Answer:
    from hutch import __version__

    kernel = os.uname().release
    arch = _ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    details = {
        "ApiVersion": show(NEWEST),
        "Arch": arch,
        "BuildTime": "",
        "Experimental": "false",
        "GitCommit": "",
        "GoVersion": f"python{platform.python_version()}",
        "KernelVersion": kernel,
        "MinAPIVersion": show(request.front.options.min_api_version),
        "Os": "linux",
    }
    return json_reply(
        {
            "Platform": {"Name": f"hutch {__version__}"},
            "Components": [{"Name": "Engine", "Version": __version__, "Details": details}],
            "Version": __version__,
            "ApiVersion": show(NEWEST),
            "MinAPIVersion": show(request.front.options.min_api_version),
            "GitCommit": "",
            "GoVersion": details["GoVersion"],
            "Os": "linux",
            "Arch": arch,
            "KernelVersion": kernel,
        }
    )


async def _info(request: Request) -> Answer:
    front = request.front
    return json_reply(await front.call(_describe, front))


def _describe(front: Front) -> dict[str, Any]:
    info = front.engine.info()
    return _what_runs(info) | _host(front, info) | _what_it_can(front)


def _what_runs(info: SystemInfo) -> dict[str, Any]:
    return {
        "ID": _host_id(info.root),
        "Containers": info.instances,
        "ContainersRunning": info.running,
        "ContainersPaused": info.paused,
        "ContainersStopped": info.stopped,
        "Images": info.images,
        "Driver": "overlay2",
        "DriverStatus": [["Backing Filesystem", "overlayfs"]],
        "DockerRootDir": info.root,
        "ServerVersion": info.version,
    }


def _host_id(root: str) -> str:
    """Return an identifier of this root on this host, the same at each start."""
    import hashlib
    import uuid

    try:
        with open("/etc/machine-id") as file:
            machine = file.read().strip()
    except OSError:
        machine = os.uname().nodename
    digest = hashlib.sha256(f"{machine} {root}".encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4))


def _host(front: Front, info: SystemInfo) -> dict[str, Any]:
    import time

    now = time.time_ns()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
    return {
        "NCPU": info.cpus,
        "MemTotal": info.memory,
        "Name": os.uname().nodename,
        "KernelVersion": info.kernel,
        "OperatingSystem": _release("PRETTY_NAME", "Linux"),
        "OSVersion": _release("VERSION_ID", ""),
        "OSType": "linux",
        "Architecture": info.architecture,
        "CgroupDriver": "cgroupfs",
        "CgroupVersion": "2" if info.cgroup == "v2" else "1",
        "SystemTime": f"{stamp}.{now % 10**9:09d}Z",
        "HttpProxy": _without_secret(os.environ.get("HTTP_PROXY", "")),
        "HttpsProxy": _without_secret(os.environ.get("HTTPS_PROXY", "")),
        "NoProxy": os.environ.get("NO_PROXY", ""),
        "Labels": list(front.options.labels),
        "NGoroutines": 1,
        "NFd": len(os.listdir("/proc/self/fd")),
        "NEventsListener": 0,
    }


def _release(name: str, default: str) -> str:
    try:
        return platform.freedesktop_os_release().get(name, default)
    except OSError:
        return default


def _what_it_can(front: Front) -> dict[str, Any]:
    commit = {"ID": "", "Expected": ""}
    return {
        "Plugins": {
            "Volume": ["local"],
            "Network": ["bridge", "host", "none"],
            "Authorization": None,
            "Log": ["json-file", "local", "none"],
        },
        "MemoryLimit": True,
        "SwapLimit": True,
        "KernelMemory": False,
        "CpuCfsPeriod": True,
        "CpuCfsQuota": True,
        "CPUShares": True,
        "CPUSet": True,
        "PidsLimit": True,
        "IPv4Forwarding": True,
        "BridgeNfIptables": False,
        "BridgeNfIp6tables": False,
        "Debug": front.log.isEnabledFor(10),
        "OomKillDisable": True,
        "LoggingDriver": front.options.log_driver,
        "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": _registries(front.engine.context.registry),
        "GenericResources": None,
        "ExperimentalBuild": False,
        "Runtimes": {"hutch": {"path": "hutch"}, "hutch-vm": {"path": "hutch"}},
        "DefaultRuntime": front.options.default_runtime,
        "Swarm": {
            "NodeID": "",
            "NodeAddr": "",
            "LocalNodeState": "inactive",
            "ControlAvailable": False,
            "Error": "",
            "RemoteManagers": None,
        },
        "LiveRestoreEnabled": front.options.live_restore,
        "Isolation": "",
        "InitBinary": "hutch-launcher",
        "ContainerdCommit": commit,
        "RuncCommit": commit,
        "InitCommit": commit,
        "SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns"],
        "CDISpecDirs": ["/etc/cdi", "/var/run/cdi"],
        "Warnings": None,
    } | _pools(front)


def _pools(front: Front) -> dict[str, Any]:
    pools = front.engine.context.networks.choices.pools
    if not pools:
        return {}
    return {"DefaultAddressPools": [{"Base": pool.base, "Size": pool.size} for pool in pools]}


def _without_secret(url: str) -> str:
    """Return a URL as Docker shows it: who is let in stays unsaid."""
    scheme, separator, rest = url.rpartition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{'xxxxx:xxxxx' if user else ''}{at}{host}"


def _registries(config: RegistryConfig) -> dict[str, Any]:
    """Return which registries have mirrors, and which need no certificate."""
    hub = [url.rstrip("/") + "/" for url in config.mirrors.get("docker.io", ())]
    networks = [one for one in config.insecure if "/" in one]
    indexes = {
        host: {"Name": host, "Mirrors": [], "Secure": False, "Official": False}
        for host in config.insecure
        if "/" not in host
    }
    indexes["docker.io"] = {"Name": "docker.io", "Mirrors": hub, "Secure": True, "Official": True}
    return {
        "InsecureRegistryCIDRs": ["::1/128", "127.0.0.0/8", *networks],
        "IndexConfigs": indexes,
        "Mirrors": hub,
    }


ROUTES = (
    Route(method="GET", path="/_ping", handler=_ping, summary="Say that the server is there"),
    Route(method="HEAD", path="/_ping", handler=_ping, summary="The same without a body"),
    Route(
        method="GET",
        path="/version",
        handler=_version,
        summary="Version of the server and of the API",
        verdict="differs: `Version` is hutch's, `GoVersion` tells the Python that runs it",
    ),
    Route(
        method="GET",
        path="/info",
        handler=_info,
        summary="Describe server and host",
        verdict="differs: `Runtimes` are `hutch` and `hutch-vm`; commits of runc and containerd "
        "are empty, as neither is used",
    ),
)
