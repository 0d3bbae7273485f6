"""Keys of Docker's `daemon.json` that hutch has no use for: which may stand there, and why."""

from __future__ import annotations

import json
from typing import Any

from hutch.errors import InvalidArgument

__all__ = ["IDLE", "ONLY", "leave_out_idle"]

_PLUGINS = "there are no plugins"
_SWARM = "there is no swarm"
_CONTAINERD = "neither containerd nor runc is used"
_OWN_GROUPS = "hutch makes the control groups itself"
_PROXY = "published ports are the kernel's own, with hutch's proxy where those do not reach"

# Whatever they say, nothing depends on it.
IDLE: dict[str, str] = {
    "bridge-accept-fwmark": "hutch's rules accept what comes back by its connection",
    "builder": "the build cache is freed by `prune`",
    "cluster-advertise": _SWARM,
    "cluster-store": _SWARM,
    "containerd": _CONTAINERD,
    "containerd-namespace": _CONTAINERD,
    "containerd-plugins-namespace": _CONTAINERD,
    "exec-opts": _OWN_GROUPS,
    "exec-root": "what runs has its place in the root",
    "experimental": "nothing is experimental",
    "features": "there is one builder and one store of images",
    "firewall-backend": "it is nftables always",
    "init-path": "the init of containers is hutch's own",
    "ip-forward-no-drop": "hutch's rules touch only its own bridges",
    "max-concurrent-uploads": "as many go up at a time as come down: max-concurrent-downloads",
    "network-control-plane-mtu": _SWARM,
    "network-diagnostic-port": _SWARM,
    "node-generic-resources": _SWARM,
    "raw-logs": "logs of the daemon have no colours",
    "runtimes": "runtimes are hutch and hutch-vm",
    "swarm-default-advertise-addr": _SWARM,
    "userland-proxy": _PROXY,
    "userland-proxy-path": _PROXY,
}

# What each may say, as it is so anyway; anything else is refused, with the reason.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "allow-direct-routing": ((False,), "hutch's rules let nobody past published ports"),
    "authorization-plugins": (([],), _PLUGINS),
    "bridge": (("",), "the default network's bridge is hutch's; see bip"),
    "cgroup-parent": (("", "/docker", "system.slice"), _OWN_GROUPS),
    "default-gateway": (("",), "the bridge is the gateway; see bip"),
    "default-gateway-v6": (("",), "the bridge is the gateway; see fixed-cidr-v6"),
    "icc": ((True,), "make networks of their own for what must not meet"),
    "ip-forward": ((True,), "networks need it"),
    "ip6tables": ((True,), "networks need it"),
    "iptables": ((True,), "networks need it"),
    "selinux-enabled": ((False,), "hutch has no SELinux labels"),
    "storage-driver": (("", "overlay2", "overlayfs"), "layers are overlayfs"),
    "storage-opts": (([], ["overlay2.override_kernel_check=true"]), "layers have no options"),
    "userns-remap": (("",), "give containers --userns, or run hutch without root"),
}


def leave_out_idle(given: dict[str, Any], path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what is left of a configuration, and the keys that nothing depends on; raise
    `InvalidArgument` for what cannot be."""
    for key in sorted(ONLY.keys() & given.keys()):
        allowed, why = ONLY[key]
        value = given[key]
        # 1 is True in Python, but not in JSON.
        if not any(type(value) is type(one) and value == one for one in allowed):
            words = " or ".join(json.dumps(one) for one in allowed)
            raise InvalidArgument(
                f"{path}: {key}: expected {words}, got {json.dumps(value)[:80]}", hint=why
            )
    idle = tuple(sorted(IDLE.keys() & given.keys()))
    rest = {key: value for key, value in given.items() if key not in IDLE and key not in ONLY}
    return rest, idle
