"""Gather what a container's plan needs from this host: users, descriptors, filters, maps."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.drivers.base import Launch, LaunchMount
from hutch.drivers.confinement import Confinement, apparmor, environment
from hutch.drivers.limits import resolve_devices
from hutch.drivers.supervision import instance_supervision
from hutch.drivers.users import LayeredReader, resolve_user
from hutch.errors import NotFound
from hutch.linux.cgroup import Group, Hierarchy
from hutch.plan import flags
from hutch.plan.assets import (
    BindAsset,
    ContainerAssets,
    NamespaceAsset,
    ResolvedUser,
    RootAsset,
)
from hutch.plan.ops import Idmap
from hutch.process.launcher import Launcher
from hutch.spec.model import InstanceSpec

if TYPE_CHECKING:
    from hutch.drivers.container.idmaps import UserMaps

__all__ = ["AssetBuilder", "Prepared"]

_JOINED = {
    "pid": flags.CLONE_NEWPID,
    "ipc": flags.CLONE_NEWIPC,
    "net": flags.CLONE_NEWNET,
    "uts": flags.CLONE_NEWUTS,
}
_PROPAGATION = {
    "private": flags.MS_PRIVATE,
    "slave": flags.MS_SLAVE,
    "shared": flags.MS_SHARED,
}
_MOST_USERS = 256


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A specification made concrete: its assets and the descriptors of their slots."""

    spec: InstanceSpec
    assets: ContainerAssets
    fds: tuple[int, ...]


