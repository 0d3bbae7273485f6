"""What a driver has prepared for one launch: paths, descriptors' slots, resolved names."""

from __future__ import annotations

import msgspec

from hutch.plan.ops import Idmap, Supervision
from hutch.spec.model import Ulimit

__all__ = [
    "BindAsset",
    "ContainerAssets",
    "ExecAssets",
    "NamespaceAsset",
    "ResolvedDevice",
    "ResolvedUser",
    "RootAsset",
]


class ResolvedUser(msgspec.Struct, frozen=True, kw_only=True):
    """A user of the image as numbers; `home` comes from its password file."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


class ResolvedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device node to make inside: `mode` carries the type bits (S_IFCHR, S_IFBLK)."""

    source: str
    target: str
    mode: int
    major: int
    minor: int
    uid: int = 0
    gid: int = 0


class BindAsset(msgspec.Struct, frozen=True, kw_only=True):
    """A mount whose source exists: a host path, or an open descriptor's slot.

    With `namespace` >= 0 the path is one in the mount namespace held in that slot, and
    `home` holds the launcher's own, to return to.
    """

    target: str
    path: str = ""
    slot: int = -1
    is_dir: bool = True
    recursive: bool = True
    attr: int = 0
    propagation: int = 0
    idmapped: bool = False
    namespace: int = -1
    home: int = -1


class NamespaceAsset(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace of another process to join, held in a slot; `kind` is its CLONE_NEW*."""

    slot: int
    kind: int


class RootAsset(msgspec.Struct, frozen=True, kw_only=True):
    """The root file system: overlay layers (highest first) or, with `directory`, a tree."""

    lower: tuple[str, ...] = ()
    upper: str = ""
    work: str = ""
    volatile: bool = False
    directory: str = ""


class ContainerAssets(msgspec.Struct, frozen=True, kw_only=True):
    """All that `compile_container` needs besides the specification.

    `slots` counts the descriptors handed over; `userns_slot` holds a user namespace for
    idmapped mounts (-1: none). `uids` and `gids` are not empty for a user namespace.
    `cgroup_v1` are (hierarchy, directory of the container's group) to be shown inside.
    `network`: the starter attaches and configures devices at sync point 1.
    """

    root: RootAsset
    user: ResolvedUser
    env: tuple[str, ...]
    supervision: Supervision
    cgroup_files: tuple[str, ...] = ()
    cgroup_slot: int = -1
    cgroup_v1: tuple[tuple[str, str], ...] = ()
    cgroup_v2: bool = False
    binds: tuple[BindAsset, ...] = ()
    devices: tuple[ResolvedDevice, ...] = ()
    namespaces: tuple[NamespaceAsset, ...] = ()
    network: bool = False
    seccomp: bytes = b""
    capabilities: int = 0
    apparmor: str = ""
    slots: int = 0
    userns_slot: int = -1
    uids: tuple[Idmap, ...] = ()
    gids: tuple[Idmap, ...] = ()
    map_at_sync: bool = False
    rootless: bool = False
    overlay_in_child: bool = False
    rows: int = 0
    columns: int = 0


class ExecAssets(msgspec.Struct, frozen=True, kw_only=True):
    """What a process inside a running container needs; slot 0 holds its pidfd.

    A `probe` is started again and again by a supervisor that has other children.
    """

    user: ResolvedUser
    env: tuple[str, ...]
    supervision: Supervision
    namespaces: int
    pid_namespace: bool
    probe: bool = False
    cgroup_files: tuple[str, ...] = ()
    cgroup_slot: int = -1
    ulimits: tuple[Ulimit, ...] = ()
    seccomp: bytes = b""
    capabilities: int = 0
    apparmor: str = ""
    slots: int = 1
    rows: int = 0
    columns: int = 0
    skip_setgroups: bool = False
