"""The kinds of storage pools: the file system that each has in its file, and what of it this
host's kernel and programs can do."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from hutch.errors import Busy, IntegrityError, InvalidArgument, Unsupported
from hutch.storage.filemounts import device_of, mount_file, unmount_file, wait_detached
from hutch.storage.volume_records import PoolKind

__all__ = ["KINDS", "FileSystem", "PoolKind", "file_system", "grow_mounted", "make_and_mount"]
__all__ += ["mount_pool", "run_tool"]

KINDS: tuple[PoolKind, ...] = get_args(PoolKind)

_ENV = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_TIMEOUT_S = 600.0
_MIB = 1 << 20
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV, errno.EROFS, errno.ENOPROTOOPT)


class FileSystem(msgspec.Struct, frozen=True, kw_only=True):
    """How a file system is made and mounted. `limits` is how a volume's size is kept where the
    kernel can: by a project's quota or by a subvolume's."""

    name: str
    package: str
    least: int
    make: tuple[str, ...]
    make_limited: tuple[str, ...] = ()
    discard: str = "discard"
    limits: Literal["project", "subvolume"] = "project"


_EXT4 = ("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-L", "hutch")
_FILE_SYSTEMS = {
    "ext4": FileSystem(
        name="ext4",
        package="e2fsprogs",
        least=64 * _MIB,
        make=(*_EXT4, "-E", "nodiscard"),
        make_limited=(*_EXT4, "-O", "quota,project", "-E", "nodiscard,quotatype=prjquota"),
    ),
    "xfs": FileSystem(
        name="xfs",
        package="xfsprogs",
        least=320 * _MIB,
        make=("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1", "-L", "hutch"),
        make_limited=("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1", "-L", "hutch"),
    ),
    "btrfs": FileSystem(
        name="btrfs",
        package="btrfs-progs",
        least=128 * _MIB,
        make=("mkfs.btrfs", "-q", "-f", "-K", "-m", "single", "-L", "hutch"),
        discard="discard=async",
        limits="subvolume",
    ),
}


def file_system(kind: str) -> FileSystem | None:
    """Return the file system that a pool of this kind has of its own, None for none."""
    return _FILE_SYSTEMS.get(kind)


def make_and_mount(fs: FileSystem, path: str, point: str, *, reserved: bool) -> bool:
    """Make the file system in a file and mount it; return whether it keeps a volume to its
    size, which is tried with this kernel and not assumed."""
    if fs.make_limited:
        run_tool(fs.make_limited, path, package=fs.package)
        try:
            data = _options(fs, quotas=True, reserved=reserved)
            mount_file(path, point, fs.name, data, what="pool")
            return True
        except OSError as exc:
            if exc.errno not in _REFUSED:
                raise
    run_tool(fs.make, path, package=fs.package)
    mount_pool(fs, path, point, quotas=False, reserved=reserved)
    if fs.limits != "subvolume":
        return False
    try:
        run_tool(("btrfs", "quota", "enable"), point, package=fs.package)
    except BaseException:
        unmount_file(point)
        raise
    return True


def _options(fs: FileSystem, *, quotas: bool, reserved: bool) -> str:
    """Return the options of its mount; what is reserved is not given back to the host."""
    found = [*([] if reserved else [fs.discard]), *(["prjquota"] if quotas else [])]
    return ",".join(found)


def mount_pool(fs: FileSystem, path: str, point: str, *, quotas: bool, reserved: bool) -> None:
    """Mount a pool's file system as it was made."""
    limited = quotas and fs.limits == "project"
    try:
        data = _options(fs, quotas=limited, reserved=reserved)
        mount_file(path, point, fs.name, data, what="pool")
    except OSError as exc:
        if exc.errno not in _REFUSED:
            raise
        kept = " with project quotas" if limited else ""
        raise Unsupported(f"pool: this kernel cannot mount {fs.name}{kept}") from exc


def grow_mounted(fs: FileSystem, path: str, point: str) -> None:
    """Let a mounted file system have all of its file, which has grown; it may be unmounted then.
    Raise `Busy` where it would have to be and is in use."""
    from hutch.linux.loop import set_capacity

    device = device_of(point)
    set_capacity(device)
    if fs.name == "xfs":
        run_tool(("xfs_growfs",), point, package=fs.package)
    elif fs.name == "btrfs":
        run_tool(("btrfs", "filesystem", "resize", "max"), point, package=fs.package)
    else:
        try:
            run_tool(("resize2fs",), device, package=fs.package)
        except PermissionError:
            # The kernel asks for CAP_SYS_RESOURCE, which not every root has.
            _grow_unmounted(path, point, fs.package)


def _grow_unmounted(path: str, point: str, package: str) -> None:
    unmount_file(point)
    if not wait_detached(path, 1.0):
        raise Busy(
            "pool: this process may not grow it while it is in use",
            hint="stop what uses its volumes, or let it have CAP_SYS_RESOURCE",
        )
    # Repairs what an unclean end left; resize2fs insists on it. 1 and 2: repaired.
    run_tool(("e2fsck", "-f", "-p"), path, package=package, allowed=(0, 1, 2))
    run_tool(("resize2fs",), path, package=package)


def run_tool(
    argv: Sequence[str], path: str, *, package: str, allowed: Sequence[int] = (0,)
) -> bytes:
    """Run a file system's own program on a path; return what it printed. Raise `Unsupported`
    where it is not installed, `OSError` for what it says of the disk or of its rights."""
    from hutch.host.programs import find_program
    from hutch.process.run import run_command

    program = find_program(argv[0])
    if program is None:
        raise Unsupported(f"pool: {argv[0]} is not installed", hint=f"apt-get install {package}")
    done = run_command([program, *argv[1:], path], env=_ENV, timeout_s=_TIMEOUT_S)
    if done.returncode in allowed:
        return done.stdout
    said = (done.stderr + done.stdout).decode(errors="replace")
    for text, number in (
        ("No space left on device", errno.ENOSPC),
        ("Disk quota exceeded", errno.EDQUOT),
        ("Permission denied to resize", errno.EPERM),
        ("Operation not permitted", errno.EPERM),
        ("Permission denied", errno.EACCES),
    ):
        if text in said:
            raise OSError(number, os.strerror(number), path)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if "too small" in said:
        raise InvalidArgument(f"{argv[0]}: {lines[0]}", field="size")
    raise IntegrityError(f"{path}: {argv[0]}: {lines[-1] if lines else 'no reason was given'}")
