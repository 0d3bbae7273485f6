"""Ask the host for what a test needs: `@requires("root", "overlayfs")`, from one closed list.

Each need is probed once per process by trying it, when the first test that asks for it is
about to run. A test whose needs are not met is skipped and the reason says what is missing;
under `HUTCH_CI=1` the needs in `MUST_HOLD` fail the test instead, because the machine was
set up to have them.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["MUST_HOLD", "NEEDS", "criu_program", "live_qemu", "missing", "moving_virtiofsd"]
__all__ += ["requires"]

Probe = Callable[[], str | None]


def _run(*argv: str, timeout_s: float = 60.0) -> str | None:
    """Run a command; return None where it worked, else a short reason."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"{argv[0]}: {exc}"
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return f"{argv[0]}: {lines[-1] if lines else f'exit {done.returncode}'}"


def _program(name: str, *elsewhere: str) -> Probe:
    def probe() -> str | None:
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        found = shutil.which(name, path=path) or any(Path(p).exists() for p in elsewhere)
        return None if found else f"{name} is not installed"

    return probe


def _file(path: str) -> Probe:
    return lambda: None if Path(path).exists() else f"{path} is not installed"


def _root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


def _cgroup() -> str | None:
    base = Path("/sys/fs/cgroup")
    candidates = [base / "memory", base / "unified", base]
    for parent in candidates:
        if not (parent / "cgroup.procs").exists():
            continue
        group = parent / f"hutch-probe-{os.getpid()}"
        try:
            group.mkdir()
            group.rmdir()
        except OSError as exc:
            return f"cgroup: {exc}"
        return None
    return "no cgroup hierarchy is mounted"


def _overlayfs() -> str | None:
    script = (
        "mount -t tmpfs t /mnt && mkdir /mnt/l /mnt/u /mnt/w /mnt/m && "
        "mount -t overlay o -o lowerdir=/mnt/l,upperdir=/mnt/u,workdir=/mnt/w /mnt/m"
    )
    return _run("unshare", "-m", "sh", "-c", script)


def _erofs() -> str | None:
    script = (
        "mount -t tmpfs t /mnt && mkdir /mnt/a /mnt/b && mkfs.erofs --quiet /mnt/d /mnt/a && "
        "mount -t erofs -o loop,ro /mnt/d /mnt/b"
    )
    return _run("unshare", "-m", "sh", "-c", script)


def _seccomp() -> str | None:
    status = Path("/proc/self/status").read_text()
    if "Seccomp:" not in status:
        return "the kernel has no seccomp filters"
    names = ("/usr/lib", "/lib")
    if any(next(Path(d).glob("*/libseccomp.so.2"), None) for d in names if Path(d).is_dir()):
        return None
    return "libseccomp.so.2 is not installed"


def _userns() -> str | None:
    return _run("unshare", "-U", "-r", "true")


def _netns() -> str | None:
    return _run("unshare", "-n", "true")


def _nftables() -> str | None:
    return _run("unshare", "-n", "nft", "add table ip hutch_probe")


def _idmapped_mounts() -> str | None:
    release = os.uname().release.split(".")
    return None if (int(release[0]), int(release[1])) >= (5, 19) else "kernel before 5.19"


def _kvm() -> str | None:
    from hutch.host.kvm import kvm_boots

    return kvm_boots().detail if kvm_boots().state != "ok" else None


def _apt_mirror() -> str | None:
    """Ask the mirrors of the host's apt for one package, as bootstrap will."""
    if _root() is not None or not shutil.which("apt-get"):
        return "needs root and apt"
    if not any(Path("/var/lib/apt/lists").glob("*Packages*")):
        failed = _run("apt-get", "update", "-q", timeout_s=300)
        if failed:
            return failed
    return _run("sh", "-c", "apt-get download --print-uris busybox-static | grep -q :")


def live_qemu() -> Path:
    """Return a QEMU that copies a running emulated machine: the one under test, the one that
    `scripts/setup` unpacked, or the host's."""
    from hutch.host.qemu import load_qemu

    named = os.environ.get("HUTCH_TEST_QEMU")
    if named:
        return Path(named)
    own = Path(__file__).parent.parent / f"build/qemu/usr/bin/qemu-system-{os.uname().machine}"
    if own.exists():
        return own
    return Path(load_qemu(None).path)


