"""What Docker's command line has and this one has not: why, and what to do instead.

Looked into only once a word or an option turned out to be unknown, so that somebody who comes
from Docker is told more than that.
"""

from __future__ import annotations

__all__ = ["refused_command", "refused_option"]

_BUILDX = "there is one builder, in this program: `hutch build`, `hutch builder prune`"
_SWARM = "there is no cluster: hutch runs instances on this host"
_WINDOWS = "is for Windows containers"
_PLATFORM = "an image here has one platform: choose it with `hutch pull --platform`"
_CHECKPOINT = "checkpoints are snapshots here: `hutch snapshot create`, or `hutch suspend`"
_CLUSTER_VOLUME = "is for the volumes of a cluster, which there is not"

_COMMANDS: dict[str, str] = {
    "buildx": _BUILDX,
    "checkpoint": _CHECKPOINT,
    "compose": "Compose itself works with `hutch serve --docker unix:///run/hutch.sock`",
    "config": _SWARM,
    "context": "there is no daemon to choose: `--root` or HUTCH_ROOT name the engine",
    "login": "credentials are read from ~/.docker/config.json and its credential helpers: "
    "`docker login` or `skopeo login --compat-auth-file ~/.docker/config.json` write them",
    "logout": "take the registry out of ~/.docker/config.json",
    "manifest": "several platforms under one name cannot be made here",
    "node": _SWARM,
    "plugin": "there are no plugins",
    "search": "registries have no search of their own: look at the registry's site",
    "secret": f"{_SWARM}; mount a file with `--mount type=bind,readonly`",
    "service": _SWARM,
    "stack": _SWARM,
    "swarm": _SWARM,
    "trust": "signatures are not checked: name an image by its digest (NAME@sha256:…)",
    "volume update": _CLUSTER_VOLUME,
}

_CREATE: dict[str, str] = {
    "blkio-weight-device": "use --blkio-weight, or --device-read-bps and its like",
    "cgroup-parent": "every instance has a control group of its own under hutch/",
    "cpu-count": f"{_WINDOWS}; use --cpus",
    "cpu-percent": f"{_WINDOWS}; use --cpus",
    "cpu-rt-period": "real-time scheduling is not given out; use --cpus or --cpu-shares",
    "cpu-rt-runtime": "real-time scheduling is not given out; use --cpus or --cpu-shares",
    "io-maxbandwidth": f"{_WINDOWS}; use --device-read-bps and --device-write-bps",
    "io-maxiops": f"{_WINDOWS}; use --device-read-iops and --device-write-iops",
    "kernel-memory": "the kernel has no such limit any more; use --memory",
    "link-local-ip": "use --ip or --ip6 on a network of your own",
    "runtime": "there is one runtime, hutch's own; --isolation chooses container or vm",
    "use-api-socket": "there is no API socket; mount one with -v where an engine has one",
}
_CONNECT: dict[str, str] = {
    "driver-opt": "the driver bridge has no options of an endpoint",
    "gw-priority": "the first network that leads outside gives the default route",
    "link-local-ip": "use --ip or --ip6",
}
_NETWORK: dict[str, str] = {
    "config-from": _SWARM,
    "config-only": _SWARM,
    "ingress": _SWARM,
    "ipam-opt": "addresses are hutch's own to give; see --subnet, --gateway and --ip-range",
}
_BUILD = {
    "allow": "a build has no more rights than a container",
    "annotation": "labels go into the image: use --label",
    "attest": "attestations are not made",
    "cgroup-parent": _CREATE["cgroup-parent"],
    "disable-content-trust": "signatures are not checked: name an image by its digest",
}
_START = {"checkpoint": _CHECKPOINT, "checkpoint-dir": _CHECKPOINT}
_VOLUME_NAMES = """availability group limit-bytes required-bytes scope secret sharing
topology-preferred topology-required type""".split()

_OPTIONS: dict[str, dict[str, str]] = {
    "build": _BUILD,
    "create": _CREATE,
    "run": _CREATE,
    "start": _START,
    "update": {name: _CREATE[name] for name in ("cpu-rt-period", "cpu-rt-runtime")},
    "images": {"tree": "images here have one platform: there is no tree to show"},
    "pull": {"all-tags": "name each tag"},
    "push": {"platform": _PLATFORM},
    "history": {"platform": _PLATFORM},
    "load": {"platform": _PLATFORM},
    "rmi": {"platform": _PLATFORM},
    "save": {"platform": _PLATFORM},
    "image inspect": {"platform": _PLATFORM},
    "network connect": _CONNECT,
    "network create": _NETWORK,
    "volume create": dict.fromkeys(_VOLUME_NAMES, _CLUSTER_VOLUME),
    "volume ls": {"cluster": _CLUSTER_VOLUME},
}
_SAME = {"image ls": "images", "image rm": "rmi"}


def refused_command(words: str) -> str | None:
    """Return why a command of Docker's is not here, None for what Docker does not have."""
    return _COMMANDS.get(words) or _COMMANDS.get(words.partition(" ")[0])


def refused_option(words: str, name: str) -> str | None:
    """Return why an option of Docker's is not here, None for what Docker does not have."""
    short = _SAME.get(words, words.removeprefix("image "))
    return (_OPTIONS.get(words) or _OPTIONS.get(short) or {}).get(name)
