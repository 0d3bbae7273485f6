"""The operations of a launch plan: what the native launcher executes, as data.

A plan is flat and complete: the launcher decides nothing. Each operation names its
system call; `hutch.plan.wire` turns a plan into the bytes that `native/` reads, and
a failure is reported as (section, index of the operation, errno, detail).

Descriptors travel by *slot*: slot n of a plan is the n-th descriptor handed to the
launcher, or one that an earlier operation of the plan opened (`slot=`). Paths on the
host are absolute; paths "in the root" are resolved beneath the new root directory with
openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS), so a symbolic link in an image cannot
lead out of it.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "Attach",
    "Capabilities",
    "CgroupJoin",
    "Chdir",
    "CloseRange",
    "Exec",
    "Fork",
    "Hostname",
    "IdMap",
    "Idmap",
    "Inherit",
    "LinkUp",
    "Mask",
    "Mkdir",
    "Mknod",
    "MoveMount",
    "Mount",
    "Netlink",
    "NoNewPrivs",
    "Op",
    "OpenTree",
    "Overlay",
    "PivotRoot",
    "Plan",
    "Propagation",
    "ReadOnly",
    "Remount",
    "Rest",
    "Restore",
    "Rlimit",
    "RootDir",
    "Scheduler",
    "Seccomp",
    "Setns",
    "SetsidTty",
    "Supervision",
    "Symlink",
    "Sync",
    "Sysctl",
    "Umask",
    "Unshare",
    "User",
    "WriteFile",
]


class Op(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all operations."""


# ---- identity, namespaces, cgroups ----------------------------------------------------


class CgroupJoin(Op, frozen=True, kw_only=True):
    """Write `0` to each file (cgroup v1 `tasks`, v2 `cgroup.procs`): join those groups."""

    files: tuple[str, ...]


class Unshare(Op, frozen=True, kw_only=True):
    """unshare(2) with CLONE_NEW* flags; CLONE_NEWCGROUP belongs after `CgroupJoin`."""

    flags: int


class Setns(Op, frozen=True, kw_only=True):
    """setns(2) on a namespace descriptor (nstype one CLONE_NEW* or 0) or, with several
    flags, on a pidfd.

    With CLONE_NEWPID in section `prepare` the child is born in that PID namespace, and
    needs no `Fork`."""

    slot: int
    nstype: int


class Fork(Op, frozen=True, kw_only=True):
    """Continue in a new child with CLONE_PARENT, so that a joined or unshared PID
    namespace takes effect; the old process leaves, the supervisor follows the new one."""


class Sync(Op, frozen=True, kw_only=True):
    """Tell the starter `SYNC number` and wait for its `GO number`.

    The starter does here what needs the process id: maps of user ids, network devices.
    """

    number: int


