"""What a test may leave behind, as comparable sets: mounts, processes, cgroups, links, descriptors.

What can be traced to the test's own directory is always checked. What is global to the
machine (cgroups, network devices, namespaces) is compared only where this process has the
machine to itself: `HUTCH_CI=1` or `HUTCH_LEAKS=all`, and no other test worker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["global_snapshot", "local_leaks", "open_files", "wait_until_clean"]


# The launcher, which an engine of a wider fixture opens when a test first starts something.
_OF_AN_ENGINE = "/memfd:hutch-launcher"


def _processes() -> Iterator[Path]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            yield entry


def _mounts_under(directory: str) -> set[str]:
    with open("/proc/self/mountinfo") as table:
        points = [line.split()[4] for line in table]
    return {f"mount {p}" for p in points if p == directory or p.startswith(directory + "/")}


def _uses(process: Path, directory: str) -> bool:
    """Tell whether a process stands in, holds open or names a path under `directory`."""
    links = [process / "cwd", process / "root", process / "exe"]
    try:
        links += list((process / "fd").iterdir())
        for link in links:
            try:
                if os.readlink(link).startswith(directory):
                    return True
            except FileNotFoundError:
                continue
        return directory.encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False  # it ended meanwhile, or is not ours to look at


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "?"


def local_leaks(directory: Path) -> set[str]:
    """Return mounts and processes that still refer to `directory`."""
    text = str(directory)
    found = _mounts_under(text)
    for process in _processes():
        if _uses(process, text):
            found.add(f"process {process.name} ({_name(process)})")
    return found


def _open() -> Iterator[tuple[str, str]]:
    for entry in os.listdir("/proc/self/fd"):
        try:
            yield entry, os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the descriptor of the listing itself


def open_files() -> list[str]:
    """Return what this process has open, of each descriptor.

    Look for what the test itself would leave: what earlier ones left to the collector of
    garbage may be closed at any time.
    """
    return [target for _, target in _open()]


def _descriptors() -> set[str]:
    return {f"descriptor {n} -> {to}" for n, to in _open() if not to.startswith(_OF_AN_ENGINE)}


def _cgroups() -> set[str]:
    base = Path("/sys/fs/cgroup")
    groups = [*base.glob("hutch/*"), *base.glob("*/hutch/*")]
    return {f"cgroup {g}" for g in groups if g.is_dir()}


def _links() -> set[str]:
    prefixes = ("hutch", "hu-", "hv", "veth")
    names = os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else []
    return {f"network device {n}" for n in names if n.startswith(prefixes)}


def _named_netns() -> set[str]:
    return {f"network namespace {p}" for p in Path("/run/netns").glob("*")}


def _supervisors() -> set[str]:
    return {
        f"process {p.name} ({_name(p)})"
        for p in _processes()
        if _name(p).startswith(("hutch", "[hutch")) and not _holds_a_template(p)
    }


def _holds_a_template(process: Path) -> bool:
    """Tell whether a process is meant to outlive whoever started it, for starts to come."""
    try:
        return (process / "cmdline").read_bytes().split(b"\0")[1:2] == [b"hold"]
    except OSError:
        return False


def global_snapshot() -> set[str]:
    """Return everything of the kinds hutch makes that exists on this machine now."""
    with open("/proc/self/mountinfo") as table:
        mounts = {f"mount {line.split()[4]}" for line in table}
    return mounts | _descriptors() | _cgroups() | _links() | _named_netns() | _supervisors()


def wait_until_clean(
    directory: Path, before: set[str] | None, *, timeout_s: float = 60.0
) -> set[str]:
    """Wait until nothing of the test is left; return what still is at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = local_leaks(directory)
        if before is not None:
            left |= global_snapshot() - before
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)
