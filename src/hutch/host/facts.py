"""The facts of this host that decide how a container is made, cheap enough for every start.

`load_facts` reads them from `<root>/cache/facts.json` where that was written since the
machine started, else gathers and writes them. They are what the kernel answered, never what
its version suggests. `hutch doctor` examines far more; see `hutch.host.doctor`.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.linux.boot import boot_id

__all__ = ["Facts", "cgroup_mode", "gather_facts", "has_capability"]
__all__ += ["load_facts", "misc_minor", "replace_file"]

FORMAT = 1


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What this kernel gives this user. `euid` and `boot_id` say when the facts hold."""

    format: int = FORMAT
    boot_id: str
    euid: int
    kernel: str
    machine: str
    cpus: int
    memory: int
    privileged: bool
    overlay: bool
    overlay_lowerdir_append: bool
    new_mount_api: bool
    openat2: bool
    pidfd: bool
    cgroup_mode: str
    seccomp: bool
    apparmor: bool
    selinux: bool


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def has_capability(number: int) -> bool:
    """Tell whether a capability is effective, by its number (CAP_SYS_ADMIN is 21)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) & 1 << number)
    return False


def misc_minor(name: str, proc: Path = Path("/proc")) -> int:
    """Return the minor number of a device of major 10, -1 where the kernel has none."""
    with open(proc / "misc") as misc:
        for line in misc:
            number, _, found = line.strip().partition(" ")
            if found == name:
                return int(number)
    return -1


def cgroup_mode(cgroup_root: Path = Path("/sys/fs/cgroup")) -> str:
    """Return `v2`, `hybrid`, `v1` or `none`, by what is mounted under `cgroup_root`."""
    if (cgroup_root / "cgroup.controllers").exists():
        return "v2"
    if not cgroup_root.is_dir():
        return "none"
    v1 = any((cgroup_root / name / "cgroup.procs").exists() for name in ("memory", "cpu", "pids"))
    if (cgroup_root / "unified" / "cgroup.controllers").exists():
        return "hybrid" if v1 else "v2"
    return "v1" if v1 else "none"


def _overlay_lowerdir_append() -> tuple[bool, bool]:
    """Return whether overlay can be configured, and whether `lowerdir+` is understood.

    Nothing is mounted: the option is tried on a context that is then dropped. Without
    the privilege to open one both are False, and the caller is to ask in its user namespace.
    """
    from hutch.linux import mount

    try:
        fd = mount.fsopen("overlay")
    except OSError:
        return False, False
    try:
        return True, mount.overlay_takes_layers(fd)
    finally:
        os.close(fd)


def _works(call: str) -> bool:
    from hutch.linux import files, mount, pidfd

    try:
        if call == "openat2":
            os.close(files.openat2(mount.AT_FDCWD, "/", os.O_PATH))
        elif call == "open_tree":
            os.close(mount.open_tree(mount.AT_FDCWD, "/", 0))
        else:
            os.close(pidfd.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def gather_facts() -> Facts:
    """Ask the kernel now. Takes about a millisecond and starts no process."""
    uname = os.uname()
    overlay, append = _overlay_lowerdir_append()
    return Facts(
        boot_id=boot_id(),
        euid=os.geteuid(),
        kernel=uname.release,
        machine=uname.machine,
        cpus=os.cpu_count() or 1,
        memory=_memory_bytes(),
        privileged=has_capability(21),
        overlay=overlay,
        overlay_lowerdir_append=append,
        new_mount_api=_works("open_tree"),
        openat2=_works("openat2"),
        pidfd=_works("pidfd_open"),
        cgroup_mode=cgroup_mode(),
        seccomp=os.path.exists("/proc/sys/kernel/seccomp/actions_avail"),
        apparmor=is_apparmor_enabled(),
        selinux=os.path.exists("/sys/fs/selinux/enforce"),
    )


def is_apparmor_enabled(sys_root: Path = Path("/sys")) -> bool:
    """Tell whether the kernel enforces AppArmor profiles."""
    try:
        with open(sys_root / "module/apparmor/parameters/enabled") as file:
            return file.read().strip() == "Y"
    except OSError:
        return False


def load_facts(root: Path) -> Facts:
    """Return the facts of this boot and user, from `<root>/cache` where they are there.

    A cache that cannot be read or written costs time, never an error.
    """
    path = root / "cache" / f"facts-{os.geteuid()}.json"
    try:
        with open(path, "rb") as file:
            cached = decode_json(file.read(1 << 16), Facts)
    except (OSError, msgspec.DecodeError):
        cached = None
    if cached is not None and cached.format == FORMAT and cached.boot_id == boot_id():
        return cached
    facts = gather_facts()
    replace_file(path, msgspec.json.encode(facts))
    return facts


def replace_file(path: Path, content: bytes) -> None:
    """Put a cache file in place whole; another process may do the same at the same time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        return  # a read-only or full root is for the engine to report, not for its cache