class Idmap(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an id map: `size` ids from `inside` are those from `outside`."""

    inside: int
    outside: int
    size: int


class IdMap(Op, frozen=True, kw_only=True):
    """Section `prepare`: map the child's user namespace right after clone, from the
    supervisor, before the child runs its first operation (needs the privilege to do so).
    setgroups is left allowed. The child becomes uid 0, gid 0 inside after its leading
    `CgroupJoin` operations: the files of a cgroup belong to the root outside."""

    uids: tuple[Idmap, ...]
    gids: tuple[Idmap, ...]


# ---- mounts ---------------------------------------------------------------------------


class Propagation(Op, frozen=True, kw_only=True):
    """mount(2) on host path `path` with flags such as MS_REC | MS_PRIVATE or MS_SLAVE."""

    path: str
    flags: int


class Overlay(Op, frozen=True, kw_only=True):
    """Make an overlay with fsopen, fsmount; keep the detached mount in `slot`.

    `lower` is highest layer first. An entry is a host path, or `@n` for the mount held
    in slot n (an idmapped layer, from `OpenTree`). Empty `upper` makes it read-only.
    `options` are further flag names or key=value (`volatile`, `userxattr`, `xino=off`).
    In `prepare` it is made by the supervisor, which keeps the superblock alive until it
    has reported the exit: unmounting syncs, and must not delay the report.
    """

    slot: int
    lower: tuple[str, ...]
    upper: str = ""
    work: str = ""
    options: tuple[str, ...] = ()
    attr: int = 0


class OpenTree(Op, frozen=True, kw_only=True):
    """open_tree(OPEN_TREE_CLONE) of a host path (or of an O_PATH descriptor in `source`)
    into `slot`, then mount_setattr: `attr` sets MOUNT_ATTR_* (on all submounts if
    `recursive`), `userns` >= 0 idmaps it by the user namespace held in that slot,
    `propagation` is MS_PRIVATE, MS_SLAVE, MS_SHARED or 0 to leave it."""

    slot: int
    path: str = ""
    source: int = -1
    recursive: bool = True
    attr: int = 0
    userns: int = -1
    propagation: int = 0


class MoveMount(Op, frozen=True, kw_only=True):
    """move_mount the mount in `slot` onto `target` in the root ("" = becomes the root).

    `create` is "", "dir" or "file": what to make (mode 0755 / 0644, with parents) when
    the target does not exist.
    """

    slot: int
    target: str
    create: str = ""


class RootDir(Op, frozen=True, kw_only=True):
    """Take a host directory as the new root (bind mounted onto itself)."""

    path: str
    recursive: bool = True


class Mount(Op, frozen=True, kw_only=True):
    """Make a file system (proc, sysfs, tmpfs, devpts, mqueue, cgroup, cgroup2) with the
    new mount API and put it on `target` in the root, made as a directory if missing.

    `options` are `key=value` or flag names for fsconfig; `attr` is MOUNT_ATTR_*.
    `copy_up`: first copy what the root has at `target` into the new file system.
    """

    fstype: str
    target: str
    source: str = ""
    options: tuple[str, ...] = ()
    attr: int = 0
    copy_up: bool = False


class Remount(Op, frozen=True, kw_only=True):
    """mount_setattr on the mount at `target` in the root ("" = the root itself)."""

    target: str
    attr_set: int = 0
    attr_clear: int = 0
    recursive: bool = False
    propagation: int = 0


class Mkdir(Op, frozen=True, kw_only=True):
    """Make a directory in the root, with parents; existing is fine."""

    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


class Mknod(Op, frozen=True, kw_only=True):
    """Make a device node in the root with this exact mode (umask does not count);
    `mode` carries S_IFCHR, S_IFBLK or S_IFIFO. Where the kernel refuses it (a user
    namespace), bind `fallback`, a host path, onto an empty file instead."""

    path: str
    mode: int
    major: int = 0
    minor: int = 0
    uid: int = 0
    gid: int = 0
    fallback: str = ""


class Symlink(Op, frozen=True, kw_only=True):
    """Make a symbolic link in the root; an existing one is left alone."""

    target: str
    path: str


class WriteFile(Op, frozen=True, kw_only=True):
    """Write a file in the root (created with `mode`, truncated), or, with `append`,
    add to it."""

    path: str
    content: bytes
    mode: int = 0o644
    append: bool = False


class Mask(Op, frozen=True, kw_only=True):
    """Hide a path: a directory under an empty read-only tmpfs, anything else under
    /dev/null. A path that is missing is skipped."""

    paths: tuple[str, ...]


class ReadOnly(Op, frozen=True, kw_only=True):
    """Clone each path's mount onto itself, read-only. Missing paths are skipped."""

    paths: tuple[str, ...]


class PivotRoot(Op, frozen=True, kw_only=True):
    """fchdir(root), pivot_root(".", "."), detach the old root, chdir("/")."""


# ---- kernel state inside --------------------------------------------------------------


class Hostname(Op, frozen=True, kw_only=True):
    """sethostname(2), and setdomainname(2) when `domain` is not empty."""

    name: str
    domain: str = ""


class Sysctl(Op, frozen=True, kw_only=True):
    """Write /proc/sys/KEY (dots already turned into slashes). After `PivotRoot` or
    before, through the new root's proc; before /proc/sys becomes read-only."""

    key: str
    value: str


class LinkUp(Op, frozen=True, kw_only=True):
    """Set a network interface of this network namespace up (lo)."""

    name: str = "lo"


class Netlink(Op, frozen=True, kw_only=True):
    """Send ready-made NETLINK_ROUTE messages (each with NLM_F_ACK) and check each
    answer. An errno listed in `ignore` (EEXIST, say) is not a failure."""

    messages: tuple[bytes, ...]
    ignore: tuple[int, ...] = ()


# ---- the process ----------------------------------------------------------------------


class SetsidTty(Op, frozen=True, kw_only=True):
    """setsid; with `tty`, make the pty's slave (from the container's own devpts, mounted
    on /dev/pts) the controlling terminal, stdio, and bind it on /dev/console if
    `console`. The supervisor receives the master."""

    tty: bool = False
    console: bool = False
    rows: int = 0
    columns: int = 0


class Rlimit(Op, frozen=True, kw_only=True):
    """prlimit(2) on itself: RLIMIT_* number, soft, hard (2**64-1 = unlimited).
    A hard limit above the present one without CAP_SYS_RESOURCE is clamped if `clamp`."""

    resource: int
    soft: int
    hard: int
    clamp: bool = False


class Scheduler(Op, frozen=True, kw_only=True):
    """Write oom_score_adj; a refusal (EACCES, EPERM) is ignored where `required` is false."""

    oom_score_adj: int
    required: bool = True


class Capabilities(Op, frozen=True, kw_only=True):
    """Drop the bounding set to `bounding`; after `User`, the sets become these (64-bit
    masks). The launcher keeps them over setuid with PR_SET_KEEPCAPS; bits that the
    kernel does not know are ignored."""

    bounding: int
    permitted: int
    effective: int
    inheritable: int
    ambient: int


class User(Op, frozen=True, kw_only=True):
    """setgroups, setresgid, setresuid. The launcher raises the sets of `Capabilities`
    afterwards, whichever of the two comes first in the plan."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    skip_setgroups: bool = False


class Umask(Op, frozen=True, kw_only=True):
    """umask(2)."""

    mask: int = 0o022


class NoNewPrivs(Op, frozen=True, kw_only=True):
    """prctl(PR_SET_NO_NEW_PRIVS)."""


class Seccomp(Op, frozen=True, kw_only=True):
    """Load a BPF program (array of struct sock_filter) with seccomp(2); the last step
    before exec. `flags` are SECCOMP_FILTER_FLAG_*."""

    program: bytes
    flags: int = 0


class Chdir(Op, frozen=True, kw_only=True):
    """chdir inside the root, made (0755, owner uid:gid) if missing and `create`."""

    path: str
    create: bool = False
    uid: int = 0
    gid: int = 0


class CloseRange(Op, frozen=True, kw_only=True):
    """close_range(first, ~0, CLOSE_RANGE_CLOEXEC)."""

    first: int = 3


class Exec(Op, frozen=True, kw_only=True):
    """execve argv[0], looked up along PATH of `env` inside the root when it has no
    slash. With `init`, a reaping init becomes PID 1 and runs the program as its child
    (forwarding signals), copied by descriptor, so nothing appears in the root.
    `apparmor` names a profile to change to on exec. ENOENT and EACCES of the program
    itself are told from those of the launch by their section ("exec")."""

    argv: tuple[str, ...]
    env: tuple[str, ...]
    init: bool = False
    apparmor: str = ""


class Inherit(Op, frozen=True, kw_only=True):
    """Right before exec, the k-th of these slots becomes descriptor 3 + k of the program,
    and everything above closes. Once in a plan; with it `CloseRange` changes nothing."""

    slots: tuple[int, ...]


class Rest(Op, frozen=True, kw_only=True):
    """Tell the starter `SYNC number` and wait for a `GO number` that brings the rest of the
    section (`hutch.plan.wire.encode_rest`), at most 64 KiB without a `Fork`.

    In the place of `Exec`: the launch waits here, and the program is not known yet. A machine
    whose state is saved meanwhile has it in the state, and each copy goes on by itself."""

    number: int


class Attach(Op, frozen=True, kw_only=True):
    """move_mount the mount in `slot` onto an existing path of the host, which only this
    process's mount namespace sees."""

    slot: int
    path: str


class Restore(Op, frozen=True, kw_only=True):
    """In the place of `Exec`: run CRIU's worker to its end, beside this process, so that the
    tree it brings back is the supervisor's child; its first process becomes the program.

    `argv` ends in `swrk 3`; `request` is a criu_req of CRIU's protocol (images/rpc.proto), in
    which descriptors 10, 11 and 12 are the streams that a program would have, 13 this network
    namespace, and 200 the directory `work`. A terminal's master goes to the supervisor.
    With `hold` >= 0 it is a `Sync` of that number before what was restored runs."""

    argv: tuple[str, ...]
    env: tuple[str, ...]
    work: str
    request: bytes
    hold: int = -1


AnyOp = (
    CgroupJoin
    | Unshare
    | Setns
    | Fork
    | Sync
    | IdMap
    | Propagation
    | Overlay
    | OpenTree
    | MoveMount
    | RootDir
    | Mount
    | Remount
    | Mkdir
    | Mknod
    | Symlink
    | WriteFile
    | Mask
    | ReadOnly
    | PivotRoot
    | Hostname
    | Sysctl
    | LinkUp
    | Netlink
    | SetsidTty
    | Rlimit
    | Scheduler
    | Capabilities
    | User
    | Umask
    | NoNewPrivs
    | Seccomp
    | Chdir
    | CloseRange
    | Exec
    | Inherit
    | Rest
    | Attach
    | Restore
)


class HealthProbe(msgspec.Struct, frozen=True, kw_only=True):
    """The supervisor's own health check: an exec plan's bytes run on a timer. Its slot 0
    is the instance's pidfd; it must not linger.

    Times in seconds; during `start_period_s`, until it is healthy, a probe comes each
    `start_interval_s` (0: as otherwise). Results go to `<dir>/health` (one JSON object,
    replaced whole) and to attached clients as HEALTH frames: starting, healthy, unhealthy; the
    last five probes with exit code, start, end and the first 4096 bytes of output, as Docker
    keeps.
    """

    plan: bytes
    interval_s: float
    timeout_s: float
    retries: int
    start_period_s: float
    start_interval_s: float = 0.0


class Supervision(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor holds beside the process.

    `directory`: the instance's run directory; in it the supervisor keeps `ctl.sock`
    (0600), `exit`, `pid`, `health`. Empty for an exec that dies with its starter's
    connection... see `linger`.
    """

    directory: str = ""
    log_path: str = ""
    log_max_bytes: int = 0
    log_max_files: int = 1
    stdin_open: bool = False
    stdin_once: bool = False
    tty: bool = False
    linger: bool = True
    exit_command: tuple[str, ...] = ()
    exit_command_always: bool = False
    health: HealthProbe | None = None
    name: str = "hutch-supervisor"
    oom_score_adj: int | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One launch: `prepare` runs in the supervisor, `child` in the new process.

    `clone_flags` are CLONE_NEW* for clone3; `cgroup_slot` >= 0 adds CLONE_INTO_CGROUP
    with the cgroup v2 directory in that slot; `slots` is how many descriptors the
    starter hands over.
    """

    prepare: tuple[AnyOp, ...] = ()
    clone_flags: int = 0
    cgroup_slot: int = -1
    child: tuple[AnyOp, ...]
    slots: int = 0
    supervision: Supervision = Supervision()
