"""Unpack the dockerd of Debian's sid, with all that it needs, into build/dockerd: a root of its
own, in which `bench.peers.dockerd` starts it. For `make compare-docker ARGS=--newer`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from hutch.image.apt import Source
from scripts.debian import ROOT, fetch, make_from_first, say

__all__ = ["newer_dockerd"]

TREE = ROOT / "build" / "dockerd"
_SUITES = ("sid", "forky", "trixie")
_PACKAGES = ("docker.io", "docker-cli", "iptables", "base-files", "busybox-static")
_OLDEST = 26  # of Debian's releases the first that is newer than 20.10


def newer_dockerd() -> Path | None:
    """Return its root, made when it is absent; None where no suite of the mirror has one."""
    if (TREE / "usr/sbin/dockerd").exists():
        return TREE
    suite, problem = make_from_first(_SUITES, _make)
    if not suite:
        say(f"no newer dockerd: {problem}")
        return None
    say(f"dockerd of {suite}: {TREE.relative_to(ROOT)}")
    return TREE


def _make(wanted: Source, workspace: Path) -> None:
    """Unpack the packages beside the tree, see that dockerd runs, and give it its name."""
    packages = fetch(wanted, workspace, *_PACKAGES, whole=True)
    beside = TREE.with_name(f".dockerd-{os.getpid()}")
    try:
        # Its links of merged directories come before what is in them.
        for package in sorted(packages, key=lambda p: not p.name.startswith("base-files")):
            subprocess.run(
                ["dpkg-deb", "-x", str(package), str(beside)],
                check=True,
                capture_output=True,
                text=True,
            )
        _have_iptables(beside / "usr/sbin")
        _see_version(beside)
        shutil.rmtree(TREE, ignore_errors=True)
        beside.rename(TREE)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _have_iptables(programs: Path) -> None:
    """Name what Debian's alternatives would name: nothing was installed here."""
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            link = programs / f"{name}{suffix}"
            if not link.exists():
                link.symlink_to(f"{name}-nft{suffix}")


def _see_version(tree: Path) -> None:
    done = subprocess.run(
        ["chroot", str(tree), "/usr/sbin/dockerd", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    major = done.stdout.removeprefix("Docker version ").partition(".")[0]
    if not major.isdigit() or int(major) < _OLDEST:
        raise ValueError(f"its dockerd is no newer one: {done.stdout.strip()}")
