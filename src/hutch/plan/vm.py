"""Compile the launch plans of a virtual machine: QEMU's sandbox on the host, the program inside.

On the host the supervised process is `hutch-vmm`, which starts QEMU: in namespaces of its own,
in a root directory with nothing but the host's programs and libraries, read-only, as a user
of its own without capabilities. All it works with comes as open descriptors. In the guest,
the program of the specification runs by the plan of a container.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hutch.plan import flags, ops
from hutch.plan.assets import BindAsset, ContainerAssets, ExecAssets, ResolvedUser, RootAsset
from hutch.plan.container import (
    MASKED_PATHS,
    READONLY_PATHS,
    SYNC_IDMAP,
    SYNC_NETWORK,
    compile_container,
)
from hutch.spec.model import (
    BindMount,
    InstanceSpec,
    ProcessSpec,
    Resources,
    Ulimit,
    VolumeMount,
)

__all__ = [
    "GUEST_CGROUP",
    "GUEST_FILES",
    "GUEST_ROOT",
    "GUEST_SHARES",
    "GUEST_VOLUMES",
    "GuestAssets",
    "GuestBind",
    "GuestParts",
    "PASSED",
    "PLAIN",
    "PROTECTED",
    "PassedGroup",
    "SYNC_REST",
    "SandboxAssets",
    "compile_guest",
    "compile_guest_exec",
    "compile_sandbox",
    "split_guest",
]

GUEST_FILES = "/run/hutch"
GUEST_ROOT = "/hutch/root"
GUEST_SHARES = "/hutch/shares"
GUEST_VOLUMES = "/hutch/volumes"
GUEST_CGROUP = "instance"
_NOBODY = "hutch"  # the host name of a launch that waits
SYNC_REST = 2
"""Where the launch of a template waits for what is particular to an instance."""
_GUEST_JOIN = (f"/sys/fs/cgroup/{GUEST_CGROUP}/cgroup.procs",)
_GUEST_NAMESPACES = (
    flags.CLONE_NEWNS
    | flags.CLONE_NEWPID
    | flags.CLONE_NEWIPC
    | flags.CLONE_NEWUTS
    | flags.CLONE_NEWCGROUP
)
PROTECTED = flags.MOUNT_ATTR_RDONLY | flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NODEV
PLAIN = flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NODEV | flags.MOUNT_ATTR_NOEXEC
_NODES = (("null", 1, 3), ("zero", 1, 5), ("random", 1, 8), ("urandom", 1, 9))
VMM = "/hutch-vmm"
PASSED = "/dev/passed"
"""Where QEMU looks for devices of the host, one directory for each address."""
_VFIO = (10, 196)
_CAP_IPC_LOCK = 14


class PassedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """An IOMMU group whose node QEMU opens: its number, that of the node (major, minor), and
    the addresses of its devices that QEMU looks for."""

    group: int
    numbers: tuple[int, int]
    addresses: tuple[str, ...]


class GuestParts(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's plan in two: `first` waits at its end for `rest`, what an instance adds to
    it. `hostname` is what the agent has to call the program's name space, "" for nothing."""

    first: ops.Plan
    rest: tuple[ops.AnyOp, ...]
    hostname: str = ""