def criu_program() -> str | None:
    """Return a CRIU that saves containers: that which `scripts/setup` unpacked, or the host's."""
    from hutch.host.criu import find_criu

    own = Path(__file__).parent.parent / "build/criu/criu"
    return str(own) if own.exists() else find_criu()


def moving_virtiofsd() -> Path | None:
    """Return a virtiofsd that hands over what a guest has open: that which `scripts/setup`
    unpacked, or the host's."""
    from hutch.errors import HutchError
    from hutch.host.virtiofsd import find_virtiofsd

    own = Path(__file__).parent.parent / "build/share/bin/virtiofsd"
    if own.exists():
        return own
    try:
        found = find_virtiofsd()
    except HutchError:
        return None
    return Path(found.path) if found.moves else None


def _moving_virtiofsd() -> str | None:
    return None if moving_virtiofsd() else "no virtiofsd from 1.13 on"


def _criu() -> str | None:
    from hutch.errors import HutchError
    from hutch.host.criu import load_criu

    try:
        load_criu(None, program=criu_program())
    except HutchError as exc:
        return exc.message
    return None


def _live_qemu() -> str | None:
    from hutch.errors import HutchError
    from hutch.host.qemu import load_qemu

    try:
        version = load_qemu(None, program=str(live_qemu())).version
    except HutchError as exc:
        return exc.message
    return None if version.sees_emulated_writes else f"QEMU {version} is older than 9.0"


def _tun() -> str | None:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return f"/dev/net/tun: {exc.strerror}"
    return None


def _loop() -> str | None:
    return None if Path("/dev/loop-control").exists() else "no loop devices"


def _fuse() -> str | None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return f"/dev/fuse: {exc.strerror}"
    return None


def _file_system(name: str, maker: str) -> Probe:
    def probe() -> str | None:
        if reason := _program(maker)():
            return reason
        known = Path("/proc/filesystems").read_text().split()
        return None if name in known else f"this kernel has no {name}"

    return probe


def _fs_verity() -> str | None:
    config = Path(f"/boot/config-{os.uname().release}")
    if config.exists():
        known = "CONFIG_FS_VERITY=y" in config.read_text()
    else:
        known = Path("/sys/fs/ext4/features/verity").exists()
    return None if known else "this kernel has no fs-verity"


def _swap() -> str | None:
    """Try a small file of swap: containers on a host are often not let to."""
    script = (
        "f=$(mktemp /var/tmp/hutch-swap.XXXXXX) && head -c 1M /dev/zero > $f && "
        "mkswap -q $f && swapon $f; s=$?; swapoff $f 2>/dev/null; rm -f $f; exit $s"
    )
    return _run("sh", "-c", script)


def _no_swap() -> str | None:
    swaps = Path("/proc/swaps")
    if swaps.exists() and len(swaps.read_text().splitlines()) > 1:
        return "the host has swap"
    return None


