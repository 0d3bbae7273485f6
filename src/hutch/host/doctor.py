"""Examine the host: every capability that hutch can use, tried out, with a cure for what lacks.

`examine` returns the findings as data; `render_table` makes the text that `hutch doctor`
prints. The examination starts processes and takes about a second; with QEMU and KVM there,
longer the first time (`hutch.host.kvm`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.host.criu import examine_criu
from hutch.host.facts import Facts, gather_facts
from hutch.host.findings import Finding, Report, State, finding_of
from hutch.host.machines import examine_machines
from hutch.host.programs import PROGRAMS, find_program, version_of

__all__ = ["examine", "render_table"]

_NEW_KERNEL = "run a newer kernel"
_PROBE = "import sys; sys.path[:0] = {path!r}; from hutch.host.probe import main; main({kind!r})"

Probed = dict[str, str | None]


def examine(root: Path, *, proc: Path = Path("/proc")) -> Report:
    """Try everything but networks (`hutch.network.probe` does) and return what was found;
    never raises for what the host lacks."""
    facts = gather_facts()
    user = _probe("userns")
    own = _probe("own")
    if not facts.privileged and _of(user, "user") is None:
        own |= user  # containers of an ordinary user start inside such a namespace
    findings: list[Finding] = []
    sections: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _kernel(facts, own),
        lambda: _namespaces(own),
        lambda: _storage(own),
        lambda: _security(facts),
        lambda: _cgroups(facts),
        lambda: _rootless(user, proc),
        _programs,
        lambda: examine_criu(root / "cache" if os.access(root, os.W_OK) else None),
        lambda: examine_machines(root),
        lambda: _resources(root, facts),
    )
    for section in sections:
        findings.extend(section())
    return Report(findings=tuple(findings))


def _probe(kind: str) -> Probed:
    """Run `hutch.host.probe` in a process of its own; {} where that could not be done."""
    from hutch.errors import HutchError
    from hutch.process.run import run_command

    if not sys.executable:
        return {}
    code = _PROBE.format(path=sys.path, kind=kind)
    try:
        done = run_command([sys.executable, "-S", "-c", code], timeout_s=30)
        return decode_json(done.stdout, Probed)
    except (OSError, HutchError, msgspec.DecodeError):
        return {}


def _of(probed: Probed, name: str) -> str | None:
    return probed.get(name, "could not be tried")


def _kernel(facts: Facts, own: Probed) -> Iterator[Finding]:
    yield Finding(
        area="kernel",
        name="kernel",
        state=State.OK,
        detail=f"Linux {facts.kernel} on {facts.machine}",
    )
    for name, use in (
        ("openat2", "paths in an image are resolved beneath its root"),
        ("new mount api", "mounts are made by descriptor"),
        ("pidfd", "signals reach the right process"),
    ):
        yield finding_of("kernel", name, _of(own, name), good=use, cure=_NEW_KERNEL, needed=True)


def _namespaces(own: Probed) -> Iterator[Finding]:
    cure = "run as root, or use what the section rootless offers"
    for name in ("mnt", "pid", "net", "uts", "ipc", "cgroup"):
        failure = _of(own, name)
        yield finding_of(
            "namespaces", f"{name} namespace", failure, cure=cure, needed=name != "cgroup"
        )


def _storage(own: Probed) -> Iterator[Finding]:
    yield finding_of(
        "storage",
        "overlay",
        _of(own, "overlay"),
        good="layers are stacked by the kernel",
        cure="modprobe overlay; without root a kernel from 5.11 is needed",
        needed=True,
    )
    yield finding_of(
        "storage",
        "overlay lowerdir+",
        _of(own, "overlay lowerdir+"),
        good="any number of layers",
        cure="run a kernel from 6.5 on",
        needed=True,
    )
    for name, good, cure in (
        ("overlay volatile", "no wait for the disk at the end of --rm", "kernel 5.10"),
        ("idmapped mounts", "user id maps without copies (--userns)", "kernel 5.19"),
    ):
        yield finding_of(
            "storage", name, _of(own, name), good=good, cure=cure, worst=State.DEGRADED
        )


def _security(facts: Facts) -> Iterator[Finding]:
    yield finding_of(
        "security",
        "seccomp",
        None if facts.seccomp else "the kernel was built without seccomp filters",
        cure="only --security-opt seccomp=unconfined works here",
        needed=True,
    )
    version = _libseccomp()
    yield finding_of(
        "security",
        "libseccomp",
        None if version else "libseccomp.so.2 cannot be loaded",
        good=version or "",
        cure="apt-get install libseccomp2",
        needed=True,
    )
    for name, there in (("AppArmor", facts.apparmor), ("SELinux", facts.selinux)):
        yield finding_of(
            "security",
            name,
            None if there else "not enabled in this kernel",
            good="enabled",
            worst=State.DEGRADED,
        )


def _libseccomp() -> str | None:
    from hutch.errors import HutchError
    from hutch.linux.seccomp import library_version

    try:
        return library_version()
    except (OSError, HutchError):
        return None


def _cgroups(facts: Facts) -> Iterator[Finding]:
    mode = facts.cgroup_mode
    yield finding_of(
        "cgroup",
        "cgroup",
        "no hierarchy is mounted" if mode == "none" else None,
        good=mode,
        cure="mount cgroup2 on /sys/fs/cgroup",
        needed=True,
    )
    controllers = _controllers()
    for name, lost in (
        ("memory", "--memory"),
        ("cpu", "--cpus and --cpu-shares"),
        ("cpuset", "--cpuset-cpus"),
        ("pids", "--pids-limit"),
        ("blkio", "limits of disk rates"),
        ("devices", "the list of allowed devices"),
        ("freezer", "pause"),
    ):
        yield finding_of(
            "cgroup",
            f"{name} controller",
            None if name in controllers else f"not there: no {lost}",
            good=controllers.get(name, ""),
            cure="enable it on the kernel command line or in cgroup.subtree_control",
            worst=State.DEGRADED,
        )


def _controllers(cgroup_root: Path = Path("/sys/fs/cgroup")) -> dict[str, str]:
    """Return each controller and where it was found; v2's names are turned into v1's."""
    found: dict[str, str] = {}
    for base in (cgroup_root, cgroup_root / "unified"):
        try:
            names = (base / "cgroup.controllers").read_text().split()
        except OSError:
            continue
        found.update({"blkio" if n == "io" else n: "v2" for n in names})
        found.update({"devices": "v2, by BPF", "freezer": "v2"})
    for name in ("memory", "cpu", "cpuset", "pids", "blkio", "devices", "freezer"):
        if (cgroup_root / name / "cgroup.procs").exists():
            found[name] = "v1"
    return found


def _rootless(user: Probed, proc: Path) -> Iterator[Finding]:
    refused = _of(user, "user")
    yield finding_of(
        "rootless",
        "user namespaces",
        refused,
        good="an ordinary user may create them",
        cure="sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone",
        worst=State.DEGRADED,
    )
    if refused is not None:
        return
    yield finding_of(
        "rootless",
        "overlay in a user namespace",
        _of(user, "overlay userxattr"),
        good="the kernel's overlay",
        cure="apt-get install fuse-overlayfs",
        worst=State.DEGRADED,
    )
    yield _subordinate_ids()


def _subordinate_ids(etc: Path = Path("/etc")) -> Finding:
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    ranges = []
    for name in ("subuid", "subgid"):
        try:
            lines = (etc / name).read_text().splitlines()
        except OSError:
            lines = []
        ranges.append([line for line in lines if line.split(":")[0] in {user, str(os.getuid())}])
    return finding_of(
        "rootless",
        "subordinate ids",
        None if all(ranges) else f"{user} has no range in /etc/subuid and /etc/subgid",
        good=", ".join(r[0] for r in ranges if r),
        cure=f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
        worst=State.DEGRADED,
    )


def _programs() -> Iterator[Finding]:
    for program in PROGRAMS:
        path = find_program(program.name)
        if path is None:
            detail = f"not installed: {program.use}"
        elif program.version_argument is None:
            detail = path
        else:
            detail = version_of(path, program.version_argument) or path
        yield finding_of(
            "programs",
            program.name,
            detail if path is None else None,
            good=detail,
            cure=f"apt-get install {program.package}",
            worst=State.DEGRADED,
        )


def _resources(root: Path, facts: Facts) -> Iterator[Finding]:
    import resource

    from hutch.units import format_bytes

    existing = root
    while not existing.exists():
        existing = existing.parent
    disk = os.statvfs(existing)
    free = disk.f_bavail * disk.f_frsize
    yield finding_of(
        "resources",
        "disk",
        None if free > 1 << 30 else f"{format_bytes(free)} free under {existing}",
        good=f"{format_bytes(free)} free under {existing}",
        cure="hutch system prune, or another root with --root",
        worst=State.DEGRADED,
    )
    yield Finding(
        area="resources",
        name="processors and memory",
        state=State.OK,
        detail=f"{facts.cpus} processors, {format_bytes(facts.memory)}",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield finding_of(
        "resources",
        "open files",
        None if hard >= 4096 or hard == resource.RLIM_INFINITY else f"at most {hard}",
        good=f"{soft} of at most {hard}",
        cure="raise LimitNOFILE or ulimit -n",
        worst=State.DEGRADED,
    )
    yield from _reclaim()


def _reclaim(
    proc: Path = Path("/proc"), sys: Path = Path("/sys"), dev: Path = Path("/dev")
) -> Iterator[Finding]:
    """What `hutch system memory` has to go by, and what sizes of layers and volumes need."""
    told = (proc / "pressure/memory").exists()
    yield finding_of(
        "resources",
        "memory pressure",
        None if told else "the kernel tells no stalls (PSI): reclaim goes by watermarks alone",
        good="told by the kernel (PSI)",
        cure="boot with psi=1",
        worst=State.DEGRADED,
    )
    merges = (sys / "kernel/mm/ksm/run").exists()
    yield finding_of(
        "resources",
        "page merging",
        None if merges else "the kernel has no KSM: --placement merge=on has no effect",
        good="the kernel has KSM, for machines that ask for it",
        cure="a kernel with CONFIG_KSM",
        worst=State.DEGRADED,
    )
    loops = (dev / "loop-control").exists()
    yield finding_of(
        "resources",
        "loop devices",
        None if loops else "none: layers of containers and volumes can have no size",
        good="layers of containers and volumes can have a size",
        cure="modprobe loop",
        worst=State.DEGRADED,
    )


_MARKS = {State.OK: "ok", State.DEGRADED: "degraded", State.MISSING: "MISSING"}


def render_table(report: Report) -> str:
    """Return the report as text for people: one line per finding, its cure beneath."""
    name_width = max(len(f.name) for f in report.findings)
    lines: list[str] = []
    area = ""
    for finding in report.findings:
        if finding.area != area:
            area = finding.area
            lines += [*([""] if lines else []), area]
        mark = _MARKS[finding.state]
        lines.append(f"  {finding.name:{name_width}}  {mark:8}  {finding.detail}".rstrip())
        if finding.cure and finding.state is not State.OK:
            lines.append(f"  {'':{name_width}}  {'':8}  cure: {finding.cure}")
    lines.append("")
    for kind, able in (("containers", report.usable), ("virtual machines", report.runs_machines)):
        lines.append(f"this host {'can' if able else 'cannot'} run {kind} as this user")
    return "\n".join(lines) + "\n"
