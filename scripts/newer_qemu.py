"""Unpack a newer QEMU into build/qemu, for the tests of live migration; the host's stays as it is.

Emulated machines can be copied while they run from QEMU 9.0 on. A host that has one needs
nothing; on another the distribution's backports are asked, at the mirror that its own apt
names. Without either this says so and does nothing, and those tests are skipped by name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.qemu import load_qemu
from scripts.debian import ROOT, fetch, source, unpack_qemu

TREE = ROOT / "build" / "qemu"
PROGRAM = TREE / "usr" / "bin" / f"qemu-system-{os.uname().machine}"
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")


def main() -> int:
    if PROGRAM.exists() or has_new_enough():
        return 0
    backports = source("backports")
    if backports is None:
        say("QEMU is older than 9.0 and apt names no Debian mirror: no tests of live migration")
        return 0
    with tempfile.TemporaryDirectory(prefix="hutch-qemu-") as workspace:
        try:
            debs = fetch(backports, Path(workspace), *PACKAGES)
        except subprocess.CalledProcessError as exc:
            said = (exc.stderr or "").strip().splitlines()[-1:] or [""]
            say(f"no newer QEMU from {backports.suites[0]}: {said[0]}; no tests of live migration")
            return 0
        unpack_qemu(debs, TREE)
    say(f"QEMU for the tests of live migration: {PROGRAM.relative_to(ROOT)}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr)


def has_new_enough() -> bool:
    try:
        return load_qemu(None).version.sees_emulated_writes
    except HutchError:
        return False


if __name__ == "__main__":
    sys.exit(main())
