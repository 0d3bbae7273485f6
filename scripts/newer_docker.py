"""Unpack Docker's newest command line into build/docker, for the tests of Docker's API.

Debian's stable releases have older ones, which are tested too; a host whose `docker` is 28 or
newer needs nothing. Without either this says so and does nothing, and the tests go on with
what the host has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hutch.image.apt import Source
from scripts.debian import ROOT, fetch, make_from_first, say

PROGRAM = ROOT / "build" / "docker" / "docker"
SUITES = ("sid", "forky")
_WANTED = 28


def main() -> int:
    if PROGRAM.exists() or version_of("docker") >= _WANTED:
        return 0
    suite, problem = make_from_first(SUITES, make)
    if suite:
        say(f"Docker's command line for the tests: {PROGRAM.relative_to(ROOT)} ({suite})")
    else:
        say(f"no newer docker from {problem}; the tests of Docker's API use the host's")
    return 0


def version_of(program: str) -> int:
    """Return the major version of a command line, 0 where it does not run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
    except OSError:
        return 0
    found = re.search(r"version (\d+)\.", done.stdout)
    return int(found[1]) if found else 0


def make(wanted: Source, workspace: Path) -> None:
    """Keep the program, and see that it runs here before it gets its name."""
    (package,) = fetch(wanted, workspace, "docker-cli")
    subprocess.run(["dpkg-deb", "-x", str(package), str(workspace / "tree")], check=True)
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    beside = PROGRAM.with_name(f".docker-{os.getpid()}")
    shutil.copy(workspace / "tree/usr/bin/docker", beside)
    if version_of(str(beside)) < _WANTED:
        beside.unlink()
        raise ValueError(f"its docker is older than {_WANTED}, or does not run here")
    beside.rename(PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
