"""Unpack a CRIU into build/criu, with its own C library, for the tests of containers' memory.

CRIU before 4 does not know the vDSO of newer kernels, and later ones need a newer C library
than Debian's stable releases before trixie have: so it comes with all that it links to, from
Debian's sid or trixie at the mirror that the host's apt names, and runs through its own
loader. A host whose CRIU works needs nothing. Without either this says so and does nothing,
and those tests are skipped by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.criu import load_criu
from hutch.image.apt import Source
from scripts.debian import ROOT, fetch, make_from_first, say

TREE = ROOT / "build" / "criu"
PROGRAM = TREE / "criu"
SUITES = ("sid", "trixie")
_MACHINE = f"{os.uname().machine}-linux-gnu"


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
    """Keep the program and the libraries; move the whole into place at once."""
    made = workspace / "tree"
    for package in fetch(wanted, workspace, "criu", whole=True):
        subprocess.run(["dpkg-deb", "-x", str(package), str(made)], check=True)
    TREE.parent.mkdir(exist_ok=True)
    beside = TREE.with_name(f".criu-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "lib").mkdir(parents=True)
    for place in (made / "usr/lib" / _MACHINE, made / "lib" / _MACHINE):
        for library in place.glob("*.so*") if place.is_dir() else ():
            if library.is_file():
                shutil.copy(library, beside / "lib" / library.name)
    shutil.copy(made / "usr/sbin/criu", beside / "criu.bin")
    loader = next((beside / "lib").glob("ld-linux*.so*")).name
    script = beside / "criu"
    script.write_text(
        "#!/bin/sh\n"
        'here=$(dirname "$(readlink -f "$0")")\n'
        f'exec "$here/lib/{loader}" --library-path "$here/lib" "$here/criu.bin" "$@"\n'
    )
    script.chmod(0o755)
    shutil.rmtree(TREE, ignore_errors=True)
    beside.rename(TREE)


if __name__ == "__main__":
    sys.exit(main())