class AssetBuilder:
    """Makes assets; holds what is the same for every launch of this process."""

    def __init__(self, root: Path, launcher: Launcher) -> None:
        self._launcher = launcher
        self.confinement = Confinement(root)
        self._users: dict[tuple[str, tuple[str, ...], tuple[str, ...]], ResolvedUser] = {}

    @cached_property
    def _user_maps(self) -> UserMaps:
        from hutch.drivers.container.idmaps import UserMaps

        return UserMaps()

    def prepare(
        self, launch: Launch, held: ExitStack, *, group: Group | None, hierarchy: Hierarchy
    ) -> Prepared:
        """Return what the compiler needs; `held` closes the descriptors after the launch."""
        spec = launch.spec
        fds: list[int] = []
        namespaces = self._join(launch, fds, held)
        cgroup_slot = -1
        cgroup_files: tuple[str, ...] = ()
        if group is not None:
            cgroup_files = group.join_files()
            directory = group.open_dir()
            if directory is not None:
                cgroup_slot = _add(fds, directory, held)
        uids, gids, userns_slot = self._id_maps(spec, fds, held)
        binds = tuple(
            self._bind(mount, fds, held, idmap=userns_slot >= 0) for mount in launch.mounts
        )
        user = self._user(launch)
        if os.geteuid() != 0:
            from hutch.drivers.container import rootless

            rootless.check_user(user)
        privileged = spec.security.privileged
        capabilities = self.confinement.capabilities(spec, privileged=privileged)
        assets = ContainerAssets(
            root=RootAsset(
                lower=launch.lower,
                upper=launch.upper,
                work=launch.work,
                volatile=launch.volatile,
                directory=launch.rootfs,
            ),
            user=user,
            env=environment(spec.process, user, hostname=spec.hostname),
            supervision=instance_supervision(launch),
            cgroup_files=cgroup_files,
            cgroup_slot=cgroup_slot,
            cgroup_v1=_v1_mounts(group),
            cgroup_v2=hierarchy.version == "v2",
            binds=binds,
            devices=resolve_devices(spec),
            namespaces=namespaces,
            network=launch.attach_network is not None,
            seccomp=b"" if privileged else self.confinement.seccomp(spec, capabilities),
            capabilities=capabilities,
            apparmor=apparmor(spec, privileged=privileged),
            slots=len(fds),
            userns_slot=userns_slot,
            uids=uids,
            gids=gids,
            map_at_sync=os.geteuid() != 0,
            rootless=os.geteuid() != 0,
            overlay_in_child=os.geteuid() != 0,
            rows=launch.rows,
            columns=launch.columns,
        )
        return Prepared(spec=spec, assets=assets, fds=tuple(fds))

    def _user(self, launch: Launch) -> ResolvedUser:
        """Return who the process is: by the image alone, whose layers do not change, where
        the instance has no /etc of its own yet."""
        process = launch.spec.process
        if launch.rootfs or os.path.lexists(f"{launch.upper}/etc"):
            own = (launch.rootfs,) if launch.rootfs else (launch.upper, *launch.lower)
            return resolve_user(process.user, process.groups, LayeredReader(own))
        key = process.user, process.groups, launch.lower
        found = self._users.get(key)
        if found is None:
            found = resolve_user(process.user, process.groups, LayeredReader(launch.lower))
            if len(self._users) >= _MOST_USERS:
                self._users.clear()
            self._users[key] = found
        return found

    def _join(self, launch: Launch, fds: list[int], held: ExitStack) -> tuple[NamespaceAsset, ...]:
        joined = []
        for name, pid in launch.join.items():
            try:
                fd = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise NotFound(
                    f"{name}: the instance whose namespace is joined is not running",
                    hint="start it first",
                ) from None
            joined.append(NamespaceAsset(slot=_add(fds, fd, held), kind=_JOINED[name]))
        return tuple(joined)

    def _bind(
        self, mount: LaunchMount, fds: list[int], held: ExitStack, *, idmap: bool
    ) -> BindAsset:
        if mount.pid:
            return _foreign_bind(mount, fds, held)
        slot = -1
        if mount.fd >= 0:
            fds.append(mount.fd)
            slot = len(fds) - 1
        status = os.fstat(mount.fd) if mount.fd >= 0 else os.stat(mount.source)
        return BindAsset(
            target=mount.target,
            path=mount.source,
            slot=slot,
            is_dir=stat.S_ISDIR(status.st_mode),
            recursive=mount.recursive,
            attr=flags.MOUNT_ATTR_RDONLY if mount.read_only else 0,
            propagation=_PROPAGATION[mount.propagation.removeprefix("r")],
            idmapped=idmap and mount.owned,
        )

    def _id_maps(
        self, spec: InstanceSpec, fds: list[int], held: ExitStack
    ) -> tuple[tuple[Idmap, ...], tuple[Idmap, ...], int]:
        if os.geteuid() != 0:
            from hutch.drivers.container import rootless

            uids, gids = rootless.own_maps()
            return uids, gids, -1
        if spec.userns in ("", "host"):
            return (), (), -1
        mapped = self._user_maps.remapped()
        return mapped.uids, mapped.gids, _add(fds, os.dup(mapped.fd), held)

    def map_ids(self, launch: Launch, pid: int) -> None:
        """Map the ids of a child's user namespace where the launcher may not (rootless)."""
        from hutch.drivers.container import rootless

        rootless.write_maps(pid)


def _add(fds: list[int], fd: int, held: ExitStack) -> int:
    held.callback(os.close, fd)
    fds.append(fd)
    return len(fds) - 1


def _foreign_bind(mount: LaunchMount, fds: list[int], held: ExitStack) -> BindAsset:
    """Return a directory of another instance's mount namespace; a mount can be cloned only
    from within the namespace that it is in."""
    flags_ = os.O_RDONLY | os.O_CLOEXEC
    theirs = os.open(f"/proc/{mount.pid}/ns/mnt", flags_)
    namespace = _add(fds, theirs, held)
    home = _add(fds, os.open("/proc/self/ns/mnt", flags_), held)
    return BindAsset(
        target=mount.target,
        path=mount.source,
        namespace=namespace,
        home=home,
        propagation=flags.MS_PRIVATE,
    )


def _v1_mounts(group: Group | None) -> tuple[tuple[str, str], ...]:
    """Return the v1 hierarchies that the group is in, to be shown inside, each once.

    A hierarchy's mount point is the third directory below the root: controllers that are
    mounted together (`cpu,cpuacct`) share one.
    """
    if group is None:
        return ()
    found = {
        directory: directory.split("/")[4]
        for name, directory in group.directories.items()
        if name and directory.startswith("/sys/fs/cgroup/")
    }
    return tuple((hierarchy, directory) for directory, hierarchy in found.items())
