"""Try kernel features by using them, in a process of its own that then ends.

`python -c "from hutch.host.probe import main; main('own')"` prints one JSON object: the
name of each probe with null where it worked, else with the reason it did not. `own` tries
with the caller's privileges, `userns` in a user namespace as an ordinary user would. The
process is thrown away, so a probe may change namespaces and mounts freely.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hutch.linux import files, mount, namespaces, pidfd, prctl

__all__ = ["NAMESPACES", "main"]

NOBODY = 65534
SCRATCH = "/tmp"

NAMESPACES: dict[str, int] = {
    "mnt": namespaces.CLONE_NEWNS,
    "uts": namespaces.CLONE_NEWUTS,
    "ipc": namespaces.CLONE_NEWIPC,
    "net": namespaces.CLONE_NEWNET,
    "cgroup": namespaces.CLONE_NEWCGROUP,
    "time": namespaces.CLONE_NEWTIME,
    "pid": namespaces.CLONE_NEWPID,
}


def _tmpfs() -> None:
    mount.mount("none", "/", None, mount.MS_REC | mount.MS_PRIVATE)
    mount.mount("probe", SCRATCH, "tmpfs", 0, "mode=755,size=1m")
    for name in ("a", "b", "upper", "work", "merged"):
        os.mkdir(f"{SCRATCH}/{name}")


def _overlay(*options: tuple[str, str | None]) -> None:
    """Make an overlay with these options through the descriptor API, and let it go."""
    fd = mount.fsopen("overlay")
    try:
        for key, value in options:
            if value is None:
                mount.fsconfig_set_flag(fd, key)
            else:
                mount.fsconfig_set_string(fd, key, value)
        mount.fsconfig_create(fd)
        os.close(mount.fsmount(fd))
    finally:
        os.close(fd)


_LOWER: tuple[tuple[str, str | None], ...] = (("lowerdir", f"{SCRATCH}/a:{SCRATCH}/b"),)
_UPPER: tuple[tuple[str, str | None], ...] = (
    ("upperdir", f"{SCRATCH}/upper"),
    ("workdir", f"{SCRATCH}/work"),
)


def _overlay_lowerdir_append() -> None:
    _overlay(("lowerdir+", f"{SCRATCH}/a"), ("lowerdir+", f"{SCRATCH}/b"), *_UPPER)


def _overlay_volatile() -> None:
    _overlay(*_LOWER, *_UPPER, ("volatile", None))


def _overlay_userxattr() -> None:
    _overlay(*_LOWER, *_UPPER, ("userxattr", None))


def _new_mount_api() -> None:
    fd = mount.open_tree(mount.AT_FDCWD, SCRATCH, mount.OPEN_TREE_CLONE)
    try:
        mount.mount_setattr(fd, "", attr_set=mount.MOUNT_ATTR_RDONLY)
        mount.move_mount(fd, "", mount.AT_FDCWD, f"{SCRATCH}/merged")
    finally:
        os.close(fd)


def _idmapped_mounts() -> None:
    """Ask for a mapping by our own user namespace: EPERM means that the kernel knows how.

    Kernels before 5.12 do not know the attribute and answer EINVAL.
    """
    own = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    fd = mount.open_tree(mount.AT_FDCWD, SCRATCH, mount.OPEN_TREE_CLONE)
    try:
        mount.mount_setattr(fd, "", attr_set=mount.MOUNT_ATTR_IDMAP, userns_fd=own)
    except PermissionError:
        return
    finally:
        os.close(fd)
        os.close(own)


def _openat2() -> None:
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(files.open_in_root(root, "/proc/self", os.O_PATH | os.O_NOFOLLOW))
    finally:
        os.close(root)


def _pidfd() -> None:
    os.close(pidfd.pidfd_open(os.getpid()))


_COMMON: dict[str, Callable[[], None]] = {
    "openat2": _openat2,
    "pidfd": _pidfd,
}
_AFTER_MOUNT_NAMESPACE: dict[str, Callable[[], None]] = {
    "tmpfs": _tmpfs,
    "new mount api": _new_mount_api,
    "overlay": lambda: _overlay(*_LOWER, *_UPPER),
    "overlay lowerdir+": _overlay_lowerdir_append,
    "overlay userxattr": _overlay_userxattr,
    # Last of the overlays: it marks the work directory as not to be used again.
    "overlay volatile": _overlay_volatile,
    "idmapped mounts": _idmapped_mounts,
}


def _attempt(probe: Callable[[], None]) -> str | None:
    try:
        probe()
    except OSError as exc:
        return exc.strerror or str(exc)
    except NotImplementedError as exc:
        return str(exc)
    return None


def _enter_user_namespace() -> None:
    """Become an ordinary user, then root of a new user namespace with one mapped id."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Without it /proc/self/uid_map stays root's. See PR_SET_DUMPABLE in prctl(2).
        prctl.prctl(prctl.PR_SET_DUMPABLE, 1)
    uid, gid = os.getuid(), os.getgid()
    namespaces.unshare(namespaces.CLONE_NEWUSER)
    for name, content in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, content.encode())
        finally:
            os.close(fd)


def run(kind: str) -> dict[str, str | None]:
    """Run the probes of one kind in this process, which is not usable afterwards."""
    results: dict[str, str | None] = {}
    if kind == "userns":
        results["user"] = _attempt(_enter_user_namespace)
        if results["user"] is not None:
            return results
    for name, probe in _COMMON.items():
        results[name] = _attempt(probe)
    for name, flag in NAMESPACES.items():
        results[name] = _attempt(lambda flag=flag: namespaces.unshare(flag))  # type: ignore[misc]
    if results["mnt"] is None:
        for name, probe in _AFTER_MOUNT_NAMESPACE.items():
            results[name] = _attempt(probe)
    return results


def main(kind: str) -> None:
    """Run the probes and print what came of them as JSON."""
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(run(kind)))
    sys.stdout.flush()
