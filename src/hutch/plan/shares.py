"""Compile the launch plan of a virtiofsd: the server of the host's directories for one machine.

It runs as root, since a file's owner and mode are what the guest says, but with the rights on
files alone, in namespaces of its own, and in a root directory that holds the host's programs,
read-only, and beside them only what is shared.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hutch.plan import flags, ops
from hutch.plan.vm import PLAIN, PROTECTED

__all__ = ["SHARED", "ServerAssets", "SharedPath", "compile_server"]

SHARED = "/run/share"
_CHOWN, _DAC_OVERRIDE, _FOWNER, _FSETID = 0, 1, 3, 4
_SETGID, _SETUID, _SETPCAP, _SYS_CHROOT, _SETFCAP = 6, 7, 8, 18, 31
# The last two are for its own confinement, which leaves them behind.
_CAPABILITIES = sum(
    1 << bit
    for bit in (
        *(_CHOWN, _DAC_OVERRIDE, _FOWNER, _FSETID, _SETGID, _SETUID, _SETFCAP),
        *(_SETPCAP, _SYS_CHROOT),
    )
)
_RLIMIT_NOFILE = 7
# Every inode that the guest's kernel remembers is an open file of the server.
_OPEN_FILES = 1 << 20
_LOG_BYTES = 1 << 20
_SOCKET = 3
# What they say of the host's side: programs of the share run in the guest, not here.
_SHARED_ATTR = flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NODEV

Flavor = Literal["c", "rust"]


class SharedPath(msgspec.Struct, frozen=True, kw_only=True):
    """A directory or file of the host, by path or by an open descriptor's slot."""

    path: str = ""
    slot: int = -1
    is_dir: bool = True
    read_only: bool = False
    recursive: bool = True
    propagation: int = 0


class ServerAssets(msgspec.Struct, frozen=True, kw_only=True):
    """What the server needs. Slot 0 is its listening socket; `skeleton` and `binds` are as in
    `hutch.plan.vm.SandboxAssets`. The n-th of `paths` is seen as `/n` by the guest."""

    program: str
    flavor: Flavor
    skeleton: str
    log_path: str
    binds: tuple[tuple[str, str], ...] = ()
    paths: tuple[SharedPath, ...]
    cgroup_files: tuple[str, ...] = ()
    cgroup_slot: int = -1
    slots: int = 1


def compile_server(assets: ServerAssets) -> ops.Plan:
    """Return the plan that starts the server; it ends when its one client has gone."""
    prepare, child = _root(assets)
    return ops.Plan(
        prepare=prepare,
        clone_flags=flags.CLONE_NEWNS
        | flags.CLONE_NEWPID
        | flags.CLONE_NEWIPC
        | flags.CLONE_NEWUTS
        | flags.CLONE_NEWNET,
        cgroup_slot=assets.cgroup_slot,
        child=(
            *([ops.CgroupJoin(files=assets.cgroup_files)] if assets.cgroup_files else []),
            *child,
            ops.SetsidTty(),
            # The guest's kernel has applied the umask of whoever makes a file.
            ops.Umask(mask=0),
            ops.Chdir(path="/"),
            ops.Rlimit(resource=_RLIMIT_NOFILE, soft=_OPEN_FILES, hard=_OPEN_FILES, clamp=True),
            ops.Capabilities(
                bounding=_CAPABILITIES,
                permitted=_CAPABILITIES,
                effective=_CAPABILITIES,
                inheritable=0,
                ambient=0,
            ),
            ops.NoNewPrivs(),
            ops.Inherit(slots=(0,)),
            ops.Exec(argv=_command(assets), env=()),
        ),
        slots=assets.slots,
        supervision=ops.Supervision(
            log_path=assets.log_path, log_max_bytes=_LOG_BYTES, name="hutch-share"
        ),
    )


def _root(assets: ServerAssets) -> tuple[tuple[ops.AnyOp, ...], tuple[ops.AnyOp, ...]]:
    """Return what opens the host's directories before the clone, and what builds the root."""
    prepare: list[ops.AnyOp] = []
    child: list[ops.AnyOp] = [
        # Not private: what appears beneath a share that is to follow the host still comes in.
        ops.Propagation(path="/", flags=flags.MS_REC | flags.MS_SLAVE),
        ops.RootDir(path=assets.skeleton),
        ops.Mount(
            fstype="tmpfs",
            target="/run",
            source="tmpfs",
            options=("mode=0755", "size=1m"),
            attr=PLAIN,
        ),
        ops.Mkdir(path=SHARED),
    ]
    for number, (source, target) in enumerate(assets.binds, assets.slots):
        prepare.append(
            ops.OpenTree(slot=number, path=source, attr=PROTECTED, propagation=flags.MS_PRIVATE)
        )
        child.append(ops.MoveMount(slot=number, target=target, create="dir"))
    first = assets.slots + len(assets.binds)
    for index, shared in enumerate(assets.paths):
        prepare.append(
            ops.OpenTree(
                slot=first + index,
                path=shared.path if shared.slot < 0 else "",
                source=shared.slot,
                recursive=shared.recursive,
                attr=_SHARED_ATTR | (flags.MOUNT_ATTR_RDONLY if shared.read_only else 0),
                propagation=shared.propagation or flags.MS_PRIVATE,
            )
        )
        child.append(
            ops.MoveMount(
                slot=first + index,
                target=f"{SHARED}/{index}",
                create="dir" if shared.is_dir else "file",
            )
        )
    child += [
        ops.Mount(fstype="proc", target="/proc", source="proc", attr=PLAIN),
        ops.Remount(target="/run", attr_set=flags.MOUNT_ATTR_RDONLY),
        ops.Remount(target="", attr_set=flags.MOUNT_ATTR_RDONLY),
        ops.PivotRoot(),
        ops.Hostname(name="hutch-share"),
    ]
    return tuple(prepare), tuple(child)


def _command(assets: ServerAssets) -> tuple[str, ...]:
    """Return the command line of either virtiofsd.

    No device nodes are made, or the guest could give an account of the host a way to its
    devices. `announce_submounts` keeps the shares apart: inode numbers may be the same in two.
    Locks are left to the guest's kernel: neither server can wait for one.
    """
    if assets.flavor == "c":
        return (
            *(assets.program, f"--fd={_SOCKET}", "-f", "--rlimit-nofile=0"),
            *("-o", f"source={SHARED}", "-o", "sandbox=chroot", "-o", "modcaps=-mknod"),
            *("-o", "cache=auto", "-o", "xattr", "-o", "announce_submounts"),
            *("-o", "log_level=warn"),
        )
    return (
        *(assets.program, f"--fd={_SOCKET}", f"--shared-dir={SHARED}", "--rlimit-nofile=0"),
        *("--sandbox=chroot", "--modcaps=-mknod", "--cache=auto", "--xattr"),
        *("--announce-submounts", "--log-level=warn"),
    )
