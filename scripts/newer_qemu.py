"""Unpack a newer QEMU into build/qemu, for the tests of live migration; the host's stays as it is.

Emulated machines can be copied while they run from QEMU 9.0 on. A host that has one needs
nothing; on another the distribution's backports are asked, at the mirror that its own apt
names. Without either this says so and does nothing, and those tests are skipped by name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.qemu import load_qemu
from hutch.image.apt import Source
from scripts.debian import ROOT, fetch, make_from_first, say, unpack_qemu

TREE = ROOT / "build" / "qemu"
PROGRAM = TREE / "usr" / "bin" / f"qemu-system-{os.uname().machine}"
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")


def main() -> int:
    if PROGRAM.exists() or has_new_enough():
        return 0
    suite, problem = make_from_first(("backports",), make)
    if suite:
        say(f"QEMU for the tests of live migration: {PROGRAM.relative_to(ROOT)}")
    else:
        say(f"QEMU is older than 9.0; no newer one from {problem}; no tests of live migration")
    return 0


def make(wanted: Source, workspace: Path) -> None:
    unpack_qemu(fetch(wanted, workspace, *PACKAGES), TREE)


def has_new_enough() -> bool:
    try:
        return load_qemu(None).version.sees_emulated_writes
    except HutchError:
        return False


if __name__ == "__main__":
    sys.exit(main())