class SandboxAssets(msgspec.Struct, frozen=True, kw_only=True):
    """What the host's side of a machine needs.

    `skeleton` is a directory holding the mount points and symbolic links of the sandbox's
    root; `binds` are (host path, path inside) shown read-only; `shared` the same, writable.
    `userfaultfd` is the minor number of that device, where QEMU is to have it; `groups` are the
    IOMMU groups, of which it sees nothing but the nodes and the devices' addresses.
    `namespace` is the slot of a network namespace (-1: a new, empty one); `inherit` are the
    slots that become descriptors 3, 4, … of `hutch-vmm`.

    `argv` is another of the host's programs to run in the same confinement, in the place of
    `hutch-vmm`. `namespaces` says who makes the namespaces: `own` with the privileges at hand,
    `user` in a user namespace whose root is the caller (who maps its ids at `SYNC_IDMAP`), and
    `none` leaves them out, for hosts that refuse them; `vmm` is then the program's own path,
    and `user` may be None, to stay who one is. `host_network` keeps to the host's network
    namespace, for QEMU's own user network.
    """

    supervision: ops.Supervision
    skeleton: str
    vmm: str
    argv: tuple[str, ...] = ()
    binds: tuple[tuple[str, str], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    user: ResolvedUser | None
    kvm: bool = False
    userfaultfd: int = -1
    groups: tuple[PassedGroup, ...] = ()
    lock_memory: bool = False
    cgroup_files: tuple[str, ...] = ()
    cgroup_slot: int = -1
    namespace: int = -1
    network: bool = False
    inherit: tuple[int, ...] = ()
    slots: int = 0
    seccomp: bytes = b""
    tty: bool = False
    rows: int = 0
    columns: int = 0
    namespaces: Literal["own", "user", "none"] = "own"
    host_network: bool = False


class GuestBind(msgspec.Struct, frozen=True, kw_only=True):
    """A shared directory or file: where the guest has it, and where the program does."""

    path: str
    target: str
    read_only: bool = False
    is_dir: bool = True


class GuestAssets(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan inside the guest needs; paths are the guest's.

    `files` are the names beneath `GUEST_FILES` with their targets.
    """

    user: ResolvedUser
    env: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()
    binds: tuple[GuestBind, ...] = ()
    ulimits: tuple[Ulimit, ...] = ()
    seccomp: bytes = b""
    capabilities: int = 0
    rows: int = 0
    columns: int = 0


def compile_sandbox(assets: SandboxAssets) -> ops.Plan:
    """Return the plan that starts `hutch-vmm`, and with it QEMU."""
    if assets.namespaces == "none":
        return ops.Plan(
            cgroup_slot=assets.cgroup_slot,
            child=(*_joins(assets), *_credentials(assets), _exec(assets.argv or (assets.vmm,))),
            slots=assets.slots,
            supervision=assets.supervision,
        )
    clone_flags = flags.CLONE_NEWNS | flags.CLONE_NEWPID | flags.CLONE_NEWIPC | flags.CLONE_NEWUTS
    if assets.namespace < 0 and not assets.host_network:
        clone_flags |= flags.CLONE_NEWNET
    if assets.namespaces == "user":
        clone_flags |= flags.CLONE_NEWUSER
    prepare, child = _sandbox_root(assets)
    return ops.Plan(
        prepare=prepare,
        clone_flags=clone_flags,
        cgroup_slot=assets.cgroup_slot,
        child=(*_joins(assets), *child, *_credentials(assets), _exec(assets.argv or (VMM,))),
        slots=assets.slots,
        supervision=assets.supervision,
    )


def _joins(assets: SandboxAssets) -> tuple[ops.AnyOp, ...]:
    joined: list[ops.AnyOp] = []
    if assets.namespaces == "user":
        joined.append(ops.Sync(number=SYNC_IDMAP))
    if assets.cgroup_files:
        joined.append(ops.CgroupJoin(files=assets.cgroup_files))
    if assets.namespace >= 0:
        joined.append(ops.Setns(slot=assets.namespace, nstype=flags.CLONE_NEWNET))
    if assets.network:
        joined.append(ops.Sync(number=SYNC_NETWORK))
    return tuple(joined)


def _sandbox_root(
    assets: SandboxAssets,
) -> tuple[tuple[ops.AnyOp, ...], tuple[ops.AnyOp, ...]]:
    """Return what opens the host's directories before the clone, and what builds the root."""
    prepare: list[ops.AnyOp] = []
    child: list[ops.AnyOp] = [
        ops.Propagation(path="/", flags=flags.MS_REC | flags.MS_PRIVATE),
        ops.RootDir(path=assets.skeleton),
    ]
    shown = [(*bind, PROTECTED, "dir") for bind in assets.binds]
    if not assets.argv:
        shown.append((assets.vmm, VMM, PROTECTED, ""))
    shown += [(*bind, PLAIN, "") for bind in assets.shared]
    for number, (source, target, attr, create) in enumerate(shown):
        slot = assets.slots + number
        tree = ops.OpenTree(slot=slot, path=source, attr=attr, propagation=flags.MS_PRIVATE)
        # An ordinary user has the right only in the new mount namespace.
        (child if assets.namespaces == "user" else prepare).append(tree)
        child.append(ops.MoveMount(slot=slot, target=target, create=create))
    child.append(ops.Mount(fstype="proc", target="/proc", source="proc", attr=PLAIN))
    child += _devices(assets)
    child += [
        ops.ReadOnly(paths=READONLY_PATHS),
        ops.Mask(paths=MASKED_PATHS),
        ops.Remount(target="/dev", attr_set=flags.MOUNT_ATTR_RDONLY),
        ops.Remount(target="", attr_set=flags.MOUNT_ATTR_RDONLY),
        ops.PivotRoot(),
        ops.Hostname(name="hutch-vmm"),
    ]
    return tuple(prepare), tuple(child)


def _devices(assets: SandboxAssets) -> list[ops.AnyOp]:
    made: list[ops.AnyOp] = [
        ops.Mount(
            fstype="tmpfs",
            target="/dev",
            source="tmpfs",
            options=("mode=0755", "size=64k"),
            attr=flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NOEXEC,
        )
    ]
    for name, major, minor in _NODES:
        made.append(_node(name, major, minor))
    if assets.kvm:
        made.append(_node("kvm", 10, 232))
    if assets.userfaultfd >= 0:
        made.append(_node("userfaultfd", 10, assets.userfaultfd))
    made += _passed(assets.groups)
    if assets.tty:
        made.append(
            ops.Mount(
                fstype="devpts",
                target="/dev/pts",
                source="devpts",
                options=("newinstance", "ptmxmode=0666", "mode=0620"),
                attr=flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NOEXEC,
            )
        )
    return made


def _passed(groups: tuple[PassedGroup, ...]) -> list[ops.AnyOp]:
    """Return the nodes of IOMMU groups, and in the place of sysfs the links that say which
    device is in which."""
    made: list[ops.AnyOp] = [_node("vfio/vfio", *_VFIO)] if groups else []
    for group in groups:
        made.append(_node(f"vfio/{group.group}", *group.numbers))
        made += (
            ops.Symlink(target=f"groups/{group.group}", path=f"{PASSED}/{address}/iommu_group")
            for address in group.addresses
        )
    return made


def _node(name: str, major: int, minor: int) -> ops.Mknod:
    return ops.Mknod(
        path=f"/dev/{name}",
        mode=flags.S_IFCHR | 0o666,
        major=major,
        minor=minor,
        fallback=f"/dev/{name}",
    )


def _credentials(assets: SandboxAssets) -> list[ops.AnyOp]:
    terminal = ops.SetsidTty(tty=assets.tty, rows=assets.rows, columns=assets.columns)
    tail: list[ops.AnyOp] = [terminal, ops.Umask(mask=0o077)]
    user = assets.user
    if user is not None:
        one_id = assets.namespaces == "user"
        # Its control group bounds what it can lock.
        kept = 1 << _CAP_IPC_LOCK if assets.lock_memory else 0
        tail += [
            *([] if assets.namespaces == "none" else [ops.Chdir(path="/")]),
            ops.Capabilities(
                bounding=kept, permitted=kept, effective=kept, inheritable=kept, ambient=kept
            ),
            ops.User(uid=user.uid, gid=user.gid, groups=user.groups, skip_setgroups=one_id),
        ]
    tail.append(ops.NoNewPrivs())
    if assets.seccomp:
        tail.append(ops.Seccomp(program=assets.seccomp))
    tail.append(ops.Inherit(slots=assets.inherit))
    return tail


def _exec(argv: tuple[str, ...]) -> ops.Exec:
    return ops.Exec(argv=argv, env=())


# ---- in the guest -----------------------------------------------------------------------


def compile_guest(spec: InstanceSpec, assets: GuestAssets) -> ops.Plan:
    """Return the plan by which the guest's agent starts the program of the specification."""
    files = tuple(
        BindAsset(target=target, path=f"{GUEST_FILES}/{name}", is_dir=False)
        for name, target in assets.files
    )
    shared = tuple(
        BindAsset(
            target=bind.target,
            path=bind.path,
            is_dir=bind.is_dir,
            attr=flags.MOUNT_ATTR_RDONLY if bind.read_only else 0,
        )
        for bind in assets.binds
    )
    return compile_container(
        _guest_spec(spec),
        ContainerAssets(
            root=RootAsset(directory=GUEST_ROOT),
            user=assets.user,
            env=assets.env,
            supervision=_guest_supervision(spec.process, linger=False),
            cgroup_files=_GUEST_JOIN,
            cgroup_v2=True,
            binds=(*files, *shared),
            seccomp=assets.seccomp,
            capabilities=assets.capabilities,
            rows=assets.rows,
            columns=assets.columns,
        ),
    )


def _guest_spec(spec: InstanceSpec) -> InstanceSpec:
    """Return the specification as it holds in the guest: the machine's own network, limits
    by its size, and mounts that came with the assets."""
    return msgspec.structs.replace(
        spec,
        network_mode="host",
        networks=(),
        resources=Resources(pids=spec.resources.pids),
        mounts=tuple(m for m in spec.mounts if not isinstance(m, BindMount | VolumeMount)),
        health=None,
        userns="",
    )


def _guest_supervision(process: ProcessSpec, *, linger: bool) -> ops.Supervision:
    return ops.Supervision(
        stdin_open=process.stdin, tty=process.tty, linger=linger, name="hutch-supervisor"
    )


def split_guest(plan: ops.Plan, *, known_filter: bool = False) -> GuestParts:
    """Cut a guest's plan where its launch waits in a template.

    What comes before is the same for all instances of an image with the same mounts. With
    `known_filter` (system calls are filtered as by default, or not at all, so that what is
    left to be done is allowed) and without a terminal, whose size is an instance's, these are
    also the limits, the user, the capabilities and the filter: only the program is left, and
    the host name, which the agent sets then.
    """
    if not known_filter or any(isinstance(op, ops.SetsidTty) and op.tty for op in plan.child):
        at = 1 + next(n for n, op in enumerate(plan.child) if isinstance(op, ops.PivotRoot))
        return GuestParts(first=_waiting(plan, plan.child[:at]), rest=plan.child[at:])
    # In its place: operations are told by their number.
    child = tuple(
        msgspec.structs.replace(op, name=_NOBODY) if isinstance(op, ops.Hostname) else op
        for op in plan.child[:-1]
    )
    names = [op.name for op in plan.child if isinstance(op, ops.Hostname)]
    return GuestParts(
        first=_waiting(plan, child), rest=plan.child[-1:], hostname=names[0] if names else ""
    )


def _waiting(plan: ops.Plan, child: tuple[ops.AnyOp, ...]) -> ops.Plan:
    return msgspec.structs.replace(plan, child=(*child, ops.Rest(number=SYNC_REST)))


def compile_guest_exec(
    process: ProcessSpec, assets: GuestAssets, *, no_new_privileges: bool, linger: bool
) -> ops.Plan:
    """Return the plan of a further process; the agent puts the program's pidfd in slot 0."""
    from hutch.plan.container import compile_exec

    return compile_exec(
        process,
        ExecAssets(
            user=assets.user,
            env=assets.env,
            supervision=_guest_supervision(process, linger=linger),
            namespaces=_GUEST_NAMESPACES,
            pid_namespace=True,
            cgroup_files=_GUEST_JOIN,
            ulimits=assets.ulimits,
            seccomp=assets.seccomp,
            capabilities=assets.capabilities,
            rows=assets.rows,
            columns=assets.columns,
        ),
        no_new_privileges=no_new_privileges,
    )
