"""Unpack a CRIU into build/criu, with its own C library, for the tests of containers' memory.

CRIU before 4 does not know the vDSO of newer kernels, and later ones need a newer C library
than Debian's stable releases before trixie have: so it comes with all that it links to, from
Debian's sid or trixie at the mirror that the host's apt names, and runs through its own
loader. A host whose CRIU works needs nothing. Without either this says so and does nothing,
and those tests are skipped by name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.criu import load_criu
from hutch.image.apt import Source
from scripts.debian import ROOT, fetch, make_from_first, say, unpack_program

TREE = ROOT / "build" / "criu"
PROGRAM = TREE / "criu"
SUITES = ("sid", "trixie")


def main() -> int:
    if PROGRAM.exists() or works():
        return 0
    suite, problem = make_from_first(SUITES, make)
    if suite:
        say(f"CRIU for the tests of containers' memory: {PROGRAM.relative_to(ROOT)} ({suite})")
    else:
        say(f"no CRIU from {problem}; no tests of containers' memory")
    return 0


def works() -> bool:
    try:
        load_criu(None)
    except HutchError:
        return False
    return True


def make(wanted: Source, workspace: Path) -> None:
    debs = fetch(wanted, workspace, "criu", whole=True)
    unpack_program(debs, workspace, "usr/sbin/criu", PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
