"""Unpack a newer virtiofsd into build/share, for the tests of machines with directories of the
host that move while they run.

One that hands over what a guest has open is 1.13 or later, and needs a newer C library than
Debian's releases before trixie have: it comes with that, from trixie or sid at the mirror that
the host's apt names. A host whose virtiofsd can do it needs nothing. Without either this says so
and does nothing, and those tests are skipped by name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.virtiofsd import find_virtiofsd
from hutch.image.apt import Source
from scripts.debian import ROOT, fetch, make_from_first, say, unpack_program

# Its sandbox shows it the directory above its own.
PROGRAM = ROOT / "build" / "share" / "bin" / "virtiofsd"
SUITES = ("trixie", "sid")
# What it can do is told by the words in it, and the script is what is looked at.
_NOTE = "# It has --shared-dir and --migration-mode.\n"


def main() -> int:
    if PROGRAM.exists() or works():
        return 0
    suite, problem = make_from_first(SUITES, make)
    if suite:
        say(f"virtiofsd for the tests of migration: {PROGRAM.relative_to(ROOT)} ({suite})")
    else:
        say(f"no virtiofsd from {problem}; no tests of migration with directories of the host")
    return 0


def works() -> bool:
    try:
        return find_virtiofsd().moves
    except HutchError:
        return False


def make(wanted: Source, workspace: Path) -> None:
    debs = fetch(wanted, workspace, "virtiofsd", whole=True)
    unpack_program(debs, workspace, "usr/libexec/virtiofsd", PROGRAM, note=_NOTE)


if __name__ == "__main__":
    sys.exit(main())
