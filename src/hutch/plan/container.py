"""Compile a specification and prepared assets into the launch plan of a container."""

from __future__ import annotations

from collections.abc import Iterable

from hutch.plan import flags, ops
from hutch.plan.assets import BindAsset, ContainerAssets, ExecAssets
from hutch.plan.process import process_ops
from hutch.spec.model import InstanceSpec, ProcessSpec, TmpfsMount, Ulimit

__all__ = ["MASKED_PATHS", "READONLY_PATHS", "SYNC_IDMAP", "SYNC_NETWORK", "SYNC_RESTORED"]
__all__ += ["compile_container", "compile_exec"]

SYNC_IDMAP = 0
SYNC_NETWORK = 1
SYNC_RESTORED = 2

# What Docker hides and write-protects in proc and sysfs.
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_PLAIN = flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NODEV | flags.MOUNT_ATTR_NOEXEC
_RO = flags.MOUNT_ATTR_RDONLY
_NODES = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
)
_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
    ("pts/ptmx", "/dev/ptmx"),
)
_TMPFS_ATTR = {
    "ro": flags.MOUNT_ATTR_RDONLY,
    "nosuid": flags.MOUNT_ATTR_NOSUID,
    "nodev": flags.MOUNT_ATTR_NODEV,
    "noexec": flags.MOUNT_ATTR_NOEXEC,
    "noatime": flags.MOUNT_ATTR_NOATIME,
    "strictatime": flags.MOUNT_ATTR_STRICTATIME,
    "nodiratime": flags.MOUNT_ATTR_NODIRATIME,
}
_TMPFS_CLEAR = {"rw", "suid", "dev", "exec", "atime", "relatime", "async", "defaults"}


def compile_container(spec: InstanceSpec, assets: ContainerAssets) -> ops.Plan:
    """Return the plan that starts the container described by `spec` from `assets`."""
    compiler = _Compiler(spec, assets)
    return compiler.compile()


def compile_exec(process: ProcessSpec, assets: ExecAssets, *, no_new_privileges: bool) -> ops.Plan:
    """Return the plan of a further process in a running container (its pidfd in slot 0).

    The supervisor joins the PID namespace, and the process is made in it. That takes power
    over the namespace, which an ordinary user has only in the user namespace that owns it:
    then the process joins both and goes on as a child of its own.
    """
    prepare: tuple[ops.AnyOp, ...] = ()
    child: list[ops.AnyOp] = []
    namespaces = assets.namespaces
    forks = assets.pid_namespace
    if forks and not namespaces & flags.CLONE_NEWUSER and not assets.probe:
        prepare = (ops.Setns(slot=0, nstype=flags.CLONE_NEWPID),)
        namespaces &= ~flags.CLONE_NEWPID
        forks = False
    if assets.cgroup_files:
        child.append(ops.CgroupJoin(files=assets.cgroup_files))
    if namespaces:
        child.append(ops.Setns(slot=0, nstype=namespaces))
    if forks:
        child.append(ops.Fork())
    child += _rlimits(assets.ulimits)
    child += process_ops(
        process,
        user=assets.user,
        env=assets.env,
        capabilities=assets.capabilities,
        seccomp=assets.seccomp,
        apparmor=assets.apparmor,
        no_new_privileges=no_new_privileges,
        skip_setgroups=assets.skip_setgroups,
        rows=assets.rows,
        columns=assets.columns,
    )
    return ops.Plan(
        prepare=prepare,
        child=tuple(child),
        cgroup_slot=assets.cgroup_slot,
        slots=assets.slots,
        supervision=assets.supervision,
    )