def _huge_pages() -> str | None:
    """Ask for what a machine of 256 MiB takes, and give it back."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    try:
        before = int(pool.read_text())
        pool.write_text(str(before + 136))
    except OSError as exc:
        return f"{pool}: {exc.strerror}"
    try:
        met = int(pool.read_text()) >= before + 136
    finally:
        pool.write_text(str(before))
    return None if met else "the host has no memory in pieces that large"


def _idle_ksm() -> str | None:
    run = Path("/sys/kernel/mm/ksm/run")
    if not run.exists():
        return "this kernel merges no pages"
    return "the host merges pages already" if run.read_text().strip() == "1" else None


def _zram() -> str | None:
    size = Path("/sys/block/zram0/disksize")
    return None if size.exists() and size.read_text().strip() == "0" else "no zram device is free"


def _two_cpus() -> str | None:
    return None if len(os.sched_getaffinity(0)) > 1 else "one processor"


def _cgroup_v2_memory() -> str | None:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if not controllers.exists() or "memory" not in controllers.read_text().split():
        return "no control groups of version 2 with memory"
    return None


def _cgroup_v2_hugetlb() -> str | None:
    """The controller that a hybrid layout most often leaves to version 2."""
    for base in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        controllers = Path(base, "cgroup.controllers")
        if controllers.exists() and "hugetlb" in controllers.read_text().split():
            return None
    return "no controller is left for version 2"


NEEDS: dict[str, Probe] = {
    "apt-mirror": _apt_mirror,
    "bwrap": _program("bwrap"),
    "btrfs": _file_system("btrfs", "mkfs.btrfs"),
    "busybox": _program("busybox"),
    "cc": _program("cc"),
    "cgroup": _cgroup,
    "criu": _criu,
    "cgroup-v2-hugetlb": _cgroup_v2_hugetlb,
    "cgroup-v2-memory": _cgroup_v2_memory,
    "containers-common": _file("/usr/share/containers/seccomp.json"),
    "crun": _program("crun"),
    "dig": _program("dig"),
    "docker-registry": _program("docker-registry"),
    "docker": _program("docker"),
    "dockerd": _program("dockerd"),
    "compose": _file(str(Path(__file__).parent.parent / "build/compose/docker-compose")),
    "docker-schema": _file(str(Path(__file__).parent.parent / "build/clients/swagger.yaml")),
    "schemathesis": _file(str(Path(__file__).parent.parent / "build/schemathesis/.wanted")),
    "fs-verity": _fs_verity,
    "fuse": _fuse,
    "fuse-overlayfs": _program("fuse-overlayfs"),
    "grub": _file("/usr/lib/grub/i386-pc/boot.img"),
    "huge-pages": _huge_pages,
    "idle-ksm": _idle_ksm,
    "idmapped-mounts": _idmapped_mounts,
    "kvm": _kvm,
    "erofs": _erofs,
    "live-qemu": _live_qemu,
    "genisoimage": _program("genisoimage"),
    "loop": _loop,
    "lz4": _program("lz4"),
    "mke2fs": _program("mke2fs"),
    "mkfs.erofs": _program("mkfs.erofs"),
    "mmdebstrap": _program("mmdebstrap"),
    "moving-virtiofsd": _moving_virtiofsd,
    "mtools": _program("mcopy"),
    "netns": _netns,
    "newuidmap": _program("newuidmap"),
    "nftables": _nftables,
    "no-swap": _no_swap,
    "overlayfs": _overlayfs,
    "ovmf": _file("/usr/share/OVMF/OVMF_CODE_4M.fd"),
    "podman": _program("podman"),
    "qemu": _program("qemu-system-x86_64"),
    "qemu-img": _program("qemu-img"),
    "virtiofsd": _program("virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"),
    "root": _root,
    "runc": _program("runc"),
    "seccomp": _seccomp,
    "skopeo": _program("skopeo"),
    "ssh": _program("ssh"),
    "sshd": _program("sshd"),
    "slirp4netns": _program("slirp4netns"),
    "strace": _program("strace"),
    "swtpm": _program("swtpm"),
    "efi-stub": _file("/usr/lib/systemd/boot/efi/linuxx64.efi.stub"),
    "swap": _swap,
    "tar": _program("tar"),
    "tun": _tun,
    "two-cpus": _two_cpus,
    "userns": _userns,
    "xfs": _file_system("xfs", "mkfs.xfs"),
    "zram": _zram,
    "zstd": _program("zstd"),
}

MUST_HOLD = frozenset(
    {
        "apt-mirror",
        "busybox",
        "cc",
        "cgroup",
        "criu",
        "dig",
        "docker",
        "efi-stub",
        "genisoimage",
        "grub",
        "docker-registry",
        "dockerd",
        "live-qemu",
        "loop",
        "lz4",
        "mke2fs",
        "mkfs.erofs",
        "mmdebstrap",
        "mtools",
        "netns",
        "nftables",
        "overlayfs",
        "ovmf",
        "qemu",
        "qemu-img",
        "virtiofsd",
        "root",
        "seccomp",
        "skopeo",
        "ssh",
        "slirp4netns",
        "sshd",
        "swtpm",
        "tar",
        "tun",
        "userns",
        "zstd",
    }
)
"""What `scripts/setup` gives every machine that runs the whole suite."""


@functools.cache
def missing(need: str) -> str | None:
    """Return None where the host has `need`, else what is missing."""
    return NEEDS[need]()


def requires(*needs: str) -> pytest.MarkDecorator:
    """Mark a test (or class, or module by `pytestmark`) as needing these of the host."""
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise ValueError(f"requires: not in the list: {', '.join(unknown)}")
    return pytest.mark.requires(*needs)