class _Compiler:
    """The state of one compilation: two growing sections and the next free slot."""

    def __init__(self, spec: InstanceSpec, assets: ContainerAssets) -> None:
        self._spec = spec
        self._assets = assets
        self._prepare: list[ops.AnyOp] = []
        self._child: list[ops.AnyOp] = []
        self._next_slot = assets.slots
        self._privileged = spec.security.privileged

    def compile(self) -> ops.Plan:
        clone_flags = self._namespaces()
        self._root()
        self._kernel_mounts()
        self._devices()
        self._mounts()
        self._network(clone_flags)
        self._sysctls()
        self._protect()
        self._child.append(ops.PivotRoot())
        self._hostname(clone_flags)
        self._process()
        return ops.Plan(
            prepare=tuple(self._prepare),
            clone_flags=clone_flags,
            cgroup_slot=self._assets.cgroup_slot,
            child=tuple(self._child),
            slots=self._assets.slots,
            supervision=self._assets.supervision,
        )

    def _slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1

    def _namespaces(self) -> int:
        """Return the clone flags; join the namespaces of others and the cgroups."""
        spec, assets = self._spec, self._assets
        joined = {namespace.kind for namespace in assets.namespaces}
        clone_flags = flags.CLONE_NEWNS
        for kind, mode in (
            (flags.CLONE_NEWPID, spec.pid_mode),
            (flags.CLONE_NEWIPC, spec.ipc_mode),
            (flags.CLONE_NEWUTS, spec.uts_mode),
            (flags.CLONE_NEWNET, spec.network_mode),
        ):
            if mode != "host" and kind not in joined:
                clone_flags |= kind
        if assets.uids:
            clone_flags |= flags.CLONE_NEWUSER
            if assets.map_at_sync:
                self._child.append(ops.Sync(number=SYNC_IDMAP))
            else:
                self._prepare.append(ops.IdMap(uids=assets.uids, gids=assets.gids))
        if assets.cgroup_files:
            self._child.append(ops.CgroupJoin(files=assets.cgroup_files))
        if spec.cgroup_mode == "private":
            self._child.append(ops.Unshare(flags=flags.CLONE_NEWCGROUP))
        for namespace in assets.namespaces:
            self._child.append(ops.Setns(slot=namespace.slot, nstype=namespace.kind))
        if flags.CLONE_NEWPID in joined:
            self._child.append(ops.Fork())
        return clone_flags

    def _root(self) -> None:
        root = self._assets.root
        slave = any(
            bind.propagation & (flags.MS_SLAVE | flags.MS_SHARED) for bind in self._assets.binds
        )
        self._child.append(
            ops.Propagation(
                path="/", flags=flags.MS_REC | (flags.MS_SLAVE if slave else flags.MS_PRIVATE)
            )
        )
        if root.directory:
            self._child.append(ops.RootDir(path=root.directory))
            return
        lower = root.lower
        userns = self._assets.userns_slot
        if userns >= 0:
            mapped = []
            for path in lower:
                slot = self._slot()
                self._prepare.append(
                    ops.OpenTree(slot=slot, path=path, recursive=False, userns=userns)
                )
                mapped.append(f"@{slot}")
            lower = tuple(mapped)
        options: tuple[str, ...] = ("userxattr",) if self._assets.rootless else ()
        if root.volatile:
            options += ("volatile",)
        slot = self._slot()
        overlay = ops.Overlay(
            slot=slot, lower=lower, upper=root.upper, work=root.work, options=options
        )
        (self._child if self._assets.overlay_in_child else self._prepare).append(overlay)
        self._child.append(ops.MoveMount(slot=slot, target=""))

    def _kernel_mounts(self) -> None:
        add = self._child.append
        spec = self._spec
        targets = {mount.target for mount in spec.mounts}
        add(ops.Mount(fstype="proc", target="/proc", source="proc", attr=_PLAIN))
        add(
            ops.Mount(
                fstype="tmpfs",
                target="/dev",
                source="tmpfs",
                options=("mode=0755", "size=64m"),
                attr=flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_STRICTATIME,
            )
        )
        pts = ["newinstance", "ptmxmode=0666", "mode=0620"]
        if not self._assets.rootless or any(
            m.inside <= 5 < m.inside + m.size for m in self._assets.gids
        ):
            pts.append("gid=5")
        add(
            ops.Mount(
                fstype="devpts",
                target="/dev/pts",
                source="devpts",
                options=tuple(pts),
                attr=flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NOEXEC,
            )
        )
        self._sysfs()
        if spec.ipc_mode != "host":
            add(ops.Mount(fstype="mqueue", target="/dev/mqueue", source="mqueue", attr=_PLAIN))
            if "/dev/shm" not in targets and not spec.ipc_mode.startswith("container:"):
                add(
                    ops.Mount(
                        fstype="tmpfs",
                        target="/dev/shm",
                        source="shm",
                        options=("mode=1777", f"size={spec.shm_size}"),
                        attr=_PLAIN,
                    )
                )

    def _sysfs(self) -> None:
        """Put sysfs and, where the cgroup namespace is private, the cgroup files."""
        assets, add = self._assets, self._child.append
        attr = _PLAIN if self._privileged else _PLAIN | _RO
        if assets.uids and self._spec.network_mode == "host":
            # sysfs belongs to the network namespace's owner: mounting it is refused there.
            slot = self._slot()
            (self._child if assets.rootless else self._prepare).append(
                ops.OpenTree(slot=slot, path="/sys", attr=_PLAIN | _RO)
            )
            add(ops.MoveMount(slot=slot, target="/sys", create="dir"))
            return
        # Submounts need a writable sysfs only for their mount points, which it has already.
        add(ops.Mount(fstype="sysfs", target="/sys", source="sysfs", attr=attr))
        if assets.cgroup_v2:
            add(ops.Mount(fstype="cgroup2", target="/sys/fs/cgroup", source="cgroup", attr=attr))
        elif assets.cgroup_v1:
            add(
                ops.Mount(
                    fstype="tmpfs",
                    target="/sys/fs/cgroup",
                    source="tmpfs",
                    options=("mode=0755",),
                    attr=_PLAIN,
                )
            )
            for hierarchy, directory in assets.cgroup_v1:
                slot = self._slot()
                self._prepare.append(
                    ops.OpenTree(slot=slot, path=directory, attr=attr, propagation=flags.MS_PRIVATE)
                )
                add(ops.MoveMount(slot=slot, target=f"/sys/fs/cgroup/{hierarchy}", create="dir"))
            if not self._privileged:
                add(ops.Remount(target="/sys/fs/cgroup", attr_set=_RO))

    def _devices(self) -> None:
        add = self._child.append
        # Only where the kernel refuses mknod (a user namespace) is the host's node bound.
        given = {device.target for device in self._assets.devices}
        for name, major, minor in _NODES:
            if f"/dev/{name}" in given:
                continue
            add(
                ops.Mknod(
                    path=f"/dev/{name}",
                    mode=flags.S_IFCHR | 0o666,
                    major=major,
                    minor=minor,
                    fallback=f"/dev/{name}",
                )
            )
        for target, path in _LINKS:
            add(ops.Symlink(target=target, path=path))
        for device in self._assets.devices:
            add(
                ops.Mknod(
                    path=device.target,
                    mode=device.mode,
                    major=device.major,
                    minor=device.minor,
                    uid=device.uid,
                    gid=device.gid,
                    fallback=device.source,
                )
            )

    def _mounts(self) -> None:
        """Put binds, volumes and tmpfs, shallow targets first so that none hides another."""
        wanted: list[BindAsset | TmpfsMount] = list(self._assets.binds)
        wanted += [mount for mount in self._spec.mounts if isinstance(mount, TmpfsMount)]
        for mount in sorted(wanted, key=_depth):
            if isinstance(mount, BindAsset):
                self._bind(mount)
            else:
                self._tmpfs(mount)

    def _bind(self, bind: BindAsset) -> None:
        slot = self._slot()
        # A bind source is opened by the supervisor, as the user who asked, before the clone.
        section = self._child if self._assets.rootless else self._prepare
        if bind.namespace >= 0:
            section.append(ops.Setns(slot=bind.namespace, nstype=flags.CLONE_NEWNS))
        section.append(
            ops.OpenTree(
                slot=slot,
                path=bind.path if bind.slot < 0 else "",
                source=bind.slot,
                recursive=bind.recursive,
                attr=bind.attr,
                userns=self._assets.userns_slot if bind.idmapped else -1,
                propagation=bind.propagation or flags.MS_PRIVATE,
            )
        )
        if bind.namespace >= 0:
            section.append(ops.Setns(slot=bind.home, nstype=flags.CLONE_NEWNS))
        self._child.append(
            ops.MoveMount(slot=slot, target=bind.target, create="dir" if bind.is_dir else "file")
        )

    def _tmpfs(self, mount: TmpfsMount) -> None:
        attr = flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NODEV | flags.MOUNT_ATTR_NOEXEC
        options = [f"mode={mount.mode:04o}"]
        if mount.size is not None:
            options.append(f"size={mount.size}")
        for option in mount.options:
            if option in _TMPFS_ATTR:
                attr |= _TMPFS_ATTR[option]
            elif option in _TMPFS_CLEAR:
                attr &= ~_TMPFS_ATTR.get(f"no{option}", 0)
            else:
                options.append(option)
        self._child.append(
            ops.Mount(
                fstype="tmpfs",
                target=mount.target,
                source="tmpfs",
                options=tuple(options),
                attr=attr,
                copy_up=mount.copy_up,
            )
        )

    def _network(self, clone_flags: int) -> None:
        if clone_flags & flags.CLONE_NEWNET:
            self._child.append(ops.LinkUp(name="lo"))
        if self._assets.network:
            self._child.append(ops.Sync(number=SYNC_NETWORK))

    def _hostname(self, clone_flags: int) -> None:
        spec = self._spec
        if clone_flags & flags.CLONE_NEWUTS and spec.hostname:
            self._child.append(ops.Hostname(name=spec.hostname, domain=spec.domainname))

    def _sysctls(self) -> None:
        spec = self._spec
        for key, value in spec.sysctls.items():
            self._child.append(ops.Sysctl(key=key.replace(".", "/"), value=value))

    def _protect(self) -> None:
        security = self._spec.security
        readonly, masked = security.readonly_paths, security.masked_paths
        if not self._privileged:
            readonly = READONLY_PATHS if readonly is None else readonly
            masked = MASKED_PATHS if masked is None else masked
        if readonly:
            self._child.append(ops.ReadOnly(paths=readonly))
        if masked:
            self._child.append(ops.Mask(paths=masked))
        if self._spec.read_only:
            self._child.append(ops.Remount(target="", attr_set=_RO))

    def _process(self) -> None:
        spec, assets = self._spec, self._assets
        if spec.oom_score_adj:
            self._child.append(
                ops.Scheduler(oom_score_adj=spec.oom_score_adj, required=not assets.rootless)
            )
        self._child += _rlimits(spec.ulimits)
        self._child += process_ops(
            spec.process,
            user=assets.user,
            env=assets.env,
            capabilities=assets.capabilities,
            seccomp=assets.seccomp,
            apparmor=assets.apparmor,
            no_new_privileges=spec.security.no_new_privileges and not self._privileged,
            init=spec.init,
            console=True,
            create_cwd=True,
            skip_setgroups=self._assets.rootless and len(self._assets.uids) == 1,
            rows=assets.rows,
            columns=assets.columns,
        )


def _depth(bind: BindAsset | TmpfsMount) -> tuple[int, str]:
    return (bind.target.rstrip("/").count("/"), bind.target)


def _rlimits(ulimits: Iterable[Ulimit]) -> list[ops.Rlimit]:
    return [
        ops.Rlimit(
            resource=flags.RLIMITS[limit.name], soft=_limit(limit.soft), hard=_limit(limit.hard)
        )
        for limit in ulimits
    ]


def _limit(value: int) -> int:
    return flags.RLIM_INFINITY if value < 0 else value
